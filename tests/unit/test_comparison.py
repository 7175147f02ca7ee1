"""Comparing rows with stored points, where no engine is needed; see also
tests/contract/test_repairing.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from cdc_sync.errors import MappingError
from cdc_sync.mapping.comparison import PointComparison, same_json
from cdc_sync.mapping.plan import ColumnPlan, Datatype, Metric, VectorKind, VectorPlan
from cdc_sync.mapping.vectors import SparseValue
from cdc_sync.rows import Row, TextValue
from tests.support import sink_rows as rows


def compare(
    type_: str, plan: VectorPlan, stored: object, *components: float, text: bool = False
) -> bool:
    column = ColumnPlan("v", rows.pgvector(type_, len(components)), vector=plan)
    comparison = PointComparison(rows.plan_of("c", (rows.column("id", rows.INT8), column)))
    written = TextValue(str(list(components)).replace(" ", "").encode())
    value = written if text else rows.vector(*components)
    row: Row = [rows.int8(1), value]
    payload = {"id": 1}
    vectors = {"v": stored} if stored is not None else {}
    equal = comparison.equal(row, payload, vectors)  # type: ignore[arg-type]
    # Many at once, which must find the same.
    unlike = [({"id": 2}, vectors), (payload, {**vectors, "w": array(1)}), ({}, vectors)]
    points = [(payload, vectors), *unlike]
    found = comparison.equal_all([row] * len(points), points)  # type: ignore[arg-type]
    assert found == [equal, False, False, False]
    return equal


def dense(metric: Metric = Metric.EUCLID, datatype: Datatype = Datatype.FLOAT32) -> VectorPlan:
    return VectorPlan("v", VectorKind.DENSE, 2, metric, datatype)


def array(*components: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(components, dtype="<f4")


@pytest.mark.parametrize("text", [False, True])
def test_components_are_compared_exactly_but_under_cosine(text: bool) -> None:
    third = float(np.float32(1 / 3))
    near = float(np.nextafter(np.float32(third), np.float32(1)))
    assert compare("vector", dense(), array(third, 2), third, 2, text=text)
    assert not compare("vector", dense(), array(near, 2), third, 2, text=text)
    assert compare("vector", dense(Metric.COSINE), array(0.6, 0.8), 3, 4, text=text)
    assert not compare("vector", dense(Metric.COSINE), array(0.6, 0.80001), 3, 4, text=text)
    assert not compare("vector", dense(Metric.COSINE), array(3, 4), 3, 4, text=text)
    assert not compare("vector", dense(Metric.COSINE), array(-0.6, -0.8), 3, 4, text=text)
    # Very short ones are not normalised.
    assert compare("vector", dense(Metric.COSINE), array(1e-5, 0), 1e-5, 0, text=text)
    assert not compare("vector", dense(Metric.COSINE), array(1, 0), 1e-5, 0, text=text)
    assert not compare("vector", dense(Metric.COSINE), array(1, 0), 0, 0, text=text)


def test_a_small_change_of_a_component_among_many_is_seen_under_cosine() -> None:
    components = np.random.default_rng(1).normal(size=4096).astype("<f4")
    wide = components.astype("<f8")
    stored = (wide / np.sqrt(wide @ wide)).astype("<f4")
    plan = VectorPlan("v", VectorKind.DENSE, 4096, Metric.COSINE)
    assert compare("vector", plan, stored, *components.tolist())
    stored[7] *= np.float32(1 + 1e-5)
    assert not compare("vector", plan, stored, *components.tolist())


@pytest.mark.parametrize("datatype", [Datatype.TURBO4, Datatype.TURBO8, Datatype.TURBO16])
def test_quantised_vectors_cannot_be_found_equal(datatype: Datatype) -> None:
    assert not compare("vector", dense(datatype=datatype), array(1, 2), 1, 2)


def test_other_kinds_shapes_and_values_are_not_equal() -> None:
    for stored in (None, array(1), array(1, 2, 3), array(1, np.nan), SparseValue([0, 1], [1, 2])):
        for metric in (Metric.COSINE, Metric.DOT):
            assert not compare("vector", dense(metric), stored, 1, 2)
    assert not compare("vector", dense(), np.array([[1, 2]], dtype="<f4"), 1, 2)


def test_uint8_is_cut_off_and_saturated() -> None:
    plan = dense(datatype=Datatype.UINT8)
    assert compare("vector", plan, array(3, 255), 3.7, 300)
    assert compare("vector", plan, array(0, 0), -3, -0.5)
    assert not compare("vector", plan, array(4, 255), 3.7, 300)


def test_a_row_that_has_no_point_is_an_error_whatever_is_stored() -> None:
    comparison = PointComparison(rows.items_plan("c"))
    with pytest.raises(MappingError, match="3 dimensions"):
        comparison.equal(rows.item(1, small=(1.0, 2.0, 3.0)), {}, {})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, True),
        (0.1 + 0.2, 0.3, True),  # one unit in the last place
        ([{"a": 1e300}], [{"a": 1.0000000000000002e300}], True),
        (0.0, -0.0, True),
        (1, 1.0, False),
        (1, True, False),
        (None, False, False),
        ("1", 1, False),
        ({"a": None}, {}, False),
        ([None], [], False),
        ([], {}, False),
        ({}, None, False),
        (2**63 - 1, float(2**63), False),
        (1.0, 1.000000000000002, False),
        (5e-324, 0.0, True),
        (1e-300, 0.0, False),
        ("é", "e\u0301", False),
    ],
)
def test_json(one: object, other: object, same: bool) -> None:
    assert same_json(one, other) is same
    assert same_json(other, one) is same
    assert same_json({"x": [one]}, {"x": [other]}) is same
