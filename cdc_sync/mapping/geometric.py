"""Decoders of geometric types, and of PostGIS points.

Sources: src/backend/utils/adt/geo_ops.c of PostgreSQL; for PostGIS its documentation of EWKB
(geometry and geography send EWKB and print it in upper-case hexadecimal).
"""

from __future__ import annotations

import binascii
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from cdc_sync.mapping.decoding import (
    Codec,
    DecodeOptions,
    Decoder,
    JsonValue,
    Make,
    NonFiniteCount,
    malformed,
)
from cdc_sync.mapping.numbers import finite, parse_float8
from cdc_sync.mapping.table import PgType

#: Makes the JSON value from the coordinates and whether a path is open.
_Shape: TypeAlias = Callable[[Sequence[float], bool, NonFiniteCount], JsonValue]

_INT32: Final = struct.Struct(">i")
_NUMBER_TEXT: Final = re.compile(rb"[^()\[\]<>{},]+")
_SHAPE_TEXT: Final = re.compile(rb"[-+0-9.eEInfityNa()\[\]<>{},]+")
_EWKB_POINT: Final = 1
_EWKB_Z, _EWKB_M, _EWKB_SRID = 0x80000000, 0x40000000, 0x20000000
#: No SRID, and WGS 84: coordinates are longitude and latitude in degrees.
_GEOGRAPHIC_SRIDS: Final = frozenset({0, 4326})


def _xy(x: float, y: float, count: NonFiniteCount) -> JsonValue:
    return {"x": finite(x, count), "y": finite(y, count)}


def _points(numbers: Sequence[float], count: NonFiniteCount) -> JsonValue:
    return [_xy(numbers[i], numbers[i + 1], count) for i in range(0, len(numbers), 2)]


def _point(n: Sequence[float], _open: bool, count: NonFiniteCount) -> JsonValue:
    return _xy(n[0], n[1], count)


def _line(n: Sequence[float], _open: bool, count: NonFiniteCount) -> JsonValue:
    return {"a": finite(n[0], count), "b": finite(n[1], count), "c": finite(n[2], count)}


def _segment(n: Sequence[float], _open: bool, count: NonFiniteCount) -> JsonValue:
    return {"points": _points(n, count)}


def _box(n: Sequence[float], _open: bool, count: NonFiniteCount) -> JsonValue:
    return {"high": _xy(n[0], n[1], count), "low": _xy(n[2], n[3], count)}


def _circle(n: Sequence[float], _open: bool, count: NonFiniteCount) -> JsonValue:
    return {"center": _xy(n[0], n[1], count), "radius": finite(n[2], count)}


def _path(n: Sequence[float], is_open: bool, count: NonFiniteCount) -> JsonValue:
    return {"open": is_open, "points": _points(n, count)}


def _fixed_binary(size: int, shape: _Shape) -> Make:
    unpack = struct.Struct(f">{size}d").unpack

    def make(_type: PgType, options: DecodeOptions) -> Decoder:
        count = options.non_finite
        return lambda data: shape(unpack(data), False, count)

    return make


def _counted_binary(flagged: bool, shape: _Shape) -> Make:
    """Return the maker for path (closed flag, then as polygon) and polygon (Int32 points, then x
    and y of each).
    """

    def make(_type: PgType, options: DecodeOptions) -> Decoder:
        count = options.non_finite

        def binary(data: bytes) -> JsonValue:
            is_open = False
            if flagged:
                if data[0] > 1:
                    raise malformed()
                is_open = data[0] == 0
                data = data[1:]
            size: int = _INT32.unpack_from(data)[0]
            if size < 0 or len(data) != 4 + 16 * size:
                raise malformed()
            return shape(struct.unpack_from(f">{2 * size}d", data, 4), is_open, count)

        return binary

    return make


def _text(size: int | None, shape: _Shape) -> Make:
    """Return the maker for text output with ``size`` numbers (None: any even number)."""

    def make(_type: PgType, options: DecodeOptions) -> Decoder:
        count = options.non_finite

        def text(data: bytes) -> JsonValue:
            if _SHAPE_TEXT.fullmatch(data) is None:
                raise malformed()
            numbers = [parse_float8(number) for number in _NUMBER_TEXT.findall(data)]
            if len(numbers) != size if size is not None else len(numbers) % 2:
                raise malformed()
            return shape(numbers, data.startswith(b"["), count)

        return text

    return make


def _fixed(size: int, shape: _Shape) -> Codec:
    return Codec(_fixed_binary(size, shape), _text(size, shape))


def _ewkb(data: bytes) -> JsonValue:
    """Return ``{"lon", "lat"}`` of a geographic point, None of an empty one, else upper-case
    hexadecimal EWKB.

    Layout: byte order (0 big, 1 little), UInt32 type and flags, UInt32 SRID if flagged, then for a
    point x, y [, z] [, m].
    """
    if data[0] > 1 or len(data) < 5:
        raise malformed()
    order = "<" if data[0] else ">"
    (kind,) = struct.unpack_from(f"{order}I", data, 1)
    if kind & 0x1FFFFFFF == _EWKB_POINT:
        (srid,) = struct.unpack_from(f"{order}I", data, 5) if kind & _EWKB_SRID else (0,)
        offset = 9 if kind & _EWKB_SRID else 5
        dimensions = 2 + bool(kind & _EWKB_Z) + bool(kind & _EWKB_M)
        if len(data) != offset + 8 * dimensions:
            raise malformed()
        x, y = struct.unpack_from(f"{order}2d", data, offset)
        if math.isnan(x) and math.isnan(y):
            return None
        if srid in _GEOGRAPHIC_SRIDS and math.isfinite(x) and math.isfinite(y):
            return {"lon": x, "lat": y}
    return data.hex().upper()


def _ewkb_binary(_type: PgType, _options: DecodeOptions) -> Decoder:
    return _ewkb


def _ewkb_text(_type: PgType, _options: DecodeOptions) -> Decoder:
    return lambda data: _ewkb(binascii.unhexlify(data))


_EWKB: Final = Codec(_ewkb_binary, _ewkb_text)

#: ``pg_catalog`` types by name.
CODECS: Final[Mapping[str, Codec]] = {
    "point": _fixed(2, _point),
    "line": _fixed(3, _line),
    "lseg": _fixed(4, _segment),
    "box": _fixed(4, _box),
    "circle": _fixed(3, _circle),
    "path": Codec(_counted_binary(True, _path), _text(None, _path)),
    "polygon": Codec(_counted_binary(False, _segment), _text(None, _segment)),
}

#: Types of extensions, by extension and name.
EXTENSION_CODECS: Final[Mapping[tuple[str, str], Codec]] = {
    ("postgis", "geometry"): _EWKB,
    ("postgis", "geography"): _EWKB,
}
