"""The copy and the stream of a real pipeline into real sinks, beside what the model of
:mod:`tests.bench.model` allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.bench import limits
from tests.bench.copy_figures import loaded
from tests.bench.datasets import insert, inserts
from tests.bench.engine import StreamEngine, copy_blocks, exported_snapshot, read_rows
from tests.bench.limits import AppliedCost
from tests.bench.model import Allowed, RowCost, allowed
from tests.bench.pipeline import life, settings_for
from tests.bench.rounds import Median, take_turns
from tests.bench.setting import Setting
from tests.bench.sinks import BenchSink, sinks
from tests.bench.targets import Figure, Target
from tests.bench.usage import Cost, Meter

_TARGET = Target(">=", 0.9)
_TABLE = "sunk"
#: Rows a transaction of what is streamed. Postgres sends nothing of a transaction before it has
#: read the whole of it from the WAL: were all rows one transaction, its work could not go on beside
#: ours, as the model has it, and the time until the first row would count against us.
TRANSACTION_ROWS = 500
#: So many times the rows of the copy are streamed: to take over a slot takes some 50 ms, whatever
#: comes after it, and that is no matter of rate.
_STREAMED = 3


def sink_figures(bench: Setting) -> Iterator[Figure]:
    """Copy and stream into every sink there is; a real server only where one is named."""
    with sinks(bench.scratch) as found:
        for sink in found:
            yield from _Measured.of(bench, sink).figures(bench)
    if len(found) < 3:
        for way in ("copy", "stream"):
            yield Figure(
                f"{way}.real-server.ratio",
                f"{way} into real server, 768-d",
                "of what is allowed",
                None,
                _TARGET,
                note="CDC_SYNC_TEST_QDRANT_URL is not set",
                untested=True,
            )


@dataclass(frozen=True)
class _Round:
    """One round: what each way cost."""

    copy_limit: Cost
    null_copy: Cost
    null_stream: Cost
    sink_limit: Cost
    copy: Cost
    stream: Cost


@dataclass(frozen=True)
class _Measured:
    """All rounds of one sink. ``rows``: of the copy and of all limits."""

    sink: BenchSink
    rows: int
    rounds: list[_Round]

    @classmethod
    def of(cls, bench: Setting, sink: BenchSink) -> _Measured:
        rows = bench.scale.sink_rows
        bench.say(f"copy and stream: {sink.title}")
        with loaded(bench, _TABLE, 768, rows), _null_stream(bench, sink) as null_stream:
            ways = [*_ways(bench, sink), null_stream]
            copy_limit, null, limit, ours, stream = take_turns(bench.scale.sink_rounds, *ways)
        rounds = [
            _Round(a[0], b[0], e[0], c[0], d[0], d[1])
            for a, b, c, d, e in zip(copy_limit, null, limit, ours, stream, strict=True)
        ]
        return cls(sink, rows, rounds)

    def figures(self, bench: Setting) -> Iterator[Figure]:
        for way in ("copy", "stream"):
            costs = [round_.copy if way == "copy" else round_.stream for round_ in self.rounds]
            rows = self.rows if way == "copy" else self.rows * _STREAMED
            bounds = [self._allowed(round_, way, bench.cores) for round_ in self.rounds]
            shares = [c.rate(rows) / b.rate for c, b in zip(costs, bounds, strict=True)]
            nulls = [r.null_copy if way == "copy" else r.null_stream for r in self.rounds]
            facts = self._facts(costs, rows, nulls)
            facts["allowed_rows_per_second"] = Median.of([b.rate for b in bounds]).value
            bound = max({b.bound for b in bounds}, key=[b.bound for b in bounds].count)
            yield Figure(
                f"{way}.{self.sink.name}.ratio",
                f"{way} into {self.sink.title}, 768-d",
                "of what is allowed",
                Median.of(shares),
                _TARGET,
                note=f"{facts['rows_per_second']:,.0f} of {facts['allowed_rows_per_second']:,.0f} "
                f"rows/s, bound by {bound}; sink limit "
                f"{facts['sink_limit_rows_per_second']:,.0f}",
                relative=True,
                facts=facts,
            )

    def _allowed(self, one: _Round, way: str, cores: int) -> Allowed:
        """By the costs of the same round. Postgres's part of a stream is measured under the stream
        itself, since its walsender does the same whoever reads."""
        rows, limit = self.rows, one.sink_limit
        durable = 0.0
        if way == "copy":
            null, postgres = one.null_copy, one.copy_limit.other_per_row("postgres", rows)
        else:
            null = one.null_stream
            postgres = one.stream.other_per_row("postgres", rows * _STREAMED)
            if isinstance(limit, AppliedCost):
                durable = limit.durable / rows * 1e6
        sink = limit.per_row(rows) if self.sink.embedded else limit.other_per_row("sink", rows)
        cost = RowCost(
            postgres=max(postgres, 0.1),
            ours=null.per_row(rows),
            send=0.0 if self.sink.embedded else limit.per_row(rows),
            sink=sink,
            sink_limit=limit.rate(rows),
            embedded=self.sink.embedded,
            durable=durable,
        )
        return allowed(cost, cores)

    def _facts(self, costs: list[Cost], measured: int, nulls: list[Cost]) -> dict[str, float]:
        """What is known of ``costs``, of so many rows each, and of their limits."""
        rows, rounds = self.rows, self.rounds

        def median(values: Iterator[float]) -> float:
            return Median.of(list(values)).value

        return {
            "rows": measured,
            "rows_per_second": median(c.rate(measured) for c in costs),
            "cpu_us": median(c.per_row(measured) for c in costs),
            "postgres_cpu_us": median(c.other_per_row("postgres", measured) for c in costs),
            "sink_cpu_us": median(c.other_per_row("sink", measured) for c in costs),
            "null_cpu_us": median(null.per_row(rows) for null in nulls),
            "send_cpu_us": median(r.sink_limit.per_row(rows) for r in rounds),
            "sink_limit_rows_per_second": median(r.sink_limit.rate(rows) for r in rounds),
            "sink_limit_sink_cpu_us": median(
                r.sink_limit.other_per_row("sink", rows) for r in rounds
            ),
        }


def _ways(bench: Setting, sink: BenchSink) -> list[Callable[[], tuple[Cost, ...]]]:
    """The copy limit, the copy into nothing, the sink limit, and a pipeline that copies and then
    streams."""
    source = bench.source
    planned, settings = source.plan(_TABLE), source.settings("bench")
    rows = read_rows(settings, planned)
    meter = Meter(postgres=source.pid, sink=sink.pid)
    path = bench.scratch.new()

    def null() -> tuple[Cost, ...]:
        with exported_snapshot(source.url) as snapshot:
            cost, _ = copy_blocks(
                settings, snapshot, planned, (0, None), path, meter, embedded=sink.embedded
            )
        return (cost,)

    return [
        lambda: (limits.copy_out(source.url, f"SELECT * FROM {_TABLE}", meter),),
        null,
        lambda: (sink.limit(planned, rows, meter),),
        lambda: _pipeline(bench, sink),
    ]


@contextmanager
def _null_stream(bench: Setting, sink: BenchSink) -> Iterator[Callable[[], tuple[Cost]]]:
    """The stream into nothing, encoded for the sink, of as many rows as the copy has."""
    source, dataset = bench.source, inserts(768, bench.scale.sink_rows)
    with source.changes(dataset) as name, source.types() as resolve:
        end = limits.last_commit(source.url, name, name, 1)
        engine = StreamEngine(
            source.settings(name),
            [source.plan(dataset.table)],
            resolve,
            bench.scratch.new(),
            embedded=sink.embedded,
        )

        def stream() -> tuple[Cost]:
            source.wait_free(name)
            return (engine.run(int.from_bytes(end, "big"), bench.meter),)

        yield stream


def _pipeline(bench: Setting, sink: BenchSink) -> tuple[Cost, Cost]:
    """The costs of a pipeline's copy, and of its stream of :data:`_STREAMED` times as many rows."""
    source, rows = bench.source, bench.scale.sink_rows
    collection = sink.collection()
    name = bench.name()
    settings = settings_for(source.url, name, {_TABLE: collection}, qdrant=sink.settings())
    log = bench.scratch.new()

    try:
        with life(settings, log, postgres=source.pid, sink=sink.pid) as running:
            running.wait_copied()
            copied = running.report()
        source.execute(*transactions(rows + 1, rows + rows * _STREAMED))
        end = source.position()
        with life(settings, log, postgres=source.pid, sink=sink.pid) as running:
            running.wait_applied(end)
            streamed = running.report()
    finally:
        source.drop_slot(name)
        source.execute(
            f"DROP PUBLICATION IF EXISTS {name}",
            f"DELETE FROM {_TABLE} WHERE id > {rows}",
            f"VACUUM {_TABLE}",
        )
        sink.drop(collection)
    if copied.copy is None or streamed.stream is None or copied.copied_rows != rows:
        raise RuntimeError(f"the pipeline copied {copied.copied_rows} of {rows} rows")
    return copied.copy, streamed.stream


def transactions(first: int, last: int) -> Iterator[str]:
    """The statements that insert the rows of these numbers, each a transaction of its own."""
    for number in range(first, last + 1, TRANSACTION_ROWS):
        end = min(number + TRANSACTION_ROWS - 1, last)
        yield insert(_TABLE, 768, str(number), str(end))
