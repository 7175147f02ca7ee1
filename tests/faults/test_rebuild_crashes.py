"""The pipeline and the rebuild die around the swap, at each of its steps, while the application
writes: the one that comes back goes on to the same end, and nothing is left over."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cdc_sync.config import Settings
from cdc_sync.qdrant.sink import RebuildState
from cdc_sync.sync.rebuild_begin import Order
from tests.support.fix_postgres import Database
from tests.support.oracle import assert_equal
from tests.support.pipeline_process import Break, PipelineProcess
from tests.support.pipeline_task import pipeline_settings
from tests.support.qdrant_control import QdrantTarget
from tests.support.rebuild_process import Death, RebuildProcess, quick_settings
from tests.support.rebuild_scene import (
    Writer,
    abort_rebuild,
    assert_no_trace,
    create_items,
    left_over,
    sink_of,
    with_table,
)

_SWAPS = "cdc_sync.sync.swaps"
_RECORDS = "cdc_sync.sync.table_records:TableRecords"
_STATE = "cdc_sync.qdrant.server_state:ServerStateStore"
_STAND = "cdc_sync.sync.rebuild:RebuildStand"

#: Of the pipeline, in the order in which it comes there.
PIPELINE = (
    Death(f"{_SWAPS}:PipelineSwaps.meet", "before"),
    Death(f"{_SWAPS}:PipelineSwaps._decide", "before"),
    Death(f"{_STATE}.drop_ledger", "after", passes=1),
    Death(f"{_RECORDS}.rebuilt", "before"),
    Death(f"{_RECORDS}.rebuilt", "after"),
    Death("cdc_sync.qdrant.aliases:Aliases.point", "after"),
    Death(f"{_SWAPS}:PipelineSwaps._go_over", "after"),
    Death("cdc_sync.postgres.replication:ReplicationConnection.stop", "before"),
    Death("cdc_sync.sync.pipeline:Pipeline._adopt", "after", passes=2),
)
#: Of the rebuild.
REBUILD = (
    Death(f"{_STATE}.save_rebuild", "after"),
    Death("cdc_sync.sync.rebuild_begin:_make_alias", "after"),
    Death("cdc_sync.postgres.replication:ReplicationConnection.create_slot", "after"),
    Death("cdc_sync.sync.resync:Resync.complete", "after"),
    Death("cdc_sync.verify.rebuild:change_rebuild", "after"),
    Death("cdc_sync.verify.rebuild:Conductor._emit", "after"),
    Death(f"{_STAND}.meet", "before"),
    Death(f"{_STAND}._change", "after"),
    Death(f"{_STAND}._is_taken", "true"),
    Death("cdc_sync.sync.rebuild_end:_remove_worker", "before"),
    Death("cdc_sync.sync.uninstall:drop_slot", "after"),
    Death("cdc_sync.sync.rebuild_end:_remove_worker", "after"),
)
_SOON = (PIPELINE[3], PIPELINE[4], PIPELINE[5], REBUILD[4], REBUILD[7], REBUILD[10])


def _cases(deaths: tuple[Death, ...]) -> list[object]:
    """All in the campaign, some of them always."""
    return [
        pytest.param(one, id=str(one), marks=[] if one in _SOON else pytest.mark.campaign)
        for one in deaths
    ]


@dataclass
class Scene:
    """A table that is written to, the pipeline that keeps it, and what it shall become."""

    database: Database
    qdrant: QdrantTarget
    settings: Settings
    wanted: Settings
    alias: str
    directory: Path
    writer: Writer

    @property
    def order(self) -> Order:
        return Order(self.settings, self.wanted, "items", self.alias)

    @property
    def new(self) -> str:
        return str(self.wanted.tables[0].collection)

    @property
    def old(self) -> str:
        return str(self.settings.tables[0].collection)

    @contextlib.contextmanager
    def pipeline(self, sabotage: Break | None = None) -> Iterator[PipelineProcess]:
        life = PipelineProcess(self.settings, self.directory / "pipeline.log", sabotage)
        try:
            yield life
        finally:
            life.close()

    @contextlib.contextmanager
    def rebuild(self, sabotage: Break | None = None) -> Iterator[RebuildProcess]:
        life = RebuildProcess(self.order, self.directory / "rebuild.log", sabotage)
        try:
            yield life
        finally:
            life.close()

    async def records(self) -> list[RebuildState]:
        async with sink_of(self.settings) as sink:
            return await sink.state.rebuilds(self.settings.pipeline.name)

    def is_over(self) -> bool:
        """Whether readers have gone over, and nothing is on record any more."""
        aliases = self.qdrant.client().get_aliases().aliases
        target = {one.alias_name: one.collection_name for one in aliases}.get(self.alias)
        return target == self.new and not asyncio.run(self.records())

    def assert_kept(self, life: PipelineProcess, collection: str, exclude: Sequence[str]) -> None:
        """Once the writer has ended, the table and the collection are equal."""
        self.writer.stop()
        with self.database.connect() as connection:
            life.wait_settled(connection)
        assert_equal(
            self.database.url,
            "items",
            qdrant_url=self.qdrant.url,
            collection=collection,
            api_key=self.qdrant.api_key,
            exclude=exclude,
        )

    def assert_taken(self, life: PipelineProcess) -> None:
        """The table and the new collection are equal, readers use it, and nothing is left."""
        self.assert_kept(life, self.new, ["body"])
        client = self.qdrant.client()
        aliases = {one.alias_name: one.collection_name for one in client.get_aliases().aliases}
        assert aliases[self.alias] == self.new
        assert client.collection_exists(self.old)
        assert left_over(self.database, self.settings) == []
        assert asyncio.run(self.records()) == []
        assert self.qdrant.violations() == []


@pytest.fixture
def scene(database18: Database, qdrant: QdrantTarget, tmp_path: Path) -> Iterator[Scene]:
    create_items(database18, 400)
    settings = quick_settings(pipeline_settings(database18, qdrant, "items"))
    wanted = with_table(settings, collection=qdrant.new_collection_name(), exclude=["body"])
    alias = qdrant.new_collection_name("alias")
    with Writer(database18) as writer:
        yield Scene(database18, qdrant, settings, wanted, alias, tmp_path, writer)


@pytest.mark.requirement("R41", "R42")
@pytest.mark.parametrize("death", _cases(PIPELINE))
def test_the_pipeline_dies(scene: Scene, death: Death) -> None:
    with scene.pipeline() as life:
        life.wait_streaming()
        assert life.stop().kind == ""
    with scene.pipeline(death.sabotage()) as life, scene.rebuild() as rebuild:
        assert life.exit_code(120) == 137, life.log()
        with scene.pipeline() as again:
            assert rebuild.outcome() == "taken"
            scene.assert_taken(again)


@pytest.mark.parametrize("death", _cases(REBUILD))
def test_the_rebuild_dies(scene: Scene, death: Death) -> None:
    with scene.pipeline() as life:
        life.wait_streaming()
        with scene.rebuild(death.sabotage()) as rebuild:
            rebuild.died()
        with scene.rebuild() as again:
            assert again.outcome() == "taken"
        scene.assert_taken(life)


@pytest.mark.parametrize(
    "death",
    [
        pytest.param(one, id=str(one), marks=[] if one is REBUILD[5] else pytest.mark.campaign)
        for one in REBUILD[:7]
    ],
)
def test_an_abort_after_the_rebuild_died(scene: Scene, death: Death) -> None:
    with scene.pipeline() as life:
        life.wait_streaming()
        with scene.rebuild(death.sabotage()) as rebuild:
            rebuild.died()
        (record,) = asyncio.run(scene.records())
        asyncio.run(abort_rebuild(scene.settings))
        asyncio.run(assert_no_trace(scene.database, scene.qdrant, scene.settings, record))
        scene.assert_kept(life, scene.old, [])


@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_both_die_at_any_moment(scene: Scene) -> None:
    """Twenty times one of the two is killed after a while; then both may go on to the end."""
    chance = random.Random(20)
    for _ in range(20):
        with scene.pipeline() as life, scene.rebuild() as rebuild:
            time.sleep(chance.uniform(0.2, 4.0))
            (rebuild if chance.random() < 0.5 else life).kill()
            time.sleep(0.2)
        if scene.is_over():
            break
    with scene.pipeline() as life:
        if not scene.is_over():
            with scene.rebuild() as rebuild:
                assert rebuild.outcome() == "taken"
        scene.assert_taken(life)
