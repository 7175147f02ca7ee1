"""The measures of search quality, and the guide's thresholds on both of their sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cdc_sync.mapping.plan import Metric
from cdc_sync.rows import PointId
from cdc_sync.verify import quality as m
from cdc_sync.verify.quality import Answers, Threshold, Verdict
from cdc_sync.verify.quality_tiers import Criterion, Tiers, judge

PASS, INVESTIGATE, FAIL = Verdict.PASS, Verdict.INVESTIGATE, Verdict.FAIL


def answers(
    hits: int,
    *,
    of: int = 10,
    first: bool = True,
    reverse: bool = False,
    grades: Mapping[PointId, float] | None = None,
) -> Answers:
    """A query of ``of`` results at the source of which Qdrant finds ``hits``."""
    reference = [(number, number / 10) for number in range(1, of + 1)]
    found: list[tuple[PointId, float]] = [*reference[:hits]]
    if not first and hits:
        # Another row comes first, as many are found.
        found = [(99, 0.0), *reference[1 : hits + 1]]
    found += [(100 + number, 5.0 + number) for number in range(of - len(found))]
    if reverse:
        found = [(id_, -distance) for id_, distance in found]
    return Answers(1, None, of, False, reference, found=found, exact=reference, grades=grades)


def criterion(tiers: Tiers, name: str) -> Criterion:
    return next(one for one in tiers.criteria if one.name == name)


def judged(queries: Sequence[Answers]) -> Tiers:
    return judge(queries, Metric.EUCLID, [1.0])


def mixed(good: int, bad: int, *, good_hits: int = 10, bad_hits: int = 0) -> list[Answers]:
    return [answers(good_hits)] * good + [answers(bad_hits)] * bad


# Tier 1


@pytest.mark.parametrize(("matching", "verdict"), [(80, PASS), (79, INVESTIGATE), (0, INVESTIGATE)])
def test_top_1_match(matching: int, verdict: Verdict) -> None:
    queries = [answers(9)] * matching + [answers(9, first=False)] * (100 - matching)
    found = criterion(judged(queries), "top-1 match")
    assert found.value == pytest.approx(matching / 100)
    assert found.verdict is verdict


@pytest.mark.parametrize(("full", "verdict"), [(70, PASS), (69, INVESTIGATE)])
def test_top_10_overlap(full: int, verdict: Verdict) -> None:
    found = criterion(judged(mixed(full, 100 - full)), "top-10 overlap")
    assert found.value == pytest.approx(full / 100)
    assert found.verdict is verdict


def test_overlap_of_seven_tenths_each_passes() -> None:
    assert criterion(judged([answers(7)] * 13), "top-10 overlap").verdict is PASS


def test_an_empty_result_where_the_source_has_some() -> None:
    full, empty = answers(10), Answers(2, None, 10, False, [(1, 0.1)])
    assert criterion(judged([full] * 99), "empty results").verdict is PASS
    assert criterion(judged([full] * 99 + [empty]), "empty results").verdict is INVESTIGATE
    # Nothing on both sides is as it should be, and says nothing about recall.
    both = judged([full, Answers(2, None, 10, True, [])])
    assert criterion(both, "empty results").verdict is PASS
    assert both.recalls == (1.0, None)


def test_results_where_the_source_has_none() -> None:
    surplus = Answers(2, None, 10, True, [], found=[(1, 0.1)])
    assert criterion(judged([answers(10), surplus]), "surplus results").verdict is INVESTIGATE


@pytest.mark.parametrize(
    ("metric", "score", "plausible"),
    [
        (Metric.COSINE, 1.0, True),
        (Metric.COSINE, -1.0005, True),
        (Metric.COSINE, 1.01, False),
        (Metric.COSINE, -1.01, False),
        (Metric.EUCLID, 0.0, True),
        (Metric.EUCLID, -0.1, False),
        (Metric.MANHATTAN, 1e9, True),
        (Metric.MANHATTAN, -0.1, False),
        (Metric.DOT, -1e9, True),
        (Metric.DOT, math.nan, False),
        (Metric.EUCLID, math.inf, False),
    ],
)
def test_plausible_scores(metric: Metric, score: float, plausible: bool) -> None:
    assert m.is_plausible(metric, score) is plausible
    tiers = judge([answers(10)], metric, [0.5, score])
    assert (criterion(tiers, "score range").verdict is PASS) is plausible


@pytest.mark.parametrize(
    ("off", "coarse", "verdict"),
    [
        (0.0099, False, PASS),
        (0.011, False, INVESTIGATE),
        (0.011, True, PASS),
        (0.11, True, INVESTIGATE),
    ],
)
def test_scores_of_common_results(off: float, coarse: bool, verdict: Verdict) -> None:
    reference = [(number, 0.05 * number) for number in range(1, 11)]
    moved = [(id_, distance + off) for id_, distance in reference]
    query = Answers(1, None, 10, False, reference, found=moved, exact=moved)
    tiers = judge([query], Metric.EUCLID, [1.0], coarse=coarse)
    assert criterion(tiers, "score range").verdict is verdict


# Tier 2


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.85, PASS), (0.849, INVESTIGATE), (0.70, INVESTIGATE), (0.699, FAIL), (1.0, PASS)],
)
def test_mean_recall(value: float, verdict: Verdict) -> None:
    queries = mixed(round(value * 1000), 1000 - round(value * 1000))
    found = criterion(judged(queries), "mean")
    assert found.value == pytest.approx(value)
    assert found.verdict is verdict


@pytest.mark.parametrize(
    ("hits", "of", "verdict"),
    [
        (9, 10, PASS),
        (8, 9, INVESTIGATE),
        (3, 4, INVESTIGATE),
        (7, 10, FAIL),
        (2, 3, FAIL),
    ],
)
def test_median_recall(hits: int, of: int, verdict: Verdict) -> None:
    queries = [answers(hits, of=of)] * 3 + [answers(0)] + [answers(10)]
    found = criterion(judged(queries), "median")
    assert found.value == pytest.approx(hits / of)
    assert found.verdict is verdict


@pytest.mark.parametrize(
    ("hits", "of", "verdict"),
    [(5, 10, PASS), (4, 9, INVESTIGATE), (3, 10, INVESTIGATE), (2, 7, FAIL), (0, 10, FAIL)],
)
def test_minimum_recall(hits: int, of: int, verdict: Verdict) -> None:
    found = criterion(judged([answers(10)] * 60 + [answers(hits, of=of)]), "minimum")
    assert found.value == pytest.approx(hits / of)
    assert found.verdict is verdict


@pytest.mark.parametrize(
    ("hits", "of", "verdict"),
    [(6, 10, PASS), (5, 9, INVESTIGATE), (4, 10, INVESTIGATE), (3, 8, FAIL)],
)
def test_fifth_percentile_of_recall(hits: int, of: int, verdict: Verdict) -> None:
    # Of 101 sorted values the sixth is the 5th percentile.
    queries = [answers(0)] * 5 + [answers(hits, of=of)] + [answers(10)] * 95
    found = criterion(judged(queries), "5th percentile")
    assert found.value == pytest.approx(hits / of)
    assert found.verdict is verdict


def swapped(*pairs: tuple[int, int]) -> Answers:
    """All ten found, some of them in each other's place."""
    reference = [(number, float(number)) for number in range(1, 11)]
    values = {number: float(number) for number in range(1, 11)}
    for one, other in pairs:
        values[one], values[other] = values[other], values[one]
    found = sorted(values.items(), key=lambda pair: pair[1])
    return Answers(1, None, 10, False, reference, found=found, exact=reference)


def test_rank_correlation() -> None:
    # Exchanging two of n = 10 that are d apart takes 12 d² / (n³ - n) from 1.
    near, far = swapped((1, 5)), swapped((1, 6))
    assert judged([near]).correlations[0] == pytest.approx(1 - 12 * 16 / 990)
    assert criterion(judged([near]), "Spearman").verdict is PASS
    assert criterion(judged([far]), "Spearman").verdict is INVESTIGATE
    # Not a failure, whatever it is; the guide wants more than 0.8.
    assert criterion(judged([answers(10, reverse=True)]), "Spearman").verdict is INVESTIGATE
    assert m.SPEARMAN.judge(0.8) is INVESTIGATE
    assert m.SPEARMAN.judge(0.8001) is PASS


def test_two_common_results_have_no_correlation() -> None:
    assert judged([answers(2)]).correlations == (None,)
    assert judged([answers(3)]).correlations[0] == pytest.approx(1.0)
    assert criterion(judged([answers(2)]), "Spearman").value is None
    # One query without does not spoil the others.
    assert criterion(judged([answers(2), answers(10)]), "Spearman").value == pytest.approx(1)


def test_ranks_of_equal_values_are_shared() -> None:
    assert m.average_ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert m.average_ranks([1.0, 1.0 + 1e-8, 2.0]) == [1.5, 1.5, 3.0]
    assert m.average_ranks([]) == []
    # By hand: ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4 give 4.5 / sqrt(4.5 * 5).
    pairs = [(1.0, 10.0), (2.0, 30.0), (2.0, 20.0), (3.0, 40.0)]
    assert m.spearman(pairs) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert m.spearman([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]) is None


# Tier 3


def labelled(
    ours: Sequence[int], theirs: Sequence[int], grades: Mapping[PointId, float]
) -> Answers:
    return Answers(
        1,
        None,
        10,
        False,
        [(id_, float(place)) for place, id_ in enumerate(theirs)],
        found=[(id_, float(place)) for place, id_ in enumerate(ours)],
        exact=[],
        grades=grades,
    )


def test_ndcg_by_hand() -> None:
    grades: dict[PointId, float] = {1: 3.0, 2: 2.0, 3: 1.0}
    many: dict[PointId, float] = dict.fromkeys(range(20), 1.0)
    assert m.ndcg([1, 2, 3], grades) == pytest.approx(1)
    best = 7 + 3 / math.log2(3) + 1 / 2
    assert m.ndcg([9, 3, 1], grades) == pytest.approx((1 / math.log2(3) + 7 / 2) / best)
    assert m.ndcg([8, 9], grades) == 0
    assert m.ndcg([1], {1: 0.0}) == 0
    # What comes after the tenth does not count, and more relevant rows than ten do not either.
    assert m.ndcg([*range(50, 60), 1], {1: 1.0}) == 0
    assert m.ndcg(list(range(10)), many) == pytest.approx(1)


def test_reciprocal_rank() -> None:
    assert m.reciprocal_rank([7, 5, 1], {1: 1.0, 5: 0.0}) == pytest.approx(1 / 3)
    assert m.reciprocal_rank([7], {1: 1.0}) == 0


@pytest.mark.parametrize(
    ("threshold", "value", "verdict", "level"),
    [
        (m.NDCG, 0.70, PASS, "good"),
        (m.NDCG, 0.6999, INVESTIGATE, "acceptable"),
        (m.NDCG, 0.50, INVESTIGATE, "acceptable"),
        (m.NDCG, 0.4999, FAIL, "poor"),
        (m.MRR, 0.60, PASS, "good"),
        (m.MRR, 0.5999, INVESTIGATE, "acceptable"),
        (m.MRR, 0.40, INVESTIGATE, "acceptable"),
        (m.MRR, 0.3999, FAIL, "poor"),
    ],
)
def test_levels_of_relevance(
    threshold: Threshold, value: float, verdict: Verdict, level: str
) -> None:
    assert threshold.judge(value) is verdict
    assert m.LEVELS[verdict] == level


@pytest.mark.parametrize(
    ("rank", "of", "verdict"),
    # Reciprocal ranks of 1 and 1/2 mixed to means on each side.
    [(60, 100, PASS), (59, 100, INVESTIGATE), (40, 100, INVESTIGATE), (39, 100, FAIL)],
)
def test_mrr_where_the_source_does_better(rank: int, of: int, verdict: Verdict) -> None:
    good = labelled([1], [1], {1: 1.0})
    bad = labelled([9], [1], {1: 1.0})
    tiers = judged([good] * rank + [bad] * (of - rank))
    for name in ("MRR", "NDCG@10"):
        found = criterion(tiers, name)
        assert found.value == pytest.approx(rank / of)
        assert found.source == pytest.approx(1)
    assert criterion(tiers, "MRR").verdict is verdict


@pytest.mark.parametrize(
    ("good", "verdict"), [(70, PASS), (69, INVESTIGATE), (50, INVESTIGATE), (49, FAIL)]
)
def test_ndcg_where_the_source_does_better(good: int, verdict: Verdict) -> None:
    queries = [labelled([1], [1], {1: 1.0})] * good
    queries += [labelled([9], [1], {1: 1.0})] * (100 - good)
    found = criterion(judged(queries), "NDCG@10")
    assert found.value == pytest.approx(good / 100)
    assert found.verdict is verdict


def test_relevance_that_is_no_better_in_the_source() -> None:
    found = criterion(judged([labelled([9], [8], {1: 1.0})]), "MRR")
    assert found.verdict is PASS
    assert found.note == "poor, and no better in the source"


def test_without_labels_there_is_no_third_tier() -> None:
    assert {one.tier for one in judged([answers(10)]).criteria} == {1, 2}


# Recall and ties


def test_rows_as_near_as_the_last_count_as_found() -> None:
    reference = [(number, float(min(number, 10))) for number in range(1, 11)]
    tie, near, far = (77, 10.0), (78, 10.0 + 1e-6), (79, 10.1)
    for extra, expected in ((tie, 1.0), (near, 1.0), (far, 0.9)):
        query = Answers(
            1, None, 10, False, reference, ties=[extra], found=[*reference[:9], (extra[0], 10.0)]
        )
        assert m.recall(query, query.found) == pytest.approx(expected)


def test_ties_do_not_make_up_for_nearer_rows_that_are_missing() -> None:
    reference = [(1, 1.0), (2, 2.0), (3, 2.0)]
    query = Answers(1, None, 3, False, reference, ties=[(4, 2.0)], found=[(2, 2.0), (9, 1.0)])
    assert m.recall(query, query.found) == pytest.approx(1 / 3)


def test_the_first_may_be_any_of_those_that_are_equally_near() -> None:
    reference = [(1, 1.0), (2, 1.0), (3, 2.0)]
    for first, expected in ((2, True), (3, False)):
        query = Answers(1, None, 3, False, reference, found=[(first, 1.0)])
        assert m.top_1_matches(query) is expected


def test_fewer_rows_than_asked_for() -> None:
    query = Answers(1, None, 10, False, [(1, 0.1), (2, 0.2)], found=[(2, 0.2), (1, 0.1)])
    assert m.recall(query, query.found) == 1
    # A surplus row in front takes the place of one that should be there.
    query = Answers(1, None, 10, False, [(1, 0.1), (2, 0.2)], found=[(9, 0.0), (1, 0.1), (2, 0.2)])
    assert m.recall(query, query.found) == 0.5


def test_only_ten_of_more_results_are_compared() -> None:
    reference = [(number, float(number)) for number in range(1, 31)]
    found = [*reference[:10], *((900 + number, 9.0) for number in range(20))]
    assert m.recall(Answers(1, None, 30, False, reference, found=found), found) == 1
    assert m.recall(Answers(1, None, 30, False, reference, found=found), found, 30) == 1 / 3


# Scores


@pytest.mark.parametrize(
    ("metric", "score", "distance"),
    [
        (Metric.COSINE, 0.75, 0.25),
        (Metric.COSINE, -1.0, 2.0),
        (Metric.DOT, 3.5, -3.5),
        (Metric.EUCLID, 1.25, 1.25),
        (Metric.MANHATTAN, 7.0, 7.0),
    ],
)
def test_scores_as_distances_of_pgvector(metric: Metric, score: float, distance: float) -> None:
    assert m.as_distance(metric, score) == distance


def test_statistics() -> None:
    found = m.statistics([0.0, 0.5, 1.0, 1.0])
    assert (found.count, found.mean, found.median, found.minimum) == (4, 0.625, 0.75, 0.0)
    assert found.p5 == pytest.approx(0.075)
    assert found.std == pytest.approx(math.sqrt(0.171875))
    with pytest.raises(ValueError, match="no values"):
        m.statistics([])


def test_the_whole_is_as_bad_as_its_worst_part() -> None:
    assert m.worst([]) is PASS
    assert m.worst([PASS, FAIL, INVESTIGATE]) is FAIL
    assert judged([answers(10)] * 50).verdict is PASS
    assert judged([]).verdict is PASS


def test_the_thresholds_of_the_document() -> None:
    text = (Path(__file__).parents[2] / "docs" / "search-quality.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    cells = {row[0]: row[1:] for row in rows if len(row) == 4}
    for name, threshold in {
        "top-1 match": m.TOP_1_MATCH,
        "top-10 overlap": m.TOP_10_OVERLAP,
        "recall@10: mean": m.MEAN_RECALL,
        "median": m.MEDIAN_RECALL,
        "minimum": m.MINIMUM_RECALL,
        "5th percentile": m.P5_RECALL,
        "NDCG@10 of labelled queries": m.NDCG,
        "MRR of labelled queries": m.MRR,
    }.items():
        assert cells[name][0].startswith(f">= {threshold.passes:.2f}")
        if threshold.investigates is not None:
            assert cells[name][2].startswith(f"< {threshold.investigates:.2f}")
            between = f"{threshold.investigates:.2f} - {threshold.passes:.2f}"
            assert cells[name][1].startswith(between)
