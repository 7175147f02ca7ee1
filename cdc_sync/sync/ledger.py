"""The ledger of a copy under way: which chunks of a table are done, and which are left.

A chunk is a range of blocks of one leaf (the table itself, or a partition). The ledger is written
beside the data as chunks are finished, so a copy that was interrupted, by whatever cause, goes on
where it was. What a chunk holds may have moved meanwhile, from one that is left to one that is done
or the other way round: every such move is in the stream, and a row whose point is not there yet is
read again by its key when its change comes (R69).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence

from cdc_sync.mapping.table import Leaf, attached_leaves
from cdc_sync.qdrant.sink import BlockRange, LeafLedger, PipelineState, TableLedger
from cdc_sync.sync.copying import Chunk
from cdc_sync.sync.fingerprints import (
    fingerprint,
    is_stale,
    recorded_definition,
    same_configuration,
)
from cdc_sync.sync.orphans import buckets_for
from cdc_sync.sync.routing import PlannedTable

_MIN_CHUNK_PAGES = 16
_MAX_CHUNK_PAGES = 4_096
_DEFAULT_CHUNK_PAGES = 128


class Ledger:
    """What is done of one table. :attr:`record` is its present state, to be kept."""

    def __init__(self, record: TableLedger, chunk_rows: int) -> None:
        self.record = record
        self._chunk_rows = chunk_rows
        #: Whether :attr:`record` has changed since it was kept.
        self.dirty = False

    @classmethod
    def new(
        cls, pipeline: str, planned: PlannedTable, chunk_rows: int, *, sweep: bool, repair: bool
    ) -> Ledger:
        """A ledger with nothing done."""
        record = TableLedger(
            pipeline, planned.name, fingerprint(planned), sweep=sweep, repair=repair
        )
        ledger = cls(record, chunk_rows)
        ledger.dirty = True
        ledger.meet(planned)
        return ledger

    def meet(self, planned: PlannedTable) -> None:
        """Compare with the table as it is now.

        A plan or a table other than before starts from nothing, and so does a leaf with other
        storage (rewritten or truncated: its blocks hold other rows), and one that was attached
        since. A leaf that is gone leaves points behind, and so does one that was truncated, of
        which the stream says nothing (R34); so they are swept.
        """
        now, before_now = fingerprint(planned), self.record.fingerprint
        definition = planned.table.definition
        attached = attached_leaves(recorded_definition(before_now), definition)
        if not same_configuration(now, before_now) or is_stale(before_now, planned):
            # Points of an older plan may be there.
            self._change(leaves=(), sweep=True, buckets=0, swept=0, rows=0, bytes=0)
        if now != before_now:
            self._change(fingerprint=now)
        known = {leaf.oid: leaf for leaf in self.record.leaves}
        leaves = []
        for leaf in planned.table.leaves:
            before = known.pop(leaf.oid, None)
            if before is None or before.relfilenode != leaf.relfilenode or leaf.oid in attached:
                if before is not None or leaf.oid in attached:
                    # Its points may be of rows that are gone, or were computed anew.
                    self._change(sweep=True)
                before = self._cut(leaf)
            leaves.append(before)
        if known:
            self._change(sweep=True)
        if tuple(leaves) != self.record.leaves:
            # What was swept may have been of rows that are gone now.
            self._change(leaves=tuple(leaves), buckets=0, swept=0)

    def take_as_copied(self, unread: Collection[int] = ()) -> None:
        """Read nothing but the leaves of these OIDs."""
        leaves = tuple(
            leaf if leaf.oid in unread else dataclasses.replace(leaf, done=((0, None),))
            for leaf in self.record.leaves
        )
        self._change(leaves=leaves)

    def want_sweep(self) -> None:
        """Points without a row may be there, in what was swept too."""
        self._change(sweep=True, buckets=0, swept=0)

    def want_again(self) -> None:
        """Another copy is to follow."""
        self._change(again=True)

    def restart(self) -> None:
        """Take nothing as done."""
        self._change(leaves=(), sweep=True, buckets=0, swept=0, rows=0, bytes=0)

    def halve_chunks(self) -> None:
        """Cut what is left into chunks of half the size, down to a block."""
        leaves = []
        for leaf in self.record.leaves:
            pages = min(leaf.chunk_pages, leaf.pages)
            leaves.append(dataclasses.replace(leaf, chunk_pages=max(1, pages // 2)))
        self._change(leaves=tuple(leaves))

    def finish(self, chunk: Chunk, rows: int, size: int) -> None:
        """A chunk has been completed."""
        leaves = tuple(
            dataclasses.replace(leaf, done=_merge(leaf.done, (chunk.start_block, chunk.end_block)))
            if leaf.oid == chunk.leaf.oid
            else leaf
            for leaf in self.record.leaves
        )
        self._change(leaves=leaves, rows=self.record.rows + rows, bytes=self.record.bytes + size)

    def divide(self, points: int) -> None:
        """Settle in how many parts the points are swept."""
        self._change(buckets=buckets_for(points), swept=0)

    def finish_sweep(self, orphans: int) -> None:
        """The next part has been swept."""
        self._change(swept=self.record.swept + 1, orphans=self.record.orphans + orphans)

    @property
    def copied(self) -> bool:
        """Whether every chunk is done."""
        return all(leaf.done == ((0, None),) for leaf in self.record.leaves)

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        swept = not self.record.sweep or 0 < self.record.buckets <= self.record.swept
        return self.copied and swept

    @property
    def chunks_done(self) -> int:
        """Number of chunks done, of those that a fresh cut gives."""
        return self.chunks_total - sum(1 for leaf in self.record.leaves for _ in _left(leaf))

    @property
    def chunks_total(self) -> int:
        """Number of chunks of a fresh cut."""
        return sum(
            1 for leaf in self.record.leaves for _ in _left(dataclasses.replace(leaf, done=()))
        )

    def left(self, planned: PlannedTable) -> list[Chunk]:
        """The chunks that are not done. :meth:`meet` must have seen this table."""
        by_oid = {leaf.oid: leaf for leaf in planned.table.leaves}
        return [
            Chunk(planned.plan.oid, by_oid[leaf.oid], start, end)
            for leaf in self.record.leaves
            for start, end in _left(leaf)
        ]

    def _cut(self, leaf: Leaf) -> LeafLedger:
        return LeafLedger(leaf.oid, leaf.relfilenode, leaf.pages, self._chunk_pages(leaf))

    def _chunk_pages(self, leaf: Leaf) -> int:
        if leaf.estimated_rows > 0 and leaf.pages > 0:
            pages = self._chunk_rows * leaf.pages / leaf.estimated_rows
        else:
            pages = _DEFAULT_CHUNK_PAGES
        return round(min(max(pages, _MIN_CHUNK_PAGES), _MAX_CHUNK_PAGES))

    def _change(self, **changes: object) -> None:
        self.record = dataclasses.replace(self.record, **changes)  # type: ignore[arg-type]
        self.dirty = True


def unrecorded(ledgers: Iterable[TableLedger], state: PipelineState) -> list[str]:
    """The tables of which a copy or a sweep was begun and is not on record as completed: something
    is left to do, or its process ended right before that."""
    known = {table.table: table.plan_fingerprint for table in state.tables}
    return [
        record.table
        for record in ledgers
        if not Ledger(record, _DEFAULT_CHUNK_PAGES).complete
        or record.fingerprint != known.get(record.table)
    ]


def _left(leaf: LeafLedger) -> Iterator[BlockRange]:
    """What is not done, in chunks; the last one is open-ended, for blocks added since."""
    for start, end in _gaps(leaf.done):
        # Beyond the size at which the leaf was cut there is one chunk only.
        last = leaf.pages if end is None else end
        position = start
        while end is None or position < end:
            next_ = position + leaf.chunk_pages
            if next_ >= last:
                yield position, end
                break
            yield position, next_
            position = next_


def _gaps(done: Sequence[BlockRange]) -> Iterator[BlockRange]:
    position = 0
    for start, end in done:
        if start > position:
            yield position, start
        if end is None:
            return
        position = end
    yield position, None


def _merge(done: Iterable[BlockRange], new: BlockRange) -> tuple[BlockRange, ...]:
    merged: list[BlockRange] = []
    for start, end in sorted([*done, new], key=lambda one: one[0]):
        if merged:
            before, before_end = merged[-1]
            if before_end is None or start <= before_end:
                both = None if before_end is None or end is None else max(before_end, end)
                merged[-1] = (before, both)
                continue
        merged.append((start, end))
    return tuple(merged)
