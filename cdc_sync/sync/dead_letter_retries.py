"""When rows that could not be written are tried again: at the start, when the plan of their table
or the configuration of its collection changes, and every so often.

They are read as they are now and written under the running stream, in the place of a batch, exactly
as rows that somebody asked to be read again; so the order of what is written to a point holds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Final

from cdc_sync.errors import SinkError
from cdc_sync.mapping.key_values import key_values_of_id
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.ops.logging import get_logger
from cdc_sync.qdrant.sink import DeadLetter, Sink
from cdc_sync.sync.control import Key, ResyncRows
from cdc_sync.sync.dead_letters import DeadLetterOffice
from cdc_sync.sync.gather import Batch
from cdc_sync.sync.retry import is_sink_trouble
from cdc_sync.sync.routing import PlannedTable

log = get_logger(__name__)

#: Rows read at once: the stream goes on in between.
BATCH_KEYS: Final = 100
#: How often dead letters are gone through, and how often their record and their collections are
#: looked at, for what others have changed.
SCAN_SECONDS: Final = 1.0
LOOK_SECONDS: Final = 30.0
_LOOK_TIMEOUT_SECONDS: Final = 5.0
#: When rows are asked for again that were not tried after all: because the stream ended, or because
#: they cannot be read by themselves at the moment.
_POSTPONED_SECONDS: Final = 300.0


def readable_key(letter: DeadLetter, plan: TablePlan) -> Key | None:
    """The key by which the row of a dead letter can be read again; None if there is none."""
    values = letter.key_values
    if values is None:
        values = key_values_of_id(plan, letter.key)
    return values if values is not None and len(values) == len(plan.key) else None


class LetterRetries:
    """Knows which dead letters are to be tried again.

    ``tables()`` gives the tables with the plans in force, ``stale()`` the OIDs of those that are
    going to be read as a whole, which takes care of their dead letters. ``interval_seconds``: time
    between two tries, 0 for no further one.
    """

    def __init__(
        self,
        office: DeadLetterOffice,
        sink: Sink,
        tables: Callable[[], Iterable[PlannedTable]],
        stale: Callable[[], Collection[int]],
        interval_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._office = office
        self._sink = sink
        self._tables = tables
        self._stale = stale
        self._interval = interval_seconds or float("inf")
        self._clock = clock
        self._due: dict[tuple[str, str], float] = {}
        self._plans: dict[int, TablePlan] = {}
        self._configurations: dict[int, str] = {}
        self._next_scan = 0.0
        self._next_look = 0.0

    async def next(self, lsn: int) -> Batch | None:
        """Return rows to read again now, as a batch of its own, if there are any; ``lsn`` is where
        the stream stands. To be called with the applier at rest."""
        now = self._clock()
        if now < self._next_scan:
            return None
        self._next_scan = now + SCAN_SECONDS
        if not self._office.pending:
            self._due.clear()
            return None
        if now >= self._next_look and not await self._look(now):
            return None
        self._note_plans()
        self._note_letters(now)
        stale = self._stale()
        for planned in self._tables():
            if planned.plan.oid in stale:
                continue
            for request in self._requests(planned, now):
                # There may be more of them at once.
                self._next_scan = now
                self._put_off(request, now + min(self._interval, _POSTPONED_SECONDS))
                return Batch(rereads=(request,), last_lsn=lsn, last_commit=time.time())
        return None

    def requests(self) -> Sequence[ResyncRows]:
        """All rows that can be read again, due or not, also of stale tables."""
        return [r for planned in self._tables() for r in self._requests(planned, None)]

    def tried(self, request: ResyncRows) -> None:
        """The rows of a request were read and tried."""
        self._put_off(request, self._clock() + self._interval)

    # -- what changes

    async def _look(self, now: float) -> bool:
        """See what others have changed; False if Qdrant does not say now."""
        self._next_look = now + LOOK_SECONDS
        held = {letter.table for letter in self._office.letters()}
        try:
            # These rows have time: whoever writes waits for Qdrant if it is away.
            async with asyncio.timeout(_LOOK_TIMEOUT_SECONDS):
                await self._office.open()
                for planned in self._tables():
                    if planned.name in held:
                        found = await self._sink.configuration(planned.plan)
                        self._note_configuration(planned, found)
        except TimeoutError:
            log.debug("dead_letters_not_read", reason="Qdrant does not answer")
            return False
        except SinkError as error:
            if not is_sink_trouble(error):
                raise
            log.debug("dead_letters_not_read", kind=error.kind.value, reason=error.message)
            return False
        return True

    def _note_configuration(self, planned: PlannedTable, found: str) -> None:
        before = self._configurations.get(planned.plan.oid)
        self._configurations[planned.plan.oid] = found
        if before is not None and before != found:
            self._hasten(planned, "the collection's configuration has changed")

    def _note_plans(self) -> None:
        for planned in self._tables():
            before = self._plans.get(planned.plan.oid)
            self._plans[planned.plan.oid] = planned.plan
            if before is not None and before is not planned.plan and before != planned.plan:
                self._hasten(planned, "the table's columns have changed")

    def _note_letters(self, now: float) -> None:
        """Those that an earlier life or another process has parked are due at once."""
        known = self._due
        self._due = {}
        for letter in self._office.letters():
            first = now + self._interval if self._office.is_own(letter) else now
            name = letter.table, letter.key
            self._due[name] = known.get(name, first)

    def _hasten(self, planned: PlannedTable, reason: str) -> None:
        names = [name for name in self._due if name[0] == planned.name]
        if names:
            log.info("dead_letters_due", table=planned.name, rows=len(names), reason=reason)
        for name in names:
            self._due[name] = 0.0

    # -- what is read

    def _requests(self, planned: PlannedTable, due: float | None) -> Iterator[ResyncRows]:
        """The table's dead letters, those that are ``due`` by then or all of them, in parts."""
        keys = dict.fromkeys(
            key
            for letter in self._office.letters()
            if letter.table == planned.name
            and (due is None or self._due[letter.table, letter.key] <= due)
            and (key := readable_key(letter, planned.plan)) is not None
        )
        listed = list(keys)
        for start in range(0, len(listed), BATCH_KEYS):
            yield ResyncRows(planned, tuple(listed[start : start + BATCH_KEYS]), retry=True)

    def _put_off(self, request: ResyncRows, until: float) -> None:
        planned, keys = request.planned, set(request.keys)
        for letter in self._office.letters():
            if letter.table == planned.name and readable_key(letter, planned.plan) in keys:
                self._due[letter.table, letter.key] = until
