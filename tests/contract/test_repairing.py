"""Repair, on the embedded engine and on a server: equal points are left alone, whatever else is
there becomes what the row maps to.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest

from cdc_sync.errors import ErrorKind, SinkError
from cdc_sync.mapping.plan import (
    ColumnPlan,
    Datatype,
    Metric,
    TablePlan,
    VectorKind,
    VectorPlan,
)
from cdc_sync.mapping.vectors import SparseValue
from cdc_sync.qdrant.sink import (
    Applied,
    Changes,
    RetrievedPoint,
    Sink,
    StoredPoint,
    StoredVector,
    TableWriter,
)
from cdc_sync.rows import UNCHANGED, PointId, RawValue, Row
from cdc_sync.sync.repairing import RepairOutcome, repair, repairing
from tests.support import sink_rows as rows
from tests.support.sink_rows import item, plan_of
from tests.support.sinks import content, ready, upserts


class Recording:
    """A writer that notes which ids are upserted, and fails when told to."""

    def __init__(self, writer: TableWriter) -> None:
        self._writer = writer
        self.written: list[PointId] = []
        self.retrieved = 0
        self.failures: list[SinkError] = []

    @property
    def plan(self) -> TablePlan:
        return self._writer.plan

    @property
    def values_nulled(self) -> int:
        return self._writer.values_nulled

    async def apply(self, changes: Changes) -> Applied:
        if self.failures:
            raise self.failures.pop()
        self.written += [id_ for id_, _ in changes.upserts]
        return await self._writer.apply(changes)

    async def retrieve(self, ids: Sequence[PointId]) -> list[RetrievedPoint]:
        self.retrieved += len(ids)
        return await self._writer.retrieve(ids)

    async def clear(self) -> None:
        await self._writer.clear()

    async def count(self) -> int:
        return await self._writer.count()

    def scroll_ids(self, page: int = 1000) -> AsyncIterator[list[PointId]]:
        return self._writer.scroll_ids(page)

    def scroll_points(
        self, page: int = 256, with_vectors: bool = True
    ) -> AsyncIterator[list[StoredPoint]]:
        return self._writer.scroll_points(page, with_vectors)

    async def search(
        self, vector_name: str, vector: StoredVector, limit: int
    ) -> list[tuple[PointId, float, dict[str, object]]]:
        return await self._writer.search(vector_name, vector, limit)


@pytest.fixture
def recording(writer: TableWriter) -> Recording:
    return Recording(writer)


def outcome(same: int = 0, different: int = 0, missing: int = 0) -> RepairOutcome:
    return RepairOutcome(Applied(), same, different, missing)


async def test_equal_points_are_not_written(recording: Recording) -> None:
    changes = Changes(
        upserts=[
            (n, item(n, f"t{n}", {"b": [n, None, 0.1 * n], "a": {"n": 2**60}})) for n in range(300)
        ]
    )
    assert await repair(recording, changes) == outcome(missing=300)
    recording.written.clear()
    assert await repair(recording, changes) == outcome(same=300)
    assert recording.written == []


async def test_what_differs_or_is_missing_is_written_and_nothing_else(
    recording: Recording,
) -> None:
    await recording.apply(upserts(*((n, item(n, f"t{n}")) for n in range(5))))
    recording.written.clear()
    wanted = [
        (0, item(0, "t0")),
        (1, item(1, "other")),
        (2, item(2, "t2", large=(3.0, 4.0, 5.000001))),
        (3, item(3, "t3")),
        (7, item(7, "new")),
    ]
    assert await repair(recording, upserts(*wanted)) == outcome(2, 2, 1)
    assert sorted(map(str, recording.written)) == ["1", "2", "7"]
    stored = await content(recording)
    assert stored[1].payload["title"] == "other"
    assert stored[2].vectors["large"] == pytest.approx([3.0, 4.0, 5.000001])
    assert stored[7].payload["title"] == "new"
    assert set(stored) == {0, 1, 2, 3, 4, 7}
    assert await repair(recording, upserts(*wanted)) == outcome(5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (item(1, "a"), item(1, None)),
        (item(1, None), item(1, "a")),
        (item(1, "1"), item(1, "1 ")),
        (item(1, "t", {"a": 1}), item(1, "t", {"a": 1.0})),
        (item(1, "t", {"a": 1.0}), item(1, "t", {"a": 1})),
        (item(1, "t", {"a": 1}), item(1, "t", {"a": True})),
        (item(1, "t", {"a": 1}), item(1, "t", {"a": "1"})),
        (item(1, "t", {"a": None}), item(1, "t", {})),
        (item(1, "t", {}), item(1, "t", None)),
        (item(1, "t", []), item(1, "t", {})),
        (item(1, "t", [1, 2]), item(1, "t", [2, 1])),
        (item(1, "t", [1]), item(1, "t", [1, 1])),
        (item(1, "t", 2**53), item(1, "t", 2**53 + 1)),
        (item(1, "t", 0.1), item(1, "t", 0.10000000000001)),
        (item(1), item(2)),
        (item(1), item(1, small=None)),
        (item(1, small=None), item(1)),
        (item(1, small=None, large=None), item(1)),
        (item(1, small=(1.0, 2.0)), item(1, small=(1.0, -2.0))),
        (item(1, small=(1.0, 0.0)), item(1, small=(1.0, 1e-30))),
        (item(1, small=(1.0, 2.0)), item(1, small=(1.0, 2.0000002))),
    ],
)
async def test_every_difference_is_seen(recording: Recording, before: Row, after: Row) -> None:
    await recording.apply(upserts((1, before)))
    assert await repair(recording, upserts((1, after))) == outcome(different=1)
    assert await repair(recording, upserts((1, after))) == outcome(same=1)


async def test_order_of_keys_and_rounded_doubles_are_no_difference(recording: Recording) -> None:
    generator = np.random.default_rng(7)
    doubles = (generator.random(500) * 10.0 ** generator.integers(-200, 200, 500)).tolist()
    doc = {"z": 1, "a": {"y": 1, "b": 2}, "doubles": doubles}
    other = {"a": {"b": 2, "y": 1}, "doubles": doubles, "z": 1}
    await recording.apply(upserts((1, item(1, "t", doc))))
    assert await repair(recording, upserts((1, item(1, "t", other)))) == outcome(same=1)


# -- every kind of vector


def every_kind(key: int, shift: float = 0.0) -> Row:
    return [
        rows.int8(key),
        rows.vector(1.0, 2.0 + shift),
        rows.vector(0.1, 0.2 + shift),
        rows.vector(1e-20, 3.0 + shift),
        rows.halfvec(0.1, 0.2 + shift),
        rows.bits("10100001" if not shift else "10100000"),
        rows.sparsevec(100, {3: 0.1, 77: -2.5 + shift}),
        rows.vector_array([rows.vector(1.0, 2.0), rows.vector(-0.3, 0.4 + shift)]),
    ]


async def test_every_kind_of_vector(sink: Sink, collection: str) -> None:
    writer = Recording(await ready(sink, plan_of(collection, rows.EVERY_KIND)))
    await writer.apply(upserts((1, every_kind(1)), (2, every_kind(2))))
    assert await repair(writer, upserts((1, every_kind(1)), (2, every_kind(2)))) == outcome(2)
    for position in range(1, len(rows.EVERY_KIND)):
        row = every_kind(1)
        row[position] = every_kind(1, 0.25)[position]
        assert await repair(writer, upserts((1, row))) == outcome(different=1), position
        assert await repair(writer, upserts((1, row))) == outcome(same=1), position
        row[position] = None
        assert await repair(writer, upserts((1, row))) == outcome(different=1), position
        assert await repair(writer, upserts((1, row))) == outcome(same=1), position
    nulls: Row = [rows.int8(1), *([None] * 7)]
    assert await repair(writer, upserts((1, nulls))) == outcome(different=1)
    assert (await writer.retrieve([1]))[0].vectors == {}


async def test_retrieved_vectors_are_those_that_are_scrolled(sink: Sink, collection: str) -> None:
    writer = await ready(sink, plan_of(collection, rows.EVERY_KIND))
    ids: list[PointId] = [*range(300), "0b9a4b6e-2f8e-4b43-9e0c-6d3a4f1c2d11"]
    await writer.apply(upserts(*((id_, every_kind(n)) for n, id_ in enumerate(ids))))
    scrolled = await content(writer)
    retrieved = await writer.retrieve([*ids, 5000, "00000000-0000-0000-0000-000000000000"])
    assert {point.id for point in retrieved} == set(ids) == set(scrolled)
    for point in retrieved:
        other = scrolled[point.id]
        assert point.payload == other.payload
        assert point.vectors.keys() == other.vectors.keys()
        for name, vector in point.vectors.items():
            if isinstance(vector, SparseValue):
                assert vector == other.vectors[name]
            else:
                assert vector.dtype == np.float32
                assert vector.tolist() == other.vectors[name]
    assert await writer.retrieve([]) == []


COSINE_COLUMNS = (
    rows.column("id", rows.INT8),
    rows.EVERY_KIND[1],
    ColumnPlan(
        "half",
        rows.pgvector("halfvec", 2),
        vector=VectorPlan("half", VectorKind.DENSE, 2, Metric.COSINE, Datatype.FLOAT16),
    ),
    rows.EVERY_KIND[7],
)


async def test_cosine_vectors_of_every_length(sink: Sink, collection: str) -> None:
    """Qdrant normalises them, but for the very short ones and those of unit length."""
    writer = Recording(await ready(sink, plan_of(collection, COSINE_COLUMNS)))
    generator = np.random.default_rng(5)
    changes = Changes()
    short = float(np.sqrt(np.finfo(np.float32).eps))
    lengths = [1e-30, 1e-6, 3e-4, 4e-4, 1e-3, 1.0, 1 - 1e-6, 1 + 1e-6, 1 + 4e-7, 7.0, 1e9, 0.0]
    lengths += [short * (1 + step * 1e-7) for step in range(-6, 7)]
    for length in lengths:
        for _ in range(8):
            angle = generator.random() * 2 * np.pi
            x, y = float(length * np.cos(angle)), float(length * np.sin(angle))
            half = (min(max(x, -6e4), 6e4), min(max(y, -6e4), 6e4))
            key = len(changes.upserts)
            multi = rows.vector_array([rows.vector(x, y), rows.vector(y, x)])
            row: Row = [rows.int8(key), rows.vector(x, y), rows.halfvec(*half), multi]
            changes.upserts.append((key, row))
    await writer.apply(changes)
    assert await repair(writer, changes) == outcome(same=len(changes.upserts))


async def test_high_dimensions_under_cosine(sink: Sink, collection: str) -> None:
    plan = plan_of(collection, (rows.column("id", rows.INT8), rows.dense("v", 1536, Metric.COSINE)))
    writer = Recording(await ready(sink, plan))
    vectors = np.random.default_rng(3).normal(size=(40, 1536))
    changes = Changes(
        upserts=[(n, [rows.int8(n), rows.vector(*v.tolist())]) for n, v in enumerate(vectors)]
    )
    await writer.apply(changes)
    assert await repair(writer, changes) == outcome(same=40)
    vectors[:, 17] += 1e-3
    moved = Changes(
        upserts=[(n, [rows.int8(n), rows.vector(*v.tolist())]) for n, v in enumerate(vectors)]
    )
    assert await repair(writer, moved) == outcome(different=40)


async def test_an_empty_sparse_vector(sink: Sink, collection: str) -> None:
    plan = plan_of(collection, (rows.column("id", rows.INT8), rows.EVERY_KIND[6]))
    writer = Recording(await ready(sink, plan))
    empty: Row = [rows.int8(1), rows.sparsevec(100, {})]
    await writer.apply(upserts((1, empty)))
    assert await repair(writer, upserts((1, empty))) == outcome(same=1)
    assert await repair(writer, upserts((1, [rows.int8(1), None]))) == outcome(different=1)


# -- rows that cannot be mapped, partials, failures


async def test_rows_that_cannot_be_mapped_are_refused_whether_or_not_a_point_is_there(
    recording: Recording,
) -> None:
    await recording.apply(upserts((1, item(1))))
    bad: list[RawValue] = list(item(1, small=(1.0, 2.0, 3.0)))
    result = await repair(recording, upserts((1, bad), (2, list(bad)), (3, item(3))))
    assert (result.same, result.different, result.missing) == (0, 0, 1)
    assert {id_ for id_, _ in result.applied.refused} == {1, 2}
    assert (await content(recording))[1].vectors["small"] == [1.0, 2.0]


async def test_partials_and_deletes_are_done_as_they_are(recording: Recording) -> None:
    await recording.apply(upserts((1, item(1)), (2, item(2)), (3, item(3))))
    changes = Changes(
        upserts=[(1, item(1))],
        partials=[(2, item(2, "changed", None, UNCHANGED, UNCHANGED))],
        deletes=[3],
    )
    assert await repair(recording, changes) == outcome(same=1)
    stored = await content(recording)
    assert set(stored) == {1, 2}
    assert stored[2].payload["title"] == "changed"


async def test_after_a_failure_only_what_is_left_is_written(recording: Recording) -> None:
    await recording.apply(upserts((1, item(1))))
    changes = upserts((1, item(1)), (2, item(2)), (3, item(3)))
    completed = SinkError(ErrorKind.SINK_UNAVAILABLE, "Upsert failed.")
    completed.completed = frozenset({2})
    recording.failures = [SinkError(ErrorKind.SINK_UNAVAILABLE, "Upsert failed."), completed]
    recording.written.clear()
    progress: list[None] = []
    attempt = repairing(recording, changes, lambda: progress.append(None))
    for _ in range(2):
        with pytest.raises(SinkError):
            await attempt()
    assert await attempt() == outcome(1, 0, 2)
    assert recording.written == [3]
    assert recording.retrieved == 3
    assert len(progress) == 2
