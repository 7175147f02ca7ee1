"""TRUNCATE of a partition: it is not sent under the root's name, so it has to be found."""

from __future__ import annotations

import pytest

from cdc_sync.errors import SourceError
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.preflight import preflight_source
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.source_tables import source_settings

SCHEMA = """
CREATE TABLE docs (id bigint PRIMARY KEY, note text, emb vector(4)) PARTITION BY RANGE (id);
CREATE TABLE docs_1 PARTITION OF docs FOR VALUES FROM (0) TO (100);
CREATE TABLE docs_2 PARTITION OF docs FOR VALUES FROM (100) TO (200);
INSERT INTO docs SELECT i, 'note', '[1,2,3,4]' FROM generate_series(0, 199) i;
"""


@pytest.mark.requirement("R34")
@pytest.mark.parametrize("target", ["server", "edge"])
def test_a_truncated_partition_is_swept(
    database18: Database, sync_table: SyncTable, target: str
) -> None:
    database18.execute(SCHEMA)
    synced = sync_table(database18, "docs", target=target)
    database18.execute("TRUNCATE docs_1; INSERT INTO docs VALUES (7, 'again', NULL)")
    synced.daemon.wait(lambda: "sweep_completed" in synced.daemon.log(), "the sweep", 60)
    assert synced.daemon.metric("cdc_sync_orphans_total", table="public.docs") == 99
    assert synced.daemon.metric("cdc_sync_sweep_parts_total", table="public.docs") >= 1
    synced.assert_equal()


@pytest.mark.requirement("R34")
def test_so_is_one_that_was_truncated_while_the_pipeline_was_down(
    database18: Database, sync_table: SyncTable
) -> None:
    database18.execute(SCHEMA)
    synced = sync_table(database18, "docs")
    synced.daemon.terminate()
    database18.execute("TRUNCATE docs_2")
    synced.daemon.start()
    synced.daemon.wait(lambda: "sweep_completed" in synced.daemon.log(), "the sweep", 60)
    synced.assert_equal()
    synced.daemon.terminate()
    synced.daemon.start()
    assert "sweep_wanted" not in synced.daemon.log()


def test_other_storage_with_the_same_rows_changes_nothing(
    database18: Database, sync_table: SyncTable
) -> None:
    database18.execute(SCHEMA)
    synced = sync_table(database18, "docs")
    database18.execute("VACUUM FULL docs_1")
    synced.daemon.wait(lambda: "sweep_completed" in synced.daemon.log(), "the sweep", 60)
    synced.assert_equal()
    assert synced.daemon.metric("cdc_sync_orphans_total", table="public.docs") == 0


@pytest.mark.requirement("R35")
def test_postgres_14_loses_attached_partitions(protocol_database: Database) -> None:
    protocol_database.execute(
        "CREATE TABLE docs (id int PRIMARY KEY, note text) PARTITION BY RANGE (id);"
        "CREATE TABLE docs_1 PARTITION OF docs FOR VALUES FROM (0) TO (10)"
    )
    source = source_settings(protocol_database.url)
    with connect(source) as connection:
        table = find_table(connection, "docs")
        if protocol_database.major >= 15:
            preflight_source(
                connection, source, tables=[table], slot_exists=False, publication=None
            )
            return
        with pytest.raises(SourceError, match=r"docs is partitioned, and Postgres before 15"):
            preflight_source(
                connection, source, tables=[table], slot_exists=False, publication=None
            )
