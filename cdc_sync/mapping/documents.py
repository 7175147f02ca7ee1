"""Decoders of json, jsonb and hstore.

Sources: src/backend/utils/adt/{json,jsonb}.c of PostgreSQL (jsonb sends a version number, then its
text), and contrib/hstore/hstore_io.c.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import orjson

from cdc_sync.mapping.decoding import INT64_MAX, INT64_MIN, Codec, JsonValue, malformed, plain
from cdc_sync.mapping.strings import text

#: Protobuf messages that a json value may nest below its own. Qdrant's parser (prost) refuses more
#: than 100 in all; the rest is for the request around the value and for arrays and composites
#: around the document.
MAX_NESTED_MESSAGES: Final = 60
#: What a level of nesting costs: ListValue and Value, or Struct, its map entry and Value.
LIST_MESSAGES: Final = 2
OBJECT_MESSAGES: Final = 3
#: So many levels are not too many, whatever they are.
_CERTAIN_LEVELS: Final = MAX_NESTED_MESSAGES // OBJECT_MESSAGES

#: The first byte of jsonb in binary.
JSONB_VERSION: Final = b"\x01"

_INT32: Final = struct.Struct(">i")
#: Numbers that may not fit int64 or a double, and escapes of lone surrogates: what the fast parser
#: would bend or refuse.
_NEEDS_CARE: Final = re.compile(rb"[0-9]{19}|[0-9][eE]\+?[0-9]{3}|\\u[dD][89a-fA-F]")
#: What a document must have for that expression to find anything, seen without looking for it byte
#: by byte: every digit becomes 0, E an e, and what is of no interest a blank.
_SHAPE: Final = bytes(
    0x30 if byte in b"0123456789" else 0x65 if byte in b"eE" else byte if byte == 0x5C else 0x20
    for byte in range(256)
)
_LONG_NUMBER: Final = b"0" * 19
_BACKSLASH: Final = 0x5C
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_HSTORE_PAIR: Final = re.compile(
    rb'"([^"\\]*(?:\\.[^"\\]*)*)"=>(?:"([^"\\]*(?:\\.[^"\\]*)*)"|NULL)(?:, (?=")|\Z)', re.DOTALL
)
_ESCAPED: Final = re.compile(rb"\\(.)", re.DOTALL)
_NOT_IN_TEXT: Final = re.compile(rb"[\x00\xff]")

#: From data, where a text begins and its length to where it ends.
_EndOfText: TypeAlias = Callable[[bytes, int, int], int]


def _parse_int(digits: str) -> int | str:
    if len(digits) > 20:
        return digits
    value = int(digits)
    return value if INT64_MIN <= value <= INT64_MAX else digits


def _parse_float(number: str) -> float | str:
    value = float(number)
    return value if math.isfinite(value) else number


def _no_constant(_name: str) -> JsonValue:
    raise malformed()


_CAREFUL: Final = json.JSONDecoder(
    parse_int=_parse_int, parse_float=_parse_float, parse_constant=_no_constant, strict=False
)


def _valid_text(value: JsonValue) -> JsonValue:
    """Return the value with lone surrogates, which are not Unicode text, replaced by U+FFFD."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_valid_text(item) for item in value]
    if isinstance(value, dict):
        return {_SURROGATE.sub("\ufffd", key): _valid_text(item) for key, item in value.items()}
    return value


def _nested_messages(value: JsonValue) -> int:
    if isinstance(value, list):
        return LIST_MESSAGES + max(map(_nested_messages, value), default=0)
    if isinstance(value, dict):
        return OBJECT_MESSAGES + max(map(_nested_messages, value.values()), default=0)
    return 0


def document(data: bytes) -> JsonValue:
    """Return a parsed JSON document; one nested too deep for Qdrant as its text.

    Integers beyond int64 and numbers beyond double become strings. Raises ValueError and
    RecursionError.
    """
    if may_nest_deep(data):
        return _large_document(data)
    return _parse(data)


def may_nest_deep(data: bytes) -> bool:
    """Tell whether a document may be nested too deep for Qdrant."""
    # Every level needs two bytes.
    return len(data) > 2 * _CERTAIN_LEVELS and data.count(b"[") + data.count(b"{") > _CERTAIN_LEVELS


def _large_document(data: bytes) -> JsonValue:
    try:
        value = _parse(data)
        if _nested_messages(value) <= MAX_NESTED_MESSAGES:
            return value
    except RecursionError:
        pass  # much deeper than any document that could be kept nested
    return text(data)


def _parse(data: bytes) -> JsonValue:
    shape = data.translate(_SHAPE)
    # find: to bytes, "in" is slower, but for a single byte.
    suspect = shape.find(b"0e") >= 0 or shape.find(_LONG_NUMBER) >= 0 or _BACKSLASH in shape
    if not (suspect and _NEEDS_CARE.search(data)):
        try:
            value: JsonValue = orjson.loads(data)
        except orjson.JSONDecodeError:
            pass  # bytes that are not UTF-8, or nesting beyond the fast parser
        else:
            return value
    return parse_with_care(data)


def parse_with_care(data: bytes) -> JsonValue:
    """Return a parsed JSON document, however deep, with integers and numbers that do not fit as
    strings. Raises ValueError and RecursionError.
    """
    careful: JsonValue = _CAREFUL.decode(text(data))
    return _valid_text(careful)


def _jsonb_binary(data: bytes) -> JsonValue:
    if data[:1] != JSONB_VERSION:
        raise malformed()
    return document(data[1:])


def _hstore_binary(data: bytes) -> JsonValue:
    """Layout: Int32 pairs; each Int32 length and key, Int32 length (-1: NULL) and value.

    Of a database that is not UTF-8 the lengths are those before the conversion to UTF-8.
    """
    count: int = _INT32.unpack_from(data)[0]
    if not 0 <= count <= (len(data) - 4) // 8:
        raise malformed()
    try:
        return _pairs(data, count, _counted_end)
    except (struct.error, ValueError):
        return _pairs(data, count, _converted_end)


def _pairs(data: bytes, count: int, end_of: _EndOfText) -> JsonValue:
    pairs: dict[str, JsonValue] = {}
    offset = 4
    for _ in range(count):
        key, offset = _counted_text(data, offset, end_of)
        if key is None:
            raise malformed()
        pairs[key], offset = _counted_text(data, offset, end_of)
    if offset != len(data):
        raise malformed()
    return pairs


def _counted_text(data: bytes, offset: int, end_of: _EndOfText) -> tuple[str | None, int]:
    length: int = _INT32.unpack_from(data, offset)[0]
    start = offset + 4
    if length == -1:
        return None, start
    if length < 0:
        raise malformed()
    end = end_of(data, start, length)
    return text(data[start:end]), end


def _counted_end(data: bytes, start: int, length: int) -> int:
    end = start + length
    # No text has a zero: it is of the next length, if this one counts other bytes than these.
    if end > len(data) or data.find(0, start, end) >= 0:
        raise malformed()
    return end


def _converted_end(data: bytes, start: int, length: int) -> int:
    # What follows is a length below 2^24 or -1, and neither of their first bytes is in UTF-8.
    if not length:
        return start
    following = _NOT_IN_TEXT.search(data, start)
    end = following.start() if following else len(data)
    # No encoding has more than four bytes for a character that has one in another.
    if not length <= 4 * (end - start) <= 16 * length:
        raise malformed()
    return end


def _hstore_text(data: bytes) -> JsonValue:
    pairs: dict[str, JsonValue] = {}
    offset = 0
    while offset < len(data):
        match = _HSTORE_PAIR.match(data, offset)
        if match is None:
            raise malformed()
        key = text(_ESCAPED.sub(rb"\1", match[1]))
        pairs[key] = None if match[2] is None else text(_ESCAPED.sub(rb"\1", match[2]))
        offset = match.end()
    return pairs


#: ``pg_catalog`` types by name.
CODECS: Final[Mapping[str, Codec]] = {
    "json": Codec(plain(document), plain(document)),
    "jsonb": Codec(plain(_jsonb_binary), plain(document)),
}

#: Types of extensions, by extension and name.
EXTENSION_CODECS: Final[Mapping[tuple[str, str], Codec]] = {
    ("hstore", "hstore"): Codec(plain(_hstore_binary), plain(_hstore_text)),
}
