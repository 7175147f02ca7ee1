"""What the daemon says about itself: the engine writes the board, the HTTP thread reads it.

:meth:`StatusBoard.snapshot` is the body of ``/status`` and a contract: fields are added, never
renamed or removed while ``format`` stays 1, and readers ignore what they do not know. Times are RFC
3339 in UTC, positions ``X/Y`` as Postgres prints them, sizes bytes, durations seconds; what is not
known yet is null.

    {
      "format": 1,
      "pipeline": {"name": "default", "slot": "cdc_sync", "publication": "cdc_sync"},
      "time": "2026-01-01T12:00:00.100Z",                          of this answer
      "state": "streaming",
      "state_since": "2026-01-01T12:00:00.000Z",
      "message": null,                 why, in a sentence, when the state does not say it
      "summary": {"severity": "ok", "title": "In step", "text": "Every committed change ...",
                  "progress": null},   of a copy, from 0 to 1
      "attention": [{"severity": "warning", "title": "Dead letters", "text": "1 row ...",
                     "remedy": "cdc-sync dlq list", "since": null}],       worst first
      "alive": true, "ready": true,    what /livez and /readyz answer
      "source": {"up": true, "error": null, "since": "..."},       up is null before the first try
      "sink": {"up": true, "error": null, "since": "..."},
      "slowed": [{"collection": "items", "points": 64, "cause": "rate_limit", "since": "..."}],
      "positions": {"server": "0/3000060", "received": "0/3000060",
                    "applied": "0/3000028", "acknowledged": "0/3000028"},
      "lag": {"bytes": 56, "seconds": 0.0},
      "lag_history": {"interval_seconds": 5.0, "bytes": [56], "seconds": [0.0]},
      "slot": {"active": true, "wal_status": "reserved", "retained_bytes": 3000, "risk": "low",
               "limit_bytes": 1073741824, "seen": "..."},      null until Postgres has shown it
      "rebuilds": [{"slot": "cdc_sync_rebuild_4f2a9c01", "table": "public.items",
                    "in_use": false, "retained_bytes": 3000, "unused_since": "..."}],
      "dead_letters": {"pending": 0, "limit": 1000},
      "verification": {"finished": "...", "ok": true,       null without one; of all tables
                       "tables": [{"name": "public.items", "missing": 0, "extra": 0,
                                   "different": 0, "finished": "..."}]},
      "tables": [{"name": "public.items", "collection": "items", "state": "streaming",
                  "rows_copied": 400, "rows_estimated": 400, "rows_exact": true,
                  "bytes_copied": 1638400, "copy_seconds": 0.4, "retries": 0,
                  "changes_applied": 12, "dead_letters": 0, "waiting": null,
                  "error": null, "remedy": null}],
      "tasks": [{"name": "stream", "heartbeat_age_seconds": 0.4}],
      "events": [{"time": "...", "since": "...", "count": 1, "level": "info",
                  "event": "streaming_started", "fields": {"slot": "cdc_sync"}}],  newest first
      "versions": {"cdc_sync": "0.1.0", "python": "3.11.7",
                   "postgres": "16.3", "qdrant": "1.20.0"},
      "started": "2026-01-01T11:59:00.000Z", "uptime_seconds": 60.1
    }

The state is starting, standby, snapshotting, catching_up, streaming, draining or failed; a table's
is pending, copying, catching_up, streaming, stopped or failed; the others go on while one is
stopped, and its ``error`` and ``remedy`` say why. ``rows_exact`` says that ``rows_estimated``
was counted; ``copy_seconds`` runs while the table is copied; ``waiting`` says why nothing of it is
copied just now. ``slowed`` are collections of which less is sent at once than configured, since
Qdrant takes no more: so many points together, and why. ``rebuilds`` are the slots of rebuilds that
there are; ``table`` is null where it is none of the pipeline's, ``unused_since`` while somebody is
at work. Severities are ok, busy, warning and
critical; the slot's risk is unknown, unlimited, low, raised, high or lost.
"""

from __future__ import annotations

import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypedDict, Unpack, get_args

from prometheus_client import Gauge

from cdc_sync import __version__
from cdc_sync.ops.attention import (
    Facts,
    Notice,
    RebuildSlot,
    SlotFacts,
    Summary,
    Verified,
    assess,
    verification_json,
)
from cdc_sync.ops.lag_history import LagHistory
from cdc_sync.ops.logging import rfc3339
from cdc_sync.ops.metrics import Metrics, State, TablePhase, WalStatus
from cdc_sync.ops.recent_events import RecentEvents
from cdc_sync.ops.redaction import redact
from cdc_sync.ops.table_status import TableStatus
from cdc_sync.pgoutput.lsn import Lsn

#: A loop that has not turned for so long is stuck.
HEARTBEAT_LIMIT_SECONDS: Final = 60.0
#: The loop that sets the lag, and how long it may be silent before that is not believed any more.
_CLOCK: Final = "clock"
_CLOCK_SILENT_SECONDS: Final = 10.0

_WORKING: Final = frozenset({"snapshotting", "catching_up", "streaming"})


class Positions(TypedDict, total=False):
    """What :meth:`StatusBoard.positions` takes; LSNs as integers."""

    server: int
    received: int
    applied: int
    acknowledged: int


@dataclass(slots=True)
class _End:
    """Whether Postgres or Qdrant answers."""

    up: bool | None = None
    error: str | None = None
    since: float | None = None

    def set(self, up: bool, error: str | None) -> None:
        if up != self.up:
            self.since = time.time()
        self.up = up
        self.error = None if up or error is None else redact(error)

    def to_json(self) -> dict[str, object]:
        since = None if self.since is None else rfc3339(self.since)
        return {"up": self.up, "error": self.error, "since": since}


@dataclass(frozen=True, slots=True)
class Check:
    """One of the things that ``/livez`` or ``/readyz`` looks at."""

    name: str
    ok: bool
    message: str | None = None

    def to_json(self) -> dict[str, object]:
        """As the endpoints show it."""
        return {"name": self.name, "ok": self.ok, "message": self.message}


@dataclass(slots=True)
class _Facts:
    """What the board holds apart from tables and tasks."""

    pipeline: dict[str, str]
    state: State = "starting"
    state_since: float = field(default_factory=time.time)
    message: str | None = None
    supervisor_error: str | None = None
    stuck: str | None = None
    source: _End = field(default_factory=_End)
    sink: _End = field(default_factory=_End)
    positions: Positions = field(default_factory=lambda: Positions())
    lag_bytes: int | None = None
    lag_seconds: float | None = None
    slot: SlotFacts | None = None
    dead_letter_limit: int | None = None
    versions: dict[str, str | None] = field(default_factory=dict)


class StatusBoard:
    """The daemon's state, thread-safe. With ``metrics``, what both show is set in one call here.

    Mirrored to metrics: state, tables, source_up, sink_up, lag_seconds,
    loop_heartbeat_timestamp_seconds. ``monotonic`` is the clock of heartbeats and of the uptime.
    """

    def __init__(
        self,
        name: str,
        *,
        slot: str = "",
        publication: str = "",
        metrics: Metrics | None = None,
        events: RecentEvents | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lock = threading.Lock()
        self._events = events
        self._metrics = metrics
        self._monotonic = monotonic
        self._started = time.time()
        self._started_monotonic = monotonic()
        self._facts = _Facts({"name": name, "slot": slot, "publication": publication})
        self._facts.versions = {
            "cdc_sync": __version__, "python": platform.python_version(),
            "postgres": None, "qdrant": None,
        }  # fmt: skip
        self._tables: dict[str, TableStatus] = {}
        self._slowed: dict[str, dict[str, object]] = {}
        self._heartbeats: dict[str, float] = {}
        self._beats: dict[str, Gauge] = {}
        self._lag_history = LagHistory()
        self._verified: dict[str, Verified] = {}
        self._rebuilt: dict[str, str] = {}
        self._rebuilds: Sequence[RebuildSlot] = ()
        if metrics is not None:
            metrics.set_state("starting")

    # -- the engine's side

    def set_state(self, state: State, message: str | None = None) -> None:
        """Set the state of the pipeline; ``message`` says why where the state alone does not."""
        with self._lock:
            if state != self._facts.state:
                self._facts.state_since = time.time()
            self._facts.state = state
            self._facts.message = None if message is None else redact(message)
        if self._metrics is not None:
            self._metrics.set_state(state)

    def set_source(self, up: bool, error: str | None = None) -> None:
        """Say whether Postgres answers."""
        with self._lock:
            self._facts.source.set(up, error)
        if self._metrics is not None:
            self._metrics.source_up.set(up)

    def set_sink(self, up: bool, error: str | None = None) -> None:
        """Say whether Qdrant answers."""
        with self._lock:
            self._facts.sink.set(up, error)
        if self._metrics is not None:
            self._metrics.sink_up.set(up)

    def set_pace(self, collection: str, points: int, cause: str | None) -> None:
        """Say how many points of a collection may be in flight together, and why not as many as
        configured (None: as many)."""
        with self._lock:
            since = self._slowed.pop(collection, {}).get("since", rfc3339(time.time()))
            if cause is not None:
                self._slowed[collection] = {
                    "collection": collection, "points": points, "cause": cause, "since": since,
                }  # fmt: skip

    def set_versions(self, *, postgres: str | None = None, qdrant: str | None = None) -> None:
        """Set the versions of the servers, once known."""
        with self._lock:
            known = {"postgres": postgres, "qdrant": qdrant}
            self._facts.versions.update({key: value for key, value in known.items() if value})

    def positions(self, **lsns: Unpack[Positions]) -> None:
        """Set positions in the WAL; those not given stay."""
        with self._lock:
            self._facts.positions.update(lsns)

    def set_lag(self, *, lag_bytes: int | None, seconds: float | None) -> None:
        """Set how far behind the server Qdrant is; None: not known."""
        with self._lock:
            self._facts.lag_bytes = lag_bytes
            self._facts.lag_seconds = seconds
            self._lag_history.add(self._monotonic(), lag_bytes=lag_bytes, seconds=seconds)
        if self._metrics is not None:
            self._metrics.lag_seconds.set(seconds)

    def set_slot(
        self,
        *,
        active: bool,
        wal_status: WalStatus | None,
        retained_bytes: int | None,
        safe_bytes: int | None,
    ) -> None:
        """Set what Postgres shows of the slot. ``retained_bytes``: None where there is no such
        slot, or it is lost; ``safe_bytes``: None without ``max_slot_wal_keep_size``."""
        slot = SlotFacts(active, wal_status, retained_bytes, safe_bytes, time.time())
        with self._lock:
            self._facts.slot = slot
        if self._metrics is not None:
            self._metrics.slot_active.set(1 if active else 0)
            self._metrics.set_wal_status(wal_status)
            self._metrics.slot_retained_wal_bytes.set(retained_bytes)
            self._metrics.slot_safe_wal_bytes.set(safe_bytes)

    def set_rebuilds(self, slots: Sequence[RebuildSlot]) -> None:
        """Set what Postgres shows of slots of rebuilds."""
        with self._lock:
            self._rebuilds = list(slots)
        if self._metrics is not None:
            self._metrics.set_rebuild_slots(slots)

    def slot_unknown(self) -> None:
        """Say that Postgres could not be asked. The last answer stays, with its time; a metric has
        none."""
        if self._metrics is not None:
            self._metrics.slot_active.set(None)
            self._metrics.set_wal_status(None)
            self._metrics.slot_retained_wal_bytes.set(None)
            self._metrics.slot_safe_wal_bytes.set(None)
            self._metrics.set_rebuild_slots(())

    def set_verification(
        self, table: str, *, missing: int, extra: int, different: int, finished: float | None
    ) -> None:
        """Set what the verification of a table has found; ``finished``: Unix time of its last
        complete pass, None before the first."""
        with self._lock:
            self._verified[table] = Verified(missing, extra, different, finished)

    def set_rebuilt(self, collections: Mapping[str, str]) -> None:
        """Set which tables are kept in collections (by the table's name) that the configuration
        does not name, since they were rebuilt."""
        with self._lock:
            self._rebuilt = dict(collections)

    def set_dead_letter_limit(self, limit: int) -> None:
        """Say beyond how many dead letters the pipeline stops."""
        with self._lock:
            self._facts.dead_letter_limit = limit

    def table(self, name: str) -> TableStatus:
        """The entry of a table (``schema.table``), made at the first call."""
        with self._lock:
            if name not in self._tables:
                self._tables[name] = TableStatus(
                    name, self._lock, self._count_tables, self._monotonic
                )
                self._count_tables()
            return self._tables[name]

    def heartbeat(self, task: str) -> None:
        """Say that a loop has turned. A loop that has said so once must go on, or be retired."""
        with self._lock:
            self._heartbeats[task] = self._monotonic()
        if self._metrics is None:
            return
        beat = self._beats.get(task)
        if beat is None:
            beat = self._metrics.loop_heartbeat_timestamp_seconds.labels(task)
            self._beats[task] = beat
        beat.set(time.time())

    def retire(self, task: str) -> None:
        """Say that a loop has ended as it should."""
        with self._lock:
            known = self._heartbeats.pop(task, None) is not None
            self._beats.pop(task, None)
        if known and self._metrics is not None:
            self._metrics.loop_heartbeat_timestamp_seconds.remove(task)

    def refresh_lag(self) -> None:
        """Have the metric say what ``/status`` says, also while the loop that sets it does not
        turn."""
        with self._lock:
            seconds = self._lag_seconds()
            turns = seconds == self._facts.lag_seconds
        if self._metrics is not None and not turns:
            self._metrics.lag_seconds.set(seconds)

    def supervisor_died(self, message: str) -> None:
        """Say that nothing supervises the tasks any more: not alive from now on."""
        with self._lock:
            self._facts.supervisor_error = redact(message)

    def stuck(self, message: str | None) -> None:
        """Say that nothing moves although it could (not alive), or that it does again."""
        with self._lock:
            self._facts.stuck = None if message is None else redact(message)

    # -- the readers' side

    @property
    def standby_seconds(self) -> float:
        """For how long another process has had the slot; 0 while none has."""
        with self._lock:
            facts = self._facts
            return max(0.0, time.time() - facts.state_since) if facts.state == "standby" else 0.0

    @property
    def source_up(self) -> bool:
        """Whether Postgres answered when it was last asked."""
        with self._lock:
            return self._facts.source.up is True

    @property
    def both_up(self) -> bool:
        """Whether Postgres and Qdrant answered when they were last asked."""
        with self._lock:
            return self._facts.source.up is True and self._facts.sink.up is True

    def liveness(self) -> list[Check]:
        """The checks of ``/livez``; alive when all are ok. None depends on Postgres or Qdrant."""
        with self._lock:
            return self._liveness()

    def readiness(self) -> list[Check]:
        """The checks of ``/readyz``; ready when all are ok."""
        with self._lock:
            return self._readiness()

    def snapshot(self) -> dict[str, object]:
        """Everything, as ``/status`` shows it (see the module)."""
        with self._lock:
            facts, now = self._facts, self._monotonic()
            summary, notices = self._assess()
            positions = {
                "server": _lsn(facts.positions.get("server")),
                "received": _lsn(facts.positions.get("received")),
                "applied": _lsn(facts.positions.get("applied")),
                "acknowledged": _lsn(facts.positions.get("acknowledged")),
            }
            return {
                "format": 1,
                "pipeline": dict(facts.pipeline),
                "time": rfc3339(time.time()),
                "state": facts.state,
                "state_since": rfc3339(facts.state_since),
                "message": facts.message,
                "summary": summary.to_json(),
                "attention": [notice.to_json() for notice in notices],
                "alive": all(check.ok for check in self._liveness()),
                "ready": all(check.ok for check in self._readiness()),
                "source": facts.source.to_json(),
                "sink": facts.sink.to_json(),
                "slowed": list(self._slowed.values()),
                "positions": positions,
                "lag": {"bytes": facts.lag_bytes, "seconds": self._lag_seconds()},
                "lag_history": self._lag_history.to_json(now),
                "slot": None if facts.slot is None else facts.slot.to_json(),
                "rebuilds": [slot.to_json() for slot in self._rebuilds],
                "verification": verification_json(self._verified),
                "dead_letters": {
                    "pending": self._dead_letters(),
                    "limit": facts.dead_letter_limit,
                },
                "tables": [table.to_json() for table in self._tables.values()],
                "tasks": [
                    {"name": task, "heartbeat_age_seconds": round(now - beat, 3)}
                    for task, beat in self._heartbeats.items()
                ],
                "events": [] if self._events is None else self._events.newest_first(),
                "versions": dict(facts.versions),
                "started": rfc3339(self._started),
                "uptime_seconds": round(now - self._started_monotonic, 3),
            }

    def copy_seconds(self) -> float | None:
        """From the start of the first table's copy to the end of the last one's, or until now; None
        if none was copied."""
        with self._lock:
            times = [both for table in self._tables.values() if (both := table.copy_times())]
        if not times:
            return None
        return round(max(end for _, end in times) - min(start for start, _ in times), 3)

    # -- under the lock

    def _assess(self) -> tuple[Summary, list[Notice]]:
        facts = self._facts
        dead = [check for check in self._liveness() if not check.ok]
        reason = "; ".join(
            f"{check.name}: {check.message}" if check.name in self._heartbeats
            else check.message or check.name
            for check in dead
        )  # fmt: skip
        return assess(
            Facts(
                state=facts.state,
                state_since=facts.state_since,
                message=facts.message,
                not_alive=reason or None,
                source=facts.source,
                sink=facts.sink,
                slot=facts.slot,
                tables={name: table.facts for name, table in self._tables.items()},
                dead_letters=self._dead_letters(),
                dead_letter_limit=facts.dead_letter_limit,
                lag_seconds=self._lag_seconds(),
                verified=self._verified,
                rebuilt=self._rebuilt,
                rebuilds=self._rebuilds,
                slowed=list(self._slowed.values()),
                now=time.time(),
            )
        )

    def _lag_seconds(self) -> float | None:
        """The lag, and as long as nothing is known of it besides."""
        lag, beat = self._facts.lag_seconds, self._heartbeats.get(_CLOCK)
        silent = 0.0 if beat is None else self._monotonic() - beat
        return lag if lag is None or silent < _CLOCK_SILENT_SECONDS else lag + silent

    def _dead_letters(self) -> int:
        return sum(table.facts.dead_letters for table in self._tables.values())

    def _liveness(self) -> list[Check]:
        error = self._facts.supervisor_error
        checks = [Check("supervisor", error is None, error)]
        checks.append(Check("progress", self._facts.stuck is None, self._facts.stuck))
        now = self._monotonic()
        for task, beat in self._heartbeats.items():
            stuck = now - beat > HEARTBEAT_LIMIT_SECONDS
            message = f"last turn {now - beat:.0f} s ago" if stuck else None
            checks.append(Check(task, not stuck, message))
        return checks

    def _readiness(self) -> list[Check]:
        facts = self._facts
        if facts.state == "standby":
            return [Check("state", True, "standby")]
        return [
            Check("state", facts.state in _WORKING, facts.message or facts.state),
            _end_check("source", facts.source),
            _end_check("sink", facts.sink),
            self._tables_check(),
        ]

    def _tables_check(self) -> Check:
        stopped = [name for name, table in self._tables.items() if table.state == "stopped"]
        if not stopped:
            return Check("tables", True)
        return Check("tables", False, f"stopped, see /status: {', '.join(sorted(stopped))}")

    def _count_tables(self) -> None:
        if self._metrics is None:
            return
        counts: Mapping[str, int] = Counter(table.state for table in self._tables.values())
        for phase in get_args(TablePhase):
            self._metrics.tables[phase].set(counts.get(phase, 0))
        waiting = sum(table.facts.waiting is not None for table in self._tables.values())
        self._metrics.tables_waiting.set(waiting)


def _end_check(name: str, end: _End) -> Check:
    if end.up:
        return Check(name, True)
    reason = "not tried yet" if end.up is None else "not reachable"
    return Check(name, False, end.error or reason)


def _lsn(position: int | None) -> str | None:
    return None if position is None else str(Lsn(position))
