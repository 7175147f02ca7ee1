"""The spine: a table is copied, followed, and ends equal, into a server and into an embedded
database."""

from __future__ import annotations

import pytest

from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database

TARGETS = ["server", "edge"]


def vector(dim: int, seed: float) -> str:
    return "[" + ",".join(f"{(seed * 0.37 + i * 0.11) % 1.7 - 0.5:.4f}" for i in range(dim)) + "]"


def create_docs(database: Database, dim: int = 1536, rows: int = 10) -> None:
    database.execute(
        f"CREATE TABLE docs (id bigint PRIMARY KEY, note text, n int, tags text[], meta jsonb, "
        f"emb vector({dim}), small halfvec(8))"
    )
    for i in range(rows):
        database.execute(
            "INSERT INTO docs VALUES (%s, %s, %s, %s, %s, %s, %s)",
            (i, f"note {i}", i, ["a", None], '{"k": [1, 2.5, null]}', vector(dim, i), vector(8, i)),
        )


@pytest.mark.parametrize("target", TARGETS)
def test_copy_then_every_kind_of_change(
    database: Database, sync_table: SyncTable, target: str
) -> None:
    create_docs(database)
    synced = sync_table(database, "docs", target=target)
    with database.connect(autocommit=False) as connection:
        connection.execute(
            "INSERT INTO docs VALUES (100, 'new', 1, '{}', 'null', %s, NULL)", (vector(1536, 9),)
        )
        connection.execute("UPDATE docs SET note = 'changed' WHERE id = 1")
        connection.execute("UPDATE docs SET emb = %s WHERE id = 2", (vector(1536, 77),))
        connection.execute("UPDATE docs SET emb = NULL WHERE id = 3")
        connection.execute("UPDATE docs SET id = 200, note = NULL WHERE id = 4")
        connection.execute("DELETE FROM docs WHERE id = 5")
        connection.commit()
        connection.execute("DELETE FROM docs")
        connection.rollback()
        connection.execute("SAVEPOINT s")
        connection.execute("DELETE FROM docs WHERE id = 6")
        connection.execute("ROLLBACK TO s")
        connection.execute("UPDATE docs SET n = -1 WHERE id = 6")
        connection.commit()
    synced.assert_equal()
    assert synced.daemon.running or target == "edge"


@pytest.mark.requirement("R29")
def test_truncate_is_a_barrier(database18: Database, sync_table: SyncTable) -> None:
    create_docs(database18, dim=8)
    synced = sync_table(database18, "docs")
    with database18.connect(autocommit=False) as connection:
        connection.execute("INSERT INTO docs (id) VALUES (500)")
        connection.execute("TRUNCATE docs")
        connection.execute("INSERT INTO docs (id, note) VALUES (501, 'after')")
        connection.commit()
    synced.assert_equal()
    assert database18.execute("SELECT count(*) FROM docs") == [(1,)]


def test_sigterm_drains_confirms_and_exits_0(database18: Database, sync_table: SyncTable) -> None:
    create_docs(database18, dim=8)
    synced = sync_table(database18, "docs")
    database18.execute("UPDATE docs SET note = 'x'")
    synced.daemon.wait_caught_up()
    assert synced.daemon.terminate() == 0
    events = [e.get("event") for e in synced.daemon.events()]
    assert "stopped" in events
    # What changes while it is away comes when it is back.
    database18.execute("DELETE FROM docs WHERE id = 7")
    database18.execute("UPDATE docs SET id = 70 WHERE id = 8")
    synced.daemon.start()
    synced.assert_equal()
