"""Planning tables again while the pipeline runs: those that are read again, and those that stopped.

Changes nothing but the publication, if that is ours and lacks a table that was created again.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from cdc_sync.config import Settings, TableSettings
from cdc_sync.errors import CdcSyncError, ConfigError, ErrorKind, SinkError, SourceError
from cdc_sync.mapping.planner import DimensionChangedError, replan
from cdc_sync.mapping.table import Table
from cdc_sync.ops.logging import get_logger
from cdc_sync.postgres.catalog import ServerInfo, find_table, read_table, server_info
from cdc_sync.postgres.connect import PgConnection, connect, set_lock_timeout
from cdc_sync.postgres.publication import Publication, add_to_publication, read_publication
from cdc_sync.postgres.watch import table_signs
from cdc_sync.qdrant.sink import PipelineState, TableState
from cdc_sync.sync.copying import LOCK_SECONDS
from cdc_sync.sync.fingerprints import (
    fingerprint,
    is_recorded_stale,
    is_stale,
    same_configuration,
)
from cdc_sync.sync.planning import (
    as_recorded,
    check_followed,
    is_named,
    plan_configured,
    plan_table,
    replaced,
    without_new_vectors,
)
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.stopped_tables import concerns_one_table

log = get_logger(__name__)


class WindowPostponedError(Exception):
    """No window can be opened now; the stream goes on meanwhile."""


@contextlib.contextmanager
def unless_locked() -> Iterator[None]:
    """Raise :class:`WindowPostponedError` when a lock was not to be had in time."""
    try:
        yield
    except SourceError as error:
        if error.kind is not ErrorKind.TABLE_LOCKED:
            raise
        raise WindowPostponedError("a table is locked") from error


def check_unshared(planned: PlannedTable, error: CdcSyncError) -> None:
    """Make sure that only this table has points in its collection, which ``error`` keeps from being
    used. Raises COLLECTION_MISMATCH."""
    if planned.plan.marks:
        raise SinkError(
            ErrorKind.COLLECTION_MISMATCH,
            f"{error.message} It is not made anew, since others may have points in it too.",
            f"Drop collection {planned.plan.collection} by hand, and let every pipeline that "
            "writes to it copy its tables anew; or give the table a collection of its own.",
        )


class Replanner:
    """Plans tables again. All methods are blocking."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def again(
        self, tables: Sequence[PlannedTable]
    ) -> tuple[list[PlannedTable], dict[str, CdcSyncError]]:
        """Plan tables as they are now; of those that cannot be, return the error by name.

        Raises :class:`WindowPostponedError` when a table stays locked, and :class:`SourceError`.
        """
        planned, failed = [], {}
        with (
            unless_locked(),
            connect(self._settings.source, application_name="cdc_sync watch") as connection,
        ):
            # Reading a table's size waits for whoever has locked it.
            set_lock_timeout(connection, LOCK_SECONDS)
            publication = read_publication(connection, self._settings.source.publication)
            for before in tables:
                try:
                    table = _read(connection, before)
                    planned.append(self._plan_again(before, table, publication))
                except CdcSyncError as error:
                    if not concerns_one_table(error):
                        raise
                    failed[before.name] = error
        return planned, failed

    def as_recorded(
        self, tables: Sequence[PlannedTable], state: PipelineState
    ) -> list[PlannedTable]:
        """Of the tables those that another process has read since they were planned here, as they
        are now: a process that waits for the slot knows columns and partitions of long ago.

        Those that stay locked are left out. Raises :class:`SourceError`.
        """
        known = {
            t.table: t.plan_fingerprint
            for t in state.tables
            if t.copied and not is_recorded_stale(t.plan_fingerprint)
        }
        outdated = [p for p in tables if known.get(p.name, fingerprint(p)) != fingerprint(p)]
        if not outdated:
            return []
        try:
            found, _ = self.again(outdated)
        except WindowPostponedError:
            return []
        return [planned for planned in found if not is_stale(known[planned.name], planned)]

    def sign(self, name: str, oid: int) -> str | None:
        """What tells whether something has changed about a table that has stopped; to be read
        before it is planned."""
        with connect(self._settings.source, application_name="cdc_sync watch") as connection:
            signs = table_signs(connection, {name: oid}, self._settings.source.publication)
        return signs.get(name)

    def stopped(
        self, before: PlannedTable | None, record: TableState, *, owned: bool
    ) -> PlannedTable:
        """Plan a table that has stopped. ``before``: as it was followed, None if it was not in this
        life; ``owned``: the publication is ours.

        Raises what keeps the table from being followed, and as :meth:`again`.
        """
        with (
            unless_locked(),
            connect(self._settings.source, application_name="cdc_sync watch") as connection,
        ):
            set_lock_timeout(connection, LOCK_SECONDS)
            server = server_info(connection)
            publication = read_publication(connection, self._settings.source.publication)
            table = self._find(connection, before, record)
            again = table.oid != record.oid
            if again and owned and publication is not None and table.oid not in publication.tables:
                publication = self._publish(connection, table, record, publication, server)
            if before is None or before.plan.oid != table.oid:
                planned = self._plan_anew(connection, table, record, publication, server)
            else:
                planned = self._plan_again(
                    before, table, publication, rebuild=self.rebuilds(record.table)
                )
            check_followed(connection, planned, publication, server)
            return planned

    # -- which table

    def _find(
        self, connection: PgConnection, before: PlannedTable | None, record: TableState
    ) -> Table:
        """The table by its OID, or one that was created under its name since. As at a start, one
        that was not followed in this life is not taken while its name is another's."""
        known = _unless_gone(
            lambda: read_table(connection, record.oid if before is None else before.plan.oid)
        )
        if known is not None and before is not None:
            return known
        named = _unless_gone(lambda: find_table(connection, self._entry(record.table).name))
        if known is not None and named is not None and named.oid != known.oid:
            raise replaced(record.table)
        found = known or named
        if found is None:
            raise dropped(record.table)
        return found

    def _entry(self, name: str) -> TableSettings:
        """The configuration's entry of a table, by its name on record."""
        entries = [entry for entry in self._settings.tables if is_named(entry.name, name)]
        # One with the schema before one without.
        for entry in sorted(entries, key=lambda one: -len(one.name)):
            return entry
        raise ConfigError(
            f"table {name} is not configured under that name any more",
            "Put it back, or restart the pipeline.",
        )

    # -- what it becomes

    def _plan_again(
        self,
        before: PlannedTable,
        table: Table,
        publication: Publication | None,
        *,
        rebuild: bool = False,
    ) -> PlannedTable:
        planned = plan_table(table, before.options, publication, changed=True)
        # As the stream does it: changes that stop the stream are not for a copy either, and a new
        # vector column is not in the collection.
        try:
            again = replan(
                before.plan, [(c.name, c.type) for c in planned.plan.columns], before.options
            )
        except DimensionChangedError:
            if not rebuild:
                raise
            again = planned.plan
        # A table that was renamed stays what it is on record, in its collection.
        plan = dataclasses.replace(
            planned.plan,
            columns=again.columns,
            key=again.key,
            schema=before.plan.schema,
            table=before.plan.table,
            collection=before.plan.collection,
        )
        return dataclasses.replace(planned, plan=plan)

    def _plan_anew(
        self,
        connection: PgConnection,
        table: Table,
        record: TableState,
        publication: Publication | None,
        server: ServerInfo,
    ) -> PlannedTable:
        planned = plan_configured(
            connection, self._settings, self._entry(record.table), table, publication, server
        )
        planned = as_recorded(planned, record)
        if not same_configuration(record.plan_fingerprint, fingerprint(planned)):
            raise other_configuration(record.table)
        return without_new_vectors(planned, record.vectors)

    def rebuilds(self, name: str) -> bool:
        """Whether a table's collection is made anew when the dimension of a vector changes."""
        return self._entry(name).on_dimension_change == "rebuild"

    def _publish(
        self,
        connection: PgConnection,
        table: Table,
        record: TableState,
        publication: Publication,
        server: ServerInfo,
    ) -> Publication | None:
        """Add a table that was created again to the publication, which is ours."""
        planned = plan_configured(
            connection, self._settings, self._entry(record.table), table, None, server
        )
        filters: Mapping[int, str] = (
            {} if planned.row_filter is None else {table.oid: planned.row_filter}
        )
        columns = None
        if planned.options.columns is not None:
            columns = tuple(column.name for column in planned.plan.columns)
        add_to_publication(connection, publication.name, [(table, columns)], server, filters)
        log.info("table_published", table=record.table, publication=publication.name)
        return read_publication(connection, publication.name)


def dropped(name: str) -> SourceError:
    """The error of a table that is gone."""
    return SourceError(
        ErrorKind.TABLE_UNUSABLE,
        f"table {name} was dropped",
        "Create it again, and it is copied; or take it out of the configuration and copy anew with "
        "--migration.restart.",
    )


def other_configuration(name: str) -> ConfigError:
    """The error of a table whose points would get other ids or another form than they have."""
    return ConfigError(
        f"the configuration of table {name}, or its key, is not the one its collection was "
        "filled by",
        "Undo the change, or copy anew with --migration.restart.",
    )


def _unless_gone(read: Callable[[], Table]) -> Table | None:
    try:
        return read()
    except SourceError as error:
        if error.kind is not ErrorKind.TABLE_UNUSABLE:
            raise
        return None


def _read(connection: PgConnection, planned: PlannedTable) -> Table:
    try:
        return read_table(connection, planned.plan.oid)
    except SourceError as error:
        if error.kind is not ErrorKind.TABLE_UNUSABLE:
            raise
        raise SourceError(
            error.kind,
            f"table {planned.name} cannot be read any more: {error.message}",
            error.remedy,
        ) from error
