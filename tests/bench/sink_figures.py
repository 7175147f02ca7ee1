"""The copy and the stream of a real pipeline into real sinks, beside what the model of
:mod:`tests.bench.model` allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.bench import limits
from tests.bench.copy_figures import loaded
from tests.bench.datasets import insert
from tests.bench.engine import copy_blocks, exported_snapshot, read_rows
from tests.bench.model import Allowed, RowCost, allowed
from tests.bench.pipeline import life, settings_for
from tests.bench.rounds import Median, take_turns
from tests.bench.setting import Setting
from tests.bench.sinks import BenchSink, sinks
from tests.bench.targets import Figure, Target
from tests.bench.usage import Cost, Meter

_TARGET = Target(">=", 0.9)
_TABLE = "sunk"


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
    null: Cost
    sink_limit: Cost
    copy: Cost
    stream: Cost


@dataclass(frozen=True)
class _Measured:
    """All rounds of one sink."""

    sink: BenchSink
    rows: int
    rounds: list[_Round]

    @classmethod
    def of(cls, bench: Setting, sink: BenchSink) -> _Measured:
        rows = bench.scale.sink_rows
        bench.say(f"copy and stream: {sink.title}")
        with loaded(bench, _TABLE, 768, rows):
            ways = _ways(bench, sink)
            copy_limit, null, limit, ours = take_turns(bench.scale.sink_rounds, *ways)
        rounds = [
            _Round(a[0], b[0], c[0], d[0], d[1])
            for a, b, c, d in zip(copy_limit, null, limit, ours, strict=True)
        ]
        return cls(sink, rows, rounds)

    def figures(self, bench: Setting) -> Iterator[Figure]:
        for way in ("copy", "stream"):
            costs = [round_.copy if way == "copy" else round_.stream for round_ in self.rounds]
            bounds = [self._allowed(round_, way, bench.cores) for round_ in self.rounds]
            shares = [c.rate(self.rows) / b.rate for c, b in zip(costs, bounds, strict=True)]
            facts = self._facts(costs)
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
        postgres = one.copy_limit if way == "copy" else one.stream
        rows, limit = self.rows, one.sink_limit
        sink = limit.per_row(rows) if self.sink.embedded else limit.other_per_row("sink", rows)
        cost = RowCost(
            postgres=max(postgres.other_per_row("postgres", rows), 0.1),
            ours=one.null.per_row(rows),
            send=0.0 if self.sink.embedded else limit.per_row(rows),
            sink=sink,
            sink_limit=limit.rate(rows),
            embedded=self.sink.embedded,
        )
        return allowed(cost, cores)

    def _facts(self, costs: list[Cost]) -> dict[str, float]:
        rows, rounds = self.rows, self.rounds
        return {
            "rows": rows,
            "rows_per_second": Median.of([c.rate(rows) for c in costs]).value,
            "cpu_us": Median.of([c.per_row(rows) for c in costs]).value,
            "postgres_cpu_us": Median.of([c.other_per_row("postgres", rows) for c in costs]).value,
            "sink_cpu_us": Median.of([c.other_per_row("sink", rows) for c in costs]).value,
            "null_cpu_us": Median.of([r.null.per_row(rows) for r in rounds]).value,
            "send_cpu_us": Median.of([r.sink_limit.per_row(rows) for r in rounds]).value,
            "sink_limit_rows_per_second": Median.of(
                [r.sink_limit.rate(rows) for r in rounds]
            ).value,
            "sink_limit_sink_cpu_us": Median.of(
                [r.sink_limit.other_per_row("sink", rows) for r in rounds]
            ).value,
        }


def _ways(bench: Setting, sink: BenchSink) -> list[Callable[[], tuple[Cost, ...]]]:
    """The copy limit, the copy into nothing, the sink limit, and a pipeline that copies and then
    streams as many rows."""
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


def _pipeline(bench: Setting, sink: BenchSink) -> tuple[Cost, Cost]:
    """The costs of a pipeline's copy, and of its stream of as many rows more."""
    source, rows = bench.source, bench.scale.sink_rows
    collection = sink.collection()
    name = bench.name()
    settings = settings_for(source.url, name, {_TABLE: collection}, qdrant=sink.settings())
    log = bench.scratch.new()

    try:
        with life(settings, log, postgres=source.pid, sink=sink.pid) as running:
            running.wait_copied()
            copied = running.report()
        source.execute(insert(_TABLE, 768, f"{rows} + 1", f"2 * {rows}"))
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
