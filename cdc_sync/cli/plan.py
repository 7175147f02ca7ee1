"""``cdc-sync plan``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.check import exit_code
from cdc_sync.cli.entries import LABEL, entry, finding_entry
from cdc_sync.cli.options import takes_settings

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings
    from cdc_sync.sync.explanation import Explained, TableExplained, VectorExplained

#: Partitions that are named in the text; with --json they are all there.
_PARTITIONS = 12


@takes_settings
def plan(
    loaded: LoadedSettings,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Show what a run would do, without doing any of it.

    Tables, keys, vectors, payload, indexes, the size of the copy, and what stands in the way.
    Qdrant need not be reachable. Exit code 0 if there is no error.
    """
    from cdc_sync.ops.redaction import redact
    from cdc_sync.sync.explain import explain
    from cdc_sync.sync.explanation import as_json as explanation_json

    explained = explain(loaded.settings)
    code = exit_code(explained.findings)
    if as_json:
        content = {"ok": code == 0, **explanation_json(explained)}
        typer.echo(json.dumps(_redacted(content), indent=2, ensure_ascii=False, default=str))
    else:
        typer.echo(redact("\n".join(_lines(explained))))
    return code


def _redacted(value: object) -> object:
    from cdc_sync.ops.redaction import redact

    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {name: _redacted(one) for name, one in value.items()}
    return [_redacted(one) for one in value] if isinstance(value, (list, tuple)) else value


def _lines(explained: Explained) -> Iterator[str]:
    if explained.server:
        server = explained.server
        yield from entry("postgres", f"{server['version']}, database {server['database']}")
        yield from entry("publication", _existence(explained.publication))
        statement = explained.publication.get("statement")
        if statement:
            yield f"{'':{LABEL}}{statement}"
        yield from entry("slot", _existence(explained.slot))
        yield from _wal(explained.wal)
    yield from entry("qdrant", _qdrant(explained.qdrant))
    yield from entry("copy", _copy(explained.copy))
    for table in explained.tables:
        yield ""
        yield from _table(table)
    if explained.findings:
        yield ""
        for finding in explained.findings:
            yield from finding_entry(finding)


def _existence(part: Mapping[str, object]) -> str:
    if not part.get("exists"):
        return f"{part['name']}, would be created"
    state = ", in use" if part.get("active") else ""
    status = part.get("wal_status")
    return f"{part['name']}, exists{state}{f', WAL {status}' if status else ''}"


def _qdrant(part: Mapping[str, object]) -> str:
    if part.get("reachable"):
        return f"{part['url']}, version {part['version']}"
    return f"{part['url']}, not reachable: what exists there is not known"


def _copy(part: Mapping[str, object]) -> str:
    text = (
        f"{part['workers']} workers ({part['executor']}), chunks of about {part['chunk_rows']} "
        f"rows, windows of {part['window_seconds']} s"
    )
    return text + (", HNSW built afterwards" if part["defer_hnsw"] else "")


def _wal(part: Mapping[str, object]) -> Iterator[str]:
    from cdc_sync.sync.progress import duration_text, size_text

    limit = part["max_slot_wal_keep_bytes"]
    shown = f"up to {size_text(limit)}" if isinstance(limit, int) else "any amount"
    text = f"wal_level {part['wal_level']}, a slot may keep {shown}"
    rate, seconds = part["bytes_per_second"], part["measured_seconds"]
    window, hour = part["bytes_kept_while_copying"], part["bytes_kept_per_hour_of_standstill"]
    if isinstance(rate, float) and isinstance(seconds, float):
        assert isinstance(window, int)
        assert isinstance(hour, int)
        text += (
            f"; {size_text(round(rate))} a second were written in the last "
            f"{duration_text(seconds)}, by which about {size_text(window)} are kept while copying "
            f"and {size_text(hour)} an hour while nobody reads"
        )
    yield from entry("wal", text)
    advice = part["advice"]
    for sentence in advice if isinstance(advice, list) else ():
        yield from entry("", sentence)


def _table(table: TableExplained) -> Iterator[str]:
    yield f"{table.table} -> collection {table.collection}"
    indent = "  "
    yield from entry("action", _action(table), indent)
    yield from entry("size", _size(table), indent)
    if len(table.partitions) > 1:
        names = [f"{one.name} ({one.chunks})" for one in table.partitions]
        shown = ", ".join(names[:_PARTITIONS])
        more = f" and {len(names) - _PARTITIONS} more" if len(names) > _PARTITIONS else ""
        yield from entry("partitions", f"{len(names)} (chunks): {shown}{more}", indent)
    if table.row_filter is not None:
        yield from entry("rows", f"only where {table.row_filter}", indent)
    key = ", ".join(table.key)
    yield from entry("key", f"{key}, from {table.key_from}; point id: {table.ids}", indent)
    for number, vector in enumerate(table.vectors):
        yield from entry("vectors" if number == 0 else "", _vector(vector), indent)
    name_width = max(len(column.name) for column in table.columns)
    type_width = max(len(column.type) for column in table.columns)
    for number, column in enumerate(table.columns):
        text = f"{column.name:<{name_width}}  {column.type:<{type_width}}  {column.becomes}"
        yield f"{indent}{'columns' if number == 0 else '':<{LABEL}}{text}"
    indexes = ", ".join(f"{one['field']} ({one['type']})" for one in table.payload_indexes)
    yield from entry("indexes", indexes or "none on the payload", indent)
    if table.collection_config:
        settings = json.dumps(table.collection_config, ensure_ascii=False, default=str)
        yield from entry("settings", settings, indent)
    for label, sentences in (("warnings", table.warnings), ("notes", table.notes)):
        for number, sentence in enumerate(sentences):
            text = sentence.removeprefix(f"{table.table}: ")
            yield from entry(label if number == 0 else "", text, indent)


def _action(table: TableExplained) -> str:
    if table.points is None:
        return table.action
    return f"{table.action} (it holds {table.points} points)"


def _size(table: TableExplained) -> str:
    from cdc_sync.sync.progress import size_text

    rows = f"about {table.rows:,} rows" if table.rows is not None else "rows"
    chunks = "1 chunk" if table.chunks == 1 else f"{table.chunks:,} chunks"
    text = f"{rows} ({table.rows_from}), {size_text(table.bytes)} on disk, {chunks}"
    if table.vector_bytes:
        text += f"; vectors of {size_text(table.vector_bytes)} in Qdrant"
    return text


def _vector(vector: VectorExplained) -> str:
    name = vector.name or "(unnamed)"
    parts = [f"{name}: {vector.kind} {vector.datatype}"]
    if vector.dimension is not None:
        parts.append(f"{vector.dimension} dimensions from {vector.dimension_from}")
    parts.append(f"{vector.metric} from {vector.metric_from}")
    if vector.settings:
        parts.append(json.dumps(vector.settings, ensure_ascii=False))
    return ", ".join(parts)
