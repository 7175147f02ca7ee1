"""Writes protobuf wire bytes: varints, and Qdrant's ``Value`` from JSON values.

Sources: protobuf.dev, "Encoding"; qdrant lib/api/src/grpc/proto/json_with_int.proto (``Value``:
null 1, double 2, integer 3, string 4, bool 5, struct 6, list 7; ``Struct.fields`` and
``ListValue.values`` are 1).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from cdc_sync.mapping.decoding import JsonValue

#: Numbers of two bytes: 14 bits.
_TABLE_SIZE: Final = 1 << 14
_LOW_BITS: Final = _TABLE_SIZE - 1
_pack_double: Final = struct.Struct("<d").pack

#: Heads of map entries kept, and the longest key one is kept of.
_KEPT_KEYS: Final = 1024
_KEPT_KEY_LENGTH: Final = 64

NULL: Final = b"\x08\x00"
TRUE: Final = b"\x28\x01"
FALSE: Final = b"\x28\x00"
DOUBLE: Final = b"\x11"
INTEGER: Final = b"\x18"
STRING: Final = b"\x22"
STRUCT: Final = b"\x32"


LIST: Final = b"\x3a"

#: Varints of numbers that have at most 14 bits, and the same bits before others that follow.
SMALL_VARINTS: Final = tuple(
    bytes((number,)) if number < 0x80 else bytes((number & 0x7F | 0x80, number >> 7))
    for number in range(_TABLE_SIZE)
)
_LOW_VARINTS: Final = tuple(
    bytes((number & 0x7F | 0x80, number >> 7 | 0x80)) for number in range(_TABLE_SIZE)
)


def varint(number: int) -> bytes:
    """Return a number from 0 to 2^64-1 as a varint."""
    if number < _TABLE_SIZE:
        return SMALL_VARINTS[number]
    return _LOW_VARINTS[number & _LOW_BITS] + varint(number >> 14)


def signed_varint(number: int) -> bytes:
    """Return an int64 as a varint (negative ones as 2^64 less, in ten bytes)."""
    if 0 <= number < _TABLE_SIZE:
        return SMALL_VARINTS[number]
    return varint(number & 0xFFFF_FFFF_FFFF_FFFF)


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
    return _ENCODERS[type(value)](value)


def _string(value: str) -> bytes:
    content = value.encode("utf-8")
    length = len(content)
    return STRING + (SMALL_VARINTS[length] if length < _TABLE_SIZE else varint(length)) + content


def _bool(value: bool) -> bytes:
    return TRUE if value else FALSE


def _integer(value: int) -> bytes:
    return INTEGER + signed_varint(value)


def _double(value: float) -> bytes:
    return DOUBLE + _pack_double(value)


def _list(value: list[JsonValue]) -> bytes:
    parts: list[bytes] = []
    for item in value:
        encoded = _ENCODERS[type(item)](item)
        parts += (b"\x0a", varint(len(encoded)), encoded)
    content = b"".join(parts)
    return LIST + varint(len(content)) + content


class _Heads(dict[str, bytes]):
    """The first field of a map entry and the tag of its second, by key."""

    def __missing__(self, key: str) -> bytes:
        content = key.encode("utf-8")
        head = b"\x0a%b%b\x12" % (varint(len(content)), content)
        if len(key) <= _KEPT_KEY_LENGTH:
            if len(self) >= _KEPT_KEYS:
                self.clear()
            self[key] = head
        return head


#: From a key to what comes before the length of its value in a map entry.
entry_head: Final = _Heads().__getitem__


def _struct(value: dict[str, JsonValue]) -> bytes:
    parts: list[bytes] = []
    for key, item in value.items():
        encoded = _ENCODERS[type(item)](item)
        head, length = entry_head(key), len(encoded)
        whole = len(head) + 1 + length
        if length < 0x80 and whole < _TABLE_SIZE:
            parts += (b"\x0a", SMALL_VARINTS[whole], head, SMALL_VARINTS[length], encoded)
        else:
            size = varint(length)
            parts += (b"\x0a", varint(whole - 1 + len(size)), head, size, encoded)
    content = b"".join(parts)
    return STRUCT + varint(len(content)) + content


#: By the exact type: a bool is an int to isinstance.
_ENCODERS: Final[Mapping[type, Callable[[Any], bytes]]] = {
    str: _string,
    type(None): lambda value: NULL,
    bool: _bool,
    int: _integer,
    float: _double,
    list: _list,
    dict: _struct,
}


def map_entry(key: bytes, value: bytes) -> bytes:
    """Return the content of a map entry (key 1, value 2) with a message as value."""
    return b"\x0a%b%b\x12%b%b" % (varint(len(key)), key, varint(len(value)), value)
