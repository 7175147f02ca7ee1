"""Heartbeats, and the watchdog that sees a position stand still."""

from __future__ import annotations

import asyncio

import pytest

from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.sync import watchdog
from cdc_sync.sync.applier import Applier
from cdc_sync.sync.stream import Positions
from cdc_sync.sync.watchdog import Watchdog
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget


def create_docs(database: Database) -> None:
    database.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, note text, emb vector(3));"
        "INSERT INTO docs SELECT i, 'note', '[1,2,3]' FROM generate_series(1, 10) i"
    )


# -- the watchdog


class Scene:
    """A watchdog with a clock of its own."""

    def __init__(self) -> None:
        self.board = StatusBoard("p", slot="s", publication="p", metrics=Metrics())
        self.board.set_source(True)
        self.board.set_sink(True)
        self.positions = Positions(received=10, applied=10, confirmed=10, server_end=20)
        self.busy = False
        self.dumps = 0
        self.watchdog = Watchdog(self.board, self.positions, lambda: self.busy, self.dump, 60.0)
        self.now = 0.0

    def dump(self) -> None:
        self.dumps += 1

    def after(self, seconds: float) -> bool:
        """Whether it is alive after so long."""
        self.now += seconds
        self.watchdog.look(self.now)
        return all(check.ok for check in self.board.liveness())


def test_a_position_that_stands_still_while_the_server_has_more() -> None:
    scene = Scene()
    assert scene.after(0)
    assert scene.after(59)
    assert not scene.after(2)
    assert not scene.after(100)
    assert scene.dumps == 1
    check = next(check for check in scene.board.liveness() if not check.ok)
    assert check.message is not None
    assert check.message.startswith("stuck at 0/A for 61 s, while the server is at 0/14")
    # It has passed.
    scene.positions.applied = 15
    assert scene.after(1)
    assert scene.after(59)
    assert not scene.after(2)
    assert scene.dumps == 2


@pytest.mark.parametrize("cause", ["caught up", "busy", "no source", "no sink", "moving"])
def test_no_false_alarm(cause: str) -> None:
    scene = Scene()
    for step in range(20):
        match cause:
            case "caught up":
                scene.positions.server_end = 10
            case "busy":
                scene.busy = True
            case "no source":
                scene.board.set_source(False, "away")
            case "no sink":
                scene.board.set_sink(False, "away")
            case _:
                scene.positions.received = 10 + step // 3
        assert scene.after(20)
    assert scene.dumps == 0


async def test_a_writer_that_hangs_for_ever(
    database18: Database,
    qdrant: QdrantTarget,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A fault of ours, not of Qdrant: nothing fails, and nothing moves."""
    monkeypatch.setattr(watchdog, "_LOOK_SECONDS", 0.05)
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs", pipeline={"stuck_seconds": 1.0})
    apply, hang = Applier.apply, asyncio.Event()

    async def hanging(self: Applier, *arguments: object) -> None:
        await hang.wait()
        await apply(self, *arguments)  # type: ignore[arg-type]

    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        monkeypatch.setattr(Applier, "apply", hanging)
        database18.execute("UPDATE docs SET note = 'changed'")
        await life.wait(lambda: not alive(life), "the watchdog")
        assert "hanging" in capfd.readouterr().err
        hang.set()
        await life.wait(lambda: alive(life), "progress")
        await life.assert_equal()


def alive(life: Running) -> bool:
    return all(check.ok for check in life.pipeline.board.liveness())


# -- heartbeats


async def test_heartbeats_are_measured(database18: Database, qdrant: QdrantTarget) -> None:
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs", pipeline={"heartbeat_seconds": 0.1})
    async with running(settings, database18, qdrant) as life:
        await life.wait(lambda: measured(life) >= 5, "heartbeats")
        assert life.metric("control_requests_total", outcome="invalid") == 0
        # Somebody else's say nothing.
        before = measured(life)
        for content in ("", "x 1", "0123456789abcdef 1", "1" * 100):
            database18.execute(
                "SELECT pg_logical_emit_message(true, 'cdc_sync_heartbeat', %s::text)", (content,)
            )
        await life.caught_up()
        assert life.metric("heartbeat_latency_seconds_sum") < 30 * (measured(life) + 1)
        assert measured(life) - before < 60
        await life.assert_equal()


def measured(life: Running) -> float:
    return life.metric("heartbeat_latency_seconds_count")
