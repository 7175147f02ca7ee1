"""The contract of a writer: on the embedded engine, and on a server (real with
CDC_SYNC_TEST_QDRANT_URL).
"""

from __future__ import annotations

import uuid

import pytest

from cdc_sync.mapping.vectors import SparseValue
from cdc_sync.qdrant.rpc import reason
from cdc_sync.qdrant.sink import Applied, Changes, Sink, TableWriter
from cdc_sync.rows import UNCHANGED, PointId, Row
from tests.support import sink_rows as rows
from tests.support.sink_rows import item, items_plan, plan_of
from tests.support.sinks import content, partials, ready, upserts

UUID_ID = "0b9a4b6e-2f8e-4b43-9e0c-6d3a4f1c2d11"


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
    """The collection lacks a vector that some rows have (it was replaced behind our back)."""
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
