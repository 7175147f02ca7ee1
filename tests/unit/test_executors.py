"""The pool of copy workers: what becomes of chunks, results and workers when things go wrong."""

from __future__ import annotations

import asyncio
import importlib.util
import pickle
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from cdc_sync.config import QdrantSettings, Settings, SourceSettings
from cdc_sync.errors import ConfigError, ErrorKind, SinkError, SourceError
from cdc_sync.mapping.table import Leaf
from cdc_sync.postgres.connect import LoginRefusedError
from cdc_sync.postgres.snapshot import SnapshotGoneError
from cdc_sync.sync import executors, worker_pool
from cdc_sync.sync.copy_process import WorkerLostError, pickled_error
from cdc_sync.sync.copying import Chunk, ChunkResult, CopyTask
from cdc_sync.sync.worker_pool import NoRoomError, WorkerPool
from tests.support.chunk_source import Chunks
from tests.support.sink_rows import items_plan


@pytest.mark.parametrize(
    ("quota", "wanted"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("900000 50000", 8), ("", 8)],
)
def test_as_many_workers_as_this_process_may_have_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, wanted: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    (tmp_path / "cpu.max").write_text(quota)
    assert executors.available_cpus(tmp_path / "cpu.max") == wanted
    assert executors.available_cpus(tmp_path / "none") == 8


def chunks(count: int) -> Chunks:
    leaf = Leaf(1, "public", "items", 1, count, 1.0)
    task = CopyTask(
        SourceSettings.model_validate({"url": "postgresql://localhost/app"}),
        QdrantSettings(),
        "00000001-00000001-1",
        items_plan("items"),
        None,
        Chunk(1, leaf, 0, 1),
    )
    return Chunks(deque(replace(task, chunk=Chunk(1, leaf, n, n + 1)) for n in range(count)))


def result_of(task: CopyTask) -> ChunkResult:
    return ChunkResult(task.chunk, rows=1, bytes=1, seconds=0.0, nulled=0, refused=())


@dataclass
class Worker:
    """A worker that does as the script says for the n-th chunk of all."""

    crew: Crew
    in_flight: bool = False
    stopped: bool = False
    rested: int = 0

    async def copy(self, task: CopyTask) -> ChunkResult:
        assert not self.stopped
        self.in_flight = True
        self.crew.started.append(task.chunk.start_block)
        try:
            await self.crew.script(task.chunk.start_block)
        except asyncio.CancelledError:
            raise  # cancelled is only who waits: the request is still in flight
        except BaseException:
            self.in_flight = False
            raise
        self.in_flight = False
        return result_of(task)

    async def rest(self) -> None:
        self.rested += 1

    async def stop(self) -> None:
        await asyncio.sleep(0.02)
        self.in_flight = False
        self.stopped = True


@dataclass
class Crew:
    """Starts workers and keeps them in view."""

    script: Callable[[int], Awaitable[None]]
    workers: list[Worker] = field(default_factory=list)
    started: list[int] = field(default_factory=list)

    async def start(self, place: int) -> Worker:
        self.workers.append(Worker(self))
        return self.workers[-1]

    def assert_at_rest(self) -> None:
        assert not any(worker.in_flight for worker in self.workers)

    def assert_all_stopped(self) -> None:
        self.assert_at_rest()
        assert all(worker.stopped for worker in self.workers)


async def nothing(block: int) -> None:
    await asyncio.sleep(0)


def script(actions: dict[int, list[Exception]]) -> Callable[[int], Awaitable[None]]:
    """Fail for those chunks with those errors, one after the other."""

    async def act(block: int) -> None:
        await asyncio.sleep(0.001)
        if actions.get(block):
            raise actions[block].pop(0)

    return act


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_FIRST_PAUSE_SECONDS", 0.0001)


async def test_every_chunk_is_copied_once_and_workers_are_kept() -> None:
    crew, source = Crew(nothing), chunks(20)
    pool = WorkerPool(3, crew.start)
    await pool.copy(source, source.done)
    assert source.copied == list(range(20))
    again = chunks(5)
    await pool.copy(again, again.done)
    assert again.copied == list(range(5))
    assert len(crew.workers) == 3
    # At the end of each window nobody keeps the snapshot.
    assert all(worker.rested >= 1 for worker in crew.workers)
    await pool.close()
    crew.assert_all_stopped()
    await pool.close()


async def test_no_more_chunks_are_taken_than_workers_are_free() -> None:
    """A window ends soon after its time is up."""
    gate = asyncio.Event()

    async def wait(block: int) -> None:
        await gate.wait()

    crew, source = Crew(wait), chunks(20)
    copying = asyncio.create_task(WorkerPool(3, crew.start).copy(source, source.done))
    await asyncio.sleep(0.02)
    assert source.taken == 3
    source.give = 3  # time is up
    gate.set()
    await copying
    assert source.copied == [0, 1, 2]
    assert len(source.tasks) == 17


async def test_workers_start_only_when_there_is_something_to_do() -> None:
    crew, source = Crew(nothing), chunks(2)
    await WorkerPool(8, crew.start).copy(source, source.done)
    assert len(crew.workers) == 2


async def test_results_are_reported_one_at_a_time_while_the_workers_go_on() -> None:
    crew, source = Crew(nothing), chunks(30)
    reporting, most_started = 0, 0

    async def done(result: ChunkResult) -> None:
        nonlocal reporting, most_started
        reporting += 1
        assert reporting == 1
        await asyncio.sleep(0.005)
        most_started = max(most_started, len(crew.started) - len(source.results))
        await source.done(result)
        reporting -= 1

    await WorkerPool(2, crew.start).copy(source, done)
    assert source.copied == list(range(30))
    # One under way, one waiting to be reported by each worker, and the one being reported.
    assert 3 <= most_started <= 5


async def test_the_chunk_of_a_dead_worker_is_copied_by_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    crew = Crew(script({2: [WorkerLostError("killed"), WorkerLostError("killed")]}))
    source = chunks(6)
    pool = WorkerPool(2, crew.start)
    await pool.copy(source, source.done)
    assert source.copied == list(range(6))
    assert [task.chunk.start_block for task in source.put_back_tasks] == [2, 2]
    assert len(crew.workers) == 4
    assert sum(worker.stopped for worker in crew.workers) == 2
    assert [r.getMessage() for r in caplog.records].count("copy_workers_lost") == 2
    crew.assert_at_rest()


async def test_a_cut_connection_is_tried_again_by_the_same_worker() -> None:
    cut = SourceError(ErrorKind.SOURCE_UNAVAILABLE, "server closed the connection")
    crew, source = Crew(script({0: [cut]})), chunks(2)
    await WorkerPool(1, crew.start).copy(source, source.done)
    assert source.copied == [0, 1]
    assert len(crew.workers) == 1


async def test_a_password_that_is_refused_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the worker, which may be tried more often than one that is lost."""
    monkeypatch.setattr(worker_pool, "_REFUSED_PAUSE_SECONDS", 0.0001)
    refusals: list[Exception] = [LoginRefusedError("refused") for _ in range(30)]
    crew, source = Crew(script({1: refusals})), chunks(4)
    login = source.tasks[0].source.login
    login.accept()
    pool = WorkerPool(2, crew.start)
    await pool.copy(source, source.done)
    assert source.copied == list(range(4))
    assert len(source.put_back_tasks) == 30
    assert len(crew.workers) == 2
    # What was refused then does not shorten the time of the next change.
    assert login._refused is None
    await pool.close()


async def test_a_password_that_is_refused_for_too_long_ends_the_copy() -> None:
    refusals: list[Exception] = [LoginRefusedError("refused", "put it there") for _ in range(30)]
    crew, source = Crew(script({1: refusals})), chunks(4)
    (source_settings,) = {id(task.source): task.source for task in source.tasks}.values()
    tasks = [
        replace(task, source=source_settings.model_copy(update={"credentials_grace_seconds": 0.0}))
        for task in source.tasks
    ]
    source_settings.login.accept()
    source = Chunks(deque(tasks))
    with pytest.raises(SourceError) as caught:
        await WorkerPool(2, crew.start).copy(source, source.done)
    assert caught.value.kind is ErrorKind.SOURCE_AUTH
    assert caught.value.remedy == "put it there"
    crew.assert_all_stopped()


async def test_a_chunk_that_kills_its_workers_ends_the_copy() -> None:
    crew = Crew(script({1: [WorkerLostError("killed by SIGKILL")] * 100}))
    source = chunks(30)
    with pytest.raises(SourceError, match="killed by SIGKILL") as caught:
        await WorkerPool(2, crew.start).copy(source, source.done)
    assert caught.value.kind is ErrorKind.SOURCE_UNAVAILABLE
    assert crew.started.count(1) == worker_pool.MAX_LOSSES + 1
    crew.assert_all_stopped()


async def test_the_losses_of_a_chunk_are_counted_over_windows() -> None:
    """The window's time may be up after each loss."""
    crew = Crew(script({0: [WorkerLostError("killed")] * 100}))
    source, pool = chunks(1), WorkerPool(1, crew.start)
    lost = source.put_back

    def put_back(task: CopyTask) -> None:
        lost(task)
        source.give = 0

    source.put_back = put_back  # type: ignore[method-assign]
    for _ in range(worker_pool.MAX_LOSSES):
        source.give = 1
        await pool.copy(source, source.done)
    source.give = 1
    with pytest.raises(SourceError, match="copy workers were lost"):
        await pool.copy(source, source.done)


@pytest.mark.parametrize(
    "error",
    [
        SnapshotGoneError(ErrorKind.SOURCE_UNAVAILABLE, "gone"),
        SourceError(ErrorKind.SOURCE_PERMISSION, "denied"),
        SinkError(ErrorKind.SINK_AUTH, "denied"),
        ZeroDivisionError("a bug"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_other_errors_are_raised_once_nothing_is_in_flight(error: Exception) -> None:
    async def act(block: int) -> None:
        await asyncio.sleep(0.02 if block == 3 else 0.01 if block < 3 else 30)
        if block == 3:
            raise error

    crew, source = Crew(act), chunks(10)
    with pytest.raises(type(error)):
        await WorkerPool(4, crew.start).copy(source, source.done)
    crew.assert_all_stopped()
    # What was finished before is finished.
    assert source.copied == [0, 1, 2]
    assert source.put_back_tasks == []


async def test_an_error_of_done_ends_the_copy() -> None:
    crew, source = Crew(nothing), chunks(50)

    async def done(result: ChunkResult) -> None:
        raise SinkError(ErrorKind.SINK_AUTH, "the ledger cannot be written")

    with pytest.raises(SinkError, match="ledger"):
        await WorkerPool(3, crew.start).copy(source, done)
    crew.assert_all_stopped()
    assert len(crew.started) < 12


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancelled_copy_ends_once_nothing_is_in_flight(times: int) -> None:
    """Invariant 2: what is written after the copy must not be overtaken by it."""

    async def wait(block: int) -> None:
        await asyncio.sleep(30)

    crew, source = Crew(wait), chunks(10)
    copying = asyncio.create_task(WorkerPool(3, crew.start).copy(source, source.done))
    await asyncio.sleep(0.01)
    assert sum(worker.in_flight for worker in crew.workers) == 3
    for _ in range(times):
        copying.cancel()
        await asyncio.sleep(0.005)
    with pytest.raises(asyncio.CancelledError):
        await copying
    crew.assert_all_stopped()


async def test_a_place_without_room_leaves_its_chunks_to_the_others() -> None:
    crew, source = Crew(nothing), chunks(10)

    async def start(place: int) -> Worker:
        if place == 1:
            raise NoRoomError("no CPU is free")
        return await crew.start(place)

    await WorkerPool(2, start).copy(source, source.done)
    assert source.copied == list(range(10))
    assert len(crew.workers) == 1


async def test_a_chunk_that_comes_back_late_is_copied_by_a_worker_that_had_nothing_to_do() -> None:
    crew, source = Crew(nothing), chunks(3)

    async def start(place: int) -> Worker:
        if place == 1:
            await asyncio.sleep(0.05)
            raise NoRoomError("no CPU is free")
        return await crew.start(place)

    await WorkerPool(2, start).copy(source, source.done)
    assert source.copied == [0, 1, 2]


async def test_no_room_for_any_worker_is_an_error() -> None:
    async def start(place: int) -> Worker:
        raise NoRoomError("no CPU is free")

    source = chunks(3)
    with pytest.raises(SourceError, match="no CPU is free") as caught:
        await WorkerPool(2, start).copy(source, source.done)
    assert caught.value.kind is ErrorKind.SOURCE_UNAVAILABLE
    assert len(source.tasks) == 3


def test_errors_travel_between_processes() -> None:
    class UnpicklableError(Exception):
        def __reduce__(self) -> str:
            raise TypeError

    gone = SnapshotGoneError(ErrorKind.SOURCE_UNAVAILABLE, "gone", "again")
    back = pickle.loads(pickled_error(gone))
    assert type(back) is SnapshotGoneError
    assert (back.kind, back.message, back.remedy) == (gone.kind, gone.message, gone.remedy)
    bug = pickle.loads(pickled_error(KeyError("a")))
    assert isinstance(bug, KeyError)
    assert "In a copy worker" in bug.__notes__[0]
    assert "UnpicklableError" in str(pickle.loads(pickled_error(UnpicklableError())))


async def test_ray_cannot_be_used_with_an_embedded_database(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings.model_validate(
        {
            "source": {"url": "postgresql://localhost/app"},
            "tables": [{"name": "items"}],
            "migration": {"executor": "ray"},
        }
    )
    with pytest.raises(ConfigError, match="embedded"):
        executors.open_executor(settings, Mock(multi_process=False))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        executors.open_executor(settings, Mock(multi_process=True))
    assert "cdc-sync[ray]" in caught.value.remedy
