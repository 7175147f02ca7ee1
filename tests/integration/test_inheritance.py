"""Partitions made by hand: tables that inherit from one. All of their rows must arrive, not the
parent's alone."""

from __future__ import annotations

import pytest

from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database

SCHEMA = """
CREATE TABLE docs (id bigint PRIMARY KEY, note text, emb vector(700));
CREATE TABLE docs_2025 (extra int, PRIMARY KEY (id)) INHERITS (docs);
CREATE TABLE docs_2026 (PRIMARY KEY (id)) INHERITS (docs);
CREATE TABLE docs_2026_01 (PRIMARY KEY (id)) INHERITS (docs_2026);
CREATE FUNCTION vec(i bigint) RETURNS vector LANGUAGE sql AS
  $$ SELECT array_agg((i % 7 + n)::real)::vector FROM generate_series(1, 700) n $$;
INSERT INTO docs SELECT i, 'parent', vec(i) FROM generate_series(1, 20) i;
INSERT INTO docs_2025 SELECT i, '2025', vec(i), 5 FROM generate_series(101, 120) i;
INSERT INTO docs_2026 SELECT i, '2026', vec(i) FROM generate_series(201, 220) i;
INSERT INTO docs_2026_01 SELECT i, 'january', vec(i) FROM generate_series(301, 320) i;
"""


@pytest.mark.requirement("R40")
@pytest.mark.parametrize("target", ["server", "edge"])
def test_all_tables_that_inherit_arrive(
    database: Database, sync_table: SyncTable, target: str
) -> None:
    database.execute(SCHEMA)
    synced = sync_table(database, "docs", target=target)
    database.execute("UPDATE docs SET note = 'touched' WHERE id % 2 = 0")
    database.execute(
        "INSERT INTO docs_2025 SELECT i, 'new', vec(i), 6 FROM generate_series(130, 140) i"
    )
    database.execute("DELETE FROM docs_2026 WHERE id IN (203, 303)")
    database.execute("UPDATE docs_2026_01 SET id = 333 WHERE id = 304")
    database.execute(
        "WITH gone AS (DELETE FROM docs_2025 WHERE id = 105 RETURNING id, emb)"
        " INSERT INTO docs_2026 SELECT id, 'moved', emb FROM gone"
    )
    synced.assert_equal()
    assert database.execute("SELECT count(*) FROM docs") == [(89,)]


@pytest.mark.requirement("R40", "R29")
def test_truncate_of_one_and_of_all(database18: Database, sync_table: SyncTable) -> None:
    database18.execute(SCHEMA)
    synced = sync_table(database18, "docs")
    database18.execute("TRUNCATE docs_2026")
    synced.daemon.wait(lambda: "resync_completed" in synced.daemon.log(), "the resync", 60)
    synced.assert_equal()
    database18.execute("TRUNCATE docs; INSERT INTO docs_2025 VALUES (1, 'after', NULL, 1)")
    synced.assert_equal()


@pytest.mark.requirement("R40")
def test_a_child_without_a_key_is_refused_before_it_is_published(
    database18: Database, sync_table: SyncTable
) -> None:
    """Else the application's updates would fail."""
    database18.execute(SCHEMA + "ALTER TABLE docs_2026 DROP CONSTRAINT docs_2026_pkey;")
    synced = sync_table(database18, "docs", start=False, superuser=True)
    synced.daemon.start(wait=False)
    assert synced.daemon.process is not None
    assert synced.daemon.process.wait(90) != 0
    assert "ADD PRIMARY KEY" in synced.daemon.log()
    assert database18.execute("SELECT count(*) FROM pg_publication") == [(0,)]


@pytest.mark.requirement("R40")
def test_a_late_child_is_not_passed_over_in_silence(
    database18: Database, sync_table: SyncTable
) -> None:
    database18.execute(SCHEMA)
    synced = sync_table(database18, "docs")
    database18.execute(
        "CREATE TABLE docs_2027 (PRIMARY KEY (id)) INHERITS (docs);"
        "GRANT SELECT ON docs_2027 TO PUBLIC;"
        "INSERT INTO docs_2027 VALUES (401, 'late', NULL)"
    )
    synced.daemon.wait(lambda: "table_stopped" in synced.daemon.log(), "the table to stop", 60)
    assert "ADD TABLE ONLY" in synced.daemon.status()["tables"][0]["remedy"]
    name = synced.daemon.slot
    database18.execute(f'ALTER PUBLICATION "{name}" ADD TABLE ONLY docs_2027')
    synced.daemon.wait(lambda: "resync_completed" in synced.daemon.log(), "the copy", 60)
    synced.assert_equal()


@pytest.mark.requirement("R40", "R76")
def test_a_publication_of_the_parent_only_is_followed(
    database18: Database, sync_table: SyncTable
) -> None:
    database18.execute(SCHEMA)
    synced = sync_table(
        database18, "docs", start=False, superuser=True, compare_options={"only": True}
    )
    database18.execute(f'CREATE PUBLICATION "{synced.daemon.slot}" FOR TABLE ONLY docs')
    synced.daemon.start()
    assert "their rows are not taken" in synced.daemon.log()
    database18.execute("UPDATE docs SET note = 'x'")
    synced.assert_equal()
