"""The last events of the log, kept in memory for the status page."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from cdc_sync.ops.logging import event_name, record_fields, rfc3339

#: How many are kept.
KEPT_EVENTS: Final = 50
#: Longer texts are cut: fifty of them go with every answer of ``/status``.
_LONGEST_TEXT: Final = 500


@dataclass(slots=True)
class _Entry:
    first: float
    last: float
    level: str
    event: str
    fields: dict[str, object]
    count: int = 1

    def to_json(self) -> dict[str, object]:
        return {
            "time": rfc3339(self.last),
            "since": rfc3339(self.first),
            "count": self.count,
            "level": self.level,
            "event": self.event,
            "fields": dict(self.fields),
        }


class RecentEvents(logging.Handler):
    """Keeps our own events of level info and above; those of other libraries are left out, since
    nobody knows what is in them.

    A warning that comes again about the same thing is one entry, with a count and its latest
    fields: a thousand tries must not push out what led to them.
    """

    def __init__(self, limit: int = KEPT_EVENTS) -> None:
        super().__init__(logging.INFO)
        self._limit = limit
        self._entries: OrderedDict[tuple[object, ...], _Entry] = OrderedDict()
        self._number = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._keep(record)
        except Exception:  # noqa: BLE001 - logging's contract: report to stderr, never to the caller
            self.handleError(record)

    def _keep(self, record: logging.LogRecord) -> None:
        fields = {name: _cut(value) for name, value in record_fields(record).items()}
        event, level = event_name(record), record.levelname.lower()
        # Events that tell a story are entries of their own: state=streaming is not state=failed.
        self._number += 1
        key: tuple[object, ...] = (self._number,)
        if record.levelno >= logging.WARNING:
            key = (event, level, fields.get("table"), fields.get("kind"))
        before = self._entries.pop(key, None)
        entry = _Entry(record.created, record.created, level, event, fields)
        if before is not None:
            entry.first, entry.count = before.first, before.count + 1
        self._entries[key] = entry
        while len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def newest_first(self) -> list[dict[str, object]]:
        """The events as ``/status`` shows them."""
        self.acquire()
        try:
            return [entry.to_json() for entry in reversed(self._entries.values())]
        finally:
            self.release()


def _cut(value: object) -> object:
    text = value if isinstance(value, str) else str(value)
    if len(text) > _LONGEST_TEXT:
        return f"{text[:_LONGEST_TEXT]}…"
    return value
