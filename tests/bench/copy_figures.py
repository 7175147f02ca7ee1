"""The copy into a sink that drops all, by one worker and by two, beside the copy limit."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

from cdc_sync.config import SourceSettings
from cdc_sync.sync.routing import PlannedTable
from tests.bench import limits
from tests.bench.engine import copy_blocks, exported_snapshot
from tests.bench.model import speed_up
from tests.bench.rounds import Median, facts_beside_limit, ratios, take_turns
from tests.bench.setting import Setting
from tests.bench.targets import Figure, Target
from tests.bench.usage import Cost, Meter

_TABLE = "docs"
#: What part of what the cores allow two workers must reach.
_MOST_OF = 0.9


@contextmanager
def loaded(bench: Setting, table: str, dim: int, rows: int) -> Iterator[PlannedTable]:
    """A table of that many rows, and its plan; removed at the end."""
    bench.source.load(table, dim, rows)
    try:
        yield bench.source.plan(table)
    finally:
        bench.source.execute(f"DROP TABLE {table}")


def copy_figures(bench: Setting) -> Iterator[Figure]:
    """One worker beside the copy limit; two workers beside one."""
    rows, rounds = bench.scale.rows, bench.scale.rounds
    with loaded(bench, _TABLE, 768, rows) as planned, exported_snapshot(bench.source.url) as held:
        limit, ours = _one_worker(bench, planned, held, rounds)
        yield from _figures(rows, limit, ours)
        bench.say("copy: two workers")
        one, two = _workers(bench, planned, held, rounds)
    yield judge_two_workers(bench.cores, rows, one, two)


def _one_worker(
    bench: Setting, planned: PlannedTable, snapshot: str, rounds: int
) -> tuple[list[Cost], list[Cost]]:
    bench.say("copy: one worker")
    source, meter, path = bench.source, bench.meter, bench.scratch.new()
    settings = source.settings("bench")
    limit, ours = take_turns(
        rounds,
        lambda: limits.copy_out(source.url, f"SELECT * FROM {_TABLE}", meter),
        lambda: copy_blocks(settings, snapshot, planned, (0, None), path, meter)[0],
    )
    return limit, ours


def _figures(rows: int, limit: list[Cost], ours: list[Cost]) -> Iterator[Figure]:
    facts = facts_beside_limit(rows, limit, ours)
    yield Figure(
        "copy.768.ratio",
        "copy, 768-d, one worker, null sink",
        "of the copy limit",
        ratios([c.seconds for c in limit], [c.seconds for c in ours]),
        Target(">=", 0.6),
        note=f"{facts['rows_per_second']:,.0f} of {facts['limit_rows_per_second']:,.0f} rows/s; "
        f"best rounds {facts['best_ratio']:.2f}",
        relative=True,
        facts=facts,
    )
    yield Figure(
        "copy.768.cpu",
        "copy, 768-d, one worker, null sink",
        "µs CPU a row",
        Median.of([c.per_row(rows) for c in ours]),
        Target("<=", 22),
        note=f"COPY alone {facts['limit_cpu_us']:.2g}, in Postgres {facts['postgres_cpu_us']:.2g}",
        facts=facts,
    )


def _workers(
    bench: Setting, planned: PlannedTable, snapshot: str, rounds: int
) -> tuple[list[Cost], list[Cost]]:
    settings, pid = bench.source.settings("bench"), bench.source.pid
    pages = int(
        bench.source.scalar(
            f"SELECT pg_relation_size('{_TABLE}') / current_setting('block_size')::int"
        )
    )
    half = pages // 2
    with (
        _Worker(settings, snapshot, planned, bench.scratch.new(), pid) as first,
        _Worker(settings, snapshot, planned, bench.scratch.new(), pid) as second,
    ):

        def one() -> Cost:
            first.ready((0, None))
            first.go()
            return first.end()

        def two() -> Cost:
            first.ready((0, half))
            second.ready((half, None))
            first.go()
            second.go()
            costs = first.end(), second.end()
            return Cost(
                max(c.seconds for c in costs),
                sum(c.cpu for c in costs),
                others={"postgres": max(c.others.get("postgres", 0.0) for c in costs)},
            )

        alone, together = take_turns(rounds, one, two)
    return alone, together


def judge_two_workers(cores: int, rows: int, one: list[Cost], two: list[Cost]) -> Figure:
    """The gain of two workers, by what the cores allow."""
    postgres = Median.of([c.other_per_row("postgres", rows) for c in one]).value
    ours = Median.of([c.per_row(rows) for c in one]).value
    allowed = speed_up(postgres, ours, 2, cores)
    gain = ratios([c.seconds for c in one], [c.seconds for c in two])
    target = Target(">=", 1.6)
    # Two workers and two backends want more cores than there may be: the target is for free ones.
    # What is well below that which the cores allow is missed all the same.
    busy = not target.met(allowed) and gain.value >= _MOST_OF * allowed
    note = f"{cores} shared cores allow {allowed:.2f}"
    if not target.met(gain.value):
        note += f", of which this is {gain.value / allowed:.2f}"
    return Figure(
        "copy.768.two-workers",
        "copy, 768-d, two workers, null sink",
        "x one worker",
        gain,
        target,
        note=note,
        relative=True,
        untested=busy and not target.met(gain.value),
        facts={"allowed": allowed, "cpu_us": ours, "postgres_cpu_us": postgres},
    )


class _Worker:
    """A process that copies ranges of a table, one after the other."""

    def __init__(
        self,
        source: SourceSettings,
        snapshot: str,
        planned: PlannedTable,
        path: Path,
        postgres: int | None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs, source, snapshot, planned, path, postgres), daemon=True
        )
        self._process.start()
        theirs.close()

    def ready(self, blocks: tuple[int, int | None]) -> None:
        """Have it connect and wait for :meth:`go`."""
        self._pipe.send(blocks)
        self._pipe.recv()

    def go(self) -> None:
        """Have it copy."""
        self._pipe.send("go")

    def end(self) -> Cost:
        """Wait for its end."""
        cost = self._pipe.recv()
        assert isinstance(cost, Cost)
        return cost

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(
    pipe: Connection,
    source: SourceSettings,
    snapshot: str,
    planned: PlannedTable,
    path: Path,
    postgres: int | None,
) -> None:
    meter = Meter(postgres=postgres)
    gc.freeze()

    def begin() -> None:
        pipe.send("ready")
        pipe.recv()

    while True:
        blocks: tuple[int, int | None] = pipe.recv()
        cost, _ = copy_blocks(source, snapshot, planned, blocks, path, meter, begin=begin)
        pipe.send(cost)
