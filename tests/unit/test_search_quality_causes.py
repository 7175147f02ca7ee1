"""Likely causes and caveats of search quality: each by findings that show it, and by none else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from cdc_sync.mapping.plan import Metric, VectorKind, VectorPlan
from cdc_sync.qdrant.collections import FoundVector
from cdc_sync.qdrant.search import SearchFacts, settings_in_effect
from cdc_sync.verify.baseline_file import IndexEntry, Norms, TableEntry, VectorEntry
from cdc_sync.verify.quality import Answers
from cdc_sync.verify.quality_tiers import Tiers, judge
from cdc_sync.verify.search_causes import Findings, diagnose

HNSW = IndexEntry(
    name="docs_hnsw",
    method="hnsw",
    operator_class="vector_l2_ops",
    options={"m": 16},
    holds="whole",
)
IVFFLAT = IndexEntry(
    name="docs_ivf",
    method="ivfflat",
    operator_class="vector_l2_ops",
    options={"lists": 100},
    holds="whole",
)


def entry(**more: object) -> VectorEntry:
    return VectorEntry.model_validate(
        {
            "column": "v",
            "vector": "v",
            "type": "public.vector",
            "kind": "dense",
            "datatype": "float32",
            "dimension": 8,
            "metric": "Euclid",
            "metric_from": "the default",
            "indexes": [HNSW],
            "norms": Norms(rows=9, minimum=0.5, maximum=2, mean=1),
            **more,
        }
    )


def facts(found: FoundVector | None = None, **more: object) -> SearchFacts:
    vector = found or FoundVector(VectorKind.DENSE, 8, "Euclid", "float32")
    base = SearchFacts(
        points=1000,
        all_points=1000,
        indexed_vectors=1000,
        status="green",
        vectors={"v": vector},
        hnsw={"v": {"m": 16, "ef_construct": 100}},
    )
    return replace(base, **more)  # type: ignore[arg-type]


def findings(**more: object) -> Findings:
    table = TableEntry(
        table="public.docs",
        collection="docs",
        key=["id"],
        rows=1000,
        partitions=[],
        columns=[],
        vectors=[],
        sampled_rows=0,
        payload=[],
    )
    given: dict[str, object] = {
        "entry": entry(),
        "table": table,
        "settings": {"ivfflat.probes": "3"},
        "vector": VectorPlan("v", VectorKind.DENSE, 8, Metric.EUCLID),
        "facts": facts(),
        "rows": 1000,
        "against": "exact",
        **more,
    }
    return Findings(**given)  # type: ignore[arg-type]


def tiers(hits: int, exact: int, *, queries: int = 50) -> Tiers:
    reference = [(number, float(number)) for number in range(10)]

    def found(count: int) -> list[tuple[int | str, float]]:
        return [*reference[:count], *((100 + n, 9.0) for n in range(10 - count))]

    one = Answers(1, None, 10, False, reference, found=found(hits), exact=found(exact))
    return judge([one] * queries, Metric.EUCLID, [1.0])


def causes(given: Findings, judged: Tiers | None) -> list[str]:
    return [cause.name for cause in diagnose(given, judged)[0]]


def caveats(given: Findings, judged: Tiers | None = None) -> str:
    return "\n".join(diagnose(given, judged or tiers(10, 10))[1])


@pytest.mark.parametrize(
    ("given", "hits", "exact", "expected"),
    [
        ({}, 10, 10, []),
        ({}, 8, 10, ["index"]),
        ({}, 6, 10, ["index"]),
        ({}, 6, 6, ["vectors"]),
        ({}, 2, 2, ["vectors"]),
        ({"rows": 1001}, 10, 10, []),
        ({"rows": 1001}, 6, 6, ["data", "vectors"]),
        ({"missing": frozenset({1})}, 10, 10, ["data"]),
        ({"entry": entry(metric="Cosine")}, 6, 6, ["metric"]),
        ({"entry": entry(metric="Cosine")}, 10, 10, ["metric"]),
        ({"filtered_recall": 0.5, "plain_recall": 1.0}, 8, 8, ["payload"]),
        ({"filtered_recall": 0.5, "plain_recall": 0.5}, 5, 5, ["vectors"]),
        ({"filtered_recall": 0.9, "plain_recall": 0.7}, 8, 10, ["index"]),
        ({"against": "index"}, 6, 6, ["baseline"]),
        ({"against": "index"}, 5, 9, ["index"]),
    ],
)
def test_the_decision_tree(
    given: Mapping[str, object], hits: int, exact: int, expected: list[str]
) -> None:
    assert causes(findings(**given), tiers(hits, exact)) == expected


def test_what_differs_at_the_margin() -> None:
    # One query of fifty finds nothing, by the index and exactly: no cause is plain.
    reference = [(number, float(number)) for number in range(10)]
    good = Answers(1, None, 10, False, reference, found=reference, exact=reference)
    bad = Answers(2, None, 10, False, reference, found=[(99, 1.0)], exact=[(99, 1.0)])
    judged = judge([good] * 49 + [bad], Metric.EUCLID, [1.0])
    assert causes(findings(), judged) == ["margin"]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (FoundVector(VectorKind.DENSE, 9, "Euclid", "float32"), "dimension"),
        (FoundVector(VectorKind.MULTI, 8, "Euclid", "float32"), "vector"),
        (FoundVector(VectorKind.SPARSE, None, "Dot", "float32"), "vector"),
        (FoundVector(VectorKind.DENSE, 8, "Something", "float32"), "vector"),
    ],
)
def test_what_cannot_be_searched(found: FoundVector, expected: str) -> None:
    given = findings(facts=facts(found))
    assert given.unsearchable is not None
    assert causes(given, None) == [expected]
    assert causes(findings(facts=facts(vectors={})), None) == ["vector"]


def test_unit_vectors_rank_alike_by_cosine_and_dot() -> None:
    unit = Norms(rows=9, minimum=0.9995, maximum=1.0005, mean=1)
    dot = facts(FoundVector(VectorKind.DENSE, 8, "Dot", "float32"))
    given = findings(entry=entry(metric="Cosine", norms=unit), facts=dot)
    (cause,) = diagnose(given, tiers(10, 10))[0]
    assert "rank alike" in cause.reason
    assert "unit length (0.9995 to 1" in caveats(given)
    given = findings(entry=entry(metric="Cosine"), facts=dot)
    (cause,) = diagnose(given, tiers(10, 10))[0]
    assert "cannot be changed" in cause.remedy


def test_the_parameters_of_the_index_are_named() -> None:
    (cause,) = diagnose(findings(), tiers(5, 10))[0]
    assert "m = 16, ef_construct = 100" in cause.reason
    quantized = findings(facts=facts(quantization={"v": {"scalar": {"type": "int8"}}}))
    (cause,) = diagnose(quantized, tiers(5, 10))[0]
    assert "rescore" in cause.remedy
    assert "quantized (scalar)" in caveats(quantized)
    assert "1-2 %" in caveats(quantized)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"indexed_vectors": 999, "status": "yellow"}, "HNSW is being built (999 of up to 1000"),
        ({"indexed_vectors": 0}, "HNSW is not complete (0 of up to 1000"),
        ({"hnsw": {"v": {"m": 0}}}, "HNSW is switched off"),
        ({"quantization": {"v": {"product": {}}}}, "2-5 %"),
        (
            {"vectors": {"v": FoundVector(VectorKind.DENSE, 8, "Euclid", "float16")}},
            "stores components as float16",
        ),
    ],
)
def test_caveats_of_the_collection(more: Mapping[str, object], expected: str) -> None:
    assert expected in caveats(findings(facts=facts(None, **more)))
    assert expected.partition("(")[0] not in caveats(findings())


def test_sparse_vectors_do_not_count_for_the_dense() -> None:
    both = {
        "v": FoundVector(VectorKind.DENSE, 8, "Euclid", "float32"),
        "s": FoundVector(VectorKind.SPARSE, None, "Dot", "float32"),
    }
    given = findings(facts=facts(vectors=both, indexed_vectors=1000))
    assert "HNSW is not complete (0 of up to 1000" in caveats(given)
    assert "HNSW" not in caveats(findings(facts=facts(vectors=both, indexed_vectors=2000)))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"indexes": [IVFFLAT]}, "IVFFlat (lists = 100, probes = 3)"),
        ({"indexes": []}, "no index on the column"),
        ({"quantization": "the column has half precision"}, "less precision too"),
    ],
)
def test_caveats_of_the_source(more: Mapping[str, object], expected: str) -> None:
    assert expected in caveats(findings(entry=entry(**more)))
    assert expected not in caveats(findings())


def test_caveats_of_time_and_number() -> None:
    assert "1002 rows now and had 1000" in caveats(findings(rows=1002))
    assert "2 rows of the baseline's results were deleted" in caveats(
        findings(gone=frozenset({1, 2}))
    )
    assert "49 queries are few" in caveats(findings(), tiers(10, 10, queries=49))
    assert "are few" not in caveats(findings(), tiers(10, 10, queries=50))


def test_lengths_in_qdrant() -> None:
    given = findings(norms=(1.0, 1.0, 1.0), lengths_compared=50, lengths_differ=48)
    assert "48 of 50 vectors have another length" in caveats(given)
    assert "normalised on the way" in caveats(given)
    # Under Cosine that is what Qdrant does itself.
    cosine = facts(FoundVector(VectorKind.DENSE, 8, "Cosine", "float32"))
    given.facts = cosine
    assert "another length" not in caveats(given)


def test_settings_of_vectors_and_of_the_collection() -> None:
    found = {
        "hnsw_config": {"m": 16, "ef_construct": 100},
        "vectors": {"a": {"hnsw_config": {"m": 32, "ef_construct": None}}, "b": {}},
    }
    assert settings_in_effect(found, "hnsw_config", ["a", "b", "c"]) == {
        "a": {"m": 32, "ef_construct": 100},
        "b": {"m": 16, "ef_construct": 100},
        "c": {"m": 16, "ef_construct": 100},
    }
    assert settings_in_effect(found, "quantization_config", ["a"]) == {"a": {}}
