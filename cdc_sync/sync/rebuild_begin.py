"""The beginning of a rebuild: what is to be rebuilt, whether it can be, and what it needs before it
begins: a record, columns in the publication, and an alias for the readers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from cdc_sync.config import Settings, TableSettings
from cdc_sync.errors import ConfigError, ErrorKind, SourceError, StateError
from cdc_sync.ops.logging import get_logger
from cdc_sync.postgres.catalog import ServerInfo, read_table, server_info
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.publication import (
    Publication,
    check_publication,
    publish_anew,
    read_publication,
)
from cdc_sync.qdrant.open import check_collection_config
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import PipelineState, RebuildState, TableState
from cdc_sync.sync.planning import (
    check_followed,
    in_force,
    is_named,
    plan_configured,
    recorded_as,
)
from cdc_sync.sync.rebuild_slots import worker_names
from cdc_sync.sync.routing import PlannedTable

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Order:
    """What the operator asked for. ``settings``: the pipeline's, as it runs; ``wanted``: as they
    shall be. ``table`` is a name as in SQL."""

    settings: Settings
    wanted: Settings
    table: str
    alias: str


async def begin(order: Order, sink: ServerSink) -> RebuildState:
    """Return the record of the rebuild, made here unless it is there from an earlier run.

    Raises :class:`ConfigError` for what cannot be rebuilt so, :class:`SourceError` with the SQL
    that a publication needs which is not ours to change. Nothing has been changed then.
    """
    name = order.settings.pipeline.name
    state = await _pipeline_state(order.settings, sink)
    record = _record(order, state)
    old, new = _entries(order, state, record)
    known = await sink.state.rebuild(name, record.table)
    if known is not None:
        _check_same(order, known, new)
    else:
        known = await _new(order, sink, state, record, (old, new))
    if known.widened:
        lacking = await asyncio.to_thread(_publication_lacks, order.settings, new, record, True)
        if lacking is not None:
            await asyncio.to_thread(_publish, order.settings, lacking)
    await _make_alias(sink, known)
    return known


async def _new(
    order: Order,
    sink: ServerSink,
    state: PipelineState,
    record: TableState,
    entries: tuple[TableSettings, TableSettings],
) -> RebuildState:
    """Check a new rebuild, and put it on record."""
    old, new = entries
    _check_copied(record)
    _check_name(order, state, record, new)
    _check_kinds(order.settings, state, record, old, new)
    rebuild = await _examine(order, sink, record, new)
    lacking = await asyncio.to_thread(
        _publication_lacks, order.settings, new, record, state.owns_publication
    )
    rebuild = dataclasses.replace(rebuild, widened=lacking is not None)
    # Before anything is made: whatever is found later is known to be of this rebuild.
    await sink.state.save_rebuild(rebuild)
    log.info(
        "rebuild_begun", table=record.table, collection=rebuild.collection, replaces=rebuild.old
    )
    return rebuild


async def _pipeline_state(settings: Settings, sink: ServerSink) -> PipelineState:
    name = settings.pipeline.name
    state = await sink.state.load(name)
    if state is None:
        raise StateError(
            f"there is no record of a pipeline {name!r} in {settings.qdrant.url}",
            "Name the configuration of the running pipeline with --config, or start it: "
            "cdc-sync run.",
        )
    if state.slot != settings.source.slot:
        raise ConfigError(
            f"pipeline {name!r} streams from slot {state.slot}, not from {settings.source.slot}",
            "Name the configuration of the running pipeline with --config.",
        )
    return state


def _record(order: Order, state: PipelineState) -> TableState:
    record = table_on_record(order.table, state.tables)
    if record is None:
        listed = ", ".join(sorted(table.table for table in state.tables))
        raise ConfigError(
            f"table {order.table} does not belong to pipeline {state.pipeline!r}",
            f"Its tables are: {listed}.",
        )
    return record


def table_on_record(name: str, known: Sequence[TableState]) -> TableState | None:
    """The record of the table that a name as in SQL means."""
    exact = [table for table in known if table.table == name]
    return exact[0] if exact else recorded_as(name, known)


# -- what is asked for


def _entries(
    order: Order, state: PipelineState, record: TableState
) -> tuple[TableSettings, TableSettings]:
    """The table's settings as they are and as they shall be. Raises :class:`ConfigError` when
    anything else differs."""
    now, wanted = in_force(order.settings, state), order.wanted
    differing = _differences(now, wanted)
    if differing:
        raise ConfigError(
            f"the two configurations differ in {', '.join(differing)}",
            "A rebuild changes one table's section only: change the rest before or after it.",
        )
    tables = [entry for entry in now.tables if recorded_as(entry.name, state.tables) == record]
    others = [entry for entry in now.tables if entry not in tables]
    new = [entry for entry in wanted.tables if is_named(entry.name, record.table)]
    if len(tables) != 1 or len(new) != 1:
        raise ConfigError(
            f"table {record.table} does not stand once in each of the two configurations",
            "Give one section [[tables]] for it in both, by its schema and name.",
        )
    rest = in_force(wanted, state)
    if [entry for entry in rest.tables if not is_named(entry.name, record.table)] != others:
        raise ConfigError(
            f"the two configurations differ in other tables than {record.table}",
            "Rebuild one table after the other.",
        )
    return tables[0], new[0]


def _differences(now: Settings, wanted: Settings) -> list[str]:
    """The settings beside tables that differ, by their dotted names."""
    found = []
    for section in type(now).model_fields:
        one, other = getattr(now, section), getattr(wanted, section)
        if section == "tables" or not isinstance(one, BaseModel):
            continue
        found += [
            f"{section}.{key}"
            for key in type(one).model_fields
            if getattr(one, key) != getattr(other, key)
        ]
    return found


def _check_same(order: Order, known: RebuildState, new: TableSettings) -> None:
    if known.phase == "aborting":
        raise ConfigError(
            f"a rebuild of {known.table} is being removed",
            f"Finish that first: cdc-sync rebuild --abort --table {known.table}",
        )
    same = TableSettings.model_validate_json(known.settings) == new
    if not same or known.alias != order.alias:
        raise ConfigError(
            f"a rebuild of {known.table} into collection {known.collection}, by alias "
            f"{known.alias}, is under way with other settings",
            "Go on with the settings it was begun with, or remove it: "
            f"cdc-sync rebuild --abort --table {known.table}",
        )


def _check_copied(record: TableState) -> None:
    if not record.copied:
        raise ConfigError(
            f"table {record.table} has not been copied yet",
            "Let the running pipeline copy it first; or, if nobody reads its collection yet, "
            "change the configuration and copy anew with --migration.restart.",
        )


def _check_name(order: Order, state: PipelineState, record: TableState, new: TableSettings) -> None:
    """Refuse the name that an outdated configuration file has: it could not be told later which of
    the two it means."""
    given = [e for e in order.settings.tables if recorded_as(e.name, state.tables) == record]
    if any(entry.collection == new.collection for entry in given):
        raise ConfigError(
            f"the new configuration names no other collection for {record.table} than the "
            "configuration of now",
            f"Give the table a new name with `collection`. It is kept in {record.collection}; if "
            "the file says something else, replace it first.",
        )


def _check_kinds(
    settings: Settings,
    state: PipelineState,
    record: TableState,
    old: TableSettings,
    new: TableSettings,
) -> None:
    """Refuse what cannot be swapped without a gap."""
    if new.collection in (None, record.collection):
        raise ConfigError(
            f"the new configuration names no other collection for {record.table}",
            "Give the table a new name with `collection`.",
        )
    if settings.pipeline.shard is not None:
        raise ConfigError(
            f"table {record.table} is divided among pipelines (pipeline.shard), of which each "
            "could rebuild its own part only",
            "Begin pipelines with other names and slots into a new collection, and let readers go "
            "over to it.",
        )
    if old.where != new.where:
        raise ConfigError(
            f"the new configuration selects other rows of {record.table}: `where` differs",
            "The publication of the running pipeline filters by it, up to the last moment before "
            "the swap. Change `where` by copying anew (--migration.restart) into a new collection, "
            "under another pipeline.name and source.slot.",
        )
    sharing = [
        table.table
        for table in state.tables
        if table is not record and record.collection == table.collection
    ]
    taken = [table.table for table in state.tables if table.collection == new.collection]
    if sharing:
        raise ConfigError(
            f"collection {record.collection} holds {', '.join(sharing)}, too: readers of the alias "
            "would miss its points after the swap",
            "Give each of the tables a collection of its own first.",
        )
    if taken:
        raise ConfigError(
            f"collection {new.collection} is that of {', '.join(taken)}",
            "Give the table a collection of its own.",
        )


# -- Qdrant


async def _examine(
    order: Order, sink: ServerSink, record: TableState, new: TableSettings
) -> RebuildState:
    """The record of the rebuild, once it is known that alias and collection can be had."""
    alias = order.alias
    assert new.collection is not None
    aliases = await sink.aliases.all()
    old = aliases.get(record.collection, record.collection)
    if alias == new.collection or new.collection in aliases:
        raise ConfigError(
            f"{new.collection} is an alias; the new collection needs a name of its own",
            "Name the collection otherwise, and let readers use the alias.",
        )
    if alias not in aliases and await sink.exists(alias):
        raise ConfigError(
            f"{alias} is a collection, and no alias of Qdrant can have a collection's name",
            "Readers have to use an alias before they can go over without a gap. Choose another "
            "name with --alias, begin the rebuild (which makes the alias stand for "
            f"{old}) with --no-swap, point the readers to it, and run it again without --no-swap.",
        )
    if aliases.get(alias, old) != old:
        raise ConfigError(
            f"alias {alias} stands for {aliases[alias]}, not for {old}, which holds {record.table}",
            "Name the alias by which the table's collection is read.",
        )
    if alias in aliases:
        # Where it points already: that it can be moved is better known now than after the swap.
        await sink.aliases.point(alias, old)
    worker, slot = worker_names(order.settings, record.table)
    return RebuildState(
        pipeline=order.settings.pipeline.name,
        table=record.table,
        worker=worker,
        slot=slot,
        settings=new.model_dump_json(exclude_defaults=True),
        collection=new.collection,
        old=old,
        alias=alias,
        made_collection=not await sink.exists(new.collection),
        made_alias=alias not in aliases,
    )


async def _make_alias(sink: ServerSink, rebuild: RebuildState) -> None:
    """Make the readers' alias, where this rebuild is to make it and it is not there."""
    if rebuild.made_alias and rebuild.alias not in await sink.aliases.all():
        await sink.aliases.point(rebuild.alias, rebuild.old)
        log.info("alias_made", table=rebuild.table, alias=rebuild.alias, collection=rebuild.old)


# -- the publication


@dataclass(frozen=True, slots=True)
class _Columns:
    """A table and the columns by which it is to be published."""

    planned: PlannedTable
    columns: tuple[str, ...] | None
    server: ServerInfo


def _publication_lacks(
    settings: Settings, new: TableSettings, record: TableState, owned: bool
) -> _Columns | None:
    """What the publication has to carry besides, before the pipeline can take the new collection;
    None: it has all. Raises :class:`SourceError` with the SQL if it is not ours."""
    with connect(settings.source, application_name="cdc_sync rebuild") as connection:
        server = server_info(connection)
        publication = read_publication(connection, settings.source.publication)
        if publication is None:
            raise SourceError(
                ErrorKind.PUBLICATION_UNUSABLE,
                f"the publication {settings.source.publication} is gone",
            )
        found = _plan(connection, settings, new, record, None, server)
        wanted = tuple(column.name for column in found.plan.columns)
        row_filter = {found.table.oid: _published_filter(publication, found)}
        try:
            check_publication(publication, [(found.table, wanted)], server, row_filter)
        except SourceError:
            if not owned or found.table.oid not in publication.tables:
                raise
            listed = None if new.columns is None else wanted
            return _Columns(found, listed, server)
        _plan(connection, settings, new, record, publication, server)
    return None


def _published_filter(publication: Publication, planned: PlannedTable) -> str | None:
    published = publication.tables.get(planned.table.oid)
    return published.row_filter if published is not None else None


def _plan(
    connection: PgConnection,
    settings: Settings,
    entry: TableSettings,
    record: TableState,
    publication: Publication | None,
    server: ServerInfo,
) -> PlannedTable:
    table = read_table(connection, record.oid)
    planned = plan_configured(connection, settings, entry, table, publication, server)
    check_followed(connection, planned, publication, server)
    check_collection_config(settings.qdrant, planned.plan)
    return planned


def _publish(settings: Settings, wanted: _Columns) -> None:
    table, name = wanted.planned.table, settings.source.publication
    with connect(settings.source, application_name="cdc_sync rebuild") as connection:
        publication = read_publication(connection, name)
        assert publication is not None
        row_filter = _published_filter(publication, wanted.planned)
        publish_anew(connection, name, (table, wanted.columns), wanted.server, row_filter)
    log.info("table_published", table=wanted.planned.name, publication=name)


def publish_as_before(settings: Settings, state: PipelineState, record: TableState) -> None:
    """Publish a table by the columns that its configuration in force wants, after a rebuild that
    had wanted more. Blocking. Raises :class:`SourceError`."""
    now = in_force(settings, state)
    entry = next(e for e in now.tables if recorded_as(e.name, state.tables) == record)
    with connect(settings.source, application_name="cdc_sync rebuild") as connection:
        server = server_info(connection)
        publication = read_publication(connection, settings.source.publication)
        if publication is None or record.oid not in publication.tables:
            return
        planned = _plan(connection, settings, entry, record, None, server)
        columns = tuple(column.name for column in planned.plan.columns)
        wanted = _Columns(planned, None if entry.columns is None else columns, server)
    _publish(settings, wanted)
