"""Encodes json and jsonb as ``Value`` messages, by way of the fast parser where that bends nothing.

Numbers are looked at as they are written: the parser makes a float of an integer beyond uint64, so
only floats from 2^63 on, and integers beyond int64, may be other than the document has them (it
refuses what is beyond double, and lone surrogates). A document with one of these is parsed again
with care, as :mod:`cdc_sync.mapping.documents` does; both ways give equal values.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from cdc_sync.mapping.decoding import INT64_MAX, JsonValue
from cdc_sync.mapping.documents import document, may_nest_deep, parse_with_care
from cdc_sync.mapping.protobuf import (
    DOUBLE,
    FALSE,
    INTEGER,
    LIST,
    NULL,
    SMALL_VARINTS,
    STRING,
    STRUCT,
    TRUE,
    encode_value,
    entry_head,
    signed_varint,
    varint,
)

_BEYOND_INT64: Final = 2.0**63
_pack_double: Final = struct.Struct("<d").pack
_SMALL: Final = len(SMALL_VARINTS)
#: What comes before short texts and small integers: the length of their ``Value``, and its tag,
#: with the text's length; by the length of the text, or of the varint.
_TEXT_HEADS: Final = tuple(bytes((size + 2, STRING[0], size)) for size in range(126))
_INTEGER_HEADS: Final = tuple(bytes((size + 1, INTEGER[0])) for size in range(3))


class _NeedsCareError(Exception):
    """A number may not be what the document has."""


def encode_document(data: bytes) -> bytes:
    """Return the ``Value`` of what :func:`~cdc_sync.mapping.documents.document` makes of a JSON
    document. Raises as that does.
    """
    if may_nest_deep(data):
        return encode_value(document(data))
    try:
        value = orjson.loads(data)
        return _ENCODERS[type(value)](value)
    except (orjson.JSONDecodeError, _NeedsCareError):
        return encode_value(parse_with_care(data))


def _text(value: str) -> bytes:
    content = value.encode()
    return STRING + varint(len(content)) + content


def _integer(value: int) -> bytes:
    if value > INT64_MAX:
        raise _NeedsCareError
    return INTEGER + signed_varint(value)


def _double(value: float) -> bytes:
    if -_BEYOND_INT64 < value < _BEYOND_INT64:
        return DOUBLE + _pack_double(value)
    raise _NeedsCareError


def _list(value: list[JsonValue]) -> bytes:
    parts: list[bytes] = []
    for item in value:
        encoded = _ENCODERS[type(item)](item)
        parts += (b"\x0a", varint(len(encoded)), encoded)
    content = b"".join(parts)
    return LIST + varint(len(content)) + content


def _struct(value: dict[str, JsonValue]) -> bytes:
    parts: list[bytes] = []
    for key, item in value.items():
        head = entry_head(key)
        # Most of what is in documents is short texts and small integers.
        if type(item) is str:
            encoded = item.encode()
            size = len(encoded)
            before = _TEXT_HEADS[size] if size < 126 else _long_text(size)
        elif type(item) is int and 0 <= item < _SMALL:
            encoded = SMALL_VARINTS[item]
            before = _INTEGER_HEADS[len(encoded)]
        else:
            encoded = _ENCODERS[type(item)](item)
            before = varint(len(encoded))
        parts += (b"\x0a", varint(len(head) + len(before) + len(encoded)), head, before, encoded)
    content = b"".join(parts)
    return STRUCT + varint(len(content)) + content


def _long_text(size: int) -> bytes:
    before = STRING + varint(size)
    return varint(len(before) + size) + before


#: By the exact type: a bool is an int to isinstance.
_ENCODERS: Final[Mapping[type, Callable[[Any], bytes]]] = {
    str: _text,
    type(None): lambda value: NULL,
    bool: lambda value: TRUE if value else FALSE,
    int: _integer,
    float: _double,
    list: _list,
    dict: _struct,
}
