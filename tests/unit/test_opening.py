"""Connections that a thread opens for somebody who does not wait any more: they are closed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from cdc_sync.postgres.connect import PgConnection
from cdc_sync.sync import copying
from cdc_sync.sync.copying import CopyStoppedError, CopyTask
from cdc_sync.sync.opening import opening


class Opened:
    """Is opened in a thread, when the test says so."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.opened, self.closed = threading.Event(), threading.Event()

    def open(self, *_: object) -> Opened:
        self.begun.set()
        assert self.go_on.wait(60)
        self.opened.set()
        return self

    def close(self) -> None:
        self.closed.set()


async def opened(one: Opened) -> object:
    return await opening(one.open)


async def imported(one: Opened) -> object:
    return await copying._unless_stopped(cast("CopyTask", one), asyncio.Event())


@pytest.mark.parametrize("wait", [opened, imported])
@pytest.mark.parametrize("late", [True, False])
async def test_it_is_closed_if_its_opener_is_cancelled(
    wait: Callable[[Opened], Awaitable[object]], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is opened before or after that."""
    monkeypatch.setattr(copying, "_import", Opened.open)
    one = Opened()
    waiting = asyncio.ensure_future(wait(one))
    await asyncio.to_thread(one.begun.wait, 60)
    if late:
        waiting.cancel()
        await asyncio.sleep(0)
        one.go_on.set()
    else:
        one.go_on.set()
        # Opened, and the event loop has not been told yet.
        assert one.opened.wait(60)
        waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await asyncio.to_thread(one.closed.wait, 60)


@pytest.mark.parametrize("wait", [opened, imported])
def test_it_is_closed_if_the_event_loop_ends_meanwhile(
    wait: Callable[[Opened], Awaitable[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which cancels what is still under way, and waits for the threads."""
    monkeypatch.setattr(copying, "_import", Opened.open)
    one = Opened()

    async def end() -> None:
        waiting = asyncio.ensure_future(wait(one))
        await asyncio.to_thread(one.begun.wait, 60)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        threading.Timer(0.2, one.go_on.set).start()

    asyncio.run(end())
    assert one.opened.is_set()
    assert one.closed.is_set()


async def test_a_worker_that_is_stopped_closes_what_it_does_not_wait_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, stop = Opened(), asyncio.Event()
    monkeypatch.setattr(copying, "_import", one.open)
    waiting = asyncio.ensure_future(copying._unless_stopped(cast("Any", None), stop))
    await asyncio.to_thread(one.begun.wait, 60)
    stop.set()
    with pytest.raises(CopyStoppedError):
        await waiting
    one.go_on.set()
    assert await asyncio.to_thread(one.closed.wait, 60)


async def test_one_that_is_waited_for_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Opened()
    one.go_on.set()
    monkeypatch.setattr(copying, "_import", one.open)
    found: PgConnection = await copying._unless_stopped(cast("Any", None), asyncio.Event())
    assert cast("object", found) is one
    assert not one.closed.is_set()
