"""Gathering: from frames of the stream to coalesced batches. No I/O.

The gatherer follows transactions and keeps, for each batch, the position that is reached once the
batch is written: the end of the last transaction that is complete in it, or a later keepalive
position with no transaction open (R43). A batch that ends inside a transaction does not move the
position past it (R41, R42).
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from cdc_sync.errors import ErrorKind, MappingError, ProtocolError, SourceError
from cdc_sync.pgoutput import messages as m
from cdc_sync.pgoutput.decode import Decoder, read_tuple
from cdc_sync.pgoutput.envelope import XLOG_HEADER_BYTES, decode_keepalive, unix_seconds
from cdc_sync.pgoutput.tuple_readers import AdaptiveReader
from cdc_sync.rows import LARGE_ROW_BYTES, UNCHANGED, PointId, Row
from cdc_sync.sync.batch import Batch, Dropped, Unmappable
from cdc_sync.sync.coalesce import TableBatch, fill
from cdc_sync.sync.control import Accepted, ResyncTable
from cdc_sync.sync.dead_letters import letter_of_key
from cdc_sync.sync.routing import Binding, Unusable

__all__ = ["Batch", "Dropped", "Gatherer", "MessageKind", "Unmappable"]

_KEEPALIVE = 0x6B
_XLOG_DATA = 0x77
#: An insert, or an update without an old tuple, has its tag, its relation and ``N`` here; the tuple
#: follows.
_CHANGE_START = XLOG_HEADER_BYTES
_CHANGE_END = XLOG_HEADER_BYTES + 6

#: Transactions a batch may complete, so that a stream of empty ones is bounded too.
_MAX_TRANSACTIONS = 4096
#: Relation messages kept of tables that are not ours: where all tables are published, temporary
#: ones of other programs come and go without end.
_MAX_IGNORED = 5_000

#: The kinds of messages as they are counted.
MessageKind: TypeAlias = Literal[
    "begin", "commit", "insert", "update", "delete", "truncate", "relation", "type", "origin",
    "message", "keepalive",
]  # fmt: skip

_KINDS: Final[dict[type, MessageKind]] = {
    m.Begin: "begin",
    m.Commit: "commit",
    m.Insert: "insert",
    m.Update: "update",
    m.Delete: "delete",
    m.Truncate: "truncate",
    m.Relation: "relation",
    m.Type: "type",
    m.Origin: "origin",
    m.LogicalMessage: "message",
}


@dataclass(slots=True)
class _Transaction:
    xid: int
    final_lsn: int
    commit_time: float
    skip: bool
    changes: int = 0


@dataclass(slots=True)
class _Followed:
    """What most changes of a relation need, of one kind and in one batch; ``reader`` outlives
    both."""

    kind: Literal["insert", "update"]
    reader: AdaptiveReader
    binding: Binding
    generation: int
    oid: int
    table: TableBatch
    counts: dict[int, int]


class Gatherer:
    """Turns CopyData frames into batches.

    ``route(relation)`` binds a Relation message, or returns None for a table that is not ours. When
    ``generation()`` gives another number than before, messages are bound again, each with the next
    change of its relation.
    ``applied`` is the exclusive bound of what is already written: a transaction is skipped iff its
    commit LSN is below it (R44). ``on_message`` decides what a logical message asks for, if
    anything.
    """

    def __init__(
        self,
        route: Callable[[m.Relation], Binding | Unusable | None],
        *,
        batch_rows: int,
        batch_bytes: int,
        applied: int = 0,
        on_type: Callable[[int], None] = lambda oid: None,
        on_message: Callable[[m.LogicalMessage], Accepted | None] | None = None,
        generation: Callable[[], int] = lambda: 0,
    ) -> None:
        self._route = route
        self._generation = generation
        self._batch_rows = batch_rows
        self._batch_bytes = batch_bytes
        self._applied = applied
        self._on_type = on_type
        self._on_message = on_message
        self._decoder = Decoder()
        self._bindings: dict[int, Binding | Unusable | None] = {}
        #: The Relation messages, if they are kept, and the generation by which each was bound.
        self._relations: dict[int, tuple[m.Relation | None, int]] = {}
        #: Relations that are not ours and whose messages are kept, the oldest first.
        self._ignored: dict[int, None] = {}
        #: The partitioned table whose Relation message was the last message but for Type ones.
        self._root: int | None = None
        self._transaction: _Transaction | None = None
        self._sealed: deque[Batch] = deque()
        self._batch = Batch()
        self._batch_changes = 0
        #: Whether the batch knows of the open transaction.
        self._begun = False
        #: Relations with changes in the batch, and readers of tuples, by what a change begins with.
        self._followed: dict[bytes, _Followed] = {}
        self._readers: dict[bytes, AdaptiveReader] = {}
        self.received = 0
        self.server_end = 0
        self.reply_requested = False
        self.clock_offset_seconds: float | None = None
        self.counts: defaultdict[MessageKind, int] = defaultdict(int)
        self.ignored_changes = 0

    # -- what the engine asks

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction has begun and not committed."""
        return self._transaction is not None

    @property
    def buffered_bytes(self) -> int:
        """Bytes of frames in batches that were not taken yet."""
        return self._batch.bytes + sum(batch.bytes for batch in self._sealed)

    @property
    def full(self) -> bool:
        """Whether nothing more should be fed before a batch is taken."""
        return bool(self._sealed)

    @property
    def ready(self) -> bool:
        """Whether :meth:`take` has something: changes, or a position to reach."""
        return bool(self._sealed) or not self._batch.empty or self._batch.end_lsn is not None

    @property
    def oldest_commit(self) -> float | None:
        """Commit time (Unix seconds) of the oldest change not taken yet."""
        for batch in (*self._sealed, self._batch):
            if batch.oldest_commit is not None:
                return batch.oldest_commit
        return None

    @property
    def bindings(self) -> Mapping[int, Binding | Unusable | None]:
        """The bindings in force, by relation OID."""
        return self._bindings

    def take(self) -> Batch:
        """Return the oldest batch; what is gathered so far if none is sealed."""
        if not self._sealed:
            self._seal()
        return self._sealed.popleft()

    # -- frames

    def feed(self, frame: bytes) -> None:
        """Take one CopyData frame. Raises :class:`ProtocolError` and what ``route`` raises."""
        followed = self._followed.get(frame[_CHANGE_START:_CHANGE_END])
        if followed is not None and self._take_row(followed, frame):
            return
        kind = frame[0] if frame else 0
        if kind == _XLOG_DATA:
            self._message(frame)
        elif kind == _KEEPALIVE:
            self._keepalive(frame)
        else:
            raise ProtocolError(f"unknown replication frame 0x{kind:02x}")

    def _keepalive(self, frame: bytes) -> None:
        keepalive = decode_keepalive(frame)
        self.server_end = max(self.server_end, keepalive.wal_end)
        self.received = max(self.received, keepalive.wal_end)
        self.reply_requested |= keepalive.reply_requested
        self.counts["keepalive"] += 1
        self.clock_offset_seconds = unix_seconds(keepalive.send_time) - time.time()
        # With no transaction open, everything before walEnd has been received; an open one commits
        # at or after it.
        if self._transaction is None:
            self._reach(keepalive.wal_end)

    def _reach(self, lsn: int) -> None:
        if lsn > (self._batch.end_lsn or 0):
            self._batch.end_lsn = lsn

    def _message(self, frame: bytes) -> None:
        message = self._decoder.decode(frame, XLOG_HEADER_BYTES)
        # Relation and Type messages carry 0/0 here (R47).
        lsn = int.from_bytes(frame[1:9], "big")
        if lsn > self.received:
            self.received = lsn
        size = len(frame)
        self._batch.bytes += size
        root, self._root = self._root, None
        match message:
            case m.Insert() | m.Update() | m.Delete():
                self._change(message, frame)
            case m.Begin():
                self._begin(message)
            case m.Commit():
                self._commit(message)
            case m.Relation():
                self._bind(message)
                self._note_leaf(message.oid, root)
            case m.Type():
                self._root = root
                self._on_type(message.oid)
            case m.Truncate():
                self._truncate(message)
            case m.LogicalMessage():
                self._logical_message(message)
            case m.Origin():
                pass
            case _:
                raise ProtocolError(
                    f"{type(message).__name__} message in a stream that was started without "
                    "streaming and two_phase"
                )
        if size > LARGE_ROW_BYTES:
            # It may have closed a batch, its own or the one before.
            for batch in (*self._sealed, self._batch):
                batch.large = True
        self.counts[_KINDS[type(message)]] += 1

    # -- transactions

    def _begin(self, message: m.Begin) -> None:
        if self._transaction is not None:
            raise ProtocolError("Begin inside a transaction")
        self._transaction = _Transaction(
            xid=message.xid,
            final_lsn=message.final_lsn,
            commit_time=unix_seconds(message.commit_time),
            skip=message.final_lsn < self._applied,
        )
        self._begun = False

    def _commit(self, message: m.Commit) -> None:
        transaction = self._current("Commit")
        self._transaction = None
        self.received = max(self.received, message.end_lsn)
        self._reach(message.end_lsn)
        if not transaction.skip:
            self._batch.commit_times.append(transaction.commit_time)
            self._batch.transaction_changes.append(transaction.changes)
            if len(self._batch.commit_times) >= _MAX_TRANSACTIONS:
                self._seal()

    def _current(self, what: str) -> _Transaction:
        if self._transaction is None:
            raise ProtocolError(f"{what} outside a transaction")
        return self._transaction

    def _seal(self) -> None:
        self._sealed.append(self._batch)
        self._batch = Batch()
        self._batch_changes = 0
        self._begun = False
        self._followed.clear()

    # -- changes

    def _take_row(self, followed: _Followed, frame: bytes) -> bool:
        """Take a change that is like others before it in this batch, in a third of the time.

        Returns False with nothing done for a frame that may not be such a change, or a malformed
        one: it goes the long way, which leads to the same.
        """
        transaction = self._transaction
        if (
            transaction is None
            or transaction.skip
            or followed.generation != self._generation()
            or frame[0] != _XLOG_DATA
        ):
            return False
        size = len(frame)
        found = followed.reader.read(frame, _CHANGE_END)
        if found is None:
            found = read_tuple(frame, _CHANGE_END)
            if found is None or not followed.reader.learn(found[0]):
                return False
        if found[1] != size or size > LARGE_ROW_BYTES:
            return False
        lsn = int.from_bytes(frame[1:9], "big")
        if lsn > self.received:
            self.received = lsn
        batch, binding = self._batch, followed.binding
        batch.bytes += size
        if self._begun:
            transaction.changes += 1
        else:
            self._begin_change(transaction)
        followed.counts[followed.oid] += 1
        order = binding.order
        row = found[0] if order is None else [found[0][i] for i in order]
        try:
            point_id = binding.point_id(row)
        except MappingError as error:
            self._note_unmappable(binding, error, transaction)
        else:
            if followed.kind == "insert":
                followed.table.create(point_id, row, transaction.xid)
            else:
                followed.table.update(point_id, row, transaction.xid)
        self.counts[followed.kind] += 1
        self._batch_changes += 1
        if self._batch_changes >= self._batch_rows or batch.bytes >= self._batch_bytes:
            self._seal()
        return True

    def _follow(self, message: m.Insert | m.Update, frame: bytes, binding: Binding) -> None:
        """Have changes like this one taken the short way, and learn how their tuples look."""
        if binding.only is not None:
            return
        start = frame[_CHANGE_START:_CHANGE_END]
        reader = self._readers.get(start)
        if reader is None:
            types = [column.type_oid for column in binding.relation.columns]
            reader = self._readers[start] = AdaptiveReader(types)
        reader.learn(message.new)
        batch, oid = self._batch, binding.planned.plan.oid
        insert = isinstance(message, m.Insert)
        self._followed[start] = _Followed(
            "insert" if insert else "update",
            reader,
            binding,
            self._generation(),
            oid,
            batch.tables[oid],
            batch.inserts if insert else batch.updates,
        )

    def _change(self, message: m.Insert | m.Update | m.Delete, frame: bytes) -> None:
        transaction = self._current(type(message).__name__)
        if transaction.skip:
            return
        binding = self._binding(message.relation)
        if binding is None:
            self.ignored_changes += 1
            return
        if isinstance(binding, Unusable):
            self._drop(transaction, binding)
            return
        batch = self._batch
        oid = binding.planned.plan.oid
        known = batch.bindings.get(oid)
        if known is not binding and not _same_rows(known, binding):
            if known is not None:
                # The plan or the tuple order changed inside the batch: rows of two shapes do not
                # mix.
                self._seal()
                batch = self._batch
            batch.bindings[oid] = binding
            batch.tables[oid] = TableBatch()
        self._begin_change(transaction)
        try:
            self._coalesce(batch, batch.tables[oid], oid, binding, message, transaction.xid)
        except MappingError as error:
            self._note_unmappable(binding, error, transaction)
        else:
            if isinstance(message, m.Insert) or (
                isinstance(message, m.Update) and message.old is None
            ):
                self._follow(message, frame, binding)
        self._end_change()

    def _note_unmappable(
        self, binding: Binding, error: MappingError, transaction: _Transaction
    ) -> None:
        self._batch.unmappable.append(
            Unmappable(
                binding,
                letter_of_key(error),
                error.message,
                transaction.final_lsn,
                int(transaction.commit_time),
            )
        )

    def _bind(self, relation: m.Relation) -> None:
        self._relations[relation.oid] = relation, self._generation()
        binding = self._bindings[relation.oid] = self._route(relation)
        self._ignored.pop(relation.oid, None)
        if binding is None:
            self._ignored[relation.oid] = None
            if len(self._ignored) > _MAX_IGNORED:
                oldest = next(iter(self._ignored))
                del self._ignored[oldest]
                self._relations[oldest] = None, self._relations[oldest][1]
        # Its tuples may look otherwise from here on.
        oid = relation.oid.to_bytes(4, "big")
        for start in (b"I%bN" % oid, b"U%bN" % oid):
            self._followed.pop(start, None)
            self._readers.pop(start, None)

    def _note_leaf(self, oid: int, root: int | None) -> None:
        """``root``: the table whose Relation message came right before. That of a partition follows
        on its root's (pgoutput.c, maybe_send_schema), though its changes come under the root."""
        binding = self._bindings[oid]
        if binding is None and root is not None:
            self._batch.leaves[root].add(oid)
        elif isinstance(binding, Binding) and binding.planned.table.partitioned:
            self._root = oid

    def _binding(self, oid: int) -> Binding | Unusable | None:
        """What the relation of a change is bound to; its message comes once, so it may have to be
        bound again. Raises SOURCE_UNAVAILABLE for one that was not kept: another session gets it
        again."""
        try:
            relation, generation = self._relations[oid]
        except KeyError:
            raise ProtocolError(f"change of relation {oid} before its Relation message") from None
        if generation != self._generation():
            if relation is None:
                raise SourceError(
                    ErrorKind.SOURCE_UNAVAILABLE,
                    f"the tables have changed, and what relation {oid} is was forgotten among many "
                    "others; the stream is opened again",
                )
            self._bind(relation)
        return self._bindings[oid]

    def _begin_change(self, transaction: _Transaction) -> None:
        batch = self._batch
        if batch.oldest_commit is None:
            batch.oldest_commit = transaction.commit_time
        if not batch.xids or batch.xids[-1] != transaction.xid:
            batch.xids.append(transaction.xid)
        batch.last_lsn = transaction.final_lsn
        batch.last_commit = transaction.commit_time
        transaction.changes += 1
        self._begun = True

    def _end_change(self) -> None:
        self._batch_changes += 1
        if self._batch_changes >= self._batch_rows or self._batch.bytes >= self._batch_bytes:
            self._seal()

    def _drop(self, transaction: _Transaction, unusable: Unusable) -> None:
        """Leave out a change. The batch says so, since the table must be on record as stale before
        the position moves past it."""
        self._begin_change(transaction)
        dropped = self._batch.unusable.setdefault(unusable.table, Dropped(unusable))
        dropped.unusable = unusable
        dropped.changes += 1
        self._end_change()

    def _coalesce(
        self,
        batch: Batch,
        table: TableBatch,
        oid: int,
        binding: Binding,
        message: m.Insert | m.Update | m.Delete,
        xid: int,
    ) -> None:
        if isinstance(message, m.Insert):
            row = binding.arrange(message.new)
            if not binding.keeps(row):
                self.ignored_changes += 1
                return
            batch.inserts[oid] += 1
            table.create(binding.point_id(row), row, xid)
        elif isinstance(message, m.Delete):
            batch.deletes[oid] += 1
            table.delete(binding.point_id(binding.arrange(message.old)), xid)
        else:
            batch.updates[oid] += 1
            self._update(table, binding, message, xid)

    @staticmethod
    def _update(table: TableBatch, binding: Binding, message: m.Update, xid: int) -> None:
        new = binding.arrange(message.new)
        if not binding.keeps(new):
            # Like a row that leaves a row filter; one that was never kept has no point to delete.
            old = new if message.old is None else binding.arrange(message.old)
            table.delete(binding.point_id(old), xid)
            return
        if message.old is None:
            table.update(binding.point_id(new), new, xid)
            return
        old = binding.arrange(message.old)
        new = _take_from_old(new, old, whole=not message.old_is_key, key=binding.key)
        try:
            old_id: PointId = binding.point_id(old)
        except MappingError:
            # There is no point of that key; the row has one from here on.
            table.create(binding.point_id(new), new, xid)
            return
        try:
            new_id: PointId = binding.point_id(new)
        except MappingError:
            # The row is a dead letter from here on, but its point has no row any more.
            table.delete(old_id, xid)
            raise
        if old_id == new_id:
            table.update(new_id, new, xid)
        else:
            table.move(old_id, new_id, new, xid)

    def _truncate(self, message: m.Truncate) -> None:
        transaction = self._current("Truncate")
        if transaction.skip:
            return
        self._batch.forget_leaves(message.relations)
        bindings = [self._binding(oid) for oid in message.relations if oid in self._bindings]
        for unusable in bindings:
            if isinstance(unusable, Unusable):
                self._drop(transaction, unusable)
        ours = {b.planned.plan.oid: b for b in bindings if isinstance(b, Binding)}
        if not ours:
            return
        whole = {oid for oid, b in ours.items() if _is_whole(b, message.relations)}
        if whole:
            cleared = {oid: b for oid, b in ours.items() if oid in whole}
            self._barrier(transaction, Batch(truncates=tuple(cleared), bindings=cleared))
        if len(whole) < len(ours):
            # Which points were of a part of the table is not known from their ids.
            parts = tuple(b.planned for oid, b in ours.items() if oid not in whole)
            self._barrier(transaction, Batch(resync_tables=parts))

    def _logical_message(self, message: m.LogicalMessage) -> None:
        transaction = self._transaction
        if self._on_message is None or (transaction is not None and transaction.skip):
            return
        request = self._on_message(message)
        if request is None:
            return
        transaction = self._current("a request")
        if isinstance(request, ResyncTable):
            self._barrier(transaction, Batch(resync_tables=(request.planned,)))
        else:
            self._barrier(transaction, Batch(rereads=(request,)))

    def _barrier(self, transaction: _Transaction, batch: Batch) -> None:
        """Have the batch applied by itself: what came before is written first, what follows comes
        after."""
        self._seal()
        batch.oldest_commit = transaction.commit_time
        batch.xids.append(transaction.xid)
        batch.last_lsn = transaction.final_lsn
        batch.last_commit = transaction.commit_time
        self._batch = batch
        self._seal()


def _take_from_old(new: Row, old: Row, *, whole: bool, key: tuple[int, ...]) -> Row:
    """Take UNCHANGED values from the old tuple: all of them if it is the whole row (R20), else the
    key's (R24).

    Columns of a key tuple that are not part of the key are NULL without meaning it (R27), so they
    are never read.
    """
    if UNCHANGED not in new:
        return new
    if whole:
        return fill(new, old)
    row = list(new)
    for i in key:
        if row[i] is UNCHANGED:
            row[i] = old[i]
    return row


def _same_rows(known: Binding | None, binding: Binding) -> bool:
    """Whether rows of two relations (tables that inherit from one) become equal points."""
    return known is not None and known.planned.plan is binding.planned.plan


def _is_whole(binding: Binding, truncated: Sequence[int]) -> bool:
    """Whether a table is truncated with all that inherits from it."""
    table = binding.planned.table
    return not table.children or {leaf.oid for leaf in table.leaves} <= set(truncated)
