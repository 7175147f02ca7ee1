"""The demo at work: the pipeline streams, the writer writes, the screen watches."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Final, cast

from psycopg import Connection

from cdc_sync.config import Settings
from cdc_sync.demo.dataset import Dataset, Query
from cdc_sync.demo.screen import Reading, Screen
from cdc_sync.demo.table import VECTOR, Hit, count_rows, search_postgres
from cdc_sync.demo.verdict import Verdict, compare, read_rows
from cdc_sync.demo.writer import Writer
from cdc_sync.errors import CdcSyncError, ErrorKind
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.qdrant.sink import TableWriter
from cdc_sync.sync.pipeline import Pipeline

#: How long the pipeline may take to stream, and to confirm the writer's last commit.
PATIENCE_SECONDS: Final = 120.0
#: Results of a search.
TOP: Final = 5

_LOOK_SECONDS: Final = 0.15
_STOP_SECONDS: Final = 30.0
_POSITION: Final = (
    "SELECT pg_current_wal_lsn() - confirmed_flush_lsn, confirmed_flush_lsn::text"
    " FROM pg_replication_slots WHERE slot_name = %s"
)


class Session:
    """One pipeline from its start to its end, with what goes on around it.

    ``connection`` is for looking only, and is used by one thread at a time.
    """

    def __init__(
        self, settings: Settings, connection: Connection, dataset: Dataset, screen: Screen
    ) -> None:
        self._settings = settings
        self._connection = connection
        self._dataset = dataset
        self._screen = screen
        self._pipeline = Pipeline(settings)
        self._running: asyncio.Task[None] | None = None

    async def run(self, seconds: float, keep: Callable[[], None] | None) -> Verdict:
        """Copy, search, let the writer write for ``seconds``, search again, compare.

        With ``keep`` it calls that after the verdict and goes on until it is cancelled; that is no
        error then. Raises what ends the pipeline or the writer; CdcSyncError when the pipeline
        makes no progress for :data:`PATIENCE_SECONDS`.
        """
        async with self._streaming():
            await self._copy()
            query = self._dataset.queries[0]
            self._screen.heading("One search, before")
            before = await self._search(query)
            self._screen.heading("Writing and streaming")
            doomed = tuple(hit.id for hit in before[1:2])
            writer = Writer(
                self._settings.source.url.get_secret_value(), self._dataset, seconds, query, doomed
            )
            await self._watch_writer(writer)
            self._screen.heading("The same search, after")
            await self._search(query)
            self._screen.heading("Every row against its point")
            verdict = await self._compare()
            self._screen.verdict(verdict)
            if keep is not None:
                keep()
                with contextlib.suppress(asyncio.CancelledError):
                    await self._watch(writer, keep=True)
        return verdict

    @contextlib.asynccontextmanager
    async def _streaming(self) -> AsyncIterator[None]:
        """Run the pipeline around something, and stop it after that whatever happens."""
        stop = asyncio.Event()
        running = self._running = asyncio.create_task(self._pipeline.run(stop))
        try:
            yield
        finally:
            stop.set()
            await asyncio.wait({running}, timeout=_STOP_SECONDS)
            running.cancel()
            (outcome,) = await asyncio.gather(running, return_exceptions=True)
        # Reached only if nothing else went wrong; otherwise that is the error to show.
        if isinstance(outcome, Exception):
            raise outcome

    async def _copy(self) -> None:
        """Wait for the first copy, showing how many points there are."""
        total = self._dataset.first
        with self._screen.progress("copying to Qdrant", total) as progress:
            begin, copied = time.monotonic(), 0
            while self._state() != "streaming":
                await self._pause()
                if (now_copied := self._table_count("rows_copied")) > copied:
                    begin, copied = time.monotonic(), now_copied
                    progress(min(copied, total - 1))
                self._check_patience(begin, "copied the table")
            progress(await self._points().count())

    async def _search(self, query: Query) -> list[Hit]:
        """Ask both sides, show both answers, and return that of Postgres."""
        postgres = await asyncio.to_thread(search_postgres, self._connection, query, TOP)
        found = await self._points().search(VECTOR, query.vector.tolist(), TOP)
        qdrant = [Hit(int(key), str(payload["name"]), score) for key, score, payload in found]
        self._screen.hits(query, postgres, qdrant)
        return postgres

    async def _watch_writer(self, writer: Writer) -> None:
        """Let the writer run, then wait until the pipeline has confirmed its last commit."""
        begin = time.monotonic()
        writer.start()
        try:
            await self._watch(writer)
        finally:
            writer.stop()
            await asyncio.to_thread(writer.join, _STOP_SECONDS)
        tally = writer.tally
        self._screen.note(
            f"{tally.transactions} transactions, {tally.rolled_back} of them or parts rolled back:"
            f" {tally.inserted} rows inserted, {tally.metadata} metadata updates,"
            f" {tally.vectors} vector updates, {tally.moved} moved, {tally.deleted} deleted."
            f" All confirmed {time.monotonic() - begin:.1f} s after the start"
        )

    async def _watch(self, writer: Writer, keep: bool = False) -> None:
        """Show readings until the writer has ended and all is confirmed; to keep on, for ever."""
        rate = _Rate()
        begin = time.monotonic()
        ended_at: float | None = None
        with self._screen.watch() as show:
            while True:
                # In this order: once it has ended, its marks are all there.
                writing, marks = writer.running, list(writer.marks)
                lag_bytes, confirmed, rows = await asyncio.to_thread(self._look)
                now = time.monotonic()
                applied = self._pipeline.positions.applied
                tally = writer.tally
                show(
                    Reading(
                        state=self._state(),
                        tally=tally,
                        rows=rows,
                        points=await self._points().count(),
                        applied=self._table_count("changes_applied"),
                        lag_bytes=lag_bytes,
                        lag_seconds=next((now - m.at for m in marks if m.lsn > applied), 0.0),
                        changes_per_second=rate.of(tally.changes, now),
                        elapsed_seconds=now - begin,
                    )
                )
                if not writing and not keep:
                    ended_at = now if ended_at is None else ended_at
                    if writer.last_lsn is None or confirmed >= writer.last_lsn:
                        return
                    self._check_patience(ended_at, "confirmed the writer's last commit")
                await self._pause()

    def _look(self) -> tuple[int, Lsn, int]:
        """Bytes of WAL not confirmed, the confirmed position, and the number of rows."""
        found = self._connection.execute(_POSITION, [self._settings.source.slot]).fetchone()
        if found is None:
            raise CdcSyncError(
                ErrorKind.SLOT_LOST, f"The replication slot {self._settings.source.slot} is gone."
            )
        return max(0, int(found[0])), Lsn.parse(found[1]), count_rows(self._connection)

    async def _compare(self) -> Verdict:
        expected = await asyncio.to_thread(read_rows, self._connection)
        return await compare(expected, self._points().scroll_points())

    def _points(self) -> TableWriter:
        return self._pipeline.sink.writer(self._pipeline.tables[0].plan)

    def _state(self) -> str:
        return str(self._pipeline.board.snapshot()["state"])

    def _table_count(self, field: str) -> int:
        tables = cast("list[dict[str, object]]", self._pipeline.board.snapshot()["tables"])
        return sum(cast(int, table[field]) for table in tables)

    async def _pause(self) -> None:
        """Wait a moment; raise what has ended the pipeline, if it has ended."""
        assert self._running is not None
        await asyncio.wait({self._running}, timeout=_LOOK_SECONDS)
        if self._running.done():
            self._running.result()
            raise CdcSyncError(ErrorKind.STATE, "The pipeline has ended before the demo.")

    def _check_patience(self, since: float, what: str) -> None:
        if time.monotonic() - since > PATIENCE_SECONDS:
            raise CdcSyncError(
                ErrorKind.SINK_UNKNOWN,
                f"The pipeline has not {what} within {PATIENCE_SECONDS:.0f} s;"
                f" it is {self._state()}.",
                "Run it again with more log output.",
            )


class _Rate:
    """Changes a second over the last second or so."""

    def __init__(self) -> None:
        self._looks: list[tuple[float, int]] = []

    def of(self, changes: int, now: float) -> float:
        self._looks.append((now, changes))
        while len(self._looks) > 2 and now - self._looks[1][0] >= 1.0:
            self._looks.pop(0)
        then, before = self._looks[0]
        return (changes - before) / (now - then) if now > then else 0.0
