"""Doing several things at once, so that nothing is under way any more when one of them fails."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

Work: TypeAlias = Callable[[], Awaitable[None]]


async def side_by_side(work: Sequence[Work], together: int) -> None:
    """Do all of it, at most so many at a time (1 or more), begun in this order.

    When one fails nothing more is begun, what is under way is cancelled and waited for, and then
    the first error is raised.
    """
    if together == 1 or len(work) == 1:
        for one in work:
            await one()
        return
    left = deque(work)

    async def take_turns() -> None:
        while left:
            await left.popleft()()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(together, len(left))):
                group.create_task(take_turns())
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
