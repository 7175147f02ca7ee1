"""The part of ``check`` that looks at Postgres: server, role, way, publication, slot, tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ErrorKind, SourceError
from cdc_sync.postgres.catalog import ServerInfo, server_info
from cdc_sync.postgres.connect import PgConnection, answering, connect
from cdc_sync.postgres.estimates import estimate_rows, leaf_bytes, wal_facts
from cdc_sync.postgres.preflight import (
    OLDEST_VERSION,
    check_identity,
    check_may_publish,
    check_partitions,
    check_readable,
    check_role,
    check_room,
    check_server,
)
from cdc_sync.postgres.publication import publication_warnings
from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.postgres.server_facts import (
    OpenTransaction,
    RoleFacts,
    ServerSettings,
    between,
    bounded,
    clock_offset,
    is_timeout,
    open_transactions,
    role_facts,
    server_settings,
    standbys,
)
from cdc_sync.postgres.slot import SlotInfo, read_slot
from cdc_sync.postgres.toast_facts import toast_facts
from cdc_sync.sync import doctor_server as doctor
from cdc_sync.sync.doctor_tables import toast_findings
from cdc_sync.sync.executors import available_cpus
from cdc_sync.sync.findings import Finding
from cdc_sync.sync.known_findings import failed, finding
from cdc_sync.sync.planning import PipelinePlan, plan_pipeline
from cdc_sync.sync.rebuild_slots import rebuild_slots
from cdc_sync.sync.routing import PlannedTable

T = TypeVar("T")

#: A connection that is open on our side only is given up; hundreds of tables take their time.
_CHECK_SECONDS: Final = 300.0
#: Between two looks at transactions whose age this role may not see.
_PAUSE_SECONDS: Final = 0.5
#: Planning reads catalogs, and the sizes of tables, which waits for who has one locked.
_PLANNING_SECONDS: Final = 30.0
_PLANNING_LOCK_SECONDS: Final = 3.0
#: Sampling tables ends after so long, however many there are.
_SAMPLING_SECONDS: Final = 3.0


@dataclass(slots=True)
class SourceFacts:
    """What the check of Qdrant wants to know of Postgres: the plan, and of each table by OID its
    rows and bytes, about."""

    plan: PipelinePlan
    rows: dict[int, int] = field(default_factory=dict)
    bytes: dict[int, int] = field(default_factory=dict)


def check_source(settings: Settings, findings: list[Finding]) -> SourceFacts | None:
    """Add what there is to say of Postgres. None when the tables cannot be planned."""
    try:
        with (
            connect(settings.source, standby=True) as connection,
            answering(connection, _CHECK_SECONDS),
        ):
            findings.append(finding("postgres-connection", "ok", "postgres", "connected"))
            return _Examination(settings, connection, findings).run()
    except CdcSyncError as error:
        findings.append(failed("postgres-connection", "postgres", error))
        return None


class _Examination:
    """One look at Postgres over one connection."""

    def __init__(
        self, settings: Settings, connection: PgConnection, findings: list[Finding]
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._findings = findings

    def run(self) -> SourceFacts | None:
        server = server_info(self._connection)
        slot = read_slot(self._connection, self._settings.source.slot)
        shown = server_settings(self._connection)
        self._server(server, shown, slot)
        plan = self._plan()
        if plan is not None:
            self._publication(plan)
        self._findings.append(doctor.slot_findings(self._settings, server, slot))
        if server.version_num >= OLDEST_VERSION and not server.in_recovery:
            self._facts(server, shown, slot)
        if plan is None:
            return None
        if not server.in_recovery:
            self._rebuilds(plan)
        source = SourceFacts(plan)
        deadline = time.monotonic() + _SAMPLING_SECONDS
        for planned in plan.tables:
            self._table(planned, plan, source, deadline)
        return source

    def _passes(self, id_: str, subject: str, check: Callable[[], None]) -> bool:
        """Do a check that raises what is wrong; a lost connection is not its matter."""
        try:
            check()
        except CdcSyncError as error:
            if error.kind is ErrorKind.SOURCE_UNAVAILABLE:
                raise
            self._findings.append(failed(id_, subject, error))
            return False
        return True

    def _look(self, what: str, read: Callable[[PgConnection], T]) -> T | None:
        """Read facts in a bounded time; that they cannot be had is advice."""
        try:
            with bounded(self._connection):
                return read(self._connection)
        except SourceError as error:
            if error.kind is ErrorKind.SOURCE_UNAVAILABLE and not is_timeout(error):
                raise
            self._findings.append(
                finding(
                    "postgres-facts",
                    "advice",
                    what,
                    f"{what}: not looked at, since {error.message}",
                )
            )
            return None

    def _server(self, server: ServerInfo, shown: ServerSettings, slot: SlotInfo | None) -> None:
        """Preconditions of server and role; where they hold, whether replication works."""
        too_old = server.version_num < OLDEST_VERSION
        logical = shown.wal_level == "logical" or server.major >= 19
        id_ = "output-plugin" if logical else "wal-level"
        if server.in_recovery:
            id_ = "postgres-standby"
        if too_old:
            id_ = "postgres-version"
        else:
            self._findings += doctor.version_findings(server)
        connection = self._connection
        usable = self._passes(id_, "postgres", lambda: check_server(connection, server))
        if usable:
            self._findings.append(finding("wal-level", "ok", "wal_level", f"{shown.wal_level}"))
        usable &= self._passes("replication-role", "postgres", lambda: check_role(connection))
        if slot is None:
            usable &= self._passes("replication-room", "postgres", lambda: check_room(connection))
        if usable:
            self._replication(server)

    def _replication(self, server: ServerInfo) -> None:
        """Whether a replication connection leads to the same server."""

        def identify() -> None:
            connection = ReplicationConnection.open(self._settings.source)
            try:
                identity = connection.identify()
            finally:
                connection.close()
            if identity.system_identifier != server.system_identifier:
                raise SourceError(
                    ErrorKind.SOURCE_CHANGED,
                    "a replication connection leads to another cluster than other connections",
                    "Name one host in source.url, that of the primary, and no load balancer.",
                )

        if self._passes("replication-connection", "replication", identify):
            self._findings.append(
                finding("replication-connection", "ok", "replication", "a connection works")
            )

    def _facts(self, server: ServerInfo, shown: ServerSettings, slot: SlotInfo | None) -> None:
        found = self._findings
        first = self._look("open transactions", open_transactions)
        role = self._look("the role", role_facts)
        wal = self._look("WAL", wal_facts)
        # Not bounded like the others, since it looks at the session's timeouts.
        way = between(self._connection)
        if wal is not None:
            found += doctor.wal_limit_findings(shown, wal)
        if role is not None:
            if wal is not None:
                found += doctor.room_findings(wal, role, self._workers())
            found += doctor.between_findings(way, role, shown)
            found += doctor.timeout_findings(shown, role, bool(way.lost))
            found += doctor.standby_snapshot_findings(role)
        self._transactions(first, role, slot)
        others = self._look("standbys", standbys)
        if others is not None:
            found += doctor.standby_findings(self._settings, server, slot, others)
            found += doctor.standby_settings_findings(self._settings, server, shown, others)
        clock = self._look("the clock", clock_offset)
        if clock is not None:
            found.append(doctor.clock_finding(*clock))

    def _rebuilds(self, plan: PipelinePlan) -> None:
        tables = [planned.name for planned in plan.tables]
        slots = self._look(
            "slots of rebuilds", lambda conn: rebuild_slots(conn, self._settings, tables)
        )
        self._findings += doctor.rebuild_slot_findings(slots or ())

    def _transactions(
        self, first: list[OpenTransaction] | None, role: RoleFacts | None, slot: SlotInfo | None
    ) -> None:
        """Of those whose age does not show, only those count that are still open a moment later."""
        if not first:
            return
        lasting: frozenset[str] = frozenset()
        hidden = {one.key for one in first if one.seconds is None}
        if hidden:
            time.sleep(_PAUSE_SECONDS)
            again = self._look("open transactions", open_transactions) or []
            lasting = frozenset(hidden & {one.key for one in again})
        self._findings += doctor.transaction_findings(first, slot is not None, lasting)

    def _workers(self) -> int:
        # An embedded database can be open in one process only.
        if self._settings.qdrant.url.startswith("edge:"):
            return 1
        return self._settings.migration.num_workers or available_cpus()

    def _plan(self) -> PipelinePlan | None:
        try:
            with bounded(self._connection, _PLANNING_SECONDS, _PLANNING_LOCK_SECONDS):
                return plan_pipeline(self._connection, self._settings)
        except CdcSyncError as error:
            if error.kind is ErrorKind.SOURCE_UNAVAILABLE:
                raise
            self._findings.append(failed("tables", "tables", error))
            return None

    def _publication(self, plan: PipelinePlan) -> None:
        name, subject = self._settings.source.publication, "publication"
        if plan.publication is not None:
            self._findings.append(finding("publication", "ok", subject, f"{name} exists"))
            self._findings += [
                finding("publication", "warning", subject, text)
                for text in publication_warnings(plan.publication, plan.published_columns)
            ]
        elif self._passes(
            "publication",
            subject,
            lambda: check_may_publish(
                self._connection,
                self._settings.source,
                plan.published_columns,
                plan.row_filters,
            ),
        ):
            text = f"{name} will be created by run"
            self._findings.append(finding("publication", "ok", subject, text))

    def _table(
        self, planned: PlannedTable, plan: PipelinePlan, source: SourceFacts, deadline: float
    ) -> None:
        name, table, connection = planned.name, planned.table, self._connection
        vectors = ", ".join(v.name or "(unnamed)" for v in planned.plan.vectors) or "none"
        becomes = f"becomes collection {planned.plan.collection}, vectors: {vectors}"
        self._findings.append(finding("table", "ok", name, becomes))
        self._findings += [finding("table", "warning", name, text) for text in planned.warnings]
        self._passes("partitions", name, lambda: check_partitions(table, plan.server))
        self._passes("replica-identity", name, lambda: check_identity(table))
        read = plan.columns_read[table.oid]
        if not self._passes(
            "table-privileges", name, lambda: check_readable(connection, table, read)
        ):
            return
        rows = self._look(name, lambda conn: estimate_rows(conn, table, planned.row_filter))
        if rows is None:
            return
        sizes: Mapping[int, int] | None = self._look(name, lambda conn: leaf_bytes(conn, table))
        if sizes is None:
            return
        source.rows[table.oid] = rows.rows
        source.bytes[table.oid] = sum(sizes.values())
        if time.monotonic() >= deadline:
            text = f"{name}: not sampled, since other tables took the time for that"
            self._findings.append(finding("postgres-facts", "advice", name, text))
            return
        wanted = [column.name for column in planned.plan.columns if column.vector is not None]
        facts = self._look(name, lambda conn: toast_facts(conn, table, read, wanted))
        if facts is not None:
            self._findings += toast_findings(planned, facts)
