"""The contract of a sink's collections and records, embedded and on a server."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from qdrant_client import models

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import (
    ConfigError,
    DimensionMismatchError,
    ErrorKind,
    SinkError,
    StateError,
)
from cdc_sync.mapping.plan import (
    ColumnPlan,
    Metric,
    PayloadIndex,
    PayloadIndexType,
    VectorPlan,
)
from cdc_sync.qdrant.collections import index_path
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Changes, DeadLetter, PipelineState, Sink, SourceMark
from cdc_sync.rows import UNCHANGED
from tests.support import sink_rows as rows
from tests.support.fix_qdrant import QdrantTarget
from tests.support.sink_rows import item, items_plan, plan_of
from tests.support.sinks import STATE, content, partials, ready, settings_of, upserts

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


async def test_a_collection_is_dropped_and_made_anew(sink: Sink, collection: str) -> None:
    key = rows.column("id", rows.INT8)
    before = plan_of(collection, [key, rows.dense("v", 2)])
    after = plan_of(collection, [key, rows.dense("v", 3)])
    await sink.drop_collection(before)
    await sink.ensure_collection(before)
    await sink.writer(before).apply(upserts((1, [rows.int8(1), None])))
    await sink.make_durable()
    for _ in range(2):
        await sink.drop_collection(after)
    assert not (await sink.inspect(after)).exists
    await sink.ensure_collection(after)
    assert (await sink.inspect(after)).points == 0
    await sink.writer(after).apply(upserts((2, [rows.int8(2), None])))
    assert await sink.writer(after).count() == 1
    await sink.make_durable()


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
        assert isinstance(error, DimensionMismatchError) is (case == "size")
        for text in (collection, "public.items", *named):
            assert text in error.message
        assert "configuration" in error.remedy
    await sink.inspect(existing)


async def test_extra_and_absent_vectors_are_mismatches(sink: Sink, collection: str) -> None:
    await sink.ensure_collection(items_plan(collection))
    fewer = plan_of(collection, rows.COLUMNS[:4])
    with pytest.raises(SinkError, match=r"'large' .*is not in the plan"):
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


async def test_marks(sink: Sink) -> None:
    name = f"p{uuid.uuid4().hex[:8]}"
    assert await sink.state.mark(name) is None
    first = SourceMark(name, lsn=2**63 + 5, timeline=3)
    await sink.state.save_mark(first)
    assert await sink.state.mark(name) == first
    # The pipeline's own record is another one.
    assert await sink.state.load(name) is None
    second = SourceMark(name, 7, 4, xid=2**40, publications=(("public.a", "1/2"), ('"ü"."b"', "")))
    await sink.state.save_mark(second)
    assert await sink.state.mark(name) == second
    assert await sink.state.mark(name + "x") is None
    await sink.state.forget(name)
    assert await sink.state.mark(name) is None


async def test_many_dead_letters(sink: Sink) -> None:
    name = f"p{uuid.uuid4().hex[:8]}"
    await sink.state.park([letter(f"{n:05}", name) for n in range(1203)])
    assert len(await sink.state.dead_letters(name)) == 1203
    await sink.state.forget(name)


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
