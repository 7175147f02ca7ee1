"""Reads a daemon's log, of all its lives, for what it says about the ledger of a copy: no chunk
that was on record is copied again, and nothing on record is forgotten."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Event = Mapping[str, object]
_Range = tuple[int, int | None]

#: Events after which a table may be copied from its beginning.
_BEGINNINGS = (
    "copy_restarted",
    "resync_started",
    "table_copied",
    "resync_completed",
    "partitions_copied",
    "sweep_completed",
)


def events_in(log: str) -> list[dict[str, Any]]:
    """The events of a log of JSON lines; a line that a kill has cut in two is left out."""
    events = []
    for line in log.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def logged_events(path: Path) -> list[Event]:
    """The events of a log file of JSON lines, of all lives of its daemon."""
    return list(events_in(path.read_text(encoding="utf-8", errors="replace")))


def events_of(records: Iterable[logging.LogRecord]) -> list[Event]:
    """The events among the records of this process (``caplog.records``)."""
    return [
        {"event": record.getMessage(), **getattr(record, "event_fields", {})} for record in records
    ]


def count(events: Iterable[Event], name: str) -> int:
    """How often an event was logged."""
    return sum(event.get("event") == name for event in events)


def logged(caplog: pytest.LogCaptureFixture, name: str, text: str = "") -> int:
    """How often an event was logged in this process that has the text among its values."""
    return count((e for e in events_of(caplog.records) if text in str(e)), name)


@dataclass
class LedgerReport:
    """What the log says. ``faults`` should be empty; ``chunks`` counts chunks copied, by table, and
    ``saves`` how often a ledger with something done was put on record."""

    faults: list[str] = field(default_factory=list)
    chunks: Counter[str] = field(default_factory=Counter)
    saves: int = 0


def check_ledger(events: Iterable[Event]) -> LedgerReport:
    """Look for chunks that were copied again after they were on record, and for ledgers put on
    record that know less than before, except where the log says that a copy began anew."""
    report = LedgerReport()
    recorded: dict[str, dict[str, list[_Range]]] = {}
    forgotten: dict[str, str] = {}
    for event in events:
        name, table = event.get("event"), str(event.get("table", ""))
        if name == "chunk_copied":
            report.chunks[table] += 1
            leaf, new = str(event["leaf_oid"]), _range(event["start"], event["end"])
            for done in recorded.get(table, {}).get(leaf, ()):
                if _overlap(done, new):
                    report.faults.append(f"{table}: {leaf} {new} copied again, {done} was done")
        elif name == "ledger_saved":
            now = _leaves(event["leaves"])
            report.saves += any(now.values())
            for leaf, ranges in recorded.get(table, {}).items():
                for done in ranges:
                    if not any(_within(done, other) for other in now.get(leaf, ())):
                        # A restart says so only once this is on record.
                        forgotten[table] = f"{table}: {leaf} {done} was done and is not any more"
            recorded[table] = now
        elif name == "copy_started":  # from a new slot
            recorded.clear()
        elif name in _BEGINNINGS:
            recorded.pop(table, None)
            if name == "copy_restarted":
                forgotten.pop(table, None)
    report.faults += forgotten.values()
    return report


def _leaves(value: object) -> dict[str, list[_Range]]:
    assert isinstance(value, Mapping)
    return {str(leaf): [_range(*one) for one in ranges] for leaf, ranges in value.items()}


def _range(start: object, end: object) -> _Range:
    assert isinstance(start, int)
    assert end is None or isinstance(end, int)
    return start, end


def _overlap(one: _Range, other: _Range) -> bool:
    return (other[1] is None or one[0] < other[1]) and (one[1] is None or other[0] < one[1])


def _within(inner: _Range, outer: _Range) -> bool:
    if inner[0] < outer[0]:
        return False
    return outer[1] is None or (inner[1] is not None and inner[1] <= outer[1])


def blocks_done(events: Sequence[Event], table: str) -> dict[str, list[_Range]]:
    """The ledger of a table as it was put on record last: done ranges of blocks by the leaf's
    OID."""
    for event in reversed(events):
        if event.get("event") == "ledger_saved" and event.get("table") == table:
            return _leaves(event["leaves"])
    return {}
