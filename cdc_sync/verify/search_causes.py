"""Why search results differ: the decision tree of Qdrant's guide, from the most basic cause on, and
what has to be known to read the figures rightly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from cdc_sync.mapping.plan import Metric, VectorKind, VectorPlan
from cdc_sync.qdrant.search import SearchFacts
from cdc_sync.rows import PointId
from cdc_sync.verify import quality as m
from cdc_sync.verify.baseline_file import TableEntry, VectorEntry
from cdc_sync.verify.quality import Verdict
from cdc_sync.verify.quality_tiers import Tiers

#: How far lengths of unit vectors may be from 1.
_UNIT: Final = 1e-3
#: Exact search over the same vectors finds nearly all; below this the vectors are not the same.
_SAME_VECTORS: Final = 0.95
#: Below this results have next to nothing in common.
_ENTIRELY_DIFFERENT: Final = 0.30
_ENOUGH_QUERIES: Final = 50
#: What the index may find less than exact search without being the cause.
_NEGLIGIBLE: Final = 0.01


@dataclass(frozen=True, slots=True)
class Cause:
    """A likely cause: what is wrong, how it shows, and what to do."""

    name: str
    reason: str
    remedy: str


@dataclass(slots=True)
class Findings:
    """What is known about a column besides the answers.

    ``rows`` are those of the table now. Of the ``asked_ids`` rows that the source found,
    ``missing`` have no point, and ``gone`` have none because they are no rows any more. ``norms``:
    shortest, longest and mean length of vectors in Qdrant; of ``lengths_compared`` rows the vector
    has another length there in ``lengths_differ``.
    """

    entry: VectorEntry
    table: TableEntry
    settings: Mapping[str, str]
    vector: VectorPlan
    facts: SearchFacts
    rows: int
    against: str
    asked_ids: int = 0
    missing: frozenset[PointId] = frozenset()
    gone: frozenset[PointId] = frozenset()
    norms: tuple[float, float, float] | None = None
    lengths_compared: int = 0
    lengths_differ: int = 0
    filtered_recall: float | None = None
    plain_recall: float | None = None

    @property
    def found_metric(self) -> str | None:
        """The collection's metric by Qdrant's name, None without such a vector."""
        found = self.facts.vectors.get(self.vector.name)
        return None if found is None else found.metric

    @property
    def metric(self) -> Metric | None:
        """The collection's metric, where it is one that a plan can have."""
        name = (self.found_metric or "").removesuffix(" with IDF")
        return Metric(name) if name in {one.value for one in Metric} else None

    @property
    def unsearchable(self) -> Cause | None:
        """Why the column's queries cannot be asked at all, if they cannot."""
        found = self.facts.vectors.get(self.vector.name)
        label = f"vector {self.vector.name!r}" if self.vector.name else "the unnamed vector"
        again = "Create the collection anew (cdc-sync migrate into another collection)."
        if found is None or self.metric is None:
            return Cause("vector", f"the collection has no {label} that can be searched", again)
        if found.kind is not self.vector.kind:
            return Cause("vector", f"{label} of the collection is {found.kind.value}", again)
        dense = self.vector.kind is VectorKind.DENSE
        if dense and found.size != self.entry.dimension:
            reason = f"{label} has {found.size} dimensions, the baseline {self.entry.dimension}"
            return Cause("dimension", reason, again)
        return None


def diagnose(findings: Findings, tiers: Tiers | None) -> tuple[list[Cause], list[str]]:
    """The likely causes, the most basic first, and sentences that the figures need."""
    caveats = list(_caveats(findings, tiers))
    if findings.unsearchable is not None or tiers is None:
        return [one for one in (findings.unsearchable,) if one is not None], caveats
    causes = list(_causes(findings, tiers))
    if tiers.verdict is not Verdict.PASS and not causes:
        causes.append(
            Cause(
                "margin",
                "results differ at the margin only; rows are the same and metrics agree",
                "Look at the worst queries in the JSON report, and at the scores. If they are "
                "good enough for your users, nothing is to be done.",
            )
        )
    return causes, caveats


def _causes(findings: Findings, tiers: Tiers) -> Iterator[Cause]:
    if findings.missing or (tiers.verdict is not Verdict.PASS and _counts_differ(findings)):
        yield _data(findings)
    if findings.found_metric != findings.entry.metric:
        yield _metric(findings)
    if tiers.verdict is Verdict.PASS:
        return
    filtered, plain = findings.filtered_recall, findings.plain_recall
    good = m.MEAN_RECALL.passes
    surplus = any(one.name == "surplus results" and one.value for one in tiers.criteria)
    if surplus or (filtered is not None and filtered < good and (plain is None or plain >= good)):
        yield Cause(
            "payload",
            "queries with a filter find other rows than in the source, those without find the same",
            "Fields are missing or have other types: cdc-sync verify names them, and has those "
            "rows written again with --repair.",
        )
        return
    yield from _vectors_or_index(findings, tiers)


def _counts_differ(findings: Findings) -> bool:
    return findings.facts.points != findings.rows


def _data(findings: Findings) -> Cause:
    reason = f"the table has {findings.rows} rows, the collection {findings.facts.points} points"
    if findings.missing:
        reason += (
            f"; {len(findings.missing)} of the {findings.asked_ids} rows that the source's results "
            "are made of have no point"
        )
    return Cause(
        "data",
        reason,
        "Rows were lost, or points are left over (failed parts, duplicate keys, partitions that "
        "were not copied): cdc-sync verify names them, and mends them with --repair.",
    )


def _metric(findings: Findings) -> Cause:
    source, found = findings.entry.metric, findings.found_metric
    reason = f"the source compares by {source}, the collection by {found}"
    if findings.vector.kind is VectorKind.SPARSE:
        return Cause(
            "metric",
            f"{reason}: sparse vectors of Qdrant have no other metric",
            "Normalise the vectors if the source compares by angle, or take a baseline by the inner"
            " product.",
        )
    if {source, found} <= {"Cosine", "Dot"} and _is_unit(findings):
        return Cause(
            "metric",
            f"{reason}; the vectors have unit length, so both rank alike, but scores differ",
            "Nothing has to be done for the ranking; create the collection anew for the scores.",
        )
    return Cause(
        "metric",
        reason,
        "Create the collection anew with the right metric (metrics in the table's configuration, or"
        " --qdrant.distance-metric); a metric cannot be changed.",
    )


def _vectors_or_index(findings: Findings, tiers: Tiers) -> Iterator[Cause]:
    if tiers.recall is None or tiers.exact_recall is None:
        return
    if findings.found_metric != findings.entry.metric and not _is_unit(findings):
        return
    exact = tiers.exact_recall.mean
    if findings.against == "exact" and exact < _SAME_VECTORS:
        entirely = exact < _ENTIRELY_DIFFERENT
        yield Cause(
            "vectors",
            f"exact search in Qdrant finds {exact:.2f} of the source's exact results"
            + (", so they are entirely different" if entirely else "")
            + ": the vectors, or the rows, are not the same",
            "Were rows written since the baseline? Then take a new one. Else compare the vectors "
            "with cdc-sync verify: normalised before the copy, of another model, or swapped.",
        )
        return
    if tiers.recall.mean >= exact - _NEGLIGIBLE:
        if findings.against == "index" and exact < m.MEAN_RECALL.passes:
            yield Cause(
                "baseline",
                "the results of pgvector's index, with which Qdrant's are compared, are "
                f"approximate; exact search in Qdrant finds {exact:.2f} of them",
                "Compare with pgvector's exact results: --against exact.",
            )
        return
    hnsw = findings.facts.hnsw.get(findings.vector.name, {})
    quantized = findings.facts.quantization.get(findings.vector.name)
    settings = ", ".join(f"{name} = {hnsw[name]}" for name in ("m", "ef_construct") if name in hnsw)
    more = "Raise hnsw_config.m and ef_construct, or hnsw_ef of the searches, and wait for green"
    if quantized:
        more += "; search with rescore and oversampling, or with less quantization"
    yield Cause(
        "index",
        f"exact search in Qdrant finds {exact:.2f} of the source's results, the index "
        f"{tiers.recall.mean:.2f}" + (f" ({settings})" if settings else ""),
        f"{more}.",
    )


def _is_unit(findings: Findings) -> bool:
    norms = findings.entry.norms
    return norms is not None and abs(norms.minimum - 1) < _UNIT and abs(norms.maximum - 1) < _UNIT


# -- caveats


def _caveats(findings: Findings, tiers: Tiers | None) -> Iterator[str]:
    yield from _index_caveats(findings)
    yield from _source_caveats(findings, tiers)
    yield from _norm_caveats(findings)
    if findings.rows != findings.table.rows:
        yield (
            f"the table has {findings.rows} rows now and had {findings.table.rows} when the "
            "baseline was taken: its results may be out of date"
        )
    if findings.gone:
        yield (
            f"{len(findings.gone)} rows of the baseline's results were deleted since, and are left "
            "out of them"
        )
    if tiers is not None and len(tiers.recalls) < _ENOUGH_QUERIES:
        yield (
            f"{len(tiers.recalls)} queries are few for statistics; {_ENOUGH_QUERIES} or more are "
            "wanted"
        )


def _index_caveats(findings: Findings) -> Iterator[str]:
    facts, name = findings.facts, findings.vector.name
    if findings.vector.kind is VectorKind.SPARSE:
        yield "sparse vectors are searched exactly: there is no HNSW index"
        return
    hnsw = facts.hnsw.get(name, {})
    if hnsw.get("m") == 0:
        yield "HNSW is switched off (m = 0): every search is exact, and its recall says nothing"
    else:
        # Sparse vectors are always indexed; dense ones may be NULL.
        kinds = [found.kind for found in facts.vectors.values()]
        sparse = kinds.count(VectorKind.SPARSE)
        indexed = max(0, facts.indexed_vectors - sparse * facts.all_points)
        most = facts.all_points * (len(kinds) - sparse)
        if indexed < most:
            yield (
                f"HNSW {'is being built' if facts.status == 'yellow' else 'is not complete'} "
                f"({indexed} of up to {most} dense vectors indexed; small collections get no "
                "index): what is not indexed is searched exactly, so recall may be higher than it "
                "will be"
            )
    quantization = facts.quantization.get(name)
    if quantization:
        kind = next(iter(quantization))
        cost = {"scalar": "about 1-2 %", "product": "about 2-5 %"}.get(kind, "something")
        yield f"the collection is quantized ({kind}): scores move, and recall loses {cost}"
    found = facts.vectors.get(name)
    if found is not None and found.datatype not in ("float32", findings.vector.datatype.value):
        yield f"the collection stores components as {found.datatype}"


def _source_caveats(findings: Findings, tiers: Tiers | None) -> Iterator[str]:
    entry = findings.entry
    if entry.quantization is not None:
        yield f"pgvector has less precision too: {entry.quantization}"
    methods = {index.method for index in entry.indexes if index.valid}
    if not methods:
        yield "the source has no index on the column: its users saw exact results"
    for index in entry.indexes:
        if index.method == "ivfflat" and index.valid:
            probes = findings.settings.get("ivfflat.probes", "1")
            yield (
                f"the source's index {index.name} is IVFFlat (lists = "
                f"{index.options.get('lists')}, probes = {probes}), which finds less than HNSW: "
                "where Qdrant differs from it, that is mostly for the better"
            )
    if findings.against == "index" and methods:
        yield "results are compared with those of pgvector's index, which are approximate"
    elif tiers is not None and tiers.index_recall is not None:
        yield (
            f"pgvector's own index finds {tiers.index_recall.mean:.3f} of its exact results (mean "
            "recall@10)"
        )


def _norm_caveats(findings: Findings) -> Iterator[str]:
    norms = findings.entry.norms
    if norms is None:
        return
    span = f"{norms.minimum:.4g} to {norms.maximum:.4g}, mean {norms.mean:.4g}"
    if _is_unit(findings):
        yield f"the vectors have unit length ({span}): Cosine and Dot rank alike"
    else:
        yield f"the vectors are not of unit length ({span})"
    # Under Cosine Qdrant normalises them itself.
    if findings.norms is not None and findings.found_metric != "Cosine":
        shortest, longest, mean = findings.norms
        yield (
            f"in Qdrant those of the results have lengths of {shortest:.4g} to {longest:.4g}, mean "
            f"{mean:.4g}"
        )
        if findings.lengths_differ:
            yield (
                f"{findings.lengths_differ} of {findings.lengths_compared} vectors have another "
                "length in Qdrant than in the baseline"
                + (", as if they had been normalised on the way" if abs(mean - 1) < _UNIT else "")
            )
