"""Rounds in which several ways take turns, and what they come to.

Rates depend on the machine and on who else uses it; the ratio of two ways that ran one after the
other does so much less. So ratios are taken round by round, and their median counts.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tests.bench.usage import Cost

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Median:
    """The median of rounds, and the least and the largest."""

    value: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Median:
        """Raises ``ValueError`` for no values."""
        if not values:
            raise ValueError("no rounds were measured")
        return cls(statistics.median(values), min(values), max(values))


def collect_garbage() -> None:
    """Collect garbage, and have no later collection look through what is left, as the program does
    when it starts: all that the benchmark holds counts for nobody."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def take_turns(
    rounds: int,
    *ways: Callable[[], T],
    warm_up: int = 1,
    rest: Callable[[], object] = collect_garbage,
) -> list[list[T]]:
    """Run every way once a round, and every second round in reverse order, so that a drift of the
    machine's speed favours none. Returns the results by way.

    Results of ``warm_up`` rounds before are thrown away. ``rest`` is called before each.
    """
    results: list[list[T]] = [[] for _ in ways]
    for number in range(-warm_up, rounds):
        order = list(zip(ways, results, strict=True))
        for way, found in order if number % 2 == 0 else reversed(order):
            rest()
            result = way()
            if number >= 0:
                found.append(result)
    return results


def ratios(of: Sequence[float], to: Sequence[float]) -> Median:
    """The median of the ratios, round by round."""
    return Median.of([a / b for a, b in zip(of, to, strict=True)])


def ratio_of_best(of: Sequence[float], to: Sequence[float]) -> float:
    """The ratio of the least values, whatever their rounds: what comes nearest to an idle machine
    on one that is not. Raises ``ValueError`` for no values."""
    return min(of) / min(to)


def quantile(values: Sequence[float], part: float) -> float:
    """The value below which that part (0 to 1) of the values lies: the nearest rank. Raises
    ``ValueError`` for no values."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(part * len(ordered)) - 1))]


def facts_beside_limit(
    rows: int, limit: Sequence[Cost], ours: Sequence[Cost]
) -> dict[str, int | float]:
    """What is known of rounds in which a limit and ours took turns with the same rows."""
    return {
        "rows": rows,
        "limit_rows_per_second": Median.of([c.rate(rows) for c in limit]).value,
        "limit_cpu_us": Median.of([c.per_row(rows) for c in limit]).value,
        "rows_per_second": Median.of([c.rate(rows) for c in ours]).value,
        "postgres_cpu_us": Median.of([c.other_per_row("postgres", rows) for c in ours]).value,
        "best_ratio": ratio_of_best([c.seconds for c in limit], [c.seconds for c in ours]),
    }
