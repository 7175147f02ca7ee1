"""How far the pipeline is: whether it runs, and when its stream has passed a position."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.errors import MappingError, SourceError
from cdc_sync.mapping.ids import compile_key_id
from cdc_sync.pgoutput import messages as m
from cdc_sync.pgoutput.decode import Decoder
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.counting import changes_waiting
from cdc_sync.postgres.key_texts import horizon_passed
from cdc_sync.postgres.row_versions import SettledPosition, settled_position
from cdc_sync.postgres.slot import SlotInfo, read_slot
from cdc_sync.postgres.unconfirmed import unconfirmed_frames
from cdc_sync.rows import PointId, Row
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.verify.source import SourceReader, patiently

_POLL_SECONDS: Final = 0.1
#: How long transactions may stay open that rows which are not visible may come from.
_HORIZON_SECONDS: Final = 5.0
#: Changes behind a stopped pipeline's slot that are looked through, and for how long, at most.
_PEEKED: Final = 1_000_000
_PEEK_SECONDS: Final = 120.0


class Passed(enum.Enum):
    """What became of waiting for a position."""

    YES = "yes"  #: the stream has applied everything up to it
    NOBODY = "nobody"  #: nothing streams from the slot
    STALLED = "stalled"  #: something does, and does not get on
    NO_SLOT = "no slot"  #: there is none, or it has lost changes: nothing will ever come


class StreamWatch:
    """Watches the pipeline's slot. ``patience_seconds``: how long it may stand still before it
    counts as stalled."""

    def __init__(
        self,
        settings: Settings,
        reader: SourceReader,
        patience_seconds: float,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._reader = reader
        self._patience = patience_seconds
        self._sleep = sleep
        #: Why :meth:`unconfirmed` could not tell.
        self.unreadable = ""

    async def slot(self) -> SlotInfo | None:
        """The pipeline's slot. Raises :class:`SourceError`."""
        return await patiently(
            lambda: self._reader.run(lambda c: read_slot(c, self._settings.source.slot))
        )

    async def describe(self) -> str:
        """One sentence about the pipeline. Raises :class:`SourceError`."""
        slot = await self.slot()
        name = self._settings.source.slot
        if slot is None:
            return f"there is no slot {name}: nothing follows the tables"
        if slot.lost:
            return f"slot {name} has lost changes: nothing follows the tables any more"
        if slot.active:
            return f"a pipeline streams from slot {name}"
        return f"no pipeline runs; slot {name} stands at {slot.confirmed_flush_lsn}"

    async def position(self) -> SettledPosition:
        """A position behind everything that is visible now. Raises :class:`SourceError`."""
        return await patiently(lambda: self._reader.run(settled_position))

    async def passed(self, position: SettledPosition) -> Passed:
        """Wait until the stream has passed a position. Raises :class:`SourceError`."""
        best, since = -1, time.monotonic()
        while True:
            slot = await self.slot()
            if slot is None or slot.lost:
                return Passed.NO_SLOT
            confirmed = int(slot.confirmed_flush_lsn or 0)
            if confirmed >= position.lsn:
                return Passed.YES
            if not slot.active:
                return Passed.NOBODY
            if confirmed > best:
                best, since = confirmed, time.monotonic()
            elif time.monotonic() - since > self._patience:
                return Passed.STALLED
            await self._sleep(_POLL_SECONDS)

    async def visible(self, position: SettledPosition) -> bool:
        """Wait for transactions that ran then, in which rows may have been made that were streamed
        and could not be seen yet. Raises :class:`SourceError`."""
        return await self._reader.run(
            lambda c: horizon_passed(c, position.horizon, _HORIZON_SECONDS)
        )

    async def changes_waiting(self, planned: PlannedTable) -> bool | None:
        """Whether a stopped pipeline's slot holds changes of the table; None: not known. Raises
        :class:`SourceError`."""
        source, oid = self._settings.source, planned.table.oid
        return await self._reader.run(
            lambda c: changes_waiting(c, source.slot, source.publication, oid)
        )

    async def unconfirmed(
        self, planned: PlannedTable, ids: Collection[PointId]
    ) -> set[PointId] | None:
        """Those of the ids whose rows a stopped pipeline's slot holds changes of; None if that
        cannot be told, and :attr:`unreadable` says why: there are too many changes, the slot is in
        use again, or the role may not read it."""
        source = self._settings.source

        def look(connection: PgConnection) -> set[PointId] | None:
            frames = unconfirmed_frames(
                connection,
                source.slot,
                source.publication,
                limit=_PEEKED,
                timeout_seconds=_PEEK_SECONDS,
            )
            touched = _Touched(planned, ids)
            count = 0
            for frame in frames:
                touched.feed(frame)
                count += 1
            return None if count >= _PEEKED else touched.ids

        self.unreadable = "there are too many changes"
        try:
            return await self._reader.run(look)
        except SourceError as error:
            self.unreadable = error.message
            return None


class _Touched:
    """Gathers which of some points a table's changes are of."""

    def __init__(self, planned: PlannedTable, wanted: Collection[PointId]) -> None:
        plan = planned.plan
        self.ids: set[PointId] = set()
        self._wanted = frozenset(wanted)
        self._oids = {plan.oid, *(leaf.oid for leaf in planned.table.leaves)}
        self._key = [plan.columns[position].name for position in plan.key]
        self._point_id = compile_key_id(plan)
        self._places: dict[int, list[int] | None] = {}
        self._decoder = Decoder()

    def feed(self, frame: bytes) -> None:
        message = self._decoder.decode(frame)
        if isinstance(message, m.Relation):
            names = [column.name for column in message.columns]
            known = message.oid in self._oids and all(name in names for name in self._key)
            self._places[message.oid] = [names.index(n) for n in self._key] if known else None
        elif isinstance(message, m.Insert):
            self._row(message.relation, message.new)
        elif isinstance(message, m.Update):
            self._row(message.relation, message.new)
            self._row(message.relation, message.old)
        elif isinstance(message, m.Delete):
            self._row(message.relation, message.old)
        elif isinstance(message, m.Truncate) and self._oids.intersection(message.relations):
            self.ids.update(self._wanted)

    def _row(self, relation: int, row: Row | None) -> None:
        places = self._places.get(relation)
        if places is None or row is None:
            return
        try:
            id_ = self._point_id([row[place] for place in places])
        except MappingError:
            return  # a part of the key is not in the message: it has not changed, and is elsewhere
        if id_ in self._wanted:
            self.ids.add(id_)
