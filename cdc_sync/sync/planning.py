"""Planning: from the configuration and the catalog to the tables of the pipeline. Changes
nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cdc_sync.config import Settings, TableSettings
from cdc_sync.errors import (
    CdcSyncError,
    ConfigError,
    ErrorKind,
    MappingError,
    SourceError,
    StateError,
)
from cdc_sync.mapping.column_options import present_options
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.planner import build_plan, replan
from cdc_sync.mapping.table import Table
from cdc_sync.postgres.catalog import ServerInfo, find_table, read_table, server_info
from cdc_sync.postgres.connect import PgConnection, set_lock_timeout
from cdc_sync.postgres.identifiers import column_list, parse_name, qualified, quote_ident
from cdc_sync.postgres.preflight import check_identity, check_readable
from cdc_sync.postgres.publication import Publication, check_publication, read_publication
from cdc_sync.postgres.row_filters import resolve_filter
from cdc_sync.postgres.shards import parse_shard
from cdc_sync.qdrant.open import check_collection_config
from cdc_sync.qdrant.sink import PipelineState, TableRebuild, TableState
from cdc_sync.sync.fingerprints import fingerprint, same_configuration, same_options
from cdc_sync.sync.preset_options import preset_options
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.stopped_tables import concerns_one_table

#: How long planning waits for whoever has locked a table.
_LOCK_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True)
class Unplanned:
    """A table on record as copied that cannot be followed now, and why: it starts stopped."""

    name: str
    oid: int
    error: CdcSyncError


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """What the pipeline will do. ``publication`` is None when it is still to be created; of one
    that is ours, ``unpublished`` are the tables still to be added. ``stopped`` are not among the
    tables."""

    server: ServerInfo
    tables: tuple[PlannedTable, ...]
    publication: Publication | None
    owned: bool = False
    stopped: tuple[Unplanned, ...] = ()

    @property
    def unpublished(self) -> list[tuple[Table, tuple[str, ...] | None]]:
        """What has to be added to the publication."""
        if self.publication is None:
            return []
        published = self.publication.tables
        return [entry for entry in self.published_columns if entry[0].oid not in published]

    @property
    def published_columns(self) -> list[tuple[Table, tuple[str, ...] | None]]:
        """What the publication has to hold: each table, and its columns when they are not all."""
        return [
            (
                planned.table,
                None
                if planned.options.columns is None
                else tuple(column.name for column in planned.plan.columns),
            )
            for planned in self.tables
        ]

    @property
    def row_filters(self) -> dict[int, str]:
        """The row filters that the publication has, or has to have, by the OID of the table."""
        return {p.table.oid: p.row_filter for p in self.tables if p.row_filter is not None}

    @property
    def columns_read(self) -> dict[int, tuple[str, ...]]:
        """The columns that are read of each table, by its OID: those of the plan, and those that
        the selection of its rows may name."""
        return {p.table.oid: columns_read(p) for p in self.tables}


def columns_read(planned: PlannedTable) -> tuple[str, ...]:
    """The columns that are read of a table: those of the plan, and those that the selection of its
    rows may name."""
    taken = {column.name for column in planned.plan.columns}
    selection = planned.selection or ""
    # Rather one too many than one too few.
    return tuple(
        column.name
        for column in planned.table.columns
        if column.name in taken or column.name.replace('"', '""') in selection
    )


def plan_options(settings: TableSettings, shard: str | None = None) -> PlanOptions:
    """The mapping's view of a table's settings. ``shard`` is the pipeline's, as "i/n"."""
    return PlanOptions(
        key=tuple(settings.key) if settings.key is not None else None,
        columns=tuple(settings.columns) if settings.columns is not None else None,
        collection=settings.collection,
        metrics=dict(settings.metrics),
        dimensions=dict(settings.dimensions),
        unnamed_vector=settings.unnamed_vector,
        bit_vectors=tuple(settings.bit_vectors),
        namespace=settings.namespace,
        drop_nulls=_all_or_some(settings.drop_nulls),
        numeric_as_string=_all_or_some(settings.numeric_as_string),
        skip_bytea=_all_or_some(settings.skip_bytea),
        # In an order of their own: options that say the same are the same.
        exclude=tuple(sorted(settings.exclude)),
        rename=dict(sorted(settings.rename.items())),
        constants=dict(sorted(settings.constants.items())),
        payload_key=settings.payload_key,
        where=settings.where,
        shard=shard,
        ids=settings.ids,
        collection_config=dict(settings.collection_config),
    )


def _all_or_some(setting: bool | list[str]) -> bool | tuple[str, ...]:
    return setting if isinstance(setting, bool) else tuple(sorted(setting)) or False


def plan_pipeline(
    connection: PgConnection,
    settings: Settings,
    *,
    owned: bool = False,
    state: PipelineState | None = None,
) -> PipelinePlan:
    """Read the catalog and plan every table. ``owned``: the publication is ours, and may lack
    tables that are new. ``state``: the pipeline's record; a table that has been copied is not
    refused, but starts stopped.

    Raises :class:`SourceError` (TABLE_LOCKED when one stays locked), :class:`MappingError` or
    :class:`ConfigError` naming the table and the remedy.
    """
    settings = in_force(settings, state)
    # The catalog's functions lock what they describe.
    set_lock_timeout(connection, _LOCK_SECONDS)
    server = server_info(connection)
    publication = read_publication(connection, settings.source.publication)
    # The OIDs of another cluster are others.
    same = state is not None and state.system_identifier in ("", server.system_identifier)
    known = state.tables if state is not None and same else ()
    planned = []
    stopped = []
    for entry in settings.tables:
        record = recorded_as(entry.name, known)
        try:
            table, record = locate(connection, entry, known)
            one = plan_configured(connection, settings, entry, table, publication, server)
            if record is not None:
                one = as_recorded(one, record)
                if record.copied:
                    check_followed(connection, one, publication, server)
        except CdcSyncError as error:
            if record is None or not record.copied or not concerns_one_table(error):
                raise
            stopped.append(Unplanned(record.table, record.oid, error))
        else:
            planned.append(one)
    _check_distinct(planned)
    for one in planned:
        check_collection_config(settings.qdrant, one.plan)
    plan = PipelinePlan(server, tuple(planned), publication, owned, tuple(stopped))
    if publication is not None:
        to_add = {table.oid for table, _ in plan.unpublished} if owned else set()
        check_publication(
            publication,
            [
                (p.table, tuple(c.name for c in p.plan.columns))
                for p in planned
                if p.table.oid not in to_add
            ],
            server,
            {p.table.oid: p.row_filter for p in planned},
        )
    return plan


def in_force(settings: Settings, state: PipelineState | None) -> Settings:
    """The settings with those of rebuilt tables, as long as the configuration still names the
    collection that was replaced (``cdc-sync rebuild``)."""
    known = state.tables if state is not None else ()
    if not any(table.rebuild is not None and table.rebuild.settings for table in known):
        return settings
    tables = [settings_in_force(entry, recorded_as(entry.name, known)) for entry in settings.tables]
    return settings.model_copy(update={"tables": tables})


def settings_in_force(entry: TableSettings, record: TableState | None) -> TableSettings:
    """The settings of one table; ``record``: its own, if it has one."""
    if record is None or record.rebuild is None or not record.rebuild.settings:
        return entry
    return entry if entry.collection == record.collection else rebuilt_settings(record.rebuild)


def rebuilt_settings(rebuild: TableRebuild) -> TableSettings:
    """The settings of a rebuilt table, as on record. Raises :class:`StateError`."""
    try:
        return TableSettings.model_validate_json(rebuild.settings)
    except ValueError as error:
        # Not chained: it quotes the document.
        raise StateError(
            "the record of a rebuilt table holds settings that this version cannot read "
            f"({type(error).__name__})",
            "Run the version that wrote it, or name the new collection in the configuration.",
        ) from None


def is_named(configured: str, name: str) -> bool:
    """Whether a table's name in the configuration, which may be quoted and lack the schema, can
    mean the one of this name (``schema.table``)."""
    try:
        parts = parse_name(configured)
    except ValueError:
        parts = (configured,)
    short = name.partition(".")[2]
    # A name may stand verbatim too, where it means no other table.
    return name == ".".join(parts[-2:]) or short in (".".join(parts), configured)


def recorded_as(configured: str, known: Sequence[TableState]) -> TableState | None:
    """The record of a table by its name in the configuration."""
    found = [t for t in known if is_named(configured, t.table)]
    return found[0] if len(found) == 1 else None


def locate(
    connection: PgConnection, entry: TableSettings, known: Sequence[TableState]
) -> tuple[Table, TableState | None]:
    """The table of an entry in the configuration, and its record if it has one. A table that was
    renamed is the same as before.

    Raises :class:`SourceError` TABLE_UNUSABLE when there is none, or when it is not the one on
    record.
    """
    try:
        table = find_table(connection, entry.name)
    except SourceError as error:
        record = recorded_as(entry.name, known)
        if error.kind is not ErrorKind.TABLE_UNUSABLE or record is None:
            raise
        try:
            return read_table(connection, record.oid), record
        except SourceError:
            raise error from None
    record = next((t for t in known if t.oid == table.oid), None)
    record = record or next((t for t in known if t.table == table.qualified_name), None)
    if record is not None and record.oid not in (0, table.oid):
        raise replaced(record.table)
    return table, record


def replaced(name: str) -> SourceError:
    """The error of a table whose name another table has."""
    return SourceError(
        ErrorKind.TABLE_UNUSABLE,
        f"table {name} is not the one that was copied: it was dropped and created again, or "
        "another was renamed to it",
        "If the one that was copied has another name now, name that. Else drop it, or copy anew "
        "with --migration.restart.",
    )


def as_recorded(planned: PlannedTable, record: TableState) -> PlannedTable:
    """The table as it is called on record, in its collection; without columns that are new vectors.

    Raises :class:`MappingError` when its points would get other ids.
    """
    schema, _, name = record.table.partition(".")
    collection = record.collection
    plan = dataclasses.replace(planned.plan, schema=schema, table=name, collection=collection)
    planned = dataclasses.replace(planned, plan=plan)
    now = fingerprint(planned)
    if same_options(record.plan_fingerprint, now) and not same_configuration(
        record.plan_fingerprint, now
    ):
        raise MappingError(
            f"the key of table {record.table}, or its type, is not the one by which its points got "
            "their ids",
            "Undo the change, or copy anew with --migration.restart.",
        )
    return planned


def check_followed(
    connection: PgConnection,
    planned: PlannedTable,
    publication: Publication | None,
    server: ServerInfo,
) -> None:
    """Check of one table what is needed to follow it. Raises :class:`SourceError`."""
    check_identity(planned.table)
    check_readable(connection, planned.table, columns_read(planned))
    if publication is not None:
        columns = tuple(column.name for column in planned.plan.columns)
        check_publication(
            publication,
            [(planned.table, columns)],
            server,
            {planned.table.oid: planned.row_filter},
        )


def plan_configured(
    connection: PgConnection,
    settings: Settings,
    entry: TableSettings,
    table: Table,
    publication: Publication | None,
    server: ServerInfo,
) -> PlannedTable:
    """Plan one table by its entry in the configuration. Raises as :func:`plan_pipeline`."""
    shard = settings.pipeline.shard
    if shard is not None:
        # As it is compared and stored: 01/04 is no other shard.
        shard = "{}/{}".format(*parse_shard(shard))
    expanded = preset_options(connection, table, entry, plan_options(entry, shard))
    one = plan_table(table, expanded.options, publication)
    one = with_row_filter(connection, one, publication, server)
    return dataclasses.replace(one, warnings=(*expanded.warnings, *one.warnings))


def plan_table(
    table: Table,
    options: PlanOptions,
    publication: Publication | None,
    *,
    changed: bool = False,
) -> PlannedTable:
    """Plan one table as it is published, or would be. ``changed``: it was planned before, so the
    options may name columns that are gone."""
    published = publication.tables.get(table.oid) if publication is not None else None
    table, inherited = with_published_children(table, publication)
    result = build_plan(
        table,
        present_options(table, options) if changed else options,
        published.columns if published is not None else None,
    )
    taken = {column.name for column in result.plan.columns}
    planned = PlannedTable(
        table=table,
        plan=result.plan,
        options=options,
        row_filter=published.row_filter if published is not None else None,
        ignored=frozenset(column.name for column in table.columns) - taken,
        warnings=(*result.warnings, *inherited),
    )
    _check_children(planned)
    return planned


def with_published_children(
    table: Table, publication: Publication | None
) -> tuple[Table, tuple[str, ...]]:
    """The table with the tables that inherit from it, or without: all are published, or none (R40).
    And what the operator may not expect of that."""
    if not table.children:
        return table, ()
    names = ", ".join(f"{child.schema}.{child.name}" for child in table.children)
    if publication is not None:
        absent = [c for c in table.children if c.oid not in publication.tables]
        if len(absent) == len(table.children):
            own = tuple(leaf for leaf in table.leaves if leaf.oid == table.oid)
            left_out = (
                f"{table.qualified_name}: the publication does not have the tables that inherit "
                f"from it ({names}), so their rows are not taken"
            )
            return dataclasses.replace(table, leaves=own), (left_out,)
        if absent:
            listed = ", ".join(f"ONLY {qualified(c.schema, c.name)}" for c in absent)
            raise SourceError(
                ErrorKind.PUBLICATION_UNUSABLE,
                f"publication {publication.name} has some of the tables that inherit from "
                f"{table.qualified_name}, but not {', '.join(c.name for c in absent)}",
                f"ALTER PUBLICATION {quote_ident(publication.name)} ADD TABLE {listed};",
            )
    taken = (
        f"{table.qualified_name}: rows of {names} are taken too, since they inherit from it; "
        "their keys must be distinct from each other, which Postgres does not ensure"
    )
    return table, (taken,)


def _check_children(planned: PlannedTable) -> None:
    """Once published, the application's updates of a child without a replica identity fail."""
    key = [planned.plan.columns[position].name for position in planned.plan.key]
    for child in planned.table.children:
        if not set(key) <= set(child.identity_columns):
            name = qualified(child.schema, child.name)
            raise SourceError(
                ErrorKind.TABLE_UNUSABLE,
                f"{child.schema}.{child.name}, which inherits from {planned.name}, has no replica "
                "identity with the key; keys are not inherited, and without one its updates and "
                "deletes fail as soon as it is published",
                f"ALTER TABLE {name} ADD PRIMARY KEY ({column_list(key)});",
            )


def with_row_filter(
    connection: PgConnection,
    planned: PlannedTable,
    publication: Publication | None,
    server: ServerInfo,
) -> PlannedTable:
    """The table with the row filter that its options ask for, as it is published or would be.

    Raises what keeps the filter from being published, or the publication from being used.
    """
    options = planned.options
    plan = planned.plan
    row_filter = resolve_filter(
        connection,
        planned.table,
        [plan.columns[position].name for position in plan.key],
        options.where,
        options.shard,
        publication,
        server,
    )
    warnings = planned.warnings
    if row_filter is not None and options.where is None and options.shard is None:
        unasked = (
            f"{planned.name}: the publication sends only rows of {row_filter}, which `where` does "
            "not say; the others are not kept in step"
        )
        warnings = (*warnings, unasked)
    return dataclasses.replace(planned, row_filter=row_filter, warnings=warnings)


def without_new_vectors(planned: PlannedTable, known: Sequence[str]) -> PlannedTable:
    """The table without vector columns that were added after its collection was made.

    A vector is added to a collection only when it is made; until the table is copied anew such a
    column is left out, as it is while streaming.
    """
    new = {
        column.name
        for column in planned.plan.columns
        if column.vector is not None and column.name not in known
    }
    if not new:
        return planned
    kept = [(c.name, c.type) for c in planned.plan.columns if c.name not in new]
    warning = (
        f"{planned.name}: vector column {', '.join(sorted(new))} was added after the copy and is "
        "left out; copy anew with --migration.restart to take it in"
    )
    return dataclasses.replace(
        planned,
        plan=replan(planned.plan, kept, planned.options),
        ignored=planned.ignored | new,
        warnings=(*planned.warnings, warning),
    )


def _check_distinct(planned: Sequence[PlannedTable]) -> None:
    oids: dict[int, str] = {}
    collections: dict[str, list[PlannedTable]] = {}
    for table in planned:
        if table.table.oid in oids:
            raise ConfigError(
                f"table {table.name} is configured twice", "Remove one of its [[tables]] entries."
            )
        oids[table.table.oid] = table.name
        collections.setdefault(table.plan.collection, []).append(table)
    for collection, tables in collections.items():
        if len(tables) == 1:
            continue
        names = ", ".join(t.name for t in tables)
        namespaces = {t.plan.namespace for t in tables}
        if None in namespaces or len(namespaces) < len(tables):
            raise ConfigError(
                f"tables {names} share the collection {collection!r}: equal keys would overwrite "
                "each other's points",
                "Give each of them a different namespace, or a collection of its own.",
            )
        if any(t.plan.vectors != tables[0].plan.vectors for t in tables):
            raise ConfigError(
                f"tables {names} share the collection {collection!r} but their vectors differ",
                "Give them equal vector columns, dimensions and metrics, or a collection each.",
            )
        if any(t.plan.collection_config != tables[0].plan.collection_config for t in tables):
            raise ConfigError(
                f"tables {names} share the collection {collection!r} but their `collection_config` "
                "differs",
                "Give each of them the same, or a collection each.",
            )
