"""Compiles decoders of column values: a type tree becomes one closure that turns a value's bytes
into JSON.

There are two for every type, of its binary send format and of its text output (datestyle ISO,
timezone UTC, intervalstyle iso_8601, extra_float_digits 3, bytea_output hex). Both give equal
values. Types are told apart by name, schema and extension, never by OID.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Final

from cdc_sync.errors import MappingError
from cdc_sync.mapping import (
    documents,
    geometric,
    network,
    numbers,
    strings,
    structured,
    times,
    vectors,
)
from cdc_sync.mapping.decoding import (
    Codec,
    DecodeOptions,
    Decoder,
    DigitBudget,
    JsonValue,
    NonFiniteCount,
    describe,
    guarded,
)
from cdc_sync.mapping.table import PgType, TypeKind

__all__ = [
    "DecodeOptions",
    "Decoder",
    "JsonValue",
    "NonFiniteCount",
    "binary_decoder",
    "describe",
    "needs_text",
    "raw_binary_decoder",
    "raw_text_decoder",
    "text_decoder",
]

_CATALOG: Final[Mapping[str, Codec]] = {
    **numbers.CODECS,
    **times.CODECS,
    **strings.CODECS,
    **network.CODECS,
    **geometric.CODECS,
    **documents.CODECS,
}
_EXTENSIONS: Final[Mapping[tuple[str, str], Codec]] = {
    **strings.EXTENSION_CODECS,
    **geometric.EXTENSION_CODECS,
    **documents.EXTENSION_CODECS,
    **vectors.EXTENSION_CODECS,
}
#: Protobuf messages that a type tree may nest around its scalars, so that with a document inside,
#: and the request around, Qdrant's limit of 100 is kept.
_MAX_TYPE_MESSAGES: Final = 32


class _Format(Enum):
    BINARY = "binary"
    TEXT = "text"


def binary_decoder(type_: PgType, options: DecodeOptions | None = None) -> Decoder:
    """Compile the decoder of a type's binary send format.

    Raises :class:`MappingError` for a type that cannot be mapped; the decoder raises it for bytes
    that are not a value of the type, and nothing else.
    """
    return guarded(raw_binary_decoder(type_, options), type_, "binary")


def text_decoder(type_: PgType, options: DecodeOptions | None = None) -> Decoder:
    """Compile the decoder of a type's text output. Errors as :func:`binary_decoder`."""
    return guarded(raw_text_decoder(type_, options), type_, "text")


def raw_binary_decoder(type_: PgType, options: DecodeOptions | None = None) -> Decoder:
    """As :func:`binary_decoder`, but the decoder raises any of ``decoding.MALFORMED``; for callers
    that guard rows.
    """
    _check_nesting(type_)
    return _compile(type_, options or DecodeOptions(), _Format.BINARY)


def raw_text_decoder(type_: PgType, options: DecodeOptions | None = None) -> Decoder:
    """As :func:`text_decoder`, but the decoder raises any of ``decoding.MALFORMED``."""
    _check_nesting(type_)
    return _compile(type_, options or DecodeOptions(), _Format.TEXT)


def needs_text(type_: PgType) -> bool:
    """Tell whether a type without binary output lies below an array, composite or range.

    The server then fails when asked for the binary format of such a column, and with it the whole
    stream. A column whose own type has none is sent as text by itself and does no harm.
    """
    base = type_.base
    return any(not part.base.has_binary_output or needs_text(part) for part in _parts(base))


def _parts(type_: PgType) -> tuple[PgType, ...]:
    if type_.kind is TypeKind.COMPOSITE:
        return tuple(field for _, field in type_.fields)
    return () if type_.element is None else (type_.element,)


def _check_nesting(type_: PgType) -> None:
    if _nested_messages(type_) > _MAX_TYPE_MESSAGES:
        raise MappingError(
            f"type {describe(type_)} nests arrays and composites too deep for Qdrant, which takes "
            "100 protobuf messages in each other",
            "Leave the column out with `columns`.",
        )


def _nested_messages(type_: PgType) -> int:
    base = type_.base
    parts = _parts(base)
    if not parts:
        return 0
    own = {
        TypeKind.ARRAY: documents.LIST_MESSAGES * structured.MAX_DIMENSIONS,
        TypeKind.MULTIRANGE: documents.LIST_MESSAGES + documents.OBJECT_MESSAGES,
    }.get(base.kind, documents.OBJECT_MESSAGES)
    return own + max(map(_nested_messages, parts))


def _compile(type_: PgType, options: DecodeOptions, form: _Format) -> Decoder:
    base = type_.base
    if form is _Format.BINARY and options.digits is None and _has_numeric(_parts(base)):
        return _compile_bounded(base, options)
    if base.kind is TypeKind.ENUM:
        return strings.text
    if base.kind is TypeKind.COMPOSITE:
        fields = [(name, _compile(field, options, form)) for name, field in base.fields]
        if form is _Format.BINARY:
            return structured.composite_binary(fields)
        return structured.composite_text(fields)
    if base.kind in (TypeKind.ARRAY, TypeKind.RANGE, TypeKind.MULTIRANGE):
        return _compile_container(base, options, form)
    codec = _scalar(base)
    if codec is None:
        raise MappingError(
            f"type {describe(base)} has no counterpart in Qdrant",
            "Leave the column out with `columns`.",
        )
    return (codec.binary if form is _Format.BINARY else codec.text)(base, options)


def _has_numeric(parts: Iterable[PgType]) -> bool:
    bases = [part.base for part in parts]
    return any(_scalar(base) is numbers.NUMERIC or _has_numeric(_parts(base)) for base in bases)


def _compile_bounded(type_: PgType, options: DecodeOptions) -> Decoder:
    """Compile a type of many numbers so that a value of few bytes cannot fill the memory."""
    budget = DigitBudget()
    decode = _compile(type_, dataclasses.replace(options, digits=budget), _Format.BINARY)

    def bounded(data: bytes) -> JsonValue:
        budget.begin(len(data))
        return decode(data)

    return bounded


def _compile_container(type_: PgType, options: DecodeOptions, form: _Format) -> Decoder:
    if type_.element is None:
        raise MappingError(f"the element type of {describe(type_)} is not known")
    element = _compile(type_.element, options, form)
    binary = form is _Format.BINARY
    if type_.kind is TypeKind.RANGE:
        return structured.range_binary(element) if binary else structured.range_text(element)
    if type_.kind is TypeKind.MULTIRANGE:
        if binary:
            return structured.multirange_binary(element)
        return structured.multirange_text(element)
    if type_.schema == "pg_catalog" and type_.name in ("int2vector", "oidvector"):
        if binary:
            return structured.short_vector_binary(element)
        return structured.short_vector_text(element)
    if binary:
        return structured.array_binary(element)
    # Every type but box separates array elements by commas (pg_type.typdelim).
    base = type_.element.base
    delimiter = b";" if (base.schema, base.name) == ("pg_catalog", "box") else b","
    return structured.array_text(element, delimiter)


def _scalar(type_: PgType) -> Codec | None:
    if type_.kind is not TypeKind.BASE:
        return None
    if type_.extension is not None:
        return _EXTENSIONS.get((type_.extension, type_.name))
    if type_.schema == "pg_catalog":
        return _CATALOG.get(type_.name)
    return None
