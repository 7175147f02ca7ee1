"""The object of a payload that several columns make together: for the layouts of other libraries.

A json column gives its members, other columns give one field each, and the text that LlamaIndex
keeps in a column of its own goes back into the node it belongs to. The object is made of whole rows
only: what is stored does not tell which field came from where.
"""

from __future__ import annotations

import json
import re
from typing import Final, NamedTuple

from cdc_sync.errors import MappingError
from cdc_sync.mapping.column_options import selects
from cdc_sync.mapping.decoding import (
    MALFORMED,
    DecodeOptions,
    Decoder,
    JsonValue,
    NonFiniteCount,
    describe,
)
from cdc_sync.mapping.plan import ColumnPlan, Part, TablePlan
from cdc_sync.mapping.values import raw_binary_decoder, raw_text_decoder
from cdc_sync.rows import UNCHANGED, Row, TextValue

#: Where LlamaIndex serializes a node, and where it looks for the text of one that is not there.
_NODE: Final = "_node_content"
_TEXT: Final = "text"
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class _Source(NamedTuple):
    position: int
    column: ColumnPlan
    binary: Decoder
    text: Decoder
    drop_null: bool


def compile_composed(plan: TablePlan, count: NonFiniteCount) -> ComposedObject | None:
    """Compile the object of a plan; None if it has none. ``count`` counts NaN and infinities."""
    sources = [
        _source(position, column, plan, count)
        for position, column in enumerate(plan.columns)
        if column.part not in (None, Part.HIDDEN)
    ]
    return ComposedObject(plan, sources) if sources else None


def _source(position: int, column: ColumnPlan, plan: TablePlan, count: NonFiniteCount) -> _Source:
    options = DecodeOptions(selects(plan.numeric_as_string, column.name), count)
    return _Source(
        position,
        column,
        raw_binary_decoder(column.type, options),
        raw_text_decoder(column.type, options),
        selects(plan.drop_nulls, column.name),
    )


class ComposedObject:
    """Makes the object of rows that have the plan's columns, in its order."""

    def __init__(self, plan: TablePlan, sources: list[_Source]) -> None:
        self._plan = plan
        self._sources = sources
        # A field of the object that is another's in the payload too would overwrite it.
        self._taken: frozenset[str] = frozenset()
        if plan.object_field is None:
            fields = {c.field for c in plan.columns if c.part is None and c.field is not None}
            constants = {name for name, _ in plan.constants}
            self._taken = frozenset(fields | constants | {name for name, _ in plan.marks})

    def unknown(self, row: Row) -> bool:
        """Tell whether the row lacks a column of the object."""
        return any(row[source.position] is UNCHANGED for source in self._sources)

    def fields(self, row: Row) -> dict[str, JsonValue]:
        """Return the payload fields that the object is; none if the row lacks one of its columns.

        Raises :class:`MappingError`, naming table and column.
        """
        if self.unknown(row):
            return {}
        content: dict[str, JsonValue] = {}
        single: dict[str, JsonValue] = {}
        node_text: JsonValue = None
        for source in self._sources:
            column, value = source.column, self._value(source, row)
            if column.part is Part.NODE_TEXT:
                node_text = value
            elif column.part is Part.MEMBER:
                if value is not None or not source.drop_null:
                    single[column.field or column.name] = value
            elif isinstance(value, dict):
                content.update(value)
            elif value is not None:
                # Not an object, and so without members.
                single[column.name] = value
        content.update(single)
        if isinstance(node_text, str):
            _put_text(content, node_text)
        if self._plan.object_field is not None:
            return {self._plan.object_field: content}
        return {name: value for name, value in content.items() if name not in self._taken}

    def _value(self, source: _Source, row: Row) -> JsonValue:
        value = row[source.position]
        if value is None or value is UNCHANGED:
            return None
        try:
            return source.text(value) if isinstance(value, TextValue) else source.binary(value)
        except MALFORMED as error:
            raise MappingError(
                f"{self._plan.qualified_name}: column {source.column.name} does not hold a value "
                f"of type {describe(source.column.type)}"
            ) from error


def _put_text(content: dict[str, JsonValue], text: str) -> None:
    """Put a node's text where ``QdrantVectorStore`` of LlamaIndex reads it.

    ``PGVectorStore`` serializes nodes without it (``node_to_metadata_dict`` in
    llama_index/core/vector_stores/utils.py, ``remove_text``). What is no serialized node is of an
    older version, which read the text from a field beside.
    """
    node = _parsed(content.get(_NODE))
    if node is None:
        content.setdefault(_TEXT, text)
        return
    if _TEXT in node:
        node[_TEXT] = text
    else:
        node = _with_resource(node, text)
    content[_NODE] = _SURROGATE.sub("\ufffd", json.dumps(node, ensure_ascii=False))


def _with_resource(node: dict[str, object], text: str) -> dict[str, object]:
    """Return a node of the class ``Node``, whose text is one of its resources, the first."""
    resource = {"embeddings": None, "text": text, "path": None, "url": None, "mimetype": None}
    found: dict[str, object] = {}
    for name, value in node.items():
        if name == "image_resource":
            found["text_resource"] = resource
        found[name] = value
    found.setdefault("text_resource", resource)
    return found


def _parsed(content: JsonValue) -> dict[str, object] | None:
    if not isinstance(content, str):
        return None
    try:
        node = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return node if isinstance(node, dict) else None
