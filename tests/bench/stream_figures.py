"""The stream into a sink that drops all, beside the drain limit."""

from __future__ import annotations

from collections.abc import Iterator

from tests.bench import limits
from tests.bench.datasets import Dataset, deletes, inserts, mixed, updates
from tests.bench.engine import StreamEngine
from tests.bench.rounds import Median, facts_beside_limit, ratios, take_turns
from tests.bench.setting import Setting
from tests.bench.targets import Figure, Target
from tests.bench.usage import Cost

_RATIOS = {"inserts-768": Target(">=", 0.6)}
_CPU = {"inserts-768": Target("<=", 30), "updates": Target("<=", 15)}


def datasets(rows: int) -> list[Dataset]:
    """All that is streamed; one-row transactions are a quarter as many, since making them takes
    longest."""
    return [
        inserts(768, rows),
        inserts(768, max(1, rows // 4), each=True),
        inserts(1536, max(1, rows // 2)),
        updates(rows),
        deletes(rows),
        mixed(rows),
        inserts(0, rows),
    ]


def stream_figures(bench: Setting, only: str | None = None) -> Iterator[Figure]:
    """The ratio to the drain limit, and CPU a row, of every dataset, or of the one named."""
    for dataset in datasets(bench.scale.rows):
        if only is None or dataset.name == only:
            limit, ours = measure_stream(bench, dataset, bench.scale.rounds)
            yield from _figures(dataset, limit, ours)


def measure_stream(
    bench: Setting, dataset: Dataset, rounds: int, *, warm_up: int = 1
) -> tuple[list[Cost], list[Cost]]:
    """The costs of the drain limit and of ours, round by round."""
    bench.say(f"stream: {dataset.title}")
    source, meter = bench.source, bench.meter
    with source.changes(dataset) as name, source.types() as resolve:
        commits = dataset.rows if dataset.each else 1
        end = limits.last_commit(source.url, name, name, commits)
        engine = StreamEngine(
            source.settings(name),
            [source.plan(dataset.table)],
            resolve,
            bench.scratch.new(),
        )

        def limit() -> Cost:
            source.wait_free(name)
            return limits.drain(source.url, name, name, end, meter)

        def ours() -> Cost:
            source.wait_free(name)
            return engine.run(int.from_bytes(end, "big"), meter)

        drained, streamed = take_turns(rounds, limit, ours, warm_up=warm_up)
    return drained, streamed


def _figures(dataset: Dataset, limit: list[Cost], ours: list[Cost]) -> Iterator[Figure]:
    rows = dataset.rows
    facts = facts_beside_limit(rows, limit, ours)
    yield Figure(
        f"stream.{dataset.name}.ratio",
        f"stream, {dataset.title}, null sink",
        "of the drain limit",
        ratios([c.seconds for c in limit], [c.seconds for c in ours]),
        _RATIOS.get(dataset.name),
        note=f"{facts['rows_per_second']:,.0f} of {facts['limit_rows_per_second']:,.0f} rows/s; "
        f"best rounds {facts['best_ratio']:.2f}",
        relative=True,
        facts=facts,
    )
    yield Figure(
        f"stream.{dataset.name}.cpu",
        f"stream, {dataset.title}, null sink",
        "µs CPU a row",
        Median.of([c.per_row(rows) for c in ours]),
        _CPU.get(dataset.name),
        note=f"the drain alone {facts['limit_cpu_us']:.2g}",
        facts=facts,
    )
