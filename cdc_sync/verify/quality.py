"""How well two systems' search results agree: the measures of Qdrant's guide on migration
verification, and its thresholds.

Results are judged by ids. A row that is as near as the last of the source's results counts as one
of them, since either might have been returned. Source of the measures: Järvelin and Kekäläinen,
"Cumulated gain-based evaluation of IR techniques" (NDCG); Spearman's rho over average ranks.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from cdc_sync.mapping.plan import Metric
from cdc_sync.rows import PointId

#: How many results are looked at.
DEPTH: Final = 10
#: Common results that a rank correlation wants, at least.
FEWEST_COMMON: Final = 3
#: Distances this near are taken for equal: both sides compute in single precision.
TIE: Final = 1e-6
#: Means of tenths are not exact in binary: a bound is met within this.
_ROUNDING: Final = 1e-9

#: Ids with their distances (smaller is nearer), nearest first.
Ranked: TypeAlias = Sequence[tuple[PointId, float]]


class Verdict(enum.Enum):
    """A judgement."""

    PASS = "pass"
    INVESTIGATE = "investigate"
    FAIL = "fail"

    @property
    def severity(self) -> int:
        """0 for pass, 2 for fail."""
        return list(Verdict).index(self)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The most severe one; PASS of none."""
    return max(verdicts, key=lambda one: one.severity, default=Verdict.PASS)


@dataclass(frozen=True, slots=True)
class Threshold:
    """At least ``passes`` (more than it, if ``above``) passes; at least ``investigates`` is to be
    investigated, as is everything else where that is None; the rest fails."""

    passes: float
    investigates: float | None = None
    above: bool = False

    def judge(self, value: float) -> Verdict:
        """The verdict on a value."""
        margin = -_ROUNDING if self.above else _ROUNDING
        if value + margin > self.passes:
            return Verdict.PASS
        if self.investigates is None or value + _ROUNDING >= self.investigates:
            return Verdict.INVESTIGATE
        return Verdict.FAIL

    def __str__(self) -> str:
        text = f"{'>' if self.above else '>='} {self.passes:.2f}"
        return text if self.investigates is None else f"{text}, fails < {self.investigates:.2f}"


TOP_1_MATCH: Final = Threshold(0.80)
TOP_10_OVERLAP: Final = Threshold(0.70)
MEAN_RECALL: Final = Threshold(0.85, 0.70)
MEDIAN_RECALL: Final = Threshold(0.90, 0.75)
MINIMUM_RECALL: Final = Threshold(0.50, 0.30)
P5_RECALL: Final = Threshold(0.60, 0.40)
SPEARMAN: Final = Threshold(0.80, above=True)
#: Good, acceptable; below is poor.
NDCG: Final = Threshold(0.70, 0.50)
MRR: Final = Threshold(0.60, 0.40)

LEVELS: Final[Mapping[Verdict, str]] = {
    Verdict.PASS: "good",
    Verdict.INVESTIGATE: "acceptable",
    Verdict.FAIL: "poor",
}


@dataclass(frozen=True, slots=True)
class Answers:
    """What both systems answer to one query, distances in the source's sense.

    ``reference`` are the source's nearest, ``ties`` rows as near as the last of them. ``found`` is
    what Qdrant returns as it is configured, ``exact`` what it returns by exact search, ``index``
    what the source returns through its index. ``grades`` are relevances by id.
    """

    number: int
    label: str | None
    k: int
    filtered: bool
    reference: Ranked
    ties: Ranked = ()
    found: Ranked = ()
    exact: Ranked = ()
    index: Ranked | None = None
    grades: Mapping[PointId, float] | None = None

    @property
    def distances(self) -> dict[PointId, float]:
        """The source's distance of each row that is known."""
        return dict((*self.reference, *self.ties))


def acceptable_ids(answers: Answers, depth: int) -> frozenset[PointId]:
    """The ids of the source's ``depth`` nearest, and of rows as near as the last of those."""
    if not answers.reference:
        return frozenset()
    last = answers.reference[: max(1, depth)][-1][1]
    limit = last + TIE * max(1.0, abs(last))
    return frozenset(
        id_ for id_, distance in (*answers.reference, *answers.ties) if distance <= limit
    )


def recall(answers: Answers, found: Ranked, depth: int = DEPTH) -> float | None:
    """The part of the source's ``depth`` nearest that is among as many of ``found``, 0 to 1; None
    where the source has no result."""
    wanted = min(depth, len(answers.reference))
    if not wanted:
        return None
    accepted = acceptable_ids(answers, wanted)
    hits = len({id_ for id_, _ in found[:wanted]} & accepted)
    return min(hits, wanted) / wanted


def top_1_matches(answers: Answers) -> bool | None:
    """Whether the first result is the source's first, or as near; None where the source has
    none."""
    if not answers.reference:
        return None
    return bool(answers.found) and answers.found[0][0] in acceptable_ids(answers, 1)


def common_pairs(answers: Answers, depth: int = DEPTH) -> list[tuple[float, float]]:
    """The distances, at the source and in Qdrant, of the rows that both have among the first."""
    distances = answers.distances
    return [(distances[id_], value) for id_, value in answers.found[:depth] if id_ in distances]


def average_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, equal values (within :data:`TIE`) sharing the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    for place in range(1, len(order) + 1):
        if place < len(order):
            before, value = values[order[place - 1]], values[order[place]]
            if value - before <= TIE * max(1.0, abs(value)):
                continue
        for one in order[start:place]:
            ranks[one] = (start + place + 1) / 2
        start = place
    return ranks


def spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation, -1 to 1. None for fewer than three pairs, or where all values of
    one side are equal, which leaves nothing to correlate."""
    if len(pairs) < FEWEST_COMMON:
        return None
    first = np.asarray(average_ranks([one for one, _ in pairs]))
    second = np.asarray(average_ranks([other for _, other in pairs]))
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return None if scale == 0 else max(-1.0, min(1.0, float(first @ second) / scale))


def ndcg(ids: Sequence[PointId], grades: Mapping[PointId, float], depth: int = DEPTH) -> float:
    """Normalised discounted cumulative gain, 0 to 1: gains ``2^grade - 1``, the one at rank r
    divided by ``log2(r + 1)``; 0 where no row is relevant."""

    def cumulated(found: Sequence[float]) -> float:
        return math.fsum((2.0**grade - 1) / math.log2(r + 2) for r, grade in enumerate(found))

    best = cumulated(sorted(grades.values(), reverse=True)[:depth])
    return cumulated([grades.get(id_, 0.0) for id_ in ids[:depth]]) / best if best else 0.0


def reciprocal_rank(ids: Sequence[PointId], grades: Mapping[PointId, float]) -> float:
    """One divided by the rank of the first relevant row, 0 if none is there."""
    for rank, id_ in enumerate(ids, 1):
        if grades.get(id_, 0.0) > 0:
            return 1 / rank
    return 0.0


# -- scores


def as_distance(metric: Metric, score: float) -> float:
    """Qdrant's score as the distance that pgvector gives: ``<=>`` is 1 - cosine similarity,
    ``<#>`` the negative inner product, ``<->`` and ``<+>`` are distances on both sides."""
    if metric is Metric.COSINE:
        return 1.0 - score
    return -score if metric is Metric.DOT else score


#: How far a score may be off by rounding.
_SLACK: Final = 1e-3


def is_plausible(metric: Metric, score: float) -> bool:
    """Whether a score can be one of this metric: finite; -1 to 1 for Cosine; not negative for
    distances."""
    if not math.isfinite(score):
        return False
    if metric is Metric.COSINE:
        return -1 - _SLACK <= score <= 1 + _SLACK
    return metric is Metric.DOT or score >= -_SLACK


def score_deviation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """How far Qdrant's distances are from the source's: the 95th percentile of the differences,
    each relative to the source's distance if that is more than 1. None without pairs."""
    if not pairs:
        return None
    differences = [abs(one - other) / max(1.0, abs(one)) for one, other in pairs]
    return float(np.percentile(differences, 95))


# -- statistics


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of values, of which there is at least one; ``p5`` by linear interpolation, ``std`` of the
    population."""

    count: int
    mean: float
    median: float
    minimum: float
    p5: float
    std: float


def statistics(values: Sequence[float]) -> Statistics:
    """Describe the values. Raises ``ValueError`` without any."""
    if not values:
        raise ValueError("no values to describe")
    array = np.asarray(values, dtype=np.float64)
    return Statistics(
        count=len(values),
        mean=math.fsum(values) / len(values),
        median=float(np.median(array)),
        minimum=float(array.min()),
        p5=float(np.percentile(array, 5)),
        std=float(array.std()),
    )
