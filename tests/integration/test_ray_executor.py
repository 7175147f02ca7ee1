"""The copy on a Ray cluster of two nodes, both on this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.postgres.snapshot import SnapshotGoneError
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.executors import open_executor
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
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import Faults, QdrantTarget

ray = pytest.importorskip("ray")

# Ray's own.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]

#: Would be found wherever it came through.
SECRET = "s3cr3t-of-the-copy"


class Nodes:
    """A cluster, and where its logs are."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster: Any = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        self.second: Any = self.cluster.add_node(num_cpus=1)
        self.address: str = self.cluster.address

    @property
    def logs(self) -> Path:
        """Ray's session directory."""
        return Path(self.cluster.head_node.get_session_dir_path())

    def close(self) -> None:
        """Stop all nodes."""
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        opened = Nodes()
    except Exception:  # noqa: BLE001 - a plain Exception is what it raises
        # Ray gives a node 30 s to start, which a busy machine may not keep.
        ray.shutdown()
        opened = Nodes()
    yield opened
    opened.close()


def ray_settings(
    database: Database, qdrant: QdrantTarget, nodes: Nodes, **more: object
) -> Settings:
    return pipeline_settings(
        database,
        qdrant,
        "docs",
        target={"parallel_requests": 1},
        migration={
            "executor": "ray",
            "ray_address": nodes.address,
            "num_workers": 2,
            "chunk_rows": 200,
            **more,
        },
    )


@pytest.fixture
def table(database18: Database) -> Database:
    create_copied(database18)
    return database18


@pytest.fixture
def case(table: Database, qdrant: QdrantTarget, nodes: Nodes) -> CopyCase:
    return plan_case(table, ray_settings(table, qdrant, nodes))


@pytest.fixture
async def sink(case: CopyCase) -> AsyncIterator[Sink]:
    async with ready_sink(case) as opened:
        yield opened


@pytest.fixture
async def executor(case: CopyCase, sink: Sink) -> AsyncIterator[ChunkExecutor]:
    opened = open_executor(case.settings, sink)
    yield opened
    await opened.close()
    assert not ray.is_initialized()


def actors() -> list[psutil.Process]:
    """The processes of our actors, which Ray names after them."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any("ray::CopyActor" in part for part in process.info["cmdline"] or [])
    ]


def nodes_of(processes: list[psutil.Process]) -> set[int]:
    """A node is one raylet."""
    return {process.ppid() for process in processes}


async def test_a_pipeline_copies_over_two_nodes(
    table: Database, qdrant: QdrantTarget, nodes: Nodes, faults: Faults
) -> None:
    """The same result as ever, then the stream; the daemon keeps its signal handler, and the actors
    end with the copy."""
    settings = ray_settings(table, qdrant, nodes)
    handler = signal.getsignal(signal.SIGTERM)
    faults.slow("write", 0.05, times=10_000)
    async with running(settings, table, qdrant, wait=False) as life:
        await wait_until(lambda: len(nodes_of(actors())) == 2, "actors on both nodes")
        faults.clear()
        await life.wait_streaming()
        table.execute("UPDATE docs SET note = 'later' WHERE id < 10")
        await life.assert_equal()
        assert signal.getsignal(signal.SIGTERM) is handler
        await wait_until(lambda: actors() == [], "actors to end")


async def test_the_chunk_of_a_killed_actor_is_copied_again(
    case: CopyCase,
    qdrant: QdrantTarget,
    faults: Faults,
    executor: ChunkExecutor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 6, batch_rows=50))
        copying = await begin_held_copy(executor, source, faults, 2)
        assert len(nodes_of(actors())) == 2
        actors()[0].kill()
        await wait_until(lambda: len(source.put_back_tasks) == 1, "the loss to be seen")
        faults.release()
        await copying
    assert source.copied == [task.chunk.start_block for task in case.tasks(snapshot, 6)]
    assert "copy_workers_lost" in [record.getMessage() for record in caplog.records]
    assert case.copy_transactions() == 0
    case.assert_equal(qdrant)


async def test_a_cancelled_copy_waits_for_its_requests_in_flight(
    case: CopyCase, qdrant: QdrantTarget, faults: Faults, executor: ChunkExecutor
) -> None:
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 6, batch_rows=50))
        copying = await begin_held_copy(executor, source, faults, 2)
        await cancel_held_copy(copying, faults)
        await wait_until(lambda: actors() == [], "actors to end")
        again = Chunks.of(case.tasks(snapshot, 3))
        await executor.copy(again, again.done)
    case.assert_equal(qdrant)


async def test_retries_and_errors_come_back(
    case: CopyCase, faults: Faults, executor: ChunkExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 1))
        faults.reject("write", "UNAVAILABLE", times=2)
        await executor.copy(source, source.done)
        assert source.results[0].retries == {ErrorKind.SINK_UNAVAILABLE: 2}
        assert [record.getMessage() for record in caplog.records].count("retrying") == 2
    source = Chunks.of(case.tasks(snapshot, 4))
    with pytest.raises(SnapshotGoneError):
        await executor.copy(source, source.done)


async def test_secrets_do_not_reach_rays_logs(
    table: Database, qdrant: QdrantTarget, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it fails: here the password is wrong."""
    case = plan_case(table, ray_settings(table, qdrant, nodes))
    url = f"postgresql://nobody:{SECRET}@127.0.0.1:1/app"
    source = case.settings.source.model_copy(update={"url": type(case.settings.source.url)(url)})
    key = type(case.settings.source.url)(SECRET)
    target = case.settings.qdrant.model_copy(update={"api_key": key})
    broken = CopyCase(
        table, case.settings.model_copy(update={"source": source, "qdrant": target}), case.planned
    )
    monkeypatch.setattr("cdc_sync.sync.worker_pool.MAX_LOSSES", 0)
    sink = await open_sink(case.settings.qdrant)
    executor = open_executor(case.settings, sink)
    chunks = Chunks.of(broken.tasks("00000001-00000001-1", 1))
    with pytest.raises(SourceError) as caught:
        await executor.copy(chunks, chunks.done)
    assert SECRET not in str(caught.value)
    await executor.close()
    await sink.close()
    files = [path for path in nodes.logs.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 5
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path.name


async def test_a_killed_daemons_actors_end_with_it(nodes: Nodes, case: CopyCase) -> None:
    """They would write rows of an old snapshot over those of the next copy."""
    script = (
        "import asyncio, os, signal, sys, ray\n"
        "from cdc_sync.sync.ray_executor import CopyActor\n"
        f"ray.init(address={nodes.address!r}, log_to_driver=False, namespace='cdc_sync')\n"
        "actor = ray.remote(CopyActor).options(num_cpus=1).remote()\n"
        "ray.get(actor.ready.remote())\n"
        "print('ready', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert b"ready" in output
    assert process.returncode == -signal.SIGKILL
    await wait_until(lambda: actors() == [], "the actor to end")


async def test_a_lost_node_leaves_the_rest_to_the_other(
    case: CopyCase,
    qdrant: QdrantTarget,
    nodes: Nodes,
    faults: Faults,
    executor: ChunkExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 6, batch_rows=50))
        copying = await begin_held_copy(executor, source, faults, 2)
        # From here on there is only one place to be had.
        monkeypatch.setattr("cdc_sync.sync.ray_executor._PLACEMENT_SECONDS", 5.0)
        nodes.cluster.remove_node(nodes.second, allow_graceful=False)
        faults.release()
        await copying
        nodes.second = nodes.cluster.add_node(num_cpus=1)
    assert source.copied == [task.chunk.start_block for task in case.tasks(snapshot, 6)]
    case.assert_equal(qdrant)


async def test_no_cluster_at_the_address(
    table: Database, qdrant: QdrantTarget, nodes: Nodes, sink: Sink, case: CopyCase
) -> None:
    settings = ray_settings(table, qdrant, nodes, ray_address="127.0.0.1:1")
    executor = open_executor(settings, sink)
    with case.snapshot() as snapshot:
        source = Chunks.of(case.tasks(snapshot, 1))
        with pytest.raises(ConfigError, match="no Ray cluster"):
            await executor.copy(source, source.done)
    await executor.close()
    with pytest.raises(ConfigError, match="Ray client"):
        open_executor(ray_settings(table, qdrant, nodes, ray_address="ray://h:10001"), sink)
