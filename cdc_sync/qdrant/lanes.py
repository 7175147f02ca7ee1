"""What is in flight to a Qdrant server at once, whatever collections it is for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Lanes:
    """So many requests may be under way together; each has a lane of its own, by number.

    ``encoding`` is held by the one that encodes: taking turns, the first request leaves the
    earlier. Belongs to the event loop on which it is used.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.encoding = asyncio.Lock()
        # The lane used last is taken first: its connection is the least likely to have gone idle.
        self._free: asyncio.LifoQueue[int] = asyncio.LifoQueue()
        for lane in reversed(range(count)):
            self._free.put_nowait(lane)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[int]:
        """A lane, as soon as one is free."""
        lane = await self._free.get()
        try:
            yield lane
        finally:
            self._free.put_nowait(lane)
