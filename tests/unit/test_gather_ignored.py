"""Tables that are not ours, without end: every other program's, where all tables are published."""

from __future__ import annotations

import dataclasses
import struct

import pytest

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.ops.metrics import Metrics
from cdc_sync.pgoutput import messages as m
from cdc_sync.sync import gather, relations
from cdc_sync.sync.gather import Gatherer
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.routing import Binding
from tests.support import frames
from tests.unit.test_gather import OID, RELATION, pending, row
from tests.unit.test_gather import route as bound
from tests.unit.test_source_history import SETTINGS

COLUMNS = (m.RelationColumn("id", 20, -1, True), m.RelationColumn("a", 25, -1, False))
OTHERS = 100_000


class Scene:
    """A gatherer, and whether a relation has become ours meanwhile."""

    def __init__(self) -> None:
        self.generation = 0
        self.ours: set[int] = {OID}
        self.gatherer = Gatherer(
            self._route,
            batch_rows=1000,
            batch_bytes=1 << 30,
            generation=lambda: self.generation,
        )
        self._lsn = 0

    def _route(self, relation: m.Relation) -> Binding | None:
        if relation.oid not in self.ours:
            return None
        return bound(m.Relation(OID, "public", "t", "d", relation.columns))

    def send(self, *messages: m.Message) -> None:
        self._lsn += 100
        begin, commit = m.Begin(self._lsn, 0, 7), m.Commit(0, self._lsn, self._lsn + 8, 0)
        for message in (begin, *messages, commit):
            header = b"w" + struct.pack(">QQq", self._lsn, self._lsn, 0)
            self.gatherer.feed(header + frames.encode(message))

    def others(self, count: int) -> list[int]:
        """Changes of so many tables that come and go; their OIDs."""
        oids = list(range(OTHERS, OTHERS + count))
        for oid in oids:
            other = m.Relation(oid, "public", f"stage_{oid}", "d", COLUMNS)
            self.send(other, m.Insert(oid, row(1)[:2]))
        return oids


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(gather, "_MAX_IGNORED", 10)
    return Scene()


def test_what_is_kept_of_them_is_bounded(scene: Scene) -> None:
    scene.send(RELATION, m.Insert(OID, row(1)))
    scene.others(50)
    kept = [relation for relation, _ in scene.gatherer._relations.values() if relation is not None]
    assert len(kept) == 11
    # All of them can go on.
    for oid in (OTHERS, OTHERS + 49):
        scene.send(m.Insert(oid, row(2)[:2]), m.Truncate(False, False, (oid,)))
    scene.send(m.Insert(OID, row(2)))
    assert scene.gatherer.ignored_changes == 52
    assert set(pending(scene.gatherer.take())) == {1, 2}


def test_one_that_may_be_ours_by_now_is_not_passed_over(scene: Scene) -> None:
    first, *_, last = scene.others(50)
    scene.generation += 1
    scene.ours = {last}
    scene.send(m.Insert(last, row(3)[:2]))
    assert scene.gatherer.ignored_changes == 50
    # Of the first nothing is known any more.
    for lost in (m.Insert(first, row(4)[:2]), m.Truncate(False, False, (first,))):
        with pytest.raises(SourceError) as caught:
            scene.send(lost)
        assert caught.value.kind is ErrorKind.SOURCE_UNAVAILABLE
        scene.gatherer._transaction = None


def test_one_that_is_sent_again_and_again_is_kept(scene: Scene) -> None:
    again = m.Relation(OTHERS - 1, "public", "often", "d", COLUMNS)
    for oid in range(OTHERS, OTHERS + 30):
        scene.send(again, m.Relation(oid, "public", "once", "d", COLUMNS))
    assert scene.gatherer._relations[OTHERS - 1][0] == again
    assert len(scene.gatherer._ignored) == 10


@pytest.mark.requirement("R34")
@pytest.mark.parametrize(
    ("between", "noted"),
    [
        ((), True),
        ((m.Type(9, "public", "mood"),), True),
        ((m.Truncate(False, False, (OID,)),), False),
        ((m.Insert(OID, row(1)),), False),
    ],
)
def test_partitions_of_ours_are_told_from_other_tables(
    between: tuple[m.Message, ...], noted: bool
) -> None:
    """Their Relation message comes right after that of their root, which is bound again meanwhile
    without one of its own."""

    def route(relation: m.Relation) -> Binding | None:
        if relation.oid != OID:
            return None
        binding = bound(relation)
        assert isinstance(binding, Binding)
        planned = binding.planned
        table = dataclasses.replace(planned.table, partitioned=True)
        return dataclasses.replace(binding, planned=dataclasses.replace(planned, table=table))

    scene = Scene()
    scene.gatherer._route = route
    leaf = m.Relation(OTHERS, "public", "leaf", "d", COLUMNS)
    scene.send(RELATION, m.Insert(OID, row(1)))
    scene.generation += 1
    scene.send(m.Insert(OID, row(2)), m.Relation(OTHERS + 1, "public", "other", "d", COLUMNS))
    scene.send(RELATION, *between, leaf)
    leaves: set[int] = set()
    while scene.gatherer.ready:
        leaves |= scene.gatherer.take().leaves.get(OID, set())
    assert leaves == ({OTHERS} if noted else set())


def test_so_is_what_was_said_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relations, "_MAX_IGNORED", 10)
    ours = Relations((), SETTINGS, Metrics())
    for oid in range(OTHERS, OTHERS + 25):
        assert ours.route(m.Relation(oid, "public", "once", "d", COLUMNS)) is None
    assert len(ours._ignored) == 5
