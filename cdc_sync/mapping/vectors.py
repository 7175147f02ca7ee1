"""Reads pgvector's types: vector, halfvec, sparsevec, and bit as a vector; arrays of vectors as
multivectors.

Binary formats (all big endian; pgvector src/{vector,halfvec,sparsevec}.c, the ``*_send``
functions):

- vector: Int16 dimension, Int16 0, float4 components
- halfvec: Int16 dimension, Int16 0, float2 components
- sparsevec: Int32 dimension, Int32 stored values, Int32 0, Int32 indices (0-based, ascending),
  float4 values
- bit: Int32 bits, then bytes with the most significant bit first

Text forms: ``[1,2.5]``, and ``{1:1.5,3:2}/5`` with 1-based indices.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from cdc_sync.errors import MappingError
from cdc_sync.mapping.decoding import (
    MALFORMED,
    Codec,
    DecodeOptions,
    Decoder,
    JsonValue,
    NonFiniteCount,
    describe,
    malformed,
)
from cdc_sync.mapping.plan import ColumnPlan, Metric, VectorKind, VectorPlan
from cdc_sync.mapping.structured import array_text
from cdc_sync.mapping.table import PgType, TypeKind
from cdc_sync.rows import TextValue

Floats: TypeAlias = npt.NDArray[np.float32]
Indices: TypeAlias = npt.NDArray[np.uint32]


class SparseArrays(NamedTuple):
    """A sparse vector: 0-based ascending indices, and as many values, little endian; ``size`` is
    its dimension.
    """

    indices: Indices
    values: Floats
    size: int


@dataclass(frozen=True, slots=True)
class SparseValue:
    """A sparse vector as Python numbers; indices are 0-based and ascending."""

    indices: list[int]
    values: list[float]


#: What a vector column holds: components (dense), components by row (multi), or a sparse vector.
#: All arrays are little endian float32. None: an empty array of vectors, which is no vector.
VectorData: TypeAlias = Floats | SparseArrays | None
VectorReader: TypeAlias = Callable[[bytes], VectorData]
#: From values of a dense vector column to the components of each (little endian float32); None if
#: one of them is not as it should be, or may not be.
BlockReader: TypeAlias = Callable[[Sequence[bytes]], "list[memoryview] | None"]

#: Qdrant takes multivectors of fewer components than this in all (lib/common validation).
MAX_MULTIVECTOR_COMPONENTS: Final = 1_048_576

_DENSE_HEADER: Final = struct.Struct(">Hh")
_SPARSE_HEADER: Final = struct.Struct(">iii")
_INT32: Final = struct.Struct(">i")
_ARRAY_HEADER: Final = struct.Struct(">iii")
_NUMBERS_TEXT: Final = re.compile(rb"[-+0-9.eE]+(?:,[-+0-9.eE]+)*")
_SPARSE_TEXT: Final = re.compile(
    rb"\{((?:[0-9]{1,10}:[-+0-9.eE]+(?:,[0-9]{1,10}:[-+0-9.eE]+)*)?)\}/([0-9]{1,10})"
)


class _DimensionError(Exception):
    """A vector has ``actual`` dimensions and not those of the plan."""

    def __init__(self, actual: int) -> None:
        super().__init__(actual)
        self.actual = actual


def vector_base(type_: PgType) -> PgType:
    """Return the type whose values become vectors: the type under domains, of an array the type
    under its elements.
    """
    base = type_.base
    if base.kind is TypeKind.ARRAY and base.element is not None:
        return base.element.base
    return base


def declared_dimension(type_: PgType) -> int | None:
    """Return the dimension that a vector or bit column (or an array of them) declares, by itself or
    through domains.
    """
    current: PgType | None = type_
    while current is not None:
        if current.typmod >= 0:
            return current.typmod
        current = current.element
    return None


# -- components


def _dense_binary(component: str) -> Callable[[bytes], Floats]:
    width = np.dtype(component).itemsize

    def read(data: bytes) -> Floats:
        dimension, unused = _DENSE_HEADER.unpack_from(data)
        if unused or len(data) != 4 + width * dimension:
            raise malformed()
        return np.frombuffer(data, component, dimension, 4).astype("<f4")

    return read


def _parse_floats(data: bytes) -> Floats:
    if _NUMBERS_TEXT.fullmatch(data) is None:
        raise malformed()
    with np.errstate(over="ignore"):
        return np.array([float(number) for number in data.split(b",")], dtype="<f8").astype("<f4")


def _dense_text(data: bytes) -> Floats:
    if data[:1] != b"[" or data[-1:] != b"]":
        raise malformed()
    return _parse_floats(data[1:-1])


def _bits_binary(data: bytes) -> Floats:
    count: int = _INT32.unpack_from(data)[0]
    if count < 0 or len(data) != 4 + (count + 7) // 8:
        raise malformed()
    return np.unpackbits(np.frombuffer(data, np.uint8, -1, 4), count=count).astype("<f4")


def _bits_text(data: bytes) -> Floats:
    if data.strip(b"01"):
        raise malformed()
    return (np.frombuffer(data, np.uint8) - 48).astype("<f4")


def _sparse_binary(data: bytes) -> SparseArrays:
    size, count, unused = _SPARSE_HEADER.unpack_from(data)
    if size <= 0 or not 0 <= count <= size or unused or len(data) != 12 + 8 * count:
        raise malformed()
    indices = np.frombuffer(data, ">u4", count, 12).astype("<u4")
    values = np.frombuffer(data, ">f4", count, 12 + 4 * count).astype("<f4")
    return _checked_sparse(SparseArrays(indices, values, size))


def _sparse_text(data: bytes) -> SparseArrays:
    match = _SPARSE_TEXT.fullmatch(data)
    if match is None:
        raise malformed()
    pairs = [pair.split(b":") for pair in match[1].split(b",")] if match[1] else []
    # Text counts from 1, the binary format and Qdrant from 0.
    indices = np.array([int(index) - 1 for index, _ in pairs], dtype="<i8")
    if len(indices) and (indices.min() < 0 or indices.max() > 0xFFFFFFFF):
        raise malformed()
    values = _parse_floats(b",".join(value for _, value in pairs)) if pairs else np.zeros(0, "<f4")
    return _checked_sparse(SparseArrays(indices.astype("<u4"), values, int(match[2])))


def _checked_sparse(vector: SparseArrays) -> SparseArrays:
    indices = vector.indices
    if len(indices) and (int(indices[-1]) >= vector.size or (indices[1:] <= indices[:-1]).any()):
        raise malformed()
    return vector


#: Types whose binary format is a header and components.
_COMPONENTS: Final = {"vector": ">f4", "halfvec": ">f2"}
#: As many as their header can say.
_MOST_DIMENSIONS: Final = 0xFFFF

_DENSE_BINARY: Final[Mapping[str, Callable[[bytes], Floats]]] = {
    "vector": _dense_binary(_COMPONENTS["vector"]),
    "halfvec": _dense_binary(_COMPONENTS["halfvec"]),
    "bit": _bits_binary,
    "varbit": _bits_binary,
}
_DENSE_TEXT: Final[Mapping[str, Callable[[bytes], Floats]]] = {
    "vector": _dense_text,
    "halfvec": _dense_text,
    "bit": _bits_text,
    "varbit": _bits_text,
}


# -- vector columns


def compile_vector(table: str, column: ColumnPlan) -> tuple[VectorReader, VectorReader]:
    """Compile the readers (of binary, of text) of a vector column.

    They check dimension and finiteness, and raise :class:`MappingError` naming table and column,
    nothing else.
    """
    plan = column.vector
    if plan is None:
        raise MappingError(f"{table}: column {column.name} is not a vector")
    base = vector_base(column.type)
    if plan.kind is VectorKind.SPARSE:
        binary, text = _compile_sparse()
    elif base.name not in _DENSE_BINARY:
        raise MappingError(
            f"{table}: column {column.name} of type {describe(column.type)} cannot become a vector"
        )
    elif plan.kind is VectorKind.MULTI:
        binary, text = _compile_multi(base.name, plan)
    else:
        binary, text = _compile_dense(base.name, plan)
    return _guard(binary, table, column, plan), _guard(text, table, column, plan)


def _guard(read: VectorReader, table: str, column: ColumnPlan, plan: VectorPlan) -> VectorReader:
    def read_or_refuse(data: bytes) -> VectorData:
        try:
            return read(data)
        except _DimensionError as error:
            raise MappingError(
                f"{table}: column {column.name} has a vector of {error.actual} dimensions, "
                f"the vector in the collection has {plan.size}"
            ) from error
        except _NotFiniteError as error:
            raise MappingError(f"{table}: column {column.name} has a vector {error}") from error
        except MALFORMED as error:
            raise MappingError(
                f"{table}: column {column.name}: {len(data)} bytes are not a value of type "
                f"{describe(column.type)}"
            ) from error

    return read_or_refuse


class _NotFiniteError(Exception):
    """A vector has components that Qdrant would store without complaint and search wrongly."""


def _squared_length(components: Floats) -> float:
    # Not ndarray.dot: that warns of overflow, and to keep it quiet costs more than the product.
    return float(np.vdot(components, components))


def _check_finite(components: Floats, metric: Metric) -> None:
    """Refuse NaN and infinities, and under Cosine what cannot be normalised.

    The sum of squares is the cheapest sound test: NaN and infinities always show in it. Finite
    components from about 1e19 overflow it too; Qdrant, which normalises in float32, would store
    such a vector as zeros.
    """
    if math.isfinite(_squared_length(components)):
        return
    if not np.isfinite(components).all():
        raise _NotFiniteError("with components that are not finite")
    if metric is Metric.COSINE:
        raise _NotFiniteError("too long to be normalised in float32, as the metric Cosine needs")


def _compile_dense(name: str, plan: VectorPlan) -> tuple[VectorReader, VectorReader]:
    size, metric = plan.size, plan.metric

    def checked(read: Callable[[bytes], Floats]) -> VectorReader:
        def reader(data: bytes) -> VectorData:
            components = read(data)
            if components.size != size:
                raise _DimensionError(components.size)
            _check_finite(components, metric)
            return components

        return reader

    binary, text = checked(_DENSE_BINARY[name]), checked(_DENSE_TEXT[name])
    if name in _COMPONENTS and size is not None and 0 < size <= _MOST_DIMENSIONS:
        return _quick_dense(_COMPONENTS[name], size, binary), text
    return binary, text


def _quick_dense(component: str, size: int, careful: VectorReader) -> VectorReader:
    """Return the reader of vectors of one size; ``careful`` says what is wrong with all others."""
    source, target = np.dtype(component), np.dtype("<f4")
    header = _DENSE_HEADER.pack(size, 0)
    length = len(header) + source.itemsize * size
    view, product, isfinite = np.frombuffer, np.vdot, math.isfinite

    def reader(data: bytes) -> VectorData:
        if len(data) == length and data.startswith(header):
            components = view(data, source, size, 4).astype(target)
            if isfinite(product(components, components)):
                return components
        return careful(data)

    return reader


def compile_block(column: ColumnPlan) -> BlockReader | None:
    """Compile the reader of many values of a column at once; None for columns that have none.

    It takes a quarter of the time that reading them one by one does; that says what is wrong.
    """
    plan = column.vector
    base = vector_base(column.type)
    if plan is None or plan.kind is not VectorKind.DENSE or base.name not in _COMPONENTS:
        return None
    size = plan.size or 0
    if not 0 < size <= _MOST_DIMENSIONS:
        return None
    layout = np.dtype([("header", ">u4"), ("components", _COMPONENTS[base.name], (size,))])
    (header,) = _INT32.unpack(_DENSE_HEADER.pack(size, 0))
    header, length, width = header & 0xFFFFFFFF, layout.itemsize, 4 * size

    def reader(values: Sequence[bytes]) -> list[memoryview] | None:
        if set(map(len, values)) != {length}:
            return None
        block = np.frombuffer(b"".join(values), layout)
        if (block["header"] != header).any():
            return None
        components = block["components"].astype("<f4").reshape(-1)
        # Where one is not finite, or too long, the sum shows it; where all together are too long,
        # they are read one by one.
        if not math.isfinite(_squared_length(components)):
            return None
        data = components.data.cast("B")
        return [data[start : start + width] for start in range(0, len(data), width)]

    return reader


def _compile_sparse() -> tuple[VectorReader, VectorReader]:
    def checked(read: Callable[[bytes], SparseArrays]) -> VectorReader:
        def reader(data: bytes) -> VectorData:
            vector = read(data)
            _check_finite(vector.values, Metric.DOT)
            return vector

        return reader

    return checked(_sparse_binary), checked(_sparse_text)


def _compile_multi(name: str, plan: VectorPlan) -> tuple[VectorReader, VectorReader]:
    split_text = array_text(lambda item: item.decode("ascii"))
    text_element = _DENSE_TEXT[name]

    def text(data: bytes) -> VectorData:
        items = split_text(data)
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise malformed()
        return _stack([text_element(str(item).encode("ascii")) for item in items], plan)

    element = _DENSE_BINARY[name]

    def binary(data: bytes) -> VectorData:
        return _stack([element(item) for item in _array_items(data)], plan)

    return binary, text


def _array_items(data: bytes) -> list[bytes]:
    """Return the elements of a one-dimensional binary array; NULL among them is malformed."""
    dimensions, _has_nulls, _oid = _ARRAY_HEADER.unpack_from(data)
    if not dimensions and len(data) == 12:
        return []
    count: int = _INT32.unpack_from(data, 12)[0]
    if dimensions != 1 or not 0 < count <= (len(data) - 20) // 4:
        raise malformed()
    items = []
    offset = 20
    for _ in range(count):
        length: int = _INT32.unpack_from(data, offset)[0]
        start, offset = offset + 4, offset + 4 + length
        if length < 0 or offset > len(data):
            raise malformed()
        items.append(data[start:offset])
    if offset != len(data):
        raise malformed()
    return items


def _stack(rows: list[Floats], plan: VectorPlan) -> Floats | None:
    if not rows:
        return None
    for row in rows:
        if row.size != plan.size:
            raise _DimensionError(row.size)
        _check_finite(row, plan.metric)
    if len(rows) * rows[0].size >= MAX_MULTIVECTOR_COMPONENTS:
        raise _NotFiniteError(
            f"of {len(rows)} rows; Qdrant takes fewer than {MAX_MULTIVECTOR_COMPONENTS} components"
        )
    return np.stack(rows)


def is_empty_array(data: bytes) -> bool:
    """Tell whether an array of vectors, binary or :class:`~cdc_sync.rows.TextValue`, has no
    elements.
    """
    return data == b"{}" if isinstance(data, TextValue) else data[:4] == b"\x00\x00\x00\x00"


# -- vectors inside arrays and composites


def _numbers(components: Floats, count: NonFiniteCount) -> list[JsonValue]:
    values: list[JsonValue] = components.tolist()
    if np.isfinite(components).all():
        return values
    kept: list[JsonValue] = [
        value if isinstance(value, float) and math.isfinite(value) else None for value in values
    ]
    count.value += kept.count(None)
    return kept


def _dense_payload(read: Callable[[bytes], Floats]) -> Callable[[PgType, DecodeOptions], Decoder]:
    def make(_type: PgType, options: DecodeOptions) -> Decoder:
        count = options.non_finite
        return lambda data: _numbers(read(data), count)

    return make


def _sparse_payload(
    read: Callable[[bytes], SparseArrays],
) -> Callable[[PgType, DecodeOptions], Decoder]:
    def make(_type: PgType, options: DecodeOptions) -> Decoder:
        count = options.non_finite

        def decode(data: bytes) -> JsonValue:
            vector = read(data)
            return {
                "indices": vector.indices.tolist(),
                "values": _numbers(vector.values, count),
                "size": vector.size,
            }

        return decode

    return make


#: Types of extensions, by extension and name.
EXTENSION_CODECS: Final[Mapping[tuple[str, str], Codec]] = {
    ("vector", name): Codec(_dense_payload(_DENSE_BINARY[name]), _dense_payload(_DENSE_TEXT[name]))
    for name in ("vector", "halfvec")
} | {("vector", "sparsevec"): Codec(_sparse_payload(_sparse_binary), _sparse_payload(_sparse_text))}
