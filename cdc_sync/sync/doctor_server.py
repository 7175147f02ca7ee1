"""What ``check`` says of the Postgres server, its settings and the way to it. Pure: from the facts
to findings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.errors import ErrorKind
from cdc_sync.ops.attention import RebuildSlot, rebuild_remedy
from cdc_sync.postgres.catalog import ServerInfo
from cdc_sync.postgres.estimates import WalFacts
from cdc_sync.postgres.identifiers import quote_ident
from cdc_sync.postgres.server_facts import (
    Between,
    OpenTransaction,
    RoleFacts,
    ServerSettings,
    Standbys,
)
from cdc_sync.postgres.slot import SlotInfo
from cdc_sync.sync.findings import Finding
from cdc_sync.sync.known_findings import finding
from cdc_sync.sync.progress import size_text

#: The newest major version that the tests run on.
_NEWEST: Final = 18
#: First minor version, by major, without two faults of logical decoding: changes lost around DDL
#: that takes no strong lock (ALTER PUBLICATION, ALTER TYPE; fixed by PostgreSQL commit 4909b38af0
#: of April 2025), and memory that the first fix let grow without bound (June 2025).
_SOUND_MINORS: Final = {14: 19, 15: 14, 16: 10, 17: 6}
_PARTITIONS_SINCE: Final = 15
_FAILOVER_SINCE: Final = 17

#: Below it a short stall of network or Qdrant may cost the connection; above it a slot stays taken
#: long after the host that had it vanished.
_SHORTEST_SENDER_SECONDS: Final = 10.0
_LONGEST_SENDER_SECONDS: Final = 600.0
#: What a slot should be let keep: so long a standstill, at the rate WAL is written now.
_STANDSTILL_SECONDS: Final = 3600.0
_MEASURED_SECONDS: Final = 600.0
_GIGABYTE: Final = 1 << 30
#: A write transaction open for longer is worth a word before a slot is made; and while one exists.
_OLD_SECONDS: Final = 10.0
_VERY_OLD_SECONDS: Final = 3600.0
_SHOWN: Final = 5
#: Connections of the pipeline beside those of its workers and the WAL sender, about.
_OTHER_CONNECTIONS: Final = 4
_CLOCK_ADVICE_SECONDS: Final = 1.0
_CLOCK_WARNING_SECONDS: Final = 30.0


def version_findings(server: ServerInfo) -> Iterator[Finding]:
    """Whether the server's version is one that is tested and sound."""
    major, minor = server.major, server.version_num % 10000
    text = f"Postgres {major}.{minor}"
    if major > _NEWEST:
        yield finding(
            "postgres-version",
            "advice",
            "server",
            f"{text} is newer than what this version of cdc-sync is tested with (14 to {_NEWEST})",
            "Look for a newer cdc-sync; try this one on a copy of your data first.",
        )
        return
    sound = _SOUND_MINORS.get(major, 0)
    if minor < sound:
        yield finding(
            "postgres-version",
            "warning",
            "server",
            f"{text} has a known fault of logical replication: changes can be lost around ALTER "
            "PUBLICATION and ALTER TYPE, or decoding can run out of memory",
            f"Update to {major}.{sound} or later (a minor update: new binaries and a restart).",
        )
    elif major < _PARTITIONS_SINCE:
        yield finding(
            "postgres-version",
            "advice",
            "server",
            f"{text} works, but partitioned tables, row filters and column lists need 15",
            "Plan an upgrade; the community ended its support of 14 in November 2026.",
        )
    else:
        yield finding("postgres-version", "ok", "server", text)


def slot_findings(settings: Settings, server: ServerInfo, slot: SlotInfo | None) -> Finding:
    """How the replication slot stands."""
    name = settings.source.slot
    if slot is None:
        return finding("slot", "ok", "slot", f"{name} will be created by run")
    drop = f"SELECT pg_drop_replication_slot('{name}');"
    if slot.plugin != "pgoutput" or slot.database != server.database:
        return finding(
            "slot",
            "error",
            "slot",
            f"{name} exists for plugin {slot.plugin} and database {slot.database}, not for "
            f"pgoutput and {server.database}",
            f"Set source.slot to another name, or, if nobody uses it:\n{drop}",
            ErrorKind.CONFIG,
        )
    if slot.two_phase:
        return finding(
            "slot",
            "error",
            "slot",
            f"{name} decodes prepared transactions (two_phase), which is not supported",
            f"Set source.slot to another name, or, if nobody uses it:\n{drop}",
            ErrorKind.CONFIG,
        )
    if slot.lost:
        heals = settings.source.on_slot_lost == "recreate"
        return finding(
            "slot",
            "warning",
            "slot",
            f"{name} is lost ({slot.invalidation_reason or slot.wal_status}): changes since its "
            "last position can no longer be read",
            "run makes a new one and reads every table again."
            if heals
            else "Copy anew with --migration.restart, or set source.on_slot_lost = recreate.",
        )
    if slot.wal_status == "unreserved":
        return finding(
            "slot",
            "warning",
            "slot",
            f"{name} is about to be lost: it keeps more WAL than max_slot_wal_keep_size",
            "Start run at once, and raise the limit:\n"
            "ALTER SYSTEM SET max_slot_wal_keep_size = -1;\nSELECT pg_reload_conf();",
        )
    state = f"in use by process {slot.active_pid}" if slot.active else "not in use"
    return finding("slot", "ok", "slot", f"{name} exists, {state}")


def rebuild_slot_findings(slots: Sequence[RebuildSlot]) -> Iterator[Finding]:
    """What there is to say of slots of rebuilds: that nobody reads them."""
    for slot in slots:
        if slot.in_use:
            continue
        kept = "is lost"
        if slot.retained_bytes is not None:
            kept = f"keeps {size_text(slot.retained_bytes)} of WAL"
        of = f" of {slot.table}" if slot.table else ""
        text = f"{slot.slot}, the slot of a rebuild{of}, is read by nobody, and {kept}"
        yield finding("rebuild-slot", "warning", slot.slot, text, rebuild_remedy(slot))


def wal_limit_findings(settings: ServerSettings, wal: WalFacts) -> Iterator[Finding]:
    """What Postgres lets the slot keep."""
    subject, limit = "max_slot_wal_keep_size", settings.max_slot_wal_keep_bytes
    rate = wal.bytes_per_second if (wal.measured_seconds or 0) >= _MEASURED_SECONDS else None
    if limit is None:
        size = max(10 * _GIGABYTE, round((rate or 0) * 24 * 3600))
        yield finding(
            "slot-wal-limit",
            "warning",
            subject,
            f"{subject} is not set: while cdc-sync is away the server keeps all WAL for its slot, "
            "until its disk is full and it stops. With a limit the slot is lost instead, and "
            "cdc-sync reads the tables again",
            "A size that the disk has room for and that outlasts your longest standstill, such "
            f"as:\nALTER SYSTEM SET max_slot_wal_keep_size = '{-(-size // _GIGABYTE)}GB';\n"
            "SELECT pg_reload_conf();",
        )
        return
    needed = max(rate * _STANDSTILL_SECONDS if rate else 0.0, settings.max_wal_bytes or 0)
    if limit < needed:
        lasts = f" than {limit / rate / 60:.0f} minutes (at the average rate)" if rate else ""
        yield finding(
            "slot-wal-limit",
            "warning",
            subject,
            f"{subject} is {size_text(limit)}: a longer standstill{lasts} costs the slot, and "
            "every table is read again",
            "ALTER SYSTEM SET max_slot_wal_keep_size = "
            f"'{max(1, -(-round(4 * needed) // _GIGABYTE))}GB';\nSELECT pg_reload_conf();",
        )
        return
    yield finding("slot-wal-limit", "ok", subject, f"{subject} is {size_text(limit)}")


def timeout_findings(settings: ServerSettings, role: RoleFacts, lost: bool) -> Iterator[Finding]:
    """Timeouts of the server and of the role. ``lost``: our own settings do not hold."""
    idle = settings.idle_slot_timeout_seconds
    if idle:
        yield finding(
            "slot-idle-timeout",
            "warning",
            "idle_replication_slot_timeout",
            f"idle_replication_slot_timeout is {idle:.0f} s: a slot that nobody reads for so long "
            "is lost",
            "ALTER SYSTEM SET idle_replication_slot_timeout = 0;\nSELECT pg_reload_conf();",
        )
    yield from _sender_timeout(settings.wal_sender_timeout_seconds, role)
    if role.timeouts and not lost:
        names = ", ".join(f"{name} = {value}" for name, value in role.timeouts.items())
        yield finding(
            "role-timeouts",
            "advice",
            f"role {role.name}",
            f"sessions of {role.name} begin with {names}; cdc-sync sets its own to 0, so this "
            "matters only behind a pooler that drops session settings",
            "\n".join(f"ALTER ROLE {quote_ident(role.name)} SET {n} = 0;" for n in role.timeouts),
        )


def _sender_timeout(seconds: float | None, role: RoleFacts) -> Iterator[Finding]:
    subject, name = "wal_sender_timeout", quote_ident(role.name)
    remedy = f"ALTER ROLE {name} SET wal_sender_timeout = '60s';"
    if seconds == 0:
        yield finding(
            "wal-sender-timeout",
            "advice",
            subject,
            f"{subject} is 0: when this host vanishes without a word, the server keeps the slot "
            "taken until TCP gives up, and no other cdc-sync can take it over",
            remedy,
        )
    elif seconds is not None and seconds < _SHORTEST_SENDER_SECONDS:
        yield finding(
            "wal-sender-timeout",
            "warning",
            subject,
            f"{subject} is {seconds:g} s: a short stall ends the stream, which then begins again",
            remedy,
        )
    elif seconds is not None and seconds > _LONGEST_SENDER_SECONDS:
        yield finding(
            "wal-sender-timeout",
            "advice",
            subject,
            f"{subject} is {seconds:g} s: when this host vanishes, the slot stays taken for so "
            "long",
            remedy,
        )


def room_findings(wal: WalFacts, role: RoleFacts, workers: int) -> Iterator[Finding]:
    """Room for slots, WAL senders and connections."""
    yield finding(
        "replication-room",
        "ok",
        "server",
        f"room for {wal.free_slots} more slots and {wal.free_senders} more WAL senders",
    )
    needed = workers + _OTHER_CONNECTIONS
    limits = [(role.free_of_server, "max_connections")]
    if role.free_of_role is not None:
        limits.append((role.free_of_role, f"the connection limit of role {role.name}"))
    free, limit = min(limits)
    if free < needed:
        raise_it = (
            f"ALTER ROLE {quote_ident(role.name)} CONNECTION LIMIT {needed + 4};"
            if free == role.free_of_role
            else "ALTER SYSTEM SET max_connections = …; and restart Postgres."
        )
        yield finding(
            "connection-room",
            "warning",
            "server",
            f"{limit} leaves {max(0, free)} connections, the copy with {workers} workers takes up "
            f"to {needed}",
            f"Ask for fewer workers (migration.num_workers), or:\n{raise_it}",
        )


def between_findings(
    found: Between, role: RoleFacts, settings: ServerSettings
) -> Iterator[Finding]:
    """Whether something stands between this program and Postgres."""
    if found.changing_pid:
        yield finding(
            "pooler",
            "error",
            "server",
            f"behind {found.host}:{found.port} is a pooler that gives each statement another "
            "session; snapshots and replication need one that stays",
            _direct(found, settings),
            ErrorKind.CONFIG,
        )
    elif found.strange_pid or _named_pooler(found) is not None:
        yield finding(
            "pooler",
            "warning",
            "server",
            f"behind {found.host}:{found.port} is not Postgres itself, but a proxy or pooler: it "
            "may cut long transactions, and hides which process is whose",
            _direct(found, settings),
        )
    if found.lost:
        names = ", ".join(found.lost)
        # Those that end a copy; the others change texts only.
        statements = [
            f"ALTER ROLE {quote_ident(role.name)} SET {name} = 0;"
            for name in found.lost
            if name.endswith("timeout")
        ]
        yield finding(
            "session-settings",
            "warning",
            "server",
            f"settings that were asked for at the start of the session do not hold ({names}): a "
            "pooler drops them",
            "Connect to Postgres itself"
            + (", or give them to the role:\n" + "\n".join(statements) if statements else "."),
        )


def _named_pooler(found: Between) -> str | None:
    """What to do instead, where the address itself names a pooler of a hosted Postgres."""
    if found.host.endswith(".pooler.supabase.com"):
        return "Use the direct connection, db.<project>.supabase.co, port 5432."
    if found.host.endswith(".neon.tech") and found.host.split(".")[0].endswith("-pooler"):
        return "Use the address without -pooler in its first part."
    return None


def _direct(found: Between, settings: ServerSettings) -> str:
    if (named := _named_pooler(found)) is not None:
        return named
    port = settings.port
    if port is not None and port != str(found.port):
        return f"Connect to Postgres itself, which listens on port {port} of its host."
    return "Connect to the host and port where Postgres itself listens (mostly 5432)."


def transaction_findings(
    transactions: Sequence[OpenTransaction], slot_exists: bool, lasting: frozenset[str]
) -> Iterator[Finding]:
    """Open transactions that hold up the slot. ``lasting``: keys of those whose age does not show,
    and that were open when looked at twice."""
    limit = _VERY_OLD_SECONDS if slot_exists else _OLD_SECONDS
    old = [
        one
        for one in transactions
        if one.prepared or (one.seconds >= limit if one.seconds is not None else one.key in lasting)
    ]
    hidden = [one for one in old if one.seconds is None]
    if not old:
        return
    listed = "\n".join(f"{one.holder}{_age(one)}" for one in old[:_SHOWN])
    more = f"\nand {len(old) - _SHOWN} more" if len(old) > _SHOWN else ""
    effect = (
        "WAL from the oldest one's start is kept until it ends"
        if slot_exists
        else "the creation of the slot waits until they end"
    )
    remedy = (
        "End them: COMMIT or ROLLBACK where they are, pg_terminate_backend(process), or COMMIT "
        "PREPARED / ROLLBACK PREPARED for prepared ones."
    )
    if hidden:
        remedy += " GRANT pg_monitor to the role to see whose they are."
    shown_old = len(old) > len(hidden)
    yield finding(
        "open-transactions",
        "warning" if shown_old else "advice",
        "open transactions",
        f"{effect}:\n{listed}{more}",
        remedy,
    )


def _age(one: OpenTransaction) -> str:
    return "" if one.seconds is None else f", open for {one.seconds:.0f} s"


def standby_findings(
    settings: Settings, server: ServerInfo, slot: SlotInfo | None, found: Standbys
) -> Iterator[Finding]:
    """What a failover would do to the slot."""
    if not found.count:
        return
    many = f"{found.count} standby{'s' if found.count > 1 else ''}"
    if server.major < _FAILOVER_SINCE:
        yield finding(
            "failover",
            "advice",
            "failover",
            f"the server has {many}, and before Postgres 17 a promoted one has no slot: cdc-sync "
            "then makes a new one and reads every table again",
            "Nothing to set here; Postgres 17 can hand slots over.",
        )
        return
    if not settings.source.failover:
        yield finding(
            "failover",
            "advice",
            "failover",
            f"the server has {many}, and source.failover is off: after a failover every table is "
            "read again",
            "Set source.failover = true.",
        )
        return
    if slot is not None and not slot.failover:
        yield finding(
            "failover",
            "warning",
            "failover",
            f"slot {slot.name} was made without failover: after a failover it is gone",
            "On a replication connection (psql 'replication=database …'), while run is stopped:\n"
            f"ALTER_REPLICATION_SLOT {quote_ident(slot.name)} (FAILOVER true);",
        )


def standby_settings_findings(
    settings: Settings, server: ServerInfo, shown: ServerSettings, found: Standbys
) -> Iterator[Finding]:
    """What standbys need to take the slot over (Postgres 17 and later)."""
    if not found.count or server.major < _FAILOVER_SINCE or not settings.source.failover:
        return
    problems, remedies = [], []
    if not (shown.synchronized_standby_slots or "").strip():
        slots = ",".join(found.slots) or "name_of_its_slot"
        problems.append(
            "synchronized_standby_slots is empty: cdc-sync can be ahead of a standby that is "
            "promoted, and must then read every table again"
        )
        remedies.append(
            f"ALTER SYSTEM SET synchronized_standby_slots = '{slots}';\nSELECT pg_reload_conf();"
        )
    if found.without_feedback:
        problems.append(
            f"the standbys of slots {', '.join(found.without_feedback)} give no feedback, and "
            "cannot keep a copy of our slot"
        )
    if problems:
        remedies.append(
            "On each standby: sync_replication_slots = on, hot_standby_feedback = on, "
            "primary_slot_name set, and a dbname in primary_conninfo."
        )
        yield finding("failover", "advice", "failover", "; ".join(problems), "\n".join(remedies))


def standby_snapshot_findings(role: RoleFacts) -> Iterator[Finding]:
    """Whether the role may have the server write what lets a slot move on."""
    if role.may_log_standby_snapshot is False:
        yield finding(
            "standby-snapshot",
            "advice",
            f"role {role.name}",
            f"role {role.name} may not run pg_log_standby_snapshot(), which lets the server drop "
            "kept WAL right after each window of a copy instead of some seconds later",
            "GRANT EXECUTE ON FUNCTION pg_catalog.pg_log_standby_snapshot() TO "
            f"{quote_ident(role.name)};",
        )


def clock_finding(offset: float, error: float) -> Finding:
    """Whether both clocks agree; the lag in seconds is their difference."""
    ahead = "ahead of" if offset > 0 else "behind"
    certain = max(0.0, abs(offset) - error)
    if certain < _CLOCK_ADVICE_SECONDS:
        return finding("clock", "ok", "clock", "that of the server and this host's agree")
    return finding(
        "clock",
        "warning" if certain >= _CLOCK_WARNING_SECONDS else "advice",
        "clock",
        f"the server's clock is {abs(offset):.1f} s {ahead} this host's: the lag in seconds, and "
        "alerts on it, are wrong by so much",
        "Let both hosts keep time by NTP (chrony, systemd-timesyncd).",
    )
