"""Dead letters: rows that cannot be written are kept with their reason, and the rest goes on
(invariant 8)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cdc_sync.errors import CdcSyncError, ErrorKind, MappingError
from cdc_sync.mapping.key_values import compile_key_values
from cdc_sync.mapping.migration_ids import SharedIdError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import LetterRetry, Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.qdrant.sink import Applied, DeadLetter, StateStore
from cdc_sync.rows import PointId, Row

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A row that cannot be written, and why.

    ``key`` is that of its dead letter: the point id, or a note where there is none.
    ``key_values`` as :func:`~cdc_sync.mapping.key_values.compile_key_values` gives them.
    """

    key: str
    reason: str
    kind: ErrorKind
    key_values: tuple[str, ...] | None = None


def refusals(
    plan: TablePlan, applied: Applied, rows: Iterable[tuple[PointId, Row]]
) -> list[Refusal]:
    """What was refused of ``rows`` (and perhaps more) that were written by a plan."""
    if not applied.refused:
        return []
    key_values = compile_key_values(plan)
    wanted = {point_id for point_id, _ in applied.refused}
    known = {point_id: key_values(row) for point_id, row in rows if point_id in wanted}
    return [
        Refusal(
            str(point_id),
            reason,
            ErrorKind.MAPPING if point_id in applied.unmappable else ErrorKind.SINK_REFUSED,
            known.get(point_id),
        )
        for point_id, reason in applied.refused
    ]


def letter_of_key(error: MappingError) -> str:
    """The key of the dead letter of a row whose own key has no point id.

    Where the migration tool gave it one, there is a letter for each; else one for all.
    """
    cause = error.__cause__
    if isinstance(cause, SharedIdError):
        return f"(key cannot be mapped: {cause.id})"
    return "(key cannot be mapped)"


def unmapped_key(error: MappingError) -> Refusal:
    """The refusal of a row whose key has no point id."""
    return Refusal(letter_of_key(error), error.message, ErrorKind.MAPPING)


class DeadLetterOffice:
    """Parks dead letters durably, releases those whose rows were written after all, and says when
    the limit is passed."""

    def __init__(
        self, store: StateStore, pipeline: str, limit: int, metrics: Metrics, board: StatusBoard
    ) -> None:
        self._store = store
        self._pipeline = pipeline
        self._limit = limit
        self._metrics = metrics
        self._board = board
        self._parked: dict[tuple[str, str], DeadLetter] = {}
        self._own: set[tuple[str, str]] = set()
        board.set_dead_letter_limit(limit)

    async def open(self) -> None:
        """Read what is parked: others may have parked more, or dropped some. Errors as
        :meth:`StateStore.dead_letters`."""
        letters = await self._store.dead_letters(self._pipeline)
        tables = {table for table, _ in self._parked}
        self._parked = {(letter.table, letter.key): letter for letter in letters}
        self._own &= self._parked.keys()
        self._publish(tables | {table for table, _ in self._parked})

    def holds(self, table: str, point_id: PointId) -> bool:
        """Whether the point's last version is a dead letter."""
        return (table, str(point_id)) in self._parked

    def has_letters(self, table: str) -> bool:
        """Whether there are dead letters of the table."""
        return any(parked == table for parked, _ in self._parked)

    @property
    def pending(self) -> int:
        """Number of dead letters parked."""
        return len(self._parked)

    @property
    def over_limit(self) -> bool:
        """Whether more are parked than may be."""
        return len(self._parked) > self._limit

    def letters(self) -> list[DeadLetter]:
        """What is parked."""
        return list(self._parked.values())

    def is_own(self, letter: DeadLetter) -> bool:
        """Whether this process has parked it."""
        return (letter.table, letter.key) in self._own

    async def park(
        self,
        table: str,
        refused: Sequence[Refusal],
        *,
        lsn: int,
        commit_time: float,
        retried: bool = False,
    ) -> None:
        """Keep rows of a table that cannot be written; see :meth:`check_limit`.

        ``commit_time`` in Unix seconds, 0: now. ``retried``: the rows were read again, so that
        those that were dead letters are not counted once more. Errors as of the state store.
        """
        if not refused:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        when = datetime.fromtimestamp(commit_time or time.time(), UTC).isoformat()
        letters = [self._letter(table, one, str(Lsn(lsn)), when, now) for one in refused]
        try:
            await self._store.park(letters)
        except CdcSyncError:
            self._metrics.dead_letter_failures.inc()
            raise
        for letter in letters:
            again = (letter.table, letter.key) in self._parked
            self._parked[letter.table, letter.key] = letter
            self._own.add((letter.table, letter.key))
            if not (retried and again):
                kind = ErrorKind(letter.kind)
                log.warning(
                    "dead_letter",
                    table=table,
                    lsn=letter.lsn,
                    kind=letter.kind,
                    reason=letter.reason,
                    attempts=letter.attempts,
                )
                self._metrics.add_table(table).dead_letters[kind].inc()
        self._publish({table})

    def _letter(self, table: str, refusal: Refusal, lsn: str, when: str, now: str) -> DeadLetter:
        before = self._parked.get((table, refusal.key))
        return DeadLetter(
            self._pipeline,
            table,
            refusal.key,
            lsn,
            when,
            refusal.reason,
            kind=refusal.kind.value,
            attempts=1 if before is None else before.attempts + 1,
            first_seen=now if before is None else before.first_seen or now,
            last_seen=now,
            key_values=refusal.key_values,
        )

    async def check_limit(self) -> None:
        """Raise DEAD_LETTER_LIMIT if more are parked than may be. Errors as of :meth:`open`."""
        if not self.over_limit:
            return
        await self.open()  # some may have been dropped
        if self.over_limit:
            raise CdcSyncError(
                ErrorKind.DEAD_LETTER_LIMIT,
                f"{len(self._parked)} rows could not be written, the limit is {self._limit} "
                "(pipeline.dead_letter_limit); the latest reason is in the log",
            )

    async def release(self, table: str, written: Iterable[PointId]) -> None:
        """Forget dead letters of points that have been written or deleted since."""
        if not self._parked:
            return
        await self._release(
            table,
            [key for point_id in written if (key := (table, str(point_id))) in self._parked],
        )

    async def release_table(self, table: str) -> None:
        """Forget the table's dead letters: all of its rows are going to be read again, or are
        gone."""
        await self._release(table, [key for key in self._parked if key[0] == table])

    async def _release(self, table: str, keys: Sequence[tuple[str, str]]) -> None:
        if not keys:
            return
        await self._store.release(self._pipeline, keys)
        for key in keys:
            self._parked.pop(key, None)
            self._own.discard(key)
        log.info("dead_letters_released", table=table, rows=len(keys))
        self._publish({table})

    def count_retries(self, table: str, results: Mapping[LetterRetry, int]) -> None:
        """Count dead letters whose rows were read again."""
        bound = self._metrics.add_table(table).dead_letter_retries
        for result, rows in results.items():
            bound[result].inc(rows)
        if any(results.values()):
            fields: dict[str, object] = {str(result): rows for result, rows in results.items()}
            log.info("dead_letters_retried", table=table, **fields)

    def _publish(self, tables: Iterable[str]) -> None:
        for table in tables:
            count = sum(1 for parked, _ in self._parked if parked == table)
            self._metrics.add_table(table).dead_letters_pending.set(count)
            self._board.table(table).update(dead_letters=count)
