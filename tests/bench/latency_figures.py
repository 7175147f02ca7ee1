"""From commit to Completed at 500 one-row transactions a second, above the sink's own latency."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import psycopg

from tests.bench.copy_figures import loaded
from tests.bench.datasets import create, insert
from tests.bench.engine import read_rows
from tests.bench.pipeline import life, settings_for
from tests.bench.rounds import Median, quantile
from tests.bench.setting import Setting
from tests.bench.sinks import ProcessBench, encoded_requests, planned_as
from tests.bench.targets import Figure, Target

_RATE: Final = 500
_TABLE: Final = "committed"
_ROWS: Final = 200
_TARGETS: Final = ((0.5, Target("<=", 15)), (0.99, Target("<=", 80)))


@dataclass(frozen=True)
class _Round:
    """Milliseconds: of the sink by itself, and from commit to Completed."""

    sink: list[float]
    ours: list[float]
    rate: float


def latency_figures(bench: Setting) -> Iterator[Figure]:
    """p50 and p99 of the test server."""
    bench.say("latency: test server, 500 one-row transactions/s")
    sink = ProcessBench(bench.scratch)
    try:
        with loaded(bench, "single", 768, _ROWS):
            rounds = [_round(bench, sink) for _ in range(bench.scale.latency_rounds)]
    finally:
        sink.close()
    for part, target in _TARGETS:
        above = [quantile(r.ours, part) - quantile(r.sink, part) for r in rounds]
        ours = Median.of([quantile(r.ours, part) for r in rounds])
        alone = Median.of([quantile(r.sink, part) for r in rounds])
        rate = Median.of([r.rate for r in rounds]).value
        percent = round(part * 100)
        late = rate < 0.95 * _RATE
        note = f"{ours.value:.1f} ms, of which the sink alone {alone.value:.1f}"
        yield Figure(
            f"latency.p{percent}",
            f"commit to Completed, 500 one-row transactions/s, p{percent}",
            "ms above the sink's",
            Median.of(above),
            target,
            note=f"{note}; only {rate:.0f} transactions/s were made" if late else note,
            untested=late,
            facts={"ours_ms": ours.value, "sink_ms": alone.value, "transactions_per_second": rate},
        )


def _round(bench: Setting, sink: ProcessBench) -> _Round:
    source, name, seconds = bench.source, bench.name(), bench.scale.latency_seconds
    alone = _sink_alone(bench, sink, seconds / 2)
    source.execute(create(_TABLE, 768))
    collection = sink.collection()
    settings = settings_for(source.url, name, {_TABLE: collection}, qdrant=sink.settings())
    try:
        with life(settings, bench.scratch.new()) as running:
            running.wait_copied()
            # The first requests open connections.
            _commit(source.url, 1, 1.0)
            running.wait_applied(source.position())
            running.latencies()
            rate = _commit_elsewhere(source.url, _RATE + 1, seconds)
            running.wait_applied(source.position())
            ours = [1e3 * value for value in running.latencies()]
    finally:
        source.drop_slot(name)
        source.execute(f"DROP PUBLICATION IF EXISTS {name}", f"DROP TABLE {_TABLE}")
        sink.drop(collection)
    return _Round(alone, ours, rate)


def _sink_alone(bench: Setting, sink: ProcessBench, seconds: float) -> list[float]:
    """Milliseconds of requests with one point each, sent one after the other at the same pace."""
    planned = bench.source.plan("single")
    rows = read_rows(bench.source.settings("bench"), planned)
    collection = sink.make(planned)
    requests = [encoded_requests(planned_as(planned, collection), [row])[0] for row in rows]
    loop = sink.loop()
    taken: list[float] = []
    try:
        for request in requests[:20]:
            loop.send_one(request)
        for number in _paced(_RATE, seconds):
            began = time.perf_counter()
            loop.send_one(requests[number % len(requests)])
            taken.append(1e3 * (time.perf_counter() - began))
    finally:
        loop.close()
        sink.drop(collection)
    return taken


def _paced(rate: float, seconds: float) -> Iterator[int]:
    """Numbers from 0 on, each at its time; what is late follows at once."""
    began = time.perf_counter()
    number = 0
    while (due := began + number / rate) < began + seconds:
        time.sleep(max(0.0, due - time.perf_counter()))
        yield number
        number += 1


def _commit(url: str, first: int, seconds: float) -> float:
    """Commit transactions of one row for so long; returns how many a second."""
    statement = insert(_TABLE, 768, "{i}", "{i}")
    began, count = time.perf_counter(), 0
    with psycopg.connect(url, autocommit=True) as connection:
        for number in _paced(_RATE, seconds):
            connection.execute(statement.replace("{i}", str(first + number)).encode())
            count += 1
    return count / (time.perf_counter() - began)


def _commit_elsewhere(url: str, first: int, seconds: float) -> float:
    """The same in a process of its own, as an application would."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_commit, (url, first, seconds))
