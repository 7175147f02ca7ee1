"""The contract of a sink, on the embedded engine and on a server (real with
CDC_SYNC_TEST_QDRANT_URL).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from pydantic import SecretStr
from qdrant_client import models

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ConfigError, ErrorKind, SinkError, StateError
from cdc_sync.mapping.plan import (
    ColumnPlan,
    Metric,
    PayloadIndex,
    PayloadIndexType,
    TablePlan,
    VectorPlan,
)
from cdc_sync.mapping.vectors import SparseValue
from cdc_sync.qdrant.collections import index_path
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.rpc import reason
from cdc_sync.qdrant.sink import (
    Applied,
    Changes,
    DeadLetter,
    PipelineState,
    Sink,
    StoredPoint,
    TableState,
    TableWriter,
)
from cdc_sync.rows import UNCHANGED, PointId, Row
from tests.support import sink_rows as rows
from tests.support.fix_qdrant import QdrantTarget
from tests.support.sink_rows import item, items_plan, plan_of

UUID_ID = "0b9a4b6e-2f8e-4b43-9e0c-6d3a4f1c2d11"


def settings_of(target: QdrantTarget, **more: object) -> QdrantSettings:
    key = None if target.api_key is None else SecretStr(target.api_key)
    return QdrantSettings.model_validate({"url": target.url, "api_key": key, **more})


@pytest.fixture(params=["edge", "server"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> QdrantSettings:
    if request.param == "edge":
        return QdrantSettings.model_validate({"url": f"edge:{tmp_path / 'edge'}"})
    target: QdrantTarget = request.getfixturevalue("qdrant")
    # Small requests, so that a few hundred points exercise cutting and lanes.
    return settings_of(target, request_points=50, request_bytes=4096)


@pytest.fixture
async def sink(settings: QdrantSettings) -> AsyncIterator[Sink]:
    opened = await open_sink(settings)
    yield opened
    await opened.close()


@pytest.fixture
def collection() -> str:
    return f"items_{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def writer(sink: Sink, collection: str) -> TableWriter:
    return await ready(sink, items_plan(collection))


async def ready(sink: Sink, plan: TablePlan) -> TableWriter:
    await sink.ensure_collection(plan)
    return sink.writer(plan)


async def content(writer: TableWriter) -> dict[PointId, StoredPoint]:
    """Everything the writer's table has in Qdrant."""
    return {point.id: point async for page in writer.scroll_points(7) for point in page}


def upserts(*items: tuple[PointId, Row]) -> Changes:
    return Changes(upserts=list(items))


def partials(*items: tuple[PointId, Row]) -> Changes:
    return Changes(partials=list(items))


# -- upserts and deletes


async def test_upsert_writes_payload_and_vectors(writer: TableWriter) -> None:
    row = item(1, "título", {"b": [1, None, 2.5], "n": 2**60, "t": True})
    assert await writer.apply(upserts((1, row), (UUID_ID, item(2, None)))) == Applied()
    stored = await content(writer)
    assert stored[1].payload == {
        "id": 1,
        "title": "título",
        "doc": {"b": [1, None, 2.5], "n": 2**60, "t": True},
    }
    assert stored[1].vectors == {"small": [1.0, 2.0], "large": [3.0, 4.0, 5.0]}
    # SQL NULL is JSON null, and the field is there.
    assert stored[UUID_ID].payload == {"id": 2, "title": None, "doc": None}


async def test_largest_integer_id(writer: TableWriter) -> None:
    await writer.apply(upserts((2**64 - 1, item(1)), (0, item(0))))
    assert set(await content(writer)) == {2**64 - 1, 0}
    await writer.apply(Changes(deletes=[2**64 - 1]))
    assert set(await content(writer)) == {0}


async def test_upsert_replaces_the_whole_point(writer: TableWriter) -> None:
    await writer.apply(upserts((1, item(1, "old", {"a": 1}))))
    await writer.apply(upserts((1, item(1, "new", None, small=None))))
    stored = (await content(writer))[1]
    assert stored.payload == {"id": 1, "title": "new", "doc": None}
    assert stored.vectors == {"large": [3.0, 4.0, 5.0]}


async def test_point_without_any_vector(writer: TableWriter) -> None:
    await writer.apply(upserts((1, item(1, small=None, large=None))))
    assert (await content(writer))[1].vectors == {}


async def test_delete_of_present_and_absent_ids(writer: TableWriter) -> None:
    await writer.apply(upserts((1, item(1)), (UUID_ID, item(2)), (3, item(3))))
    assert await writer.apply(Changes(deletes=[1, UUID_ID, 77])) == Applied()
    assert set(await content(writer)) == {3}


async def test_empty_changes(writer: TableWriter) -> None:
    assert await writer.apply(Changes()) == Applied()


async def test_an_id_twice_in_one_batch_is_a_programming_error(writer: TableWriter) -> None:
    with pytest.raises(ValueError, match="twice"):
        await writer.apply(Changes(upserts=[(1, item(1))], deletes=[1]))
    assert await writer.count() == 0


async def test_a_large_batch_of_everything_twice(writer: TableWriter) -> None:
    await writer.apply(Changes(upserts=[(n, item(n, "first")) for n in range(600)]))
    changes = Changes(
        upserts=[(n, item(n, "second", "x" * (n % 300))) for n in range(300)],
        partials=[(n, item(n, "third", {"n": n}, UNCHANGED, UNCHANGED)) for n in range(300, 500)],
        deletes=list(range(500, 600)),
    )
    # Again: a resend of the same batch changes nothing.
    for _ in range(2):
        assert await writer.apply(changes) == Applied()
        stored = await content(writer)
        assert set(stored) == set(range(500))
        assert {stored[n].payload["title"] for n in range(300)} == {"second"}
        assert all(stored[n].payload["doc"] == {"n": n} for n in range(300, 500))
        assert all(stored[n].vectors["small"] == [1.0, 2.0] for n in range(500))


# -- partials


async def test_partial_payload_keeps_vectors(writer: TableWriter) -> None:
    await writer.apply(upserts((1, item(1, "a", {"x": 1}))))
    row = item(1, "b", None, UNCHANGED, UNCHANGED)
    assert await writer.apply(partials((1, row))) == Applied()
    stored = (await content(writer))[1]
    # Known in full, and the NULL is kept as null.
    assert stored.payload == {"id": 1, "title": "b", "doc": None}
    assert stored.vectors == {"small": [1.0, 2.0], "large": [3.0, 4.0, 5.0]}


async def test_partial_vector_keeps_the_other_and_the_unknown_payload(writer: TableWriter) -> None:
    await writer.apply(upserts((1, item(1, "a", {"deep": [{"n": None}], "i": 1, "f": 1.0}))))
    row = item(1, "b", UNCHANGED, (8.0, 9.0), UNCHANGED)
    assert await writer.apply(partials((1, row))) == Applied()
    stored = (await content(writer))[1]
    assert stored.payload == {
        "id": 1,
        "title": "b",
        "doc": {"deep": [{"n": None}], "i": 1, "f": 1.0},
    }
    doc = stored.payload["doc"]
    assert isinstance(doc, dict)
    assert (type(doc["i"]), type(doc["f"])) == (int, float)
    assert stored.vectors == {"small": [8.0, 9.0], "large": [3.0, 4.0, 5.0]}


async def test_partial_with_vectors_known_and_payload_unknown(writer: TableWriter) -> None:
    await writer.apply(upserts((1, item(1, "a", {"x": 1}))))
    row = item(1, UNCHANGED, UNCHANGED, (8.0, 9.0), (1.0, 1.0, 1.0))
    assert await writer.apply(partials((1, row))) == Applied()
    stored = (await content(writer))[1]
    assert stored.payload == {"id": 1, "title": "a", "doc": {"x": 1}}
    assert stored.vectors == {"small": [8.0, 9.0], "large": [1.0, 1.0, 1.0]}


async def test_partial_null_vector_removes_it_and_only_it(writer: TableWriter) -> None:
    await writer.apply(upserts((1, item(1)), (2, item(2))))
    changes = partials(
        (1, item(1, "b", None, None, UNCHANGED)), (2, item(2, "b", UNCHANGED, (7.0, 7.0), None))
    )
    assert await writer.apply(changes) == Applied()
    stored = await content(writer)
    assert stored[1].vectors == {"large": [3.0, 4.0, 5.0]}
    assert stored[2].vectors == {"small": [7.0, 7.0]}
    # A vector that comes back.
    await writer.apply(partials((1, item(1, "c", None, (5.0, 5.0), UNCHANGED))))
    assert (await content(writer))[1].vectors["small"] == [5.0, 5.0]


async def test_partial_of_missing_points_is_returned_and_the_rest_written(
    writer: TableWriter,
) -> None:
    present = [n for n in range(300) if n % 7]
    await writer.apply(Changes(upserts=[(n, item(n)) for n in present]))
    changes = partials(
        *((n, item(n, "b", None, (9.0, 9.0), None if n % 2 else UNCHANGED)) for n in range(300))
    )
    applied = await writer.apply(changes)
    assert applied.missing == frozenset(n for n in range(300) if n % 7 == 0)
    assert applied.refused == ()
    stored = await content(writer)
    assert set(stored) == set(present)
    assert {point.payload["title"] for point in stored.values()} == {"b"}
    assert all(point.vectors["small"] == [9.0, 9.0] for point in stored.values())
    assert all(("large" in point.vectors) == (n % 2 == 0) for n, point in stored.items())


@pytest.mark.parametrize("doc", [None, UNCHANGED])
async def test_a_single_missing_partial(writer: TableWriter, doc: object) -> None:
    applied = await writer.apply(partials((1, item(1, "b", doc, UNCHANGED, UNCHANGED))))
    assert applied == Applied(missing=frozenset([1]))
    assert await writer.count() == 0


async def test_partial_of_a_point_that_lacks_the_unchanged_field_is_missing(
    sink: Sink, writer: TableWriter, collection: str
) -> None:
    older = plan_of(collection, [*rows.COLUMNS[:2], *rows.COLUMNS[3:]])
    row = item(1)
    await sink.writer(older).apply(upserts((1, [*row[:2], *row[3:]])))
    applied = await writer.apply(partials((1, item(1, "b", UNCHANGED, UNCHANGED, UNCHANGED))))
    assert applied == Applied(missing=frozenset([1]))


async def test_partial_repeated(writer: TableWriter) -> None:
    await writer.apply(upserts((1, item(1, "a", {"x": 1})), (2, item(2))))
    changes = partials(
        (1, item(1, "b", UNCHANGED, None, UNCHANGED)),
        (2, item(2, "c", None, (3.0, 3.0), UNCHANGED)),
        (3, item(3, "d", None, UNCHANGED, UNCHANGED)),
    )
    first = await writer.apply(changes)
    stored = await content(writer)
    assert await writer.apply(changes) == first == Applied(missing=frozenset([3]))
    assert await content(writer) == stored
    assert stored[1].payload["doc"] == {"x": 1}


async def test_partial_in_a_shared_collection_keeps_its_namespace(
    sink: Sink, collection: str
) -> None:
    writer = await ready(sink, items_plan(collection, "one"))
    await writer.apply(upserts((UUID_ID, item(1, "a", {"x": 1}))))
    await writer.apply(partials((UUID_ID, item(1, "b", UNCHANGED, UNCHANGED, UNCHANGED))))
    stored = (await content(writer))[UUID_ID]
    assert stored.payload == {"id": 1, "title": "b", "doc": {"x": 1}, "_table": "one"}


# -- refusals


async def test_rows_the_mapping_refuses_stand_alone(writer: TableWriter) -> None:
    bad = item(5, "bad")
    bad[3] = rows.vector(1.0, 2.0, 3.0)
    worse = item(6, "worse")
    worse[4] = rows.vector(float("nan"), 2.0, 3.0)
    good = [(n, item(n)) for n in range(5)]
    applied = await writer.apply(upserts(*good, (5, bad), (6, worse)))
    assert {id_ for id_, _ in applied.refused} == {5, 6}
    assert "small" in dict(applied.refused)[5]
    assert set(await content(writer)) == {0, 1, 2, 3, 4}
    applied = await writer.apply(partials((1, bad), (2, item(2, "ok", None, UNCHANGED, UNCHANGED))))
    assert [id_ for id_, _ in applied.refused] == [1]
    assert (await content(writer))[2].payload["title"] == "ok"


async def test_points_qdrant_refuses_are_isolated(sink: Sink, collection: str) -> None:
    """The collection lacks a vector that some of the rows have (it was replaced behind our back)."""
    narrow = plan_of(collection, rows.COLUMNS[:4])
    await sink.ensure_collection(narrow)
    writer = sink.writer(items_plan(collection))
    bad = {3, 64, 65, 199}
    changes = upserts(
        *((n, item(n, "t", None, large=(1.0, 2.0, 3.0) if n in bad else None)) for n in range(200))
    )
    applied = await writer.apply(changes)
    assert {id_ for id_, _ in applied.refused} == bad
    assert all("large" in why and len(why) <= 200 for _, why in applied.refused)
    assert set(await content(writer)) == set(range(200)) - bad


def test_reasons_hold_no_values() -> None:
    why = reason('Wrong input: [1.5, 2.5] {"secret": 1} "quoted"\n at ' + "x" * 500)
    assert len(why) <= 200
    for value in ("1.5", "secret", "quoted"):
        assert value not in why
    assert why.startswith("Wrong input:")


# -- kinds of vectors


async def test_every_kind_of_vector(sink: Sink, collection: str) -> None:
    plan = plan_of(collection, rows.EVERY_KIND)
    writer = await ready(sink, plan)
    row: Row = [
        rows.int8(1),
        rows.vector(3.0, 4.0),
        rows.vector(3.0, 4.0),
        rows.vector(-3.0, 4.0),
        rows.halfvec(0.5, 65504.0),
        rows.bits("10110001"),
        rows.sparsevec(100, {0: 1.5, 99: -2.0}),
        rows.vector_array([rows.vector(3.0, 4.0), rows.vector(0.0, 2.0)]),
    ]
    nothing: Row = [rows.int8(2), *[None] * 6, rows.vector_array([])]
    assert await writer.apply(upserts((1, row), (2, nothing))) == Applied()
    stored = await content(writer)
    assert stored[1].vectors == {
        "cosine": pytest.approx([0.6, 0.8]),
        "dot": [3.0, 4.0],
        "manhattan": [-3.0, 4.0],
        "half": [0.5, 65504.0],
        "bits": [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        "sparse": SparseValue([0, 99], [1.5, -2.0]),
        "multi": [pytest.approx([0.6, 0.8]), [0.0, 1.0]],
    }
    assert stored[2].vectors == {}
    assert await sink.inspect(plan) is not None
    # Each kind by itself as a partial, the others staying.
    for position in range(1, len(row)):
        other: Row = [rows.int8(2), *[UNCHANGED] * 7]
        other[position] = row[position]
        assert await writer.apply(partials((2, other))) == Applied()
    assert (await content(writer))[2].vectors == stored[1].vectors
    gone: Row = [rows.int8(2), *[UNCHANGED] * 6, rows.vector_array([])]
    await writer.apply(partials((2, gone)))
    assert "multi" not in (await content(writer))[2].vectors


async def test_search_by_every_kind_of_vector(sink: Sink, collection: str) -> None:
    writer = await ready(sink, plan_of(collection, rows.EVERY_KIND))
    near: Row = [
        rows.int8(1),
        rows.vector(1.0, 0.0),
        rows.vector(9.0, 9.0),
        rows.vector(0.0, 0.0),
        rows.halfvec(0.0, 0.0),
        rows.bits("00000000"),
        rows.sparsevec(100, {5: 2.0}),
        rows.vector_array([rows.vector(1.0, 0.0)]),
    ]
    far: Row = [
        rows.int8(2),
        rows.vector(0.0, 1.0),
        rows.vector(1.0, 1.0),
        rows.vector(5.0, 5.0),
        rows.halfvec(5.0, 5.0),
        rows.bits("11111111"),
        rows.sparsevec(100, {5: 1.0}),
        rows.vector_array([rows.vector(0.0, 1.0)]),
    ]
    await writer.apply(upserts((2, far), (1, near)))
    queries = {
        "cosine": ([1.0, 0.1], 1.0),
        "dot": ([1.0, 1.0], 18.0),
        "manhattan": ([0.0, 1.0], 1.0),
        "half": ([3.0, 0.0], 3.0),
        "bits": ([1.0] + [0.0] * 7, 1.0),
        "sparse": (SparseValue([5], [3.0]), 6.0),
        "multi": ([[1.0, 0.0], [1.0, 0.0]], 2.0),
    }
    for name, (query, score) in queries.items():
        found = await writer.search(name, query, 10)  # type: ignore[arg-type]
        assert [id_ for id_, _, _ in found] == [1, 2], name
        assert found[0][1] == pytest.approx(score, rel=0.02), name
        assert found[0][2] == {"id": 1}
        assert len(await writer.search(name, query, 1)) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside-named"])
async def test_unnamed_vector(sink: Sink, collection: str, others: bool) -> None:
    columns = [rows.column("id", rows.INT8), rows.dense("embedding", 2, vector_name="")]
    if others:
        columns.append(rows.dense("second", 2))
    plan = plan_of(collection, columns)
    writer = await ready(sink, plan)
    await sink.inspect(plan)
    more = [rows.vector(5.0, 6.0)] if others else []
    kept = {"second": [5.0, 6.0]} if others else {}
    await writer.apply(upserts((1, [rows.int8(1), rows.vector(1.0, 2.0), *more])))
    assert (await content(writer))[1].vectors == {"": [1.0, 2.0], **kept}
    unchanged = [UNCHANGED] * len(more)
    await writer.apply(partials((1, [rows.int8(1), rows.vector(3.0, 4.0), *unchanged])))
    assert (await content(writer))[1].vectors == {"": [3.0, 4.0], **kept}
    assert [id_ for id_, _, _ in await writer.search("", [3.0, 4.0], 5)] == [1]
    await writer.apply(partials((1, [rows.int8(1), None, *unchanged])))
    assert (await content(writer))[1].vectors == kept


# -- clear, count, scroll


async def test_clear_count_and_scroll(writer: TableWriter) -> None:
    ids: list[PointId] = [
        *range(590),
        *(str(uuid.uuid5(uuid.NAMESPACE_DNS, str(n))) for n in range(7)),
    ]
    await writer.apply(Changes(upserts=[(id_, item(1)) for id_ in ids]))
    assert await writer.count() == len(ids)
    pages = [page async for page in writer.scroll_ids(100)]
    assert [len(page) for page in pages] == [100] * 5 + [97]
    assert sorted(map(str, (id_ for page in pages for id_ in page))) == sorted(map(str, ids))
    await writer.clear()
    await writer.clear()
    assert await writer.count() == 0
    assert [page async for page in writer.scroll_ids()] == []
    assert [page async for page in writer.scroll_points()] == []


async def test_tables_of_one_collection_do_not_see_each_other(sink: Sink, collection: str) -> None:
    one = await ready(sink, items_plan(collection, "one"))
    two = await ready(sink, items_plan(collection, "two"))
    await one.apply(Changes(upserts=[(n, item(n)) for n in range(40)]))
    await two.apply(Changes(upserts=[(n, item(n)) for n in range(100, 130)]))
    assert (await one.count(), await two.count()) == (40, 30)
    assert set(await content(two)) == set(range(100, 130))
    assert {i for page in [p async for p in one.scroll_ids(9)] for i in page} == set(range(40))
    found = await two.search("small", [1.0, 2.0], 1000)
    assert {id_ for id_, _, _ in found} == set(range(100, 130))
    await one.clear()
    assert (await one.count(), await two.count()) == (0, 30)
    assert (await sink.inspect(one.plan)).points == 30


async def test_scroll_points_without_vectors(writer: TableWriter) -> None:
    await writer.apply(upserts((1, item(1))))
    [[point]] = [page async for page in writer.scroll_points(with_vectors=False)]
    assert (point.vectors, point.payload["id"]) == ({}, 1)


# -- collections


async def test_inspect_creates_nothing(sink: Sink, collection: str) -> None:
    plan = items_plan(collection)
    for _ in range(2):
        state = await sink.inspect(plan)
        assert (state.exists, state.points) == (False, 0)
    await sink.ensure_collection(plan)
    state = await sink.inspect(plan)
    assert (state.exists, state.points) == (True, 0)
    await sink.writer(plan).apply(upserts((1, item(1))))
    # Again: what exists and fits is left alone.
    await sink.ensure_collection(plan)
    assert (await sink.inspect(plan)).points == 1


async def test_writing_to_a_missing_collection(sink: Sink, collection: str) -> None:
    writer = sink.writer(items_plan(collection))
    for changes in (
        upserts((1, item(1))),
        partials((1, item(1, "t", None, UNCHANGED, UNCHANGED))),
        partials((1, item(1, "t", UNCHANGED, UNCHANGED, UNCHANGED))),
        Changes(deletes=[1]),
    ):
        with pytest.raises(SinkError) as caught:
            await writer.apply(changes)
        assert caught.value.kind is ErrorKind.COLLECTION_MISSING
        assert collection in caught.value.message
    for call in (writer.count, writer.clear):
        with pytest.raises(SinkError) as caught:
            await call()
        assert caught.value.kind is ErrorKind.COLLECTION_MISSING


def _mismatches() -> dict[str, tuple[ColumnPlan, ColumnPlan, tuple[str, ...]]]:
    """What the collection has, what the plan wants, and what the error must name."""
    two = rows.dense("v", 2)
    half, bit, sparse, multi = rows.EVERY_KIND[4:8]

    def as_v(column: ColumnPlan) -> ColumnPlan:
        plan = column.vector
        assert plan is not None
        named = VectorPlan("v", plan.kind, plan.size, plan.metric, plan.datatype)
        return ColumnPlan("v", column.type, vector=named)

    return {
        "size": (two, rows.dense("v", 3), ("'v'", "2 dim", "3 dim")),
        "metric": (two, rows.dense("v", 2, Metric.COSINE), ("'v'", "Euclid", "Cosine")),
        "datatype": (two, as_v(half), ("float32", "float16")),
        "uint8": (as_v(bit), rows.dense("v", 8, Metric.MANHATTAN), ("uint8", "float32")),
        "sparse": (two, as_v(sparse), ("dense", "sparse")),
        "dense": (as_v(sparse), two, ("dense", "sparse")),
        "multi": (as_v(multi), rows.dense("v", 2, Metric.COSINE), ("multi", "dense")),
        "name": (two, rows.dense("w", 2), ("'v'", "'w'", "absent", "not in the plan")),
        "unnamed": (rows.dense("v", 2, vector_name=""), two, ("unnamed", "'v'")),
    }


@pytest.mark.parametrize("case", _mismatches())
async def test_mismatch_is_an_error_and_changes_nothing(
    sink: Sink, collection: str, case: str
) -> None:
    has, wants, named = _mismatches()[case]
    key = rows.column("id", rows.INT8)
    existing = plan_of(collection, [key, has])
    wanted = plan_of(collection, [key, wants])
    await sink.ensure_collection(existing)
    for call in (sink.inspect, sink.ensure_collection):
        with pytest.raises(SinkError) as caught:
            await call(wanted)
        error = caught.value
        assert error.kind is ErrorKind.COLLECTION_MISMATCH
        for text in (collection, "public.items", *named):
            assert text in error.message
        assert "configuration" in error.remedy
    await sink.inspect(existing)


async def test_extra_and_absent_vectors_are_mismatches(sink: Sink, collection: str) -> None:
    await sink.ensure_collection(items_plan(collection))
    fewer = plan_of(collection, rows.COLUMNS[:4])
    with pytest.raises(SinkError, match="'large' .*is not in the plan"):
        await sink.inspect(fewer)
    more = plan_of(collection, [*rows.COLUMNS, rows.dense("third", 2)])
    with pytest.raises(SinkError, match="'third' is absent"):
        await sink.inspect(more)


async def test_collection_without_vectors(sink: Sink, collection: str) -> None:
    plan = plan_of(collection, rows.COLUMNS[:2])
    if not sink.multi_process:
        with pytest.raises(ConfigError, match=r"public\.items has no vector column"):
            await sink.ensure_collection(plan)
        return
    writer = await ready(sink, plan)
    await sink.inspect(plan)
    await writer.apply(upserts((1, [rows.int8(1), b"t"])))
    assert (await content(writer))[1].payload == {"id": 1, "title": "t"}


@pytest.mark.parametrize("name", ["a.b", "..", "über/all x%", "w" * 60])
async def test_unusual_collection_names(sink: Sink, name: str, collection: str) -> None:
    if sink.multi_process:
        name = name.replace("/", "-")  # servers take no slash
    plan = items_plan(f"{collection}{name}")
    writer = await ready(sink, plan)
    await writer.apply(upserts((1, item(1))))
    assert (await sink.inspect(plan)).points == 1


@pytest.mark.parametrize(
    ("field", "path"),
    [("a", "a"), ("a-b_9", "a-b_9"), ("a.b", '"a.b"'), ("a b", '"a b"'), ('a"', None), ("", '""')],
)
def test_index_paths(field: str, path: str | None) -> None:
    assert index_path(field) == path


async def test_payload_indexes_of_every_type(sink: Sink, collection: str) -> None:
    fields = [f"f_{type_.value}" for type_ in PayloadIndexType]
    columns = [*rows.COLUMNS, *(rows.column(name, rows.TEXT) for name in fields)]
    indexes = [PayloadIndex(f"f_{type_.value}", type_) for type_ in PayloadIndexType]
    odd = PayloadIndex("a.b [c]", PayloadIndexType.KEYWORD)
    first = plan_of(collection, columns, indexes=[*indexes[:3], odd])
    await sink.ensure_collection(first)
    # The rest is made where the collection exists already, and nothing is made twice.
    both = plan_of(collection, columns, indexes=[*indexes, odd])
    await sink.ensure_collection(both)
    await sink.ensure_collection(both)


# -- records

STATE = PipelineState(
    pipeline="p.1",
    slot="slot",
    publication="pub",
    system_identifier="7123456789012345678",
    timeline=3,
    slot_lsn=2**64 - 2,
    tables=(TableState("public.items", "items", "abc", True), TableState("public.b", "b", "d")),
)


def letter(key: str, pipeline: str = "p.1", reason_: str = "why") -> DeadLetter:
    return DeadLetter(pipeline, "public.items", key, "0/16B3748", "2026-01-01T00:00:00Z", reason_)


async def test_pipeline_records(sink: Sink, settings: QdrantSettings) -> None:
    name = f"p.{uuid.uuid4().hex[:8]}"
    state = PipelineState(name, *(getattr(STATE, f) for f in PipelineState.__slots__[1:]))
    assert await sink.state.load(name) is None
    await sink.state.save(state)
    await sink.state.save(state)
    assert await sink.state.load(name) == state
    assert await sink.state.load(name + "x") is None
    emptied = PipelineState(name, "s", "p", "1", 1, 0)
    await sink.state.save(emptied)
    assert await sink.state.load(name) == emptied
    await sink.state.forget(name)
    await sink.state.forget(name)
    assert await sink.state.load(name) is None


async def test_dead_letters(sink: Sink) -> None:
    name, other = (f"{prefix}{uuid.uuid4().hex[:8]}" for prefix in "ab")
    assert await sink.state.dead_letters(name) == []
    await sink.state.release(name, [("public.items", "1")])
    await sink.state.park([])
    await sink.state.park([letter("2", name), letter("1", name), letter("1", other)])
    await sink.state.park(
        [letter("1", name, "again"), letter("3", name), letter("3", name, "last")]
    )
    assert await sink.state.dead_letters(name) == [
        letter("1", name, "again"),
        letter("2", name),
        letter("3", name, "last"),
    ]
    await sink.state.release(name, [("public.items", "2"), ("public.other", "1")])
    assert [one.key for one in await sink.state.dead_letters(name)] == ["1", "3"]
    await sink.state.forget(name)
    assert await sink.state.dead_letters(name) == []
    assert await sink.state.dead_letters(other) == [letter("1", other)]
    await sink.state.forget(other)


async def test_many_dead_letters(sink: Sink) -> None:
    name = f"p{uuid.uuid4().hex[:8]}"
    await sink.state.park([letter(f"{n:05}", name) for n in range(1203)])
    assert len(await sink.state.dead_letters(name)) == 1203
    await sink.state.forget(name)


async def test_reading_records_creates_nothing(settings: QdrantSettings) -> None:
    if not settings.url.startswith("edge:"):
        pytest.skip("see test_server_reads_of_records_create_nothing")
    opened = await open_sink(settings)
    try:
        assert await opened.state.load("p") is None
        assert await opened.state.dead_letters("p") == []
        assert not (await opened.inspect(items_plan("items"))).exists
    finally:
        await opened.close()
    assert not Path(settings.url.removeprefix("edge:")).exists()


async def test_server_reads_of_records_create_nothing(qdrant_private: QdrantTarget) -> None:
    opened = await open_sink(settings_of(qdrant_private))
    assert await opened.state.load("p") is None
    assert await opened.state.dead_letters("p") == []
    await opened.state.release("p", [("t", "1")])
    await opened.state.forget("p")
    client = qdrant_private.client()
    assert client.get_collections().collections == []
    await opened.state.save(STATE)
    assert [c.name for c in client.get_collections().collections] == ["_cdc_sync"]
    await opened.close()


async def test_records_of_a_newer_version_are_refused(
    sink: Sink, settings: QdrantSettings, request: pytest.FixtureRequest
) -> None:
    name = f"p{uuid.uuid4().hex[:8]}"
    await sink.state.save(PipelineState(name, "s", "p", "1", 1, 0))
    await sink.state.park([letter("1", name)])
    if settings.url.startswith("edge:"):
        for kind in ("pipelines", "dead_letters"):
            path = Path(settings.url.removeprefix("edge:")) / "state" / kind / f"{name}.json"
            path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    else:
        client = request.getfixturevalue("qdrant").client()
        found = models.Filter(
            must=[models.FieldCondition(key="pipeline", match=models.MatchValue(value=name))]
        )
        client.set_payload("_cdc_sync", {"version": 2}, points=found, wait=True)
    with pytest.raises(StateError, match="newer"):
        await sink.state.load(name)
    with pytest.raises(StateError, match="newer"):
        await sink.state.dead_letters(name)


# -- server only


async def test_alias_as_collection_name(qdrant: QdrantTarget, collection: str) -> None:
    opened = await open_sink(settings_of(qdrant))
    client = qdrant.client()
    alias = f"{collection}_alias"
    try:
        await opened.ensure_collection(items_plan(collection))
        create = models.CreateAlias(collection_name=collection, alias_name=alias)
        client.update_collection_aliases([models.CreateAliasOperation(create_alias=create)])
        plan = items_plan(alias)
        writer = await ready(opened, plan)
        await writer.apply(upserts((1, item(1)), (2, item(2))))
        await writer.apply(partials((1, item(1, "b", UNCHANGED, UNCHANGED, UNCHANGED))))
        await writer.apply(Changes(deletes=[2]))
        assert (await opened.inspect(plan)).points == 1
        assert (await content(writer))[1].payload["title"] == "b"
        assert client.count(collection).count == 1
    finally:
        await opened.close()


async def test_what_is_created_on_a_server(qdrant: QdrantTarget, collection: str) -> None:
    opened = await open_sink(settings_of(qdrant))
    indexes = [PayloadIndex("id", PayloadIndexType.INTEGER)]
    plan = plan_of(collection, rows.EVERY_KIND, namespace="n", indexes=indexes)
    try:
        await opened.ensure_collection(plan)
    finally:
        await opened.close()
    info = qdrant.client().get_collection(collection)
    vectors = info.config.params.vectors
    assert isinstance(vectors, dict)
    assert vectors["cosine"].hnsw_config is not None
    assert vectors["cosine"].hnsw_config.m == 32
    assert vectors["dot"].hnsw_config is None
    assert vectors["half"].datatype == models.Datatype.FLOAT16
    assert vectors["bits"].datatype == models.Datatype.UINT8
    assert vectors["multi"].multivector_config is not None
    assert set(info.config.params.sparse_vectors or {}) == {"sparse"}
    assert {k: v.data_type for k, v in info.payload_schema.items()} == {
        "id": models.PayloadSchemaType.INTEGER,
        "_table": models.PayloadSchemaType.KEYWORD,
    }


# -- embedded only


@pytest.fixture
def edge_settings(tmp_path: Path) -> QdrantSettings:
    return QdrantSettings.model_validate({"url": f"edge:{tmp_path / 'deep' / 'edge'}"})


async def test_edge_data_survives_reopening(edge_settings: QdrantSettings) -> None:
    plan = plan_of("items", rows.EVERY_KIND, indexes=[PayloadIndex("id", PayloadIndexType.INTEGER)])
    opened = await open_sink(edge_settings)
    writer = await ready(opened, plan)
    await writer.apply(upserts((1, [rows.int8(1), rows.vector(3.0, 4.0), *[None] * 6])))
    await opened.make_durable()
    await opened.state.save(STATE)
    await opened.close()
    await opened.close()
    again = await open_sink(edge_settings)
    assert (await again.inspect(plan)).points == 1
    assert await again.state.load("p.1") == STATE
    assert not again.multi_process
    await again.close()


_HOLDER = """
import asyncio, sys
from cdc_sync.config import QdrantSettings
from cdc_sync.qdrant.open import open_sink
from tests.support.sink_rows import item, items_plan
from cdc_sync.qdrant.sink import Changes
async def main():
    sink = await open_sink(QdrantSettings.model_validate({"url": sys.argv[1]}))
    await sink.ensure_collection(items_plan("items"))
    await sink.writer(items_plan("items")).apply(Changes(upserts=[(n, item(n)) for n in range(700)]))
    print("ready", flush=True)
    sys.stdin.read()
asyncio.run(main())
"""


async def test_edge_in_use_by_another_process_and_killed(edge_settings: QdrantSettings) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, edge_settings.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n"
            with pytest.raises(SinkError, match=rf"in use by another process \(pid {holder.pid}\)"):
                await open_sink(edge_settings)
        finally:
            holder.kill()
    # The lock went with the process, and what it had applied is there although it never flushed.
    opened = await open_sink(edge_settings)
    assert (await opened.inspect(items_plan("items"))).points == 700
    await opened.close()


async def test_edge_second_sink_in_one_process(edge_settings: QdrantSettings) -> None:
    first = await open_sink(edge_settings)
    await first.state.save(STATE)
    with pytest.raises(SinkError, match="in use"):
        await open_sink(edge_settings)
    await first.close()
    await (await open_sink(edge_settings)).close()


def _edge_path(settings: QdrantSettings) -> Path:
    return Path(settings.url.removeprefix("edge:"))


def _truncate_config(shard: Path) -> None:
    (shard / "edge_config.json").write_text('{"vectors": {')


def _remove_config(shard: Path) -> None:
    (shard / "edge_config.json").unlink()


def _garble_segments(shard: Path) -> None:
    for path in (shard / "segments").rglob("segment.json"):
        path.write_text("{}")


@pytest.mark.parametrize("damage", [_truncate_config, _remove_config, _garble_segments])
async def test_edge_damaged_shard(
    edge_settings: QdrantSettings, damage: Callable[[Path], None]
) -> None:
    plan = items_plan("items")
    opened = await open_sink(edge_settings)
    writer = await ready(opened, plan)
    await writer.apply(upserts((1, item(1))))
    await opened.close()
    damage(_edge_path(edge_settings) / "collections" / "items")
    again = await open_sink(edge_settings)
    with pytest.raises(StateError, match="damaged"):
        await again.inspect(plan)
    with pytest.raises(StateError, match="damaged"):
        await again.writer(plan).apply(upserts((1, item(1))))
    await again.close()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}', '{"version": "x"}'])
async def test_edge_damaged_records(edge_settings: QdrantSettings, text: str) -> None:
    opened = await open_sink(edge_settings)
    await opened.state.save(STATE)
    (_edge_path(edge_settings) / "state" / "pipelines" / "p.1.json").write_text(text)
    with pytest.raises(StateError, match="damaged"):
        await opened.state.load("p.1")
    await opened.close()


async def test_edge_interrupted_creation_is_begun_again(edge_settings: QdrantSettings) -> None:
    plan = items_plan("items")
    leftover = _edge_path(edge_settings) / "collections" / "items.new"
    (leftover / "segments").mkdir(parents=True)
    (leftover / "edge_config.json").write_text("{}")
    opened = await open_sink(edge_settings)
    assert not (await opened.inspect(plan)).exists
    writer = await ready(opened, plan)
    await writer.apply(upserts((1, item(1))))
    assert not leftover.exists()
    await opened.close()


async def test_edge_optimize_keeps_everything(edge_settings: QdrantSettings) -> None:
    from cdc_sync.qdrant.edge import EdgeSink

    opened = await open_sink(edge_settings)
    assert isinstance(opened, EdgeSink)
    writer = await ready(opened, items_plan("items"))
    await writer.apply(Changes(upserts=[(n, item(n)) for n in range(500)]))
    await writer.apply(Changes(deletes=list(range(250))))
    await opened.optimize()
    assert set(await content(writer)) == set(range(250, 500))
    await opened.close()


async def test_edge_records_are_plain_json(edge_settings: QdrantSettings) -> None:
    opened = await open_sink(edge_settings)
    await opened.state.save(STATE)
    await opened.close()
    root = _edge_path(edge_settings)
    record = json.loads((root / "state" / "pipelines" / "p.1.json").read_text())
    assert (record["version"], record["slot_lsn"]) == (1, str(2**64 - 2))
    assert sorted(path.name for path in (root / "state" / "pipelines").iterdir()) == ["p.1.json"]


# -- opening


@pytest.mark.parametrize(
    "url",
    ["", "localhost:6334", "grpc://h:6334", "http://", "https:///x", "edge:", "http://h:99999",
     "http://h:6334/path", "http://u:hunter2@h:6334", "http://h?x=1"],
)  # fmt: skip
async def test_urls_that_cannot_work(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await open_sink(QdrantSettings.model_validate({"url": url}))
    assert "hunter2" not in str(caught.value)


async def test_edge_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be opened"):
        await open_sink(QdrantSettings.model_validate({"url": f"edge:{tmp_path / 'file'}"}))


async def test_edge_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        await open_sink(QdrantSettings.model_validate({"url": f"edge:{tmp_path}"}))
    assert caught.value.remedy == "pip install 'cdc-sync[edge]'"


async def test_ca_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ca_file"):
        await open_sink(
            QdrantSettings.model_validate(
                {"url": "https://localhost:1", "ca_file": str(tmp_path / "none.pem")}
            )
        )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_edge_path_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    opened = await open_sink(QdrantSettings.model_validate({"url": f"edge:{tmp_path / 'x'}"}))
    with pytest.raises(ConfigError, match="cannot be opened"):
        await opened.ensure_collection(items_plan("items"))
    await opened.close()


async def test_ping_and_version(sink: Sink) -> None:
    await sink.ping()
    assert sink.version[0].isdigit()
