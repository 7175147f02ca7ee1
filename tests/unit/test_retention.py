"""What the copy may make the slot keep, what becomes of chunks that take too long, and what tells
that Qdrant is away."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from cdc_sync.errors import ErrorKind, SinkError
from cdc_sync.ops.status import StatusBoard
from cdc_sync.qdrant.sink import LeafLedger, TableLedger
from cdc_sync.sync import sink_watch
from cdc_sync.sync.ledger import Ledger
from cdc_sync.sync.retention import WindowTime, copy_budget
from cdc_sync.sync.sink_watch import SinkWatch


@pytest.mark.parametrize(
    ("configured", "limit", "budget"),
    [
        (None, None, None),
        (1000, None, 1000),
        (None, 1000, 800),
        (500, 1000, 500),
        # More than is safe is not taken.
        (900, 1000, 800),
        (5000, 1000, 800),
    ],
)
def test_the_budget_is_well_below_what_a_slot_may_keep(
    configured: int | None, limit: int | None, budget: int | None
) -> None:
    assert copy_budget(configured, limit) == budget


def test_a_window_is_over_by_its_time_or_when_it_is_ended() -> None:
    window = WindowTime(time.monotonic() + 60)
    assert not window.over
    window.ended = True
    assert window.over
    assert WindowTime(time.monotonic() - 1).over


def test_chunks_are_halved_down_to_a_block_and_what_is_done_stays_done() -> None:
    leaves = (
        LeafLedger(1, 11, pages=10, chunk_pages=128, done=((0, 4),)),
        LeafLedger(2, 12, pages=400, chunk_pages=100),
        LeafLedger(3, 13, pages=0, chunk_pages=128),
    )
    ledger = Ledger(TableLedger("p", "public.docs", "f", leaves=leaves), 5_000)
    ledger.halve_chunks()
    assert ledger.dirty
    # Half of a chunk that was larger than the leaf is half of the leaf.
    assert [leaf.chunk_pages for leaf in ledger.record.leaves] == [5, 50, 1]
    for _ in range(10):
        ledger.halve_chunks()
    assert [leaf.chunk_pages for leaf in ledger.record.leaves] == [1, 1, 1]
    assert [leaf.done for leaf in ledger.record.leaves] == [((0, 4),), (), ()]


class _Qdrant:
    """Answers, refuses, or does neither."""

    def __init__(self) -> None:
        self.state = "up"

    async def ping(self) -> None:
        if self.state == "down":
            raise SinkError(ErrorKind.SINK_UNAVAILABLE, "refused")
        if self.state == "silent":
            await asyncio.Event().wait()


@pytest.mark.parametrize("state", ["down", "silent"])
async def test_qdrant_is_away_while_it_refuses_or_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    monkeypatch.setattr(sink_watch, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(sink_watch, "_ANSWER_SECONDS", 0.1)
    qdrant, board = _Qdrant(), StatusBoard("p")
    watch = SinkWatch(qdrant.ping, board)
    watching = asyncio.create_task(watch.run())
    try:
        await asyncio.sleep(0.05)
        assert watch.away_seconds == 0
        qdrant.state = state
        began = time.monotonic()
        while watch.away_seconds == 0:
            assert time.monotonic() - began < 5
            await asyncio.sleep(0.01)
        # Since it was asked, not since it was clear.
        assert watch.away_seconds >= (0.1 if state == "silent" else 0)
        await asyncio.sleep(0.2)
        assert 0.2 <= watch.away_seconds <= time.monotonic() - began + 0.1
        assert board.snapshot()["sink"]["up"] is False  # type: ignore[index]
        qdrant.state = "up"
        began = time.monotonic()
        while watch.away_seconds:
            assert time.monotonic() - began < 5
            await asyncio.sleep(0.01)
        assert board.snapshot()["sink"]["up"] is True  # type: ignore[index]
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


def test_who_has_had_an_answer_may_say_so() -> None:
    board = StatusBoard("p")
    watch = SinkWatch(_Qdrant().ping, board)
    watch._fails(time.monotonic() - 100, "refused")
    assert watch.away_seconds >= 100
    watch.answered()
    assert watch.away_seconds == 0
