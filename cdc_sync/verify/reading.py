"""The rows of a table as a verification reads them: all, some at random, or those of a predicate.

Everything is read by short statements, each under a snapshot of its own, so that a verification
that takes hours keeps no old row versions from being vacuumed. A row that is moved meanwhile, by an
update, may so be read twice or not at all; that it was not read does no harm, since its point is
then looked up by its id.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cdc_sync.errors import CdcSyncError
from cdc_sync.mapping.table import Leaf
from cdc_sync.ops.logging import get_logger
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.control import matching_keys
from cdc_sync.postgres.key_texts import parse_keys
from cdc_sync.postgres.refetch import fetch_rows
from cdc_sync.postgres.sampling import SampledRows, sample_rows
from cdc_sync.postgres.snapshot import copy_query, copy_rows
from cdc_sync.rows import Row
from cdc_sync.sync.retry import is_transient
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.verify.source import SourceReader, one_by_one, patiently

log = get_logger(__name__)

_BATCH_ROWS: Final = 1024
_KEYS: Final = 500
#: Blocks that one statement reads: 32 MB of blocks of 8 kB.
_CHUNK_PAGES: Final = 4_096
#: Draws of places without an end of the sample, before what was found has to do.
_DRAWS: Final = 500


@dataclass(frozen=True, slots=True)
class LeafRows:
    """Rows of one leaf, by name (None: not known of which)."""

    leaf: str | None
    rows: list[Row]


class TableReading:
    """Reads one table over a connection that nothing else uses meanwhile."""

    def __init__(self, planned: PlannedTable, reader: SourceReader) -> None:
        self._planned = planned
        self._reader = reader

    async def all(self) -> AsyncGenerator[LeafRows, None]:
        """Every row, leaf by leaf. Raises :class:`SourceError`."""
        for leaf in self._planned.table.leaves:
            # The table may have grown since its size was read: the last chunk has no end.
            starts = range(0, max(1, leaf.pages), _CHUNK_PAGES)
            for start in starts:
                end = start + _CHUNK_PAGES if start != starts[-1] else None
                async for rows in self.chunk(leaf, start, end):
                    yield rows

    async def chunk(
        self, leaf: Leaf, start: int, end: int | None
    ) -> AsyncGenerator[LeafRows, None]:
        """The rows of a range of blocks (None: to the end). Raises :class:`SourceError`."""
        async for rows in self._chunk(leaf, start, end):
            yield LeafRows(leaf_name(leaf), rows)

    async def _chunk(self, leaf: Leaf, start: int, end: int | None) -> AsyncIterator[list[Row]]:
        query, text = copy_query(self._planned.plan, leaf, start, end, self._planned.selection)

        def begin(connection: PgConnection) -> Iterator[list[Row]]:
            return copy_rows(connection, query, text, batch_rows=_BATCH_ROWS)

        try:
            async for rows in self._reader.batches(begin):
                yield rows
            return
        except CdcSyncError as error:
            if not is_transient(error):
                raise
            log.info("verification_waits", kind=error.kind.value, reason=error.message)
        # What was read of it already is read once more, which does no harm.
        for rows in await patiently(lambda: self._reader.run(lambda c: list(begin(c)))):
            yield rows

    async def sample(self, rows: int, generator: random.Random) -> AsyncGenerator[LeafRows, None]:
        """About so many random rows, each once. Raises :class:`SourceError`."""
        plan = self._planned.plan

        def begin(connection: PgConnection) -> Iterator[list[SampledRows]]:
            leaves = self._planned.table.leaves
            return sample_rows(connection, plan, leaves, self._planned.selection, generator)

        draw = one_by_one(begin)
        seen: set[object] = set()
        for _ in range(_DRAWS):
            portions = await self._reader.run(draw)
            if portions is None or len(seen) >= rows:
                return
            found = [(leaf_name(portion.leaf), row) for portion in portions for row in portion.rows]
            generator.shuffle(found)
            for leaf, row in found[: rows - len(seen)]:
                key = tuple(row[position] for position in plan.key)
                if key not in seen:
                    seen.add(key)
                    yield LeafRows(leaf, [row])

    async def where(
        self, predicate: str, rows_reader: SourceReader
    ) -> AsyncGenerator[LeafRows, None]:
        """The rows for which an SQL predicate is true, in the role's own rights, read by key over
        another connection. Raises :class:`SourceError`."""
        planned = self._planned
        columns = {column.name: column for column in planned.table.columns}
        key = [columns[planned.plan.columns[position].name] for position in planned.plan.key]

        def pages(connection: PgConnection) -> Iterator[list[tuple[str, ...]]]:
            return _pages(matching_keys(connection, planned.table, key, predicate))

        following = one_by_one(pages)
        while (texts := await self._reader.run(following)) is not None:
            rows = await patiently(lambda t=texts: rows_reader.run(lambda c: self._fetch(c, t)))  # type: ignore[misc]
            yield LeafRows(None, rows)

    def _fetch(self, connection: PgConnection, texts: Sequence[tuple[str, ...]]) -> list[Row]:
        plan = self._planned.plan
        keys = parse_keys(connection, [plan.columns[position] for position in plan.key], texts)
        return fetch_rows(connection, plan, keys, (), self._planned.selection)


def _pages(keys: Iterator[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    page: list[tuple[str, ...]] = []
    for key in keys:
        page.append(key)
        if len(page) == _KEYS:
            yield page
            page = []
    if page:
        yield page


def leaf_name(leaf: Leaf) -> str:
    """``schema.name``, unquoted."""
    return f"{leaf.schema}.{leaf.name}"
