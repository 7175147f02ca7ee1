"""Tasks beside the stream that end by themselves are heard of."""

from __future__ import annotations

import asyncio

import pytest

from cdc_sync.errors import ConfigError, ErrorKind, SinkError
from cdc_sync.ops.status import StatusBoard
from cdc_sync.sync import sink_watch
from cdc_sync.sync.sink_watch import SinkWatch
from cdc_sync.sync.supervision import supervised


async def fail(error: BaseException) -> None:
    raise error


def alive(board: StatusBoard) -> bool:
    return all(check.ok for check in board.liveness())


async def test_a_vital_one_that_fails_ends_the_daemon_by_its_supervisor(
    caplog: pytest.LogCaptureFixture,
) -> None:
    board = StatusBoard("p")
    task = supervised(fail(ValueError("row value 42")), "watchdog", board, vital=True)
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    assert not alive(board)
    assert "the watchdog has ended: ValueError" in str(board.snapshot()["attention"])
    (record,) = [record for record in caplog.records if record.message == "task_died"]
    fields = vars(record)["event_fields"]
    assert (fields["task"], fields["error"]) == ("watchdog", "ValueError")
    assert "test_supervision.py:" in fields["where"]


async def test_others_are_missed_in_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    board = StatusBoard("p")
    task = supervised(fail(ConfigError("No such file.")), "heartbeat", board)
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    assert alive(board)
    (record,) = [record for record in caplog.records if record.message == "task_died"]
    assert vars(record)["event_fields"]["error"] == "No such file."


async def test_one_that_is_cancelled_or_done_says_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    board = StatusBoard("p")
    waiting = supervised(asyncio.sleep(3600), "watchdog", board, vital=True)
    done = supervised(asyncio.sleep(0), "watchdog", board, vital=True)
    await done
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.sleep(0)
    assert alive(board)
    assert not [record for record in caplog.records if record.message == "task_died"]


async def test_the_watch_over_qdrant(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives on what it expects; without it nobody would let go of the slot."""
    monkeypatch.setattr(sink_watch, "_LOOK_SECONDS", 0.001)
    board = StatusBoard("p")
    errors: list[BaseException] = [
        SinkError(ErrorKind.SINK_UNAVAILABLE, "away"),
        TimeoutError(),
        ValueError("Cannot invoke RPC on closed channel!"),
    ]

    async def ping() -> None:
        raise errors.pop(0)

    task = supervised(SinkWatch(ping, board).run(), "watch over Qdrant", board, vital=True)
    async with asyncio.timeout(60):
        await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    assert errors == []
    assert not alive(board)
