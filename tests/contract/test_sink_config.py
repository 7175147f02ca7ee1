"""The contract of a sink's settings of collections: what they are created with, whether they are
created, and when HNSW is built. Embedded and on a server.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from qdrant_client import models

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ConfigError, ErrorKind, SinkError
from cdc_sync.mapping.plan import PayloadIndex, PayloadIndexType, TablePlan, VectorKind
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Sink
from tests.support import sink_rows as rows
from tests.support.fix_qdrant import QdrantProcess, QdrantTarget
from tests.support.sink_rows import item, items_plan, plan_of
from tests.support.sinks import content, settings_of, upserts

#: What server and embedded engine both have.
SETTINGS: dict[str, Any] = {
    "on_disk_payload": True,
    "hnsw_config": {"m": 24, "ef_construct": 128},
    "optimizers_config": {"indexing_threshold": 50_000},
    "quantization_config": {"scalar": {"type": "int8", "quantile": 0.99, "always_ram": True}},
    "vectors": {"dot": {"on_disk": True, "hnsw_config": {"m": 8}}},
    "sparse_vectors": {"sparse": {"index": {"on_disk": True}, "modifier": "idf"}},
}


def configured(collection: str, config: dict[str, Any] | None = None) -> TablePlan:
    plan = plan_of(collection, rows.EVERY_KIND)
    return dataclasses.replace(plan, collection_config=config or {})


def two_vectors(collection: str, config: dict[str, Any] | None = None) -> TablePlan:
    """A plan with vectors `a` (m = 32 by its index) and `b`."""
    columns = [rows.column("id", rows.INT8), rows.dense("a", 2, m=32), rows.dense("b", 2)]
    return dataclasses.replace(plan_of(collection, columns), collection_config=config or {})


async def test_a_collection_gets_its_settings_once(
    sink: Sink, settings: QdrantSettings, collection: str, request: pytest.FixtureRequest
) -> None:
    plan = configured(collection, SETTINGS)
    assert await sink.ensure_collection(plan) == ()
    # What it has is what was asked for.
    assert await sink.ensure_collection(plan) == ()
    assert (await sink.inspect(plan)).warnings == ()
    if settings.url.startswith("edge:"):
        path = Path(settings.url.removeprefix("edge:")) / "collections" / collection
        found = json.loads((path / "edge_config.json").read_bytes())
        assert found["vectors"]["dot"]["hnsw_config"]["m"] == 8
        assert found["vectors"]["dot"]["hnsw_config"]["ef_construct"] == 128
        assert found["quantization_config"]["scalar"]["always_ram"] is True
        assert found["optimizers"]["indexing_threshold"] == 50_000
        return
    config = request.getfixturevalue("qdrant").client().get_collection(collection).config
    assert config.params.on_disk_payload is True
    assert config.hnsw_config.m == 24
    assert config.quantization_config.scalar.always_ram is True
    assert config.params.vectors["dot"].on_disk is True
    assert config.params.vectors["dot"].hnsw_config.m == 8
    assert config.params.sparse_vectors["sparse"].index.on_disk is True


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"on_disk_payload": False}, "on_disk_payload = true"),
        ({"hnsw_config": {"m": 30}}, "hnsw_config.m = 24"),
        ({"optimizers_config": {"indexing_threshold": 7}}, "optimizers_config.indexing_threshold"),
        ({"vectors": {"dot": {"on_disk": False}}}, "vectors.dot.on_disk = true"),
        ({"vectors": {"dot": {"hnsw_config": {"m": 9}}}}, "vectors.dot.hnsw_config.m = 8"),
        # Not of its own, so that of the collection.
        ({"vectors": {"half": {"hnsw_config": {"m": 9}}}}, "vectors.half.hnsw_config.m = 24"),
        (
            {"quantization_config": {"binary": {"always_ram": True}}},
            "quantization_config.binary.always_ram = nothing",
        ),
        (
            {"sparse_vectors": {"sparse": {"index": {"on_disk": False}, "modifier": "idf"}}},
            "sparse_vectors.sparse.index.on_disk = true",
        ),
    ],
)
async def test_other_settings_of_an_existing_collection_are_a_warning(
    sink: Sink, collection: str, change: dict[str, Any], path: str
) -> None:
    await sink.ensure_collection(configured(collection, SETTINGS))
    other = configured(collection, {"sparse_vectors": SETTINGS["sparse_vectors"], **change})
    for warnings in ((await sink.inspect(other)).warnings, await sink.ensure_collection(other)):
        assert any(path in warning for warning in warnings), warnings
        assert all(collection in warning and "not changed" in warning for warning in warnings)
    assert await sink.ensure_collection(configured(collection, SETTINGS)) == ()


async def test_a_modifier_is_part_of_what_a_collection_must_have(
    sink: Sink, collection: str
) -> None:
    await sink.ensure_collection(configured(collection))
    with pytest.raises(SinkError) as caught:
        await sink.ensure_collection(configured(collection, SETTINGS))
    assert caught.value.kind is ErrorKind.COLLECTION_MISMATCH


async def test_wrong_settings_create_nothing(sink: Sink, collection: str) -> None:
    with pytest.raises(ConfigError, match=r"hnsw_config\.mm"):
        await sink.ensure_collection(configured(collection, {"hnsw_config": {"mm": 3}}))
    assert not (await sink.inspect(configured(collection))).exists


async def test_an_absent_collection_is_an_error_where_none_may_be_created(
    sink: Sink, collection: str
) -> None:
    plan = items_plan(collection)
    with pytest.raises(ConfigError) as caught:
        await sink.ensure_collection(plan, create=False)
    assert collection in caught.value.message
    assert "create_collection" in caught.value.message
    for vector in plan.vectors:
        assert vector.name in caught.value.remedy
        assert vector.metric.value in caught.value.remedy
    assert not (await sink.inspect(plan)).exists
    await sink.ensure_collection(plan)
    await sink.ensure_collection(plan, create=False)


async def test_payload_indexes_are_made_where_the_collection_is_not(
    sink: Sink, collection: str
) -> None:
    plan = items_plan(collection)
    await sink.ensure_collection(plan)
    index = PayloadIndex("title", PayloadIndexType.KEYWORD)
    await sink.ensure_collection(dataclasses.replace(plan, payload_indexes=(index,)), create=False)


# -- deferred HNSW


async def test_deferral_is_harmless_everywhere(sink: Sink, collection: str) -> None:
    plan = items_plan(collection)
    await sink.ensure_collection(plan, defer_hnsw=True)
    assert await sink.ensure_collection(plan, defer_hnsw=True) == ()
    writer = sink.writer(plan)
    await writer.apply(upserts((1, item(1))))
    await sink.defer_indexing(plan)
    await sink.build_index(plan)
    await sink.build_index(plan)
    assert await sink.ensure_collection(plan) == ()
    assert set(await content(writer)) == {1}


def hnsw_of(target: QdrantTarget, collection: str) -> dict[str, tuple[int | None, int | None]]:
    """`m` and `payload_m` of each dense vector, None where it is the collection's."""
    vectors = target.client().get_collection(collection).config.params.vectors
    named = {"": vectors} if isinstance(vectors, models.VectorParams) else vectors or {}
    return {
        name: (None, None)
        if params.hnsw_config is None
        else (params.hnsw_config.m, params.hnsw_config.payload_m)
        for name, params in named.items()
    }


def metadata_of(target: QdrantTarget, collection: str) -> dict[str, Any]:
    return target.client().get_collection(collection).config.metadata or {}


@pytest.fixture
async def server(qdrant: QdrantTarget) -> AsyncIterator[Sink]:
    opened = await open_sink(settings_of(qdrant))
    yield opened
    await opened.close()


async def test_a_deferred_collection_has_no_graph_until_it_is_built(
    server: Sink, qdrant: QdrantTarget, collection: str
) -> None:
    plan = two_vectors(collection, {"metadata": {"owner": "search"}})
    await server.ensure_collection(plan, defer_hnsw=True)
    assert hnsw_of(qdrant, collection) == {"a": (0, None), "b": (0, None)}
    assert set(metadata_of(qdrant, collection)) == {"owner", "cdc_sync"}
    # While deferred it is as the plan wants it.
    assert (await server.inspect(plan)).warnings == ()
    await server.build_index(plan)
    assert hnsw_of(qdrant, collection) == {"a": (32, None), "b": (16, None)}
    assert metadata_of(qdrant, collection) == {"owner": "search"}
    assert (await server.inspect(plan)).warnings == ()


async def test_the_unnamed_vector_is_deferred_too(
    server: Sink, qdrant: QdrantTarget, collection: str
) -> None:
    columns = [rows.column("id", rows.INT8), rows.dense("v", 2, vector_name="")]
    plan = plan_of(collection, columns)
    await server.ensure_collection(plan, defer_hnsw=True)
    assert hnsw_of(qdrant, collection) == {"": (0, None)}
    await server.build_index(plan)
    assert hnsw_of(qdrant, collection) == {"": (16, None)}


async def test_configured_hnsw_comes_back(
    server: Sink, qdrant: QdrantTarget, collection: str
) -> None:
    config = {
        "hnsw_config": {"m": 24, "payload_m": 12},
        "vectors": {"b": {"hnsw_config": {"payload_m": 6}}},
    }
    plan = two_vectors(collection, config)
    await server.ensure_collection(plan, defer_hnsw=True)
    assert hnsw_of(qdrant, collection) == {"a": (0, 0), "b": (0, 0)}
    await server.build_index(plan)
    assert hnsw_of(qdrant, collection) == {"a": (32, 12), "b": (24, 6)}


async def test_a_graph_that_nobody_wants_is_not_built(
    server: Sink, qdrant: QdrantTarget, collection: str
) -> None:
    config = {"hnsw_config": {"m": 0, "payload_m": 16}}
    plan = dataclasses.replace(two_vectors(collection), collection_config=config)
    await server.ensure_collection(plan, defer_hnsw=True)
    assert hnsw_of(qdrant, collection) == {"a": (0, 0), "b": (None, 0)}
    await server.build_index(plan)
    assert hnsw_of(qdrant, collection) == {"a": (32, 16), "b": (None, 16)}


async def test_sparse_vectors_alone_need_no_deferral(
    server: Sink, qdrant: QdrantTarget, collection: str
) -> None:
    sparse = next(c for c in rows.EVERY_KIND if c.vector and c.vector.kind is VectorKind.SPARSE)
    plan = plan_of(collection, [rows.column("id", rows.INT8), sparse])
    await server.ensure_collection(plan, defer_hnsw=True)
    assert metadata_of(qdrant, collection) == {}
    await server.build_index(plan)
    await server.defer_indexing(plan)
    assert metadata_of(qdrant, collection) == {}


async def test_what_was_not_deferred_by_us_is_not_built(
    server: Sink, qdrant: QdrantTarget, collection: str
) -> None:
    params = models.VectorParams(
        size=2, distance=models.Distance.EUCLID, hnsw_config=models.HnswConfigDiff(m=0)
    )
    qdrant.client().create_collection(collection, vectors_config={"a": params, "b": params})
    plan = two_vectors(collection)
    warnings = await server.ensure_collection(plan, defer_hnsw=True)
    assert any("vectors.a.hnsw_config.m = 0" in warning for warning in warnings)
    await server.build_index(plan)
    assert hnsw_of(qdrant, collection) == {"a": (0, None), "b": (0, None)}


async def test_an_existing_collection_can_be_deferred_and_gets_back_what_it_had(
    server: Sink, qdrant: QdrantTarget, collection: str
) -> None:
    plan = two_vectors(collection)
    await server.ensure_collection(plan)
    for _ in range(2):
        await server.defer_indexing(plan)
        assert hnsw_of(qdrant, collection) == {"a": (0, None), "b": (0, None)}
    await server.build_index(plan)
    assert hnsw_of(qdrant, collection) == {"a": (32, None), "b": (16, None)}


async def test_any_process_can_build_what_another_deferred(
    server: Sink, qdrant: QdrantTarget, collection: str
) -> None:
    await server.ensure_collection(two_vectors(collection), defer_hnsw=True)
    other = await open_sink(settings_of(qdrant))
    try:
        # By a plan that has one vector less: what was deferred is in the collection.
        await other.build_index(dataclasses.replace(two_vectors(collection), columns=()))
    finally:
        await other.close()
    assert hnsw_of(qdrant, collection) == {"a": (32, None), "b": (16, None)}


async def test_building_of_a_missing_collection_says_so(server: Sink, collection: str) -> None:
    for call in (server.build_index, server.defer_indexing):
        with pytest.raises(SinkError) as caught:
            await call(two_vectors(collection))
        assert caught.value.kind is ErrorKind.COLLECTION_MISSING


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("update", [1, 2])
@pytest.mark.parametrize("action", ["defer", "build"])
async def test_a_crash_between_the_steps_leaves_nothing_deferred_for_ever(
    qdrant_private: QdrantProcess, action: str, update: int, applied: bool
) -> None:
    plan = two_vectors("items")
    opened = await open_sink(settings_of(qdrant_private))
    try:
        await opened.ensure_collection(plan, defer_hnsw=action == "build")
        call = opened.defer_indexing if action == "defer" else opened.build_index
        for _ in range(update - 1):
            qdrant_private.script.slow("Collections.Update", 0.0)
        qdrant_private.script.crash("Collections.Update", applied=applied)
        with pytest.raises(SinkError):
            await call(plan)
        qdrant_private.wait_dead()
        qdrant_private.restart()
        # The load goes on, and ends.
        await opened.build_index(plan)
    finally:
        await opened.close()
    a, b = (hnsw_of(qdrant_private, "items")[name][0] for name in "ab")
    assert (a, b) in ((32, 16), (32, None))
    assert metadata_of(qdrant_private, "items") == {}


async def test_a_server_that_cannot_remember_is_not_deferred(tmp_path: Path) -> None:
    target = QdrantProcess(tmp_path / "old", version="1.15.5")
    opened = await open_sink(settings_of(target))
    try:
        for call in (
            opened.ensure_collection(items_plan("items"), defer_hnsw=True),
            opened.defer_indexing(items_plan("items")),
        ):
            with pytest.raises(ConfigError, match=r"1\.16 or later.* 1\.15\.5"):
                await call
        assert not (await opened.inspect(items_plan("items"))).exists
        await opened.ensure_collection(items_plan("items"))
        await opened.build_index(items_plan("items"))
    finally:
        await opened.close()
        await asyncio.to_thread(target.close)
