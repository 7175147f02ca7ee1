"""The oracle: is a Qdrant collection exactly what docs/mapping.md says of a Postgres table?

Every row is read as text, its point computed anew by simple code of this file and
``oracle_types.py``, and compared with what Qdrant holds, value by value; then every id of the
collection is walked for points that should not be there. It shares no code with the product, so a
mistake there does not cancel out here. Both sides must be at rest while it looks.

Memory: one page of rows and points, and the set of ids.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, TypedDict, Unpack

import numpy as np
import orjson
import psycopg
from psycopg import sql

from tests.support.oracle_points import (
    Array,
    PointId,
    Points,
    StoredPoint,
    Vector,
    VectorConfig,
    open_points,
)
from tests.support.oracle_types import (
    INT64_MAX,
    Connection,
    Json,
    OracleError,
    OracleType,
    Parse,
    canonical_key,
    load_type,
    parser,
    sparse_items,
    sql_cast,
)

Kind: TypeAlias = Literal["missing", "extra", "payload", "vector", "duplicate", "collection"]

_NAMESPACE: Final = uuid.UUID("7f3e9d52-3a41-5d0b-9a53-0c8f6a2f4b11")
_SETTINGS: Final = (
    "-c datestyle=ISO -c timezone=UTC -c intervalstyle=iso_8601 -c extra_float_digits=3"
    " -c bytea_output=hex -c row_security=off -c statement_timeout=0"
)
_PAGE: Final = 256
_TEXT_LIMIT: Final = 60
#: Below this square of the norm Qdrant stores a Cosine vector as it is, and near float32's maximum
#: the square overflows and it stores zeros.
_TINY: Final = 1.19e-7
_HUGE: Final = 3.39e38
#: Qdrant keeps payloads as JSON and reads numbers back without exact rounding: of doubles with 16
#: or 17 digits one in nine comes back a step beside, very large and small ones two (Edge 0.9.0).
_DOUBLE_STEPS: Final = 4


@dataclass(frozen=True)
class Difference:
    """``field`` is the payload path or vector name; ``text`` shows both values, shortened."""

    kind: Kind
    id: PointId | None
    field: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind} {self.id} {self.field}: {self.text}"


class Options(TypedDict, total=False):
    """The table's settings as in the configuration, and what is needed to read.

    ``where`` is SQL for a publication's row filter; ``shard`` is the mark that every point has to
    carry (its rows are told by ``where``); ``only`` leaves out tables that inherit
    from it; ``ids`` other than native: as Qdrant's migration tool
    makes them of whole numbers and texts; ``api_key`` is Qdrant's.
    """

    key: Sequence[str] | None
    columns: Sequence[str] | None
    namespace: str | None
    exclude: Sequence[str]
    rename: Mapping[str, str]
    constants: Mapping[str, Json]
    payload_key: str | None
    drop_nulls: bool | Sequence[str]
    numeric_as_string: bool | Sequence[str]
    skip_bytea: bool | Sequence[str]
    unnamed_vector: str | None
    bit_vectors: Sequence[str]
    where: str | None
    shard: str | None
    only: bool
    ids: str
    api_key: str | None


def compare(
    pg_url: str, table: str, *, qdrant_url: str, collection: str, **options: Unpack[Options]
) -> list[Difference]:
    """All differences between a table and its collection.

    ``table`` is a name as in SQL, ``qdrant_url`` as in the configuration (for ``edge:/path`` the
    shard is copied first). Raises :class:`OracleError` for a table it cannot judge.
    """
    return _compare(pg_url, table, qdrant_url, collection, options).differences


def assert_equal(
    pg_url: str,
    table: str,
    *,
    qdrant_url: str,
    collection: str,
    rows: int | None = None,
    **options: Unpack[Options],
) -> int:
    """Fail with the first differences, or if the table has not ``rows`` rows; return how many."""
    result = _compare(pg_url, table, qdrant_url, collection, options)
    if result.differences:
        shown = "\n".join(f"  {one}" for one in result.differences[:20])
        raise AssertionError(
            f"{len(result.differences)} differences between {table} ({result.rows} rows)"
            f" and {collection}:\n{shown}"
        )
    if rows is not None and result.rows != rows:
        raise AssertionError(f"{table} has {result.rows} rows, not {rows}")
    return result.rows


@dataclass
class _Result:
    differences: list[Difference] = field(default_factory=list)
    rows: int = 0

    def add(self, kind: Kind, id_: PointId | None, name: str, text: str) -> None:
        self.differences.append(Difference(kind, id_, name, text))


@dataclass(frozen=True)
class _Expected:
    id: PointId
    payload: dict[str, Json]
    vectors: dict[str, Vector]


def _compare(
    pg_url: str, table: str, qdrant_url: str, collection: str, options: Options
) -> _Result:
    result = _Result()
    points = open_points(qdrant_url, collection, options.get("api_key"))
    try:
        with psycopg.connect(pg_url, options=_SETTINGS, client_encoding="UTF8") as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            reader = _Table(connection, table, options)
            _compare_names(reader.vectors, points, result)
            seen: set[PointId] = set()
            rows = reader.rows()
            while page := list(itertools.islice(rows, _PAGE)):
                _compare_page(page, points, seen, result)
        _compare_ids(points, seen, options, result)
    finally:
        points.close()
    return result


def _compare_names(wanted: Sequence[str], points: Points, result: _Result) -> None:
    for name in sorted(set(wanted) ^ set(points.configs)):
        state = "is missing" if name in wanted else "belongs to no column"
        result.add("collection", None, name, f"the vector {state}")


def _compare_page(
    page: list[_Expected], points: Points, seen: set[PointId], result: _Result
) -> None:
    stored = points.get([expected.id for expected in page])
    for expected in page:
        result.rows += 1
        if expected.id in seen:
            result.add("duplicate", expected.id, "", "two rows have this id")
        seen.add(expected.id)
        point = stored.get(expected.id)
        if point is None:
            result.add("missing", expected.id, "", "the row has no point")
        else:
            _compare_point(expected, point, points, result)


def _compare_point(
    expected: _Expected, point: StoredPoint, points: Points, result: _Result
) -> None:
    for path, text in _payload_differences(expected.payload, point.payload, ""):
        result.add("payload", expected.id, path, text)
    for name in sorted(expected.vectors.keys() | point.vectors.keys()):
        if name not in point.vectors:
            result.add("vector", expected.id, name, "absent, but the column is not NULL")
        elif name not in expected.vectors:
            result.add("vector", expected.id, name, "present, but the column is NULL")
        else:
            config = points.configs.get(name, VectorConfig("Dot", "float32", "dense"))
            wrong = _vector_difference(expected.vectors[name], point.vectors[name], config)
            if wrong is not None:
                result.add("vector", expected.id, name, wrong)


def _compare_ids(points: Points, seen: set[PointId], options: Options, result: _Result) -> None:
    scrolled: set[PointId] = set()
    # Others may keep points in the collection, of another shard or another table.
    shard, namespace = options.get("shard"), options.get("namespace")
    mark, ours = ("_table", namespace) if shard is None else ("_shard", shard)
    for id_, owner in points.scroll(mark):
        if id_ in scrolled:
            result.add("duplicate", id_, "", "the collection lists it twice")
        scrolled.add(id_)
        if id_ not in seen and (ours is None or owner == ours):
            result.add("extra", id_, "", "the point has no row")
    reported = {one.id for one in result.differences if one.kind == "missing"}
    for id_ in seen - scrolled - reported:
        result.add("missing", id_, "", "found by its id, but the collection does not list it")


# --- values -----------------------------------------------------------------------------------


def _payload_differences(expected: Json, actual: Json, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in sorted(expected.keys() | actual.keys()):
            below = f"{path}.{key}" if path else key
            if key not in actual:
                yield below, f"absent, expected {_show(expected[key])}"
            elif key not in expected:
                yield below, f"{_show(actual[key])}, expected absent"
            else:
                yield from _payload_differences(expected[key], actual[key], below)
    elif isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            yield path, f"{len(actual)} elements, expected {len(expected)}"
        else:
            for number, (one, other) in enumerate(zip(expected, actual, strict=True)):
                yield from _payload_differences(one, other, f"{path}[{number}]")
    elif not _same(expected, actual):
        yield path, f"{_show(actual)}, expected {_show(expected)}"


def _same(expected: Json, actual: Json) -> bool:
    if type(expected) is not type(actual):
        return False
    if isinstance(expected, float) and isinstance(actual, float):
        # As integers, the bits of doubles of one sign are in order: this counts steps between them.
        bits = [int.from_bytes(struct.pack(">d", one), "big") for one in (expected, actual)]
        return abs(bits[0] - bits[1]) <= _DOUBLE_STEPS
    return expected == actual


def _show(value: Json) -> str:
    name = {bool: "bool", int: "integer", float: "double", str: "string"}.get(type(value), "")
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > _TEXT_LIMIT:
        text = f"{text[:_TEXT_LIMIT]}... ({len(text)} characters)"
    return f"{name} {text}".strip()


def _vector_difference(expected: Vector, actual: Vector, config: VectorConfig) -> str | None:
    if isinstance(expected, tuple) or isinstance(actual, tuple):
        if not (isinstance(expected, tuple) and isinstance(actual, tuple)):
            return "sparse on one side only"
        if not np.array_equal(expected[0], actual[0]):
            return f"{actual[0].size} indices, expected {expected[0].size}, or others"
        return _exact_difference(expected[1], actual[1])
    if expected.shape != actual.shape:
        return f"shape {actual.shape}, expected {expected.shape}"
    if expected.ndim == 1:
        return _dense_difference(expected, actual, config)
    for number, (one, other) in enumerate(zip(expected, actual, strict=True)):
        text = _dense_difference(one, other, config)
        if text is not None:
            return f"row {number}: {text}"
    return None


def _dense_difference(expected: Array, actual: Array, config: VectorConfig) -> str | None:
    half = config.datatype == "float16"
    verbatim = _as_half(expected) if half else expected
    text = _exact_difference(verbatim, actual)
    if text is None or config.metric != "Cosine" or config.datatype == "uint8":
        return text
    wide = expected.astype(np.float64)
    square = float(wide @ wide)
    if square < _TINY * 0.99:
        return text
    if square > _HUGE and not actual.any():
        return None
    # Qdrant normalises with a float32 sum of squares, so every component may be off by the same
    # bit (2e-6 at 16,000 dimensions, 4e-7 at 4,096). Component by component is stricter than by
    # angle: 1 - cos <= 1e-6 hides an error of 1e-3.
    wanted = wide / math.sqrt(square)
    tolerance = np.abs(wanted) * (1e-3 if half else 4e-6) + (6e-8 if half else 1e-9)
    wrong = np.flatnonzero(~(np.abs(actual - wanted) <= tolerance))
    if wrong.size == 0:
        return None
    at = int(wrong[0])
    return (
        f"component {at} is {actual[at]!s}, expected {wanted[at]!s} (normalised);"
        f" {wrong.size} of {wanted.size} differ"
    )


def _exact_difference(expected: Array, actual: Array) -> str | None:
    wrong = np.flatnonzero(expected != actual)
    if wrong.size == 0:
        return None
    at = int(wrong[0])
    return (
        f"component {at} is {actual[at]!s}, expected {expected[at]!s};"
        f" {wrong.size} of {expected.size} differ"
    )


def _as_half(values: Array) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)


# --- rows -------------------------------------------------------------------------------------


class _Table:
    """Reads the rows of a table and computes their points."""

    def __init__(self, connection: Connection, table: str, options: Options) -> None:
        self._connection = connection
        self._options = options
        found = connection.execute(
            "SELECT c.oid, c.relkind, n.nspname, c.relname FROM pg_class c"
            " JOIN pg_namespace n ON n.oid = relnamespace WHERE c.oid = to_regclass(%s)",
            (table,),
        ).fetchone()
        if found is None:
            raise OracleError(f"no table {table}")
        self._oid, kind, schema, name = found
        # A table that others inherit from is read with them, unless it is said otherwise.
        only = sql.SQL("ONLY ") if kind == "r" and options.get("only") else sql.SQL("")
        self._from = only + sql.Identifier(str(schema), str(name))
        types = self._types()
        self._key = list(options.get("key") or self._primary_key())
        excluded = options.get("exclude") or ()
        wanted = [name for name in options.get("columns") or types if name not in excluded]
        self._columns = [name for name in types if name in wanted or name in self._key]
        self._types_read = [types[name] for name in self._columns]
        self._payload: list[tuple[int, str, Parse]] = []
        self._vectors: list[tuple[int, str, OracleType]] = []
        for at, (column, type_) in enumerate(zip(self._columns, self._types_read, strict=True)):
            if column in wanted:
                self._plan_column(at, column, type_)
        self._key_at = [self._columns.index(name) for name in self._key]
        self._key_text = [canonical_key(types[name]) for name in self._key]
        self._key_names = [types[name].name for name in self._key]

    @property
    def vectors(self) -> list[str]:
        """Names of the collection's vectors."""
        return [name for _, name, _ in self._vectors]

    def rows(self) -> Iterator[_Expected]:
        """The points the table's rows should have."""
        columns = sql.SQL(", ").join(
            sql.Identifier(name) + sql.SQL(sql_cast(type_))
            for name, type_ in zip(self._columns, self._types_read, strict=True)
        )
        query = sql.SQL("COPY (SELECT {} FROM {}").format(columns, self._from)
        where = self._options.get("where")
        if where:
            query += sql.SQL(" WHERE ") + sql.SQL(where)
        with (
            self._connection.cursor() as cursor,
            cursor.copy(query + sql.SQL(") TO STDOUT")) as copy,
        ):
            for row in copy.rows():
                yield self._expected([None if value is None else str(value) for value in row])

    def _types(self) -> dict[str, OracleType]:
        rows = self._connection.execute(
            "SELECT attname, atttypid FROM pg_attribute"
            " WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            (self._oid,),
        ).fetchall()
        return {str(name): load_type(self._connection, int(str(oid))) for name, oid in rows}

    def _primary_key(self) -> list[str]:
        rows = self._connection.execute(
            "SELECT attname FROM pg_index i, unnest(indkey) WITH ORDINALITY AS k(attnum, place)"
            " JOIN pg_attribute a USING (attnum)"
            " WHERE indrelid = %s AND indisprimary AND attrelid = indrelid ORDER BY place",
            (self._oid,),
        ).fetchall()
        if not rows:
            raise OracleError("the table has no primary key; name the key columns")
        return [str(name) for (name,) in rows]

    def _plan_column(self, at: int, column: str, type_: OracleType) -> None:
        options = self._options
        inner = type_.element if type_.is_array and type_.element is not None else type_
        is_bits = type_.name in ("bit", "varbit") and column in options.get("bit_vectors", ())
        if is_bits or inner.name in ("vector", "halfvec") or type_.name == "sparsevec":
            unnamed = column == options.get("unnamed_vector")
            name = options.get("rename", {}).get(column, column)
            self._vectors.append((at, "" if unnamed else name, type_))
        elif inner.name == "sparsevec":
            raise OracleError(f"column {column}: an array of sparsevec")
        elif not (type_.name == "bytea" and _for(options.get("skip_bytea"), column)):
            parse = parser(type_, _for(options.get("numeric_as_string"), column))
            self._payload.append((at, column, parse))

    def _expected(self, row: list[str | None]) -> _Expected:
        namespace = self._options.get("namespace")
        fields: dict[str, Json] = dict(self._options.get("constants", {}))
        for at, column, parse in self._payload:
            text = row[at]
            if text is None and _for(self._options.get("drop_nulls"), column):
                continue
            name = self._options.get("rename", {}).get(column, column)
            if name in fields:
                raise OracleError(f"two things are called {name}")
            fields[name] = None if text is None else parse(text)
        under = self._options.get("payload_key")
        payload: dict[str, Json] = fields if under is None else {under: fields}
        marks = {"_table": namespace, "_shard": self._options.get("shard")}
        payload.update({name: mark for name, mark in marks.items() if mark is not None})
        vectors: dict[str, Vector] = {}
        for at, name, type_ in self._vectors:
            text = row[at]
            if text is not None and (vector := _vector(text, type_)) is not None:
                vectors[name] = vector
        return _Expected(self._point_id(row, namespace), payload, vectors)

    def _point_id(self, row: list[str | None], namespace: str | None) -> PointId:
        texts: list[str] = []
        for at in self._key_at:
            text = row[at]
            if text is None:
                raise OracleError("a NULL in a key column")
            texts.append(text)
        if self._options.get("ids", "native") != "native":
            try:
                return str(uuid.UUID(texts[0]))
            except ValueError:
                return str(uuid.uuid5(uuid.NAMESPACE_URL, texts[0]))
        if namespace is None and len(texts) == 1:
            if self._key_names[0] == "uuid":
                return texts[0]
            if self._key_names[0] in ("int2", "int4", "int8", "oid") and int(texts[0]) >= 0:
                assert int(texts[0]) <= INT64_MAX
                return int(texts[0])
        key = [parse(text) for parse, text in zip(self._key_text, texts, strict=True)]
        canonical = key if namespace is None else [namespace, key]
        text = json.dumps(canonical, ensure_ascii=False, separators=(",", ":"))
        return str(uuid.uuid5(_NAMESPACE, text))


def _for(option: bool | Sequence[str] | None, column: str) -> bool:
    """Whether an option that is for all columns or for those named is for this one."""
    return bool(option) if option is None or isinstance(option, bool) else column in option


def _vector(text: str, type_: OracleType) -> Vector | None:
    if type_.is_array:
        # {"[1,2]","[3,4]"}: without quotes and escapes it is a JSON array but for the brackets
        rows = orjson.loads("[" + text[text.index("{") + 1 : -1].replace('"', "") + "]")
        return np.array(rows, dtype=np.float32) if rows else None
    if type_.name == "sparsevec":
        indices, values, _ = sparse_items(text)
        return np.array(indices, dtype=np.int64), np.array(values, dtype=np.float32)
    if type_.name in ("bit", "varbit"):
        return np.array([int(bit) for bit in text], dtype=np.float32)
    return np.array(orjson.loads(text), dtype=np.float32)
