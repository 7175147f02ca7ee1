"""Encodes rows as protobuf bytes of Qdrant's API, straight from Postgres's bytes.

Field numbers are those of qdrant lib/api/src/grpc/proto/{points,json_with_int}.proto:
``PointStruct`` id 1, payload 3 (map), vectors 4; ``PointId`` num 1, uuid 2; ``Vectors`` vector 1,
vectors 2; ``NamedVectors.vectors`` 1 (map); ``Vector`` dense 101, sparse 102, multi_dense 103;
``DenseVector.data`` 1; ``SparseVector`` values 1, indices 2; ``MultiDenseVector.vectors`` 1. They
are the same from Qdrant 1.14 on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, NoReturn, TypeAlias

import numpy as np

from cdc_sync.errors import MappingError
from cdc_sync.mapping.column_options import selects
from cdc_sync.mapping.composed import compile_composed
from cdc_sync.mapping.decoding import MALFORMED, DecodeOptions, Decoder, NonFiniteCount, describe
from cdc_sync.mapping.plan import ColumnPlan, TablePlan, VectorKind
from cdc_sync.mapping.protobuf import (
    DOUBLE,
    FALSE,
    INTEGER,
    NULL,
    STRING,
    STRUCT,
    TRUE,
    delimited,
    encode_value,
    map_entry,
    signed_varint,
    tag,
    varint,
)
from cdc_sync.mapping.strings import uuid_binary
from cdc_sync.mapping.table import PgType, TypeKind
from cdc_sync.mapping.times import timestamp_binary
from cdc_sync.mapping.values import raw_binary_decoder, raw_text_decoder
from cdc_sync.mapping.vectors import (
    Indices,
    SparseArrays,
    VectorData,
    VectorReader,
    compile_vector,
    is_empty_array,
)
from cdc_sync.rows import UNCHANGED, PointId, Row, TextValue

#: From a value's bytes to the length and content of its payload map entry (all but the outer tag).
_Encoder: TypeAlias = Callable[[bytes], bytes]
#: From an encoded value to the same: ``_Frame`` puts key and lengths before it.
_Frame: TypeAlias = Callable[[bytes], bytes]

_POINT_PAYLOAD: Final = tag(3)
_POINT_VECTORS: Final = tag(4)
#: ``Struct.fields``
_FIELDS: Final = tag(1)
#: ``Vectors`` with an empty ``NamedVectors``: a point without vectors.
_NO_VECTORS: Final = tag(2) + b"\x00"
_DENSE, _SPARSE, _MULTI = 101, 102, 103
#: Entry headers kept by string length, a column; longer strings get theirs made each time.
_CACHED_HEADERS: Final = 2048


class _Field(NamedTuple):
    """A payload column: position in rows, its plan, encoders, and the entry that NULL becomes
    (None: left out).
    """

    position: int
    column: ColumnPlan
    binary: _Encoder
    text: _Encoder
    null: bytes | None


class _VectorField(NamedTuple):
    """A vector column: position in rows, the vector's name, readers, and the encoder of what they
    read.
    """

    position: int
    column: ColumnPlan
    name: str
    binary: VectorReader
    text: VectorReader
    encode: Callable[[VectorData], bytes]
    multi: bool


class WireCodec:
    """The compiled encoders of one plan. Rows must have the plan's columns, in its order.

    Every method that encodes raises :class:`MappingError`, naming table and column, for values that
    cannot be encoded. Not safe for use by several threads at once (it counts).
    """

    def __init__(self, plan: TablePlan) -> None:
        self._plan = plan
        self._width = len(plan.columns)
        self._non_finite = NonFiniteCount()
        self._fields = tuple(
            _payload_field(position, column, plan, self._non_finite)
            for position, column in enumerate(plan.columns)
            if column.field is not None and column.part is None
        )
        self._composed = compile_composed(plan, self._non_finite)
        # One unnamed vector is the message's ``vector``; beside others it is the one named "" among
        # them.
        self._unnamed = [vector.name for vector in plan.vectors] == [""]
        self._vectors = tuple(
            _vector_field(position, column, plan, self._unnamed)
            for position, column in enumerate(plan.columns)
            if column.vector is not None
        )
        # What is the same in every row.
        self._constants = [_entry(name, encode_value(value)) for name, value in plan.constants]
        self._marks = [_entry(name, encode_value(value)) for name, value in plan.marks]
        self._nest = None if plan.payload_key is None else _frame(plan.payload_key.encode("utf-8"))

    @property
    def plan(self) -> TablePlan:
        """The plan it was compiled from."""
        return self._plan

    @property
    def non_finite(self) -> int:
        """How many NaN and infinite numbers of payloads were written as null so far."""
        return self._non_finite.value

    def point_id(self, point_id: PointId) -> bytes:
        """Return a serialized ``PointId``."""
        if isinstance(point_id, int):
            return b"\x08" + varint(point_id)
        content = point_id.encode("ascii")
        return b"\x12" + varint(len(content)) + content

    def point(self, point_id: PointId, row: Row) -> bytes:
        """Return a serialized ``PointStruct`` of a row that is known in full."""
        if UNCHANGED in row:
            self._refuse_unchanged(row)
        identity = self.point_id(point_id)
        vectors = self.vectors(row) or _NO_VECTORS
        payload = self._payload(row, _POINT_PAYLOAD)
        return b"".join(
            (
                b"\x0a",
                varint(len(identity)),
                identity,
                payload,
                _POINT_VECTORS,
                varint(len(vectors)),
                vectors,
            )
        )

    def payload_entries(
        self, row: Row, field: int, kept: Mapping[str, bytes] | None = None
    ) -> bytes:
        """Return the known payload as entries of a ``map<string, Value>`` with the given field
        number. ``kept`` are serialized Values of fields that the row does not tell, by the names
        of :meth:`unknown_fields`.
        """
        return self._payload(row, tag(field), kept)

    def vectors(self, row: Row) -> bytes | None:
        """Return a serialized ``Vectors`` of the known vectors that are not NULL, or None."""
        self._check_width(row)
        parts = []
        for field in self._vectors:
            value = row[field.position]
            if value is None or value is UNCHANGED:
                continue
            read = field.text if isinstance(value, TextValue) else field.binary
            components = read(value)
            if components is not None:
                parts.append(field.encode(components))
        if not parts:
            return None
        content = parts[0] if len(parts) == 1 else b"".join(parts)
        return (b"\x0a" if self._unnamed else b"\x12") + varint(len(content)) + content

    def null_vectors(self, row: Row) -> list[str]:
        """Return the names of the vectors that the point must not have: NULL, or an empty array."""
        self._check_width(row)
        names = []
        for field in self._vectors:
            value = row[field.position]
            if value is UNCHANGED:
                continue
            if value is None or (field.multi and is_empty_array(value)):
                names.append(field.name)
        return names

    def has_unknown_payload(self, row: Row) -> bool:
        """Tell whether the value of some payload column is not in the row."""
        self._check_width(row)
        return any(row[field.position] is UNCHANGED for field in self._fields)

    def unknown_fields(self, row: Row) -> list[str]:
        """Return the columns' payload fields whose value is not in the row; with a ``payload_key``
        they are fields of that object.
        """
        if UNCHANGED not in row:
            return []
        self._check_width(row)
        return [
            str(field.column.field) for field in self._fields if row[field.position] is UNCHANGED
        ]

    def has_unknown_object(self, row: Row) -> bool:
        """Tell whether a column of the object that several columns make is not in the row: then the
        object is not in the payload, and can only come from the whole row.
        """
        return self._composed is not None and self._composed.unknown(row)

    def has_unknown_vectors(self, row: Row) -> bool:
        """Tell whether the value of some vector column is not in the row."""
        self._check_width(row)
        return any(row[field.position] is UNCHANGED for field in self._vectors)

    def known_fields(self, row: Row) -> set[str]:
        """Return the payload fields whose state the row tells, those left out for NULL included,
        on whatever level.
        """
        self._check_width(row)
        known = {
            str(field.column.field)
            for field in self._fields
            if row[field.position] is not UNCHANGED
        }
        known.update(name for name, _ in self._plan.constants)
        if self._plan.payload_key is not None:
            known.add(self._plan.payload_key)
        return known | {name for name, _ in self._plan.marks}

    def _payload(self, row: Row, outer: bytes, kept: Mapping[str, bytes] | None = None) -> bytes:
        entries = self._entries(row)
        if kept:
            entries += [_entry(name, value) for name, value in kept.items()]
        entries += self._constants
        if self._nest is not None:
            fields = _FIELDS.join(entries)
            entries = [b"", self._nest(b"%b%b%b" % (STRUCT, varint(len(fields)), fields))]
        entries += self._marks
        return outer.join(entries)

    def _entries(self, row: Row) -> list[bytes]:
        """Return the entries of the columns that are known, to be joined by their tag; the empty
        one in front puts it before each.
        """
        self._check_width(row)
        entries = [b""]
        field = None
        try:
            for field in self._fields:
                position, _, binary, text, null = field
                value = row[position]
                if type(value) is bytes:
                    entries.append(binary(value))
                elif value is None:
                    if null is not None:
                        entries.append(null)
                elif value is not UNCHANGED:
                    entries.append(text(value))
        except MALFORMED as error:
            raise self._malformed(field) from error
        if self._composed is not None:
            composed = self._composed.fields(row)
            entries += [_entry(name, encode_value(value)) for name, value in composed.items()]
        return entries

    def _malformed(self, field: _Field | None) -> MappingError:
        where = self._plan.qualified_name
        if field is None:
            return MappingError(f"{where}: a value is not of its column's type")
        column = field.column
        return MappingError(
            f"{where}: column {column.name} does not hold a value of type {describe(column.type)}"
        )

    def _check_width(self, row: Row) -> None:
        if len(row) != self._width:
            raise MappingError(
                f"{self._plan.qualified_name}: a row has {len(row)} values, the plan has "
                f"{self._width} columns"
            )

    def _refuse_unchanged(self, row: Row) -> NoReturn:
        names = [
            column.name
            for column, value in zip(self._plan.columns, row, strict=False)
            if value is UNCHANGED
        ]
        raise MappingError(
            f"{self._plan.qualified_name}: no whole point without the unchanged columns "
            f"{', '.join(names)}"
        )


# -- payload


def _entry(name: str, value: bytes) -> bytes:
    """Return length and content of a payload map entry."""
    entry = map_entry(name.encode("utf-8"), value)
    return varint(len(entry)) + entry


def _payload_field(
    position: int, column: ColumnPlan, plan: TablePlan, count: NonFiniteCount
) -> _Field:
    options = DecodeOptions(selects(plan.numeric_as_string, column.name), count)
    key = str(column.field).encode("utf-8")
    frame = _frame(key)
    binary = _fast_encoder(column.type, key, options)
    if binary is None:
        binary = _generic_encoder(raw_binary_decoder(column.type, options), frame)
    text = _generic_encoder(raw_text_decoder(column.type, options), frame)
    null = None if selects(plan.drop_nulls, column.name) else frame(NULL)
    return _Field(position, column, binary, text, null)


def _entry_header(key: bytes, value_length: int) -> bytes:
    """Return what comes before a value: the entry's length, the key, the value's tag and length."""
    before_value = b"\x0a%b%b\x12%b" % (varint(len(key)), key, varint(value_length))
    return varint(len(before_value) + value_length) + before_value


def _frame(key: bytes) -> _Frame:
    headers = tuple(_entry_header(key, length) for length in range(64))

    def frame(value: bytes) -> bytes:
        length = len(value)
        return (headers[length] if length < 64 else _entry_header(key, length)) + value

    return frame


def _generic_encoder(decode: Decoder, frame: _Frame) -> _Encoder:
    return lambda data: frame(encode_value(decode(data)))


def _string_headers(key: bytes) -> Callable[[int], bytes]:
    """Return the function from a string's length in bytes to everything before the string."""

    def make(length: int) -> bytes:
        value_header = STRING + varint(length)
        return _entry_header(key, len(value_header) + length) + value_header

    cached: dict[int, bytes] = {}

    def header(length: int) -> bytes:
        found = cached.get(length)
        if found is None:
            found = make(length)
            if length < _CACHED_HEADERS:
                cached[length] = found
        return found

    return header


def _text_encoder(key: bytes) -> _Encoder:
    header = _string_headers(key)

    def encode(data: bytes) -> bytes:
        if not data.isascii():
            try:
                data.decode("utf-8")
            except UnicodeDecodeError:
                data = data.decode("utf-8", "replace").encode("utf-8")
        return header(len(data)) + data

    return encode


def _ascii_encoder(key: bytes, decode: Callable[[bytes], str]) -> _Encoder:
    header = _string_headers(key)

    def encode(data: bytes) -> bytes:
        text = decode(data).encode("ascii")
        return header(len(text)) + text

    return encode


def _integer_encoder(key: bytes, form: str) -> _Encoder:
    unpack = struct.Struct(form).unpack
    headers = tuple(_entry_header(key, 1 + length) + INTEGER for length in range(11))

    def encode(data: bytes) -> bytes:
        number = signed_varint(unpack(data)[0])
        return headers[len(number)] + number

    return encode


def _bool_encoder(key: bytes) -> _Encoder:
    frame = _frame(key)
    entries = {b"\x00": frame(FALSE), b"\x01": frame(TRUE)}
    return entries.__getitem__


def _float_encoder(key: bytes, form: str, count: NonFiniteCount) -> _Encoder:
    unpack = struct.Struct(form).unpack
    pack = struct.Struct("<d").pack
    header = _entry_header(key, 9) + DOUBLE
    null = _frame(key)(NULL)

    def encode(data: bytes) -> bytes:
        number: float = unpack(data)[0]
        if number - number == 0:  # false for NaN and infinities, and cheaper than a call
            return header + pack(number)
        count.value += 1
        return null

    return encode


_TEXT_TYPES: Final = frozenset({"text", "varchar", "bpchar", "name", "xml"})
_INTEGER_FORMS: Final = {
    "int2": ">h",
    "int4": ">i",
    "int8": ">q",
    "oid": ">I",
}


def _fast_encoder(type_: PgType, key: bytes, options: DecodeOptions) -> _Encoder | None:
    """Return the encoder of a common type that skips the JSON value; None for other types."""
    base = type_.base
    if base.kind is TypeKind.ENUM or (base.extension, base.name) == ("citext", "citext"):
        return _text_encoder(key)
    if base.kind is not TypeKind.BASE or base.schema != "pg_catalog":
        return None
    if base.name in _TEXT_TYPES:
        return _text_encoder(key)
    if base.name in _INTEGER_FORMS:
        return _integer_encoder(key, _INTEGER_FORMS[base.name])
    if base.name == "bool":
        return _bool_encoder(key)
    if base.name in ("float4", "float8"):
        form = ">f" if base.name == "float4" else ">d"
        return _float_encoder(key, form, options.non_finite)
    if base.name == "uuid":
        return _ascii_encoder(key, uuid_binary)
    if base.name in ("timestamp", "timestamptz"):
        return _ascii_encoder(key, timestamp_binary)
    return None


# -- vectors


def _vector_field(
    position: int, column: ColumnPlan, plan: TablePlan, unnamed: bool
) -> _VectorField:
    vector = column.vector
    assert vector is not None
    binary, text = compile_vector(plan.qualified_name, column)
    name = vector.name.encode("utf-8")

    def wrap(message: bytes) -> bytes:
        """Return a ``Vector`` as it stands in ``Vectors``: alone, or as an entry of the map of
        names.
        """
        if unnamed:
            return message
        entry = map_entry(name, message)
        return delimited(1, entry)

    if vector.kind is VectorKind.SPARSE:
        encode = _sparse_encoder(wrap)
    elif vector.kind is VectorKind.MULTI:
        encode = _multi_encoder(wrap, vector.size or 0)
    else:
        encode = _dense_encoder(wrap, vector.size or 0)
    multi = vector.kind is VectorKind.MULTI
    return _VectorField(position, column, vector.name, binary, text, encode, multi)


def _dense_encoder(wrap: Callable[[bytes], bytes], size: int) -> Callable[[VectorData], bytes]:
    # Every vector of the column has the same size, so all that comes before the components is
    # always the same.
    zeros = bytes(4 * size)
    whole = wrap(delimited(_DENSE, delimited(1, zeros)))
    header = whole[: len(whole) - len(zeros)]

    def encode(components: VectorData) -> bytes:
        assert isinstance(components, np.ndarray)
        return header + components.tobytes()

    return encode


def _multi_encoder(wrap: Callable[[bytes], bytes], size: int) -> Callable[[VectorData], bytes]:
    whole = delimited(1, delimited(1, bytes(4 * size)))
    header = np.frombuffer(whole[: len(whole) - 4 * size], np.uint8)

    def encode(components: VectorData) -> bytes:
        assert isinstance(components, np.ndarray)
        rows = len(components)
        message = np.empty((rows, len(header) + 4 * size), np.uint8)
        message[:, : len(header)] = header
        message[:, len(header) :] = components.view(np.uint8).reshape(rows, 4 * size)
        return wrap(delimited(_MULTI, message.tobytes()))

    return encode


def _sparse_encoder(wrap: Callable[[bytes], bytes]) -> Callable[[VectorData], bytes]:
    def encode(vector: VectorData) -> bytes:
        assert isinstance(vector, SparseArrays)
        if not len(vector.indices):
            return wrap(delimited(_SPARSE, b""))
        return wrap(
            delimited(
                _SPARSE,
                delimited(1, vector.values.tobytes())
                + delimited(2, packed_varints(vector.indices)),
            )
        )

    return encode


def packed_varints(numbers: Indices) -> bytes:
    """Return 32-bit numbers as varints one after the other."""
    shifts = np.arange(0, 35, 7, dtype=np.uint64)
    groups = numbers.astype(np.uint64)[:, None] >> shifts
    # A group is written if it or a later one has bits, the first always; all but the last written
    # are marked.
    written = groups > 0
    written[:, 0] = True
    marked = np.zeros_like(written)
    marked[:, :-1] = written[:, 1:]
    octets = (groups & np.uint64(0x7F)).astype(np.uint8) | (marked.astype(np.uint8) << 7)
    return octets[written].tobytes()
