"""The WAL that the slot keeps while tables are copied: what it may be, and what is done about it.

While a window is open nothing is confirmed, so the slot keeps all that is written meanwhile. A
window ends early once that is more than the budget, and the next is opened when the stream has
brought it below half of that (R80). So the copy waits rather than cost us the slot, which Postgres
takes away at ``max_slot_wal_keep_size``.

Confirming alone frees nothing: ``restart_lsn`` moves when a record of the running transactions is
decoded and then confirmed, and Postgres remembers one such record at a time. So after a window it
moves to somewhere near the window's beginning, and would stay there in the next one, if that were
opened at once. Hence the stream goes on for a while, until less is kept than half of what the last
window wrote; then the slot never keeps as much as two windows write.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.errors import SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.slot import blocking_transactions
from cdc_sync.postgres.snapshot import SnapshotHolder
from cdc_sync.postgres.watch import (
    SourcePosition,
    WalLimits,
    log_standby_snapshot,
    source_position,
    wal_limits,
)
from cdc_sync.sync.kept_connection import KeptConnection
from cdc_sync.sync.progress import duration_text, size_text

log = get_logger(__name__)

#: The part of what a slot may keep that the copy may make it keep; and the part at which chunks in
#: progress, for which the rest is meant, are given up.
_SHARE: Final = 0.8
_CUT_SHARE: Final = 0.9
#: Between two looks while a window is open.
LOOK_SECONDS: Final = 0.5
#: Between two looks while none may be opened.
WAIT_SECONDS: Final = 0.25
#: How long the stream may go on after a window for the slot's beginning to follow: a little more
#: than Postgres takes to log the running transactions by itself.
FOLLOW_SECONDS: Final = 20.0
#: After so long something else holds the slot's beginning; then, how often it is said.
_STUCK_SECONDS: Final = 30.0
_REMIND_SECONDS: Final = 60.0


def copy_budget(configured: int | None, slot_limit: int | None) -> int | None:
    """Bytes of WAL that the copy may make the slot keep: as configured, but no more than four
    fifths of what the server lets a slot keep (None: without limit). None: without limit."""
    share = None if slot_limit is None else int(slot_limit * _SHARE)
    return min((size for size in (configured, share) if size is not None), default=None)


@dataclass(slots=True)
class WindowTime:
    """How long a window may give out work."""

    deadline: float  #: on the monotonic clock
    ended: bool = False

    @property
    def over(self) -> bool:
        """Whether nothing more is to be begun."""
        return self.ended or time.monotonic() >= self.deadline


class WindowCutError(Exception):
    """What is in progress in a window cannot be waited for: the slot is about to be lost."""


@dataclass(slots=True)
class _Waiting:
    since: float
    say_at: float
    tables: tuple[str, ...]


class RetainedWal:
    """Looks at the slot over a connection of its own, while windows are open and before."""

    def __init__(self, settings: Settings, metrics: Metrics, board: StatusBoard) -> None:
        self._settings = settings
        self._metrics = metrics
        self._board = board
        self._connection = KeptConnection(settings.source, "cdc_sync watch")
        self._waiting: _Waiting | None = None
        #: Tables whose entry on the board says why they wait.
        self._shown: set[str] = set()
        #: Bytes that were written during the last window, and the seconds it took.
        self._written = 0
        self._window_seconds = 0.0
        self._closed_at = 0.0
        #: Where the slot began when the stream went on for nothing.
        self._in_vain: int | None = None

    # -- while a window is open

    async def watch(self, window: WindowTime, holder: SnapshotHolder) -> None:
        """Look until cancelled: publish what is kept, and end the window's time when that is too
        much. Raises :class:`WindowCutError`, and :class:`SourceError` when the server is gone."""
        self._open()
        started, first = time.monotonic(), None
        taken = time.time()
        try:
            while True:
                position, limits = await asyncio.to_thread(self._look)
                first = position.current if first is None else first
                self._written = position.current - first
                publish_slot(self._metrics, self._board, position)
                self._metrics.snapshot_taken_timestamp_seconds.set(taken)
                age = position.xmax - holder.snapshot.xmin
                self._metrics.snapshot_xmin_age_transactions.set(max(0, age))
                self._end_if_too_much(window, position, limits)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._closed_at = time.monotonic()
            self._window_seconds = self._closed_at - started
            self._metrics.snapshot_taken_timestamp_seconds.set(None)
            self._metrics.snapshot_xmin_age_transactions.set(None)

    def _end_if_too_much(
        self, window: WindowTime, position: SourcePosition, limits: WalLimits
    ) -> None:
        retained, budget = position.retained_bytes, self._budget(limits)
        if retained is None or budget is None or retained <= budget:
            return
        if not window.ended:
            window.ended = True
            log.warning(
                "window_ended_early",
                retained_wal_bytes=retained,
                budget_bytes=budget,
                limit_bytes=limits.slot_bytes,
            )
        if limits.slot_bytes is not None and retained > limits.slot_bytes * _CUT_SHARE:
            raise WindowCutError

    def _budget(self, limits: WalLimits) -> int | None:
        return copy_budget(self._settings.migration.max_retained_wal_bytes, limits.slot_bytes)

    # -- before a window

    async def has_room(self, tables: Iterable[str]) -> bool:
        """Whether a window may be opened for the tables. If not, board and log say why, and it is
        to be asked again after :data:`WAIT_SECONDS`. Raises :class:`SourceError`."""
        position, limits = await asyncio.to_thread(self._look)
        publish_slot(self._metrics, self._board, position)
        retained = position.retained_bytes
        if retained is None:
            return True  # There is no slot to lose.
        budget = self._budget(limits)
        too_much = budget is not None and retained >= budget / 2
        if not too_much and not self._is_following(position, limits):
            return True
        await asyncio.to_thread(self._hasten)
        if budget is not None and too_much:
            await self._wait(tuple(tables), retained, budget)
        else:
            self._show(
                tables,
                f"the slot keeps {size_text(retained)} of WAL since the last window; for some "
                "seconds the stream goes on alone",
            )
        return False

    def _is_following(self, position: SourcePosition, limits: WalLimits) -> bool:
        """Whether the slot's beginning is still to move on to where the last window ended."""
        retained = position.retained_bytes or 0
        if retained < max(self._written / 2, limits.segment_bytes):
            return False
        if position.restart == self._in_vain:
            return False
        # No longer than the copy itself had.
        if time.monotonic() - self._closed_at < min(FOLLOW_SECONDS, self._window_seconds):
            return True
        self._in_vain = position.restart
        return False

    async def _wait(self, tables: tuple[str, ...], retained: int, budget: int) -> None:
        now = time.monotonic()
        if self._waiting is None:
            self._waiting = _Waiting(now, now, tables)
        if now < self._waiting.say_at and tables == self._waiting.tables:
            return
        waited = now - self._waiting.since
        stuck = waited >= _STUCK_SECONDS
        self._waiting.say_at = now + (_REMIND_SECONDS if stuck else _STUCK_SECONDS)
        self._waiting.tables = tables
        reason = (
            f"the slot keeps {size_text(retained)} of WAL; the copy goes on once that is less than "
            f"{size_text(budget // 2)}"
        )
        if stuck:
            reason += f" ({await asyncio.to_thread(self._why_stuck)})"
        self._show(tables, reason)
        log.warning(
            "copy_waits_for_wal",
            reason=reason,
            tables=list(tables),
            retained_wal_bytes=retained,
            budget_bytes=budget,
            waited=duration_text(waited),
        )

    def _show(self, tables: Iterable[str], reason: str | None) -> None:
        tables = set(tables)
        for table in self._shown - tables:
            self._board.table(table).update(waiting=None)
        for table in tables:
            self._board.table(table).update(waiting=reason)
        self._shown = tables

    def _open(self) -> None:
        self._show((), None)
        if self._waiting is not None:
            seconds = time.monotonic() - self._waiting.since
            log.info("copy_goes_on", waited=duration_text(seconds))
        self._waiting = None

    # -- the connection

    def _look(self) -> tuple[SourcePosition, WalLimits]:
        try:
            return self._connection.run(self._read)
        except SourceError:
            # It may be this connection only that was lost.
            return self._connection.run(self._read)

    def _read(self, connection: PgConnection) -> tuple[SourcePosition, WalLimits]:
        slot = self._settings.source.slot
        return source_position(connection, slot), wal_limits(connection)

    def _hasten(self) -> None:
        self._connection.run(log_standby_snapshot)

    def _why_stuck(self) -> str:
        holders = self._connection.run(blocking_transactions)
        if not holders:
            return "no open transaction is to be seen that holds it"
        more = f" and {len(holders) - 3} more" if len(holders) > 3 else ""
        return f"open transactions hold it: {'; '.join(holders[:3])}{more}"

    async def close(self) -> None:
        """Close the connection, and forget the last window; may be used again."""
        await asyncio.to_thread(self._connection.rest)
        self._written = 0


def publish_slot(metrics: Metrics, board: StatusBoard, position: SourcePosition) -> None:
    """Show what the slot keeps."""
    board.set_slot(
        active=bool(position.active),
        wal_status=position.wal_status,
        retained_bytes=position.retained_bytes,
        safe_bytes=position.safe_wal_bytes,
    )
    metrics.slot_spilled_bytes.set(position.spilled_bytes)
    metrics.slot_spilled_transactions.set(position.spilled_transactions)
