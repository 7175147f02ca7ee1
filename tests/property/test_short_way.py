"""The short way of changes through the gatherer leads to what the long way does."""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_sync.errors import ProtocolError
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import ColumnPlan, IdScheme, TablePlan
from cdc_sync.mapping.table import Column, PgType, Table
from cdc_sync.pgoutput import messages as m
from cdc_sync.rows import UNCHANGED, Row, TextValue
from cdc_sync.sync.gather import Batch, Gatherer, _Followed
from cdc_sync.sync.routing import Binding, PlannedTable, bind
from tests.support import frames

INT8, TEXT = PgType(20, "pg_catalog", "int8"), PgType(25, "pg_catalog", "text")
TYPES = {20: INT8, 25: TEXT}
TABLES = (1001, 1002, 1003)


def planned_table(oid: int) -> PlannedTable:
    columns = (Column("id", 1, INT8, not_null=True), Column("a", 2, TEXT), Column("b", 3, TEXT))
    table = Table(oid, "public", f"t{oid}", False, columns, ("id",), "d", ("id",), (), ())
    plans = tuple(ColumnPlan(column.name, column.type, field=column.name) for column in columns)
    plan = TablePlan(oid, "public", table.name, table.name, plans, (0,), IdScheme.INTEGER)
    return PlannedTable(table, plan, PlanOptions())


PLANNED = {oid: planned_table(oid) for oid in TABLES[:2]}


class LongWay(Gatherer):
    """Takes no change the short way."""

    def _take_row(self, followed: _Followed, frame: bytes) -> bool:
        return False


@dataclass
class Source:
    """Frames at growing positions, and what they may change: the generation of the bindings."""

    frames: list[bytes] = field(default_factory=list)
    #: After how many frames the bindings are made anew.
    turns: list[int] = field(default_factory=list)
    lsn: int = 1000

    def send(self, message: m.Message, damage: int | None = None) -> None:
        self.lsn += 8
        frame = frames.xlog_data(frames.encode(message), self.lsn)
        if damage is not None:
            frame = frame[: max(1, damage % len(frame))] if damage % 2 else frame + b"x"
        self.frames.append(frame)


texts = st.one_of(st.none(), st.just(UNCHANGED), st.sampled_from([b"", b"x", b"en", b"long" * 9]))
keys = st.integers(-2, 4).map(lambda number: struct.pack(">q", number))
#: Keys that are no key, and a value in text format.
odd_keys = st.sampled_from([None, b"123", TextValue(b"7"), TextValue(b"x"), UNCHANGED])


@st.composite
def rows(draw: st.DrawFn, order: Sequence[int]) -> Row:
    key = draw(st.one_of(keys, keys, keys, odd_keys))
    row: Row = [key, draw(texts), draw(texts)]
    row = [row[i] for i in order]
    if draw(st.integers(0, 30)) == 0:
        row.pop()
    return row


def relation(oid: int, order: Sequence[int], last: int = 25) -> m.Relation:
    columns = (("id", 20), ("a", 25), ("b", last))
    listed = tuple(
        m.RelationColumn(columns[i][0], columns[i][1], -1, columns[i][0] == "id") for i in order
    )
    return m.Relation(oid, "public", f"t{oid}", "d", listed)


@st.composite
def sources(draw: st.DrawFn) -> Source:
    source = Source()
    orders: dict[int, tuple[int, ...]] = dict.fromkeys(TABLES, (0, 1, 2))
    for oid in TABLES:
        source.send(relation(oid, orders[oid]))
    for xid in range(draw(st.integers(1, 4))):
        source.send(m.Begin(source.lsn + 500, 0, xid))
        for _ in range(draw(st.integers(0, 25))):
            oid = draw(st.sampled_from(TABLES))
            step = draw(st.integers(0, 40))
            damage = draw(st.integers(0, 400)) if step == 39 else None
            if step == 0:
                orders[oid] = draw(st.permutations([0, 1, 2]).map(tuple))
                source.send(relation(oid, orders[oid]))
            elif step == 1:
                source.send(m.Truncate(False, False, (oid,)))
            elif step in (2, 10):
                source.turns.append(len(source.frames))
            elif step < 5:
                source.send(m.Delete(oid, draw(rows(orders[oid])), True))
            elif step < 9:
                old = draw(rows(orders[oid]))
                source.send(m.Update(oid, old, step < 7, draw(rows(orders[oid]))))
            elif step < 25:
                source.send(m.Update(oid, None, False, draw(rows(orders[oid]))), damage)
            else:
                source.send(m.Insert(oid, draw(rows(orders[oid]))), damage)
        source.lsn += 1000
        source.send(m.Commit(0, source.lsn, source.lsn + 8, 0))
    return source


def gathered(
    kind: type[Gatherer],
    source: Source,
    batch_rows: int,
    applied: int,
    batch_bytes: int = 2000,
) -> tuple[list[dict[str, object]], list[object]]:
    """What the batches hold, and what else there is to see."""
    generation = 0

    def route(relation: m.Relation) -> Binding | None:
        planned = PLANNED.get(relation.oid)
        if planned is None or generation % 3 == 2:
            return None
        return bind(planned, relation, lambda oid, typmod: TYPES[oid])

    gatherer = kind(
        route,
        batch_rows=batch_rows,
        batch_bytes=batch_bytes,
        applied=applied,
        generation=lambda: generation,
    )
    error = ""
    for number, frame in enumerate(source.frames):
        generation = sum(turn <= number for turn in source.turns)
        try:
            gatherer.feed(frame)
        except ProtocolError as raised:
            error = str(raised)
            break
    seen: list[object] = [
        error,
        gatherer.received,
        gatherer.in_transaction,
        gatherer.ignored_changes,
        dict(gatherer.counts),
        gatherer.buffered_bytes,
        gatherer.oldest_commit,
    ]
    batches = []
    while gatherer.ready:
        batches.append(contents(gatherer.take()))
    return batches, seen


def contents(batch: Batch) -> dict[str, object]:
    found: dict[str, object] = {
        one.name: getattr(batch, one.name)
        for one in dataclasses.fields(batch)
        if one.name not in ("bindings", "unmappable")
    }
    found["bindings"] = {oid: binding.relation for oid, binding in batch.bindings.items()}
    found["unmappable"] = [
        (one.key, one.reason, one.lsn, one.commit_time) for one in batch.unmappable
    ]
    return found


@settings(max_examples=100, deadline=None)
@given(sources(), st.sampled_from([3, 17, 1000]), st.sampled_from([0, 0, 1600, 3000]))
def test_both_ways_lead_to_the_same(source: Source, batch_rows: int, applied: int) -> None:
    long = gathered(LongWay, source, batch_rows, applied)
    assert gathered(Gatherer, source, batch_rows, applied) == long


class Chance:
    """Long streams in which most changes go the short way, and whatever may end that comes in
    between. Small examples, as a search for failures prefers them, have little of that."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._source = Source()
        #: By table: the order of its columns, and the type of the last of them.
        self._looks: dict[int, tuple[Sequence[int], int]] = dict.fromkeys(TABLES, ((0, 1, 2), 25))

    def _row(self, oid: int) -> Row:
        order, _ = self._looks[oid]
        key = struct.pack(">q", self._random.randrange(5))
        if self._random.random() < 0.02:
            key = b"no key"
        texts: Row = [None, UNCHANGED, b"x", b"en"]
        numbers: Row = [b"y", UNCHANGED, b"12345678"]
        row = [key, self._random.choice(texts), self._random.choice(numbers)]
        return [row[i] for i in order]

    def _change(self) -> None:
        oid, kind = self._random.choice(TABLES), self._random.random()
        send = self._source.send
        if kind < 0.05:
            order = self._random.sample(range(3), 3)
            self._looks[oid] = order, self._random.choice([20, 25])
            send(relation(oid, *self._looks[oid]))
        elif kind < 0.06:
            send(m.Truncate(False, False, (oid,)))
        elif kind < 0.07:
            self._source.turns.append(len(self._source.frames))
        elif kind < 0.1:
            send(m.Delete(oid, self._row(oid), True))
        elif kind < 0.13:
            send(m.Update(oid, self._row(oid), self._random.random() < 0.5, self._row(oid)))
        elif kind < 0.5:
            send(m.Update(oid, None, False, self._row(oid)))
        else:
            send(m.Insert(oid, self._row(oid)))

    def source(self) -> Source:
        """Some transactions; one frame of the last third may be damaged, which ends the stream."""
        source = self._source
        for oid in TABLES:
            source.send(relation(oid, *self._looks[oid]))
        for xid in range(6):
            source.send(m.Begin(source.lsn + 500, 0, xid))
            for _ in range(self._random.randrange(60)):
                self._change()
            source.lsn += 1000
            source.send(m.Commit(0, source.lsn, source.lsn + 8, 0))
        if self._random.random() < 0.5:
            count = len(source.frames)
            number = self._random.randrange(count - count // 3, count)
            frame = source.frames[number]
            cut = frame[: self._random.randrange(len(frame))]
            source.frames[number] = self._random.choice([frame + b"x", cut])
        return source


def test_both_ways_lead_to_the_same_in_long_streams() -> None:
    for seed in range(80):
        source = Chance(seed).source()
        for batch_rows, applied in ((1000, 0), (17, 2500)):
            long = gathered(LongWay, source, batch_rows, applied, 1 << 20)
            assert gathered(Gatherer, source, batch_rows, applied, 1 << 20) == long, seed


def test_the_short_way_is_taken() -> None:
    """Or the test above would prove nothing."""
    taken = 0

    class Counting(Gatherer):
        def _take_row(self, followed: _Followed, frame: bytes) -> bool:
            nonlocal taken
            done = super()._take_row(followed, frame)
            taken += done
            return done

    source = Source()
    source.send(relation(1001, (0, 1, 2)))
    for xid in range(2):
        source.send(m.Begin(source.lsn + 500, 0, xid))
        for number in range(20):
            key = struct.pack(">q", number)
            source.send(m.Insert(1001, [key, b"a", b"b" if number % 2 else None]))
            source.send(m.Update(1001, None, False, [key, UNCHANGED, b"b"]))
        source.send(m.Commit(0, source.lsn, source.lsn + 8, 0))
    batches, _ = gathered(Counting, source, 1000, 0, 1 << 20)
    assert len(batches) == 1
    assert batches[0]["xids"] == [0, 1]
    assert batches[0]["transaction_changes"] == [40, 40]
    # All but the first of each kind, whichever way the values alternate.
    assert taken == 2 * 40 - 2


def test_bindings_that_are_made_anew_count_from_the_next_change_on() -> None:
    source = Source()
    source.send(relation(1001, (0, 1, 2)))
    source.send(m.Begin(source.lsn + 500, 0, 1))
    for number in range(6):
        if number == 4:
            source.turns += [len(source.frames)] * 2
        source.send(m.Insert(1001, [struct.pack(">q", number), b"a", b"b"]))
    _, seen = gathered(Gatherer, source, 1000, 0)
    assert seen == gathered(LongWay, source, 1000, 0)[1]
    assert seen[3] == 2  # ignored: the table is none of ours any more
