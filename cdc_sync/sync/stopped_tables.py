"""Tables that cannot be followed any more, while the others go on.

A table *stops* when an error is its own: it was dropped, a column became something that its
collection cannot take, its collection is gone, the role may not read it. From then on its changes
are read and dropped, so the slot goes on and WAL does not pile up. Before the first of them is
confirmed the table is on record as stale, so whatever happens it is read again as a whole.

It is tried again at once, whenever the catalog shows it changed, when it is asked for, at a restart
and else after pauses that double, up to :data:`RETRY_SECONDS`. Once it can be planned, and its
collection fits, it starts again with a window of :mod:`cdc_sync.sync.resync`: what was dropped is
older than the snapshot of that window, what comes after is applied again, and points without a row
are swept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from cdc_sync.errors import CdcSyncError, ErrorKind
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard

log = get_logger(__name__)

#: How often a stopped table is tried again at the least.
RETRY_SECONDS: Final = 60.0
#: The first pause before it is tried again, or copied again if it has stopped soon after the copy.
FIRST_PAUSE_SECONDS: Final = 2.0

#: Errors of one table where one table was being read, planned or written.
_KINDS: Final = frozenset(
    {
        ErrorKind.CONFIG,
        ErrorKind.TABLE_UNUSABLE,
        ErrorKind.PUBLICATION_UNUSABLE,
        ErrorKind.SOURCE_PERMISSION,
        ErrorKind.PROTOCOL,
        ErrorKind.MAPPING,
        ErrorKind.SINK_REFUSED,
        ErrorKind.COLLECTION_MISMATCH,
        ErrorKind.COLLECTION_MISSING,
    }
)


_SCHEMA: Final = frozenset({ErrorKind.TABLE_UNUSABLE, ErrorKind.MAPPING})


def concerns_one_table(error: BaseException) -> bool:
    """Whether an error that came up with one table is that table's, and no trouble of a connection,
    the slot, the records or the limit of dead letters."""
    return isinstance(error, CdcSyncError) and error.kind in _KINDS


@dataclass(slots=True)
class StoppedTable:
    """A table that has stopped. ``sign`` is what the catalog showed of it; ``next_try`` is on the
    monotonic clock, ``pause`` the one before the next try but one. ``planned``: it can be planned
    again, and waits for its window."""

    name: str
    error: CdcSyncError
    next_try: float
    pause: float
    sign: str | None = None
    planned: bool = False


@dataclass(frozen=True, slots=True)
class _Start:
    """When a stopped table started again, and the pause if it stops soon after that."""

    moment: float
    pause: float


def _pause(last: float | None = None) -> float:
    """The pause after ``last``."""
    return min(FIRST_PAUSE_SECONDS if last is None else 2 * last, RETRY_SECONDS)


class StoppedTables:
    """Keeps book of stopped tables by name (``schema.table``, as on record), and shows them."""

    def __init__(
        self, metrics: Metrics, board: StatusBoard, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = metrics
        self._board = board
        self._clock = clock
        self._stopped: dict[str, StoppedTable] = {}
        self._started: dict[str, _Start] = {}

    def __bool__(self) -> bool:
        return bool(self._stopped)

    @property
    def names(self) -> frozenset[str]:
        """The tables that are stopped."""
        return frozenset(self._stopped)

    def holds(self, name: str) -> bool:
        """Whether the table is stopped."""
        return name in self._stopped

    def has_started_since(self, name: str, moment: float) -> bool:
        """Whether the table was stopped, and has started again after that moment."""
        started = self._started.get(name)
        return started is not None and started.moment > moment

    def waits(self, name: str) -> bool:
        """Whether the table is stopped and could not be planned again yet."""
        stopped = self._stopped.get(name)
        return stopped is not None and not stopped.planned

    def stop(self, name: str, error: CdcSyncError) -> None:
        """The table stops, or could not be started. It is on record as stale by now."""
        now = self._clock()
        stopped = self._stopped.get(name)
        if stopped is None:
            # Whatever keeps it from running once it is copied must not have it copied all the time.
            last = self._started.get(name)
            if last is None or now - last.moment >= RETRY_SECONDS:
                self._stopped[name] = StoppedTable(name, error, now, _pause())
            else:
                self._stopped[name] = StoppedTable(
                    name, error, now + last.pause, _pause(last.pause)
                )
            log.error(
                "table_stopped",
                table=name,
                kind=error.kind.value,
                error=error.message,
                remedy=error.remedy,
            )
            self._metrics.count_error(error.kind)
            if error.kind in _SCHEMA:
                self._metrics.add_table(name).schema_changes["refused"].inc()
        else:
            log.debug("table_still_stopped", table=name, error=error.message)
            stopped.error = error
            stopped.planned = False
            stopped.next_try = now + stopped.pause
            stopped.pause = _pause(stopped.pause)
        self.show(name)

    def due(self) -> list[str]:
        """The tables that are to be planned again now."""
        now = self._clock()
        return [s.name for s in self._stopped.values() if not s.planned and s.next_try <= now]

    def hurry(self, name: str) -> None:
        """Have the table tried again now."""
        stopped = self._stopped.get(name)
        if stopped is not None:
            stopped.next_try = self._clock()

    def observe(self, signs: Mapping[str, str]) -> None:
        """Have tables tried again of which the catalog shows something else than before."""
        for name, sign in signs.items():
            stopped = self._stopped.get(name)
            if stopped is None:
                continue
            if stopped.sign is not None and stopped.sign != sign:
                self.hurry(name)
            stopped.sign = sign

    def trying(self, name: str, sign: str | None) -> None:
        """The table is going to be planned; the catalog shows this of it."""
        self._stopped[name].sign = sign

    def planned(self, name: str) -> None:
        """The table can be planned again."""
        self._stopped[name].planned = True

    def start(self, name: str) -> None:
        """The table's changes are applied again from here on."""
        stopped = self._stopped.pop(name, None)
        if stopped is None:
            return
        self._started[name] = _Start(self._clock(), stopped.pause)
        log.info("table_started", table=name)
        self._metrics.add_table(name).stopped.set(0)
        self._board.table(name).update(state="copying", error=None, remedy=None)

    def show(self, name: str) -> None:
        """Show why the table is stopped."""
        error = self._stopped[name].error
        self._metrics.add_table(name).stopped.set(1)
        self._board.table(name).update(state="stopped", error=error.message, remedy=error.remedy)
