"""Coalescing gives what applying every change in order would give (R26)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdc_sync.rows import UNCHANGED, PointId, Row
from cdc_sync.sync.coalesce import TableBatch, fill

COLUMNS = 3


@dataclass
class Step:
    """A change of the source: rows have the key first, then COLUMNS values."""

    kind: str
    key: int
    new_key: int
    values: tuple[int, ...]
    changed: tuple[bool, ...]


steps = st.lists(
    st.builds(
        Step,
        kind=st.sampled_from(["insert", "update", "move", "delete", "truncate"]),
        key=st.integers(0, 4),
        new_key=st.integers(0, 4),
        values=st.tuples(*[st.integers(0, 255)] * COLUMNS),
        changed=st.tuples(*[st.booleans()] * COLUMNS),
    ),
    max_size=40,
)


def raw(key: int, values: tuple[int, ...]) -> Row:
    return [bytes([key]), *(bytes([v]) for v in values)]


class World:
    """A table, and a store that is brought up to it by coalesced batches."""

    def __init__(self) -> None:
        self.table: dict[int, Row] = {}
        self.store: dict[PointId, Row] = {}
        self.batch = TableBatch()
        self.xid = 100

    def step(self, step: Step) -> None:
        self.xid += 1
        if step.kind == "insert" and step.key not in self.table:
            row = raw(step.key, step.values)
            self.table[step.key] = row
            self.batch.create(step.key, row, self.xid)
        elif step.kind == "delete" and step.key in self.table:
            del self.table[step.key]
            self.batch.delete(step.key, self.xid)
        elif step.kind == "update" and step.key in self.table:
            sent = self._sent(step, step.key)
            self.table[step.key] = fill(sent, self.table[step.key])
            self.batch.update(step.key, sent, self.xid)
        elif step.kind == "move" and step.key in self.table and step.new_key not in self.table:
            sent = self._sent(step, step.new_key)
            self.table[step.new_key] = fill(sent, self.table.pop(step.key))
            self.batch.move(step.key, step.new_key, sent, self.xid)
        elif step.kind == "truncate":
            self.flush()
            self.table.clear()
            self.store.clear()

    def _sent(self, step: Step, key: int) -> Row:
        values = raw(key, step.values)[1:]
        return [
            bytes([key]),
            *(v if c else UNCHANGED for v, c in zip(values, step.changed, strict=True)),
        ]

    def flush(self) -> None:
        """Write the batch as the applier does; what is fetched is the table as it is now."""
        changes, fetch = self.batch.split()
        touched: list[PointId] = [
            *changes.deletes,
            *(i for i, _ in changes.upserts),
            *(i for i, _ in changes.partials),
            *fetch,
        ]
        assert len(touched) == len(set(touched))
        for point_id in changes.deletes:
            self.store.pop(point_id, None)
        for point_id, row in changes.upserts:
            assert UNCHANGED not in row
            self.store[point_id] = row
        for point_id, row in changes.partials:
            self.store[point_id] = fill(row, self.store[point_id])
        for point_id in fetch:
            assert isinstance(point_id, int)
            if point_id in self.table:
                self.store[point_id] = self.table[point_id]
        self.batch = TableBatch()


@pytest.mark.requirement("R21", "R26")
@settings(max_examples=500)
@given(steps=steps, every=st.integers(1, 20))
def test_coalesced_batches_give_what_sequential_application_gives(
    steps: list[Step], every: int
) -> None:
    world = World()
    for number, step in enumerate(steps):
        world.step(step)
        if number % every == every - 1:
            world.flush()
    world.flush()
    assert world.store == dict(world.table)


@settings(max_examples=200)
@given(steps=steps)
def test_replaying_a_batch_changes_nothing(steps: list[Step]) -> None:
    """A crash between writing and confirming replays the batch (invariant 3)."""
    world = World()
    for step in steps:
        if step.kind != "truncate":
            world.step(step)
    batch = world.batch
    world.flush()
    once = dict(world.store)
    world.batch = batch
    world.flush()
    assert world.store == once == dict(world.table)
