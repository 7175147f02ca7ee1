"""What a person should know first: how the pipeline is, in a sentence, and what needs attention.

Pure: from the facts on the board to words. The status page and ``cdc-sync status`` show the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal, Protocol

from cdc_sync.ops.logging import rfc3339

Severity = Literal["ok", "busy", "warning", "critical"]
Risk = Literal["unknown", "unlimited", "low", "raised", "high", "lost"]

#: Behind by more than this is worth a word.
LAG_SECONDS: Final = 60.0
#: Behind by less than this counts as in step.
IN_STEP_SECONDS: Final = 5.0
#: Shares of what the server lets the slot keep.
RAISED_SHARE: Final = 0.5
HIGH_SHARE: Final = 0.8
#: A side that is away for longer needs somebody.
AWAY_SECONDS: Final = 60.0
#: So long a rebuild may rest before somebody is told that its slot keeps WAL.
UNUSED_SECONDS: Final = 600.0


class EndFacts(Protocol):
    """Whether Postgres or Qdrant answers; ``since`` in Unix seconds."""

    @property
    def up(self) -> bool | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def since(self) -> float | None: ...


class TableFacts(Protocol):
    """What is looked at of a table."""

    @property
    def state(self) -> str: ...
    @property
    def rows_copied(self) -> int: ...
    @property
    def rows_estimated(self) -> int | None: ...
    @property
    def waiting(self) -> str | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def remedy(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class SlotFacts:
    """The replication slot, as Postgres showed it last. ``safe_bytes``: WAL until the server may
    take it away, None without a limit; ``seen`` in Unix seconds."""

    active: bool
    wal_status: str | None
    retained_bytes: int | None
    safe_bytes: int | None
    seen: float

    @property
    def limit_bytes(self) -> int | None:
        """What the server lets the slot keep, about; None without a limit."""
        if self.safe_bytes is None or self.retained_bytes is None:
            return None
        return self.retained_bytes + max(0, self.safe_bytes)

    @property
    def risk(self) -> Risk:
        """How near the slot is to being taken away."""
        if self.wal_status == "lost":
            return "lost"
        if self.retained_bytes is None:
            return "unknown"
        if self.wal_status == "unreserved":
            return "high"
        limit = self.limit_bytes
        if limit is None:
            return "unlimited"
        share = self.retained_bytes / limit if limit else 1.0
        return "high" if share >= HIGH_SHARE else "raised" if share >= RAISED_SHARE else "low"

    def to_json(self) -> dict[str, object]:
        """As ``/status`` shows it."""
        return {
            "active": self.active,
            "wal_status": self.wal_status,
            "retained_bytes": self.retained_bytes,
            "limit_bytes": self.limit_bytes,
            "risk": self.risk,
            "seen": rfc3339(self.seen),
        }


@dataclass(frozen=True, slots=True)
class Verified:
    """What the verification of a table has found; ``finished``: Unix time of its last complete
    pass, None before the first."""

    missing: int
    extra: int
    different: int
    finished: float | None

    @property
    def mismatches(self) -> int:
        """Rows and points that do not agree."""
        return self.missing + self.extra + self.different


def verification_json(verified: Mapping[str, Verified]) -> dict[str, object] | None:
    """As ``/status`` shows it; None where nothing is verified. All tables together are as old as
    the one whose pass ended first."""
    if not verified:
        return None
    times = [found.finished for found in verified.values()]
    known = [moment for moment in times if moment is not None]
    tables = [
        {
            "name": name,
            "missing": found.missing,
            "extra": found.extra,
            "different": found.different,
            "finished": None if found.finished is None else rfc3339(found.finished),
        }
        for name, found in verified.items()
    ]
    return {
        "finished": rfc3339(min(known)) if len(known) == len(times) else None,
        "ok": not any(found.mismatches for found in verified.values()),
        "tables": tables,
    }


@dataclass(frozen=True, slots=True)
class RebuildSlot:
    """The slot of a rebuild, as Postgres showed it last. ``table``: None where it is none of the
    pipeline's; ``in_use``: somebody reads it, or copies under it; ``retained_bytes``: WAL that it
    keeps, None if it is lost; ``unused_since`` in Unix seconds, as far as was seen."""

    slot: str
    table: str | None
    in_use: bool
    retained_bytes: int | None
    unused_since: float | None = None

    def is_left(self, now: float) -> bool:
        """Whether nobody has read it for so long that somebody should know, and WAL is kept."""
        if self.unused_since is None or self.retained_bytes is None:
            return False
        return now - self.unused_since >= UNUSED_SECONDS

    def to_json(self) -> dict[str, object]:
        """As ``/status`` shows it."""
        since = None if self.unused_since is None else rfc3339(self.unused_since)
        return {**asdict(self), "unused_since": since}


def rebuild_remedy(slot: RebuildSlot) -> str:
    """What to do about a rebuild that nobody is at work on."""
    if slot.table is None:
        return f"If nobody goes on with it: SELECT pg_drop_replication_slot('{slot.slot}');"
    return (
        "Go on with it by the same cdc-sync rebuild, or remove it: cdc-sync rebuild --table "
        f"{slot.table} --abort"
    )


@dataclass(frozen=True, slots=True)
class Facts:
    """What is judged. ``not_alive``: why ``/livez`` fails, if it does; ``rebuilt``: collections, by
    table, that the configuration does not name; ``rebuilds``: slots of rebuilds; ``slowed``:
    collections that are sent less at once, with ``points`` and ``cause``; ``now`` in Unix
    seconds."""

    state: str
    state_since: float
    message: str | None
    not_alive: str | None
    source: EndFacts
    sink: EndFacts
    slot: SlotFacts | None
    tables: Mapping[str, TableFacts]
    dead_letters: int
    dead_letter_limit: int | None
    lag_seconds: float | None
    verified: Mapping[str, Verified]
    rebuilt: Mapping[str, str]
    rebuilds: Sequence[RebuildSlot]
    slowed: Sequence[Mapping[str, object]]
    now: float


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that needs attention, or will. ``since`` in Unix seconds, None: not known."""

    severity: Severity
    title: str
    text: str
    remedy: str | None = None
    since: float | None = None

    def to_json(self) -> dict[str, object]:
        """As ``/status`` shows it."""
        since = None if self.since is None else rfc3339(self.since)
        return {**asdict(self), "since": since}


@dataclass(frozen=True, slots=True)
class Summary:
    """How the pipeline is: a few words, and a sentence. ``progress``: of a copy, from 0 to 1; None
    where there is none, or it is not known."""

    severity: Severity
    title: str
    text: str
    progress: float | None = None

    def to_json(self) -> dict[str, object]:
        """As ``/status`` shows it."""
        return asdict(self)


def assess(facts: Facts) -> tuple[Summary, list[Notice]]:
    """Judge; the notices come worst first."""
    notices = [
        *_failures(facts),
        *_away(facts),
        *_slot_notices(facts.slot),
        *_table_notices(facts.tables),
        *_dead_letter_notices(facts),
        *_verification_notices(facts.verified),
        *_rebuilt_notices(facts.rebuilt),
        *_rebuild_notices(facts),
        *_lag_notices(facts),
        *_slowed_notices(facts.slowed),
    ]
    notices.sort(key=lambda notice: _ORDER.index(notice.severity))
    if notices and notices[0].severity != "busy":
        first = notices[0]
        progress = _progress(facts.tables) if facts.state == "snapshotting" else None
        return Summary(first.severity, first.title, first.text, progress), notices
    return _undisturbed(facts), notices


_ORDER: Final[Sequence[Severity]] = ("critical", "warning", "busy", "ok")


def _undisturbed(facts: Facts) -> Summary:
    if facts.state == "streaming":
        if again := [t for t in facts.tables.values() if t.state in _UNFINISHED or t.waiting]:
            return _reading_again(again, facts.tables)
        if facts.lag_seconds is None:
            return Summary("busy", "Streaming", "How far Qdrant is behind is not known yet.")
        if facts.lag_seconds >= IN_STEP_SECONDS:
            behind = f"Qdrant is {facts.lag_seconds:.0f} s behind Postgres."
            return Summary("busy", "Catching up", behind)
        return Summary("ok", "In step", "Every committed change is in Qdrant.")
    if facts.state == "snapshotting":
        return Summary("busy", "Copying", _copy_text(facts.tables), _progress(facts.tables))
    return _QUIET.get(facts.state, Summary("busy", facts.state, ""))


_QUIET: Final[Mapping[str, Summary]] = {
    "starting": Summary("busy", "Starting", "Connecting to Postgres and Qdrant, and planning."),
    "standby": Summary(
        "ok", "Standing by", "Another process has the slot; this one takes over when it ends."
    ),
    "catching_up": Summary("busy", "Catching up", "Applying what was written meanwhile."),
    "draining": Summary("busy", "Stopping", "Finishing the batch in flight."),
}


def _copy_text(tables: Mapping[str, TableFacts]) -> str:
    waiting = next((table.waiting for table in tables.values() if table.waiting), None)
    if waiting:
        return f"Waiting: {waiting}."
    unfinished = sum(table.state in _UNFINISHED for table in tables.values())
    done = sum(_rows(table)[0] for table in tables.values())
    which = "1 table is" if unfinished == 1 else f"{unfinished} tables are"
    return f"{done:,} rows so far; {which} not complete. Changes are applied in between."


def _reading_again(again: Sequence[TableFacts], tables: Mapping[str, TableFacts]) -> Summary:
    which = "1 table is" if len(again) == 1 else f"{len(again)} tables are"
    text = f"{which} read again; until that is done, points may differ from their rows."
    waiting = next((table.waiting for table in again if table.waiting), None)
    if waiting:
        text += f" Waiting: {waiting}."
    copies = any(table.state in _UNFINISHED for table in again)
    return Summary("busy", "Reading again", text, _progress(tables) if copies else None)


_UNFINISHED: Final = frozenset({"pending", "copying"})


def _rows(table: TableFacts) -> tuple[int, int | None]:
    """Rows copied and expected; a table that was copied before counts for nothing."""
    if table.state in _UNFINISHED:
        return table.rows_copied, table.rows_estimated
    return table.rows_copied, table.rows_copied


def _progress(tables: Mapping[str, TableFacts]) -> float | None:
    """By rows; an estimate that turned out too low does not let it pass 0.99."""
    rows = [_rows(table) for table in tables.values()]
    if any(expected is None for _, expected in rows):
        return None
    done = sum(done for done, _ in rows)
    expected = sum(expected or 0 for _, expected in rows)
    if any(table.state in _UNFINISHED for table in tables.values()):
        return min(done / expected, 0.99) if expected else 0.0
    return 1.0


def _failures(facts: Facts) -> list[Notice]:
    found = []
    if facts.state == "failed":
        text = facts.message or "The last events say why."
        found.append(Notice("critical", "Failed", text, since=facts.state_since))
    if facts.not_alive is not None:
        remedy = "Restart the process; nothing is lost. The log has where every task stood."
        found.append(Notice("critical", "Stuck", facts.not_alive, remedy))
    return found


def _away(facts: Facts) -> list[Notice]:
    sides = (
        ("Postgres", facts.source, "Nothing is lost: the slot keeps the changes meanwhile."),
        ("Qdrant", facts.sink, "Nothing is lost: Postgres keeps the changes meanwhile."),
    )
    found = []
    for name, end, comfort in sides:
        if end.up is not False:
            continue
        long = end.since is not None and facts.now - end.since > AWAY_SECONDS
        text = f"{_sentence(end.error or 'It is not reachable')} {comfort}"
        severity: Severity = "critical" if long else "warning"
        found.append(Notice(severity, f"{name} does not answer", text, since=end.since))
    return found


def _slot_notices(slot: SlotFacts | None) -> list[Notice]:
    risk = None if slot is None else slot.risk
    if risk == "lost":
        return [
            Notice(
                "critical",
                "The slot is lost",
                "Postgres has removed WAL that was still needed; the tables are copied again "
                "unless source.on_slot_lost is stop.",
                "Raise max_slot_wal_keep_size before the next outage.",
            )
        ]
    if risk == "high":
        return [
            Notice(
                "critical",
                "The slot is about to be lost",
                "It keeps nearly as much WAL as the server lets it.",
                "Raise max_slot_wal_keep_size and reload Postgres, or clear what holds the "
                "pipeline up.",
            )
        ]
    if risk == "raised":
        return [
            Notice(
                "warning",
                "The slot keeps much WAL",
                "More than half of what the server lets it (max_slot_wal_keep_size).",
            )
        ]
    return []


def _table_notices(tables: Mapping[str, TableFacts]) -> list[Notice]:
    return [
        Notice(
            "critical",
            f"{name} has stopped",
            f"{_sentence(table.error or 'See the log')} The other tables go on.",
            table.remedy,
        )
        for name, table in tables.items()
        if table.state in ("stopped", "failed")
    ]


def _dead_letter_notices(facts: Facts) -> list[Notice]:
    if not facts.dead_letters:
        return []
    limit = facts.dead_letter_limit
    near = limit is not None and facts.dead_letters >= HIGH_SHARE * limit
    rows = "1 row" if facts.dead_letters == 1 else f"{facts.dead_letters:,} rows"
    text = f"{rows} could not be written; the others go on."
    if near:
        text += f" The pipeline stops beyond {limit:,}."
    return [
        Notice("critical" if near else "warning", "Dead letters", text, "cdc-sync dlq list"),
    ]


def _verification_notices(verified: Mapping[str, Verified]) -> list[Notice]:
    return [
        Notice(
            "warning",
            f"{name} and its collection differ",
            f"{found.missing:,} {'point' if found.missing == 1 else 'points'} missing, "
            f"{found.extra:,} without a row, {found.different:,} different.",
            "cdc-sync verify --repair" if found.finished else None,
        )
        for name, found in verified.items()
        if found.mismatches
    ]


def _rebuilt_notices(rebuilt: Mapping[str, str]) -> list[Notice]:
    return [
        Notice(
            "warning",
            f"The configuration of {name} is out of date",
            f"The table was rebuilt and is kept in collection {collection}, which the "
            "configuration does not name.",
            "Replace the configuration file by the one that was given to cdc-sync rebuild --to.",
        )
        for name, collection in rebuilt.items()
    ]


def _rebuild_notices(facts: Facts) -> list[Notice]:
    return [
        Notice(
            "warning",
            f"A rebuild of {slot.table or 'a table'} is half done",
            f"Nobody reads its slot {slot.slot}, and Postgres keeps "
            f"{(slot.retained_bytes or 0) / 1e6:,.0f} MB of WAL for it.",
            rebuild_remedy(slot),
            slot.unused_since,
        )
        for slot in facts.rebuilds
        if slot.is_left(facts.now)
    ]


def _lag_notices(facts: Facts) -> list[Notice]:
    lag = facts.lag_seconds
    both_up = facts.source.up and facts.sink.up
    if facts.state != "streaming" or not both_up or lag is None or lag < LAG_SECONDS:
        return []
    text = f"Qdrant is {lag:.0f} s behind Postgres, though both answer."
    remedy = "See which stage of cdc_sync_lag_bytes is the largest."
    return [Notice("warning", "Behind", text, remedy)]


def _slowed_notices(slowed: Sequence[Mapping[str, object]]) -> list[Notice]:
    """No trouble as long as nothing is behind."""
    return [
        Notice(
            "busy",
            f"Sending less to {one['collection']}",
            f"At most {one['points']} points at once; the cause is {one['cause']} "
            "(cdc_sync_sink_slowdowns_total).",
        )
        for one in slowed
    ]


def _sentence(text: str) -> str:
    text = text.strip()
    word = text.partition(" ")[0]
    if word.isalpha() and word.islower():  # else a name, which is written as it is
        text = f"{text[0].upper()}{text[1:]}"
    return text if text.endswith((".", "!", "?")) else f"{text}."
