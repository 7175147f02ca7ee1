"""The watchdog: a position that does not move although the server has more, and nobody is away.

Loops that turn prove little (all of them may wait for each other), so this looks at what they are
for. It says where every task stands, once, and makes ``/livez`` fail, so that whoever supervises
the daemon starts it again; what was not confirmed is sent again. It keeps quiet while Postgres or
Qdrant is away, while a window of a copy is open (which moves by chunks), and while the server is
busy decoding: those have signs of their own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.status import StatusBoard
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.sync.stream import Positions

log = get_logger(__name__)

_LOOK_SECONDS = 5.0


class Watchdog:
    """Looks at the positions every few seconds.

    ``busy()``: whether something goes on that moves no position. ``limit_seconds``: how long the
    position may stand still; 0: for ever. ``dump()`` writes where every task stands.
    """

    def __init__(
        self,
        board: StatusBoard,
        positions: Positions,
        busy: Callable[[], bool],
        dump: Callable[[], None],
        limit_seconds: float,
    ) -> None:
        self._board = board
        self._positions = positions
        self._busy = busy
        self._dump = dump
        self._limit = limit_seconds
        self._seen: tuple[int, int, int] | None = None
        self._since = 0.0
        self._stuck = False

    async def run(self) -> None:
        """Look until cancelled."""
        if not self._limit:
            return
        while True:
            self.look(time.monotonic())
            await asyncio.sleep(_LOOK_SECONDS)

    def look(self, now: float) -> None:
        """Compare the positions with those of the last look. ``now``: seconds, of any clock."""
        positions = self._positions
        seen = (positions.received, positions.applied, positions.confirmed)
        behind = positions.server_end > positions.confirmed
        if seen != self._seen or not behind or self._busy() or not self._board.both_up:
            self._seen, self._since = seen, now
            if self._stuck:
                self._stuck = False
                self._board.stuck(None)
                log.info("moving_again")
            return
        if now - self._since < self._limit or self._stuck:
            return
        self._stuck = True
        sentence = (
            f"stuck at {Lsn(positions.confirmed)} for {now - self._since:.0f} s, while the server "
            f"is at {Lsn(positions.server_end)} and both sides answer"
        )
        log.error(
            "stuck",
            reason=sentence,
            received=str(Lsn(positions.received)),
            applied=str(Lsn(positions.applied)),
        )
        self._dump()
        self._board.stuck(sentence)
