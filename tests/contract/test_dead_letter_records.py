"""What dead letters need of a sink: records with all their fields, who refused a row, and to see
when a collection's configuration changes. On the embedded engine and on a server."""

from __future__ import annotations

import dataclasses
import uuid
from pathlib import Path

import orjson
import pytest
from qdrant_client import models

from cdc_sync.config import QdrantSettings
from cdc_sync.qdrant.open import open_sink, read_dead_letters
from cdc_sync.qdrant.sink import DeadLetter, Sink, TableWriter
from tests.support import sink_rows as rows
from tests.support.sink_rows import item, items_plan, plan_of
from tests.support.sinks import partials, upserts


def letter(pipeline: str, key: str, *values: str) -> DeadLetter:
    return DeadLetter(
        pipeline,
        'odd "schema".t\u00e9',
        key,
        "0/16B3748",
        "2026-01-01T00:00:00+00:00",
        "why",
        kind="mapping",
        attempts=41,
        first_seen="2025-01-01T00:00:00+00:00",
        last_seen="2026-01-01T00:00:00+00:00",
        key_values=values or None,
    )


async def test_every_field_is_kept(sink: Sink, settings: QdrantSettings) -> None:
    name = f"p{uuid.uuid4().hex[:8]}"
    found = [
        letter(name, "(key cannot be mapped)"),
        letter(name, "1", "1"),
        letter(name, "2", "", '"a", [\\n]', "\u00e9\n\U0001f600"),
        DeadLetter(name, "public.t", "3", "0/1", "2026-01-01T00:00:00Z", "of 0.1"),
    ]
    await sink.state.park(found)
    wanted = sorted(found, key=lambda one: (one.table, one.key))
    assert await sink.state.dead_letters(name) == wanted
    # Also from beside the process that has the sink open.
    assert await read_dead_letters(settings, name) == wanted
    again = dataclasses.replace(found[1], attempts=42, key_values=("1", "2"))
    await sink.state.park([again])
    assert again in await sink.state.dead_letters(name)
    await sink.state.release(name, [(one.table, one.key) for one in found])
    assert await sink.state.dead_letters(name) == []


async def test_records_of_0_1_are_read(
    sink: Sink, settings: QdrantSettings, request: pytest.FixtureRequest
) -> None:
    name = f"p{uuid.uuid4().hex[:8]}"
    await sink.state.park([letter(name, "7", "7")])
    newer = ("error", "attempts", "first_seen", "last_seen", "key_values")
    if settings.url.startswith("edge:"):
        directory = Path(settings.url.removeprefix("edge:")) / "state" / "dead_letters"
        path = directory / f"{name}.json"
        (record,) = orjson.loads(path.read_bytes())
        path.write_bytes(orjson.dumps([{k: v for k, v in record.items() if k not in newer}]))
    else:
        client = request.getfixturevalue("qdrant").client()
        found = models.Filter(
            must=[models.FieldCondition(key="pipeline", match=models.MatchValue(value=name))]
        )
        client.delete_payload("_cdc_sync", newer, points=found, wait=True)
    (read,) = await sink.state.dead_letters(name)
    assert (read.key, read.reason, read.attempts) == ("7", "why", 1)
    assert (read.kind, read.first_seen, read.key_values) == ("", "", None)
    await sink.state.forget(name)


async def test_rows_that_have_no_point_are_told_from_points_that_are_refused(
    sink: Sink, collection: str, writer: TableWriter
) -> None:
    bad = item(5, "bad")
    bad[3] = rows.vector(1.0, 2.0, 3.0)
    await writer.apply(upserts((1, item(1)), (2, item(2))))
    applied = await writer.apply(upserts((5, bad), (6, item(6))))
    assert applied.unmappable == {5}
    applied = await writer.apply(partials((1, bad), (2, item(2, "ok"))))
    assert applied.unmappable == {1}
    # The collection lacks a vector that some rows have.
    narrow = f"{collection}_narrow"
    await sink.ensure_collection(plan_of(narrow, rows.COLUMNS[:4]))
    wide = sink.writer(items_plan(narrow))
    applied = await wide.apply(upserts((1, item(1, "t", None, large=(1.0, 2.0, 3.0))), (5, bad)))
    assert {id_ for id_, _ in applied.refused} == {1, 5}
    assert applied.unmappable == {5}


async def test_a_configuration_that_changes_is_seen(
    sink: Sink, collection: str, settings: QdrantSettings, request: pytest.FixtureRequest
) -> None:
    plan = items_plan(collection)
    assert await sink.configuration(plan) == ""
    await sink.ensure_collection(plan)
    before = await sink.configuration(plan)
    await sink.writer(plan).apply(upserts((1, item(1))))
    assert await sink.configuration(plan) == before
    if settings.url.startswith("edge:"):
        assert before == ""
        return
    client = request.getfixturevalue("qdrant").client()
    client.update_collection(
        collection, optimizers_config=models.OptimizersConfigDiff(indexing_threshold=12345)
    )
    assert await sink.configuration(plan) != before


async def test_reading_dead_letters_creates_nothing(tmp_path: Path) -> None:
    settings = QdrantSettings.model_validate({"url": f"edge:{tmp_path / 'absent'}"})
    assert await read_dead_letters(settings, "p") == []
    assert not (tmp_path / "absent").exists()
    opened = await open_sink(settings)
    await opened.close()
