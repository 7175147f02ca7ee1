"""The report of ``verify search``: its content, as JSON, and as plain text of 80 columns."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from cdc_sync.verify import quality as m
from cdc_sync.verify.quality import Answers, Statistics, Verdict
from cdc_sync.verify.quality_tiers import Criterion, Tiers
from cdc_sync.verify.search_causes import Cause

VERSION: Final = 1
_WIDTH: Final = 80
_TIERS: Final = {1: "spot check", 2: "recall@10 over all queries", 3: "labelled relevance"}
#: Of what is shown of single queries in the text.
_WORST: Final = 3


@dataclass(frozen=True, slots=True)
class QueryReport:
    """One query: nothing of the rows it finds, and nothing of its vector."""

    number: int
    label: str | None
    filtered: bool
    results: int
    source_results: int
    top_1: bool | None
    recall: float | None
    exact_recall: float | None
    spearman: float | None

    @classmethod
    def of(cls, answers: Answers, recall: float | None, spearman: float | None) -> QueryReport:
        """What is told of a query."""
        return cls(
            number=answers.number,
            label=answers.label,
            filtered=answers.filtered,
            results=len(answers.found),
            source_results=len(answers.reference),
            top_1=m.top_1_matches(answers),
            recall=recall,
            exact_recall=m.recall(answers, answers.exact),
            spearman=spearman,
        )


@dataclass(frozen=True, slots=True)
class ColumnReport:
    """One vector column. ``tiers`` is None where its queries could not be asked."""

    table: str
    column: str
    collection: str
    vector: str
    source_metric: str
    metric: str | None
    rows_before: int
    rows: int
    points: int
    tiers: Tiers | None
    unsearchable: bool
    causes: tuple[Cause, ...]
    caveats: tuple[str, ...]
    queries: tuple[QueryReport, ...]

    @property
    def name(self) -> str:
        """``schema.table.column``, for people."""
        return f"{self.table}.{self.column}"

    @property
    def verdict(self) -> Verdict:
        """The worst of all criteria; a likely cause is to be investigated in any case."""
        if self.unsearchable or self.tiers is None:
            return Verdict.FAIL
        return m.worst([self.tiers.verdict, *(Verdict.INVESTIGATE for _ in self.causes)])


@dataclass(frozen=True, slots=True)
class SearchReport:
    """All columns of a baseline. ``against``: what Qdrant's results are compared with."""

    baseline_taken: str
    against: Literal["exact", "index"]
    qdrant: str
    columns: tuple[ColumnReport, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of all columns."""
        return m.worst([column.verdict for column in self.columns])


# -- JSON


def as_json(report: SearchReport) -> dict[str, object]:
    """The report as JSON has it. ``version`` changes when what is there already does."""
    return {
        "version": VERSION,
        "verdict": report.verdict.value,
        "baseline_taken": report.baseline_taken,
        "against": report.against,
        "qdrant_version": report.qdrant,
        "columns": [_column_json(column) for column in report.columns],
    }


def _column_json(column: ColumnReport) -> dict[str, object]:
    tiers = column.tiers
    return {
        "table": column.table,
        "column": column.column,
        "collection": column.collection,
        "vector": column.vector,
        "verdict": column.verdict.value,
        "metric": {"source": column.source_metric, "qdrant": column.metric},
        "rows": {"baseline": column.rows_before, "now": column.rows},
        "points": column.points,
        "criteria": [_criterion_json(one) for one in tiers.criteria] if tiers is not None else [],
        "recall": None if tiers is None else _statistics_json(tiers.recall),
        "recall_of_exact_search": None if tiers is None else _statistics_json(tiers.exact_recall),
        "recall_of_source_index": None if tiers is None else _statistics_json(tiers.index_recall),
        "labelled_queries": 0 if tiers is None else tiers.labelled,
        "causes": [dataclasses.asdict(cause) for cause in column.causes],
        "caveats": list(column.caveats),
        "queries": [dataclasses.asdict(query) for query in column.queries],
    }


def _criterion_json(one: Criterion) -> dict[str, object]:
    return {**dataclasses.asdict(one), "verdict": one.verdict.value}


def _statistics_json(found: Statistics | None) -> dict[str, object] | None:
    return None if found is None else dataclasses.asdict(found)


# -- text


def as_text(report: SearchReport) -> str:
    """The report for people, at most 80 characters wide."""
    lines = [
        f"baseline of {report.baseline_taken}, compared with its {report.against} results",
        f"Qdrant {report.qdrant}",
    ]
    for column in report.columns:
        lines += ["", *_column(column)]
    lines += ["", f"verdict: {report.verdict.value}"]
    return "\n".join(lines)


def _column(column: ColumnReport) -> Iterator[str]:
    vector = f"vector {column.vector}" if column.vector else "the unnamed vector"
    yield from _wrapped(f"{column.name} -> {column.collection}, {vector}", "")
    metric = column.source_metric
    if column.metric != metric:
        metric = f"{metric} in the source, {column.metric or 'none'} in Qdrant"
    yield from _wrapped(
        f"{len(column.queries)} queries, {metric}, {column.rows:,} rows, {column.points:,} points",
        "  ",
    )
    if column.tiers is not None:
        yield from _tiers(column.tiers)
        yield from _worst(column)
    for caveat in column.caveats:
        yield from _wrapped(caveat, "  note   ")
    for cause in column.causes:
        yield from _wrapped(f"{cause.name}: {cause.reason}", "  cause  ")
        yield from _wrapped(cause.remedy, "  try    ")


def _tiers(tiers: Tiers) -> Iterator[str]:
    tier = 0
    for one in tiers.criteria:
        if one.tier != tier:
            tier = one.tier
            yield f"  tier {tier}: {_TIERS[tier]}"
        value = "-" if one.value is None else _number(one)
        yield f"    {one.name:<16} {value:>8}  {_wanted(one):<30} {one.verdict.value}"
        if one.note:
            yield from _wrapped(one.note, " " * 31)
    if tiers.exact_recall is not None:
        yield f"    {'exact search':<16} {tiers.exact_recall.mean:>8.3f}  mean, in Qdrant"
    if tiers.index_recall is not None:
        yield f"    {'source index':<16} {tiers.index_recall.mean:>8.3f}  mean, in pgvector"
    if tiers.recall is not None:
        yield f"    {'deviation':<16} {tiers.recall.std:>8.3f}  standard deviation of recall@10"


def _number(one: Criterion) -> str:
    assert one.value is not None
    return f"{one.value:.0f}" if one.wanted == "none" else f"{one.value:.3f}"


def _wanted(one: Criterion) -> str:
    if one.source is not None:
        return f"pgvector {one.source:.3f}"
    return one.wanted


def _worst(column: ColumnReport) -> Iterator[str]:
    known = [(query.recall, query) for query in column.queries if query.recall is not None]
    below = sorted(
        ((recall, query) for recall, query in known if recall < m.MINIMUM_RECALL.passes),
        key=lambda pair: (pair[0], pair[1].number),
    )
    if below:
        shown = ", ".join(f"{query.number} ({recall:.1f})" for recall, query in below[:_WORST])
        yield from _wrapped(f"{len(below)} queries below 0.5; the worst: {shown}", "    ")


def _wrapped(text: str, first: str) -> Iterator[str]:
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * max(len(first), 2),
        break_on_hyphens=False,
    )
