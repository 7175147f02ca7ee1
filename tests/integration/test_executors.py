"""Copying by local processes and in this process, on a real table."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

import psutil
import pytest

from cdc_sync.errors import CdcSyncError, ErrorKind
from cdc_sync.postgres.snapshot import SnapshotGoneError
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.copy_process import ProcessWorker
from cdc_sync.sync.executors import InProcess, LocalProcesses
from cdc_sync.sync.worker_pool import ChunkExecutor
from tests.support.chunk_source import (
    Chunks,
    CopyCase,
    begin_held_copy,
    cancel_held_copy,
    create_copied,
    plan_case,
    ready_sink,
    wait_until,
)
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings
from tests.support.qdrant_control import Faults, QdrantTarget


@pytest.fixture
def case(database18: Database, qdrant: QdrantTarget) -> CopyCase:
    create_copied(database18)
    settings = pipeline_settings(database18, qdrant, "docs", target={"parallel_requests": 1})
    return plan_case(database18, settings)


@pytest.fixture
async def sink(case: CopyCase) -> AsyncIterator[Sink]:
    async with ready_sink(case) as opened:
        yield opened


retries: list[CdcSyncError] = []


@pytest.fixture(params=["processes", "here"])
async def executor(request: pytest.FixtureRequest, sink: Sink) -> AsyncIterator[ChunkExecutor]:
    def on_retry(error: CdcSyncError, seconds: float) -> None:
        retries.append(error)

    retries.clear()
    opened = (
        LocalProcesses(2, on_retry) if request.param == "processes" else InProcess(sink, on_retry)
    )
    yield opened
    await opened.close()
    assert workers() == []


def workers() -> list[psutil.Process]:
    return [
        child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())
    ]


async def test_windows_share_the_workers_but_not_the_snapshot(
    case: CopyCase, qdrant: QdrantTarget, executor: ChunkExecutor
) -> None:
    """Between windows no worker holds back vacuum or locks tables, and the next window's snapshot
    is the one that is read."""
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 6))
        source.give = 3
        await executor.copy(source, source.done)
        assert len(source.results) == 3
    before = {worker.pid for worker in workers()}
    assert case.copy_transactions() == 0
    case.database.execute("SET lock_timeout = '2s'; ALTER TABLE docs ALTER note SET NOT NULL")
    case.database.execute("UPDATE docs SET note = 'changed' WHERE id % 2 = 0")
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 6))
        await executor.copy(source, source.done)
        assert sum(result.rows for result in source.results) == 2000
    assert {worker.pid for worker in workers()} == before
    case.assert_equal(qdrant)


async def test_a_cancelled_copy_waits_for_its_requests_in_flight(
    case: CopyCase, qdrant: QdrantTarget, faults: Faults, executor: ChunkExecutor
) -> None:
    """Invariant 2: what is written next must not be overtaken by the copy."""
    count = 2 if isinstance(executor, LocalProcesses) else 1
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 6, batch_rows=50))
        copying = await begin_held_copy(executor, source, faults, count)
        await cancel_held_copy(copying, faults)
        assert workers() == []
        assert source.results == []
        # It can be used again.
        again = Chunks.of(case.tasks(snapshot, 3))
        await executor.copy(again, again.done)
    case.assert_equal(qdrant)


async def test_cancelled_while_qdrant_is_away(
    case: CopyCase, faults: Faults, executor: ChunkExecutor
) -> None:
    """Retries go on without end, and must not keep a copy from being stopped."""
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 6))
        faults.reject("write", "UNAVAILABLE", times=10_000)
        copying = asyncio.create_task(executor.copy(source, source.done))
        await wait_until(lambda: len(retries) > 3, "retries to be told of while they go on")
        started = time.monotonic()
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying
        assert time.monotonic() - started < 5
        faults.clear()


async def test_retries_are_counted_by_kind(
    case: CopyCase, qdrant: QdrantTarget, faults: Faults, executor: ChunkExecutor
) -> None:
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 1))
        faults.reject("write", "UNAVAILABLE", times=2)
        await executor.copy(source, source.done)
    (result,) = source.results
    assert result.retries == {ErrorKind.SINK_UNAVAILABLE: 2}
    assert [error.kind for error in retries] == [ErrorKind.SINK_UNAVAILABLE] * 2
    case.assert_equal(qdrant)


async def test_the_snapshot_is_gone(case: CopyCase, executor: ChunkExecutor) -> None:
    with case.snapshot() as snapshot:
        pass
    source = Chunks.of(case.tasks(snapshot, 4))
    with pytest.raises(SnapshotGoneError):
        await executor.copy(source, source.done)
    assert source.results == []


@pytest.mark.requirement("R55")
async def test_a_cut_connection_costs_no_worker(
    case: CopyCase, qdrant: QdrantTarget, faults: Faults, executor: ChunkExecutor
) -> None:
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 4, batch_rows=20))
        copying = await begin_held_copy(executor, source, faults, 1)
        case.database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'cdc_sync copy'"
        )
        faults.release()
        await copying
    assert source.copied == [task.chunk.start_block for task in case.tasks(snapshot, 4)]
    case.assert_equal(qdrant)


@pytest.mark.requirement("R55")
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
async def test_the_chunk_of_a_dead_worker_is_copied_again(
    case: CopyCase,
    qdrant: QdrantTarget,
    faults: Faults,
    sink: Sink,
    by: signal.Signals,
    caplog: pytest.LogCaptureFixture,
) -> None:
    executor = LocalProcesses(2)
    try:
        with case.snapshot() as snapshot:
            source = Chunks.of(case.tasks(snapshot, 5, batch_rows=50))
            copying = await begin_held_copy(executor, source, faults, 2)
            victim = workers()[0].pid
            os.kill(victim, by)
            await asyncio.sleep(0.3)
            # By SIGTERM it ends only after its request.
            assert psutil.pid_exists(victim) == (by is signal.SIGTERM)
            faults.release()
            await copying
        assert len(source.put_back_tasks) == 1
        assert source.copied == [task.chunk.start_block for task in case.tasks(snapshot, 5)]
    finally:
        await executor.close()
    assert "copy_workers_lost" in [record.getMessage() for record in caplog.records]
    case.assert_equal(qdrant)


async def test_a_worker_that_does_not_let_go_is_killed(
    case: CopyCase, faults: Faults, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdc_sync.sync.copy_process._KILL_AFTER_SECONDS", 0.5)
    worker = ProcessWorker(lambda error, seconds: None)
    with case.snapshot() as snapshot:
        faults.hold("write", times=1)
        copying = asyncio.create_task(worker.copy(case.tasks(snapshot, 1)[0]))
        await wait_until(lambda: faults.held() == 1, "the request in flight")
        started = time.monotonic()
        copying.cancel()
        await worker.stop()
        assert 0.4 < time.monotonic() - started < 5
        assert workers() == []
        faults.release()


async def test_rests_after_each_batch(case: CopyCase, sink: Sink) -> None:
    with case.snapshot() as snapshot:
        task = case.tasks(snapshot, 1, batch_rows=500, batch_delay_seconds=0.2)
        source = Chunks.of(task)
        await InProcess(sink).copy(source, source.done)
    assert source.results[0].rows == 2000
    assert source.results[0].seconds > 0.8


async def test_repair_writes_only_what_differs(
    case: CopyCase, qdrant: QdrantTarget, sink: Sink
) -> None:
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 4))
        await InProcess(sink).copy(source, source.done)
    case.database.execute("UPDATE docs SET note = 'other' WHERE id < 10")
    case.database.execute("INSERT INTO docs SELECT i, 'new' FROM generate_series(5000, 5004) i")
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 4, repair=True))
        await InProcess(sink).copy(source, source.done)
    counts = [
        sum(getattr(r, name) for r in source.results) for name in ("same", "different", "missing")
    ]
    assert counts == [1990, 10, 5]
    case.assert_equal(qdrant)
