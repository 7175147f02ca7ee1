"""Watching Qdrant: while nothing is written, or workers write, nobody else would notice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from cdc_sync.errors import ErrorKind, SinkError, SourceError
from cdc_sync.ops.status import StatusBoard

#: Between two questions to Qdrant.
_LOOK_SECONDS = 2.0


class LetGoError(SourceError):
    """Qdrant did not complete anything for too long: the slot's connection is given up (R7)."""

    def __init__(self, seconds: float) -> None:
        super().__init__(
            ErrorKind.SOURCE_UNAVAILABLE,
            f"let go of the slot: Qdrant has not completed anything for {seconds:g} s",
            "The connection is taken up again once Qdrant answers.",
        )


class SinkWatch:
    """Asks Qdrant how it is, now and then. ``ping`` raises :class:`SinkError` while it is away."""

    def __init__(self, ping: Callable[[], Awaitable[None]], board: StatusBoard) -> None:
        self._ping = ping
        self._board = board
        self._failing_since: float | None = None

    async def run(self) -> None:
        """Ask until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self._ping()
            except SinkError as error:
                if self._failing_since is None:
                    self._failing_since = time.monotonic()
                self._board.set_sink(False, error.message)
            else:
                if self._failing_since is not None:
                    self._board.set_sink(True)
                self._failing_since = None

    async def unless_away(self, work: Awaitable[None], seconds: float) -> None:
        """Do work that waits for Qdrant, and cancel it with :class:`LetGoError` once Qdrant has
        not answered for so long. What the work raises is raised."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_LOOK_SECONDS)
                since = self._failing_since
                if since is not None and time.monotonic() - since > seconds and not task.done():
                    raise LetGoError(seconds)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        task.result()
