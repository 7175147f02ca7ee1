"""The source's history: whether it is still the one that the collections were filled from.

A cluster that was restored to an earlier state, or a standby that took over without the last
transactions, goes on as if nothing had happened, also with its slot: transactions that have been
applied never happened there, and others may have come in their place. And a publication that was
altered and put back sends nothing of what happened in between. Neither shows in the stream, so how
far the source was known to be is put on record now and then (a :class:`SourceMark`), and compared
whenever the slot is taken.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence

from cdc_sync.config import Settings
from cdc_sync.errors import ErrorKind, SinkError, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import LoginRefusedError, PgConnection, answering, connect
from cdc_sync.postgres.publication import known_identity, publication_identities
from cdc_sync.postgres.refetch import widen_xid
from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.postgres.watch import SourcePosition
from cdc_sync.qdrant.sink import SourceMark, StateStore
from cdc_sync.sync.kept_connection import KeptConnection
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.retry import is_transient
from cdc_sync.sync.routing import PlannedTable

log = get_logger(__name__)

#: Least time between two marks.
_SAVE_SECONDS = 10.0


class SourceHistory:
    """Keeps the pipeline's mark. Errors as of the state store and of Postgres."""

    def __init__(self, settings: Settings, store: StateStore) -> None:
        self._settings = settings
        self._store = store
        self._timeline = 0
        self._position: SourcePosition | None = None
        self._saved: SourceMark | None = None
        self._saved_at = time.monotonic()
        self._last_xid: int | None = None
        #: The one that was the last when the source was last looked at.
        self._looked_xid: int | None = None
        #: The newest (64 bit) that was found visible; 0: none yet. And as the stream has it.
        self._visible_xid = 0
        self._settled_xid: int | None = None
        #: How the publication was last seen, by table.
        self._seen: dict[str, str] = {}
        self._connection = KeptConnection(settings.source, "cdc_sync watch")

    async def load(self) -> SourceMark | None:
        """Read the mark on record, before the slot is taken."""
        # What is open may lead to the server of the last session, which lives on by itself.
        await asyncio.to_thread(self._connection.rest)
        saved = await self._store.mark(self._settings.pipeline.name)
        if saved != self._saved:
            # Of another process, which may have begun anew: what was applied here does not count.
            self._forget_transactions()
        self._saved = saved
        return saved

    def close(self) -> None:
        """Close the connection, or have it closed by who uses it; does not wait."""
        self._connection.end()

    def taken(self, timeline: int) -> None:
        """The slot was taken, in this timeline of the server."""
        self._timeline = timeline

    def observe(self, position: SourcePosition) -> None:
        """Take in what the server was seen at."""
        self._position = position
        # While a synchronous standby holds its commit back, a transaction that was received is in
        # progress, as another of its number would be in another history. Where there are many the
        # last one is newer than what was seen.
        for last in (self._looked_xid, self._last_xid):
            if last is None or last == self._settled_xid:
                # Four thousand million transactions later its number is that of another one.
                continue
            xid = widen_xid(last, position.xmax)
            if xid < position.xmax and xid not in position.running:
                self._visible_xid, self._settled_xid = xid, last
        self._looked_xid = self._last_xid

    def applied(self, xid: int) -> None:
        """A committed transaction came by the stream; its 32-bit id."""
        self._last_xid = xid

    async def compare(self, relations: Relations) -> None:
        """Mark tables for which the publication was altered since it was last seen. How it is for
        tables that are new is on record when this returns, before anything of them is copied."""
        now = await self._identities(relations.tables)
        recorded = self._publications()
        before = recorded | self._seen
        self._seen = {p.name: now.get(p.plan.oid, "") for p in relations.tables}
        for planned in relations.tables:
            if before.get(planned.name, self._seen[planned.name]) != self._seen[planned.name]:
                relations.mark(planned, "the publication was altered", unsent=True)
        new = {name: before.get(name, seen) for name, seen in self._seen.items()}
        if not new.keys() <= recorded.keys():
            mark = self._saved or SourceMark(self._settings.pipeline.name, lsn=0, timeline=0)
            known = tuple(sorted((new | recorded).items()))
            await self._save(dataclasses.replace(mark, publications=known))

    def plan_anew(self) -> None:
        """The tables are planned anew. What was marked of them is not known any more, so they are
        compared with what is on record again."""
        self._seen.clear()

    @property
    def due(self) -> bool:
        """Whether it is time to :meth:`keep`."""
        return self._position is not None and time.monotonic() - self._saved_at >= _SAVE_SECONDS

    async def keep(self, relations: Relations, received: int) -> None:
        """Put on record how far the source is. ``received``: the stream came so far."""
        assert self._position is not None
        try:
            await self.compare(relations)
        except LoginRefusedError as error:
            # How it was stays on record, so the next look, be it that of another process, sees what
            # has changed since: the table is read again then. The stream need not wait for that.
            log.debug("publication_not_seen", kind=error.kind.value, error=error.message)
        mark = SourceMark(
            pipeline=self._settings.pipeline.name,
            lsn=received,
            timeline=self._timeline,
            xid=self._visible_xid or (self._saved.xid if self._saved is not None else 0),
            publications=self._settled(relations),
        )
        self._saved_at = time.monotonic()
        await self._save(mark)

    async def _save(self, mark: SourceMark) -> None:
        if mark == self._saved:
            return
        try:
            await self._store.save_mark(mark)
        except SinkError as error:
            if is_transient(error):
                raise
            # The stream does not depend on it, and will meet what is wrong if it is more than that.
            log.warning("mark_refused", kind=error.kind.value, error=error.message)
        else:
            self._saved = mark

    async def begin(self, tables: Sequence[PlannedTable]) -> None:
        """Begin a new history, with a slot that is still to be made. How the publication is for the
        tables is put on record: it may be altered before the stream begins."""
        self._forget_transactions()
        self._position = None
        self._seen.clear()
        now = await self._identities(tables)
        known = sorted((planned.name, now.get(planned.plan.oid, "")) for planned in tables)
        mark = SourceMark(
            self._settings.pipeline.name, lsn=0, timeline=0, publications=tuple(known)
        )
        await self._store.save_mark(mark)
        self._saved = mark

    def _forget_transactions(self) -> None:
        self._last_xid = self._looked_xid = self._settled_xid = None
        self._visible_xid = 0

    def _publications(self) -> dict[str, str]:
        """How the publication was for the tables, as far as that is on record."""
        known = self._saved.publications if self._saved is not None else ()
        return {table: known_identity(identity) for table, identity in known}

    def _settled(self, relations: Relations) -> tuple[tuple[str, str], ...]:
        """Of a table that is to be read again the old identity stays on record until it has been:
        should this process die, the next one finds the same difference."""
        before = self._publications()
        kept = {}
        for planned in relations.tables:
            stale = planned.plan.oid in relations.stale
            known = before.get(planned.name) if stale else self._seen.get(planned.name)
            if known is not None:
                kept[planned.name] = known
        return tuple(sorted(kept.items()))

    async def _identities(self, tables: Sequence[PlannedTable]) -> dict[int, str]:
        publication = self._settings.source.publication
        oids = [planned.plan.oid for planned in tables]

        def read(connection: PgConnection) -> dict[int, str]:
            return publication_identities(connection, publication, oids)

        def ask() -> dict[int, str]:
            kept = self._connection.is_open
            try:
                return self._connection.run(read)
            except SourceError as error:
                if not kept or not is_transient(error):
                    raise
                # It may have been cut since it was used last; that is no reason to end a session.
                return self._connection.run(read)

        return await asyncio.to_thread(ask)


async def read_identities(settings: Settings, oids: Sequence[int]) -> dict[int, str]:
    """What changes whenever the publication is altered for a table, by its OID. Raises
    :class:`SourceError`."""

    def read() -> dict[int, str]:
        with (
            connect(settings.source, application_name="cdc_sync watch") as connection,
            answering(connection),
        ):
            return publication_identities(connection, settings.source.publication, oids)

    return await asyncio.to_thread(read)


def check_history(connection: ReplicationConnection, mark: SourceMark | None, applied: int) -> int:
    """Make sure that the server has all that was known of it; returns its timeline. Blocking.

    ``applied``: a position that it has sent. Raises SOURCE_REWOUND.
    """
    identity = connection.identify()
    known = max(applied, mark.lsn if mark is not None else 0)
    if identity.xlog_position < known:
        raise _rewound(
            f"the server stands at {identity.xlog_position}, before what was already received "
            f"({Lsn(known)})"
        )
    if mark is None:
        return identity.timeline
    if mark.timeline not in (0, identity.timeline):
        left_at = connection.timeline_left_at(mark.timeline, identity.timeline)
        if left_at is None or left_at < known:
            where = "" if left_at is None else f" at {left_at}"
            raise _rewound(
                f"the server went from timeline {mark.timeline} to {identity.timeline}{where}, "
                f"before what was already received ({Lsn(known)})"
            )
    if mark.xid and not connection.is_committed(mark.xid):
        raise _rewound(f"transaction {mark.xid}, which was received, is not committed there")
    return identity.timeline


def _rewound(what: str) -> SourceError:
    return SourceError(
        ErrorKind.SOURCE_REWOUND,
        f"{what}: the cluster was restored to an earlier state, or a standby took over that did "
        "not have everything",
    )
