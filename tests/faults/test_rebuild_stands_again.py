"""The rebuild loses its connection while it stands at the swap, and its stream begins again before
that: what it applies once more must not come over what the pipeline has written since."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cdc_sync.errors import ErrorKind, SinkError, SourceError
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.control import emit_messages
from cdc_sync.qdrant.aliases import Aliases
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import RebuildState, SourceMark, TableRebuild, TableState
from cdc_sync.sync import control, swaps
from cdc_sync.sync.applier import Applier
from cdc_sync.sync.control import PREFIX, RebuildMessage, SwapRequest, rebuild_content
from cdc_sync.sync.gather import Batch
from cdc_sync.sync.rebuild import answer_on_record
from cdc_sync.sync.source_history import SourceHistory
from cdc_sync.sync.stream import StreamSession
from cdc_sync.sync.swaps import PipelineSwaps
from cdc_sync.sync.table_records import TableRecords
from cdc_sync.verify import rebuild as conducting
from cdc_sync.verify.rebuild import Conductor
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.rebuild_scene import (
    TABLE,
    Rebuilding,
    Scene,
    finish_rebuild,
    make_scene,
    rebuilding,
    sink_of,
    until,
)


class Held:
    """Steps that wait until they are let go of: the request, the pipeline's decision, the rebuild's
    way back to its slot, and what it writes then. From the request on the rebuild confirms nothing
    of what it applies, as if Postgres had crashed before it has saved the slot."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.request = asyncio.Event()
        self.decision = asyncio.Event()
        self.session = asyncio.Event()
        self.writing = asyncio.Event()
        self.session.set()
        self.writing.set()
        self.rebuild: Rebuilding | None = None
        #: Steps that waited.
        self.waited: set[str] = set()
        monkeypatch.setattr(Conductor, "_ask", self._asking(Conductor._ask))
        monkeypatch.setattr(PipelineSwaps, "meet", self._deciding(PipelineSwaps.meet))
        monkeypatch.setattr(SourceHistory, "load", self._beginning(SourceHistory.load))
        monkeypatch.setattr(Applier, "apply", self._applying(Applier.apply))
        monkeypatch.setattr(StreamSession, "_confirm", self._confirming(StreamSession._confirm))

    async def _pass(self, step: str, gate: asyncio.Event) -> None:
        if not gate.is_set():
            self.waited.add(step)
        await gate.wait()

    def _asking(self, ask: Callable[..., Awaitable[None]]) -> object:
        async def held(conductor: Conductor, *arguments: object) -> None:
            await self._pass("request", self.request)
            await ask(conductor, *arguments)

        return held

    def _deciding(self, meet: Callable[..., Awaitable[None]]) -> object:
        async def held(
            swaps: PipelineSwaps, request: SwapRequest, lsn: int, *, settled: bool
        ) -> None:
            await self._pass("decision", self.decision)
            await meet(swaps, request, lsn, settled=settled)

        return held

    def _beginning(self, load: Callable[..., Awaitable[SourceMark | None]]) -> object:
        async def held(history: SourceHistory) -> SourceMark | None:
            parts = self.rebuild.pipeline._parts if self.rebuild is not None else None
            if parts is not None and history is parts.history:
                await self._pass("session", self.session)
            return await load(history)

        return held

    def _applying(self, apply: Callable[..., Awaitable[None]]) -> object:
        async def held(applier: Applier, batch: Batch, *arguments: object) -> None:
            if self.rebuild is not None and applier._sink is self.rebuild.pipeline._sink:
                await self._pass("writing", self.writing)
            await apply(applier, batch, *arguments)

        return held

    def _confirming(self, confirm: Callable[..., Awaitable[None]]) -> object:
        async def forgotten(session: StreamSession, force: bool = False) -> None:
            rebuild = self.rebuild
            ours = rebuild is not None and session.positions is rebuild.pipeline.positions
            if not ours or "request" not in self.waited:
                await confirm(session, force)

        return forgotten


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    return Held(monkeypatch)


async def record(scene: Scene) -> RebuildState:
    (found,) = await scene.records()
    return found


async def is_taken(scene: Scene) -> bool:
    async with sink_of(scene.settings) as sink:
        state = await sink.state.load(scene.settings.pipeline.name)
    assert state is not None
    answer = state.tables[0].rebuild
    return answer is not None and answer.taken != ""


def cut(database: Database, slot: str) -> None:
    """End the connection over which a slot streams."""
    database.execute(
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s",
        (slot,),
    )


async def stand(scene: Scene, held: Held, life: Running, rebuild: Rebuilding) -> None:
    """Until the rebuild stands, and has applied changes that its slot does not know of."""
    held.rebuild = rebuild
    await life.wait(lambda: "request" in held.waited, "the request")
    life.database.execute("UPDATE items SET n = -1 WHERE id < 20; DELETE FROM items WHERE id = 20")
    held.request.set()
    await until(scene.is_ready)
    await life.wait(lambda: "decision" in held.waited, "the pipeline")


@asynccontextmanager
async def side_by_side(
    database: Database, qdrant: QdrantTarget
) -> AsyncIterator[tuple[Scene, Running, Rebuilding]]:
    """The pipeline, and a rebuild of its table."""
    scene = make_scene(database, qdrant, exclude=["body"])
    async with (
        running(scene.settings, database, qdrant) as life,
        rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild,
    ):
        yield scene, life, rebuild


def change(database: Database) -> None:
    """Change again what was changed before the rebuild stood."""
    database.execute(
        "UPDATE items SET n = -2 WHERE id < 20; INSERT INTO items (id, n) VALUES (20, -2)"
    )


async def assert_over(scene: Scene, life: Running, rebuild: Rebuilding) -> None:
    await rebuild.ended()
    assert await is_taken(scene)
    await finish_rebuild(scene.settings, rebuild.rebuilt.rebuild)
    await life.assert_equal(exclude=["body"])
    assert life.pipeline.tables[0].plan.collection == scene.new


@pytest.mark.requirement("R46")
async def test_it_is_not_taken_while_it_comes_there_again(
    database18: Database, qdrant: QdrantTarget, held: Held
) -> None:
    async with side_by_side(database18, qdrant) as (scene, life, rebuild):
        await stand(scene, held, life, rebuild)
        held.writing.clear()
        cut(database18, (await record(scene)).slot)
        await life.wait(lambda: "writing" in held.waited, "the stream from before the swap")
        held.decision.set()
        change(database18)

        async def is_decided() -> bool:
            return await is_taken(scene) or (await record(scene)).phase == "requested"

        await until(is_decided)
        if await is_taken(scene):
            await life.caught_up()
        held.writing.set()
        await assert_over(scene, life, rebuild)


@pytest.mark.requirement("R46")
async def test_what_was_taken_meanwhile_is_not_written_again(
    database18: Database, qdrant: QdrantTarget, held: Held
) -> None:
    async with side_by_side(database18, qdrant) as (scene, life, rebuild):
        await stand(scene, held, life, rebuild)
        held.session.clear()
        cut(database18, (await record(scene)).slot)
        await life.wait(lambda: "session" in held.waited, "the end of the connection")
        held.decision.set()
        await until(lambda: is_taken(scene))
        change(database18)
        await life.caught_up()
        held.session.set()
        await assert_over(scene, life, rebuild)


@pytest.mark.parametrize("reason", ["stale", "not copied"])
async def test_it_is_not_taken_when_its_record_says_that_it_is_to_be_read_again(
    database18: Database, qdrant: QdrantTarget, held: Held, reason: str
) -> None:
    """As it does when its slot was lost meanwhile."""
    async with side_by_side(database18, qdrant) as (scene, life, rebuild):
        await stand(scene, held, life, rebuild)
        async with sink_of(scene.settings) as sink:
            worker = (await record(scene)).worker
            if reason == "stale":
                await TableRecords(sink.state, worker, None).all_stale()
            else:
                state = await sink.state.load(worker)
                assert state is not None
                tables = tuple(dataclasses.replace(t, copied=False) for t in state.tables)
                await sink.state.save(dataclasses.replace(state, tables=tables))
        asked = (await record(scene)).token
        held.decision.set()

        async def is_answered() -> bool:
            async with sink_of(scene.settings) as sink:
                state = await sink.state.load(scene.settings.pipeline.name)
            assert state is not None
            return answer_on_record(state, TABLE).answered == asked

        await until(is_answered)
        assert not await is_taken(scene)
        assert life.pipeline.tables[0].plan.collection == scene.old


@pytest.mark.parametrize(
    "changes",
    [{"phase": "requested"}, {"lsn": 8}, {"token": "1" * 32}, {"phase": "aborting"}],
    ids=str,
)
async def test_it_is_not_taken_when_its_record_has_changed_before_the_lock(
    database18: Database,
    qdrant: QdrantTarget,
    held: Held,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    scene = make_scene(database18, qdrant, exclude=["body"])
    decide: Callable[..., Awaitable[bool]] = PipelineSwaps._decide
    decisions: list[bool] = []

    async def changed(
        swaps: PipelineSwaps, sink: ServerSink, rebuild: RebuildState, lsn: int
    ) -> bool:
        await sink.state.save_rebuild(dataclasses.replace(rebuild, **changes))
        decisions.append(await decide(swaps, sink, rebuild, lsn))
        return decisions[-1]

    monkeypatch.setattr(PipelineSwaps, "_decide", changed)
    held.decision.set()
    held.request.set()
    async with (
        running(scene.settings, database18, qdrant) as life,
        rebuilding(scene.settings, scene.wanted, scene.alias),
    ):
        await life.wait(lambda: bool(decisions), "the decision")
        assert decisions[0] is False
        assert not await is_taken(scene)


@pytest.mark.requirement("R49")
async def test_a_request_that_is_refused_is_made_again(
    database18: Database, qdrant: QdrantTarget, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may write requests, until no more of them are heard for a while."""
    monkeypatch.setattr(control, "_SECONDS_A_SWAP", 1.0)
    monkeypatch.setattr(conducting, "_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(conducting, "_LOOK_SECONDS", 0.1)
    scene = make_scene(database18, qdrant, exclude=["body"])
    held.decision.set()
    async with (
        running(scene.settings, database18, qdrant) as life,
        rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild,
    ):
        await life.wait(lambda: "request" in held.waited, "the request")
        forged = rebuild_content(RebuildMessage(scene.settings.pipeline.name, TABLE, "0" * 32))
        with database18.connect() as connection:
            emit_messages(connection, PREFIX, [forged] * 40)
        held.request.set()
        await rebuild.ended()
        assert sum("goes over at" in line for line in rebuild.said) > 1
        await assert_over(scene, life, rebuild)


async def test_a_request_that_could_not_be_written_is_written_later(
    database18: Database, qdrant: QdrantTarget, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[bool] = []

    def refused_once(connection: PgConnection, prefix: str, contents: Sequence[bytes]) -> Lsn:
        tries.append(True)
        if len(tries) == 1:
            raise SourceError(ErrorKind.SOURCE_UNAVAILABLE, "the server is restarting")
        return emit_messages(connection, prefix, contents)

    monkeypatch.setattr(conducting, "emit_messages", refused_once)
    held.decision.set()
    held.request.set()
    async with side_by_side(database18, qdrant) as (scene, life, rebuild):
        await assert_over(scene, life, rebuild)


async def test_what_another_run_of_the_command_has_finished_is_not_removed(
    database18: Database, qdrant: QdrantTarget, held: Held
) -> None:
    """Both were at work on one rebuild, and this one sees last that its record is gone."""
    held.decision.set()
    held.request.set()
    async with side_by_side(database18, qdrant) as (scene, life, rebuild):
        await assert_over(scene, life, rebuild)
        ended = await conducting._ended(scene.settings, rebuild.rebuilt)
        assert ended.outcome is conducting.Outcome.TAKEN
        assert qdrant.client().collection_exists(scene.new)
        await life.assert_equal(exclude=["body"])


async def test_a_decision_whose_answer_is_lost_is_seen_by_the_next_try(
    database18: Database, qdrant: QdrantTarget, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    rebuilt = TableRecords.rebuilt
    lost: list[str] = []

    async def unanswered(records: TableRecords, new: TableState) -> None:
        await rebuilt(records, new)
        if not lost:
            lost.append(new.table)
            raise SinkError(ErrorKind.SINK_UNKNOWN, "the answer was lost")

    monkeypatch.setattr(TableRecords, "rebuilt", unanswered)
    held.decision.set()
    held.request.set()
    async with side_by_side(database18, qdrant) as (scene, life, rebuild):
        await life.wait(lambda: bool(lost), "the decision")
        database18.execute("UPDATE items SET n = -2 WHERE id < 20")
        await assert_over(scene, life, rebuild)
        assert scene.alias_of(scene.new) == [scene.alias]


async def test_an_alias_that_cannot_be_moved_for_a_moment_is_moved(
    database18: Database, qdrant: QdrantTarget, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers would have stayed with a collection that nobody writes to."""
    scene = make_scene(database18, qdrant, exclude=["body"])
    point = Aliases.point
    refused: list[str] = []

    async def refused_at_first(aliases: Aliases, alias: str, collection: str) -> None:
        if collection == scene.new and len(refused) < 3:
            refused.append(alias)
            raise SinkError(ErrorKind.SINK_UNAVAILABLE, "gone for a moment")
        await point(aliases, alias, collection)

    monkeypatch.setattr(Aliases, "point", refused_at_first)
    held.decision.set()
    held.request.set()
    async with (
        running(scene.settings, database18, qdrant) as life,
        rebuilding(scene.settings, scene.wanted, scene.alias) as rebuild,
    ):
        await assert_over(scene, life, rebuild)
        assert len(refused) == 3
        await until(lambda: _is_alias_of(scene, scene.new))


async def _is_alias_of(scene: Scene, collection: str) -> bool:
    return await asyncio.to_thread(scene.alias_of, collection) == [scene.alias]


async def answer(scene: Scene) -> TableRebuild:
    """What the pipeline has put on record of requests."""
    async with sink_of(scene.settings) as sink:
        return answer_on_record(await sink.state.load(scene.settings.pipeline.name), TABLE)


async def test_what_was_refused_is_not_taken_when_the_pipeline_comes_there_again(
    database18: Database, qdrant: QdrantTarget, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rebuild has been told to go on, and does."""
    monkeypatch.setattr(conducting, "_RETRY_SECONDS", 0.1)
    async with side_by_side(database18, qdrant) as (scene, life, rebuild):
        await stand(scene, held, life, rebuild)
        refused = (await record(scene)).token
        async with sink_of(scene.settings) as sink:
            records = TableRecords(sink.state, scene.settings.pipeline.name, None)
            await records.rebuild(TABLE, lambda known: dataclasses.replace(known, answered=refused))
        held.decision.set()
        await until(lambda: is_taken(scene))
        assert (await answer(scene)).taken != refused
        await assert_over(scene, life, rebuild)


async def test_a_rebuild_that_is_being_removed_is_not_waited_for(
    database18: Database, qdrant: QdrantTarget, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swaps, "WAIT_SECONDS", 1_000_000.0)
    async with side_by_side(database18, qdrant) as (scene, life, rebuild):
        await stand(scene, held, life, rebuild)
        now = await record(scene)
        async with sink_of(scene.settings) as sink:
            await sink.state.save_rebuild(dataclasses.replace(now, phase="aborting"))
        held.decision.set()

        async def is_answered() -> bool:
            return (await answer(scene)).answered == now.token

        await until(is_answered)
        assert not await is_taken(scene)
