"""Watching the source: slot, retained WAL, the server's position, slots of rebuilds, and the
tables' columns, every few seconds."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ErrorKind, SourceError
from cdc_sync.ops.attention import RebuildSlot, rebuild_remedy
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.postgres.catalog import ServerInfo
from cdc_sync.postgres.connect import (
    LoginRefusedError,
    PgConnection,
    connect,
    set_lock_timeout,
)
from cdc_sync.postgres.publication import Publication, check_publication, read_publication
from cdc_sync.postgres.watch import SourcePosition, definitions, source_position, table_signs
from cdc_sync.sync.kept_connection import KeptConnection
from cdc_sync.sync.rebuild_slots import rebuild_slots
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.replanning import dropped
from cdc_sync.sync.retention import publish_slot
from cdc_sync.sync.retry import is_transient
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.stream import Positions, publish_lag

log = get_logger(__name__)

#: Seconds between two looks.
INTERVAL_SECONDS = 5.0
#: How long a look waits for a table that somebody has locked, as VACUUM FULL does for hours. The
#: catalog's views lock what they show.
_LOCK_SECONDS: Final = 5.0
#: How often it is said that nobody reads the slot of a rebuild.
_REMIND_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True)
class _Tables:
    """What was seen of the tables: definitions by OID of those that are there, and by name what
    keeps one from being followed, and whatever tells whether something has changed about it."""

    found: dict[int, str]
    errors: Mapping[str, CdcSyncError]
    signs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Seen:
    """One look. ``tables``: None where one is locked."""

    tables: _Tables | None
    rebuilds: Sequence[RebuildSlot]
    position: SourcePosition


class RebuildWatch:
    """Remembers since when nobody has read the slots of rebuilds, and says so."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def look(self, found: Sequence[RebuildSlot], now: float) -> list[RebuildSlot]:
        """Take in what Postgres shows at ``now`` (Unix time); returns it with the times."""
        unused = [slot.slot for slot in found if not slot.in_use]
        self._since = {name: self._since.get(name, now) for name in unused}
        self._said = {name: said for name, said in self._said.items() if name in self._since}
        seen = [
            dataclasses.replace(slot, unused_since=self._since.get(slot.slot)) for slot in found
        ]
        for slot in seen:
            if slot.is_left(now) and now - self._said.get(slot.slot, 0.0) >= _REMIND_SECONDS:
                self._said[slot.slot] = now
                log.warning(
                    "rebuild_slot_unread",
                    table=slot.table,
                    slot=slot.slot,
                    retained_wal_bytes=slot.retained_bytes,
                    seconds=round(now - self._since[slot.slot]),
                    remedy=rebuild_remedy(slot),
                )
        return seen


class SourceMonitor:
    """Polls over a connection of its own; a source that is away is somebody else's concern."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        board: StatusBoard,
        positions: Positions,
        relations: Relations,
        server: ServerInfo,
        on_look: Callable[[SourcePosition, dict[int, str]], None],
        on_tables: Callable[[Mapping[str, CdcSyncError], Mapping[str, str], float], None],
        is_stopped: Callable[[str], bool],
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._board = board
        self._positions = positions
        self._relations = relations
        self._server = server
        self._on_look = on_look
        self._on_tables = on_tables
        self._is_stopped = is_stopped
        self._connection = KeptConnection(settings.source, "cdc_sync watch")
        self._rebuilds = RebuildWatch()

    async def run(self) -> None:
        """Poll until cancelled."""
        last = time.time()
        try:
            while True:
                try:
                    began = time.monotonic()
                    seen = await asyncio.to_thread(self._connection.run, self._look)
                except SourceError as error:
                    if not is_transient(error):
                        raise
                    log.debug("monitor_failed", kind=error.kind.value, error=error.message)
                    self._not_seen(last, alone=not await asyncio.to_thread(self._is_open))
                else:
                    last = time.time()
                    self._publish(seen)
                    if (tables := seen.tables) is not None:
                        self._on_tables(tables.errors, tables.signs, began)
                        self._on_look(seen.position, tables.found)
                # Also while no session runs: what waits gets older.
                publish_lag(self._positions, self._metrics, self._board)
                await asyncio.sleep(INTERVAL_SECONDS)
        finally:
            self._connection.end()

    def _look(self, connection: PgConnection) -> _Seen:
        """The tables, unless one is locked, and then the position."""
        set_lock_timeout(connection, _LOCK_SECONDS)
        tables = None
        try:
            tables = self._tables(connection)
        except SourceError as error:
            if error.kind is not ErrorKind.TABLE_LOCKED:
                raise
            log.debug("monitor_failed", kind=error.kind.value, error=error.message)
        rebuilds = rebuild_slots(connection, self._settings, list(self._relations.oids))
        return _Seen(tables, rebuilds, source_position(connection, self._settings.source.slot))

    def _tables(self, connection: PgConnection) -> _Tables:
        tables = self._relations.tables
        # First the publication: what it has been compared with is then not older.
        publication = self._publication(connection)
        found = definitions(connection, [planned.plan.oid for planned in tables])
        errors = {}
        for planned in tables:
            error = self._error(planned, publication, found.get(planned.plan.oid))
            if error is not None:
                errors[planned.name] = error
        # Only stopped tables are looked at that closely.
        stopped = {
            name: oid for name, oid in self._relations.oids.items() if self._is_stopped(name)
        }
        return _Tables(found, errors, table_signs(connection, stopped, publication.name))

    def _error(
        self, planned: PlannedTable, publication: Publication, definition: str | None
    ) -> CdcSyncError | None:
        """What keeps a table from being followed."""
        if definition is None:
            return dropped(planned.name)
        # Which columns the publication carries is seen in the stream. A table that was redefined is
        # planned anew first: columns of its identity may have other names.
        wanted = [(planned.table, ())]
        if self._relations.is_redefined(planned.plan.oid, definition):
            wanted = []
        filters = {planned.plan.oid: planned.row_filter}
        try:
            check_publication(publication, wanted, self._server, filters)
        except SourceError as error:
            return SourceError(
                error.kind,
                f"{error.message}, since it was altered; changes made meanwhile are not sent",
                error.remedy,
            )
        return None

    def _publication(self, connection: PgConnection) -> Publication:
        """A publication that is gone loses changes without a word (R57)."""
        name = self._settings.source.publication
        publication = read_publication(connection, name)
        if publication is None:
            raise SourceError(
                ErrorKind.PUBLICATION_UNUSABLE,
                f"publication {name} was dropped",
                "Copy anew with --migration.restart, which makes it again.",
            )
        return publication

    def _publish(self, seen: _Seen) -> None:
        now = time.time()
        self._positions.see_server(int(seen.position.current), now)
        self._positions.alone_since = None
        publish_slot(self._metrics, self._board, seen.position)
        self._board.set_rebuilds(self._rebuilds.look(seen.rebuilds, now))

    def _is_open(self) -> bool:
        """Whether the server takes connections. One that only answers late does."""
        try:
            connect(self._settings.source, application_name="cdc_sync watch").close()
        except LoginRefusedError:
            return True
        except SourceError:
            return False
        return True

    def _not_seen(self, last: float, *, alone: bool) -> None:
        """Nobody can say what was written since, unless a session is running. ``alone``: the server
        takes no other connection."""
        self._board.slot_unknown()
        if not alone:
            self._positions.alone_since = None
        elif self._positions.alone_since is None:
            self._positions.alone_since = time.monotonic()
        if not self._board.source_up and self._positions.blind_since is None:
            self._positions.blind_since = last
