"""Points encoded together are as those encoded one by one: rows of any kind among each other."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_sync.errors import MappingError
from cdc_sync.mapping.plan import ColumnPlan, Metric, TablePlan, VectorKind, VectorPlan
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.rows import UNCHANGED, PointId, RawValue, Row, TextValue
from tests.support.mapping_types import core, pgvector, table_plan
from tests.unit.test_vectors import vector

ID = ColumnPlan("id", core("int8"), "id")
TITLE = ColumnPlan("title", core("text"), "title")
SCORE = ColumnPlan("score", core("float8"), "score")
META = ColumnPlan("meta", core("jsonb"), "meta")


def embedding(size: int, metric: Metric = Metric.COSINE, name: str = "embedding") -> ColumnPlan:
    plan = VectorPlan(name, VectorKind.DENSE, size, metric)
    return ColumnPlan("embedding", pgvector("vector"), None, plan)


PLAN = table_plan(ID, TITLE, SCORE, META, embedding(3))
UNNAMED = table_plan(ID, TITLE, SCORE, META, embedding(3, Metric.DOT, name=""))

#: Values of each column: as they should be, NULL, in text, not in the message, and wrong ones.
_WRONG = [None, UNCHANGED, b"", b"\x01", b"\xff" * 9]
CHOICES: tuple[Sequence[RawValue], ...] = (
    [struct.pack(">q", 7), TextValue(b"8"), *_WRONG],
    [b"title", b"", TextValue("é".encode()), *_WRONG],
    [struct.pack(">d", value) for value in (0.5, float("nan"), float("-inf"))]
    + [TextValue(b"NaN"), *_WRONG],
    [b'\x01{"a": 1}', b"\x01[1e999]", b"\x01{", b"\x02{}", TextValue(b"[]"), *_WRONG],
    [
        vector(1, 2, 3),
        vector(1, 2),
        vector(1, 2, 3, 4),
        vector(float("nan"), 0, 0),
        vector(0, float("inf"), 0),
        vector(1e19, 0, 0),  # alone just short enough for Cosine, not so two of them
        vector(1e20, 0, 0),
        vector(1, 2, 3)[:-1],
        struct.pack(">HHfff", 3, 1, 1, 2, 3),
        TextValue(b"[1,2,3]"),
        TextValue(b"[1,2]"),
        *_WRONG,
    ],
)
#: Columns are as they should be more often than not.
rows = st.lists(
    st.tuples(
        *(
            st.one_of(st.just(choice[0]), st.just(choice[0]), st.sampled_from(choice))
            for choice in CHOICES
        )
    ).map(list),
    max_size=12,
)


def each(codec: WireCodec, given_rows: Sequence[tuple[PointId, Row]]) -> list[bytes | str]:
    found: list[bytes | str] = []
    for id_, row in given_rows:
        try:
            found.append(codec.point(id_, row))
        except MappingError as error:
            found.append(error.message)
    return found


def together(codec: WireCodec, given_rows: Sequence[tuple[PointId, Row]]) -> list[bytes | str]:
    return [
        one.message if isinstance(one, MappingError) else one for one in codec.points(given_rows)
    ]


@given(rows, st.sampled_from([PLAN, UNNAMED]))
def test_points_are_those_of_the_rows(values: list[Row], plan: TablePlan) -> None:
    given_rows: list[tuple[PointId, Row]] = list(enumerate(values))
    one, all_ = WireCodec(plan), WireCodec(plan)
    assert together(all_, given_rows) == each(one, given_rows)
    assert all_.non_finite == one.non_finite


def without_quick_ways(plan: TablePlan) -> WireCodec:
    codec = WireCodec(plan)
    codec._quick = codec._block = None
    return codec


@given(rows)
def test_the_loop_gives_the_same(values: list[Row]) -> None:
    given_rows: list[tuple[PointId, Row]] = list(enumerate(values))
    quick, loop = WireCodec(PLAN), without_quick_ways(PLAN)
    assert quick._quick is not None
    assert quick._block is not None
    assert together(quick, given_rows) == together(loop, given_rows)
    assert quick.non_finite == loop.non_finite


def good(count: int, size: int = 3) -> list[tuple[PointId, Row]]:
    chance = random.Random(count)
    return [
        (
            number,
            [
                struct.pack(">q", number),
                b"t%d" % number,
                struct.pack(">d", chance.random()),
                b'\x01{"n": %d}' % number,
                vector(*(chance.uniform(-1, 1) for _ in range(size))),
            ],
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("size", [1, 3, 16_000])
def test_more_rows_than_are_read_together(size: int) -> None:
    # Of 16,000 components four make a block.
    plan = table_plan(ID, TITLE, SCORE, META, embedding(size))
    given_rows = good(7 if size > 3 else 200, size)
    assert together(WireCodec(plan), given_rows) == each(WireCodec(plan), given_rows)


def test_vectors_that_are_too_long_only_together() -> None:
    """Their squares add up to more than a float32 holds, though each is short enough."""
    given_rows = good(20)
    for _, row in given_rows:
        row[-1] = vector(1e19, 0, 0)
    found = together(WireCodec(PLAN), given_rows)
    assert found == each(WireCodec(PLAN), given_rows)
    assert all(isinstance(one, bytes) for one in found)


def test_one_bad_vector_spoils_no_other() -> None:
    given_rows = good(64)
    given_rows[9][1][-1] = vector(1, 2)
    given_rows[30][1][-1] = vector(float("nan"), 0, 0)
    found = together(WireCodec(PLAN), given_rows)
    assert [number for number, one in enumerate(found) if isinstance(one, str)] == [9, 30]
    assert found == each(WireCodec(PLAN), given_rows)


def test_sizes_that_make_up_for_each_other_are_no_block() -> None:
    given_rows = good(2)
    whole = vector(1, 2, 3)
    given_rows[0][1][-1], given_rows[1][1][-1] = whole[:-4], whole + whole[-4:]
    assert all(isinstance(one, str) for one in together(WireCodec(PLAN), given_rows))


@pytest.mark.parametrize("spoil", [list.pop, lambda row: row.append(None), list.clear])
def test_a_row_of_another_width(spoil: Callable[[Row], object]) -> None:
    given_rows = good(5)
    spoil(given_rows[2][1])
    found = together(WireCodec(PLAN), given_rows)
    assert found == each(WireCodec(PLAN), given_rows)
    assert "the plan has 5 columns" in str(found[2])


def test_what_is_encoded_again_is_counted_once() -> None:
    """A row that the quick way gives up has been counted up to there."""
    codec = WireCodec(table_plan(SCORE, TITLE))
    codec.point(1, [struct.pack(">d", float("nan")), TextValue(b"text")])
    assert codec.non_finite == 1
    with pytest.raises(MappingError, match="column meta does not hold"):
        WireCodec(PLAN).point(1, [*good(1)[0][1][:3], b"", vector(1, 2, 3)])
