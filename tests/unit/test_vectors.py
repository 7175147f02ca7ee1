"""Vector columns: dimensions, finiteness, sparse indices, multivectors."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from cdc_sync.errors import MappingError
from cdc_sync.mapping.plan import ColumnPlan, Datatype, Metric, VectorKind, VectorPlan
from cdc_sync.mapping.table import PgType
from cdc_sync.mapping.vectors import (
    SparseArrays,
    VectorData,
    compile_vector,
    declared_dimension,
    is_empty_array,
)
from cdc_sync.rows import TextValue
from tests.support.mapping_types import array, core, domain, pgvector
from tests.unit.test_values import array_bytes


def column(
    type_: PgType,
    size: int | None = 3,
    kind: VectorKind = VectorKind.DENSE,
    metric: Metric = Metric.COSINE,
) -> ColumnPlan:
    return ColumnPlan("emb", type_, None, VectorPlan("emb", kind, size, metric, Datatype.FLOAT32))


def vector(*components: float) -> bytes:
    return struct.pack(f">hh{len(components)}f", len(components), 0, *components)


def numbers(data: VectorData) -> object:
    assert isinstance(data, np.ndarray)
    assert data.dtype == np.dtype("<f4")
    return data.tolist()


def test_dense_vectors() -> None:
    binary, text = compile_vector("public.docs", column(pgvector("vector")))
    assert numbers(binary(vector(1, -2.5, 0))) == numbers(text(b"[1,-2.5,0]")) == [1, -2.5, 0]
    tenth = struct.unpack("f", struct.pack("f", 0.1))[0]
    assert numbers(text(b"[0.1,1e-45,0]")) == [tenth, 1.401298464324817e-45, 0.0]
    binary, text = compile_vector("public.docs", column(domain(pgvector("halfvec"))))
    half = struct.pack(">hhe e e".replace(" ", ""), 3, 0, 0.1, 65504, -6e-8)
    assert numbers(binary(half)) == numbers(text(b"[0.099975586,65504,-5.9604645e-08]"))


@pytest.mark.requirement("R17")
@pytest.mark.parametrize("kind", [VectorKind.DENSE, VectorKind.MULTI])
def test_another_dimension_is_refused_naming_column_and_both(kind: VectorKind) -> None:
    type_ = pgvector("vector")
    if kind is VectorKind.MULTI:
        type_ = array(type_)
    binary, text = compile_vector("public.docs", column(type_, 3, kind))
    four = vector(1, 2, 3, 4)
    with pytest.raises(MappingError, match=r"public\.docs: column emb .* 4 dimensions.* 3"):
        binary(array_bytes(vector(1, 2, 3), four) if kind is VectorKind.MULTI else four)
    with pytest.raises(MappingError, match=r"column emb .* 4 dimensions.* 3"):
        text(b'{"[1,2,3,4]"}' if kind is VectorKind.MULTI else b"[1,2,3,4]")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_components_that_are_not_finite_are_refused(bad: float, place: int) -> None:
    components = [1.0, 3e38, -3e38]
    components[place] = bad
    for metric in Metric:
        binary, _ = compile_vector("t", column(pgvector("vector"), metric=metric))
        with pytest.raises(MappingError, match="finite"):
            binary(vector(*components))


def test_opposite_infinities_do_not_cancel() -> None:
    binary, _ = compile_vector("t", column(pgvector("vector")))
    with pytest.raises(MappingError, match="finite"):
        binary(vector(float("inf"), float("-inf"), 0))


def test_long_vectors_are_refused_under_cosine_only() -> None:
    long = vector(1e19, 3e38, 0)
    for metric in (Metric.DOT, Metric.EUCLID, Metric.MANHATTAN):
        binary, _ = compile_vector("t", column(pgvector("vector"), metric=metric))
        assert numbers(binary(long)) == np.array([1e19, 3e38, 0], "<f4").tolist()
    binary, text = compile_vector("t", column(pgvector("vector")))
    with pytest.raises(MappingError, match="normalised"):
        binary(long)
    with pytest.raises(MappingError, match="finite"):
        text(b"[1e39,0,0]")
    rows = array_bytes(vector(1, 2, 3), long)
    for metric in (Metric.DOT, Metric.COSINE):
        binary, text = compile_vector(
            "t", column(array(pgvector("vector")), 3, VectorKind.MULTI, metric)
        )
        for read, data in ((binary, rows), (text, b'{"[1,2,3]","[1e19,3e38,0]"}')):
            if metric is Metric.COSINE:
                with pytest.raises(MappingError, match="normalised"):
                    read(data)
            else:
                assert numbers(read(data)) == np.array([[1, 2, 3], [1e19, 3e38, 0]], "<f4").tolist()


@pytest.mark.requirement("R16")
def test_sparse_vectors_count_from_zero_in_binary_and_from_one_in_text() -> None:
    binary, text = compile_vector(
        "t", column(pgvector("sparsevec", 5), None, VectorKind.SPARSE, Metric.DOT)
    )
    sparse = binary(struct.pack(">iiiiiff", 5, 2, 0, 0, 2, 1.5, -2))
    for data in (sparse, text(b"{1:1.5,3:-2}/5")):
        assert isinstance(data, SparseArrays)
        assert (data.indices.tolist(), data.values.tolist(), data.size) == ([0, 2], [1.5, -2], 5)
    empty = text(b"{}/5")
    assert isinstance(empty, SparseArrays)
    assert len(empty.indices) == len(empty.values) == 0
    with pytest.raises(MappingError, match="finite"):
        binary(struct.pack(">iiiif", 5, 1, 0, 0, float("nan")))
    for malformed in (b"{1:1}", b"{1:1,1:2}/5", b"{9999999999:1}/5", b"{1:}/5", b"{6:1}/5"):
        with pytest.raises(MappingError):
            text(malformed)


def test_multivectors() -> None:
    plan = column(array(pgvector("vector")), 2, VectorKind.MULTI)
    binary, text = compile_vector("t", plan)
    rows = array_bytes(vector(1, 2), vector(3, 4))
    assert numbers(binary(rows)) == numbers(text(b'{"[1,2]","[3,4]"}')) == [[1, 2], [3, 4]]
    empty = struct.pack(">iii", 0, 0, 0)
    assert binary(empty) is None
    assert text(b"{}") is None
    assert is_empty_array(empty)
    assert is_empty_array(TextValue(b"{}"))
    assert not is_empty_array(rows)
    assert not is_empty_array(TextValue(b'{"[1,2]"}'))
    for malformed in (
        array_bytes(vector(1, 2), None),
        array_bytes(vector(1, 2), vector(1, 2), sizes=(1, 2)),
        rows[:-1],
        rows + b"\0",
        struct.pack(">iiiii", 1, 0, 0, 2**31 - 1, 1),
    ):
        with pytest.raises(MappingError):
            binary(malformed)
    for malformed in (b'{"[1,2]",NULL}', b'{{"[1,2]"}}', b"[1,2]"):
        with pytest.raises(MappingError):
            text(malformed)


def test_multivectors_beyond_the_limit_are_refused() -> None:
    binary, _ = compile_vector("t", column(array(pgvector("vector")), 16000, VectorKind.MULTI))
    row = struct.pack(">Hh", 16000, 0) + bytes(64000)
    assert binary(array_bytes(*[row] * 65)) is not None
    with pytest.raises(MappingError, match="66 rows"):
        binary(array_bytes(*[row] * 66))


def test_bits() -> None:
    binary, text = compile_vector("t", column(core("bit", 9), 9, metric=Metric.MANHATTAN))
    assert numbers(binary(struct.pack(">i", 9) + b"\x81\x80")) == [1, 0, 0, 0, 0, 0, 0, 1, 1]
    assert numbers(text(b"100000011")) == [1, 0, 0, 0, 0, 0, 0, 1, 1]
    for malformed in (b"", struct.pack(">i", -9), struct.pack(">i", 9) + b"\x81"):
        with pytest.raises(MappingError):
            binary(malformed)
    with pytest.raises(MappingError):
        text(b"10000001x")


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"\0\x03\0\0", vector(1, 2, 3)[:-1], b"\0\x03\0\x01" + bytes(12)]
)
def test_malformed_vectors_are_refused(data: bytes) -> None:
    binary, _ = compile_vector("t", column(pgvector("vector")))
    with pytest.raises(MappingError, match="emb"):
        binary(data)


def test_declared_dimensions() -> None:
    assert declared_dimension(pgvector("vector", 768)) == 768
    assert declared_dimension(pgvector("vector")) is None
    assert declared_dimension(domain(pgvector("vector", 3))) == 3
    assert declared_dimension(array(pgvector("halfvec"), 4)) == 4
    assert declared_dimension(array(domain(pgvector("halfvec", 4)))) == 4
