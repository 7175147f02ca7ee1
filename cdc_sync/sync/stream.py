"""Streaming: one connection to the slot, from START_REPLICATION until it ends, by whatever cause.

Three loops share the connection on one event loop:

- the reader feeds frames to the gatherer, and pauses while a full batch waits (memory is bounded,
  invariant 6);
- the writer takes what is there as soon as the sink is idle (natural batching), applies it, and
  moves the position;
- the clock confirms the position when it has moved, at most every :data:`CONFIRM_SECONDS` (more
  seldom where making it durable takes long), and speaks in any case often enough for
  ``wal_sender_timeout``, also while the reader pauses (R1, R2).

On any end the requests in flight are awaited before the session ends: the next session sends the
same changes again, and no two requests for one point may be in flight together. Once the connection
is lost or let go of, no further request is begun either: another process may have the slot by then,
and what it has written must not be overwritten by an older batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics, Trigger
from cdc_sync.ops.status import StatusBoard
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.replication import ConnectionClosedError, ReplicationConnection
from cdc_sync.sync.gather import Batch, Gatherer
from cdc_sync.sync.sink_watch import LetGoError

log = get_logger(__name__)

#: Least time between two confirmations: each is a message, and for an embedded database a flush to
#: disk.
CONFIRM_SECONDS = 0.25
#: Where making durable takes long, so many times as long pass before the next confirmation, but not
#: more than so many seconds: an embedded database stands still meanwhile, and all else with it.
_DURABLE_PAUSES: Final = 50
_MOST_CONFIRM_SECONDS: Final = 1.0
#: Least time between two answers to keepalives that ask for one (a server that is answered at once
#: may ask at once).
_REPLY_SECONDS = 0.1
#: How much one read takes from the connection before others get a turn.
_READ_FRAMES = 512
_READ_BYTES = 1 << 20
_IDLE_SECONDS = 1.0
#: How long the end of a stream of which nothing more is taken goes unnoticed, at the most, while
#: it brings something.
_DISCARD_SECONDS = 0.05
#: How long what the server has written may be on its way to us without counting as lag.
_ON_ITS_WAY_SECONDS = 2.0
#: For so long the slot may be taken by what is left of a connection of our own.
_STANDBY_SECONDS = 30.0


@dataclass(slots=True)
class Positions:
    """Where the pipeline stands; within a session they only grow.

    ``received``: end of what came over the wire. ``applied``: everything before it has been
    completed by Qdrant, an exclusive bound. ``confirmed``: what Postgres was told. ``server_end``:
    the server's end of WAL as far as known. ``oldest_commit``: Unix seconds of the oldest commit
    received and not applied, None if there is none; it outlives the session.
    """

    received: int = 0
    applied: int = 0
    confirmed: int = 0
    server_end: int = 0
    oldest_commit: float | None = None
    #: A position of the server that nothing received reaches yet, and when it was seen.
    ahead: tuple[int, float] | None = None
    #: Since when nobody has been able to ask the server; None while somebody is.
    blind_since: float | None = None
    #: Since when (of the monotonic clock) the server takes no other connection; None while it does.
    alone_since: float | None = None

    def begin(self, lsn: int) -> None:
        """Stand at the beginning of a new slot; what was known of another does not count."""
        self.received = self.server_end = 0
        self.applied = self.confirmed = lsn
        self.oldest_commit = self.ahead = None

    @property
    def reached(self) -> int:
        """How far what came over the wire reaches, of this process or one before it."""
        return max(self.received, self.confirmed)

    def see_server(self, end: int, now: float) -> None:
        """The server's end of WAL, seen by another connection at a Unix time."""
        self.server_end = max(self.server_end, end)
        self.blind_since = None
        if self.ahead is None and end > self.reached:
            self.ahead = (end, now)

    def age(self, now: float) -> float:
        """Seconds since everything committed by then was in Qdrant, as far as anybody can know: 0
        when caught up, and growing while the connection is away too."""
        if self.ahead is not None and self.reached >= self.ahead[0]:
            self.ahead = None
        moments = [self.oldest_commit, self.blind_since]
        # The server's end is ahead by what is on its way at any time.
        if self.ahead is not None and now - self.ahead[1] > _ON_ITS_WAY_SECONDS:
            moments.append(self.ahead[1])
        return max((max(0.0, now - moment) for moment in moments if moment is not None), default=0)

    def go_back(self, confirmed: int) -> None:
        """Stand where the slot stands, when a session begins.

        What this process has applied beyond that does not count: another one may have had the slot
        meanwhile and have written older versions over it, since it began where the slot stood.
        """
        self.applied = self.confirmed = confirmed


def publish_lag(positions: Positions, metrics: Metrics, board: StatusBoard) -> None:
    """Show how far behind Qdrant is; nothing while another process has the slot."""
    p = positions
    if not p.confirmed or board.standby_seconds > _STANDBY_SECONDS:
        board.set_lag(lag_bytes=None, seconds=None)
        p.server_end, p.ahead = p.reached, None
    else:
        board.set_lag(lag_bytes=max(0, p.server_end - p.confirmed), seconds=p.age(time.time()))
    metrics.lag_bytes["receive"].set(max(0, p.server_end - p.reached))
    metrics.lag_bytes["apply"].set(max(0, p.received - p.applied))
    metrics.lag_bytes["acknowledge"].set(max(0, p.applied - p.confirmed))


class BatchAbandonedError(Exception):
    """The connection ended before the batch was completed; the next session sends it again."""


class BatchWriter(Protocol):
    """What the stream needs of the applier. ``sleep`` passes the time before something is tried
    again; what it raises ends the batch. ``progress`` is called whenever part of it is
    completed."""

    async def apply(
        self,
        batch: Batch,
        sleep: Callable[[float], Awaitable[None]],
        progress: Callable[[], None],
    ) -> None: ...


@dataclass(slots=True)
class StreamSession:
    """One life of the replication connection. :meth:`run` returns after ``stop`` is set, and raises
    what ended it else.

    ``between(batch)`` is called with the applier at rest after each batch, and with None now and
    then when there is nothing to write; it may hold the stream at that point. A batch that it
    returns is applied next.
    """

    connection: ReplicationConnection
    gatherer: Gatherer
    applier: BatchWriter
    positions: Positions
    metrics: Metrics
    make_durable: Callable[[], Awaitable[None]]
    stop: asyncio.Event
    status_seconds: float
    board: StatusBoard
    between: Callable[[Batch | None], Awaitable[Batch | None]]
    let_go_seconds: float
    silence_seconds: float
    #: How long Qdrant has not answered, while ``between`` holds the stream.
    sink_away: Callable[[], float] = lambda: 0.0
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _space: asyncio.Event = field(default_factory=asyncio.Event)
    _in_flight: Batch | None = None
    _in_flight_since: float = 0.0
    _failing: bool = False
    _troubled: bool = False
    _last_status: float = 0.0
    _last_durable: float = 0.0
    _durable_seconds: float = 0.0
    _last_heard: float = field(default_factory=time.monotonic)
    _asked: float = 0.0
    _carried: float | None = None
    _ending: bool = False
    _resting: bool = False
    _lost: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Stream until stopped. Raises :class:`SourceError` when the connection ends, and what the
        applier raises."""
        self._carried = self.positions.oldest_commit
        reader = asyncio.create_task(self._read(), name="reader")
        writer = asyncio.create_task(self._write(), name="writer")
        clock = asyncio.create_task(self._keep_time(), name="clock")
        stopped = asyncio.create_task(self.stop.wait(), name="stop")
        tasks = {reader, writer, clock, stopped}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # Not stopped: the batch in flight may take for ever, so it is not tried again.
            writer.cancel()
            raise
        finally:
            self._ending = True
            if reader.done() or clock.done():
                self._lost.set()
            for task in (reader, clock, stopped):
                task.cancel()
            await self._finish(writer, reader, clock, stopped)
        for task in (writer, reader, clock):
            if task.done() and not task.cancelled():
                try:
                    task.result()
                except BatchAbandonedError:
                    pass
                except ConnectionClosedError as error:
                    raise self.connection.error or error from None

    async def _finish(self, writer: asyncio.Task[None], *others: asyncio.Task[object]) -> None:
        """Wait for the batch in flight. If this is cancelled (the grace period is over) the writer
        goes too."""
        self._news.set()
        if self._lost.is_set():
            self._give_up(writer)
        elif self._resting:
            # A table that is being read again may take long; it is done from the start next time.
            writer.cancel()
        keeping = asyncio.create_task(self._keep_slot(writer), name="keeper of the slot")
        try:
            await asyncio.wait({writer})
        except asyncio.CancelledError:
            writer.cancel()
            raise
        finally:
            # It guards also a request that is waited for after a cancellation.
            await asyncio.gather(writer, return_exceptions=True)
            keeping.cancel()
            await asyncio.gather(keeping, *others, return_exceptions=True)
            for task in ("reader", "writer", "clock"):
                self.board.retire(task)
        with contextlib.suppress(Exception):
            # The connection may be gone; what was not confirmed is sent again.
            await self._confirm(force=True)
        self._publish()
        self.metrics.buffer_bytes.set(0)

    def _give_up(self, writer: asyncio.Task[None]) -> None:
        """The slot may be another's: all of the batch is sent again, so no more of it is begun."""
        self._lost.set()
        self.connection.close()
        writer.cancel()

    async def _keep_slot(self, writer: asyncio.Task[None]) -> None:
        """Keep the slot while the last batch is written, or see that it is lost. What comes
        meanwhile is not taken, so it is sent again."""
        try:
            while not writer.done() and not self._lost.is_set():
                if self.connection.read(_READ_FRAMES, _READ_BYTES):
                    self._last_heard = time.monotonic()
                    await asyncio.sleep(_DISCARD_SECONDS)
                else:
                    await self._wait_readable()
                if time.monotonic() - self._last_status >= self.status_seconds:
                    self._send_status("timer")
                self._listen()
        except SourceError as error:
            log.info("slot_lost_while_draining", reason=error.message)
            self._give_up(writer)

    # -- reader

    async def _read(self) -> None:
        gatherer = self.gatherer
        while True:
            self.board.heartbeat("reader")
            if gatherer.full:
                await self._pause()
                continue
            started = time.perf_counter()
            frames = self.connection.read(_READ_FRAMES, _READ_BYTES)
            if frames:
                self._last_heard = time.monotonic()
            else:
                self.metrics.stage_seconds["receive_wait"].inc(time.perf_counter() - started)
                await self._wait_readable()
                continue
            size = 0
            for frame in frames:
                gatherer.feed(frame)
                size += len(frame)
            self.metrics.received_bytes.inc(size)
            self.metrics.changes_ignored.inc(gatherer.ignored_changes)
            gatherer.ignored_changes = 0
            self.metrics.stage_seconds["decode"].inc(time.perf_counter() - started)
            self._receive()
            if gatherer.ready:
                self._news.set()
            # The writer and the clock get their turn even when there is always more to read.
            await asyncio.sleep(0)

    def _receive(self) -> None:
        gatherer = self.gatherer
        self.positions.received = max(self.positions.received, gatherer.received)
        self.positions.server_end = max(self.positions.server_end, gatherer.server_end)
        for kind, count in gatherer.counts.items():
            self.metrics.received_messages[kind].inc(count)
        gatherer.counts.clear()
        if gatherer.reply_requested and time.monotonic() - self._last_status >= _REPLY_SECONDS:
            gatherer.reply_requested = False
            self._send_status("requested")

    async def _pause(self) -> None:
        started = time.perf_counter()
        self._space.clear()
        # Not wait_for, which before Python 3.12 forgets that it was cancelled if the wait is over
        # at that moment: the session would wait for its reader for ever.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_IDLE_SECONDS):
                await self._space.wait()
        self.metrics.stage_seconds["buffer_wait"].inc(time.perf_counter() - started)

    async def _wait_readable(self) -> None:
        """Wait until the socket is readable, at most a second: TLS may hold bytes that the socket
        does not show (R4)."""
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        descriptor = self.connection.fileno()
        loop.add_reader(descriptor, readable.set)
        try:
            async with asyncio.timeout(_IDLE_SECONDS):
                await readable.wait()
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(descriptor)
        self.metrics.stage_seconds["receive_wait"].inc(time.perf_counter() - started)

    # -- writer

    async def _write(self) -> None:
        while not self._ending:
            self.board.heartbeat("writer")
            if not self.gatherer.ready:
                self._news.clear()
                try:
                    async with asyncio.timeout(_IDLE_SECONDS):
                        await self._news.wait()
                except TimeoutError:
                    await self._rest(None)
                continue
            batch = self.gatherer.take()
            self._space.set()
            await self._apply(batch)
            await self._rest(batch)

    async def _rest(self, batch: Batch | None) -> None:
        if self._ending:
            # Another process may have the slot by now.
            return
        # Reading a table again may take long, and says nothing about whether this loop lives.
        self.board.retire("writer")
        self._resting = True
        try:
            further = await self.between(batch)
        finally:
            self._resting = False
        if further is not None and not self._ending:
            await self._apply(further)

    async def _sleep(self, seconds: float) -> None:
        """Pass the time before something is tried again, unless the connection is gone."""
        self._failing = self._troubled = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._lost.wait()
        if self._lost.is_set():
            raise BatchAbandonedError

    async def _apply(self, batch: Batch) -> None:
        if not batch.empty:
            # How long Qdrant takes says nothing about whether this loop lives.
            self.board.retire("writer")
            self._in_flight = batch
            self._troubled = False
            self._progress()
            started = time.perf_counter()
            try:
                await self.applier.apply(batch, self._sleep, self._progress)
            except BaseException:
                if self._carried is None:
                    self._carried = batch.oldest_commit
                raise
            finally:
                self._in_flight = None
            self.metrics.stage_seconds["sink_wait"].inc(time.perf_counter() - started)
            self.metrics.batch_changes["stream"].observe(sum(len(t) for t in batch.tables.values()))
            self.metrics.batch_bytes["stream"].observe(batch.bytes)
        if batch.end_lsn is not None:
            self.positions.applied = max(self.positions.applied, batch.end_lsn)
            self._carried = None
        self._observe(batch)
        if self._confirm_due:
            await self._confirm()

    def _observe(self, batch: Batch) -> None:
        if not batch.commit_times:
            return
        now = time.time()
        self.metrics.transactions.inc(len(batch.commit_times))
        for commit_time in batch.commit_times:
            self.metrics.end_to_end_latency_seconds.observe(max(0.0, now - commit_time))
        for changes in batch.transaction_changes:
            self.metrics.transaction_changes.observe(changes)

    # -- clock

    async def _keep_time(self) -> None:
        while True:
            self.board.heartbeat("clock")
            before = time.monotonic()
            await asyncio.sleep(CONFIRM_SECONDS)
            self.metrics.event_loop_delay_seconds.observe(
                max(0.0, time.monotonic() - before - CONFIRM_SECONDS)
            )
            if self._confirm_due:
                await self._confirm()
            if time.monotonic() - self._last_status >= self.status_seconds:
                self._send_status("timer")
            self._publish()
            self._listen()
            stalled = self.sink_away() if self._resting else self._stalled_seconds
            if stalled > self.let_go_seconds:
                # A consumer that answers and does not advance holds up a fast shutdown of Postgres
                # (R7).
                raise LetGoError(self.let_go_seconds)

    def _listen(self) -> None:
        """Make sure that somebody is still there: ask for an answer after half of the time.

        A host that vanishes is noticed by TCP; a proxy in between, or a walsender that hangs, is
        not.
        """
        if self.gatherer.full and not self._ending:
            self._last_heard = time.monotonic()  # Nobody reads.
            self.connection.check()
        silent = time.monotonic() - self._last_heard
        if silent > self.silence_seconds:
            raise SourceError(
                ErrorKind.SOURCE_UNAVAILABLE,
                f"Postgres has not answered for {silent:.0f} s; the connection is given up",
            )
        if silent > self.silence_seconds / 2 and self._asked < self._last_heard:
            self._asked = time.monotonic()
            self._send_status("timer", reply=True)

    @property
    def _stalled_seconds(self) -> float:
        """How long Qdrant has not completed anything. One that is slow and does not fail is waited
        for: a batch given up would be sent again from its beginning, each time.

        A server that shuts down takes no other connection and waits for this one. Then it does not
        help that a part was written with every try.
        """
        if self._in_flight is None:
            return 0.0
        now, alone = time.monotonic(), self.positions.alone_since
        stalled = now - self._in_flight_since if self._failing else 0.0
        return stalled if alone is None or not self._troubled else max(stalled, now - alone)

    def _progress(self) -> None:
        self._in_flight_since = time.monotonic()
        self._failing = False

    @property
    def _confirm_due(self) -> bool:
        pause = min(_DURABLE_PAUSES * self._durable_seconds, _MOST_CONFIRM_SECONDS)
        # The clock, which comes by at about CONFIRM_SECONDS, must not miss it by a hair.
        return time.monotonic() - self._last_durable >= max(CONFIRM_SECONDS * 0.9, pause)

    async def _confirm(self, force: bool = False) -> None:
        """Tell Postgres how far it may forget, once that is safe from a power loss too."""
        applied = self.positions.applied
        if applied <= self.positions.confirmed:
            return
        self._last_durable = time.monotonic()
        started = time.perf_counter()
        try:
            await self.make_durable()
        except Exception:
            self.metrics.checkpoint_writes["error"].inc()
            raise
        self._durable_seconds = time.perf_counter() - started
        self._last_durable = time.monotonic()
        self.metrics.stage_seconds["checkpoint"].inc(self._durable_seconds)
        self.positions.confirmed = max(self.positions.confirmed, applied)
        self._send_status("progress")
        self.metrics.checkpoint_writes["ok"].inc()
        self.metrics.checkpoint_last_success_timestamp_seconds.set(time.time())
        if force:
            log.debug("position_confirmed", lsn=str(Lsn(self.positions.confirmed)))

    def _send_status(self, trigger: Trigger, *, reply: bool = False) -> None:
        # A batch of the last session may have been completed since: a connection reports only what
        # came over itself.
        received = self.connection.received_lsn
        self.connection.send_status(received, min(self.positions.confirmed, received), reply)
        self._last_status = time.monotonic()
        self.metrics.status_updates[trigger].inc()

    def _publish(self) -> None:
        # What the last session left comes again, and is older than all else.
        oldest = self._carried
        if oldest is None and self._in_flight is not None:
            oldest = self._in_flight.oldest_commit
        if oldest is None:
            oldest = self.gatherer.oldest_commit
        self.positions.oldest_commit = oldest
        self.positions.blind_since = None
        publish_lag(self.positions, self.metrics, self.board)
        in_flight = self._in_flight.bytes if self._in_flight is not None else 0
        self.metrics.buffer_bytes.set(self.gatherer.buffered_bytes + in_flight)
        if self.gatherer.clock_offset_seconds is not None:
            self.metrics.source_clock_offset_seconds.set(self.gatherer.clock_offset_seconds)
