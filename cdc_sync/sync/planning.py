"""Planning: from the configuration and the catalog to the tables of the pipeline. Changes
nothing."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cdc_sync.config import Settings, TableSettings
from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.mapping.column_options import present_options
from cdc_sync.mapping.ids import plan_fingerprint
from cdc_sync.mapping.planner import PlanOptions, build_plan, key_family, replan
from cdc_sync.mapping.table import Table, redefined, stored_anew
from cdc_sync.postgres.catalog import ServerInfo, find_table, server_info
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.identifiers import column_list, qualified, quote_ident
from cdc_sync.postgres.publication import Publication, check_publication, read_publication
from cdc_sync.postgres.row_filters import resolve_filter
from cdc_sync.postgres.shards import parse_shard
from cdc_sync.qdrant.open import check_collection_config
from cdc_sync.sync.preset_options import preset_options
from cdc_sync.sync.routing import PlannedTable


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """What the pipeline will do. ``publication`` is None when it is still to be created; of one
    that is ours, ``unpublished`` are the tables still to be added."""

    server: ServerInfo
    tables: tuple[PlannedTable, ...]
    publication: Publication | None
    owned: bool = False

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
    connection: PgConnection, settings: Settings, *, owned: bool = False
) -> PipelinePlan:
    """Read the catalog and plan every table. ``owned``: the publication is ours, and may lack
    tables that are new.

    Raises :class:`SourceError`, :class:`MappingError` or :class:`ConfigError` naming the table and
    the remedy.
    """
    server = server_info(connection)
    publication = read_publication(connection, settings.source.publication)
    planned = []
    shard = settings.pipeline.shard
    if shard is not None:
        # As it is compared and stored: 01/04 is no other shard.
        shard = "{}/{}".format(*parse_shard(shard))
    for table_settings in settings.tables:
        table = find_table(connection, table_settings.name)
        expanded = preset_options(
            connection, table, table_settings, plan_options(table_settings, shard)
        )
        one = plan_table(table, expanded.options, publication)
        one = with_row_filter(connection, one, publication, server)
        planned.append(dataclasses.replace(one, warnings=(*expanded.warnings, *one.warnings)))
    _check_distinct(planned)
    for one in planned:
        check_collection_config(settings.qdrant, one.plan)
    plan = PipelinePlan(server, tuple(planned), publication, owned)
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


def fingerprint(planned: PlannedTable) -> str:
    """``configuration:plan:definition``: by what a collection was filled."""
    return f"{_configuration(planned)}:{plan_fingerprint(planned.plan)}:{planned.table.definition}"


def stale_fingerprint(planned: PlannedTable) -> str:
    """The fingerprint of a collection that must be filled again: no plan gives it."""
    return f"{_configuration(planned)}:stale:"


def as_stale(recorded: str) -> str:
    """A fingerprint on record, as that of a collection that must be filled again."""
    return f"{recorded.partition(':')[0]}:stale:"


def is_stale(recorded: str, planned: PlannedTable) -> bool:
    """Whether a collection with this fingerprint is not as the table now is."""
    plan, _, definition = recorded.partition(":")[2].partition(":")
    return plan != plan_fingerprint(planned.plan) or redefined(definition, planned.table.definition)


def is_stored_anew(recorded: str, planned: PlannedTable) -> bool:
    """Whether the table's rows are in other files than when the fingerprint was made."""
    definition = recorded.partition(":")[2].partition(":")[2]
    return bool(definition) and stored_anew(definition, planned.table.definition)


def same_configuration(one: str, other: str) -> bool:
    """Whether two fingerprints differ at most in the table."""
    return one.partition(":")[0] == other.partition(":")[0]


def _configuration(planned: PlannedTable) -> str:
    """What must stay for the points to keep their ids and their form."""
    plan = planned.plan
    key = [(plan.columns[i].name, key_family(plan.columns[i].type)) for i in plan.key]
    # Without columns that are gone, so that they can be taken out of the configuration.
    content = f"{present_options(planned.table, planned.options)!r} {key!r}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


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
