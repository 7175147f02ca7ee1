"""How often a stream confirms: seldom where making durable takes long, and never before it."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.sync import stream
from cdc_sync.sync.applier import Applier
from cdc_sync.sync.gather import Gatherer
from cdc_sync.sync.stream import Positions, StreamSession


class Clock:
    """Stands still but for what is said to take time; stands in for the module ``time``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = time = monotonic


class Told:
    """A connection that keeps what the server was told to be durable."""

    received_lsn = Lsn(1_000_000)

    def __init__(self) -> None:
        self.flushed: list[int] = []

    def send_status(self, write: int, flush: int, reply: bool = False) -> None:
        self.flushed.append(flush)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stream, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "pause"), [(0.0, 0.225), (0.001, 0.225), (0.01, 0.5), (0.03, 1.0), (5.0, 1.0)]
)
async def test_a_slow_disk_is_given_a_rest(clock: Clock, seconds: float, pause: float) -> None:
    told = Told()
    before: list[int] = []

    async def make_durable() -> None:
        before.append(len(told.flushed))
        clock.now += seconds

    async def between(_: object) -> None:
        raise AssertionError("nothing is written")

    positions, metrics = Positions(), Metrics()
    session = StreamSession(
        connection=cast("ReplicationConnection", told),
        gatherer=cast("Gatherer", None),
        applier=cast("Applier", None),
        positions=positions,
        metrics=metrics,
        make_durable=make_durable,
        stop=asyncio.Event(),
        status_seconds=10.0,
        board=StatusBoard("test", slot="s", publication="p", metrics=metrics),
        between=between,
        let_go_seconds=60.0,
        silence_seconds=60.0,
    )
    assert session._confirm_due
    positions.applied = Lsn(500)
    await session._confirm()
    # Durable first, confirmed then.
    assert before == [0]
    assert told.flushed == [500]
    clock.now += pause - 0.001
    assert not session._confirm_due
    clock.now += 0.002
    assert session._confirm_due
