"""``cdc-sync resync`` under a running stream: what is read again joins it in order."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import threading
import time
from collections.abc import Callable

import psycopg
import pytest

from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import IdScheme
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.shards import shard_filter
from cdc_sync.sync.control import ResyncRows
from cdc_sync.sync.reading import Reread, RowReader
from cdc_sync.sync.recent_transactions import RecentTransactions
from cdc_sync.sync.routing import PlannedTable
from tests.integration.test_visibility import hanging
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database, DatabaseFactory, PrivatePostgres
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.resync_command import create_docs, emit, outcome, request
from tests.support.source_tables import raw_plan, source_settings


def write_on(database: Database, stop: threading.Event, seed: int) -> Callable[[], None]:
    """Change rows, keys too, until told to stop."""

    def write() -> None:
        dice = random.Random(seed)
        with database.connect() as connection:
            while not stop.is_set():
                id_ = dice.choice([-1, 1]) * dice.randint(1, 40)
                statement = dice.choice(
                    [
                        "UPDATE docs SET n = n + 1 WHERE id = %s",
                        "UPDATE docs SET note = repeat(n::text, 50) WHERE id = %s",
                        "DELETE FROM docs WHERE id = %s",
                        "INSERT INTO docs VALUES (%s, 'new', 0, '[4,5,6]') ON CONFLICT DO NOTHING",
                        "UPDATE docs SET id = -id WHERE id = %s",
                    ]
                )
                with contextlib.suppress(
                    psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected
                ):
                    connection.execute(statement.encode(), (id_,))

    return write


def test_requests_under_writers_leave_both_sides_equal(
    database18: Database, sync_table: SyncTable
) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs", pipeline={"batch_rows": 16})
    stop = threading.Event()
    threads = [threading.Thread(target=write_on(database18, stop, seed)) for seed in range(2)]
    for thread in threads:
        thread.start()
    dice = random.Random(0)
    end = time.monotonic() + 5
    asked = 0
    with database18.connect() as connection:
        while time.monotonic() < end:
            keys = [str(dice.choice([-1, 1]) * dice.randint(1, 40)) for _ in range(10)]
            text = request(synced, *dict.fromkeys(keys))
            with connection.transaction():
                # Between the changes of one transaction, too.
                connection.execute("UPDATE docs SET n = -1 WHERE id = %s", (keys[0],))
                connection.execute("SELECT pg_logical_emit_message(true, 'cdc_sync', %s)", (text,))
                connection.execute("DELETE FROM docs WHERE id = %s", (keys[-1],))
            asked += 1
            time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    synced.assert_equal()
    assert outcome(synced, "rows") == asked
    assert asked > 50


@pytest.mark.requirement("R71", "R84")
async def test_rows_are_not_read_before_what_was_applied_is_visible(
    private_postgres: PrivatePostgres, database18_factory: DatabaseFactory, qdrant: QdrantTarget
) -> None:
    database = database18_factory(private_postgres())
    create_docs(database)
    settings = pipeline_settings(database, qdrant, "docs")
    body = {"pipeline": settings.pipeline.name, "table": "public.docs", "keys": [["1"], ["31"]]}
    async with running(settings, database, qdrant) as life:
        changes = "UPDATE docs SET note = 'new' WHERE id = 1"
        with hanging(database, f"WITH moved AS (DELETE FROM docs WHERE id = 2) {changes}"):
            await life.wait(
                lambda: life.metric("changes_total", table="public.docs", op="update") == 1,
                "the commit in the stream",
            )
            with database.connect() as connection:
                connection.execute("SET synchronous_commit = local")
                connection.execute(
                    "SELECT pg_logical_emit_message(true, 'cdc_sync', %s)",
                    (json.dumps({"resync": body}),),
                )
            await life.wait(
                lambda: life.metric("control_requests_total", outcome="rows") == 1, "the request"
            )
            await asyncio.sleep(0.5)
            assert life.metric("rows_reread_total", table="public.docs", result="written") == 0
        await life.assert_equal()
        assert life.metric("rows_reread_total", table="public.docs", result="written") == 1
        assert life.metric("control_requests_total", outcome="table") == 0


async def test_rows_that_cannot_be_read_by_themselves_bring_the_table(
    database18: Database, qdrant: QdrantTarget
) -> None:
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs")
    collection = str(settings.tables[0].collection)
    async with running(settings, database18, qdrant) as life:
        await life.stop()
    # Whether the stream has brought what this transaction did is not known to the next life.
    with database18.connect(autocommit=False) as connection:
        connection.execute("UPDATE docs SET note = 'open' WHERE id = 30")
        async with running(settings, database18, qdrant) as life:
            qdrant.client().delete(collection, [1, 2, 3], wait=True)
            body = {"pipeline": settings.pipeline.name, "table": "public.docs"}
            emit(database18, json.dumps({"resync": {**body, "keys": [["1"], ["2"]]}}))
            await life.caught_up()
            assert life.metric("rows_reread_total", table="public.docs", result="written") == 0
            assert life.state == "streaming"
            connection.rollback()
            await life.wait(
                lambda: (
                    life.metric("schema_changes_total", table="public.docs", outcome="resynced")
                    == 1
                ),
                "the table",
            )
            await life.assert_equal()
            # From now on it can be read row by row.
            qdrant.client().delete(collection, [1, 2, 3], wait=True)
            emit(database18, json.dumps({"resync": {**body, "keys": [["1"], ["2"], ["3"]]}}))
            await life.assert_equal()
            assert life.metric("rows_reread_total", table="public.docs", result="written") == 3


async def test_keys_of_another_shard_are_not_ours_to_remove(database18: Database) -> None:
    create_docs(database18)
    reader = RowReader(source_settings(database18.url), lambda: RecentTransactions(0))
    found: dict[str, Reread] = {}
    try:
        with connect(source_settings(database18.url)) as connection:
            table = find_table(connection, "docs")
        for shard in ("1/3", "2/3", "3/3"):
            plan = dataclasses.replace(raw_plan(table), shard=shard, id_scheme=IdScheme.INTEGER)
            row_filter = shard_filter(table, ["id"], shard)
            planned = PlannedTable(table, plan, PlanOptions(), row_filter)
            keys = tuple((str(i),) for i in range(1, 61))
            answer = await reader.reread(ResyncRows(planned, keys), [])
            assert answer is not None
            found[shard] = answer
    finally:
        reader.close()
    # Each key has one shard that makes or removes its point.
    assert sorted(i for one in found.values() for i, _ in one.rows) == list(range(1, 31))
    assert sorted(i for one in found.values() for i in one.absent) == list(range(31, 61))
    assert all(one.rows and one.absent for one in found.values())
