"""Planning: from the configuration and the catalog to the tables of the pipeline. Changes
nothing."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from cdc_sync.config import Settings, TableSettings
from cdc_sync.errors import ConfigError
from cdc_sync.mapping.ids import plan_fingerprint
from cdc_sync.mapping.planner import PlanOptions, build_plan, key_family, replan
from cdc_sync.mapping.table import Table, redefined
from cdc_sync.postgres.catalog import ServerInfo, find_table, server_info
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.publication import Publication, check_publication, read_publication
from cdc_sync.sync.routing import PlannedTable


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """What the pipeline will do. ``publication`` is None when it is still to be created."""

    server: ServerInfo
    tables: tuple[PlannedTable, ...]
    publication: Publication | None

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


def plan_options(settings: TableSettings) -> PlanOptions:
    """The mapping's view of a table's settings."""
    return PlanOptions(
        key=tuple(settings.key) if settings.key is not None else None,
        columns=tuple(settings.columns) if settings.columns is not None else None,
        collection=settings.collection,
        metrics=dict(settings.metrics),
        dimensions=dict(settings.dimensions),
        unnamed_vector=settings.unnamed_vector,
        bit_vectors=tuple(settings.bit_vectors),
        namespace=settings.namespace,
        drop_nulls=settings.drop_nulls is True,
        numeric_as_string=settings.numeric_as_string is True,
        skip_bytea=settings.skip_bytea is True,
    )


def plan_pipeline(connection: PgConnection, settings: Settings) -> PipelinePlan:
    """Read the catalog and plan every table.

    Raises :class:`SourceError`, :class:`MappingError` or :class:`ConfigError` naming the table and
    the remedy.
    """
    server = server_info(connection)
    publication = read_publication(connection, settings.source.publication)
    planned = []
    for table_settings in settings.tables:
        table = find_table(connection, table_settings.name)
        planned.append(plan_table(table, plan_options(table_settings), publication))
    _check_distinct(planned)
    plan = PipelinePlan(server, tuple(planned), publication)
    if publication is not None:
        check_publication(
            publication,
            [(p.table, tuple(c.name for c in p.plan.columns)) for p in planned],
            server,
        )
    return plan


def plan_table(table: Table, options: PlanOptions, publication: Publication | None) -> PlannedTable:
    """Plan one table as it is published, or would be."""
    published = publication.tables.get(table.oid) if publication is not None else None
    result = build_plan(table, options, published.columns if published is not None else None)
    taken = {column.name for column in result.plan.columns}
    return PlannedTable(
        table=table,
        plan=result.plan,
        options=options,
        row_filter=published.row_filter if published is not None else None,
        ignored=frozenset(column.name for column in table.columns) - taken,
        warnings=result.warnings,
    )


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


def is_stale(recorded: str, planned: PlannedTable) -> bool:
    """Whether a collection with this fingerprint is not as the table now is."""
    plan, _, definition = recorded.partition(":")[2].partition(":")
    return plan != plan_fingerprint(planned.plan) or redefined(definition, planned.table.definition)


def same_configuration(one: str, other: str) -> bool:
    """Whether two fingerprints differ at most in the table."""
    return one.partition(":")[0] == other.partition(":")[0]


def _configuration(planned: PlannedTable) -> str:
    """What must stay for the points to keep their ids and their form."""
    plan = planned.plan
    key = [(plan.columns[i].name, key_family(plan.columns[i].type)) for i in plan.key]
    content = f"{planned.options!r} {key!r}"
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
