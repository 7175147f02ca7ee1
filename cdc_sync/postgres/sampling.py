"""Random rows of a table, every row as likely as any other, without reading it as a whole.

Places where a row can lie (a block, and a line in it) are drawn at random and looked at; each row
that is visible lies at exactly one. ``TABLESAMPLE SYSTEM`` would return whole blocks, whose rows
were often written together, and ``BERNOULLI`` reads everything.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import psycopg

from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.table import Leaf
from cdc_sync.postgres.connect import PgConnection, translate
from cdc_sync.postgres.copy_binary import copy_rows
from cdc_sync.postgres.identifiers import qualified
from cdc_sync.postgres.snapshot import select_list
from cdc_sync.rows import Row

#: Places looked at by one statement.
_PLACES: Final = 4096
#: Headers of a page and of a tuple, and a line pointer: src/include/access/htup_details.h,
#: MaxHeapTuplesPerPage.
_PAGE_HEADER: Final = 24
_ROW_BYTES: Final = 24 + 4
_SIZES: Final = """
SELECT l.oid, coalesce(pg_relation_size(l.oid::regclass), 0)
         / current_setting('block_size')::int8, current_setting('block_size')::int4
  FROM unnest(%s::oid[]) l (oid)
"""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Rows of one leaf, and how many places were looked at to find them."""

    leaf: Leaf
    rows: list[Row]
    places: int


def sample_rows(
    conn: PgConnection,
    plan: TablePlan,
    leaves: Sequence[Leaf],
    row_filter: str | None,
    generator: random.Random,
) -> Iterator[list[SampledRows]]:
    """Yield draws without end, each of all leaves and possibly without a row; none where all leaves
    are empty.

    A row can come more than once. The connection must be in autocommit mode; it is idle whenever a
    draw is yielded. Raises :class:`SourceError`.
    """
    sizes = _sizes(conn, leaves)
    blocks = [sizes[leaf.oid][0] for leaf in leaves]
    if not any(blocks):
        return
    lines = (next(iter(sizes.values()))[1] - _PAGE_HEADER) // _ROW_BYTES
    while True:
        chosen = generator.choices(range(len(leaves)), blocks, k=_PLACES)
        draw = []
        for number, leaf in enumerate(leaves):
            places = {
                (generator.randrange(blocks[number]), generator.randint(1, lines))
                for _ in range(chosen.count(number))
            }
            if not places:
                continue
            query, text = _query(plan, leaf, sorted(places), row_filter)
            rows = [row for batch in copy_rows(conn, query, text) for row in batch]
            draw.append(SampledRows(leaf, rows, len(places)))
        yield draw


def _sizes(conn: PgConnection, leaves: Sequence[Leaf]) -> dict[int, tuple[int, int]]:
    try:
        rows = conn.execute(_SIZES, ([leaf.oid for leaf in leaves],)).fetchall()
    except psycopg.Error as exc:
        raise translate(exc, "reading the sizes of tables") from exc
    return {int(oid): (int(blocks), int(size)) for oid, blocks, size in rows}


def _query(
    plan: TablePlan, leaf: Leaf, places: Sequence[tuple[int, int]], row_filter: str | None
) -> tuple[str, tuple[bool, ...]]:
    listed, text = select_list(plan)
    tids = ",".join(f'"({block},{line})"' for block, line in places)
    condition = f"ctid = ANY ('{{{tids}}}'::pg_catalog.tid[])"
    if row_filter is not None:
        condition += f" AND ({row_filter})"
    source = f"ONLY {qualified(leaf.schema, leaf.name)}"
    return f"SELECT {listed} FROM {source} WHERE {condition}", text
