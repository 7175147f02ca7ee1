"""``baseline``: what a source and its searches are like, before anything is migrated.

Reads only, in one transaction of one snapshot, so that counts and results belong together.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import cdc_sync
from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ConfigError, MappingError
from cdc_sync.mapping.plan import Metric
from cdc_sync.mapping.python import PythonCodec
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.neighbours import (
    Neighbour,
    NeighbourReader,
    SampledVector,
    search_target,
)
from cdc_sync.sync.planning import PipelinePlan, is_named, plan_pipeline
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.verify.baseline_columns import (
    NORM_ROWS,
    SearchedColumn,
    checked_vector,
    point_ids,
    searched_columns,
    table_columns,
    vector_entry,
)
from cdc_sync.verify.baseline_file import (
    Baseline,
    Hit,
    Partition,
    PayloadField,
    Query,
    QueryVector,
    Server,
    TableEntry,
)
from cdc_sync.verify.baseline_queries import GivenQuery, parse_vector, vector_text
from cdc_sync.verify.filters import TranslatedFilter, translate_filter

#: Queries that a verdict wants, as Qdrant's guide has it.
ENOUGH_QUERIES: Final = 50
DEFAULT_K: Final = 10
#: Rows beyond the last result that are looked at for ties with it.
_TIES: Final = 100
#: Distances as near as this are ties: both sides compute in single precision.
_TIE: Final = 1e-6
_PAYLOAD_ROWS: Final = 100
_EXAMPLES: Final = 3

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """What to take. ``sampled`` queries for each vector column, besides the ``given``; of rows'
    own vectors, the row itself among the results or not. ``values``: examples of payload values
    too. ``seed`` chooses the rows.
    """

    given: tuple[GivenQuery, ...] = ()
    sampled: int = ENOUGH_QUERIES
    k: int = DEFAULT_K
    include_self: bool = False
    values: bool = False
    timeout_seconds: float = 300.0
    seed: int = 1


def capture(
    settings: Settings, options: CaptureOptions, progress: Progress = lambda _: None
) -> Baseline:
    """Take a baseline of the tables in the settings.

    Raises :class:`ConfigError` for queries that cannot be run, and what planning and reading raise.
    """
    with connect(settings.source) as connection:
        # Whether tables are published yet is no matter here.
        plan = plan_pipeline(connection, settings, owned=True)
        with NeighbourReader(connection, options.timeout_seconds) as reader:
            return _Capture(settings, options, plan, reader, progress).run()


class _Capture:
    def __init__(
        self,
        settings: Settings,
        options: CaptureOptions,
        plan: PipelinePlan,
        reader: NeighbourReader,
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._options = options
        self._plan = plan
        self._reader = reader
        self._progress = progress
        self._notes: list[str] = []
        self._searched = {planned.name: searched_columns(planned) for planned in plan.tables}
        self._samples: dict[tuple[str, str], list[SampledVector]] = {}

    def run(self) -> Baseline:
        # First, so that what is wrong with the file is said before anything long is done.
        given = [self._prepared(one) for one in self._options.given]
        tables = [self._table(planned) for planned in self._plan.tables]
        queries = [self._given(*one) for one in given]
        queries += self._sampled(len(queries))
        self._judge(queries)
        server = self._plan.server
        return Baseline(
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            cdc_sync=cdc_sync.__version__,
            server=Server(
                postgres=f"{server.major}.{server.version_num % 10000}",
                pgvector=self._reader.pgvector_version(),
                database=server.database,
                settings=self._reader.settings([planned.table for planned in self._plan.tables]),
            ),
            configuration=[
                entry.model_dump(mode="json", exclude_defaults=True)
                for entry in self._settings.tables
            ],
            tables=tables,
            queries=[
                query.model_copy(update={"number": number})
                for number, query in enumerate(queries, 1)
            ],
            notes=list(dict.fromkeys(self._notes)),
        )

    def _judge(self, queries: Sequence[Query]) -> None:
        if len(queries) < ENOUGH_QUERIES:
            self._notes.append(
                f"{len(queries)} queries; {ENOUGH_QUERIES} or more are needed for statistics that "
                "mean something"
            )
        if any(query.exclude is not None for query in queries):
            self._notes.append("queries of sampled rows leave the row itself out of their results")

    # -- inventory

    def _table(self, planned: PlannedTable) -> TableEntry:
        self._progress(f"counting {planned.name}")
        leaves = planned.table.leaves
        counts = self._reader.counts(leaves, planned.selection)
        rows = sum(count.rows for count in counts)
        for searched in self._searched[planned.name]:
            # Counted once; so drawn here, where the number is known.
            self._samples[planned.name, searched.column.name] = self._reader.sample_vectors(
                searched.target,
                planned.selection,
                rows=rows,
                wanted=max(NORM_ROWS, self._options.sampled),
                seed=self._options.seed,
            )
        plan = planned.plan
        sampled, payload = self._payload(planned, rows)
        return TableEntry(
            table=planned.name,
            collection=plan.collection,
            row_filter=planned.selection,
            key=[plan.columns[position].name for position in plan.key],
            rows=rows,
            partitions=[Partition(name=count.name, rows=count.rows) for count in counts],
            columns=table_columns(planned),
            vectors=[
                vector_entry(planned, column, self._samples.get((planned.name, column.name), ()))
                for column in plan.columns
                if column.vector is not None
            ],
            sampled_rows=sampled,
            payload=payload,
        )

    def _payload(self, planned: PlannedTable, rows: int) -> tuple[int, list[PayloadField]]:
        plan = planned.plan
        searched = self._searched[planned.name]
        target = (
            searched[0].target
            if searched
            else search_target(
                planned.table, plan, plan.columns[plan.key[0]].name, Metric.COSINE, None
            )
        )
        sample = self._reader.sample_rows(
            plan,
            target,
            planned.selection,
            rows=rows,
            wanted=_PAYLOAD_ROWS,
            seed=self._options.seed,
        )
        codec = PythonCodec(plan)
        types: dict[str, Counter[str]] = {}
        examples: dict[str, list[object]] = {}
        unmapped = 0
        for row in sample:
            try:
                payload = codec.payload(row)
            except MappingError:
                unmapped += 1
                continue
            for name, value in payload.items():
                types.setdefault(name, Counter())[json_type(value)] += 1
                shown = examples.setdefault(name, [])
                if len(shown) < _EXAMPLES and value is not None:
                    shown.append(value)
        if unmapped:
            self._notes.append(f"{unmapped} sampled rows of {planned.name} cannot become points")
        return len(sample), [
            PayloadField(
                field=name,
                types=dict(sorted(found.items())),
                examples=examples[name] if self._options.values else None,
            )
            for name, found in sorted(types.items())
        ]

    # -- queries

    def _sampled(self, before: int) -> list[Query]:
        chosen = [
            (searched, sample)
            for columns in self._searched.values()
            for searched in columns
            for sample in self._samples[searched.planned.name, searched.column.name][
                : self._options.sampled
            ]
        ]
        queries = []
        for number, (searched, sample) in enumerate(chosen, 1):
            self._progress(f"query {before + number} of {before + len(chosen)}")
            queries.append(
                self._ask(
                    searched,
                    Query(
                        number=1,
                        table=searched.planned.name,
                        column=searched.column.name,
                        origin="sample",
                        vector=parse_vector(sample.vector),
                        k=self._options.k,
                        exclude=None if self._options.include_self else list(sample.key),
                        exact=[],
                    ),
                    sample.vector,
                )
            )
        return queries

    def _prepared(
        self, given: GivenQuery
    ) -> tuple[GivenQuery, SearchedColumn, QueryVector, TranslatedFilter | None]:
        searched = self._column_of(given)
        where = f"query {given.number} of the file"
        vector = checked_vector(where, given.vector, searched)
        translated = None
        if given.filter is not None:
            try:
                translated = translate_filter(given.filter, searched.planned.plan)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error.message}", error.remedy) from error
            self._notes += translated.notes
        if given.relevant is not None:
            ids = point_ids(searched.planned.plan)
            for label in given.relevant:
                try:
                    ids(label.key)
                except MappingError as error:
                    raise ConfigError(
                        f"{where}: a relevant row's key is no key of {searched.planned.name}.",
                        "Give the key's values in key order, as Postgres writes them.",
                    ) from error
        return given, searched, vector, translated

    def _given(
        self,
        given: GivenQuery,
        searched: SearchedColumn,
        vector: QueryVector,
        translated: TranslatedFilter | None,
    ) -> Query:
        self._progress(f"query {given.number} of {len(self._options.given)} of the file")
        query = Query(
            number=1,
            label=given.label,
            table=searched.planned.name,
            column=searched.column.name,
            origin="file",
            vector=vector,
            k=given.k or self._options.k,
            filter=given.filter,
            relevant=given.relevant,
            exact=[],
        )
        sql = None if translated is None else translated.sql
        try:
            return self._ask(searched, query, vector_text(vector, searched.bits), sql)
        except CdcSyncError as error:
            error.message = f"query {given.number} of the file: {error.message}"
            raise

    def _ask(
        self, searched: SearchedColumn, query: Query, text: str, sql: str | None = None
    ) -> Query:
        conditions = [one for one in (searched.planned.selection, sql) if one is not None]
        more = 0 if query.exclude is None else 1
        found = self._reader.nearest(
            searched.target, text, query.k + more + _TIES, conditions=conditions, exact=True
        )
        exact = _without(found, query.exclude)
        ties = _tied(exact, query.k)
        update: dict[str, object] = {"exact": _hits(exact[: query.k]), "ties": _hits(ties)}
        if searched.indexed is not None:
            asked = (searched.indexed, text, query.k + more)
            used = self._reader.indexes_used(*asked, conditions)
            if used:
                answer = self._reader.nearest(*asked, conditions=conditions, exact=False)
                update["index"] = _hits(_without(answer, query.exclude)[: query.k])
                update["indexes_used"] = used
        return query.model_copy(update=update)

    def _column_of(self, given: GivenQuery) -> SearchedColumn:
        where = f"query {given.number} of the file"
        names = [
            name for name in self._searched if given.table is None or is_named(given.table, name)
        ]
        if len(names) != 1:
            raise ConfigError(
                f"{where} names no table of the configuration."
                if given.table is not None
                else f"{where} does not say which table it is for.",
                f"The tables are {', '.join(self._searched)}.",
            )
        columns = self._searched[names[0]]
        found = [c for c in columns if given.column in (None, c.column.name)]
        if len(found) != 1:
            listed = ", ".join(c.column.name for c in columns) or "none"
            raise ConfigError(
                f"{where} names no vector column of {names[0]} that can be searched."
                if given.column is not None or not columns
                else f"{where} does not say which vector column of {names[0]} it is for.",
                f"The columns that can be searched are: {listed}.",
            )
        return found[0]


# -- results


def _without(found: Sequence[Neighbour], key: Sequence[str] | None) -> list[Neighbour]:
    return [one for one in found if key is None or one.key != tuple(key)]


def _tied(found: Sequence[Neighbour], k: int) -> list[Neighbour]:
    """Those beyond the k-th that are as near as it."""
    if len(found) <= k:
        return []
    last = found[k - 1].distance
    limit = last + _TIE * max(1.0, abs(last))
    return [one for one in found[k:] if one.distance <= limit]


def _hits(found: Sequence[Neighbour]) -> list[Hit]:
    return [Hit(key=list(one.key), distance=one.distance) for one in found]


def json_type(value: object) -> str:
    """The type of a JSON value by its name, integers apart from other numbers."""
    for kind, name in (
        (bool, "boolean"),
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (list, "array"),
        (dict, "object"),
    ):
        if isinstance(value, kind):
            return name
    return "null"
