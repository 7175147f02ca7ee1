"""Barriers: where the stream has to be before a table is read again.

While the stream is behind, rows of the old columns are still to come and would make the table stale
again. So first it has to come to where the server was when this was seen, or when the last window
ended; and the table must not have been altered since.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from cdc_sync.config import Settings
from cdc_sync.postgres.connect import answering, connect
from cdc_sync.postgres.watch import definitions, source_position, transaction_horizon
from cdc_sync.sync.recent_transactions import RecentTransactions
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.replanning import WindowPostponedError
from cdc_sync.sync.routing import PlannedTable


@dataclass(frozen=True, slots=True)
class _Barrier:
    """Where the stream has to be, and the table's definition before that."""

    lsn: int
    definition: str


class Barriers:
    """One a table, made when it is first asked for. ``recent``: the transactions applied lately,
    told of those that may not be sent."""

    def __init__(
        self, settings: Settings, relations: Relations, recent: Callable[[], RecentTransactions]
    ) -> None:
        self._settings = settings
        self._relations = relations
        self._recent = recent
        self._barriers: dict[int, _Barrier] = {}

    async def reached(self, oid: int, applied: int) -> bool:
        """Whether the stream, which stands at ``applied``, has come to the table's. Raises
        :class:`SourceError`."""
        if oid not in self._barriers:
            self._barriers[oid] = await asyncio.to_thread(self._make, oid)
        return applied >= self._barriers[oid].lsn

    def position(self, planned: PlannedTable) -> int:
        """The position that the stream has reached for the table. Raises
        :class:`WindowPostponedError`, and makes another, if the table was altered since."""
        oid = planned.plan.oid
        if planned.table.definition != self._barriers[oid].definition:
            # Rows of before may still be to come, and a truncated partition's would stay.
            del self._barriers[oid]
            raise WindowPostponedError(f"{planned.name} was altered meanwhile")
        return self._barriers[oid].lsn

    def forget(self, oid: int) -> None:
        """Make another for the table."""
        self._barriers.pop(oid, None)

    def clear(self) -> None:
        """Make others for all tables."""
        self._barriers.clear()

    def _make(self, oid: int) -> _Barrier:
        """The definition first: what it was changed by before is then below the position."""
        with (
            connect(self._settings.source, application_name="cdc_sync watch") as connection,
            answering(connection),
        ):
            definition = definitions(connection, [oid]).get(oid, "")
            position = source_position(connection, self._settings.source.slot)
            if oid in self._relations.unsent:
                self._recent().raise_horizon(transaction_horizon(connection))
                self._relations.unsent.discard(oid)
        return _Barrier(int(position.current), definition)
