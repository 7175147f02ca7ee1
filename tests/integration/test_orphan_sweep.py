"""The sweep: points that have no row in the snapshot, over partitions, keys of every id scheme, a
row filter, and several buckets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from cdc_sync.config import QdrantSettings, SourceSettings
from cdc_sync.errors import SourceError
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.planner import build_plan
from cdc_sync.mapping.table import Table
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.snapshot import (
    SnapshotHolder,
    copy_query,
    copy_rows,
    import_snapshot,
    key_query,
)
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Changes, Sink, TableWriter
from cdc_sync.rows import PointId
from cdc_sync.sync.orphans import sweep
from tests.support.fix_postgres import Database
from tests.support.fix_qdrant import QdrantTarget
from tests.support.sinks import ready, settings_of


@pytest.fixture(params=["edge", "server"])
async def sink(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Sink]:
    if request.param == "edge":
        settings = QdrantSettings.model_validate({"url": f"edge:{tmp_path / 'edge'}"})
    else:
        target: QdrantTarget = request.getfixturevalue("qdrant")
        settings = settings_of(target)
    opened = await open_sink(settings)
    yield opened
    await opened.close()


def source_of(database: Database) -> SourceSettings:
    return SourceSettings.model_validate({"url": database.url})


def planned(database: Database, options: PlanOptions | None = None) -> tuple[Table, TablePlan]:
    with connect(source_of(database)) as connection:
        table = find_table(connection, "docs")
    collection = f"docs_{uuid.uuid4().hex[:12]}"
    options = dataclasses.replace(options or PlanOptions(), collection=collection)
    return table, build_plan(table, options).plan


@contextlib.contextmanager
def snapshot_of(database: Database, table: Table) -> Iterator[PgConnection]:
    holder = SnapshotHolder.fresh(source_of(database), [table])
    with connect(source_of(database), autocommit=False) as connection:
        import_snapshot(connection, holder.snapshot_id)
        yield connection
    holder.close()


async def copy(connection: PgConnection, writer: TableWriter, table: Table) -> set[PointId]:
    """Write all rows; returns their ids."""
    point_id = compile_point_id(writer.plan)
    changes = Changes()
    for leaf in table.leaves:
        for batch in copy_rows(connection, *copy_query(writer.plan, leaf, 0, None)):
            changes.upserts += [(point_id(row), row) for row in batch]
    await writer.apply(changes)
    return {id_ for id_, _ in changes.upserts}


async def swept(
    connection: PgConnection,
    writer: TableWriter,
    table: Table,
    buckets: int,
    row_filter: str | None = None,
) -> list[PointId]:
    queries = [key_query(writer.plan, leaf, row_filter) for leaf in table.leaves]
    found: list[PointId] = []
    for bucket in range(buckets):
        found += await sweep(connection, writer, writer.plan, queries, bucket, buckets)
    return found


KEYS = [
    ("id bigint PRIMARY KEY", "n - 10", PlanOptions()),
    ("id uuid PRIMARY KEY", "md5(n::text)::uuid", PlanOptions()),
    ("id text PRIMARY KEY", "'key ' || n", PlanOptions()),
    ("id bigint PRIMARY KEY", "n - 10", PlanOptions(ids="qdrant-migration")),
    ("id text PRIMARY KEY", "md5(n::text)", PlanOptions(ids="qdrant-migration-hex")),
    ("id bigint PRIMARY KEY", "n", PlanOptions(namespace="docs")),
]


@pytest.mark.parametrize(("key", "value", "options"), KEYS)
async def test_points_without_a_row_are_found(
    database18: Database, sink: Sink, key: str, value: str, options: PlanOptions
) -> None:
    database18.execute(f"CREATE TABLE docs ({key}, note text, v vector(2))")
    database18.execute(
        f"INSERT INTO docs SELECT {value}, 'note', '[1,2]' FROM generate_series(0, 299) n"
    )
    table, plan = planned(database18, options)
    writer = await ready(sink, plan)
    with snapshot_of(database18, table) as connection:
        ids = await copy(connection, writer, table)
        assert await swept(connection, writer, table, 3) == []
    database18.execute("DELETE FROM docs WHERE ctid IN (SELECT ctid FROM docs LIMIT 40)")
    with snapshot_of(database18, table) as connection:
        # Rows that go after the snapshot was taken are there in it.
        database18.execute("DELETE FROM docs WHERE ctid IN (SELECT ctid FROM docs LIMIT 40)")
        for buckets in (1, 4):
            found = await swept(connection, writer, table, buckets)
            assert len(found) == len(set(found)) == 40
            assert set(found) <= ids
        await writer.apply(Changes(deletes=found))
        assert await swept(connection, writer, table, 1) == []
    assert await writer.count() == 260


async def test_partitions_composite_keys_and_a_row_filter(database18: Database, sink: Sink) -> None:
    database18.execute(
        "CREATE TABLE docs (note text, tenant text, n int, hidden bool NOT NULL DEFAULT false,"
        " v vector(2), PRIMARY KEY (n, tenant)) PARTITION BY LIST (tenant)"
    )
    for tenant in ("a", "b", "c"):
        database18.execute(
            f"CREATE TABLE docs_{tenant} PARTITION OF docs FOR VALUES IN ('{tenant}')"
        )
        database18.execute(
            "INSERT INTO docs SELECT 'x', %s, n FROM generate_series(1, 50) n", (tenant,)
        )
    table, plan = planned(database18)
    writer = await ready(sink, plan)
    with snapshot_of(database18, table) as connection:
        ids = await copy(connection, writer, table)
    database18.execute("UPDATE docs SET hidden = true WHERE n <= 5")
    database18.execute("DELETE FROM docs WHERE tenant = 'b' AND n = 50")
    database18.execute("UPDATE docs SET tenant = 'c', n = 51 WHERE tenant = 'a' AND n = 50")
    with snapshot_of(database18, table) as connection:
        assert len(await swept(connection, writer, table, 1)) == 2
        found = await swept(connection, writer, table, 2, "NOT hidden")
        assert len(found) == 2 + 15
        assert set(found) <= ids


async def test_an_empty_table_and_an_empty_collection(database18: Database, sink: Sink) -> None:
    database18.execute("CREATE TABLE docs (id bigint PRIMARY KEY, v vector(2))")
    table, plan = planned(database18)
    writer = await ready(sink, plan)
    with snapshot_of(database18, table) as connection:
        assert await swept(connection, writer, table, 1) == []
        await writer.apply(Changes(upserts=[(n, [n.to_bytes(8), None]) for n in range(5)]))
        assert sorted(map(str, await swept(connection, writer, table, 2))) == list("01234")


async def test_points_of_rows_whose_key_is_a_dead_letter_are_no_orphans(
    database18: Database, sink: Sink
) -> None:
    """With the wrong `ids` no row may have an id; that must not empty an adopted collection."""
    database18.execute("CREATE TABLE docs (id text PRIMARY KEY, v vector(2))")
    keys = {
        "550E8400-E29B-41D4-A716-446655440000": "550e8400-e29b-41d4-a716-446655440000",
        "0123456789abcdef0123456789abcdef": "01234567-89ab-cdef-0123-456789abcdef",
        "a": str(uuid.uuid5(uuid.NAMESPACE_URL, "a")),
    }
    for key in keys:
        database18.execute("INSERT INTO docs VALUES (%s)", (key,))
    for ids in ("qdrant-migration", "qdrant-migration-uuid", "qdrant-migration-hex"):
        table, plan = planned(database18, PlanOptions(ids=ids))
        writer = await ready(sink, plan)
        orphan = str(uuid.uuid5(uuid.NAMESPACE_URL, "gone"))
        for id_ in (orphan, *keys.values()):
            await writer.apply(Changes(upserts=[(id_, [b"", None])]))
        with snapshot_of(database18, table) as connection:
            assert await swept(connection, writer, table, 1) == [orphan]


async def test_a_lost_connection_is_a_source_error(database18: Database, sink: Sink) -> None:
    database18.execute("CREATE TABLE docs (id bigint PRIMARY KEY, v vector(2))")
    database18.execute("INSERT INTO docs SELECT generate_series(1, 10)")
    table, plan = planned(database18)
    writer = await ready(sink, plan)
    with snapshot_of(database18, table) as connection:
        database18.execute("SELECT pg_terminate_backend(%s)", (connection.info.backend_pid,))
        with pytest.raises(SourceError):
            await swept(connection, writer, table, 1)


async def test_only_key_columns_are_read(database18: Database) -> None:
    database18.execute("CREATE TABLE docs (note text, id bigint PRIMARY KEY, v vector(2))")
    table, plan = planned(database18)
    (leaf,) = table.leaves
    query, text = key_query(plan, leaf, "note IS NOT NULL OR id > 3")
    assert query.replace('"', "") == (
        "SELECT id FROM ONLY public.docs WHERE (note IS NOT NULL OR id > 3)"
    )
    assert text == (False,)
