"""What only an embedded sink does: files, locks, damage, reopening; and opening sinks by URL."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from qdrant_edge import EdgeShard

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ConfigError, ErrorKind, SinkError, StateError
from cdc_sync.mapping.plan import (
    PayloadIndex,
    PayloadIndexType,
)
from cdc_sync.qdrant.edge import EdgeSink
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Changes, Sink
from tests.support import sink_rows as rows
from tests.support.sink_rows import item, items_plan, plan_of
from tests.support.sinks import STATE, content, ready, upserts

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
    changes = Changes(upserts=[(n, item(n)) for n in range(700)])
    await sink.writer(items_plan("items")).apply(changes)
    print("ready", flush=True)
    sys.stdin.read()
asyncio.run(main())
"""


def _holder(url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _HOLDER, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )


async def test_edge_in_use_by_another_process_and_killed(edge_settings: QdrantSettings) -> None:
    with _holder(edge_settings.url) as holder:
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


async def test_edge_reads_create_nothing(edge_settings: QdrantSettings) -> None:
    opened = await open_sink(edge_settings)
    assert await opened.state.load("p") is None
    assert await opened.state.dead_letters("p") == []
    await opened.state.release("p", [("t", "1")])
    await opened.state.forget("p")
    assert not (await opened.inspect(items_plan("items"))).exists
    await opened.close()
    assert not _edge_path(edge_settings).parent.exists()


async def test_edge_shard_loaded_by_another_program(edge_settings: QdrantSettings) -> None:
    """A program that opens a shard by itself, past our lock, is told apart from damage."""
    plan = items_plan("items")
    opened = await open_sink(edge_settings)
    await opened.ensure_collection(plan)
    await opened.close()
    other = EdgeShard.load(str(_edge_path(edge_settings) / "collections" / "items"))
    again = await open_sink(edge_settings)
    with pytest.raises(SinkError, match="open in another program") as caught:
        await again.inspect(plan)
    assert caught.value.kind is ErrorKind.SINK_UNAVAILABLE
    other.close()
    assert (await again.inspect(plan)).exists
    await again.close()


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


async def test_edge_path_that_cannot_be_created(tmp_path: Path) -> None:
    opened = await open_sink(QdrantSettings.model_validate({"url": f"edge:{tmp_path / 'x' / 'y'}"}))
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError, match="cannot be opened"):
        await opened.ensure_collection(items_plan("items"))
    await opened.close()


async def test_ping_and_version(sink: Sink) -> None:
    await sink.ping()
    assert sink.version[0].isdigit()
