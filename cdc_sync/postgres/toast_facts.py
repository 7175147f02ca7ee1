"""Where the vectors of a table lie: in its rows, or out of line (TOAST). Told from a small sample.

pgoutput does not send a value that lies out of line and was not changed, so this decides what an
update of other columns carries, and what REPLICA IDENTITY FULL would cost. Values are not read:
``pg_column_size`` looks at the pointer only.

From Postgres 17 on the server says where a value lies. Before, it follows from the sizes by the
rule of the toaster (``heap_toast_insert_or_update`` in src/backend/access/heap/heaptoast.c): while
a row is longer than ``toast_tuple_target`` its longest value goes out of line.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import psycopg

from cdc_sync.mapping.table import Column, Leaf, Table
from cdc_sync.postgres.connect import PgConnection, translate
from cdc_sync.postgres.identifiers import qualified, quote_ident

_CHUNK_ID_SINCE: Final = 170000
#: Blocks looked at in a leaf, rows taken of a block, and leaves looked at (the largest).
_BLOCKS: Final = 8
_ROWS: Final = 32
_LEAVES: Final = 4

_TOAST_TARGET: Final = 2032
#: Values with storage "main" stay as long as the row fits a page.
_MAIN_TARGET: Final = 8160
_ROW_HEADER: Final = 24
_POINTER: Final = 18
#: What is not worth moving: MAXALIGN(TOAST_POINTER_SIZE).
_SMALLEST: Final = 24
#: Record headers of an update and of its commit, in WAL.
_WAL_HEADERS: Final = 120


@dataclass(frozen=True, slots=True)
class ColumnPlace:
    """Where a column's values lie: of ``rows`` that are not NULL, how many are ``out_of_line``, and
    their bytes on average."""

    name: str
    storage: str
    rows: int
    out_of_line: int
    mean_bytes: float


@dataclass(frozen=True, slots=True)
class ToastFacts:
    """What a sample of a table shows.

    ``rows`` were looked at. ``row_bytes`` is what lies in the row itself on average, ``all_bytes``
    what all its values take. ``columns`` are those that were asked for.
    """

    rows: int
    row_bytes: float
    all_bytes: float
    columns: tuple[ColumnPlace, ...]

    @property
    def full_identity_factor(self) -> float:
        """How many times the WAL an update of other columns would take with REPLICA IDENTITY FULL,
        which logs the whole old row, about."""
        update = self.row_bytes + _WAL_HEADERS
        return (update + self.all_bytes) / update


def toast_facts(
    conn: PgConnection, table: Table, readable: Sequence[str], wanted: Sequence[str]
) -> ToastFacts:
    """Look at some rows of the largest leaves; about the columns ``wanted``, by the sizes of those
    that are ``readable``. Without rows all numbers are 0.

    Raises :class:`~cdc_sync.errors.SourceError`.
    """
    columns = [column for column in table.columns if column.name in readable]
    leaves = sorted(table.leaves, key=lambda leaf: leaf.pages, reverse=True)[:_LEAVES]
    sample: list[_Row] = []
    try:
        for leaf in leaves:
            sample += _sample(conn, leaf, columns)
    except psycopg.Error as exc:
        raise translate(exc, f"sampling table {table.qualified_name}") from exc
    places = []
    for position, column in enumerate(columns):
        if column.name not in wanted:
            continue
        stored = [row for row in sample if row.sizes[position] is not None]
        out = sum(position in row.out for row in stored)
        size = _mean([row.sizes[position] or 0 for row in stored])
        places.append(ColumnPlace(column.name, column.storage, len(stored), out, size))
    return ToastFacts(
        rows=len(sample),
        row_bytes=_mean([row.inline for row in sample]),
        all_bytes=_mean([row.total for row in sample]),
        columns=tuple(places),
    )


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True, slots=True)
class _Row:
    """Sizes of a row's values, None for NULL, and the positions of those out of line."""

    sizes: tuple[int | None, ...]
    out: frozenset[int]

    @property
    def total(self) -> int:
        return _ROW_HEADER + sum(size or 0 for size in self.sizes)

    @property
    def inline(self) -> int:
        return self.total - sum((self.sizes[i] or 0) - _POINTER for i in self.out)


_LEAF: Final = """
SELECT c.reltoastrelid <> 0,
       coalesce((SELECT o.option_value::int4 FROM pg_options_to_table(c.reloptions) o
                  WHERE o.option_name = 'toast_tuple_target'), %s),
       pg_relation_size(c.oid) / current_setting('block_size')::int8
  FROM pg_class c WHERE c.oid = %s::oid
"""


def _sample(conn: PgConnection, leaf: Leaf, columns: Sequence[Column]) -> Iterator[_Row]:
    found = conn.execute(_LEAF, (_TOAST_TARGET, leaf.oid)).fetchone()
    if found is None or not columns:
        return
    toasted, target, blocks = found
    told = conn.info.server_version >= _CHUNK_ID_SINCE
    listed = [f"pg_column_size({quote_ident(column.name)})" for column in columns]
    if told:
        listed += [
            # Only of types with values of any length, which have storage other than plain.
            f"pg_column_toast_chunk_id({quote_ident(c.name)}) IS NOT NULL"
            if c.storage != "p"
            else "false"
            for c in columns
        ]
    source = f"ONLY {qualified(leaf.schema, leaf.name)}"
    # Which rows it is must not differ from one check to the next.
    chosen = random.Random(leaf.oid).sample(range(blocks), min(_BLOCKS, blocks))
    for block in sorted(chosen):
        rows = conn.execute(
            f"SELECT {', '.join(listed)} FROM {source} WHERE ctid >= '({block},0)'"
            f" AND ctid < '({block + 1},0)' LIMIT {_ROWS}".encode()
        ).fetchall()
        for row in rows:
            sizes = row[: len(columns)]
            if told:
                out = {i for i, is_out in enumerate(row[len(columns) :]) if is_out}
            else:
                storages = [column.storage for column in columns]
                out = out_of_line(sizes, storages, target) if toasted else set()
            yield _Row(sizes, frozenset(out))


def out_of_line(
    sizes: Sequence[int | None], storages: Sequence[str], target: int = _TOAST_TARGET
) -> set[int]:
    """Positions of the values that the toaster moves out of line, by their sizes in bytes as
    ``pg_column_size`` tells them (None: NULL) and ``attstorage`` of the columns."""
    length = _ROW_HEADER + sum(size or 0 for size in sizes)
    out: set[int] = set()
    for movable, limit in (("ex", target), ("m", _MAIN_TARGET)):
        while length > limit:
            rest = [
                (size, i)
                for i, size in enumerate(sizes)
                if size is not None and size > _SMALLEST and storages[i] in movable and i not in out
            ]
            if not rest:
                break
            size, position = max(rest)
            out.add(position)
            length -= size - _POINTER
    return out
