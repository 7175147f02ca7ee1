"""Watching Qdrant: while nothing is written, or workers write, nobody else would notice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from cdc_sync.errors import ErrorKind, SinkError, SourceError
from cdc_sync.ops.status import StatusBoard

#: Between two questions to Qdrant.
_LOOK_SECONDS = 2.0
#: How long an answer may take: a network that swallows everything refuses nothing.
_ANSWER_SECONDS = 10.0


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
            asked = time.monotonic()
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await self._ping()
            except SinkError as error:
                self._fails(asked, error.message)
            except TimeoutError:
                self._fails(asked, f"Qdrant has not answered for {_ANSWER_SECONDS:g} s")
            else:
                self.answered()

    def _fails(self, asked: float, message: str) -> None:
        if self._failing_since is None:
            self._failing_since = asked
        self._board.set_sink(False, message)

    def answered(self) -> None:
        """Qdrant has answered somebody else."""
        if self._failing_since is not None:
            self._board.set_sink(True)
        self._failing_since = None

    @property
    def away_seconds(self) -> float:
        """How long Qdrant has not answered; 0 while it does."""
        return 0.0 if self._failing_since is None else time.monotonic() - self._failing_since
