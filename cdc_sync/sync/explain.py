"""``plan``: what a run would do, without doing any of it.

Everything is read: the catalog and the planner's estimates from Postgres, collections and our own
records from Qdrant, which need not be there. Nothing is created or written on either side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ErrorKind
from cdc_sync.mapping.decoding import describe
from cdc_sync.mapping.plan import ColumnPlan, IdScheme, Part, TablePlan, VectorKind
from cdc_sync.mapping.table import Column
from cdc_sync.mapping.vector_indexes import index_notes, vector_indexes
from cdc_sync.mapping.vector_settings import find_dimension, find_metric
from cdc_sync.mapping.vectors import vector_base
from cdc_sync.ops.redaction import redact
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.estimates import WalFacts, estimate_rows, leaf_bytes, wal_facts
from cdc_sync.postgres.preflight import preflight_source
from cdc_sync.postgres.publication import create_publication_sql
from cdc_sync.postgres.slot import SlotInfo, read_slot
from cdc_sync.postgres.watch import wal_limits
from cdc_sync.qdrant.collection_config import vector_settings
from cdc_sync.qdrant.collections import absent, payload_indexes
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import PipelineState, Sink, TableLedger
from cdc_sync.sync.executors import available_cpus
from cdc_sync.sync.explanation import (
    ColumnExplained,
    Explained,
    PartitionExplained,
    TableExplained,
    VectorExplained,
)
from cdc_sync.sync.findings import Finding
from cdc_sync.sync.ledger import Ledger
from cdc_sync.sync.planning import PipelinePlan, plan_pipeline
from cdc_sync.sync.progress import size_text
from cdc_sync.sync.retention import copy_budget
from cdc_sync.sync.routing import PlannedTable

#: A plan does not wait for a Qdrant that is away.
_QDRANT_SECONDS: Final = 5.0

_IDS: Final[Mapping[IdScheme, str]] = {
    IdScheme.INTEGER: "the number itself; a UUID hashed from it if negative",
    IdScheme.UUID: "the uuid itself",
    IdScheme.HASHED: "a UUID (version 5) hashed from the key",
    IdScheme.TEXT_UUID: "the uuid that the text spells, else one hashed from it",
}
_PARTS: Final[Mapping[Part, str]] = {
    Part.MEMBERS: "members of the payload object",
    Part.MEMBER: "a field of the payload object",
    Part.NODE_TEXT: "the node's text",
    Part.HIDDEN: "nothing, it is only read",
}


def explain(settings: Settings) -> Explained:
    """Say what a run would do. What stands in its way are findings; raises nothing of
    CdcSyncError.
    """
    explained = Explained(copy=_copy(settings))
    plan = _explain_source(settings, explained)
    asyncio.run(_explain_sink(settings, plan, explained))
    return explained


def _copy(settings: Settings) -> dict[str, object]:
    migration = settings.migration
    # An embedded database can be open in one process only.
    embedded = settings.qdrant.url.startswith("edge:")
    return {
        "workers": 1 if embedded else migration.num_workers or available_cpus(),
        "executor": migration.executor,
        "batch_size": migration.batch_size,
        "batch_delay_ms": migration.batch_delay,
        "chunk_rows": migration.chunk_rows,
        "window_seconds": migration.window_seconds,
        "create_collection": migration.create_collection,
        "defer_hnsw": migration.defer_hnsw,
        "adopt": migration.adopt,
    }


# -- Postgres


def _explain_source(settings: Settings, explained: Explained) -> PipelinePlan | None:
    try:
        with connect(settings.source) as connection:
            return _explain_tables(connection, settings, explained)
    except CdcSyncError as error:
        explained.findings.append(Finding.from_error("postgres", error))
        return None


def _explain_tables(
    connection: PgConnection, settings: Settings, explained: Explained
) -> PipelinePlan | None:
    try:
        plan = plan_pipeline(connection, settings)
    except CdcSyncError as error:
        explained.findings.append(Finding.from_error("tables", error))
        return None
    slot = read_slot(connection, settings.source.slot)
    _explain_server(settings, plan, slot, explained)
    _preflight(connection, settings, plan, slot, explained)
    budget = copy_budget(
        settings.migration.max_retained_wal_bytes, wal_limits(connection).slot_bytes
    )
    explained.wal = _explain_wal(settings, wal_facts(connection), slot, budget)
    for planned in plan.tables:
        explained.tables.append(_explain_table(connection, settings, planned))
    return plan


def _preflight(
    connection: PgConnection,
    settings: Settings,
    plan: PipelinePlan,
    slot: SlotInfo | None,
    explained: Explained,
) -> None:
    try:
        preflight_source(
            connection,
            settings.source,
            tables=[planned.table for planned in plan.tables],
            slot_exists=slot is not None,
            publication=plan.publication,
            row_filters=plan.row_filters,
            columns_read=plan.columns_read,
        )
    except CdcSyncError as error:
        explained.findings.append(Finding.from_error("postgres", error))


def _explain_server(
    settings: Settings, plan: PipelinePlan, slot: SlotInfo | None, explained: Explained
) -> None:
    server = plan.server
    explained.server = {
        "version": f"{server.major}.{server.version_num % 10000}",
        "database": server.database,
        "system_identifier": server.system_identifier,
        "in_recovery": server.in_recovery,
    }
    statement = None
    if plan.publication is None:
        statement = create_publication_sql(
            settings.source.publication,
            plan.published_columns,
            server_version=server.version_num,
            row_filters=plan.row_filters,
        )
    explained.publication = {
        "name": settings.source.publication,
        "exists": plan.publication is not None,
        "statement": statement,
    }
    explained.slot = {
        "name": settings.source.slot,
        "exists": slot is not None,
        "active": slot.active if slot is not None else False,
        "wal_status": slot.wal_status if slot is not None else None,
    }
    if slot is not None and slot.lost:
        explained.findings.append(
            Finding(
                "warning",
                "slot",
                f"slot {slot.name} is lost: changes since its last position can no longer be read",
                "Copy anew with --migration.restart.",
            )
        )


def _explain_wal(
    settings: Settings, facts: WalFacts, slot: SlotInfo | None, budget: int | None
) -> dict[str, object]:
    rate = facts.bytes_per_second
    # The window that is copied, and the changes of it that are applied while more come.
    window = None if rate is None else round(2 * rate * settings.migration.window_seconds)
    hour = None if rate is None else round(rate * 3600)
    return {
        "wal_level": facts.wal_level,
        "free_slots": facts.free_slots,
        "free_senders": facts.free_senders,
        "max_slot_wal_keep_bytes": facts.max_slot_wal_keep_bytes,
        "bytes_per_second": rate,
        "measured_seconds": facts.measured_seconds,
        "bytes_kept_while_copying": window,
        "copy_budget_bytes": budget,
        "bytes_kept_per_hour_of_standstill": hour,
        "advice": wal_advice(facts, window, hour, slot, budget),
    }


def wal_advice(
    facts: WalFacts,
    window: int | None,
    hour: int | None,
    slot: SlotInfo | None,
    budget: int | None,
) -> list[str]:
    """Say what to change about WAL. ``window`` and ``hour`` are bytes that are kept while a window
    is copied, and in an hour in which nobody reads; None if not known. ``budget``: how many the
    copy lets the slot keep; None: any number.
    """
    limit = facts.max_slot_wal_keep_bytes
    advice = []
    if facts.wal_level != "logical":
        advice.append("wal_level must be logical, which needs a restart of Postgres")
    if slot is None and facts.free_slots < 1:
        advice.append("max_replication_slots must be larger: every slot is taken")
    if facts.free_senders < 1:
        advice.append("max_wal_senders must be larger: every sender is taken")
    if limit is None:
        advice.append(
            "max_slot_wal_keep_size has no limit: while nobody reads the slot, WAL is kept until "
            "the disk is full. Set it to what the disk can spare; a slot that falls behind further "
            "is lost, and its tables are copied anew"
        )
    if budget is not None and window is not None and budget < window:
        advice.append(
            f"the copy may make the slot keep {size_text(budget)} of WAL, less than it does at the "
            "average rate of writing: windows end early during the copy, and it waits in between. "
            "Raise max_slot_wal_keep_size or migration.max_retained_wal_bytes, whichever is less, "
            "or lower migration.window_seconds"
        )
    elif limit is not None and hour is not None and limit < hour:
        advice.append(
            "max_slot_wal_keep_size is less than an hour of writing at the average rate: a "
            "standstill of that length loses the slot, and its tables are copied anew"
        )
    if hour is None:
        advice.append("how much WAL is written is not known: the statistics have just been reset")
    return advice


# -- tables


def _explain_table(
    connection: PgConnection, settings: Settings, planned: PlannedTable
) -> TableExplained:
    plan, table = planned.plan, planned.table
    sizes = leaf_bytes(connection, table)
    rows, rows_from = None, "not known"
    try:
        estimate = estimate_rows(connection, table, planned.selection)
        rows, rows_from = estimate.rows, "the planner's estimate"
        if not estimate.analysed:
            rows_from = "a guess by its size; run ANALYZE for a better one"
    except CdcSyncError as error:
        # Where rows may not be read, the preflight has said so with the remedy.
        rows_from = f"not known: {error.message}"
    ledger = Ledger.new(
        settings.pipeline.name, planned, settings.migration.chunk_rows, sweep=False, repair=False
    )
    chunks = {leaf.oid: 0 for leaf in table.leaves}
    for chunk in ledger.left(planned):
        chunks[chunk.leaf.oid] += 1
    vectors = [_explain_vector(planned, column) for column in plan.columns if column.vector]
    return TableExplained(
        table=planned.name,
        collection=plan.collection,
        key=[plan.columns[position].name for position in plan.key],
        key_from="the configuration" if planned.options.key is not None else "the primary key",
        ids=_ids(plan),
        columns=_columns(planned),
        vectors=vectors,
        payload_indexes=[
            {"field": _field_path(index.field, index.parent), "type": index.type.value}
            for index in payload_indexes(plan)
        ],
        collection_config=dict(plan.collection_config),
        partitions=[
            PartitionExplained(
                f"{leaf.schema}.{leaf.name}", sizes.get(leaf.oid, 0), chunks[leaf.oid]
            )
            for leaf in table.leaves
        ],
        rows=rows,
        rows_from=rows_from,
        bytes=sum(sizes.values()),
        vector_bytes=None if rows is None else rows * _bytes_per_point(plan),
        chunks=sum(chunks.values()),
        row_filter=planned.selection,
        warnings=list(planned.warnings),
        notes=list(
            index_notes(table, [(c.name, c.vector) for c in plan.columns if c.vector is not None])
        ),
    )


def _ids(plan: TablePlan) -> str:
    text = _IDS.get(
        plan.id_scheme, f"as Qdrant's migration tool computes it ({plan.id_scheme.value})"
    )
    return text if plan.namespace is None else f"{text} and the namespace {plan.namespace}"


def _bytes_per_point(plan: TablePlan) -> int:
    widths = {"float32": 4, "float16": 2, "uint8": 1, "turbo4": 1, "turbo8": 1, "turbo16": 2}
    return sum((v.size or 0) * widths[v.datatype.value] for v in plan.vectors)


def _field_path(name: str, parent: str | None) -> str:
    return name if parent is None else f"{parent}.{name}"


def _columns(planned: PlannedTable) -> list[ColumnExplained]:
    known = {column.name: column for column in planned.plan.columns}
    return [
        ColumnExplained(
            column.name,
            _type_text(column),
            _becomes(planned.plan, known[column.name]) if column.name in known else "nothing",
        )
        for column in planned.table.columns
    ]


def _type_text(column: Column) -> str:
    base = vector_base(column.type)
    name = describe(column.type)
    if not base.is_pgvector:
        return name
    size = f"({base.typmod})" if base.typmod >= 0 else ""
    return f"{base.name}{size}{'[]' if name.endswith('[]') else ''}"


def _becomes(plan: TablePlan, column: ColumnPlan) -> str:
    if column.vector is not None:
        return f"vector {column.vector.name}" if column.vector.name else "the unnamed vector"
    if column.part is not None:
        return _PARTS[column.part]
    if column.field is None:
        return "the point id only"
    return f"payload field {_field_path(column.field, plan.payload_key)}"


def _explain_vector(planned: PlannedTable, column: ColumnPlan) -> VectorExplained:
    vector = column.vector
    assert vector is not None
    dimension_from, metric_from = None, "the kind of vector"
    if vector.kind is not VectorKind.SPARSE:
        source = next(one for one in planned.table.columns if one.name == column.name)
        facts = vector_indexes(planned.table, column.name)
        dimension_from = find_dimension(planned.table, source, facts, planned.options).origin
        metric_from = find_metric(planned.table, source, facts, planned.options).origin
    return VectorExplained(
        name=vector.name,
        column=column.name,
        kind=vector.kind.value,
        dimension=vector.size,
        dimension_from=dimension_from,
        metric=vector.metric.value,
        metric_from=metric_from,
        datatype=vector.datatype.value,
        settings=vector_settings(planned.plan, vector),
    )


# -- Qdrant


async def _explain_sink(
    settings: Settings, plan: PipelinePlan | None, explained: Explained
) -> None:
    explained.qdrant = {"url": redact(settings.qdrant.url), "reachable": False, "version": None}
    seconds = min(settings.qdrant.timeout_seconds, _QDRANT_SECONDS)
    try:
        sink = await open_sink(settings.qdrant.model_copy(update={"timeout_seconds": seconds}))
    except CdcSyncError as error:
        explained.findings.append(_unreachable(error))
        return
    try:
        await sink.ping()
        explained.qdrant |= {"reachable": True, "version": sink.version}
        state = await sink.state.load(settings.pipeline.name)
        ledgers = {one.table: one for one in await sink.state.ledgers(settings.pipeline.name)}
        for planned, table in zip(
            plan.tables if plan is not None else (), explained.tables, strict=True
        ):
            await _explain_collection(settings, sink, planned, table, state, ledgers, explained)
    except CdcSyncError as error:
        explained.findings.append(_unreachable(error))
    finally:
        await sink.close()


def _unreachable(error: CdcSyncError) -> Finding:
    if error.kind not in (ErrorKind.SINK_UNAVAILABLE, ErrorKind.SINK_UNKNOWN):
        return Finding.from_error("qdrant", error)
    return Finding(
        "warning",
        "qdrant",
        f"what exists in Qdrant is not known: {error.message}",
        error.remedy,
        error.kind,
    )


async def _explain_collection(
    settings: Settings,
    sink: Sink,
    planned: PlannedTable,
    table: TableExplained,
    state: PipelineState | None,
    ledgers: Mapping[str, TableLedger],
    explained: Explained,
) -> None:
    subject = f"collection {table.collection}"
    try:
        found = await sink.inspect(planned.plan)
    except CdcSyncError as error:
        explained.findings.append(Finding.from_error(subject, error))
        table.collection_exists, table.action = True, "cannot be used as it is"
        return
    table.collection_exists = found.exists
    table.points = found.points if found.exists else None
    table.warnings += found.warnings
    ours = {one.table: one for one in state.tables} if state is not None else {}
    record = ours.get(planned.name)
    if record is not None and record.copied and found.exists:
        table.action = "is copied already; changes are followed"
    elif planned.name in ledgers:
        ledger = ledgers[planned.name]
        table.action = f"the copy is continued; {ledger.rows} rows are done"
    elif not found.exists:
        table.action = "the collection is created and the table copied into it"
        if not settings.migration.create_collection:
            table.action = "cannot be copied: the collection does not exist"
            explained.findings.append(_not_created(planned))
    elif found.points and settings.migration.adopt:
        table.action = "its points are compared with the table and repaired"
    elif found.points and record is None:
        table.action = "cannot be copied: the collection holds points of somebody else"
        explained.findings.append(_foreign(subject, found.points))
    else:
        table.action = "the table is copied into the collection that exists"


def _not_created(planned: PlannedTable) -> Finding:
    return Finding.from_error(f"collection {planned.plan.collection}", absent(planned.plan))


def _foreign(subject: str, points: int) -> Finding:
    return Finding(
        "error",
        subject,
        f"holds {points} points that this pipeline has not written",
        "Choose another collection, drop this one first, or take it over with migration.adopt.",
        ErrorKind.COLLECTION_MISMATCH,
    )
