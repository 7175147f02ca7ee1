"""``cdc-sync rebuild``: a new collection beside the old one, and the swap, under constant writes
and with a reader that must never miss a row."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest

from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import RebuildState, TableState
from cdc_sync.sync.swaps import PipelineSwaps
from cdc_sync.verify.rebuild import Outcome
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.rebuild_scene import (
    Reader,
    Writer,
    contents,
    create_items,
    finish_rebuild,
    left_over,
    rebuilding,
    with_table,
)


class Witness:
    """Compares the two collections at the very moment of the swap, while both streams stand and
    the application goes on writing."""

    def __init__(self, qdrant: QdrantTarget) -> None:
        self._qdrant = qdrant
        self._take = PipelineSwaps._take
        self.old: dict[object, tuple[object, object]] = {}
        self.new: dict[object, tuple[object, object]] = {}

    async def take(
        self, swaps: PipelineSwaps, sink: ServerSink, rebuild: RebuildState, filled: TableState
    ) -> None:
        self.old = await asyncio.to_thread(contents, self._qdrant, rebuild.old)
        self.new = await asyncio.to_thread(contents, self._qdrant, rebuild.collection)
        await self._take(swaps, sink, rebuild, filled)


def table_of(life: Running) -> str | None:
    return life.pipeline.settings.tables[0].collection


@pytest.mark.timeout(600)
@pytest.mark.requirement("R41", "R42")
@pytest.mark.parametrize(
    "seconds", [2.0, pytest.param(60.0, marks=pytest.mark.campaign)], ids=["short", "long"]
)
async def test_a_reader_never_misses_a_row(
    database18: Database, qdrant: QdrantTarget, seconds: float
) -> None:
    create_items(database18, 2000)
    settings = pipeline_settings(database18, qdrant, "items", migration={"chunk_rows": 100})
    new, alias = qdrant.new_collection_name(), qdrant.new_collection_name("alias")
    wanted = with_table(
        settings,
        collection=new,
        collection_config={"quantization_config": {"scalar": {"type": "int8"}}},
    )
    witness = Witness(qdrant)

    async def take(
        swaps: PipelineSwaps, sink: ServerSink, rebuild: RebuildState, filled: TableState
    ) -> None:
        await witness.take(swaps, sink, rebuild, filled)

    async with running(settings, database18, qdrant) as life:
        with (
            mock.patch.object(PipelineSwaps, "_take", take),
            Writer(database18) as writer,
        ):
            async with rebuilding(settings, wanted, alias, swap=False) as filling:
                with Reader(database18, qdrant, alias, settings.source.slot, writer) as reader:
                    assert await filling.ended() is Outcome.FILLED
                    async with rebuilding(settings, wanted, alias) as rebuild:
                        assert await rebuild.ended() is not Outcome.DIFFERENT
                    old = rebuild.rebuilt.rebuild.old
                    await finish_rebuild(settings, rebuild.rebuilt.rebuild)
                    frozen = await asyncio.to_thread(contents, qdrant, old)
                    before = writer.steps
                    await asyncio.sleep(seconds)
                    assert writer.steps > before
                    assert await asyncio.to_thread(contents, qdrant, old) == frozen
        assert reader.missed == []
        assert reader.reads > 5
        assert reader.expected > 200
        # Both streams stood at one position: the collections were equal, to the last point.
        assert len(witness.old) > 200
        assert witness.old == witness.new == frozen
        assert table_of(life) == new
        await life.assert_equal()
        assert left_over(database18, settings) == []
        config = qdrant.client().get_collection(new).config
        assert config.quantization_config is not None
