"""What the status says about one table."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict, Unpack

from cdc_sync.ops.metrics import TablePhase
from cdc_sync.ops.redaction import redact


class TableChanges(TypedDict, total=False):
    """What :meth:`TableStatus.update` takes."""

    collection: str
    state: TablePhase
    rows_copied: int
    rows_estimated: int | None
    rows_exact: bool
    bytes_copied: int
    retries: int
    changes_applied: int
    dead_letters: int
    waiting: str | None
    error: str | None
    remedy: str | None


@dataclass(slots=True)
class TableFields:
    """Everything about one table that the status shows."""

    collection: str | None = None
    state: TablePhase = "pending"
    rows_copied: int = 0
    rows_estimated: int | None = None
    rows_exact: bool = False
    bytes_copied: int = 0
    retries: int = 0
    changes_applied: int = 0
    dead_letters: int = 0
    waiting: str | None = None
    error: str | None = None
    remedy: str | None = None


class TableStatus:
    """One table on the board. Made by :meth:`~cdc_sync.ops.status.StatusBoard.table`."""

    def __init__(
        self,
        name: str,
        lock: threading.Lock,
        changed: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._lock = lock
        self._changed = changed
        self._monotonic = monotonic
        self._fields = TableFields()
        self._copy_started: float | None = None
        self._copy_ended: float | None = None

    @property
    def state(self) -> TablePhase:
        """Where the table is in its life."""
        return self._fields.state

    @property
    def facts(self) -> TableFields:
        """What is known of the table; read under the board's lock."""
        return self._fields

    def update(self, **changes: Unpack[TableChanges]) -> None:
        """Set the fields given; the others stay."""
        with self._lock:
            before = self._fields.state
            for name, value in changes.items():
                setattr(self._fields, name, redact(value) if isinstance(value, str) else value)
            if "state" in changes:
                self._time_copy(before)
            if "state" in changes or "waiting" in changes:
                self._changed()

    def add(
        self,
        *,
        rows_copied: int = 0,
        bytes_copied: int = 0,
        retries: int = 0,
        changes_applied: int = 0,
        dead_letters: int = 0,
    ) -> None:
        """Add to the counts."""
        with self._lock:
            self._fields.rows_copied += rows_copied
            self._fields.bytes_copied += bytes_copied
            self._fields.retries += retries
            self._fields.changes_applied += changes_applied
            self._fields.dead_letters += dead_letters

    def to_json(self) -> dict[str, object]:
        """The table's entry; called under the board's lock."""
        fields = self._fields
        names = TableFields.__dataclass_fields__
        entry = {"name": self.name, **{name: getattr(fields, name) for name in names}}
        times = self.copy_times()
        return {**entry, "copy_seconds": round(times[1] - times[0], 3) if times else None}

    def _time_copy(self, before: TablePhase) -> None:
        """From the first chunk to the last, the stream's turns between them included."""
        now = self._fields.state
        if now == "copying":
            if before not in ("copying", "catching_up") or self._copy_started is None:
                self._copy_started = self._monotonic()
            self._copy_ended = None
        elif before == "copying":
            self._copy_ended = self._monotonic()

    def copy_times(self) -> tuple[float, float] | None:
        """When the copy began and ended, or now, on the board's clock; called under its lock."""
        if self._copy_started is None:
            return None
        ended = self._monotonic() if self._copy_ended is None else self._copy_ended
        return self._copy_started, ended
