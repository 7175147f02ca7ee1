"""Doing several things at once: how many, in which order, and what an error leaves under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from cdc_sync.sync.side_by_side import side_by_side


class Tasks:
    """Work that ends when it is told to."""

    def __init__(self, count: int) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.under_way: set[int] = set()
        self.most = 0
        self._futures = [asyncio.get_running_loop().create_future() for _ in range(count)]
        self.work: list[Callable[[], Awaitable[None]]] = [
            partial(self._do, number) for number in range(count)
        ]

    async def _do(self, number: int) -> None:
        self.begun.append(number)
        self.under_way.add(number)
        self.most = max(self.most, len(self.under_way))
        try:
            await self._futures[number]
        except asyncio.CancelledError:
            # As a request that is waited for to its end.
            await asyncio.sleep(0.01)
            raise
        finally:
            self.under_way.remove(number)
        self.ended.append(number)

    def end(self, number: int, error: BaseException | None = None) -> None:
        if error is None:
            self._futures[number].set_result(None)
        else:
            self._futures[number].set_exception(error)


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_so_many_are_under_way_and_the_next_begins_when_one_ends() -> None:
    tasks = Tasks(5)
    whole = asyncio.create_task(side_by_side(tasks.work, 3))
    await turns()
    assert tasks.begun == [0, 1, 2]
    tasks.end(1)
    await turns()
    assert tasks.begun == [0, 1, 2, 3]
    for number in (3, 0, 2):
        tasks.end(number)
        await turns()
    assert not whole.done()
    tasks.end(4)
    await whole
    assert tasks.ended == [1, 3, 0, 2, 4]
    assert tasks.most == 3


@pytest.mark.parametrize(("count", "together"), [(4, 1), (1, 4), (0, 4), (0, 1)])
async def test_one_after_the_other(count: int, together: int) -> None:
    tasks = Tasks(count)
    for number in range(count):
        tasks.end(number)
    await side_by_side(tasks.work, together)
    assert tasks.ended == list(range(count))
    assert tasks.most <= 1


@pytest.mark.parametrize("together", [1, 2, 8])
async def test_an_error_begins_nothing_more_and_leaves_nothing_under_way(together: int) -> None:
    tasks = Tasks(4)
    whole = asyncio.create_task(side_by_side(tasks.work, together))
    await turns()
    begun = list(tasks.begun)
    tasks.end(0, ValueError("the first"))
    with pytest.raises(ValueError, match="the first"):
        await whole
    assert tasks.begun == begun
    assert not tasks.under_way
    assert not tasks.ended


async def test_cancellation_is_waited_out() -> None:
    tasks = Tasks(3)
    whole = asyncio.create_task(side_by_side(tasks.work, 2))
    await turns()
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole
    assert tasks.begun == [0, 1]
    assert not tasks.under_way
