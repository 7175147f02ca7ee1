"""What is on record of the pipeline's tables: whether each has been copied, and by what plan."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import TypeAlias

from cdc_sync.config import SourceSettings
from cdc_sync.errors import StateError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.postgres.exclusive import lock_records
from cdc_sync.qdrant.sink import PipelineState, StateStore, TableRebuild, TableState
from cdc_sync.sync.fingerprints import as_defined, as_stale, fingerprint, stale_fingerprint
from cdc_sync.sync.opening import opening
from cdc_sync.sync.routing import PlannedTable

_Tables: TypeAlias = tuple[TableState, ...]


class TableRecords:
    """Reads and writes the tables' part of the pipeline's record. Errors as of the state store.

    ``source``: other processes may write it too (one that waits for the slot lets tables join,
    while one that has the slot marks others), so each change is made under a lock there; errors
    of that as of :func:`~cdc_sync.postgres.exclusive.lock_records`. None: there are no others.
    """

    def __init__(self, store: StateStore, pipeline: str, source: SourceSettings | None) -> None:
        self._source = source
        self._store = store
        self._changing = asyncio.Lock()
        self._pipeline = pipeline

    async def load(self) -> PipelineState | None:
        """The pipeline's record."""
        return await self._store.load(self._pipeline)

    async def save(self, state: PipelineState) -> None:
        """Replace the pipeline's record as a whole."""
        async with self._changing, self._alone():
            await self._store.save(state)

    async def copied(self, planned: PlannedTable, *, stale: bool = False) -> None:
        """The table has been copied as a whole, by this plan; ``stale``: and must be once more."""
        text = stale_fingerprint(planned) if stale else fingerprint(planned)
        await self._change(planned, plan_fingerprint=text, copied=True)

    async def defined(self, definitions: Mapping[str, str]) -> None:
        """Tables, by name, are defined so by now, and nothing need be read for that."""
        await self._update(
            lambda tables: tuple(
                dataclasses.replace(
                    t, plan_fingerprint=as_defined(t.plan_fingerprint, definitions[t.table])
                )
                if t.copied and t.table in definitions
                else t
                for t in tables
            )
        )

    async def reading(self, planned: PlannedTable, lsn: int, *, rows: bool) -> None:
        """The table's points are going to be looked through, and its ``rows`` be read if so, with
        the stream at ``lsn`` or beyond."""
        await self._change(planned, swept_lsn=lsn, **({"read_lsn": lsn} if rows else {}))

    async def stale(self, planned: PlannedTable) -> None:
        """The table must be copied again."""
        await self._change(planned, plan_fingerprint=stale_fingerprint(planned))

    async def stopped(self, table: str) -> None:
        """The table of this name has stopped, so it must be copied again. Raises
        :class:`StateError` when there is no record to say so in."""
        if await self.load() is None:
            raise StateError(
                f"the record of pipeline {self._pipeline!r} is gone",
                "Restore it from a backup, or copy anew with --migration.restart.",
            )
        await self._update(
            lambda tables: tuple(
                dataclasses.replace(t, plan_fingerprint=as_stale(t.plan_fingerprint))
                if t.table == table
                else t
                for t in tables
            )
        )

    async def recreated(self, planned: PlannedTable) -> None:
        """The table was created again, and must be copied."""
        await self._change(
            planned, plan_fingerprint=stale_fingerprint(planned), oid=planned.plan.oid
        )

    async def all_stale(self) -> None:
        """All tables that were copied must be copied again."""
        await self._update(
            lambda tables: tuple(
                dataclasses.replace(t, plan_fingerprint=as_stale(t.plan_fingerprint))
                for t in tables
            )
        )

    async def add(self, added: Iterable[PlannedTable]) -> None:
        """Tables join the pipeline, not copied yet."""
        new = tuple(table_state(planned, copied=False) for planned in added)
        await self._update(lambda tables: tables + new)

    async def rebuilt(self, new: TableState) -> None:
        """The table is kept in another collection from here on, by other settings."""
        await self._replace(new.table, lambda _: new)

    async def rebuild(self, table: str, change: Callable[[TableRebuild], TableRebuild]) -> None:
        """Change what is on record of the table's rebuilds."""
        await self._replace(
            table,
            lambda t: dataclasses.replace(t, rebuild=change(t.rebuild or TableRebuild(""))),
        )

    async def _replace(self, table: str, change: Callable[[TableState], TableState]) -> None:
        await self._update(
            lambda tables: tuple(change(t) if t.table == table else t for t in tables)
        )

    async def _change(self, planned: PlannedTable, **changes: object) -> None:
        await self._update(
            lambda tables: tuple(
                dataclasses.replace(t, **changes) if t.table == planned.name else t  # type: ignore[arg-type]
                for t in tables
            )
        )

    async def _update(self, change: Callable[[_Tables], _Tables]) -> None:
        """Load, change and save, one at a time. Nothing is written where nothing changes."""
        async with self._changing:
            state = await self.load()
            if state is None or change(state.tables) == state.tables:
                return
            async with self._alone():
                state = await self.load()
                if state is not None:
                    tables = change(state.tables)
                    await self._store.save(dataclasses.replace(state, tables=tables))

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        if self._source is None:
            yield
            return
        lock = await opening(lock_records, self._source, self._pipeline)
        try:
            yield
        finally:
            await asyncio.to_thread(lock.close)


def table_state(planned: PlannedTable, *, copied: bool) -> TableState:
    """The record of one table."""
    return TableState(
        planned.name,
        planned.plan.collection,
        fingerprint(planned),
        copied,
        planned.plan.oid,
        vector_columns(planned.plan),
    )


def vector_columns(plan: TablePlan) -> tuple[str, ...]:
    """Names of the columns that are vectors of the collection."""
    return tuple(column.name for column in plan.columns if column.vector is not None)
