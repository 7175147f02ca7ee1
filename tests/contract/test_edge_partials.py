"""Partial rows in an embedded database, which says only when it changes a point that it has none:
no point is read for that, and none is taken for written that is not there."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from qdrant_edge import EdgeShard, UpdateOperation

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ErrorKind, SinkError
from cdc_sync.mapping.decoding import JsonValue
from cdc_sync.qdrant.edge_database import STEP_POINTS, EdgeDatabase
from cdc_sync.qdrant.edge_writer import EdgeWriter
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Applied, Sink, TableWriter
from cdc_sync.rows import UNCHANGED, PointId
from tests.support import sink_rows as rows
from tests.support.sink_rows import item, items_plan, plan_of
from tests.support.sinks import content, partials, ready, upserts


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[Sink]:
    opened = await open_sink(QdrantSettings.model_validate({"url": f"edge:{tmp_path / 'edge'}"}))
    yield opened
    await opened.close()


@pytest.fixture
async def writer(sink: Sink) -> TableWriter:
    return await ready(sink, items_plan("items"))


async def test_only_what_must_be_kept_is_read(
    writer: TableWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    await writer.apply(upserts(*((n, item(n, "a", {"n": n})) for n in range(1, 5))))
    read: list[PointId] = []
    stored = EdgeWriter._stored

    def watched(self: EdgeWriter, ids: Sequence[PointId]) -> object:
        read.extend(ids)
        return stored(self, ids)

    monkeypatch.setattr(EdgeWriter, "_stored", watched)
    known = item(1, "b", {"n": 10}, UNCHANGED, UNCHANGED)
    assert await writer.apply(partials((1, known), (2, item(2, "b", None)))) == Applied()
    assert read == []
    unknown = item(3, "c", UNCHANGED, UNCHANGED, UNCHANGED)
    assert await writer.apply(partials((1, known), (3, unknown))) == Applied()
    assert read == [3]
    payloads = {id_: point.payload for id_, point in (await content(writer)).items()}
    assert payloads[1] == {"id": 1, "title": "b", "doc": {"n": 10}}
    assert payloads[3] == {"id": 3, "title": "c", "doc": {"n": 3}}


async def test_missing_points_among_many(writer: TableWriter) -> None:
    """Across steps, whatever the update carries; nothing is made of them."""
    count = 2 * STEP_POINTS + 50
    there = [n for n in range(count) if n % 3]
    await writer.apply(upserts(*((n, item(n, "old")) for n in there)))
    shapes = (
        lambda n: item(n, "new", None, UNCHANGED, UNCHANGED),
        lambda n: item(n, "new", None, (5.0, 6.0), UNCHANGED),
        lambda n: item(n, "new", None, UNCHANGED, None),
        lambda n: item(n, "new", UNCHANGED, UNCHANGED, UNCHANGED),
    )
    applied = await writer.apply(partials(*((n, shapes[n % 4](n)) for n in range(count))))
    assert applied == Applied(frozenset(n for n in range(count) if not n % 3))
    found = await content(writer)
    assert sorted(found) == there
    assert {point.payload["title"] for point in found.values()} == {"new"}
    assert found[1].vectors == {"small": [5.0, 6.0], "large": [3.0, 4.0, 5.0]}
    assert found[2].vectors == {"small": [1.0, 2.0]}


async def test_updates_of_missing_points_are_replayed_harmlessly(
    writer: TableWriter, tmp_path: Path
) -> None:
    """They stand in the WAL. Loaded from it, the points that came after them are there."""
    shape = (UNCHANGED, UNCHANGED)
    await writer.apply(upserts((1, item(1, "a"))))
    applied = await writer.apply(
        partials((1, item(1, "b", None, *shape)), (2, item(2, "lost", None, *shape)))
    )
    assert applied.missing == {2}
    await writer.apply(upserts((3, item(3, "after"))))
    again = await writer.apply(partials((2, item(2, "lost", None, *shape))))
    assert again.missing == {2}
    await writer.apply(upserts((2, item(2, "fetched"))))
    # As after a kill: nothing was flushed.
    shutil.copytree(tmp_path / "edge" / "collections" / "items", tmp_path / "killed")
    shard = EdgeShard.load(str(tmp_path / "killed"))
    found = shard.retrieve([1, 2, 3], with_payload=True, with_vector=False)
    titles: dict[object, JsonValue] = {one.id: (one.payload or {})["title"] for one in found}
    shard.close()
    assert titles == {1: "b", 2: "fetched", 3: "after"}


async def test_refused_vectors_of_partials(sink: Sink, writer: TableWriter) -> None:
    """What the collection does not take is refused, and the rest written."""
    await writer.apply(upserts((1, item(1, "a")), (2, item(2, "a"))))
    wider = plan_of("items", [*rows.COLUMNS[:3], rows.dense("small", 3), rows.COLUMNS[4]])
    applied = await sink.writer(wider).apply(
        partials(
            (1, [*item(1, "b")[:3], rows.vector(1, 2, 3), UNCHANGED]),
            (2, item(2, "b", None, UNCHANGED, UNCHANGED)),
        )
    )
    assert not applied.missing
    ((refused, why),) = applied.refused
    assert refused == 1
    assert "dimension" in why
    assert (await content(writer))[2].payload["title"] == "b"


@pytest.mark.parametrize(
    "says", ["Service internal error: no space left", "Failed: No point with id 1"]
)
async def test_a_failing_database_is_no_missing_point(
    writer: TableWriter, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    await writer.apply(upserts((1, item(1, "a"))))

    def fail(self: EdgeDatabase, collection: str, operation: UpdateOperation) -> None:
        raise Exception(says)

    monkeypatch.setattr(EdgeDatabase, "update", fail)
    with pytest.raises(SinkError) as caught:
        await writer.apply(partials((1, item(1, "b", None, UNCHANGED, UNCHANGED))))
    assert caught.value.kind is ErrorKind.SINK_UNKNOWN
