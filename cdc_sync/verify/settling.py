"""Telling real differences from changes that are on their way.

A row and its point are read at different moments, so on a live system some differ that are in
order. Such a *candidate* is looked at again once the stream has passed the position up to which
everything was visible at the last look. The point is read before the row: if the row then has the
same version as at the look before, nothing changed it in between, everything up to that version has
been applied, and so a difference is real. A row that is not there has no version; its point must be
found there three times in a row, and transactions in which the row might have been made must be
over.

Beside a stopped pipeline nothing more arrives. What it will still apply stands in its slot, so the
changes behind the slot's position are looked through for the candidates' rows: those are pending,
the others differ.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from cdc_sync.errors import MappingError
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.row_versions import RowVersion, SettledPosition, fetch_versions
from cdc_sync.qdrant.sink import RetrievedPoint, TableWriter
from cdc_sync.rows import PointId, RawValue
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.verify.comparing import Comparer, Details
from cdc_sync.verify.keys import KeyFinder, RawKey
from cdc_sync.verify.kinds import Deviation, Kind
from cdc_sync.verify.source import SourceReader, patiently
from cdc_sync.verify.stream import Passed, StreamWatch

#: Looks at a candidate before it is given up as changing all the time.
_LOOKS: Final = 12
#: Looks in a row that must find the same: of rows that are there, and of those that are not.
_LOOKS_ROW: Final = 2
_LOOKS_NO_ROW: Final = 3
_PAUSE_SECONDS: Final = 0.2
_BATCH: Final = 500


@dataclass(slots=True)
class Candidate:
    """A point that may differ. ``key``: of its row (None: not known); ``leaf``: the partition in
    which the row was seen."""

    id: PointId
    key: RawKey | None = None
    leaf: str | None = None


@dataclass(slots=True)
class Judged:
    """A point that differs for certain. ``row_exists`` says whether a row maps to it, or two."""

    candidate: Candidate
    details: Details
    row_exists: bool


@dataclass(slots=True)
class Settled:
    """What became of candidates. ``pending`` and ``undecided`` as in
    :class:`~cdc_sync.verify.report.TableReport`; ``why``: sentences about the undecided."""

    judged: list[Judged] = field(default_factory=list)
    resolved: int = 0
    pending: int = 0
    undecided: int = 0
    why: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Look:
    """What was seen of a candidate; ``details`` is empty if all is in order. ``version`` is None
    without a row."""

    details: Details
    version: bytes | None
    changing: bool = False

    @property
    def in_order(self) -> bool:
        return not self.details.deviations


_Looks: TypeAlias = dict[PointId, _Look]


class Settler:
    """Settles candidates of one table."""

    def __init__(
        self,
        planned: PlannedTable,
        writer: TableWriter,
        comparer: Comparer,
        reader: SourceReader,
        stream: StreamWatch,
        keys: KeyFinder,
    ) -> None:
        self._planned = planned
        self._writer = writer
        self._comparer = comparer
        self._reader = reader
        self._stream = stream
        self._keys = keys
        self._point_id = compile_point_id(planned.plan)

    async def settle(self, candidates: Mapping[PointId, Candidate]) -> Settled:
        """Look at candidates until each is settled. Raises :class:`SourceError` and
        :class:`SinkError`."""
        settled = Settled()
        left = dict(candidates)
        before: _Looks = {}
        same: defaultdict[PointId, int] = defaultdict(int)
        position = await self._stream.position()
        for number in range(_LOOKS):
            if not left:
                return settled
            passed = await self._stream.passed(position)
            if passed is Passed.STALLED:
                settled.why.add(
                    "the pipeline did not get on: what differs may be changes on their way"
                )
                break
            looks = await self._look(left)
            after = await self._stream.position()
            if passed is Passed.NOBODY:
                await self._judge_stopped(left, looks, settled)
                return settled
            if passed is Passed.NO_SLOT and number == 0:
                await asyncio.sleep(_PAUSE_SECONDS)
            for id_, look in looks.items():
                if look.in_order:
                    settled.resolved += 1
                    del left[id_]
                    continue
                last = before.get(id_)
                steady = last is not None and last.version == look.version and not look.changing
                same[id_] = same[id_] + 1 if steady else 1
            before = looks
            await self._decide(left, looks, same, position, settled)
            position = after
        else:
            settled.why.add("rows were changed too often to be compared")
        settled.undecided += len(left)
        return settled

    async def _decide(
        self,
        left: dict[PointId, Candidate],
        looks: _Looks,
        same: Mapping[PointId, int],
        position: SettledPosition,
        settled: Settled,
    ) -> None:
        """Take those out of ``left`` of which it is certain by now."""
        certain = []
        for id_ in left:
            needed = _LOOKS_ROW if looks[id_].version is not None else _LOOKS_NO_ROW
            if same[id_] >= needed:
                certain.append(id_)
        if any(looks[id_].version is None for id_ in certain) and not await self._stream.visible(
            position
        ):
            settled.why.add("transactions stay open in which rows may have been made")
            certain = [id_ for id_ in certain if looks[id_].version is not None]
        for id_ in certain:
            settled.judged.append(_judged(left.pop(id_), looks[id_]))

    async def _judge_stopped(
        self, left: Mapping[PointId, Candidate], looks: _Looks, settled: Settled
    ) -> None:
        """Judge by what a stopped pipeline's slot holds; the looks are older than that."""
        wrong = [id_ for id_, look in looks.items() if not look.in_order]
        settled.resolved += len(looks) - len(wrong)
        if not wrong:
            return
        pending = await self._stream.unconfirmed(self._planned, wrong)
        if pending is None:
            settled.undecided += len(wrong)
            settled.why.add(
                "differences may be changes that the stopped pipeline will still apply; its slot "
                f"could not be looked through: {self._stream.unreadable}"
            )
            return
        settled.pending += len(pending)
        settled.judged += [_judged(left[i], looks[i]) for i in wrong if i not in pending]

    # -- looking

    async def _look(self, candidates: Mapping[PointId, Candidate]) -> _Looks:
        """Look at points, and then at their rows."""
        looks: _Looks = {}
        ids = list(candidates)
        for start in range(0, len(ids), _BATCH):
            some = ids[start : start + _BATCH]
            points = await patiently(lambda some=some: self._writer.retrieve(some))  # type: ignore[misc]
            looks |= await self._look_at_rows(
                [candidates[id_] for id_ in some], {point.id: point for point in points}
            )
        return looks

    async def _look_at_rows(
        self, candidates: Sequence[Candidate], points: Mapping[PointId, RetrievedPoint]
    ) -> _Looks:
        unkeyed = [c for c in candidates if c.key is None and c.id in points]
        found = await self._keys.find([points[c.id] for c in unkeyed])
        for candidate in unkeyed:
            candidate.key = found.get(candidate.id)
        keys = [candidate.key for candidate in candidates if candidate.key is not None]
        rows = await self._rows(keys)
        looks = {}
        for candidate in candidates:
            of_point = rows.get(candidate.id, [])
            looks[candidate.id] = self._compare(of_point, points.get(candidate.id))
        return looks

    async def _rows(self, keys: Sequence[Sequence[RawValue]]) -> dict[PointId, list[RowVersion]]:
        def read(connection: PgConnection) -> list[RowVersion]:
            return fetch_versions(connection, self._planned.plan, keys, self._planned.selection)

        rows: dict[PointId, list[RowVersion]] = {}
        if keys:
            for row in await patiently(lambda: self._reader.run(read)):
                with contextlib.suppress(MappingError):  # by a key that has no id
                    rows.setdefault(self._point_id(row.row), []).append(row)
        return rows

    def _compare(self, rows: Sequence[RowVersion], point: RetrievedPoint | None) -> _Look:
        details = Details()
        changing = any(row.changing for row in rows)
        if not rows:
            if point is not None:
                details.deviations.append(Deviation(Kind.EXTRA))
            return _Look(details, None)
        version = b"".join(sorted(row.version for row in rows))
        if len(rows) > 1:
            details.deviations.append(Deviation(Kind.DUPLICATE, text=f"{len(rows)} rows"))
        elif point is None:
            details.deviations.append(self._missing(rows[0]))
        else:
            details = self._comparer.details(rows[0].row, point)
        return _Look(details, version, changing)

    def _missing(self, row: RowVersion) -> Deviation:
        """A row without a point, or of which none can be made."""
        try:
            self._comparer.check(row.row)
        except MappingError as error:
            return Deviation(Kind.UNMAPPABLE, text=error.message)
        return Deviation(Kind.MISSING)


def _judged(candidate: Candidate, look: _Look) -> Judged:
    return Judged(candidate, look.details, look.version is not None)


def as_candidates(points: Iterable[PointId]) -> dict[PointId, Candidate]:
    """Candidates of which only the ids are known."""
    return {id_: Candidate(id_) for id_ in points}
