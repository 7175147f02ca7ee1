"""``rebuild``: fills a collection anew beside the one in use, verifies it, and has the running
pipeline and the readers go over to it."""

from __future__ import annotations

import asyncio
import enum
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ExitCode
from cdc_sync.ops.attention import IN_STEP_SECONDS
from cdc_sync.ops.logging import get_logger
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.control import emit_messages
from cdc_sync.postgres.slot import SlotInfo, read_slot
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import RebuildState
from cdc_sync.sync.control import PREFIX, RebuildMessage, rebuild_content
from cdc_sync.sync.fingerprints import is_recorded_stale
from cdc_sync.sync.pipeline import Pipeline
from cdc_sync.sync.rebuild import (
    RebuildStand,
    answer_on_record,
    as_server,
    change_rebuild,
    worker_settings,
)
from cdc_sync.sync.rebuild_begin import Order, begin, table_on_record
from cdc_sync.sync.rebuild_end import finish, is_gone_over, is_kept, is_taken, remove_made
from cdc_sync.sync.retry import is_transient
from cdc_sync.verify.data import Asked, verify_once
from cdc_sync.verify.report import Report
from cdc_sync.verify.table import LETTER_CAUSE, How

log = get_logger(__name__)

#: How long Qdrant may take to build its index before readers go over.
INDEX_SECONDS: Final = 600.0
_POLL_SECONDS: Final = 0.2
#: Between a request that was let go of and the next.
_RETRY_SECONDS: Final = 5.0
_PATIENCE_SECONDS: Final = 60.0
#: How often it is looked whether somebody wants to abort, while something else takes long.
_LOOK_SECONDS: Final = 1.0

Say = Callable[[str], None]


class Outcome(enum.Enum):
    """How a rebuild has ended, or why it has stopped before its end."""

    TAKEN = "taken"  #: the pipeline and the readers use the new collection
    UNREAD = "unread"  #: the pipeline uses it, and has not moved the readers' alias yet
    FILLED = "filled"  #: it is filled and equal, and nobody was to go over yet
    DIFFERENT = "different"  #: it is not equal to the table
    ABORTED = "aborted"  #: somebody has removed it
    STOPPED = "stopped"  #: a signal came


@dataclass(slots=True)
class Rebuilt:
    """What has become of a rebuild. ``report``: the verification's, if there was one."""

    rebuild: RebuildState
    outcome: Outcome = Outcome.STOPPED
    report: Report | None = None


@dataclass(slots=True)
class Conductor:
    """Leads the pipeline that rebuilds from the first row to the swap. :meth:`run` it beside that;
    the pipeline ends with it. ``swap``: have pipeline and readers go over; ``index_seconds``: how
    long Qdrant may take to build its index before that."""

    settings: Settings
    rebuilt: Rebuilt
    say: Say
    swap: bool = True
    index_seconds: float = INDEX_SECONDS
    error: CdcSyncError | None = None
    _said: set[str] = field(default_factory=set)
    _verified: bool = False
    _indexing_since: float | None = None
    #: The position after the last request of this process.
    _asked: int | None = None

    async def run(self, pipeline: Pipeline) -> None:
        """Until there is an outcome, or an error that does not pass by itself."""
        try:
            self.rebuilt.outcome = await self._conduct(pipeline)
        except CdcSyncError as error:
            self.error = error
        pipeline.stop()

    async def _conduct(self, pipeline: Pipeline) -> Outcome:
        while True:
            try:
                outcome = await self._step(pipeline) if pipeline.has_sink else None
            except CdcSyncError as error:
                if not is_transient(error):
                    raise
                log.warning("rebuild_waits", kind=error.kind.value, reason=error.message)
                outcome = None
            if outcome is not None:
                return outcome
            await asyncio.sleep(_POLL_SECONDS)

    async def _step(self, pipeline: Pipeline) -> Outcome | None:
        """Do what is to be done next; None: there is more."""
        sink = as_server(pipeline.sink)
        rebuild = await self._record(sink)
        if rebuild is None or rebuild.phase == "aborting":
            return Outcome.ABORTED
        if await is_taken(self.settings, sink, rebuild):
            return Outcome.TAKEN
        if rebuild.token:
            await self._take_up(rebuild)
            await self._answered(sink, rebuild.token)
        elif not await self._in_step(pipeline, sink, rebuild):
            return None
        elif not self._verified:
            return await self._verify(sink, rebuild)
        elif not self.swap:
            return Outcome.FILLED
        elif await self._is_indexed(sink, rebuild) and await self._may_ask(sink, rebuild):
            await self._ask(sink, rebuild)
        return None

    async def _record(self, sink: ServerSink) -> RebuildState | None:
        known = self.rebuilt.rebuild
        rebuild = await sink.state.rebuild(known.pipeline, known.table)
        if rebuild is not None:
            self.rebuilt.rebuild = rebuild
        return rebuild

    async def _in_step(self, pipeline: Pipeline, sink: ServerSink, rebuild: RebuildState) -> bool:
        """Whether the table is copied, and the stream not far behind."""
        if str(pipeline.board.snapshot()["state"]) != "streaming":
            return False
        for stopped in pipeline.stopped_tables:
            self._once(f"{rebuild.table} has stopped: {stopped}")
            return False
        if pipeline.positions.age(time.time()) > IN_STEP_SECONDS:
            return False
        return await _is_settled(sink, rebuild.worker, rebuild.table)

    async def _verify(self, sink: ServerSink, rebuild: RebuildState) -> Outcome | None:
        self._once(f"{rebuild.table}: copied into {rebuild.collection}; verifying")
        asked = Asked(How(examples=5), (), _PATIENCE_SECONDS)
        work = asyncio.create_task(
            verify_once(worker_settings(self.settings, rebuild), asked, _quiet)
        )
        try:
            while not (await asyncio.wait([work], timeout=_LOOK_SECONDS))[0]:
                now = await self._record(sink)
                if now is None or now.phase == "aborting":
                    return Outcome.ABORTED
        finally:
            work.cancel()
            await asyncio.wait([work])
        verified = work.result()
        report = self.rebuilt.report = verified.report
        if not report.equal:
            letters = await _shared_letters(sink, rebuild)
            if not letters or not _only_letters(report):
                return Outcome.DIFFERENT
            self.say(f"{rebuild.table}: {letters} rows cannot be written, as before")
        elif report.exit_code != ExitCode.OK:
            # Rows changed faster than it could be told whether they are equal.
            self._once(f"{rebuild.table}: verified again, since some rows changed too fast")
            return None
        self._verified = True
        self.say(f"{rebuild.table}: every row is its point")
        return None

    # -- the swap

    async def _is_indexed(self, sink: ServerSink, rebuild: RebuildState) -> bool:
        """Whether Qdrant has built what it builds in the background, or has had time enough: until
        then readers would be slower than before."""
        status = await sink.status(rebuild.collection)
        if status == "green":
            return True
        if self._indexing_since is None:
            self._indexing_since = time.monotonic()
            self._once(f"waiting for Qdrant to optimize {rebuild.collection}: it is {status}")
        return time.monotonic() - self._indexing_since > self.index_seconds

    async def _may_ask(self, sink: ServerSink, rebuild: RebuildState) -> bool:
        """Whether somebody streams from the pipeline's slot, and is not busy with this table."""
        slot = await asyncio.to_thread(self._slot)
        if slot is None or not slot.active:
            self._once(
                f"waiting for the pipeline: nothing streams from slot {self.settings.source.slot}; "
                "start it with cdc-sync run"
            )
            return False
        if rebuild.widened and not await _is_settled(sink, rebuild.pipeline, rebuild.table):
            # It reads the table again because its publication was changed.
            self._once(f"waiting for the pipeline to have read {rebuild.table} again")
            return False
        return True

    def _passed(self) -> bool:
        """Whether everything up to the request is confirmed by the pipeline."""
        slot = self._slot()
        if slot is None or self._asked is None:
            return False
        return int(slot.confirmed_flush_lsn or 0) >= self._asked

    def _slot(self) -> SlotInfo | None:
        with connect(self.settings.source, application_name="cdc_sync rebuild") as connection:
            return read_slot(connection, self.settings.source.slot)

    async def _ask(self, sink: ServerSink, rebuild: RebuildState) -> None:
        """Put a request on record and into the WAL."""
        token = secrets.token_hex(16)
        asked = await change_rebuild(
            self.settings, sink, rebuild.table, "", phase="requested", token=token
        )
        if asked is not None:
            self.rebuilt.rebuild = asked
            await asyncio.to_thread(self._emit, asked)
            await self._answered(sink, token)

    async def _take_up(self, rebuild: RebuildState) -> None:
        """A request of an earlier run may not have come into the WAL; two of one token are as good
        as one."""
        if rebuild.phase == "requested" and rebuild.token not in self._said:
            await asyncio.to_thread(self._emit, rebuild)

    def _emit(self, rebuild: RebuildState) -> None:
        content = rebuild_content(RebuildMessage(rebuild.pipeline, rebuild.table, rebuild.token))
        with connect(self.settings.source, application_name="cdc_sync rebuild") as connection:
            lsn = emit_messages(connection, PREFIX, [content])
        # Only now: one that could not be written is written by the next step.
        self._said.add(rebuild.token)
        self._asked = int(lsn)
        self.say(f"{rebuild.table}: the pipeline goes over at {lsn}")

    async def _answered(self, sink: ServerSink, token: str) -> None:
        """Wait until the request of a token is decided, or no more on record, or the pipeline has
        gone past it without a word: it refuses what is asked for too often, by whomever."""
        looked, passed = time.monotonic(), False
        while True:
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                # The position first: what was decided there was on record before it moved.
                passed = await asyncio.to_thread(self._passed)
            rebuild = await self._record(sink)
            if rebuild is None or rebuild.token != token or rebuild.phase == "aborting":
                break
            answer = answer_on_record(
                await sink.state.load(self.settings.pipeline.name), rebuild.table
            )
            if answer.taken == token:
                return
            if answer.answered == token or passed:
                # The stand may not have come there yet: it goes on then.
                await change_rebuild(
                    self.settings, sink, rebuild.table, token, phase="filling", token="", lsn=0
                )
                break
            await asyncio.sleep(_POLL_SECONDS)
        self.say("the pipeline has not gone over; it is asked again")
        await asyncio.sleep(_RETRY_SECONDS)

    def _once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.say(text)


async def _is_settled(sink: ServerSink, pipeline: str, table: str) -> bool:
    """Whether a pipeline has a table copied, and is not to read it again."""
    state = await sink.state.load(pipeline)
    record = table_on_record(table, state.tables) if state is not None else None
    if record is None or not record.copied or is_recorded_stale(record.plan_fingerprint):
        return False
    return not any(one.table == table for one in await sink.state.ledgers(pipeline))


def _only_letters(report: Report) -> bool:
    """Whether nothing differs but rows that are dead letters."""
    return all(
        finding.cause == LETTER_CAUSE
        for table in report.tables
        for finding in table.findings.values()
    )


async def _shared_letters(sink: ServerSink, rebuild: RebuildState) -> int:
    """The number of dead letters of a rebuild, if the pipeline has them all too; else 0."""
    known = {
        (letter.key_values or letter.key)
        for letter in await sink.state.dead_letters(rebuild.pipeline)
        if letter.table == rebuild.table
    }
    letters = await sink.state.dead_letters(rebuild.worker)
    return len(letters) if {(one.key_values or one.key) for one in letters} <= known else 0


def _quiet(table: str, done: int, expected: int, doing: str, different: int) -> None:
    """No progress is shown."""


def rebuild(
    order: Order,
    say: Say,
    *,
    swap: bool = True,
    index_seconds: float = INDEX_SECONDS,
    http: bool = False,
) -> Rebuilt:
    """Rebuild a table, or go on with it; returns when there is an outcome. ``swap`` and
    ``index_seconds`` as of :class:`Conductor`; ``http``: answer at the HTTP endpoint meanwhile.

    Raises :class:`CdcSyncError` as :func:`~cdc_sync.sync.rebuild_begin.begin` and the pipeline.
    """
    rebuilt = asyncio.run(_begun(order))
    if rebuilt.outcome in (Outcome.TAKEN, Outcome.UNREAD):
        return rebuilt
    record = rebuilt.rebuild
    if record.made_alias:
        say(
            f"alias {record.alias} stands for {record.old} until the swap: whoever reads "
            f"{record.old} by its own name does not go over"
        )
    # Here, since the daemon brings much along.
    from cdc_sync.sync.daemon import run_pipeline

    settings = worker_settings(order.settings, record)
    settings = settings.model_copy(
        update={"http": settings.http.model_copy(update={"enabled": http})}
    )
    stand = RebuildStand(order.settings, record)
    conductor = Conductor(order.settings, rebuilt, say, swap, index_seconds)

    async def beside(pipeline: Pipeline) -> None:
        stand.attach(pipeline)
        await conductor.run(pipeline)

    run_pipeline(settings, beside=beside, swaps=stand)
    if conductor.error is not None:
        raise conductor.error
    return asyncio.run(_ended(order.settings, rebuilt))


async def _begun(order: Order) -> Rebuilt:
    sink = await open_sink(order.settings.qdrant)
    try:
        rebuilt = Rebuilt(await begin(order, as_server(sink)))
    finally:
        await sink.close()
    return await _ended(order.settings, rebuilt)


async def _gone_over(settings: Settings, sink: ServerSink, rebuild: RebuildState) -> bool:
    """Give the pipeline some time for the alias."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not await is_gone_over(settings, sink, rebuild):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL_SECONDS)
    return True


async def _ended(settings: Settings, rebuilt: Rebuilt) -> Rebuilt:
    """Look once more whether it was taken, which may be seen by nobody else; clean up then."""
    sink = await open_sink(settings.qdrant)
    try:
        server, known = as_server(sink), rebuilt.rebuild
        now = await server.state.rebuild(known.pipeline, known.table)
        if now is None and await is_kept(settings, server, known):
            # Another run of the command was at work on it, too, and has cleaned up; this one may
            # have made something since.
            await finish(settings, server, known)
            rebuilt.outcome = Outcome.TAKEN
        elif now is None or now.phase == "aborting":
            # This process may have made something since the abort looked.
            await remove_made(settings, server, known)
            rebuilt.outcome = Outcome.ABORTED
        elif await is_taken(settings, server, now):
            rebuilt.outcome = Outcome.UNREAD
            if await _gone_over(settings, server, now):
                await finish(settings, server, now)
                rebuilt.outcome = Outcome.TAKEN
    finally:
        await sink.close()
    return rebuilt
