"""Reading rows by key as they are now, for the applier, over one connection that is kept open.

What is read may be written iff every transaction applied so far that wrote these rows is visible to
the read (design, section 5.4): a commit is streamed before it is visible. What came before the
read and is applied after it converges, as every replay does.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from cdc_sync.config import SourceSettings
from cdc_sync.errors import SourceError
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.ops.logging import get_logger
from cdc_sync.postgres.connect import PgConnection, connect, interrupt
from cdc_sync.postgres.key_texts import horizon_passed, parse_keys
from cdc_sync.postgres.refetch import TableRedefinedError, fetch_rows
from cdc_sync.postgres.shards import shard_filter
from cdc_sync.rows import PointId, RawValue, Row
from cdc_sync.sync.control import ResyncRows
from cdc_sync.sync.recent_transactions import RecentTransactions

log = get_logger(__name__)

T = TypeVar("T")

_FETCH_TIMEOUT_SECONDS: Final = 60.0
#: How long rows that were asked for may hold up the stream, since the table can be read as a whole
#: instead.
_REREAD_TIMEOUT_SECONDS: Final = 10.0
_HORIZON_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Reread:
    """What became of keys: rows that are there, and ids of keys that have no row."""

    rows: list[tuple[PointId, Row]]
    absent: list[PointId]


class RowReader:
    """Reads rows by key. ``recent()`` gives the transactions applied lately."""

    def __init__(self, source: SourceSettings, recent: Callable[[], RecentTransactions]) -> None:
        self._source = source
        self._recent = recent
        self._connection: PgConnection | None = None
        self._lock = threading.Lock()
        self._hopeless = 0

    def fetch(
        self,
        plan: TablePlan,
        row_filter: str | None,
        keys: Sequence[Sequence[RawValue]],
        xids: Collection[int],
    ) -> list[Row]:
        """Read rows once the transactions with these 32-bit ids are visible. Blocking. Raises as
        :func:`fetch_rows`."""

        def read(connection: PgConnection) -> list[Row]:
            return fetch_rows(
                connection, plan, keys, xids, row_filter, timeout_seconds=_FETCH_TIMEOUT_SECONDS
            )

        return self._using(read)

    async def reread(self, request: ResyncRows, xids: Collection[int]) -> Reread | None:
        """Read the rows of a request; ``xids`` are transactions that must be visible besides those
        applied lately.

        None: they cannot be read by themselves, since the columns have changed, or transactions
        that may have been applied stay open on the server; the table must be read as a whole.
        Raises :class:`KeyTextError` when a key is no key, and :class:`SourceError`.
        """
        recent = self._recent()
        wanted = recent.pending() | set(xids)
        horizon = recent.horizon
        return await asyncio.to_thread(
            self._using, lambda connection: self._reread(connection, request, wanted, horizon)
        )

    def close(self) -> None:
        """Close the connection. A thread may still wait on it, since threads cannot be cancelled:
        it is interrupted, and closes the connection itself."""
        if self._lock.acquire(blocking=False):
            if self._connection is not None:
                self._connection.close()
            self._lock.release()
        elif self._connection is not None:
            interrupt(self._connection)

    def _using(self, read: Callable[[PgConnection], T]) -> T:
        with self._lock:
            if self._connection is None:
                self._connection = connect(self._source, application_name="cdc_sync read")
            try:
                return read(self._connection)
            except SourceError:
                self._connection.close()
                self._connection = None
                raise

    def _reread(
        self, connection: PgConnection, request: ResyncRows, xids: Collection[int], horizon: int
    ) -> Reread | None:
        planned = request.planned
        plan = planned.plan
        point_id = compile_point_id(plan)
        # Once waited for in vain, an old transaction does not hold up the stream again.
        patience = 0.0 if horizon == self._hopeless else _HORIZON_SECONDS
        try:
            keys = _parse_keys(connection, request)
            if not horizon_passed(connection, horizon, patience):
                self._hopeless = horizon
                log.info(
                    "rows_not_readable", table=planned.name, reason="old transactions are open"
                )
                return None
            rows = fetch_rows(
                connection,
                plan,
                keys,
                xids,
                planned.selection,
                timeout_seconds=_REREAD_TIMEOUT_SECONDS,
            )
        except TableRedefinedError as error:
            log.info("rows_not_readable", table=planned.name, reason=error.message)
            return None
        except SourceError as error:
            if connection.broken or connection.closed:
                raise
            log.info("rows_not_readable", table=planned.name, reason=error.message)
            return None
        found = [(point_id(row), row) for row in rows]
        ids = {found_id for found_id, _ in found}
        wanted = {point_id(_key_row(plan, key)) for key in keys}
        return Reread(found, [i for i in wanted if i not in ids])


def _parse_keys(connection: PgConnection, request: ResyncRows) -> list[tuple[bytes, ...]]:
    """The keys as raw values, without those whose rows another pipeline keeps: their points are not
    ours to remove."""
    plan = request.planned.plan
    columns = [plan.columns[position] for position in plan.key]
    condition = None
    if plan.shard is not None:
        names = [column.name for column in columns]
        condition = shard_filter(request.planned.table, names, plan.shard)
    return parse_keys(connection, columns, request.keys, condition)


def _key_row(plan: TablePlan, key: Sequence[bytes]) -> Row:
    """A row of which only the key is known."""
    row: Row = [None] * len(plan.columns)
    for position, value in zip(plan.key, key, strict=True):
        row[position] = value
    return row
