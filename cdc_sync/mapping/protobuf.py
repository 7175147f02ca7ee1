"""Writes protobuf wire bytes: varints, and Qdrant's ``Value`` from JSON values.

Sources: protobuf.dev, "Encoding"; qdrant lib/api/src/grpc/proto/json_with_int.proto (``Value``:
null 1, double 2, integer 3, string 4, bool 5, struct 6, list 7; ``Struct.fields`` and
``ListValue.values`` are 1).
"""

from __future__ import annotations

import struct
from typing import Final

from cdc_sync.mapping.decoding import JsonValue

_TABLE_SIZE: Final = 1 << 12
_pack_double: Final = struct.Struct("<d").pack

NULL: Final = b"\x08\x00"
TRUE: Final = b"\x28\x01"
FALSE: Final = b"\x28\x00"
DOUBLE: Final = b"\x11"
INTEGER: Final = b"\x18"
STRING: Final = b"\x22"
STRUCT: Final = b"\x32"


def _varint(number: int) -> bytes:
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


_VARINTS: Final = tuple(_varint(number) for number in range(_TABLE_SIZE))


def varint(number: int) -> bytes:
    """Return a number from 0 to 2^64-1 as a varint."""
    return _VARINTS[number] if number < _TABLE_SIZE else _varint(number)


def signed_varint(number: int) -> bytes:
    """Return an int64 as a varint (negative ones as 2^64 less, in ten bytes)."""
    if 0 <= number < _TABLE_SIZE:
        return _VARINTS[number]
    return _varint(number & 0xFFFF_FFFF_FFFF_FFFF)


def tag(field: int) -> bytes:
    """Return the tag of a length-delimited field."""
    return varint(field << 3 | 2)


def delimited(field: int, content: bytes) -> bytes:
    """Return a length-delimited field."""
    return tag(field) + varint(len(content)) + content


def encode_value(value: JsonValue) -> bytes:
    """Return a ``Value`` message. Integers must be within int64, floats finite, strings Unicode
    text.
    """
    if isinstance(value, str):
        content = value.encode("utf-8")
        return b"%b%b%b" % (STRING, varint(len(content)), content)
    if value is None:
        return NULL
    if isinstance(value, bool):
        return TRUE if value else FALSE
    if isinstance(value, int):
        return INTEGER + signed_varint(value)
    if isinstance(value, float):
        return DOUBLE + _pack_double(value)
    if isinstance(value, list):
        parts: list[bytes] = []
        for item in value:
            encoded = encode_value(item)
            parts += (b"\x0a", varint(len(encoded)), encoded)
        content = b"".join(parts)
        return b"\x3a%b%b" % (varint(len(content)), content)
    entries: list[bytes] = []
    for key, item in value.items():
        entry = map_entry(key.encode("utf-8"), encode_value(item))
        entries += (b"\x0a", varint(len(entry)), entry)
    content = b"".join(entries)
    return b"%b%b%b" % (STRUCT, varint(len(content)), content)


def map_entry(key: bytes, value: bytes) -> bytes:
    """Return the content of a map entry (key 1, value 2) with a message as value."""
    return b"\x0a%b%b\x12%b%b" % (varint(len(key)), key, varint(len(value)), value)
