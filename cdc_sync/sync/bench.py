"""``bench``: how fast Postgres, this program and Qdrant are where the user has them, and which of
the three the others wait for.

Postgres is only read; a temporary slot is made where it is asked for, and goes with its session.
Qdrant gets a scratch collection, which is removed again. The table that is measured is the largest,
or one that is named; the others are estimated by their sizes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ConfigError
from cdc_sync.ops.redaction import redact
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.estimates import estimate_rows, leaf_bytes
from cdc_sync.postgres.measuring import connect_for_bench, drain_new_slot, wal_position
from cdc_sync.qdrant.scratch import leftovers, remove_leftovers, scratch_collection
from cdc_sync.sync.bench_advice import (
    CopyAdvice,
    StreamAdvice,
    TableSize,
    copy_advice,
    copy_seconds,
    stream_advice,
)
from cdc_sync.sync.bench_figures import LABELS, Bounds, Figure, Measured
from cdc_sync.sync.bench_sink import SinkBench
from cdc_sync.sync.bench_source import MadeStream, Sample, encoder, measure_copy, measure_stream
from cdc_sync.sync.executors import available_cpus
from cdc_sync.sync.findings import Finding
from cdc_sync.sync.planning import PipelinePlan, is_named, plan_pipeline
from cdc_sync.sync.routing import PlannedTable

#: Below so many changes a drained stream says nothing about a rate, or about WAL a row.
_MIN_DRAINED_ROWS = 100
#: A stream that is made has this many batches at the least, if there are rows for them.
_BATCHES = 8
_MIN_BATCH_ROWS = 256
#: Exit code of a run that was told to end.
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True, slots=True)
class Asked:
    """What to measure: each figure within ``bounds``, with ``table`` of the configuration (None:
    the largest). ``temporary_slot``: make one, to measure the drain limit."""

    bounds: Bounds
    table: str | None = None
    temporary_slot: bool = False


@dataclass(slots=True)
class Benched:
    """What was found. ``findings`` say what could not be measured.

    ``wal_bytes_per_row`` is from ``wal_from``: the stream that was drained, or the rows' own size;
    ``wal_written_per_second`` is what the server wrote meanwhile (None: not known). ``seconds`` are
    those of the first copy of each table.
    """

    table: str = ""
    sample_rows: int = 0
    cpus: int = 0
    qdrant_version: str = ""
    figures: list[Figure] = field(default_factory=list)
    copy: CopyAdvice | None = None
    stream: StreamAdvice | None = None
    sizes: list[TableSize] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    wal_bytes_per_row: float | None = None
    wal_from: str = ""
    wal_written_per_second: float | None = None
    leftovers: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def run_bench(
    settings: Settings, asked: Asked, tell: Callable[[str], None] = lambda text: None
) -> Benched:
    """Measure, and say what it means; ``tell`` is told what is being measured.

    Raises nothing of CdcSyncError: what fails is a finding, and the rest is measured all the same.
    An interrupt is raised once nothing of ours is left.
    """
    return _Bench(settings, asked, tell).run()


def clean_up(settings: Settings) -> list[str]:
    """Remove what killed runs have left in Qdrant; what it was. Raises :class:`CdcSyncError`."""

    async def remove() -> list[str]:
        names = await leftovers(settings.qdrant)
        await remove_leftovers(settings.qdrant, names)
        return names

    return asyncio.run(remove())


class _Bench:
    def __init__(self, settings: Settings, asked: Asked, tell: Callable[[str], None]) -> None:
        self._settings = settings
        self._asked = asked
        self._tell = tell
        self._found = Benched(cpus=available_cpus())
        #: The part of the changes that are no new rows, where a stream was read.
        self._updates = 0.0

    def run(self) -> Benched:
        with self._finding("postgres"):
            connection = connect_for_bench(self._settings.source, self._asked.bounds.seconds)
            try:
                self._run(connection)
            finally:
                connection.close()
        return self._found

    @contextlib.contextmanager
    def _finding(self, subject: str) -> Iterator[None]:
        try:
            yield
        except CdcSyncError as error:
            self._found.findings.append(Finding.from_error(subject, error))

    def _run(self, connection: PgConnection) -> None:
        with self._finding("tables"):
            plan = plan_pipeline(connection, self._settings)
            self._found.sizes = [_size(connection, planned) for planned in plan.tables]
            self._measure(connection, plan, self._chosen(plan))

    def _measure(self, connection: PgConnection, plan: PipelinePlan, planned: PlannedTable) -> None:
        self._found.table = planned.name
        began, before = time.monotonic(), wal_position(connection)
        sample = self._measure_source(connection, planned)
        if self._asked.temporary_slot:
            self._drain(plan)
        if sample.points:
            with self._finding("qdrant"):
                _run_to_the_end(lambda: self._measure_sink(planned, sample))
        after, seconds = wal_position(connection), time.monotonic() - began
        if before is not None and after is not None and seconds > 0:
            self._found.wal_written_per_second = max(0, after - before) / seconds
        self._conclude(planned, sample)

    def _chosen(self, plan: PipelinePlan) -> PlannedTable:
        asked = self._asked.table
        if asked is not None:
            for planned in plan.tables:
                if is_named(asked, planned.name):
                    return planned
            raise ConfigError(
                f"--table {asked} is not a table of the configuration",
                "It has: " + ", ".join(planned.name for planned in plan.tables),
            )
        bytes_of = {size.table: size.bytes for size in self._found.sizes}
        return max(plan.tables, key=lambda planned: bytes_of[planned.name])

    # -- without Qdrant

    def _measure_source(self, connection: PgConnection, planned: PlannedTable) -> Sample:
        bounds = self._asked.bounds
        encode = encoder(planned.plan, self._settings.qdrant.url)
        self._tell("reading the table")
        limit, unsent, sample = measure_copy(connection, planned, bounds, encode)
        self._found.figures += [limit, unsent]
        self._found.sample_rows = len(sample.points)
        if sample.unmappable:
            self._note(
                planned.name,
                f"{sample.unmappable} rows cannot become points; they were left out",
                "See them and the reasons after a copy: cdc-sync dlq list",
            )
        if not sample.points:
            self._note(
                planned.name,
                "no row could be read in the time given: only the copy limit is measured",
                "Name a table with rows (--table), or give it more time (--seconds).",
            )
            return sample
        self._tell("decoding a stream of the rows")
        self._found.figures += measure_stream(
            lambda updates: self._stream(planned, sample, updates), sample, bounds, encode
        )
        return sample

    def _stream(
        self, planned: PlannedTable, sample: Sample, updates: bool, rate: float = math.inf
    ) -> MadeStream:
        """A stream of the sample. ``rate``: rows a second that are expected, at the most."""
        pipeline = self._settings.pipeline
        points = min(len(sample.points), rate * self._asked.bounds.seconds)
        rows = max(_MIN_BATCH_ROWS, int(points) // _BATCHES)
        return MadeStream(
            planned,
            batch_rows=min(pipeline.batch_rows, rows),
            batch_bytes=pipeline.batch_bytes,
            metadata_only=updates,
        )

    def _drain(self, plan: PipelinePlan) -> None:
        source, seconds = self._settings.source, self._asked.bounds.seconds
        if plan.publication is None:
            self._note(
                "stream",
                f"publication {source.publication} does not exist: the drain limit is not measured",
                "Create it, or let a first run create it.",
            )
            return
        self._tell("letting changes gather behind a temporary slot")
        with self._finding("stream"):
            drained = drain_new_slot(source, source.publication, seconds)
            figure = Figure(
                Measured.DRAIN_LIMIT,
                drained.rows,
                drained.bytes,
                drained.seconds,
                drained.cpu_seconds,
            )
            if drained.rows < _MIN_DRAINED_ROWS:
                self._note(
                    "stream",
                    f"{drained.rows} changes of the tables came in {seconds:g} s, too few to "
                    "measure the drain limit",
                    "Run it while the application writes, with more --seconds.",
                )
                return
            self._found.figures.append(figure)
            self._found.wal_bytes_per_row = drained.wal_bytes / drained.rows
            self._found.wal_from = "the stream"
            self._updates = drained.updates / drained.rows

    # -- with Qdrant

    async def _measure_sink(self, planned: PlannedTable, sample: Sample) -> None:
        settings = self._settings
        self._found.leftovers = await leftovers(settings.qdrant)
        defer = settings.migration.defer_hnsw
        async with scratch_collection(settings.qdrant, planned.plan, defer_hnsw=defer) as scratch:
            self._found.qdrant_version = scratch.version
            bench = SinkBench(scratch, sample, self._asked.bounds)
            figures = self._found.figures
            self._tell("sending encoded points to a scratch collection")
            limit = await bench.limit(settings.qdrant.parallel_requests)
            figures.append(limit)
            self._tell("copying into the scratch collection")
            figures.append(
                await bench.copy(
                    await asyncio.to_thread(
                        connect_for_bench, settings.source, self._asked.bounds.seconds
                    ),
                    planned,
                    settings.migration.batch_size,
                )
            )
            self._tell("streaming into the scratch collection")
            for updates in (False, True):
                stream = self._stream(planned, sample, updates, limit.rows_per_second)
                if not stream.empty:
                    figures.append(await bench.stream(stream))
        if bench.refused:
            self._note(
                planned.name,
                f"{bench.refused} points were refused by Qdrant or had no valid key",
                "See them and the reasons after a copy: cdc-sync dlq list",
            )

    # -- what it means

    def _conclude(self, planned: PlannedTable, sample: Sample) -> None:
        found, settings = self._found, self._settings
        found.figures.sort(key=lambda figure: list(LABELS).index(figure.measured))
        figures = {figure.measured: figure for figure in found.figures}
        embedded = settings.qdrant.url.startswith("edge:")
        found.copy = copy_advice(
            figures,
            workers=settings.migration.num_workers or found.cpus,
            cpus=found.cpus,
            several=not embedded,
        )
        if found.copy is not None:
            found.seconds = copy_seconds(found.sizes, planned.name, found.copy.rows_per_second)
        if found.wal_bytes_per_row is None and sample.points:
            # What is written beside the values (headers, indexes) comes on top.
            found.wal_bytes_per_row, found.wal_from = sample.row_bytes, "the size of the rows"
        if found.wal_bytes_per_row is not None:
            found.stream = stream_advice(
                figures, wal_bytes_per_row=found.wal_bytes_per_row, updates=self._updates
            )

    def _note(self, subject: str, message: str, remedy: str) -> None:
        self._found.findings.append(Finding("warning", subject, message, remedy))


def _size(connection: PgConnection, planned: PlannedTable) -> TableSize:
    rows = estimate_rows(connection, planned.table, planned.selection).rows
    return TableSize(planned.name, rows, sum(leaf_bytes(connection, planned.table).values()))


def _run_to_the_end(work: Callable[[], Coroutine[object, object, None]]) -> None:
    """Run it; when the process is told to end meanwhile, that waits until it has cleaned up."""
    terminated = False

    async def run() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def terminate() -> None:
            nonlocal terminated
            terminated = True
            task.cancel()

        for number in (signal.SIGTERM, signal.SIGHUP):
            with contextlib.suppress(RuntimeError, ValueError):  # not the main thread
                loop.add_signal_handler(number, terminate)
        await work()

    try:
        asyncio.run(run())
    except asyncio.CancelledError:
        if terminated:
            raise SystemExit(TERMINATED) from None
        raise


def as_json(found: Benched) -> dict[str, object]:
    """What was found, as JSON has it: rates a second, sizes in bytes, CPU in microseconds a row."""
    return {
        "table": found.table,
        "sample_rows": found.sample_rows,
        "cpus": found.cpus,
        "qdrant_version": found.qdrant_version,
        "figures": [_figure_json(figure) for figure in found.figures],
        "copy": _copy_json(found),
        "stream": _stream_json(found),
        "leftovers": found.leftovers,
        "findings": _findings_json(found.findings),
    }


def _figure_json(figure: Figure) -> dict[str, object]:
    return {
        "figure": figure.measured.value,
        "rows": figure.rows,
        "seconds": round(figure.seconds, 4),
        "rows_per_second": round(figure.rows_per_second, 1),
        "bytes_per_second": round(figure.bytes_per_second),
        "cpu_microseconds_per_row": round(figure.cpu_per_row * 1e6, 2),
    }


def _copy_json(found: Benched) -> dict[str, object] | None:
    advice = found.copy
    if advice is None:
        return None
    return {
        "workers": advice.workers,
        "rows_per_second": round(advice.rows_per_second, 1),
        "bottleneck": advice.bottleneck,
        "enough_workers": advice.enough_workers,
        "best_rows_per_second": round(advice.best_rows_per_second, 1),
        "seconds": round(sum(found.seconds.values()), 3),
        "tables": [
            {
                "table": size.table,
                "rows": size.rows,
                "bytes": size.bytes,
                "seconds": round(found.seconds[size.table], 3),
            }
            for size in found.sizes
        ],
    }


def _stream_json(found: Benched) -> dict[str, object] | None:
    advice = found.stream
    if advice is None:
        return None
    updates, written = advice.updates_per_second, found.wal_written_per_second
    return {
        "rows_per_second": round(advice.rows_per_second, 1),
        "updates_per_second": None if updates is None else round(updates, 1),
        "bottleneck": advice.bottleneck,
        "wal_bytes_per_second": round(advice.wal_bytes_per_second),
        "wal_bytes_per_row": round(found.wal_bytes_per_row or 0),
        "wal_bytes_per_row_from": found.wal_from,
        "wal_written_per_second": None if written is None else round(written),
    }


def _findings_json(findings: Sequence[Finding]) -> list[dict[str, object]]:
    return [
        {
            "severity": finding.severity,
            "subject": finding.subject,
            "message": redact(finding.message),
            "remedy": redact(finding.remedy),
            "kind": finding.kind.value if finding.kind is not None else None,
        }
        for finding in findings
    ]
