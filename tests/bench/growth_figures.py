"""Whether a row costs the same in a larger table, beside more tables, and with more columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final

import psycopg

from tests.bench.copy_figures import loaded
from tests.bench.datasets import Source, create, insert
from tests.bench.engine import StreamEngine, copy_blocks, exported_snapshot
from tests.bench.pipeline import life, settings_for
from tests.bench.rounds import Median, ratios, take_turns
from tests.bench.setting import Setting
from tests.bench.sinks import ProcessBench
from tests.bench.targets import Figure, Target, number
from tests.bench.usage import Cost

_FLAT: Final = Target("<=", 1.15)
#: Rows of a transaction where tables take turns.
_BLOCK: Final = 100


def growth_figures(bench: Setting) -> Iterator[Figure]:
    """CPU a row, and memory, of the largest beside the smallest."""
    yield from _table_sizes(bench)
    yield _tables(bench)
    yield _collections(bench)
    yield _columns(bench)


def _table_sizes(bench: Setting) -> Iterator[Figure]:
    costs: dict[int, float] = {}
    peaks: dict[int, float] = {}
    for rows in bench.scale.table_rows:
        bench.say(f"growth: a table of {rows:,} rows")
        costs[rows], peaks[rows] = _copy(bench, rows)
    small, large = min(costs), max(costs)
    title = f"table of {number(large)} rows beside {number(small)}"
    yield Figure(
        "growth.table.cpu",
        f"copy, {title}: CPU a row",
        "x",
        Median.of([costs[large] / costs[small]]),
        _FLAT,
        note=_listed(costs, "µs"),
        relative=True,
    )
    yield Figure(
        "growth.table.memory",
        f"copy, {title}: peak RSS",
        "x",
        Median.of([peaks[large] / peaks[small]]),
        _FLAT,
        note=_listed(peaks, "MB"),
        relative=True,
    )


def _copy(bench: Setting, rows: int) -> tuple[float, float]:
    """CPU microseconds a row, and the peak of memory in MB, of a pipeline's copy into nothing; of a
    small table the median of several copies."""
    source, table = bench.source, "grown"
    found: list[float] = []
    peaks: list[float] = []
    with loaded(bench, table, 0, rows):
        for _ in range(1 if rows > 200_000 else bench.scale.growth_rounds):
            name = bench.name()
            settings = settings_for(source.url, name, {table: "points"})
            try:
                with life(settings, bench.scratch.new(), null=bench.scratch.new()) as running:
                    running.wait_copied()
                    report = running.report()
            finally:
                source.drop_slot(name)
                source.execute(f"DROP PUBLICATION IF EXISTS {name}")
            if report.copy is None:
                raise RuntimeError("nothing was copied")
            found.append(report.copy.per_row(rows))
            peaks.append(report.peak_mb)
    return Median.of(found).value, Median.of(peaks).value


def _tables(bench: Setting) -> Figure:
    """The same changes spread over more and more tables, in transactions of a hundred rows which
    the tables take turns to get.

    What a table costs once, when its plan is compiled, is left out: the clocks run from the second
    half of the changes on.
    """
    rows = bench.scale.growth_rows
    bench.say(f"growth: {', '.join(map(str, bench.scale.tables))} tables")
    with ExitStack() as made:
        ways = {
            count: made.enter_context(_spread(bench, count, rows)) for count in bench.scale.tables
        }
        cpu = dict(zip(ways, take_turns(bench.scale.growth_rounds, *ways.values()), strict=True))
    few, many = min(cpu), max(cpu)
    return Figure(
        "growth.tables.cpu",
        f"stream, {many} tables beside {few}: CPU a row",
        "x",
        ratios(cpu[many], cpu[few]),
        _FLAT,
        note=_listed({n: Median.of(found).value for n, found in cpu.items()}, "µs"),
        relative=True,
    )


@contextmanager
def _spread(bench: Setting, count: int, rows: int) -> Iterator[Callable[[], float]]:
    """A way to stream twice so many rows of that many tables, which returns CPU microseconds a
    row."""
    source, meter, name = bench.source, bench.meter, bench.name()
    tables = [f"spread_{count}_{n}" for n in range(count)]
    source.execute(
        *(create(table, 0) for table in tables),
        f"CREATE PUBLICATION {name} FOR TABLE {', '.join(tables)}",
        f"SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')",
    )
    try:
        end = _insert_by_turns(source, tables, 2 * rows)
        plans = [source.plan(table) for table in tables]
        with source.types() as resolve:
            engine = StreamEngine(source.settings(name), plans, resolve, bench.scratch.new())

            def stream() -> float:
                source.wait_free(name)
                cost, measured = engine.run_after(rows, end, meter)
                return cost.per_row(measured)

            yield stream
    finally:
        source.drop_slot(name)
        source.execute(f"DROP PUBLICATION {name}", *(f"DROP TABLE {table}" for table in tables))


def _collections(bench: Setting) -> Figure:
    """The same into the test server, where each table has a collection of its own: the rate."""
    few, many = min(bench.scale.tables), max(bench.scale.tables)
    bench.say(f"growth: {few} and {many} tables into the test server")
    sink = ProcessBench(bench.scratch)
    try:
        one, all_ = take_turns(
            bench.scale.collections_rounds,
            lambda: _into_sink(bench, sink, few),
            lambda: _into_sink(bench, sink, many),
            warm_up=0,
        )
    finally:
        sink.close()
    rows = bench.scale.growth_rows
    rates = {few: [c.rate(rows) for c in one], many: [c.rate(rows) for c in all_]}
    sinks = {
        few: Median.of([c.other_per_row("sink", rows) for c in one]).value,
        many: Median.of([c.other_per_row("sink", rows) for c in all_]).value,
    }
    return Figure(
        "growth.collections.rate",
        f"stream into test server, {many} tables beside {few}: rows/s",
        "x",
        ratios(rates[many], rates[few]),
        Target(">=", 1 / _FLAT.bound),
        note=_listed({n: Median.of(found).value for n, found in rates.items()}, "rows/s")
        + f"; in the sink {_listed(sinks, 'µs')}",
        relative=True,
        facts={f"sink_cpu_us_{n}": value for n, value in sinks.items()},
    )


def _into_sink(bench: Setting, sink: ProcessBench, count: int) -> Cost:
    """The cost of the second half of a stream of twice so many rows."""
    source, name, rows = bench.source, bench.name(), bench.scale.growth_rows
    tables = [f"sunk_{count}_{n}" for n in range(count)]
    source.execute(*(create(table, 0) for table in tables))
    collections = {table: sink.collection() for table in tables}
    settings = settings_for(source.url, name, collections, qdrant=sink.settings())
    log = bench.scratch.new()
    try:
        with life(settings, log) as running:
            running.wait_copied()
        half = _insert_by_turns(source, tables, rows)
        end = _insert_by_turns(source, tables, rows, first=rows + 1)
        with life(settings, log, postgres=source.pid, sink=sink.pid) as running:
            running.wait_applied(half)
            began = running.usage()
            running.wait_applied(end)
            return began.until(running.usage())
    finally:
        source.drop_slot(name)
        source.execute(
            f"DROP PUBLICATION IF EXISTS {name}", *(f"DROP TABLE {table}" for table in tables)
        )
        for collection in collections.values():
            sink.drop(collection)


def _insert_by_turns(source: Source, tables: Sequence[str], rows: int, first: int = 1) -> int:
    """Insert so many rows; returns the position after them."""
    last = first + rows - 1
    with psycopg.connect(source.url, autocommit=True) as connection:
        for turn, start in enumerate(range(first, last + 1, _BLOCK)):
            end = min(last, start + _BLOCK - 1)
            connection.execute(insert(tables[turn % len(tables)], 0, str(start), str(end)))
    return source.position()


def _columns(bench: Setting) -> Figure:
    """CPU a row by the number of columns: beyond linear if a column costs more beside more."""
    rows, source, meter = bench.scale.growth_rows, bench.source, bench.meter
    counts = bench.scale.columns
    bench.say(f"growth: {', '.join(map(str, counts))} columns")
    for count in counts:
        columns = ", ".join(f"c{n} {'int' if n % 2 else 'text'}" for n in range(count))
        values = ", ".join("i % 1000" if n % 2 else "'value ' || i % 1000" for n in range(count))
        source.execute(
            f"CREATE TABLE wide_{count} (id bigint PRIMARY KEY, {columns})",
            f"INSERT INTO wide_{count} SELECT i, {values} FROM generate_series(1, {rows}) i",
            f"VACUUM (ANALYZE, FREEZE) wide_{count}",
        )
    settings, path = source.settings("bench"), bench.scratch.new()
    plans = {count: source.plan(f"wide_{count}") for count in counts}
    with exported_snapshot(source.url) as snapshot:
        costs = _turns(
            bench,
            {
                count: lambda p=planned: copy_blocks(  # type: ignore[misc]
                    settings, snapshot, p, (0, None), path, meter
                )[0]
                for count, planned in plans.items()
            },
        )
    source.execute(*(f"DROP TABLE wide_{count}" for count in counts))
    few, many = min(costs), max(costs)
    each = {n: [c.per_row(rows) / n for c in found] for n, found in costs.items()}
    return Figure(
        "growth.columns.cpu",
        f"copy, {many} columns beside {few}: CPU a column and row",
        "x",
        ratios(each[many], each[few]),
        _FLAT,
        note=_listed({n: Median.of(found).value for n, found in each.items()}, "µs"),
        relative=True,
    )


def _turns(bench: Setting, ways: Mapping[int, Callable[[], Cost]]) -> dict[int, list[Cost]]:
    return dict(zip(ways, take_turns(bench.scale.growth_rounds, *ways.values()), strict=True))


def _listed(values: Mapping[int, float], unit: str) -> str:
    return ", ".join(f"{number(n)}: {number(value)} {unit}" for n, value in values.items())
