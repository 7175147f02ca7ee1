"""Repairing: rows are compared with the points that are there, and only what differs is written."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cdc_sync.errors import MappingError
from cdc_sync.mapping.comparison import PointComparison
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant.sink import Applied, Changes, RetrievedPoint, TableWriter
from cdc_sync.rows import PointId, Row
from cdc_sync.sync.writing import writing


@dataclass(frozen=True, slots=True)
class RepairOutcome:
    """What became of a batch. ``same``: points that were as they should be, and were not written;
    ``different`` and ``missing``: points that were written. Refused ones are in none of them.
    """

    applied: Applied
    same: int
    different: int
    missing: int


@dataclass(frozen=True, slots=True)
class _Findings:
    """What is left to do (``changes``), and of which points."""

    changes: Changes
    same: int
    different: frozenset[PointId]
    missing: frozenset[PointId]


async def repair(writer: TableWriter, changes: Changes) -> RepairOutcome:
    """Write those upserts that are not yet what is stored; partials and deletes as they are.

    Tries once; errors as of :meth:`~cdc_sync.qdrant.sink.TableWriter.apply`.
    """
    return await repairing(writer, changes)()


def repairing(
    writer: TableWriter, changes: Changes, progress: Callable[[], None] = lambda: None
) -> Callable[[], Awaitable[RepairOutcome]]:
    """Return a function that repairs, to be called again after it has failed.

    Points are compared once; every further try writes what is left, as
    :func:`~cdc_sync.sync.writing.writing` does. ``progress`` is called whenever some were
    completed.
    """
    findings: _Findings | None = None
    write: Callable[[], Awaitable[Applied]] | None = None

    async def attempt() -> RepairOutcome:
        nonlocal findings, write
        if findings is None or write is None:
            findings = await _compare(writer, changes)
            write = writing(writer, findings.changes, progress)
        applied = await write()
        refused = {id_ for id_, _ in applied.refused}
        return RepairOutcome(
            applied,
            findings.same,
            len(findings.different - refused),
            len(findings.missing - refused),
        )

    return attempt


async def _compare(writer: TableWriter, changes: Changes) -> _Findings:
    comparison = _comparison(writer.plan)
    retrieved = await writer.retrieve([id_ for id_, _ in changes.upserts])
    stored = {point.id: point for point in retrieved}
    different: list[tuple[PointId, Row]] = []
    missing: list[tuple[PointId, Row]] = []
    for id_, row in changes.upserts:
        point = stored.get(id_)
        if point is None:
            missing.append((id_, row))
        elif not _equal(comparison, row, point):
            different.append((id_, row))
    return _Findings(
        Changes([*missing, *different], changes.partials, changes.deletes, changes.large),
        len(changes.upserts) - len(missing) - len(different),
        frozenset(id_ for id_, _ in different),
        frozenset(id_ for id_, _ in missing),
    )


def _equal(comparison: PointComparison, row: Row, point: RetrievedPoint) -> bool:
    try:
        return comparison.equal(row, point.payload, point.vectors)
    except MappingError:
        return False  # the writer says what is wrong with it


@functools.lru_cache(maxsize=64)
def _comparison(plan: TablePlan) -> PointComparison:
    return PointComparison(plan)
