"""What pgvector answers: nearest neighbours, exact and through an index, and rows to ask with.

Everything is read in one REPEATABLE READ READ ONLY transaction, with a timeout for each statement
and no lock but ACCESS SHARE. Key values are in their types' text form, as pgoutput sends it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import psycopg
from psycopg import pq

from cdc_sync.errors import CdcSyncError, ErrorKind, SourceError
from cdc_sync.mapping.plan import Metric, TablePlan
from cdc_sync.mapping.table import Leaf, Table
from cdc_sync.mapping.vector_indexes import VectorIndex
from cdc_sync.mapping.vectors import vector_base
from cdc_sync.postgres.connect import PgConnection, result_error, translate
from cdc_sync.postgres.counting import LeafCount, count_rows
from cdc_sync.postgres.identifiers import qualified, quote_ident
from cdc_sync.rows import UNCHANGED, Row, TextValue

_OPERATORS: Final = {
    Metric.COSINE: "<=>",
    Metric.EUCLID: "<->",
    Metric.DOT: "<#>",
    Metric.MANHATTAN: "<+>",
}
#: Of bit strings only; Manhattan is Hamming there.
_HAMMING: Final = "<~>"
_LOCK_TIMEOUT: Final = "10s"
#: Rows that are drawn for each row of a sample, at least, before the sample is taken of them.
_DRAWN: Final = 20
_QUERY_CANCELED: Final = "57014"

_SETTINGS: Final = """
SELECT name, setting FROM pg_catalog.pg_settings
 WHERE name ~ '^(hnsw|ivfflat)[.]' OR name IN ('work_mem', 'maintenance_work_mem')
 ORDER BY name
"""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A row found: its key's values as text, in key order, and pgvector's distance."""

    key: tuple[str, ...]
    distance: float


@dataclass(frozen=True, slots=True)
class SampledVector:
    """A row's key, as in :class:`Neighbour`, and its vector in pgvector's text form."""

    key: tuple[str, ...]
    vector: str


@dataclass(frozen=True, slots=True)
class VectorTarget:
    """A column to search, as SQL.

    ``relation`` is the table with ONLY where that is meant; ``column`` the column, ``expression``
    what an index compares (the column, or a cast of it) and ``type`` the type of that;
    ``operator`` compares both, and is written with its schema.
    """

    relation: str
    keys: tuple[str, ...]
    column: str
    expression: str
    type: str
    operator: str


def search_target(
    table: Table, plan: TablePlan, column: str, metric: Metric, index: VectorIndex | None
) -> VectorTarget:
    """How a column is searched: by what the index compares, or exactly (None).

    Raises ``KeyError`` for a column that the table has not.
    """
    source = {one.name: one for one in table.columns}[column]
    base = vector_base(source.type)
    bits = base.name in ("bit", "varbit")
    type_ = base.name
    quoted = quote_ident(column)
    expression = quoted
    if index is not None and not bits:
        indexed, _, distance = index.opclass.partition("_")
        # Those of ScaNN are called by the distance alone, and are of the column's own type.
        type_ = indexed if distance.endswith("ops") else base.name
        expression = index.index.columns[0].expression or quoted
    schema = _extension_schema(table) if bits else base.schema
    operator = _HAMMING if bits else _OPERATORS[metric]
    return VectorTarget(
        relation=_relation(table, plan),
        keys=tuple(quote_ident(plan.columns[position].name) for position in plan.key),
        column=quoted,
        expression=f"({expression})",
        type="pg_catalog.varbit" if bits else qualified(schema, type_),
        operator=f"OPERATOR({quote_ident(schema)}.{operator})",
    )


def _extension_schema(table: Table) -> str:
    """The schema of pgvector's operators on bits, which is that of its types if the table has
    some, and else most probably the usual one."""
    found = [vector_base(c.type) for c in table.columns]
    return next((base.schema for base in found if base.is_pgvector), "public")


def _relation(table: Table, plan: TablePlan) -> str:
    only = "" if table.partitioned or plan.inherited else "ONLY "
    return only + qualified(table.schema, table.name)


class NeighbourReader:
    """A transaction in which a connection, in autocommit mode and idle, is asked; use ``with``.

    All methods raise :class:`SourceError`; SOURCE_UNAVAILABLE for a statement that takes longer
    than ``timeout_seconds``.
    """

    def __init__(self, conn: PgConnection, timeout_seconds: float) -> None:
        self._conn = conn
        self._timeout = timeout_seconds

    def __enter__(self) -> NeighbourReader:
        self._run("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        milliseconds = max(1, round(self._timeout * 1000))
        self._run(f"SET LOCAL statement_timeout = {milliseconds}")
        self._run(f"SET LOCAL lock_timeout = '{_LOCK_TIMEOUT}'")
        return self

    def __exit__(self, *_: object) -> None:
        if self._conn.pgconn.status == pq.ConnStatus.OK:
            self._run("ROLLBACK")

    def counts(self, leaves: Sequence[Leaf], selection: str | None) -> tuple[LeafCount, ...]:
        """Exact numbers of rows, as :func:`cdc_sync.postgres.counting.count_rows`."""
        try:
            return count_rows(self._conn, leaves, selection)
        except SourceError as error:
            if isinstance(error.__cause__, psycopg.Error):
                raise self._failure(error.__cause__, "counting rows") from error.__cause__
            raise

    def settings(self, tables: Sequence[Table]) -> dict[str, str]:
        """The settings of pgvector that change what a search finds, as this session has them."""
        bases = [vector_base(column.type) for table in tables for column in table.columns]
        base = next((base for base in bases if base.is_pgvector), None)
        if base is not None:
            # They are not there before the library is loaded.
            loaded = "{1:1}/1" if base.name == "sparsevec" else "[1]"
            self._run(f"SELECT '{loaded}'::{qualified(base.schema, base.name)}")
        return {str(name): str(value) for name, value in self._rows(_SETTINGS)}

    def pgvector_version(self) -> str | None:
        """Version of the extension, None where it is not installed."""
        query = "SELECT extversion FROM pg_catalog.pg_extension WHERE extname = 'vector'"
        rows = self._rows(query)
        return rows[0][0] if rows else None

    def sample_vectors(
        self, target: VectorTarget, selection: str | None, *, rows: int, wanted: int, seed: int
    ) -> list[SampledVector]:
        """Draw rows that have a vector: the same ones while the table is the same and the ``seed``.

        ``rows`` is how many the table has.
        """
        listed = ", ".join((*target.keys, target.column))
        condition = f"{target.column} IS NOT NULL"
        query = _sample(target, listed, (condition, selection), rows, wanted, seed)
        return [
            SampledVector(tuple(map(_present, row[:-1])), _present(row[-1]))
            for row in self._rows(query)
        ]

    def sample_rows(
        self,
        plan: TablePlan,
        target: VectorTarget,
        selection: str | None,
        *,
        rows: int,
        wanted: int,
        seed: int,
    ) -> list[Row]:
        """Draw rows in plan order, their vectors UNCHANGED; else as :meth:`sample_vectors`."""
        taken = [column.vector is None for column in plan.columns]
        listed = ", ".join(
            quote_ident(column.name)
            for column, take in zip(plan.columns, taken, strict=True)
            if take
        )
        query = _sample(target, listed, (selection,), rows, wanted, seed)
        found: list[Row] = []
        for values in self._rows(query):
            given = iter(values)
            row: Row = []
            for take in taken:
                value = next(given) if take else None
                row.append(
                    UNCHANGED if not take else None if value is None else TextValue(value.encode())
                )
            found.append(row)
        return found

    def nearest(
        self,
        target: VectorTarget,
        vector: str,
        limit: int,
        *,
        conditions: Sequence[str] = (),
        exact: bool,
    ) -> list[Neighbour]:
        """The nearest rows, nearest first: by looking at all of them, or as an index gives them.

        ``vector`` is in the type's text form. Rows without a vector, or whose distance is not a
        number (the angle to a zero vector), are left out.
        """
        self._prepare(exact)
        query = _nearest(target, limit, conditions)
        found = []
        for row in self._rows(query, vector):
            distance = float(_present(row[-1]))
            if math.isfinite(distance):
                found.append(Neighbour(tuple(map(_present, row[:-1])), distance))
        return found

    def indexes_used(
        self, target: VectorTarget, vector: str, limit: int, conditions: Sequence[str] = ()
    ) -> list[str]:
        """Names of the indexes from which :meth:`nearest` takes rows in their order, if any."""
        self._prepare(False)
        query = f"EXPLAIN (FORMAT JSON) {_nearest(target, limit, conditions)}"
        plans = json.loads("\n".join(_present(row[0]) for row in self._rows(query, vector)))
        return sorted(set(_ordered_indexes(plans[0]["Plan"])))

    def _prepare(self, exact: bool) -> None:
        self._run(f"SET LOCAL enable_indexscan = {'off' if exact else 'on'}")
        self._run(f"SET LOCAL enable_seqscan = {'on' if exact else 'off'}")

    def _run(self, command: str) -> None:
        self._rows(command)

    def _rows(self, query: str, *values: str) -> list[list[str | None]]:
        try:
            result = self._conn.pgconn.exec_params(
                query.encode(), [value.encode() for value in values] or None
            )
        except psycopg.Error as exc:
            raise translate(exc, "searching in pgvector") from exc
        if result.status not in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK):
            raise self._failure(result_error(self._conn, result), "searching in pgvector")
        return [
            [_text(result.get_value(row, column)) for column in range(result.nfields)]
            for row in range(result.ntuples)
        ]

    def _failure(self, error: psycopg.Error, doing: str) -> CdcSyncError:
        if error.sqlstate == _QUERY_CANCELED:
            return SourceError(
                ErrorKind.SOURCE_UNAVAILABLE,
                f"{doing} took longer than {self._timeout:g} s and was ended",
                "Exact counts and searches read the whole table; give them more time with "
                "--timeout.",
            )
        return translate(error, doing)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


def _present(value: str | None) -> str:
    assert value is not None
    return value


def _where(conditions: Sequence[str]) -> str:
    return " AND ".join(f"({condition}\n)" for condition in conditions)


def _nearest(target: VectorTarget, limit: int, conditions: Sequence[str]) -> str:
    distance = f"{target.expression} {target.operator} $1::{target.type}"
    where = _where((f"{target.column} IS NOT NULL", *conditions))
    return (
        f"SELECT {', '.join(target.keys)}, ({distance})::float8 FROM {target.relation}"
        f" WHERE {where} ORDER BY {distance} LIMIT {int(limit)}"
    )


def _sample(
    target: VectorTarget,
    listed: str,
    conditions: Sequence[str | None],
    rows: int,
    wanted: int,
    seed: int,
) -> str:
    drawn = ""
    if rows > 2 * _DRAWN * wanted > 0:
        percent = min(100.0, 100.0 * _DRAWN * wanted / rows)
        drawn = f" TABLESAMPLE BERNOULLI ({percent!r}) REPEATABLE ({int(seed)})"
    where = _where([one for one in conditions if one is not None]) or "true"
    return (
        f"SELECT {listed} FROM {target.relation}{drawn} WHERE {where}"
        f" ORDER BY pg_catalog.md5(ROW({', '.join(target.keys)})::text || '{int(seed)}')"
        f" LIMIT {int(wanted)}"
    )


def _ordered_indexes(node: dict[str, object]) -> list[str]:
    found = [str(node["Index Name"])] if "Order By" in node and "Index Name" in node else []
    children = node.get("Plans")
    for child in children if isinstance(children, list) else ():
        found += _ordered_indexes(child)
    return found
