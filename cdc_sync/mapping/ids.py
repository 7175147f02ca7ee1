"""Point ids, key texts and plan fingerprints.

A key that is one uuid is the id as it is, as is one integer that is not negative. Every other id is
the UUIDv5 (RFC 9562) of the key's canonical text, a compact JSON array of the key values as
strings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import struct
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import orjson

from cdc_sync.errors import MappingError
from cdc_sync.mapping import numbers
from cdc_sync.mapping.decoding import MALFORMED, DecodeOptions, describe, malformed
from cdc_sync.mapping.migration_ids import (
    MIGRATION_SCHEMES,
    SHARED_ID_REMEDY,
    SharedIdError,
    compile_migration_id,
)
from cdc_sync.mapping.plan import ColumnPlan, IdScheme, TablePlan, VectorPlan
from cdc_sync.mapping.strings import uuid_binary, uuid_text
from cdc_sync.mapping.table import PgType, TypeKind
from cdc_sync.mapping.values import raw_binary_decoder, raw_text_decoder
from cdc_sync.rows import UNCHANGED, PointId, Row, TextValue

PointIdFunction: TypeAlias = Callable[[Row], PointId]
_KeyPart: TypeAlias = Callable[[bytes], str]

#: The namespace of all hashed ids. Changing it changes every hashed id.
NAMESPACE_UUID: Final = "7f3e9d52-3a41-5d0b-9a53-0c8f6a2f4b11"
_NAMESPACE_BYTES: Final = bytes.fromhex(NAMESPACE_UUID.replace("-", ""))

_INTEGER_LAYOUTS: Final = {
    "int2": struct.Struct(">h"),
    "int4": struct.Struct(">i"),
    "int8": struct.Struct(">q"),
    "oid": struct.Struct(">I"),
}
#: Types whose payload value is text with one spelling for each value.
_STRING_TYPES: Final = frozenset(
    {"text", "varchar", "bpchar", "name", "char", "uuid", "date", "timestamp", "timestamptz"}
    | {"time", "timetz", "interval", "money", "inet", "cidr", "macaddr", "macaddr8", "bit"}
    | {"varbit", "bytea", "tsvector", "pg_lsn", "tid"}
)
_TEXT_TYPES: Final = frozenset({"text", "varchar", "bpchar", "name"})
_NUMBER_TYPES: Final = frozenset({*_INTEGER_LAYOUTS, "xid8", "bool", "float4", "float8", "numeric"})
_EXTENSION_KEYS: Final = frozenset({("citext", "citext"), ("ltree", "ltree")})
#: Only the spelling of which there is one for each uuid, and not version 8: those are the hashes of
#: other texts.
_TEXT_UUID: Final = re.compile(
    rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-79a-f][0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"
)


def is_key_type(type_: PgType) -> bool:
    """Tell whether a column of this type can be (part of) a key."""
    base = type_.base
    if base.kind is TypeKind.ENUM:
        return True
    if base.kind is not TypeKind.BASE:
        return False
    if base.extension is not None:
        return (base.extension, base.name) in _EXTENSION_KEYS
    return base.schema == "pg_catalog" and base.name in _STRING_TYPES | _NUMBER_TYPES


def id_scheme(types: Sequence[PgType], namespace: str | None, text_uuids: bool = False) -> IdScheme:
    """Return how keys of these column types become ids; with ``text_uuids`` texts that spell a
    uuid become that one.
    """
    if namespace is not None or len(types) != 1:
        return IdScheme.HASHED
    base = types[0].base
    if base.kind is TypeKind.BASE and base.schema == "pg_catalog":
        if base.name == "uuid":
            return IdScheme.UUID
        if base.name in _INTEGER_LAYOUTS:
            return IdScheme.INTEGER
        if text_uuids and base.name in ("text", "varchar"):
            return IdScheme.TEXT_UUID
    return IdScheme.HASHED


def hashed_id(text: str, version: int = 5) -> str:
    """Return the id of a canonical text: its UUIDv5, hyphenated; or the same as another version."""
    digest = hashlib.sha1(_NAMESPACE_BYTES + text.encode("utf-8"), usedforsecurity=False).digest()
    middle = bytes([digest[6] & 0x0F | version << 4, digest[7], digest[8] & 0x3F | 0x80])
    return uuid_binary(digest[:6] + middle + digest[9:16])


def compile_point_id(plan: TablePlan) -> PointIdFunction:
    """Compile the function from a row to its point id.

    Only key columns of the row are looked at. It raises :class:`MappingError` if one is NULL,
    UNCHANGED, or not a value of its type.
    """
    if plan.id_scheme is IdScheme.HASHED:
        text = compile_key_text(plan)
        namespace = plan.namespace
        if namespace is None:
            return lambda row: hashed_id(text(row))
        head = f"[{_json_string(namespace)},"
        return lambda row: hashed_id(f"{head}{text(row)}]")
    if plan.id_scheme is IdScheme.UUID:
        return _compile_uuid(plan)
    if plan.id_scheme is IdScheme.TEXT_UUID:
        return _compile_text_uuid(plan)
    if plan.id_scheme in MIGRATION_SCHEMES:
        return _compile_migration(plan)
    return _compile_integer(plan)


def key_plan(plan: TablePlan) -> TablePlan:
    """The plan of the table's key columns alone, in key order: for rows that have no other."""
    columns = tuple(plan.columns[position] for position in plan.key)
    return dataclasses.replace(plan, columns=columns, key=tuple(range(len(columns))))


def compile_key_id(plan: TablePlan) -> PointIdFunction:
    """As :func:`compile_point_id`, for rows of :func:`key_plan`."""
    return compile_point_id(key_plan(plan))


def _json_string(value: str) -> str:
    return orjson.dumps(value).decode("utf-8")


def _compile_uuid(plan: TablePlan) -> PointIdFunction:
    position = plan.key[0]
    column = plan.columns[position]

    def point_id(row: Row) -> PointId:
        value = row[position]
        if type(value) is bytes and len(value) == 16:
            return uuid_binary(value)
        if isinstance(value, TextValue):
            try:
                return uuid_text(value)
            except MALFORMED as error:
                raise _malformed_key(plan, column) from error
        raise _no_key(plan, column, value)

    return point_id


def _compile_text_uuid(plan: TablePlan) -> PointIdFunction:
    position = plan.key[0]
    text = compile_key_text(plan)

    def point_id(row: Row) -> PointId:
        value = row[position]
        if isinstance(value, bytes) and _TEXT_UUID.fullmatch(value):
            return value.decode("ascii")
        return hashed_id(text(row), version=8)

    return point_id


def _compile_integer(plan: TablePlan) -> PointIdFunction:
    position = plan.key[0]
    column = plan.columns[position]
    layout = _INTEGER_LAYOUTS[column.type.base.name]
    unpack, size = layout.unpack, layout.size
    parse = raw_text_decoder(column.type)

    def point_id(row: Row) -> PointId:
        value = row[position]
        if type(value) is bytes and len(value) == size:
            number: int = unpack(value)[0]
        elif isinstance(value, TextValue):
            try:
                number = int(str(parse(value)))
            except MALFORMED as error:
                raise _malformed_key(plan, column) from error
        else:
            raise _no_key(plan, column, value)
        return number if number >= 0 else hashed_id(f'["{number}"]')

    return point_id


def _compile_migration(plan: TablePlan) -> PointIdFunction:
    position = plan.key[0]
    column = plan.columns[position]
    binary, text = compile_migration_id(column.type, plan.id_scheme)

    def point_id(row: Row) -> PointId:
        value = row[position]
        if value is None or value is UNCHANGED:
            raise _no_key(plan, column, value)
        try:
            return text(value) if isinstance(value, TextValue) else binary(value)
        except SharedIdError as error:
            raise MappingError(
                f"{plan.qualified_name}: key column {column.name} holds a text that may have the "
                f'same point id as another key (ids = "{plan.id_scheme.value}")',
                SHARED_ID_REMEDY,
            ) from error
        except MALFORMED as error:
            raise _malformed_key(plan, column) from error

    return point_id


def _no_key(plan: TablePlan, column: ColumnPlan, value: object) -> MappingError:
    where = f"{plan.qualified_name}: key column {column.name}"
    if value is None:
        return MappingError(f"{where} is NULL")
    if value is UNCHANGED:
        return MappingError(f"{where} is not in the message")
    return _malformed_key(plan, column)


def _malformed_key(plan: TablePlan, column: ColumnPlan) -> MappingError:
    return MappingError(
        f"{plan.qualified_name}: key column {column.name} does not hold a value of type "
        f"{describe(column.type)}"
    )


def compile_key_text(plan: TablePlan) -> Callable[[Row], str]:
    """Compile the function from a row to its key's canonical text, without namespace:
    ``["acme","42"]``.

    Different keys have different texts. Errors of the function as of :func:`compile_point_id`.
    """
    parts = []
    for position in plan.key:
        column = plan.columns[position]
        if not is_key_type(column.type):
            raise MappingError(
                f"{plan.qualified_name}: column {column.name} of type {describe(column.type)} "
                "cannot be part of a key"
            )
        parts.append((position, column, *_key_part(column.type)))

    def key_text(row: Row) -> str:
        strings = []
        for position, column, binary, text in parts:
            value = row[position]
            if value is None or value is UNCHANGED:
                raise _no_key(plan, column, value)
            try:
                strings.append(text(value) if isinstance(value, TextValue) else binary(value))
            except MALFORMED as error:
                raise _malformed_key(plan, column) from error
        return orjson.dumps(strings).decode("utf-8")

    return key_text


def _key_part(type_: PgType) -> tuple[_KeyPart, _KeyPart]:
    """Return the functions from a key value (binary, text) to its canonical string."""
    base = type_.base
    if base.kind is TypeKind.ENUM or base.extension == "citext" or base.name in _TEXT_TYPES:
        return _strict_text, _strict_text
    if base.name == "numeric":
        return (
            lambda data: _canonical_numeric(numbers.numeric_text(data)),
            lambda data: _canonical_numeric(numbers.numeric_from_text(data)),
        )
    if base.name in ("float4", "float8"):
        layout = struct.Struct(">f" if base.name == "float4" else ">d")
        parse = numbers.parse_float4 if base.name == "float4" else numbers.parse_float8
        return (
            lambda data: _canonical_float(layout.unpack(data)[0]),
            lambda data: _canonical_float(parse(data)),
        )
    binary = raw_binary_decoder(type_, DecodeOptions())
    text = raw_text_decoder(type_, DecodeOptions())
    return lambda data: _canonical(binary(data)), lambda data: _canonical(text(data))


def _strict_text(data: bytes) -> str:
    # Not U+FFFD for bytes that are not UTF-8, as in payloads: different keys would get the same id.
    return data.decode("utf-8")


def _canonical_numeric(text: str) -> str:
    # 1.0 and 1.00 are the same key to Postgres.
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _canonical_float(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    if value == 0:
        return "0"  # Postgres holds 0 and -0 for the same key
    return repr(value).removesuffix(".0")


def _canonical(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if "\ufffd" in value:
            raise malformed()  # bytes that are not UTF-8; see _strict_text
        return value
    return str(value)


def plan_fingerprint(plan: TablePlan) -> str:
    """Return 32 hexadecimal digits that change when the points of the same rows would.

    Not part of it: OIDs, the order of columns, index settings. Equal for equal plans in every
    version of this program that maps them to equal points.
    """
    content = {
        "version": 1,
        "table": [plan.schema, plan.table],
        "collection": plan.collection,
        "columns": sorted(
            (_column_facts(column) for column in plan.columns), key=lambda facts: str(facts[0])
        ),
        "key": [plan.columns[position].name for position in plan.key],
        "id_scheme": plan.id_scheme.value,
        "namespace": plan.namespace,
        "drop_nulls": plan.drop_nulls,
        "numeric_as_string": plan.numeric_as_string,
    }
    # Only where used, so that plans without them keep their fingerprint.
    if plan.payload_key is not None:
        content["payload_key"] = plan.payload_key
    if plan.object_field is not None:
        content["object_field"] = plan.object_field
    if plan.constants:
        content["constants"] = sorted(plan.constants)
    if plan.shard is not None:
        content["shard"] = plan.shard
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def _column_facts(column: ColumnPlan) -> list[object]:
    vector = None if column.vector is None else _vector_facts(column.vector)
    facts: list[object] = [column.name, _type_facts(column.type), column.field, vector]
    return facts if column.part is None else [*facts, column.part.value]


def _vector_facts(vector: VectorPlan) -> list[object]:
    return [
        vector.name,
        vector.kind.value,
        vector.size,
        vector.metric.value,
        vector.datatype.value,
    ]


def _type_facts(type_: PgType) -> list[object]:
    """Return what of a type decides about its values. Of an extension type not its schema, which
    may differ.
    """
    owner = type_.extension if type_.extension is not None else type_.schema
    element = None if type_.element is None else _type_facts(type_.element)
    fields = [[name, _type_facts(field)] for name, field in type_.fields]
    return [type_.kind.value, owner, type_.name, type_.typmod, element, fields]
