"""Decoders of types made of other types: arrays, composites, ranges, multiranges.

Sources: src/backend/utils/adt/{arrayfuncs,rowtypes,rangetypes,multirangetypes}.c of PostgreSQL, the
send and out functions. The type OIDs inside the binary formats are not looked at: the types are
known by name, and OIDs of extension types change.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from typing import Final, TypeAlias

from cdc_sync.mapping.decoding import Decoder, JsonValue, malformed

_INT32: Final = struct.Struct(">i")
_ARRAY_HEADER: Final = struct.Struct(">iii")
_FIELD_HEADER: Final = struct.Struct(">Ii")
#: MAXDIM of src/include/utils/array.h.
MAX_DIMENSIONS: Final = 6

_EMPTY, _LOWER_INCLUSIVE, _UPPER_INCLUSIVE = 0x01, 0x02, 0x04
_LOWER_INFINITE, _UPPER_INFINITE = 0x08, 0x10
_RANGE_FLAGS: Final = 0x1F

_ARRAY_BOUNDS: Final = re.compile(rb"(?:\[-?[0-9]+:-?[0-9]+\]){1,6}=")
_ESCAPED: Final = re.compile(rb"\\(.)", re.DOTALL)
_DOUBLED_OR_ESCAPED: Final = re.compile(rb'\\(.)|"(")', re.DOTALL)
_QUOTED_FIELD: Final = rb'"([^"\\]*(?:(?:\\.|"")[^"\\]*)*)"'
_FIELD: Final = re.compile(_QUOTED_FIELD + rb'|([^",()\\]*)', re.DOTALL)
_BOUND: Final = re.compile(_QUOTED_FIELD + rb'|([^",()\[\]\\]*)', re.DOTALL)

#: An element of an array's text, still nested by dimension.
_Nested: TypeAlias = "list[JsonValue]"


def _counted(data: bytes, offset: int, decode: Decoder) -> tuple[JsonValue, int]:
    """Decode an Int32 length (-1: NULL) and that many bytes; return the value and where it ends."""
    length: int = _INT32.unpack_from(data, offset)[0]
    start = offset + 4
    if length == -1:
        return None, start
    end = start + length
    if length < 0 or end > len(data):
        raise malformed()
    return decode(data[start:end]), end


def array_binary(element: Decoder) -> Decoder:
    """Return the decoder of an array.

    Layout: Int32 dimensions, Int32 has NULLs, element OID; for each dimension Int32 size and lower
    bound; then each element as Int32 length (-1: NULL) and bytes, the last dimension running
    fastest.
    """

    def binary(data: bytes) -> JsonValue:
        dimensions, _has_nulls, _oid = _ARRAY_HEADER.unpack_from(data)
        offset = 12 + 8 * dimensions
        if not 0 <= dimensions <= MAX_DIMENSIONS or len(data) < offset:
            raise malformed()
        if not dimensions:
            if len(data) != offset:
                raise malformed()
            return []
        sizes = [_INT32.unpack_from(data, 12 + 8 * index)[0] for index in range(dimensions)]
        count = 1
        for size in sizes:
            count *= size
        if min(sizes) <= 0 or count > (len(data) - offset) // 4:
            raise malformed()
        values: list[JsonValue] = []
        for _ in range(count):
            value, offset = _counted(data, offset, element)
            values.append(value)
        if offset != len(data):
            raise malformed()
        return _nest(values, sizes)

    return binary


def _nest(values: list[JsonValue], sizes: Sequence[int]) -> list[JsonValue]:
    for size in reversed(sizes[1:]):
        values = [values[start : start + size] for start in range(0, len(values), size)]
    return values


class _ArrayText:
    """A parser of array_out's text: ``{1,NULL,"a \\"b\\""}``, braces for each dimension."""

    def __init__(self, element: Decoder, delimiter: bytes) -> None:
        self._element = element
        quoted = rb'"([^"\\]*(?:\\.[^"\\]*)*)"'
        unquoted = rb'([^"\\{}' + delimiter + rb"]+)"
        self._token = re.compile(quoted + rb"|" + unquoted + rb"|([{}])", re.DOTALL)
        self._delimiter = delimiter

    def __call__(self, data: bytes) -> JsonValue:
        bounds = _ARRAY_BOUNDS.match(data)
        values, end = self._list(data, bounds.end() if bounds else 0, 1)
        if end != len(data):
            raise malformed()
        return values

    def _list(self, data: bytes, offset: int, depth: int) -> tuple[_Nested, int]:
        if depth > MAX_DIMENSIONS or data[offset : offset + 1] != b"{":
            raise malformed()
        offset += 1
        values: _Nested = []
        if data[offset : offset + 1] == b"}":
            return values, offset + 1
        while True:
            token = self._token.match(data, offset)
            if token is None or token[3] == b"}":
                raise malformed()
            if token[3] is not None:
                inner, offset = self._list(data, offset, depth + 1)
                values.append(inner)
            else:
                values.append(self._value(token))
                offset = token.end()
            mark = data[offset : offset + 1]
            offset += 1
            if mark == b"}":
                return values, offset
            if mark != self._delimiter:
                raise malformed()

    def _value(self, token: re.Match[bytes]) -> JsonValue:
        if token[2] is None:
            return self._element(_ESCAPED.sub(rb"\1", token[1]))
        if token[2].upper() == b"NULL":
            return None
        return self._element(token[2])


def array_text(element: Decoder, delimiter: bytes = b",") -> Decoder:
    """Return the decoder of an array's text output; ``delimiter`` is ``;`` for arrays of box."""
    return _ArrayText(element, delimiter)


def short_vector_binary(element: Decoder) -> Decoder:
    """Return the decoder of int2vector and oidvector: arrays, but an empty one has one dimension
    and not none.
    """
    array = array_binary(element)

    def binary(data: bytes) -> JsonValue:
        dimensions, _has_nulls, _oid = _ARRAY_HEADER.unpack_from(data)
        if dimensions == 1 and len(data) == 20 and not _INT32.unpack_from(data, 12)[0]:
            return []
        return array(data)

    return binary


def short_vector_text(element: Decoder) -> Decoder:
    """Return the decoder of the text output of int2vector and oidvector: elements with spaces
    between.
    """
    return lambda data: [element(item) for item in data.split()]


def composite_binary(fields: Sequence[tuple[str, Decoder]]) -> Decoder:
    """Return the decoder of a composite. Layout: Int32 fields; each type OID, Int32 length (-1:
    NULL), bytes.
    """

    def binary(data: bytes) -> JsonValue:
        if _INT32.unpack_from(data)[0] != len(fields):
            raise malformed()
        record: dict[str, JsonValue] = {}
        offset = 4
        for name, decode in fields:
            record[name], offset = _counted(data, offset + 4, decode)
        if offset != len(data):
            raise malformed()
        return record

    return binary


def _unquoted(match: re.Match[bytes]) -> bytes | None:
    """Return the text of a composite's field or a range's bound, None for a missing one."""
    if match[1] is not None:
        return _DOUBLED_OR_ESCAPED.sub(lambda found: found[1] or found[2], match[1])
    return match[2] or None


def composite_text(fields: Sequence[tuple[str, Decoder]]) -> Decoder:
    """Return the decoder of record_out's text: fields in parentheses, nothing at all for NULL."""

    def text(data: bytes) -> JsonValue:
        record: dict[str, JsonValue] = {}
        offset = 0
        for index, (name, decode) in enumerate(fields):
            if data[offset : offset + 1] != (b"," if index else b"("):
                raise malformed()
            match = _FIELD.match(data, offset + 1)
            if match is None:
                raise malformed()
            value = _unquoted(match)
            record[name] = None if value is None else decode(value)
            offset = match.end()
        if data[offset:] != (b")" if fields else b"()"):
            raise malformed()
        return record

    return text


def _range(lower: JsonValue, upper: JsonValue, bounds: str) -> JsonValue:
    return {"lower": lower, "upper": upper, "bounds": bounds}


def range_binary(subtype: Decoder) -> Decoder:
    """Return the decoder of a range.

    Layout: flags (1 empty, 2 lower inclusive, 4 upper inclusive, 8 no lower, 16 no upper), then
    each bound there is as Int32 length and bytes.
    """

    def binary(data: bytes) -> JsonValue:
        flags = data[0]
        if flags & ~_RANGE_FLAGS:
            raise malformed()
        offset = 1
        lower = upper = None
        empty = flags & _EMPTY
        if not empty and not flags & _LOWER_INFINITE:
            lower, offset = _counted(data, offset, subtype)
        if not empty and not flags & _UPPER_INFINITE:
            upper, offset = _counted(data, offset, subtype)
        if offset != len(data):
            raise malformed()
        if empty:
            return {"empty": True}
        opening = "[" if flags & _LOWER_INCLUSIVE else "("
        closing = "]" if flags & _UPPER_INCLUSIVE else ")"
        return _range(lower, upper, opening + closing)

    return binary


def _range_at(data: bytes, offset: int, subtype: Decoder) -> tuple[JsonValue, int]:
    """Parse ``[lower,upper)`` and return it with the offset of its end."""
    opening = data[offset : offset + 1]
    lower = _BOUND.match(data, offset + 1)
    if lower is None or opening not in (b"[", b"(") or data[lower.end() : lower.end() + 1] != b",":
        raise malformed()
    upper = _BOUND.match(data, lower.end() + 1)
    if upper is None:
        raise malformed()
    end = upper.end() + 1
    closing = data[end - 1 : end]
    if closing not in (b"]", b")"):
        raise malformed()
    low, high = _unquoted(lower), _unquoted(upper)
    value = _range(
        None if low is None else subtype(low),
        None if high is None else subtype(high),
        (opening + closing).decode("ascii"),
    )
    return value, end


def range_text(subtype: Decoder) -> Decoder:
    """Return the decoder of range_out's text: ``[1,10)``, ``empty``, bounds quoted as in
    composites.
    """

    def text(data: bytes) -> JsonValue:
        if data == b"empty":
            return {"empty": True}
        value, end = _range_at(data, 0, subtype)
        if end != len(data):
            raise malformed()
        return value

    return text


def multirange_binary(subtype: Decoder) -> Decoder:
    """Return the decoder of a multirange. Layout: Int32 ranges, each as Int32 length and range
    bytes.
    """
    one = range_binary(subtype)

    def binary(data: bytes) -> JsonValue:
        count: int = _INT32.unpack_from(data)[0]
        if not 0 <= count <= (len(data) - 4) // 4:
            raise malformed()
        ranges: list[JsonValue] = []
        offset = 4
        for _ in range(count):
            value, offset = _counted(data, offset, one)
            if value is None:
                raise malformed()
            ranges.append(value)
        if offset != len(data):
            raise malformed()
        return ranges

    return binary


def multirange_text(subtype: Decoder) -> Decoder:
    """Return the decoder of multirange_out's text: ``{[1,3),[5,8)}``."""

    def text(data: bytes) -> JsonValue:
        if data == b"{}":
            return []
        ranges: list[JsonValue] = []
        offset = 0
        while offset < len(data) - 1:
            if data[offset : offset + 1] != (b"," if ranges else b"{"):
                raise malformed()
            value, offset = _range_at(data, offset + 1, subtype)
            ranges.append(value)
        if data[offset:] != b"}":
            raise malformed()
        return ranges

    return text
