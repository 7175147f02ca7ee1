"""Watching the source: slot, retained WAL, the server's position, and the tables' columns, every
few seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from cdc_sync.config import Settings
from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.postgres.catalog import ServerInfo
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.publication import Publication, check_publication, read_publication
from cdc_sync.postgres.watch import SourcePosition, definitions, source_position
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.retry import is_transient
from cdc_sync.sync.stream import Positions, publish_lag

log = get_logger(__name__)

#: Seconds between two looks.
INTERVAL_SECONDS = 5.0


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
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._board = board
        self._positions = positions
        self._relations = relations
        self._server = server
        self._on_look = on_look
        self._connection: PgConnection | None = None

    async def run(self) -> None:
        """Poll until cancelled."""
        try:
            while True:
                try:
                    position, found = await asyncio.to_thread(self._look)
                except SourceError as error:
                    if not is_transient(error):
                        raise
                    log.debug("monitor_failed", kind=error.kind.value, error=error.message)
                else:
                    self._publish(position)
                    self._on_look(position, found)
                # Also while no session runs: what waits gets older.
                publish_lag(self._positions, self._metrics, self._board)
                await asyncio.sleep(INTERVAL_SECONDS)
        finally:
            self._close()

    def _look(self) -> tuple[SourcePosition, dict[int, str]]:
        try:
            if self._connection is None:
                self._connection = connect(self._settings.source, application_name="cdc_sync watch")
            oids = [planned.plan.oid for planned in self._relations.tables]
            # First the publication: what it has been compared with is then not older.
            publication = self._publication(self._connection)
            found = definitions(self._connection, oids)
            self._check_tables(found)
            self._check_publication(publication, found)
            return source_position(self._connection, self._settings.source.slot), found
        except SourceError:
            self._close()
            raise

    def _check_tables(self, found: Mapping[int, str]) -> None:
        for planned in self._relations.tables:
            if planned.plan.oid not in found:
                raise SourceError(
                    ErrorKind.TABLE_UNUSABLE,
                    f"table {planned.name} was dropped",
                    "Take it out of the configuration, or create it again, and copy anew with "
                    "--migration.restart.",
                )

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

    def _check_publication(self, publication: Publication, found: Mapping[int, str]) -> None:
        """So does one that carries less."""
        # Which columns it carries is seen in the stream. A table that was redefined is planned anew
        # first: columns of its identity may have other names.
        wanted = [
            (planned.table, ())
            for planned in self._relations.tables
            if not self._relations.is_redefined(planned.plan.oid, found[planned.plan.oid])
        ]
        try:
            filters = {planned.plan.oid: planned.row_filter for planned in self._relations.tables}
            check_publication(publication, wanted, self._server, filters)
        except SourceError as error:
            raise SourceError(
                error.kind,
                f"{error.message}, since it was altered; changes made meanwhile are not sent",
                f"{error.remedy}\nThen copy anew with --migration.restart.",
            ) from error

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _publish(self, position: SourcePosition) -> None:
        self._positions.server_end = max(self._positions.server_end, int(position.current))
        if position.restart is not None:
            self._metrics.slot_retained_wal_bytes.set(max(0, position.current - position.restart))
        self._metrics.slot_active.set(1 if position.active else 0)
        self._metrics.set_wal_status(position.wal_status)
        self._metrics.slot_safe_wal_bytes.set(position.safe_wal_bytes)
