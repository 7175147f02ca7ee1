"""Batches: what the gatherer hands to the applier."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

from cdc_sync.sync.coalesce import TableBatch
from cdc_sync.sync.control import ResyncRows
from cdc_sync.sync.routing import Binding, PlannedTable, Unusable


@dataclass(frozen=True, slots=True)
class Unmappable:
    """A change whose key cannot become a point id; ``key`` is that of its dead letter."""

    binding: Binding
    key: str
    reason: str
    lsn: int
    commit_time: int


@dataclass(slots=True)
class Dropped:
    """Changes of a table that cannot be followed, and why it cannot."""

    unusable: Unusable
    changes: int = 0


def _counts() -> defaultdict[int, int]:
    return defaultdict(int)


@dataclass(slots=True)
class Batch:
    """What is written at once.

    ``end_lsn``: the position reached when it is written, None if it holds no end of a transaction.
    ``truncates``: OIDs of tables to clear; such a batch holds nothing else. ``rereads``: rows to
    read again, ``resync_tables``: tables to read again as a whole; neither does such a batch hold
    anything else. ``unusable``: what was dropped of tables that cannot be followed, by name.
    ``leaves``: by table, OIDs of the partitions of which rows may follow from here on.
    ``commit_times``: Unix seconds, one a transaction completed in it. ``oldest_commit``: Unix
    seconds of the first transaction that has changes in it. ``xids``: transactions with changes in
    it. ``large``: one of the changes is. ``last_lsn`` and ``last_commit`` describe the last
    transaction seen, for dead letters.
    """

    tables: dict[int, TableBatch] = field(default_factory=dict)
    bindings: dict[int, Binding] = field(default_factory=dict)
    truncates: tuple[int, ...] = ()
    rereads: tuple[ResyncRows, ...] = ()
    resync_tables: tuple[PlannedTable, ...] = ()
    end_lsn: int | None = None
    bytes: int = 0
    commit_times: list[float] = field(default_factory=list)
    transaction_changes: list[int] = field(default_factory=list)
    oldest_commit: float | None = None
    xids: list[int] = field(default_factory=list)
    large: bool = False
    last_lsn: int = 0
    last_commit: float = 0.0
    inserts: defaultdict[int, int] = field(default_factory=_counts)
    updates: defaultdict[int, int] = field(default_factory=_counts)
    deletes: defaultdict[int, int] = field(default_factory=_counts)
    unmappable: list[Unmappable] = field(default_factory=list)
    unusable: dict[str, Dropped] = field(default_factory=dict)
    leaves: defaultdict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    def forget_leaves(self, relations: Collection[int]) -> None:
        """These OIDs are of tables that are truncated together, so their messages came one after
        the other as those of a table and its partition do."""
        for leaves in self.leaves.values():
            leaves.difference_update(relations)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to write (a position may still be reached)."""
        return not (
            self.tables
            or self.truncates
            or self.unmappable
            or self.rereads
            or self.resync_tables
            or self.unusable
            or self.leaves
        )
