"""The gatherer: transactions, positions and batches, from frames built by hand."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from cdc_sync.errors import MappingError, ProtocolError
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import ColumnPlan, IdScheme, TablePlan
from cdc_sync.mapping.table import Column, PgType, Table
from cdc_sync.pgoutput import messages as m
from cdc_sync.rows import LARGE_ROW_BYTES, UNCHANGED, Row, Unchanged
from cdc_sync.sync.gather import Batch, Gatherer
from cdc_sync.sync.routing import Binding, PlannedTable, Unusable, bind
from tests.support import frames

OID = 4711
INT8 = PgType(20, "pg_catalog", "int8")
TEXT = PgType(25, "pg_catalog", "text")
COLUMNS = (Column("id", 1, INT8, not_null=True), Column("a", 2, TEXT), Column("b", 3, TEXT))


def planned_table() -> PlannedTable:
    table = Table(
        oid=OID,
        schema="public",
        name="t",
        partitioned=False,
        columns=COLUMNS,
        primary_key=("id",),
        replica_identity="d",
        identity_columns=("id",),
        indexes=(),
        leaves=(),
    )
    plan = TablePlan(
        oid=OID,
        schema="public",
        table="t",
        collection="t",
        columns=tuple(ColumnPlan(c.name, c.type, field=c.name) for c in COLUMNS),
        key=(0,),
        id_scheme=IdScheme.INTEGER,
    )
    return PlannedTable(table, plan, PlanOptions())


RELATION = m.Relation(
    OID,
    "public",
    "t",
    "d",
    (
        m.RelationColumn("id", 20, -1, True),
        m.RelationColumn("a", 25, -1, False),
        m.RelationColumn("b", 25, -1, False),
    ),
)


def resolve(oid: int, typmod: int) -> PgType:
    return {20: INT8, 25: TEXT}[oid]


def route(relation: m.Relation) -> Binding | None:
    return bind(planned_table(), relation, resolve) if relation.oid == OID else None


def key(value: int) -> bytes:
    return struct.pack(">q", value)


def row(value: int, a: bytes | None = b"a", b: bytes | None = b"b") -> Row:
    return [key(value), a, b]


class Stream:
    """Feeds a gatherer with frames at growing LSNs."""

    def __init__(
        self, applied: int = 0, batch_rows: int = 1000, batch_bytes: int = 1 << 20
    ) -> None:
        self.gatherer = Gatherer(
            route, batch_rows=batch_rows, batch_bytes=batch_bytes, applied=applied
        )

    def send(self, message: m.Message, lsn: int = 0) -> None:
        self.gatherer.feed(b"w" + struct.pack(">QQq", lsn, lsn, 0) + frames.encode(message))

    def keepalive(self, wal_end: int, reply: bool = False) -> None:
        self.gatherer.feed(b"k" + struct.pack(">QqB", wal_end, 0, reply))

    def transaction(self, commit_lsn: int, *changes: m.Message, xid: int = 7) -> None:
        """Begin, changes, Commit; the transaction ends at ``commit_lsn + 8``."""
        self.send(m.Begin(commit_lsn, 0, xid), commit_lsn - 4)
        for change in changes:
            self.send(change, 0 if isinstance(change, m.Relation) else commit_lsn - 2)
        self.send(m.Commit(0, commit_lsn, commit_lsn + 8, 0), commit_lsn + 8)

    def take(self) -> Batch:
        return self.gatherer.take()


def pending(batch: Batch) -> dict[object, Row | None]:
    return {i: p.row for i, p in batch.tables[OID].pending.items()}


def test_a_transaction_becomes_a_batch_with_its_end_as_position() -> None:
    stream = Stream()
    stream.transaction(100, RELATION, m.Insert(OID, row(1)), m.Insert(OID, row(2)))
    batch = stream.take()
    assert pending(batch) == {1: row(1), 2: row(2)}
    assert batch.end_lsn == 108
    assert batch.xids == [7]
    assert not stream.gatherer.ready


@pytest.mark.requirement("R41", "R42")
def test_a_batch_inside_a_transaction_reaches_no_position_of_it() -> None:
    stream = Stream(batch_rows=2)
    stream.transaction(100, RELATION, m.Insert(OID, row(1)))
    stream.send(m.Begin(200, 0, 8), 190)
    for value in range(2, 6):
        stream.send(m.Insert(OID, row(value)), 195)
    ends = []
    while stream.gatherer.full:
        ends.append(stream.take().end_lsn)
    assert ends == [108, None]
    stream.send(m.Commit(0, 200, 208, 0), 208)
    assert stream.take().end_lsn == 208


@pytest.mark.requirement("R43")
def test_keepalives_move_the_position_only_between_transactions() -> None:
    stream = Stream()
    stream.keepalive(50)
    assert stream.take().end_lsn == 50
    stream.send(m.Begin(100, 0, 7), 90)
    stream.keepalive(100)
    assert not stream.gatherer.ready
    stream.send(m.Commit(0, 100, 108, 0), 108)
    stream.keepalive(500)
    assert stream.take().end_lsn == 500


@pytest.mark.requirement("R43")
def test_a_keepalive_behind_changes_is_reached_only_with_them() -> None:
    stream = Stream()
    stream.transaction(100, RELATION, m.Insert(OID, row(1)))
    stream.keepalive(500)
    batch = stream.take()
    assert not batch.empty
    assert batch.end_lsn == 500


@pytest.mark.requirement("R44")
def test_a_transaction_that_begins_at_the_applied_position_is_applied() -> None:
    """ "Applied" is an exclusive bound: a keepalive may have confirmed exactly the LSN at which the
    next commit lands."""
    stream = Stream(applied=100)
    stream.transaction(99, RELATION, m.Insert(OID, row(1)))
    stream.transaction(100, m.Insert(OID, row(2)))
    batch = stream.take()
    assert pending(batch) == {2: row(2)}


@pytest.mark.requirement("R47")
def test_relation_messages_carry_no_position() -> None:
    stream = Stream()
    stream.transaction(100, RELATION, m.Insert(OID, row(1)))
    stream.send(m.Begin(200, 0, 8), 190)
    stream.send(RELATION, 0)
    assert stream.gatherer.received == 190
    assert stream.take().end_lsn == 108


@pytest.mark.requirement("R27")
def test_nulls_of_a_key_tuple_are_not_data() -> None:
    stream = Stream()
    old: Row = [key(1), None, None]
    new: Row = [key(2), b"a2", UNCHANGED]
    stream.transaction(100, RELATION, m.Update(OID, old, True, new))
    batch = stream.take()
    assert pending(batch) == {1: None, 2: new}
    assert batch.tables[OID].pending[2].rootless


@pytest.mark.requirement("R21")
def test_a_key_that_becomes_none_takes_its_point_with_it() -> None:
    """The row cannot be written any more, and its point would be one without a row."""
    stream = Stream()
    stream.transaction(
        100, RELATION, m.Update(OID, [key(1), None, None], True, [b"none", b"a", UNCHANGED])
    )
    batch = stream.take()
    assert pending(batch) == {1: None}
    assert len(batch.unmappable) == 1
    assert batch.end_lsn == 108


@pytest.mark.requirement("R21")
@pytest.mark.parametrize("value", [b"b", UNCHANGED])
def test_a_key_that_was_none_gives_its_row_a_point(value: bytes | Unchanged) -> None:
    stream = Stream()
    new: Row = [key(2), b"a", value]
    stream.transaction(100, RELATION, m.Update(OID, [b"none", None, None], True, new))
    batch = stream.take()
    assert pending(batch) == {2: new}
    assert batch.tables[OID].pending[2].rootless
    assert not batch.unmappable


@pytest.mark.requirement("R20")
def test_unchanged_values_come_from_a_whole_old_tuple() -> None:
    stream = Stream()
    stream.transaction(
        100, RELATION, m.Update(OID, row(1, b"x", b"toast"), False, [key(2), b"y", UNCHANGED])
    )
    assert pending(stream.take()) == {1: None, 2: row(2, b"y", b"toast")}


@pytest.mark.requirement("R24")
def test_an_unchanged_key_comes_from_the_old_key() -> None:
    stream = Stream()
    old: Row = [key(1), None, None]
    stream.transaction(100, RELATION, m.Update(OID, old, True, [UNCHANGED, b"y", UNCHANGED]))
    batch = stream.take()
    assert pending(batch) == {1: [key(1), b"y", UNCHANGED]}
    assert not batch.tables[OID].pending[1].rootless


@pytest.mark.requirement("R23")
def test_an_insert_with_unchanged_values_needs_the_row() -> None:
    stream = Stream()
    stream.transaction(100, RELATION, m.Insert(OID, [key(1), b"a", UNCHANGED]))
    _, fetch = stream.take().tables[OID].split()
    assert fetch == [1]


@pytest.mark.requirement("R29")
def test_truncate_stands_between_what_came_before_and_after() -> None:
    stream = Stream()
    stream.transaction(
        100,
        RELATION,
        m.Insert(OID, row(1)),
        m.Truncate(False, False, (OID, 9999)),
        m.Insert(OID, row(2)),
    )
    before, barrier, after = stream.take(), stream.take(), stream.take()
    assert pending(before) == {1: row(1)}
    assert barrier.truncates == (OID,)
    assert not barrier.tables
    assert pending(after) == {2: row(2)}
    assert (before.end_lsn, barrier.end_lsn, after.end_lsn) == (None, None, 108)


@pytest.mark.requirement("R15")
def test_columns_in_another_order_are_brought_into_plan_order() -> None:
    stream = Stream()
    turned = m.Relation(OID, "public", "t", "d", tuple(reversed(RELATION.columns)))
    stream.transaction(100, turned, m.Insert(OID, [b"b", b"a", key(1)]))
    assert pending(stream.take()) == {1: row(1)}


def test_tables_that_are_not_ours_are_ignored() -> None:
    stream = Stream()
    other = m.Relation(9999, "public", "other", "d", RELATION.columns)
    stream.transaction(100, other, m.Insert(9999, row(1)), m.Truncate(False, False, (9999,)))
    batch = stream.take()
    assert batch.empty
    assert batch.end_lsn == 108
    assert stream.gatherer.ignored_changes == 1


@pytest.mark.requirement("R33")
def test_a_change_without_its_relation_is_a_protocol_error() -> None:
    stream = Stream()
    with pytest.raises(ProtocolError, match="before its Relation"):
        stream.transaction(100, m.Insert(OID, row(1)))


@pytest.mark.parametrize(
    "message", [m.Insert(OID, row(1)), m.Commit(0, 1, 2, 0), m.Truncate(False, False, (OID,))]
)
def test_changes_outside_a_transaction_are_protocol_errors(message: m.Message) -> None:
    stream = Stream()
    stream.transaction(100, RELATION)
    with pytest.raises(ProtocolError, match="outside a transaction"):
        stream.send(message, 200)


def test_streamed_messages_are_protocol_errors_when_streaming_is_off() -> None:
    with pytest.raises(ProtocolError, match="without streaming"):
        Stream().send(m.StreamStart(7, True), 100)


@pytest.mark.parametrize("frame", [b"", b"x", b"w", b"k123"])
def test_frames_that_are_none_are_protocol_errors(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        Stream().gatherer.feed(frame)


def test_a_batch_is_sealed_at_its_byte_limit() -> None:
    stream = Stream(batch_bytes=1 << 16)
    stream.transaction(100, RELATION, *(m.Insert(OID, row(i, b"x" * 10_000)) for i in range(20)))
    sizes = []
    while stream.gatherer.full:
        sizes.append(stream.take().bytes)
    assert len(sizes) >= 2
    assert all(size < (1 << 16) + 11_000 for size in sizes)


class Stopping(Stream):
    """A table that cannot be bound until :attr:`generation` is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.generation = 0
        self.error = MappingError("no")
        self.gatherer = Gatherer(
            self.route, batch_rows=4, batch_bytes=1 << 20, generation=lambda: self.generation
        )

    def route(self, relation: m.Relation) -> Binding | Unusable | None:
        if relation.oid != OID:
            return None
        return route(relation) if self.generation else Unusable("public.t", self.error)


def test_changes_that_cannot_be_bound_are_dropped_and_told_of() -> None:
    """The batch says so: it must not be confirmed before the table is on record as stale, and its
    transactions count as applied."""
    stream = Stopping()
    stream.transaction(100, RELATION, m.Insert(OID, row(1)), m.Delete(OID, row(2), True), xid=9)
    stream.transaction(200, m.Truncate(False, False, (OID,)), xid=10)
    batch = stream.take()
    assert not batch.empty
    assert batch.tables == {}
    assert batch.truncates == ()
    assert batch.unusable["public.t"].changes == 3
    assert batch.unusable["public.t"].unusable.error is stream.error
    assert batch.xids == [9, 10]
    assert batch.end_lsn == 208


def test_many_dropped_changes_are_batches_too() -> None:
    stream = Stopping()
    stream.transaction(100, RELATION, *(m.Insert(OID, row(value)) for value in range(9)))
    assert stream.gatherer.full
    ends = []
    while stream.gatherer.ready:
        batch = stream.take()
        assert "public.t" in batch.unusable
        ends.append(batch.end_lsn)
    assert ends == [None, None, 108]


def test_a_relation_is_bound_again_when_it_may_be_bound_otherwise() -> None:
    """Its message comes once; the other relation's stays as it was until a change of it comes."""
    stream = Stopping()
    stream.transaction(100, RELATION, m.Insert(OID, row(1)))
    stream.generation = 1
    stream.transaction(200, m.Insert(OID, row(2)))
    batch = stream.take()
    assert pending(batch) == {2: row(2)}
    assert batch.unusable["public.t"].changes == 1


def test_a_change_of_an_unknown_relation_is_no_part_of_the_protocol() -> None:
    stream = Stopping()
    with pytest.raises(ProtocolError, match="before its Relation message"):
        stream.transaction(100, m.Insert(OID, row(1)))


@pytest.mark.parametrize("batch_rows", [1, 2, 3])
def test_a_batch_with_a_large_row_says_so(batch_rows: int) -> None:
    """Also if the row has closed its batch, or begun another."""
    stream = Stream(batch_rows=batch_rows, batch_bytes=16 << 20)
    large = b"x" * (LARGE_ROW_BYTES + 1)
    stream.transaction(100, RELATION, m.Insert(OID, row(1)))
    stream.transaction(200, m.Insert(OID, row(2, large)))
    while stream.gatherer.ready:
        batch = stream.take()
        if batch.tables and 2 in pending(batch):
            assert batch.large
    stream.transaction(300, m.Insert(OID, row(3)))
    assert not stream.take().large


@pytest.mark.parametrize("kept", [b"mine", b"other"])
def test_rows_that_are_not_kept_are_left_out_however_many_there_are(kept: bytes) -> None:
    """Of a table with rows of many collections only those of one are kept."""
    binding = route(RELATION)
    assert binding is not None
    binding = dataclasses.replace(binding, only=(1, frozenset({b"mine"})))
    stream = Stream()
    stream.gatherer = Gatherer(lambda _: binding, batch_rows=1000, batch_bytes=1 << 20)
    changes: list[m.Message] = [RELATION, m.Insert(OID, row(1, b"mine"))]
    changes += [m.Insert(OID, row(value, kept)) for value in range(2, 6)]
    changes += [m.Update(OID, None, False, row(value, kept)) for value in range(1, 6)]
    stream.transaction(100, *changes)
    found = pending(stream.take())
    if kept == b"mine":
        assert found == {value: row(value, kept) for value in range(1, 6)}
    else:
        assert found == dict.fromkeys(range(1, 6))
        assert stream.gatherer.ignored_changes == 4


def test_rows_of_two_plans_come_in_two_batches() -> None:
    stream = Stream()
    columns = (*RELATION.columns[:2], m.RelationColumn("b", 20, -1, False))
    altered = dataclasses.replace(RELATION, columns=columns)
    stream.transaction(
        100,
        RELATION,
        m.Insert(OID, row(1)),
        m.Insert(OID, row(2)),
        altered,
        m.Insert(OID, row(3, b=key(3))),
        m.Insert(OID, row(4, b=key(4))),
    )
    first, second = stream.take(), stream.take()
    assert pending(first) == {1: row(1), 2: row(2)}
    assert pending(second) == {3: row(3, b=key(3)), 4: row(4, b=key(4))}
    assert [c.type for c in second.bindings[OID].planned.plan.columns] == [INT8, TEXT, INT8]
    assert (first.end_lsn, second.end_lsn) == (None, 108)
