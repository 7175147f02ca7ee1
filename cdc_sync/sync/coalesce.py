"""Coalescing: of many changes to one point, only what the point must be in the end is kept.

A batch holds one pending change a point id. The rules, for a change that comes after a pending one:

    delete   over anything   the point goes
    row      over anything   the row (an upsert replaces the whole point)
    partial  over a row      the row, with the columns the partial carries
    partial  over a partial  both merged, the later one wins a column
    partial  over a delete   its missing values are not in Qdrant: the row is fetched from Postgres

A partial is a row with UNCHANGED values. Either the values are in the stored point, which keeps
them (an update in place), or the point is new and they must be fetched (``rootless``: the key
changed, or a row filter turned an update into an insert).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from cdc_sync.qdrant.sink import Changes
from cdc_sync.rows import UNCHANGED, PointId, Row


@dataclass(slots=True)
class Pending:
    """The final operation on one point. ``row`` is None for a delete; ``xid`` is the last
    transaction that wrote it."""

    row: Row | None
    xid: int
    rootless: bool = False

    @property
    def complete(self) -> bool:
        """Whether nothing of the row is unknown (a delete is)."""
        return self.row is None or UNCHANGED not in self.row


def fill(newer: Row, older: Row) -> Row:
    """Return ``newer`` with its UNCHANGED values taken from ``older``."""
    return [o if n is UNCHANGED else n for n, o in zip(newer, older, strict=True)]


@dataclass(slots=True)
class TableBatch:
    """Pending changes of one table, by point id."""

    pending: dict[PointId, Pending] = field(default_factory=dict)
    superseded: int = 0

    def __len__(self) -> int:
        return len(self.pending)

    def known_rows(self) -> Iterator[tuple[PointId, Row]]:
        """The rows of all points that stay, with their keys at the least."""
        for point_id, change in self.pending.items():
            if change.row is not None:
                yield point_id, change.row

    def put(self, point_id: PointId, row: Row, xid: int) -> None:
        """An insert, or an update in place of a row known in full."""
        self._replace(point_id, Pending(row, xid))

    def update(self, point_id: PointId, row: Row, xid: int) -> None:
        """An update in place which may have UNCHANGED values: those of the point as it is."""
        before = self.pending.get(point_id)
        if before is None:
            self.pending[point_id] = Pending(row, xid)
        elif before.row is None:
            self._replace(point_id, Pending(row, xid, rootless=True))
        else:
            self._replace(point_id, Pending(fill(row, before.row), xid, before.rootless))

    def create(self, point_id: PointId, row: Row, xid: int) -> None:
        """A new point whose UNCHANGED values are nowhere in Qdrant under this id."""
        pending = self.pending
        if point_id in pending:
            self.superseded += 1
        pending[point_id] = Pending(row, xid, True)

    def delete(self, point_id: PointId, xid: int) -> None:
        """The row is gone."""
        self._replace(point_id, Pending(None, xid))

    def move(self, old_id: PointId, new_id: PointId, row: Row, xid: int) -> None:
        """The key changed: the old point goes, the new one carries what is known, of the old point
        too."""
        before = self.pending.get(old_id)
        if before is not None and before.row is not None:
            row = fill(row, before.row)
        self.delete(old_id, xid)
        self.create(new_id, row, xid)

    def _replace(self, point_id: PointId, change: Pending) -> None:
        if point_id in self.pending:
            self.superseded += 1
        self.pending[point_id] = change

    def split(self) -> tuple[Changes, list[PointId]]:
        """Return the changes that can be written as they are, and the ids whose rows must be
        fetched first."""
        changes = Changes()
        fetch: list[PointId] = []
        for point_id, change in self.pending.items():
            row = change.row
            if row is None:
                changes.deletes.append(point_id)
            elif UNCHANGED not in row:
                changes.upserts.append((point_id, row))
            elif change.rootless:
                fetch.append(point_id)
            else:
                changes.partials.append((point_id, row))
        return changes, fetch
