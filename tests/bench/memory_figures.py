"""Memory of the stream and of copy workers, and what an idle pipeline costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from tests.bench.copy_figures import loaded
from tests.bench.datasets import create, insert
from tests.bench.pipeline import life, settings_for
from tests.bench.rounds import Median
from tests.bench.setting import Setting
from tests.bench.sinks import ProcessBench
from tests.bench.targets import Figure, Target, number
from tests.bench.usage import descendants, memory_mb

_FLAT: Final = Target("<=", 1.15)


def memory_figures(bench: Setting) -> Iterator[Figure]:
    """Peaks of resident memory."""
    peaks = {rows: _transaction(bench, rows) for rows in bench.scale.transactions}
    vectors = _streaming(bench)
    most = max([*peaks.values(), vectors])
    sizes = ", ".join(f"{number(rows)} rows: {peak:.0f}" for rows, peak in peaks.items())
    yield Figure(
        "memory.streaming",
        "peak RSS, streaming",
        "MB",
        Median.of([most]),
        Target("<=", 200),
        note=f"768-d {vectors:.0f}; one transaction of {sizes}",
        facts={f"mb_{rows}": peak for rows, peak in peaks.items()} | {"mb_768": vectors},
    )
    smallest, largest = min(peaks), max(peaks)
    yield Figure(
        "memory.flat",
        f"peak RSS, transactions of {number(smallest)} to {number(largest)} rows",
        "x",
        Median.of([peaks[largest] / peaks[smallest]]),
        _FLAT,
        note="small rows; 10 M with --full" if largest < 10_000_000 else "small rows",
        relative=True,
    )
    yield _workers(bench)


def _transaction(bench: Setting, rows: int) -> float:
    """Peak memory, in MB, of a pipeline that streams one transaction of so many small rows into
    nothing."""
    bench.say(f"memory: one transaction of {rows:,} rows")
    source, name, table = bench.source, bench.name(), "transaction"
    source.execute(create(table, 0))
    settings = settings_for(source.url, name, {table: "points"})
    records, log = bench.scratch.new(), bench.scratch.new()
    try:
        with life(settings, log, null=records) as running:
            running.wait_copied()
        source.execute(insert(table, 0, "1", str(rows)))
        end = source.position()
        with life(settings, log, null=records) as running:
            running.wait_applied(end)
            return running.report().peak_mb
    finally:
        source.drop_slot(name)
        source.execute(f"DROP PUBLICATION IF EXISTS {name}", f"DROP TABLE {table}", "CHECKPOINT")


def _streaming(bench: Setting) -> float:
    """Peak memory, in MB, of a pipeline that streams 768-d rows to the test server."""
    bench.say("memory: 768-d rows to the test server")
    source, name, table = bench.source, bench.name(), "vectored"
    source.make_vectors(768)
    source.execute(create(table, 768))
    sink = ProcessBench(bench.scratch)
    collection = sink.collection()
    settings = settings_for(source.url, name, {table: collection}, qdrant=sink.settings())
    log = bench.scratch.new()
    try:
        with life(settings, log) as running:
            running.wait_copied()
        source.execute(insert(table, 768, "1", str(bench.scale.sink_rows)))
        end = source.position()
        with life(settings, log) as running:
            running.wait_applied(end)
            return running.report().peak_mb
    finally:
        source.drop_slot(name)
        source.execute(f"DROP PUBLICATION IF EXISTS {name}", f"DROP TABLE {table}")
        sink.close()


def _workers(bench: Setting) -> Figure:
    """Peak memory of copy workers, each."""
    bench.say("memory: copy workers")
    source, name, table = bench.source, bench.name(), "docs"
    sink = ProcessBench(bench.scratch)
    collection = sink.collection()
    settings = settings_for(
        source.url, name, {table: collection}, qdrant=sink.settings(), workers=2
    )
    peaks: dict[int, float] = {}
    try:
        with (
            loaded(bench, table, 768, max(12_000, bench.scale.sink_rows)),
            life(settings, bench.scratch.new()) as running,
        ):
            while not running.streams():
                for pid in descendants(running.pid):
                    if peak := memory_mb(pid, "VmHWM"):
                        peaks[pid] = peak
                time.sleep(0.02)
    finally:
        source.drop_slot(name)
        source.execute(f"DROP PUBLICATION IF EXISTS {name}")
        sink.close()
    # One of them is multiprocessing's own, which keeps book of what is shared.
    workers = sorted(peaks.values())[-2:]
    return Figure(
        "memory.worker",
        "peak RSS a copy worker, 768-d",
        "MB",
        Median.of(workers) if len(workers) == 2 else None,
        Target("<=", 150),
        note="shared pages counted for each",
    )


def idle_figures(bench: Setting) -> Iterator[Figure]:
    """CPU of a pipeline at rest, with many tables, against the test server."""
    scale, source, name = bench.scale, bench.source, bench.name()
    bench.say(f"idle: {scale.idle_tables} tables for {scale.idle_seconds:g} s")
    tables = [f"idle_{n}" for n in range(scale.idle_tables)]
    source.execute(*(create(table, 8) for table in tables))
    sink = ProcessBench(bench.scratch)
    collections = {table: sink.collection() for table in tables}
    settings = settings_for(source.url, name, collections, qdrant=sink.settings())
    try:
        with life(settings, bench.scratch.new(), postgres=source.pid) as running:
            running.wait_copied()
            # Caches of catalogs are filled, and what was copied is confirmed.
            time.sleep(min(10.0, scale.idle_seconds / 2))
            began = running.usage()
            time.sleep(scale.idle_seconds)
            cost = began.until(running.usage())
            peak = running.report().peak_mb
    finally:
        source.drop_slot(name)
        source.execute(
            f"DROP PUBLICATION IF EXISTS {name}", *(f"DROP TABLE {table}" for table in tables)
        )
        sink.close()
    share = 100 * cost.cpu / cost.seconds
    in_postgres = 100 * cost.others.get("postgres", 0.0) / cost.seconds
    yield Figure(
        "idle.cpu",
        f"idle, {scale.idle_tables} tables, over {scale.idle_seconds:g} s",
        "% of a core",
        Median.of([share]),
        Target("<=", 1.0),
        note=f"and {in_postgres:.2f} in Postgres; {peak:.0f} MB",
        facts={"postgres_percent": in_postgres, "peak_mb": peak},
    )
