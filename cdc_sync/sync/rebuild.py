"""A rebuild at work: a pipeline of its own, with a slot of its own, that fills a second collection
from a table and keeps it in step until the table's pipeline takes it (:mod:`cdc_sync.sync.swaps`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Final

from cdc_sync.config import Settings, TableSettings
from cdc_sync.errors import ConfigError
from cdc_sync.ops.logging import get_logger
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.exclusive import lock_rebuild
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import PipelineState, RebuildState, Sink, TableRebuild
from cdc_sync.sync.control import SwapRequest
from cdc_sync.sync.opening import opening
from cdc_sync.sync.pipeline import Pipeline
from cdc_sync.sync.swaps import POLL_SECONDS
from cdc_sync.sync.taking_slot import confirmed_position
from cdc_sync.sync.trials import StoppedError

log = get_logger(__name__)

#: How often the pipeline's slot is looked at while the rebuild stands.
_LOOK_SECONDS: Final = 0.5


def worker_settings(settings: Settings, rebuild: RebuildState) -> Settings:
    """The settings of the pipeline that rebuilds a table of the pipeline with these settings.

    It reads by the same publication: that has to carry what the new collection needs in any case,
    before the swap.
    """
    return settings.model_copy(
        update={
            "source": settings.source.model_copy(update={"slot": rebuild.slot}),
            "tables": [TableSettings.model_validate_json(rebuild.settings)],
            "pipeline": settings.pipeline.model_copy(update={"name": rebuild.worker}),
            "migration": settings.migration.model_copy(update={"adopt": False}),
            "verify": settings.verify.model_copy(update={"continuous": False}),
        }
    )


def as_server(sink: Sink) -> ServerSink:
    """The sink, if it has aliases. Raises :class:`ConfigError`."""
    if isinstance(sink, ServerSink):
        return sink
    raise ConfigError(
        "a rebuild needs a Qdrant server: an embedded database has no aliases by which readers "
        "could go over",
        "Copy into a new embedded database instead: another qdrant.url, source.slot and "
        "pipeline.name, and cdc-sync run.",
    )


def answer_on_record(state: PipelineState | None, table: str) -> TableRebuild:
    """What the pipeline has made of requests about a table."""
    for one in state.tables if state is not None else ():
        if one.table == table and one.rebuild is not None:
            return one.rebuild
    return TableRebuild("")


class RebuildStand:
    """The rebuild's side of a swap: it stands where its request is, until that is decided.

    ``settings`` are those of the table's pipeline. :meth:`attach` it to the pipeline that rebuilds.
    """

    def __init__(self, settings: Settings, rebuild: RebuildState) -> None:
        self._settings = settings
        self._table = rebuild.table
        self._pipeline: Pipeline | None = None

    def attach(self, pipeline: Pipeline) -> None:
        """Say whose stream stands."""
        self._pipeline = pipeline

    @property
    def follows(self) -> str:
        """The table's pipeline."""
        return self._settings.pipeline.name

    async def compare(self) -> None:
        """The stream begins anew, maybe before a place at which the rebuild has said it stands:
        take that back before anything is applied once more. Raises :class:`StoppedError` if the
        collection was taken already, since then it is the pipeline's alone."""
        sink = self._sink()
        rebuild = await sink.state.rebuild(self.follows, self._table)
        if rebuild is None or not rebuild.token:
            return
        if rebuild.phase == "ready":
            # Under the lock under which it is taken: from here on it is not, or was before.
            await self._change(sink, rebuild.token, phase="requested", lsn=0)
        if await self._is_taken(sink, rebuild.token):
            assert self._pipeline is not None
            self._pipeline.stop()
            raise StoppedError

    async def meet(self, request: SwapRequest, lsn: int, *, settled: bool) -> None:
        """Say that everything before the request is written, and wait until it is decided."""
        sink = self._sink()
        rebuild = await sink.state.rebuild(self.follows, self._table)
        if rebuild is None or rebuild.token != request.token or rebuild.phase == "aborting":
            return
        if not await self._is_answered(sink, request.token):
            if not settled:
                # Better asked for again than the pipeline kept waiting.
                await self._withdraw(sink, request.token)
                return
            ready = await self._change(sink, request.token, phase="ready", lsn=lsn)
            if ready is None:
                return
            log.info("rebuild_stands", table=self._table, lsn=str(Lsn(lsn)))
            await self._decided(sink, ready)
        if await self._is_taken(sink, request.token):
            assert self._pipeline is not None
            # Nothing that comes after is for this collection by this pipeline.
            self._pipeline.stop()
            await asyncio.Event().wait()
        await self._withdraw(sink, request.token)
        log.info("rebuild_goes_on", table=self._table, reason="the pipeline did not take it")

    def _sink(self) -> ServerSink:
        assert self._pipeline is not None, "the stand is not attached to a pipeline"
        return as_server(self._pipeline.sink)

    async def _decided(self, sink: ServerSink, rebuild: RebuildState) -> None:
        """Wait until the pipeline has decided, or has gone on without a word."""
        looked = time.monotonic()
        while not await self._is_answered(sink, rebuild.token):
            await asyncio.sleep(POLL_SECONDS)
            if time.monotonic() - looked < _LOOK_SECONDS:
                continue
            looked = time.monotonic()
            # The position first: what was decided there was on record before it moved.
            passed = await asyncio.to_thread(confirmed_position, self._settings.source)
            if passed > rebuild.lsn and not await self._is_answered(sink, rebuild.token):
                return

    async def _is_answered(self, sink: ServerSink, token: str) -> bool:
        answer = await self._answer(sink)
        return token in (answer.answered, answer.taken)

    async def _is_taken(self, sink: ServerSink, token: str) -> bool:
        return (await self._answer(sink)).taken == token

    async def _answer(self, sink: ServerSink) -> TableRebuild:
        return answer_on_record(await sink.state.load(self.follows), self._table)

    async def _withdraw(self, sink: ServerSink, token: str) -> None:
        """Put on record that nothing is asked for."""
        await self._change(sink, token, phase="filling", token="", lsn=0)

    async def _change(self, sink: ServerSink, asked: str, **changes: object) -> RebuildState | None:
        """Change the record, if the request is still that of this token."""
        return await change_rebuild(self._settings, sink, self._table, asked, **changes)


async def change_rebuild(
    settings: Settings, sink: ServerSink, table: str, asked: str, **changes: object
) -> RebuildState | None:
    """Change the record of a rebuild of the pipeline with these settings, if its request is still
    the one of token ``asked``; None if it is not, or the rebuild is being removed."""
    lock = await opening(lock_rebuild, settings.source)
    try:
        rebuild = await sink.state.rebuild(settings.pipeline.name, table)
        if rebuild is None or rebuild.token != asked or rebuild.phase == "aborting":
            return None
        rebuild = dataclasses.replace(rebuild, **changes)  # type: ignore[arg-type]
        await sink.state.save_rebuild(rebuild)
        return rebuild
    finally:
        lock.close()
