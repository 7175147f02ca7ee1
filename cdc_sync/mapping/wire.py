"""Encodes rows as protobuf bytes of Qdrant's API, straight from Postgres's bytes.

Field numbers are those of qdrant lib/api/src/grpc/proto/{points,json_with_int}.proto:
``PointStruct`` id 1, payload 3 (map), vectors 4; ``PointId`` num 1, uuid 2; ``Vectors`` vector 1,
vectors 2; ``NamedVectors.vectors`` 1 (map); ``Vector`` dense 101, sparse 102, multi_dense 103;
``DenseVector.data`` 1; ``SparseVector`` values 1, indices 2; ``MultiDenseVector.vectors`` 1. They
are the same from Qdrant 1.14 on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import itemgetter
from typing import Final, NamedTuple, NoReturn, TypeAlias, cast

import numpy as np

from cdc_sync.errors import MappingError
from cdc_sync.mapping.composed import compile_composed
from cdc_sync.mapping.decoding import MALFORMED, NonFiniteCount, describe
from cdc_sync.mapping.entries import Encoder, compile_field, compile_frame, make_entry
from cdc_sync.mapping.plan import ColumnPlan, TablePlan, VectorKind
from cdc_sync.mapping.protobuf import STRUCT, delimited, encode_value, map_entry, tag, varint
from cdc_sync.mapping.unrolled import RowEncoder, compile_row
from cdc_sync.mapping.vectors import (
    BlockReader,
    Floats,
    Indices,
    SparseArrays,
    VectorData,
    VectorReader,
    compile_block,
    compile_vector,
    is_empty_array,
)
from cdc_sync.rows import UNCHANGED, PointId, RawValue, Row, TextValue

#: A payload column: position in rows, its encoders (binary, text), the entry that NULL becomes
#: (None: left out), and its plan. A plain tuple: taking one apart is quickest.
_Field: TypeAlias = tuple[int, Encoder, Encoder, "bytes | None", ColumnPlan]

#: Reads the components of a dense vector from its binary format.
DenseReader: TypeAlias = Callable[[bytes], Floats]
#: Bytes of vectors that are read together, about: with what becomes of them they stay in the
#: caches.
_BLOCK_BYTES: Final = 1 << 18
#: What comes before a point id that is a number, by the length of the varint.
_NUMBER_HEADS: Final = tuple(b"\x0a" + varint(size + 1) + b"\x08" for size in range(11))
_UUID_HEAD: Final = b"\x0a\x26\x12\x24"

_POINT_PAYLOAD: Final = tag(3)
_POINT_VECTORS: Final = tag(4)
#: ``Struct.fields``
_FIELDS: Final = tag(1)
#: ``Vectors`` with an empty ``NamedVectors``: a point without vectors.
_NO_VECTORS: Final = tag(2) + b"\x00"
_DENSE, _SPARSE, _MULTI = 101, 102, 103


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
        self._fields: tuple[_Field, ...] = tuple(
            (position, *compile_field(column, plan, self._non_finite), column)
            for position, column in enumerate(plan.columns)
            if column.field is not None and column.part is None
        )
        self._payload_values = _getter([position for position, *_ in self._fields])
        self._composed = compile_composed(plan, self._non_finite)
        # One unnamed vector is the message's ``vector``; beside others it is the one named "" among
        # them.
        self._unnamed = [vector.name for vector in plan.vectors] == [""]
        self._vectors = tuple(
            _vector_field(position, column, plan, self._unnamed)
            for position, column in enumerate(plan.columns)
            if column.vector is not None
        )
        self._single = self._compile_single()
        self._block = self._compile_block()
        # Columns that are only part of the key, or hidden.
        used = {position for position, *_ in self._fields}
        used.update(field.position for field in self._vectors)
        self._neither = tuple(i for i in range(self._width) if i not in used)
        # What is the same in every row.
        self._constants = [make_entry(name, encode_value(value)) for name, value in plan.constants]
        self._marks = [make_entry(name, encode_value(value)) for name, value in plan.marks]
        self._nest = (
            None if plan.payload_key is None else compile_frame(plan.payload_key.encode("utf-8"))
        )
        self._quick = self._compile_quick()

    def _compile_quick(self) -> RowEncoder | None:
        if self._composed is not None or self._nest is not None:
            return None
        fields = [(position, binary, null) for position, binary, _, null, _ in self._fields]
        return compile_row(self._width, fields, [*self._constants, *self._marks])

    def _compile_single(self) -> tuple[int, DenseReader, bytes] | None:
        """Where a point has one vector, and that is dense: its position, its reader, and all that
        comes before its components in a point. None: another shape.
        """
        if len(self._vectors) != 1:
            return None
        field = self._vectors[0]
        vector = field.column.vector
        if vector is None or vector.kind is not VectorKind.DENSE:
            return None
        # All vectors of the column have the same size, so what comes before never changes.
        zeros = np.zeros(vector.size or 0, "<f4")
        message = self._vectors_message(field.encode(zeros))
        point = _POINT_VECTORS + varint(len(message)) + message
        return field.position, cast("DenseReader", field.binary), point[: -zeros.nbytes or None]

    def _compile_block(self) -> tuple[int, int, BlockReader] | None:
        """Where a point has one vector, and that can be read with those of other rows: its
        position, how many together, and their reader.
        """
        if self._single is None:
            return None
        column = self._vectors[0].column
        assert column.vector is not None
        read = compile_block(column)
        rows = max(1, _BLOCK_BYTES // (4 * (column.vector.size or 1)))
        return None if read is None else (self._vectors[0].position, rows, read)

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

    def points(self, rows: Sequence[tuple[PointId, Row]]) -> list[bytes | MappingError]:
        """Return what :meth:`point` does for each row, or the error that it raises."""
        found: list[bytes | MappingError] = []
        for (id_, row), components in zip(rows, self._read_blocks(rows), strict=True):
            try:
                found.append(self._point(id_, row, components))
            except MappingError as error:
                found.append(error)
        return found

    def _read_blocks(self, rows: Sequence[tuple[PointId, Row]]) -> Iterator[memoryview | None]:
        """The components of each row's only vector; None where they are to be read alone."""
        if self._block is None:
            yield from repeat(None, len(rows))
            return
        position, together, read = self._block
        for start in range(0, len(rows), together):
            some = rows[start : start + together]
            values = [row[position] if len(row) > position else None for _, row in some]
            known = [value for value in values if type(value) is bytes]
            block = read(known) if len(known) > 1 else None
            vectors: Iterator[memoryview | None] = repeat(None) if block is None else iter(block)
            for value in values:
                yield next(vectors) if type(value) is bytes else None

    def point(self, point_id: PointId, row: Row) -> bytes:
        """Return a serialized ``PointStruct`` of a row that is known in full."""
        return self._point(point_id, row, None)

    def _point(self, point_id: PointId, row: Row, components: memoryview | None) -> bytes:
        for position in self._neither:
            if row[position] is UNCHANGED:
                self._refuse_unchanged(row)
        if isinstance(point_id, int):
            number = varint(point_id)
            head = _NUMBER_HEADS[len(number)] + number
        else:
            head = _UUID_HEAD + point_id.encode("ascii")
        payload = self._payload(row, _POINT_PAYLOAD, head=head, whole=True)
        if self._single is not None:
            position, read, before = self._single
            if components is None:
                value = row[position]
                if type(value) is bytes:
                    components = read(value).data
            if components is not None:
                # One copy of the components, from the array to where they stay.
                return b"".join((payload, before, components))
        vectors = self._whole_vectors(row) or _NO_VECTORS
        return b"".join((payload, _POINT_VECTORS, varint(len(vectors)), vectors))

    def payload_entries(
        self, row: Row, field: int, kept: Mapping[str, bytes] | None = None
    ) -> bytes:
        """Return the known payload as entries of a ``map<string, Value>`` with the given field
        number. ``kept`` are serialized Values of fields that the row does not tell, by the names
        of :meth:`unknown_fields`.
        """
        return self._payload(row, tag(field), kept)

    def partial(
        self, row: Row, kept: Mapping[str, bytes]
    ) -> tuple[bytes, bytes | None, tuple[str, ...]]:
        """Return what :meth:`payload_entries` (of field 1), :meth:`vectors` and
        :meth:`null_vectors` do.
        """
        payload = self._payload(row, _FIELDS, kept)
        for field in self._vectors:
            if row[field.position] is not UNCHANGED:
                return payload, self.vectors(row), tuple(self.null_vectors(row))
        return payload, None, ()

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
        return self._vectors_message(b"".join(parts))

    def _vectors_message(self, content: bytes) -> bytes:
        return (b"\x0a" if self._unnamed else b"\x12") + varint(len(content)) + content

    def _whole_vectors(self, row: Row) -> bytes | None:
        if any(row[field.position] is UNCHANGED for field in self._vectors):
            self._refuse_unchanged(row)
        return self.vectors(row)

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

    def unknown_fields(self, row: Row) -> list[str]:
        """Return the columns' payload fields whose value is not in the row; with a ``payload_key``
        they are fields of that object.
        """
        self._check_width(row)
        if UNCHANGED not in self._payload_values(row):
            return []
        return [
            str(column.field)
            for position, _, _, _, column in self._fields
            if row[position] is UNCHANGED
        ]

    def has_unknown_object(self, row: Row) -> bool:
        """Tell whether a column of the object that several columns make is not in the row: then the
        object is not in the payload, and can only come from the whole row.
        """
        return self._composed is not None and self._composed.unknown(row)

    def _payload(
        self,
        row: Row,
        outer: bytes,
        kept: Mapping[str, bytes] | None = None,
        *,
        head: bytes = b"",
        whole: bool = False,
    ) -> bytes:
        if self._quick is not None and not kept:
            counted = self._non_finite.value
            quick = self._quick(row, head)
            if quick is not None:
                return outer.join(quick)
            self._non_finite.value = counted  # the loop counts them again
        entries = self._entries(row, whole)
        if kept:
            entries += [make_entry(name, value) for name, value in kept.items()]
        entries += self._constants
        if self._nest is not None:
            fields = _FIELDS.join(entries)
            entries = [b"", self._nest(b"%b%b%b" % (STRUCT, varint(len(fields)), fields))]
        entries += self._marks
        entries[0] = head
        return outer.join(entries)

    def _entries(self, row: Row, whole: bool) -> list[bytes]:
        """Return the entries of the columns that are known, to be joined by their tag; the empty
        one in front puts it before each. ``whole``: all must be.
        """
        self._check_width(row)
        entries = [b""]
        column = None
        try:
            for position, binary, text, null, column in self._fields:  # noqa: B007
                value = row[position]
                if type(value) is bytes:
                    entries.append(binary(value))
                elif value is None:
                    if null is not None:
                        entries.append(null)
                elif value is not UNCHANGED:
                    entries.append(text(value))
                elif whole:
                    self._refuse_unchanged(row)
        except MALFORMED as error:
            raise self._malformed(column) from error
        if self._composed is not None:
            composed = self._composed.fields(row)
            entries += [make_entry(name, encode_value(value)) for name, value in composed.items()]
        return entries

    def _malformed(self, column: ColumnPlan | None) -> MappingError:
        where = self._plan.qualified_name
        if column is None:
            return MappingError(f"{where}: a value is not of its column's type")
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


def _getter(positions: Sequence[int]) -> Callable[[Row], Sequence[RawValue]]:
    """Return the function from a row to its values at these positions."""
    if len(positions) < 2:
        # For one position itemgetter gives the value itself.
        return lambda row: [row[position] for position in positions]
    return itemgetter(*positions)


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
