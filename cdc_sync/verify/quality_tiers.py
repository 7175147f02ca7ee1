"""The three tiers of Qdrant's guide, computed over the answers to all queries of a column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from cdc_sync.mapping.plan import Metric
from cdc_sync.rows import PointId
from cdc_sync.verify import quality as m
from cdc_sync.verify.quality import Answers, Ranked, Statistics, Threshold, Verdict

#: How far scores may be from the source's for their range to be plausible.
PLAUSIBLE_DEVIATION: Final = 0.01
#: The same where components are stored in less precision.
COARSE_DEVIATION: Final = 0.1


@dataclass(frozen=True, slots=True)
class Criterion:
    """A value, what is asked of it, and the verdict. ``value`` is None where there was nothing to
    compute it from, which is no fault."""

    tier: int
    name: str
    value: float | None
    wanted: str
    verdict: Verdict
    #: The source system's own value, where it has one.
    source: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Tiers:
    """What was computed. ``recalls`` and ``correlations`` are by query, None where there is
    none."""

    criteria: tuple[Criterion, ...]
    recalls: tuple[float | None, ...]
    correlations: tuple[float | None, ...]
    recall: Statistics | None
    exact_recall: Statistics | None
    index_recall: Statistics | None
    pairs: tuple[tuple[float, float], ...]
    labelled: int

    @property
    def verdict(self) -> Verdict:
        """The worst of all criteria."""
        return m.worst([one.verdict for one in self.criteria])


def judge(
    answers: Sequence[Answers],
    metric: Metric,
    raw_scores: Sequence[float],
    *,
    coarse: bool = False,
) -> Tiers:
    """Compute all tiers. ``raw_scores`` are Qdrant's scores of all results, under ``metric``;
    ``coarse``: components are stored in less precision than the source's.
    """
    recalls = tuple(m.recall(one, one.found) for one in answers)
    pairs = tuple(pair for one in answers for pair in m.common_pairs(one))
    correlations = tuple(m.spearman(m.common_pairs(one)) for one in answers)
    spot = _tier_1(answers, recalls, metric, raw_scores, pairs, coarse=coarse)
    recall = _described(recalls)
    criteria = [*spot, *_tier_2(recall, correlations), *_tier_3(answers)]
    return Tiers(
        criteria=tuple(criteria),
        recalls=recalls,
        correlations=correlations,
        recall=recall,
        exact_recall=_described([m.recall(one, one.exact) for one in answers]),
        index_recall=_described(
            [m.recall(one, one.index) for one in answers if one.index is not None]
        ),
        pairs=pairs,
        labelled=sum(one.grades is not None for one in answers),
    )


def _described(values: Sequence[float | None]) -> Statistics | None:
    known = [value for value in values if value is not None]
    return m.statistics(known) if known else None


def _mean(values: Sequence[float]) -> float | None:
    return m.statistics(values).mean if values else None


def _criterion(tier: int, name: str, value: float | None, threshold: Threshold) -> Criterion:
    if value is None:
        return Criterion(tier, name, None, str(threshold), Verdict.PASS, note="nothing to compare")
    return Criterion(tier, name, value, str(threshold), threshold.judge(value))


# -- tier 1


def _tier_1(
    answers: Sequence[Answers],
    recalls: Sequence[float | None],
    metric: Metric,
    raw_scores: Sequence[float],
    pairs: Sequence[tuple[float, float]],
    *,
    coarse: bool,
) -> list[Criterion]:
    matches = [float(match) for one in answers if (match := m.top_1_matches(one)) is not None]
    overlaps = [value for value in recalls if value is not None]
    return [
        _criterion(1, "top-1 match", _mean(matches), m.TOP_1_MATCH),
        _criterion(1, "top-10 overlap", _mean(overlaps), m.TOP_10_OVERLAP),
        _none_of(
            "empty results",
            sum(bool(one.reference) and not one.found for one in answers),
            "queries answered by the source and not by Qdrant",
        ),
        _none_of(
            "surplus results",
            sum(bool(one.found) and not one.reference for one in answers),
            "queries answered by Qdrant and not by the source",
        ),
        _score_range(metric, raw_scores, pairs, coarse=coarse),
    ]


def _none_of(name: str, count: int, note: str) -> Criterion:
    verdict = Verdict.INVESTIGATE if count else Verdict.PASS
    return Criterion(1, name, float(count), "none", verdict, note=note if count else "")


def _score_range(
    metric: Metric,
    raw_scores: Sequence[float],
    pairs: Sequence[tuple[float, float]],
    *,
    coarse: bool,
) -> Criterion:
    limit = COARSE_DEVIATION if coarse else PLAUSIBLE_DEVIATION
    wanted = f"<= {limit:.2f} off"
    strange = sum(not m.is_plausible(metric, score) for score in raw_scores)
    deviation = m.score_deviation(pairs)
    if strange:
        note = f"{strange} scores cannot be of the metric {metric.value}"
        return Criterion(1, "score range", deviation, wanted, Verdict.INVESTIGATE, note=note)
    if deviation is None:
        return Criterion(1, "score range", None, wanted, Verdict.PASS, note="nothing to compare")
    if deviation > limit:
        note = "common results have other scores than in the source"
        return Criterion(1, "score range", deviation, wanted, Verdict.INVESTIGATE, note=note)
    return Criterion(1, "score range", deviation, wanted, Verdict.PASS)


# -- tier 2


def _tier_2(recall: Statistics | None, correlations: Sequence[float | None]) -> list[Criterion]:
    known = [value for value in correlations if value is not None]
    return [
        _criterion(2, "mean", None if recall is None else recall.mean, m.MEAN_RECALL),
        _criterion(2, "median", None if recall is None else recall.median, m.MEDIAN_RECALL),
        _criterion(2, "minimum", None if recall is None else recall.minimum, m.MINIMUM_RECALL),
        _criterion(2, "5th percentile", None if recall is None else recall.p5, m.P5_RECALL),
        _criterion(2, "Spearman", _mean(known), m.SPEARMAN),
    ]


# -- tier 3


def _tier_3(answers: Sequence[Answers]) -> list[Criterion]:
    labelled = [one for one in answers if one.grades]
    if not labelled:
        return []
    return [
        _relevance("NDCG@10", labelled, m.NDCG, lambda one, ids: m.ndcg(ids, one.grades or {})),
        _relevance(
            "MRR", labelled, m.MRR, lambda one, ids: m.reciprocal_rank(ids, one.grades or {})
        ),
    ]


def _relevance(
    name: str,
    labelled: Sequence[Answers],
    threshold: Threshold,
    measure: Callable[[Answers, Sequence[PointId]], float],
) -> Criterion:
    ours = m.statistics([measure(one, _ids(one.found)) for one in labelled]).mean
    # What the source's users saw: through its index where it has one.
    theirs = m.statistics([measure(one, _ids(_source_results(one))) for one in labelled]).mean
    verdict = threshold.judge(ours)
    note = m.LEVELS[verdict]
    if verdict is not Verdict.PASS and theirs <= ours:
        # That lies in the vectors, not in the migration.
        verdict = Verdict.PASS
        note += ", and no better in the source"
    wanted = f"good >= {threshold.passes:.2f}, acceptable >= {threshold.investigates:.2f}"
    return Criterion(3, name, ours, wanted, verdict, source=theirs, note=note)


def _source_results(one: Answers) -> Ranked:
    return one.reference if one.index is None else one.index


def _ids(found: Ranked) -> list[PointId]:
    return [id_ for id_, _ in found]
