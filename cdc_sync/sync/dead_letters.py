"""Dead letters: rows that cannot be written are kept with their reason, and the rest goes on
(invariant 8)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from cdc_sync.errors import CdcSyncError, ErrorKind, MappingError
from cdc_sync.mapping.migration_ids import SharedIdError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.qdrant.sink import DeadLetter, StateStore
from cdc_sync.rows import PointId

log = get_logger(__name__)


def letter_of_key(error: MappingError) -> str:
    """The key of the dead letter of a row whose own key has no point id.

    Where the migration tool gave it one, there is a letter for each; else one for all.
    """
    cause = error.__cause__
    if isinstance(cause, SharedIdError):
        return f"(key cannot be mapped: {cause.id})"
    return "(key cannot be mapped)"


class DeadLetterOffice:
    """Parks dead letters durably, releases those whose rows were written after all, and stops at
    the limit."""

    def __init__(
        self, store: StateStore, pipeline: str, limit: int, metrics: Metrics, board: StatusBoard
    ) -> None:
        self._store = store
        self._pipeline = pipeline
        self._limit = limit
        self._metrics = metrics
        self._board = board
        self._parked: set[tuple[str, str]] = set()

    async def open(self) -> None:
        """Read what is parked. Errors as :meth:`StateStore.dead_letters`."""
        letters = await self._store.dead_letters(self._pipeline)
        self._parked = {(letter.table, letter.key) for letter in letters}
        self._publish({table for table, _ in self._parked})

    def holds(self, table: str, point_id: PointId) -> bool:
        """Whether the point's last version is a dead letter."""
        return (table, str(point_id)) in self._parked

    @property
    def pending(self) -> int:
        """Number of dead letters parked."""
        return len(self._parked)

    async def park(
        self,
        table: str,
        refused: Sequence[tuple[str, str]],
        *,
        lsn: int,
        commit_time: float,
        kind: ErrorKind = ErrorKind.SINK_REFUSED,
    ) -> None:
        """Keep (key, reason) pairs of a table. Raises DEAD_LETTER_LIMIT when the limit is passed
        (they are kept even so)."""
        if not refused:
            return
        when = datetime.fromtimestamp(commit_time or time.time(), UTC).isoformat()
        letters = [
            DeadLetter(self._pipeline, table, key, str(Lsn(lsn)), when, reason)
            for key, reason in refused
        ]
        try:
            await self._store.park(letters)
        except CdcSyncError:
            self._metrics.dead_letter_failures.inc()
            raise
        for letter in letters:
            self._parked.add((letter.table, letter.key))
            log.warning("dead_letter", table=table, lsn=letter.lsn, reason=letter.reason)
        self._metrics.add_table(table).dead_letters[kind].inc(len(letters))
        self._publish({table})
        if len(self._parked) > self._limit:
            raise CdcSyncError(
                ErrorKind.DEAD_LETTER_LIMIT,
                f"{len(self._parked)} rows could not be written, the limit is {self._limit} "
                "(pipeline.dead_letter_limit); the latest reason is in the log",
            )

    async def release(self, table: str, written: Iterable[PointId]) -> None:
        """Forget dead letters of points that have been written or deleted since."""
        if not self._parked:
            return
        done = [key for point_id in written if (key := (table, str(point_id))) in self._parked]
        if done:
            await self._store.release(self._pipeline, done)
            self._parked.difference_update(done)
            self._publish({table})

    async def release_table(self, table: str) -> None:
        """Forget the table's dead letters: all of its rows are going to be read again, or are
        gone."""
        held = [(parked, key) for parked, key in self._parked if parked == table]
        if held:
            await self._store.release(self._pipeline, held)
            self._parked.difference_update(held)
            self._publish({table})

    def _publish(self, tables: Iterable[str]) -> None:
        for table in tables:
            count = sum(1 for parked, _ in self._parked if parked == table)
            self._metrics.add_table(table).dead_letters_pending.set(count)
            self._board.table(table).update(dead_letters=count)
