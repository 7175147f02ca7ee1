"""``verify search``: the queries of a baseline asked again in Qdrant, and what the answers say.

Reads only, on both sides. Every query is asked twice: as the collection is configured, and by exact
search, which tells wrong data from an index that finds too little.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError, MappingError
from cdc_sync.mapping.comparison import StoredArray
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.plan import Datatype, Metric, VectorPlan
from cdc_sync.mapping.vectors import SparseValue
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.counting import count_rows
from cdc_sync.postgres.refetch import fetch_rows
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.search import Searcher, SearchFacts
from cdc_sync.qdrant.sink import Sink, StoredVector
from cdc_sync.rows import PointId
from cdc_sync.sync.planning import PipelinePlan, plan_pipeline
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.verify.baseline_columns import key_row, point_ids, vector_length
from cdc_sync.verify.baseline_file import (
    Baseline,
    Hit,
    Query,
    SparseQuery,
    TableEntry,
    VectorEntry,
)
from cdc_sync.verify.filters import TranslatedFilter, translate_filter
from cdc_sync.verify.quality import Answers, Ranked, as_distance
from cdc_sync.verify.quality_tiers import Tiers, judge
from cdc_sync.verify.search_causes import Findings, diagnose
from cdc_sync.verify.search_report import ColumnReport, QueryReport, SearchReport

#: Queries under way at once.
_PARALLEL: Final = 4
#: How far the length of a stored vector may be from the row's, as a part of it.
_LENGTH_PART: Final = 0.01
#: Ids looked up in one request.
_PAGE: Final = 500
#: How Qdrant stores the components of a type of pgvector without loss; float32 else.
_LOSSLESS: Final = {"halfvec": Datatype.FLOAT16, "bit": Datatype.UINT8, "varbit": Datatype.UINT8}

Against = Literal["exact", "index"]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """``against``: the source's exact results, or those of its index, are what is to be found."""

    against: Against = "exact"


def verify_search(
    settings: Settings,
    baseline: Baseline,
    options: SearchOptions,
    progress: Progress = lambda _: None,
) -> SearchReport:
    """Ask the baseline's queries in Qdrant and judge the answers.

    Raises :class:`ConfigError` for a baseline without queries, or of tables or columns that are not
    in the settings, and what connecting, planning and searching raise.
    """
    if not baseline.queries:
        raise ConfigError(
            "the baseline has no queries.", "Take a new one with cdc-sync baseline --sample 50."
        )
    with connect(settings.source) as connection:
        return asyncio.run(_verify(settings, baseline, options, connection, progress))


def _columns(baseline: Baseline) -> list[tuple[str, str]]:
    return list(dict.fromkeys((query.table, query.column) for query in baseline.queries))


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A vector column of the baseline, and its queries with what they are in Qdrant."""

    planned: PlannedTable
    vector: VectorPlan
    table: TableEntry
    entry: VectorEntry
    queries: tuple[tuple[Query, TranslatedFilter | None], ...]


def _prepare(baseline: Baseline, plan: PipelinePlan, key: tuple[str, str]) -> _Prepared:
    name, column = key
    for stopped in plan.stopped:
        if stopped.name == name:
            raise stopped.error
    planned = next((one for one in plan.tables if one.name == name), None)
    if planned is None:
        raise ConfigError(
            f"the baseline has queries of table {name}, which the configuration has not.",
            "Name the table in the configuration as it was when the baseline was taken.",
        )
    vectors = {c.name: c.vector for c in planned.plan.columns if c.vector is not None}
    vector = vectors.get(column)
    table = next((one for one in baseline.tables if one.table == name), None)
    entry = next((one for one in table.vectors if one.column == column), None) if table else None
    if vector is None or table is None or entry is None:
        raise ConfigError(
            f"the baseline has queries of column {column} of table {name}, which does not become a "
            "vector now, or which its inventory lacks.",
            "Take a new baseline with cdc-sync baseline.",
        )
    queries = []
    for query in baseline.queries:
        if (query.table, query.column) != key:
            continue
        translated = None
        if query.filter is not None:
            try:
                translated = translate_filter(query.filter, planned.plan)
            except ConfigError as error:
                raise ConfigError(
                    f"query {query.number} of the baseline: {error.message}", error.remedy
                ) from error
        queries.append((query, translated))
    return _Prepared(planned, vector, table, entry, tuple(queries))


async def _verify(
    settings: Settings,
    baseline: Baseline,
    options: SearchOptions,
    connection: PgConnection,
    progress: Progress,
) -> SearchReport:
    sink = await open_sink(settings.qdrant)
    try:
        state = await sink.state.load(settings.pipeline.name)
        # A publication of ours may still lack tables.
        owned = state is None or state.owns_publication
        plan = await asyncio.to_thread(
            plan_pipeline, connection, settings, owned=owned, state=state
        )
        prepared = [_prepare(baseline, plan, key) for key in _columns(baseline)]
        columns = []
        for one in prepared:
            progress(f"{one.planned.name}.{one.entry.column}")
            columns.append(await _Column(sink, connection, baseline, options, one).report())
    finally:
        await sink.close()
    return SearchReport(
        baseline_taken=baseline.created_at,
        against=options.against,
        qdrant=sink.version,
        columns=tuple(columns),
    )


class _Column:
    """Asks and judges the queries of one column."""

    def __init__(
        self,
        sink: Sink,
        connection: PgConnection,
        baseline: Baseline,
        options: SearchOptions,
        prepared: _Prepared,
    ) -> None:
        self._sink = sink
        self._connection = connection
        self._baseline = baseline
        self._options = options
        self._planned = prepared.planned
        self._vector = prepared.vector
        self._table = prepared.table
        self._entry = prepared.entry
        self._queries = prepared.queries
        self._ids = point_ids(prepared.planned.plan)

    async def report(self) -> ColumnReport:
        searcher = self._sink.searcher(self._planned.plan)
        facts = await searcher.facts()
        rows = await asyncio.to_thread(self._count)
        findings = Findings(
            entry=self._entry,
            table=self._table,
            settings=self._baseline.server.settings,
            vector=self._vector,
            facts=facts,
            rows=rows,
            against=self._options.against,
        )
        if findings.unsearchable is not None:
            return self._report(findings, [], None)
        await self._look_for_points(findings)
        answers, raw = await self._ask(searcher, findings)
        metric = findings.metric
        assert metric is not None
        tiers = judge(answers, metric, raw, coarse=self._is_coarse(facts))
        findings.filtered_recall, findings.plain_recall = _recalls(answers, tiers.recalls)
        return self._report(findings, answers, tiers)

    def _report(
        self, findings: Findings, answers: Sequence[Answers], tiers: Tiers | None
    ) -> ColumnReport:
        causes, caveats = diagnose(findings, tiers)
        notes = [note for _, one in self._queries if one is not None for note in one.notes]
        return ColumnReport(
            table=self._planned.name,
            column=self._entry.column,
            collection=self._planned.plan.collection,
            vector=self._vector.name,
            source_metric=self._entry.metric,
            metric=findings.found_metric,
            rows_before=self._table.rows,
            rows=findings.rows,
            points=findings.facts.points,
            tiers=tiers,
            unsearchable=findings.unsearchable is not None,
            causes=tuple(causes),
            caveats=tuple(dict.fromkeys((*caveats, *notes))),
            queries=tuple(
                QueryReport.of(answer, tiers.recalls[place], tiers.correlations[place])
                for place, answer in enumerate(answers)
            )
            if tiers is not None
            else (),
        )

    def _count(self) -> int:
        planned = self._planned
        counts = count_rows(self._connection, planned.table.leaves, planned.selection)
        return sum(count.rows for count in counts)

    def _is_coarse(self, facts: SearchFacts) -> bool:
        found = facts.vectors[self._vector.name]
        lossless = _LOSSLESS.get(self._entry.type.rpartition(".")[2], Datatype.FLOAT32)
        quantized = bool(facts.quantization.get(self._vector.name))
        return quantized or found.datatype != lossless.value

    # -- ids

    def _point_id(self, key: Sequence[str]) -> PointId:
        try:
            return self._ids(key)
        except MappingError as error:
            raise ConfigError(
                f"keys in the baseline are not those of table {self._planned.name} now.",
                "Take a new baseline with cdc-sync baseline.",
            ) from error

    async def _look_for_points(self, findings: Findings) -> None:
        """Which of the rows that the source found have no point, and which of them are no rows any
        more."""
        keys = {
            self._point_id(hit.key): hit.key
            for query, _ in self._queries
            for hit in (*query.exact, *query.ties, *(query.index or ()))
        }
        keys |= {
            self._point_id(query.exclude): query.exclude
            for query, _ in self._queries
            if query.exclude is not None
        }
        writer = self._sink.writer(self._planned.plan)
        lengths: dict[PointId, float | None] = {}
        wanted = list(keys)
        for start in range(0, len(wanted), _PAGE):
            points = await writer.retrieve(wanted[start : start + _PAGE])
            lengths |= {p.id: _length(p.vectors.get(self._vector.name)) for p in points}
        absent = [id_ for id_ in wanted if id_ not in lengths]
        findings.asked_ids = len(wanted)
        rows = await asyncio.to_thread(self._rows, [keys[id_] for id_ in absent])
        findings.missing = frozenset(absent) & rows
        findings.gone = frozenset(absent) - rows
        self._compare_lengths(lengths, findings)

    def _compare_lengths(self, lengths: Mapping[PointId, float | None], findings: Findings) -> None:
        """Of stored vectors, and with those of the rows whose vectors the queries have."""
        known = [length for length in lengths.values() if length is not None]
        if known:
            findings.norms = (min(known), max(known), sum(known) / len(known))
        for query, _ in self._queries:
            if query.exclude is None:
                continue
            stored = lengths.get(self._point_id(query.exclude))
            if stored is not None:
                source = vector_length(query.vector)
                findings.lengths_compared += 1
                findings.lengths_differ += abs(stored - source) > _LENGTH_PART * max(source, stored)

    def _rows(self, keys: Sequence[Sequence[str]]) -> frozenset[PointId]:
        """The ids of the rows, of those with these keys, that are there now."""
        plan = self._planned.plan
        if not keys:
            return frozenset()
        raw = [[key_row(plan, key)[position] for position in plan.key] for key in keys]
        found = fetch_rows(self._connection, plan, raw, (), self._planned.selection)
        compiled = compile_point_id(plan)
        return frozenset(compiled(row) for row in found)

    # -- queries

    async def _ask(
        self, searcher: Searcher, findings: Findings
    ) -> tuple[list[Answers], list[float]]:
        turn = asyncio.Semaphore(_PARALLEL)
        raw: list[float] = []
        metric = findings.metric
        assert metric is not None

        async def one(query: Query, translated: TranslatedFilter | None) -> Answers:
            async with turn:
                found = await self._nearest(searcher, query, translated, exact=False)
                exact = await self._nearest(searcher, query, translated, exact=True)
            raw.extend(score for _, score in found)
            return self._answers(query, metric, found, exact, findings.gone)

        # All are awaited, also when one fails: none may go on in a sink that is closed.
        answers = await asyncio.gather(
            *(one(query, translated) for query, translated in self._queries), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return [answer for answer in answers if isinstance(answer, Answers)], raw

    async def _nearest(
        self,
        searcher: Searcher,
        query: Query,
        translated: TranslatedFilter | None,
        *,
        exact: bool,
    ) -> list[tuple[PointId, float]]:
        if translated is not None and translated.nothing:
            return []
        itself = None if query.exclude is None else self._point_id(query.exclude)
        found = await searcher.nearest(
            self._vector.name,
            _stored(query),
            query.k + (0 if itself is None else 1),
            None if translated is None else translated.condition,
            exact=exact,
        )
        return [pair for pair in found if pair[0] != itself][: query.k]

    def _answers(
        self,
        query: Query,
        metric: Metric,
        found: Sequence[tuple[PointId, float]],
        exact: Sequence[tuple[PointId, float]],
        gone: frozenset[PointId],
    ) -> Answers:
        def ranked(hits: Sequence[Hit] | None) -> Ranked:
            ids = [(self._point_id(hit.key), hit.distance) for hit in hits or ()]
            return [pair for pair in ids if pair[0] not in gone]

        index = None if query.index is None else ranked(query.index)
        by_index = self._options.against == "index" and index is not None
        return Answers(
            number=query.number,
            label=query.label,
            k=query.k,
            filtered=query.filter is not None,
            reference=index if by_index and index is not None else ranked(query.exact),
            ties=() if by_index else ranked(query.ties),
            found=[(id_, as_distance(metric, score)) for id_, score in found],
            exact=[(id_, as_distance(metric, score)) for id_, score in exact],
            index=None if by_index else index,
            grades=None
            if query.relevant is None
            else {self._point_id(label.key): label.grade for label in query.relevant},
        )


def _length(vector: StoredArray | None) -> float | None:
    if vector is None:
        return None
    components = vector.values if isinstance(vector, SparseValue) else vector
    return float(np.linalg.norm(np.asarray(components, dtype=np.float64)))


def _stored(query: Query) -> StoredVector:
    vector = query.vector
    return SparseValue(vector.indices, vector.values) if isinstance(vector, SparseQuery) else vector


def _recalls(
    answers: Sequence[Answers], recalls: Sequence[float | None]
) -> tuple[float | None, float | None]:
    """Mean recall of queries with a filter, and of those without."""
    means: list[float | None] = []
    for filtered in (True, False):
        known = [
            value
            for answer, value in zip(answers, recalls, strict=True)
            if answer.filtered is filtered and value is not None
        ]
        means.append(sum(known) / len(known) if known else None)
    return means[0], means[1]
