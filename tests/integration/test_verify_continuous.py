"""The verification that goes on beside the stream: it finds what was damaged, says so in its
gauges, has it mended if it may, and goes on where it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from unittest import mock

import pytest

from cdc_sync.config import Settings
from cdc_sync.qdrant.sink import Mismatches, TableVerification
from cdc_sync.verify import continuous
from cdc_sync.verify.continuous import verify_continuously
from tests.support.damages import Damaged, constant_writes, create_docs, point_ids
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

_ROWS_PER_SECOND = 100_000.0


def settings_of(database: Database, qdrant: QdrantTarget, **verify: object) -> Settings:
    settings = pipeline_settings(database, qdrant, "docs")
    options = {"continuous": True, "rows_per_second": _ROWS_PER_SECOND, "pause_seconds": 0.2}
    verification = type(settings.verify).model_validate({**options, **verify})
    return settings.model_copy(update={"verify": verification})


@asynccontextmanager
async def verifying(life: Running) -> AsyncIterator[None]:
    with mock.patch.object(continuous, "_SAVE_SECONDS", 0.0):
        task = asyncio.create_task(verify_continuously(life.pipeline))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def mismatches(life: Running, kind: str) -> float | None:
    return life.pipeline.metrics.registry.get_sample_value(
        "cdc_sync_verify_mismatches", {"table": "public.docs", "kind": kind}
    )


async def record(life: Running) -> TableVerification | None:
    name = life.pipeline.settings.pipeline.name
    return next(iter(await life.pipeline.sink.state.verifications(name)), None)


async def recorded(
    life: Running, condition: Callable[[TableVerification], bool]
) -> TableVerification:
    """The record, once the condition holds."""
    while True:
        assert not life.task.done()
        now = await record(life)
        if now is not None and condition(now):
            return now
        await asyncio.sleep(0.05)


async def completed(life: Running) -> TableVerification:
    """The record of a pass that began after this was called, and is complete."""
    for _ in range(2):
        before = await record(life)
        ended = 0 if before is None else before.completed
        await recorded(life, lambda now, ended=ended: now.completed > ended)  # type: ignore[misc]
    return await recorded(life, lambda now: now.completed > 0)


async def test_damages_are_found_and_mended(database18: Database, qdrant: QdrantTarget) -> None:
    create_docs(database18)
    settings = settings_of(database18, qdrant)
    async with running(settings, database18, qdrant) as life:
        assert mismatches(life, "missing") is None
        with constant_writes(database18, 5):
            async with verifying(life):
                assert (await completed(life)).last == Mismatches()
                client, name = qdrant.client(), settings.tables[0].collection
                assert name is not None
                damaged = Damaged(client, name, point_ids(client, name))
                await asyncio.to_thread(damaged.apply)
                last = (await completed(life)).last
                assert last.missing >= 61
                assert last.extra == 2
                assert last.different == 14
                assert mismatches(life, "extra") == 2
            repairing = settings.verify.model_copy(update={"repair": True})
            life.pipeline.settings = settings.model_copy(update={"verify": repairing})
            async with verifying(life):
                # Points of no key that is known are left to people.
                await recorded(life, lambda now: now.last == Mismatches(extra=2))
        client.delete(name, list(damaged.done["added"]), wait=True)
        await life.assert_equal()


async def test_it_goes_on_where_it_was(database18: Database, qdrant: QdrantTarget) -> None:
    create_docs(database18)
    settings = settings_of(database18, qdrant)
    async with running(settings, database18, qdrant) as life:
        planned = life.pipeline.tables[0]
        leaves = sorted(planned.table.leaves, key=lambda leaf: leaf.oid)
        half = TableVerification(
            settings.pipeline.name,
            planned.name,
            leaf=leaves[1].oid,
            relfilenode=leaves[1].relfilenode,
            block=10_000,
            rows=200,
            found=Mismatches(missing=3),
        )
        await life.pipeline.sink.state.save_verification(half)
        # Of the first two leaves nothing is read any more.
        client, name = qdrant.client(), settings.tables[0].collection
        assert name is not None
        ids = point_ids(client, name)
        region = leaves[0].name.removeprefix("docs_")
        client.set_payload(name, {"n": -5}, points=[ids[region, 1]], wait=True)
        async with verifying(life):
            now = await recorded(life, lambda now: now.completed > 0)
            assert now.last == Mismatches(missing=3)
            assert mismatches(life, "missing") == 3
            await recorded(life, lambda now: now.last == Mismatches(different=1))


@pytest.mark.parametrize("target", ["server", "edge"])
def test_a_daemon_does_it_if_it_is_configured(
    database18: Database, sync_table: SyncTable, target: str
) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs", target=target, start=False)
    daemon = synced.daemon
    with daemon.config.open("a", encoding="utf-8") as config:
        config.write(f"[verify]\ncontinuous = true\nrows_per_second = {_ROWS_PER_SECOND}\n")
    daemon.start()
    table = {"table": "public.docs"}
    ended = "cdc_sync_verify_last_success_timestamp_seconds"
    daemon.wait(lambda: daemon.metric(ended, **table) > 0, "a pass")
    assert daemon.metric("cdc_sync_verify_mismatches", **table, kind="missing") == 0
    assert daemon.terminate() == 0
    assert "verification_failed" not in daemon.log()
    synced.assert_equal()
