"""Verifies one table: its collection, its rows and the points, and puts together what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cdc_sync.errors import MappingError
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.key_values import compile_key_values, key_values_of_id
from cdc_sync.mapping.migration_ids import SharedIdError
from cdc_sync.mapping.table import Leaf, Table
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.counting import LeafCount, count_rows
from cdc_sync.postgres.refetch import fetch_rows
from cdc_sync.postgres.snapshot import key_query
from cdc_sync.qdrant.sink import Sink
from cdc_sync.rows import PointId, RawValue, Row
from cdc_sync.sync.orphans import KnownIds, sweep
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.verify.collection import compare_collection
from cdc_sync.verify.comparing import Comparer
from cdc_sync.verify.keys import KeyFinder, RawKey
from cdc_sync.verify.kinds import Deviation, Kind
from cdc_sync.verify.reading import LeafRows, TableReading, leaf_name
from cdc_sync.verify.report import LeafReport, TableReport
from cdc_sync.verify.settling import Candidate, Judged, Settler, as_candidates
from cdc_sync.verify.source import Pace, SourceReader, patiently
from cdc_sync.verify.stream import Passed, StreamWatch
from cdc_sync.verify.swaps import WrongVector, recognise_swaps

#: Candidates that are settled together, so that memory is bounded.
_WAVE: Final = 20_000
#: Batches whose points are being read at once.
_IN_FLIGHT: Final = 3
#: Rows of a sample that are compared at once.
_SMALL: Final = 256
#: Differing vectors that are compared with each other.
_WRONG_VECTORS: Final = 5_000
#: Keys and ids that are kept for a repair; more are repaired with the table as a whole.
_REPAIRED: Final = 60_000
#: Ids of rows that are held at once, 8 or 16 bytes each.
_HELD_IDS: Final = 8_000_000
_SCROLL_PAGE: Final = 4_096
#: How often counts are compared, while both sides are written.
_COUNTS: Final = 4
#: A partition is missing if this part of its rows has no point.
_WHOLLY: Final = 0.5


@dataclass(slots=True)
class TableFindings:
    """The report of a table, and what a repair needs: keys, as texts, of rows to read again or of
    points to remove, and ids of points whose key is not known. ``overflow``: there are too many of
    them. ``without_id``: rows that have no id, by what is wrong with them."""

    planned: PlannedTable
    report: TableReport
    keys: dict[PointId, tuple[str, ...]] = field(default_factory=dict)
    ids: set[PointId] = field(default_factory=set)
    overflow: bool = False
    without_id: Counter[str] = field(default_factory=Counter)

    @property
    def repairable(self) -> bool:
        """Whether reading rows again mends something."""
        return bool(self.keys or self.ids or self.overflow)


@dataclass(frozen=True, slots=True)
class How:
    """How to verify. ``sample``: so many random rows and points; ``where``: SQL, only rows for
    which it is true; neither: everything. ``rate``: rows a second at the most. ``examples``:
    differences of each kind that are shown. ``seed`` of the sample; None: another one each time."""

    sample: int | None = None
    where: str | None = None
    rate: float | None = None
    examples: int = 10
    seed: int | None = None

    @property
    def mode(self) -> str:
        """By name."""
        return "sample" if self.sample else "where" if self.where is not None else "full"


#: Why the point of a row that is a dead letter differs.
LETTER_CAUSE: Final = "it could not be written, and is a dead letter: cdc-sync dlq list"

#: Told of rows compared or points looked up so far, of how many are expected, of what is being
#: done, and of differences found.
Progress = Callable[[int, int, str, int], None]


@dataclass(frozen=True, slots=True)
class Sides:
    """Both sides of a verification. ``copying`` reads tables as a whole, ``asking`` everything
    else meanwhile."""

    sink: Sink
    copying: SourceReader
    asking: SourceReader
    stream: StreamWatch


class TableVerifier:
    """Verifies one table. ``dead_letters``: reasons by point id. Make a new one for each time."""

    def __init__(
        self,
        planned: PlannedTable,
        sides: Sides,
        how: How,
        dead_letters: Mapping[str, str],
        progress: Progress,
    ) -> None:
        plan = planned.plan
        self._planned = planned
        self._sides = sides
        self._writer = sides.sink.writer(plan)
        self._how = how
        self._dead_letters = dead_letters
        self._progress = progress
        self._pace = Pace(how.rate)
        self._random = random.Random(how.seed)
        report = TableReport(planned.name, plan.collection, how.examples)
        report.sampled = how.sample is not None
        report.dead_letters = len(dead_letters)
        self._report = report
        self._findings = TableFindings(planned, report)
        names = map(leaf_name, planned.table.leaves)
        self._leaves = {name: LeafReport(name) for name in names}
        self._missing: dict[str, list[tuple[PointId, tuple[str, ...] | None]]] = {}
        self._point_id = compile_point_id(plan)
        self._key_values = compile_key_values(plan)
        self._keys = KeyFinder(planned, sides.asking)
        self._comparer = Comparer(plan)
        self._known: KnownIds | None = None
        self._candidates: dict[PointId, Candidate] = {}
        self._wrong: list[WrongVector] = []

    async def run(self) -> TableFindings:
        """Verify it. Raises :class:`SourceError` and :class:`SinkError`."""
        counts = await self._count_rows()
        if not await self._begin(counts):
            return self._findings
        if self._how.sample is not None:
            await self._compare(self._reading().sample(self._how.sample, self._random))
            number = self._how.sample
            await self._look_up(await patiently(lambda: self._random_points(number)))
            await self._settle()
            await self._compare_counts()
        elif self._how.where is not None:
            await self._compare(self._reading().where(self._how.where, self._sides.asking))
            await self._settle()
        else:
            await self._verify_all()
        self._conclude()
        return self._findings

    async def again(self, before: TableFindings) -> TableFindings:
        """Verify what was found differing before. Raises as :meth:`run`."""
        if before.overflow:
            self._how = dataclasses.replace(self._how, sample=None, where=None)
            return await self.run()
        if await self._begin(await self._count_rows()):
            keys = await self._keys.parse(before.keys)
            self._candidates = as_candidates([*before.keys, *before.ids])
            for id_, key in keys.items():
                self._candidates[id_].key = key
            self._report.ids = len(self._candidates)
            await self._settle()
            # They are as they were.
            self._findings.without_id = before.without_id
            self._conclude()
        return self._findings

    # -- part by part

    async def begin(self) -> bool:
        """Look at the collection, for a verification part by part; False if there is none. Raises
        as :meth:`run`."""
        return await self._begin(())

    async def verify_blocks(self, leaf: Leaf, start: int, end: int | None) -> TableFindings:
        """Verify the rows of some blocks of a leaf; returns what was found in all so far. Raises as
        :meth:`run`."""
        await self._compare(self._reading().chunk(leaf, start, end))
        await self._settle()
        return self._findings

    async def verify_points(self, page: int) -> TableFindings:
        """Look for points without a row; returns what was found in all so far. Raises as
        :meth:`run`."""
        async for ids in self._writer.scroll_ids(page):
            await self._pace.spend(len(ids))
            self._report.ids += len(ids)
            points = await patiently(lambda ids=ids: self._writer.retrieve(ids))  # type: ignore[misc]
            keys = await self._keys.told(points)
            rows = await patiently(
                lambda k=keys: self._sides.asking.run(lambda c: self._fetch(c, list(k.values())))  # type: ignore[misc]
            )
            there = {id_ for id_, _ in self._with_ids(rows)}
            for point in points:
                if point.id not in there:
                    self._candidates[point.id] = Candidate(point.id, keys.get(point.id))
            if len(self._candidates) >= _WAVE:
                await self._settle()
        await self._settle()
        return self._findings

    def _fetch(self, connection: PgConnection, keys: Sequence[RawKey]) -> list[Row]:
        return fetch_rows(connection, self._planned.plan, keys, (), self._planned.selection)

    async def _begin(self, counts: Sequence[LeafCount]) -> bool:
        """Look at the collection; False if there is none."""
        report, plan = self._report, self._planned.plan
        report.rows = sum(leaf.rows for leaf in counts)
        found = await patiently(lambda: self._sides.sink.vectors(plan))
        if found is None:
            report.add(Deviation(Kind.COLLECTION, text=f"{report.rows} rows have no point"))
            return False
        deviations, readable = compare_collection(plan, found)
        for deviation in deviations:
            report.add(deviation)
        self._comparer = Comparer(plan, readable)
        if found.quantized:
            report.notes.append(
                "the collection is quantized, which changes scores; vectors are compared with the "
                "originals that Qdrant keeps, without a tolerance for quantization"
            )
        if self._comparer.opaque:
            report.notes.append(
                "components were not compared, since they are not stored as they were written or "
                f"not at all: {', '.join(map(_vector_label, sorted(self._comparer.opaque)))}"
            )
        report.points = await patiently(self._writer.count)
        return True

    # -- everything

    async def _verify_all(self) -> None:
        report = self._report
        total = max(report.rows, report.points)
        buckets = max(1, -(-total // _HELD_IDS))
        self._known = KnownIds(0, buckets)
        await self._compare(self._reading().all())
        unique = is_unique(self._planned)
        if not unique:
            await self._look_up(self._known.repeated())
        await patiently(self._look_up_all)
        self._known = None
        for bucket in range(1, buckets):
            await self._look_up(await self._orphans(bucket, buckets))
        if buckets > 1 and not unique:
            report.notes.append("whether rows share an id was looked at in a part of them only")
        await self._settle()
        self._report.leaves = list(self._leaves.values())

    async def _look_up_all(self) -> None:
        """Look for points without a row; again from the beginning, if it fails."""
        assert self._known is not None
        self._report.ids = 0
        async for ids in self._writer.scroll_ids(_SCROLL_PAGE):
            self._report.ids += len(ids)
            await self._look_up(self._known.missing_from(ids))
            self._tell("points")

    def _reading(self) -> TableReading:
        return TableReading(self._planned, self._sides.copying)

    async def _orphans(self, bucket: int, buckets: int) -> list[PointId]:
        """Points of one part of the ids that have no row at the moment."""
        plan = self._planned.plan
        queries = [
            key_query(plan, leaf, self._planned.selection) for leaf in self._planned.table.leaves
        ]
        connection = await self._sides.copying.opened()
        return await sweep(connection, self._writer, plan, queries, bucket, buckets)

    # -- rows

    async def _compare(self, portions: AsyncGenerator[LeafRows, None]) -> None:
        """Compare rows with their points; what differs are candidates."""
        running: deque[asyncio.Task[None]] = deque()
        try:
            async with contextlib.aclosing(portions):
                await self._start_batches(portions, running)
            await _all(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _start_batches(
        self, portions: AsyncIterator[LeafRows], running: deque[asyncio.Task[None]]
    ) -> None:
        waiting: list[LeafRows] = []
        async for portion in portions:
            waiting.append(portion)
            rows = sum(len(one.rows) for one in waiting)
            # A sample comes row by row.
            if self._how.sample is not None and rows < _SMALL:
                continue
            await self._pace.spend(rows)
            running.append(asyncio.create_task(self._compare_batch(waiting)))
            waiting = []
            while len(running) >= _IN_FLIGHT:
                await running.popleft()
            if len(self._candidates) >= _WAVE:
                await _all(running)
                await self._settle()
        running.append(asyncio.create_task(self._compare_batch(waiting)))

    async def _compare_batch(self, portions: Sequence[LeafRows]) -> None:
        rows = [
            (id_, row, portion.leaf)
            for portion in portions
            for id_, row in self._with_ids(portion.rows)
        ]
        for portion in portions:
            self._report.compared += len(portion.rows)
            if portion.leaf is not None:
                self._leaves[portion.leaf].rows += len(portion.rows)
        if rows:
            ids = [id_ for id_, _, _ in rows]
            points = await patiently(lambda: self._writer.retrieve(ids))
            stored = {point.id: point for point in points}
            there = [one for one in rows if one[0] in stored]
            equal = self._comparer.equal_all(
                [row for _, row, _ in there], [stored[id_] for id_, _, _ in there]
            )
            fine = {id_ for (id_, _, _), same in zip(there, equal, strict=True) if same}
            for id_, row, leaf in rows:
                if id_ not in fine:
                    self._candidates[id_] = Candidate(id_, self._raw_key(row), leaf)
        self._tell("rows")

    def _with_ids(self, rows: Iterable[Row]) -> Iterable[tuple[PointId, Row]]:
        for row in rows:
            try:
                id_ = self._point_id(row)
            except MappingError as error:
                self._findings.without_id[error.message] += 1
                # A point that the migration tool made of it is not without a row.
                if self._known is not None and isinstance(error.__cause__, SharedIdError):
                    self._known.add(error.__cause__.id)
                continue
            if self._known is not None:
                self._known.add(id_)
            yield id_, row

    def _raw_key(self, row: Row) -> RawKey:
        return tuple(row[position] for position in self._planned.plan.key)

    # -- points

    async def _look_up(self, ids: Iterable[PointId]) -> None:
        """Take points as candidates that may have no row, or two."""
        for id_ in ids:
            self._candidates.setdefault(id_, Candidate(id_))
            if len(self._candidates) >= _WAVE:
                await self._settle()

    async def _random_points(self, number: int) -> list[PointId]:
        """Draw ids; all of them are walked, which costs little without payload and vectors."""
        drawn: list[PointId] = []
        seen = 0
        async for ids in self._writer.scroll_ids(_SCROLL_PAGE):
            for id_ in ids:
                seen += 1
                if len(drawn) < number:
                    drawn.append(id_)
                elif (place := self._random.randrange(seen)) < number:
                    drawn[place] = id_
            self._tell("points")
        self._report.ids = len(drawn)
        return drawn

    # -- judging

    async def _settle(self) -> None:
        """Settle all candidates, and take down what differs."""
        candidates, self._candidates = self._candidates, {}
        if not candidates:
            return
        settler = Settler(
            self._planned,
            self._writer,
            self._comparer,
            self._sides.asking,
            self._sides.stream,
            self._keys,
        )
        settled = await settler.settle(candidates)
        report = self._report
        report.rechecked += settled.resolved
        report.pending += settled.pending
        report.undecided += settled.undecided
        report.notes += sorted(settled.why - set(report.notes))
        for judged in settled.judged:
            self._take(judged)
        self._tell("differences")

    def _take(self, judged: Judged) -> None:
        candidate, report = judged.candidate, self._report
        id_ = candidate.id
        if id_ in self._findings.keys or id_ in self._findings.ids:
            return  # its row was read twice
        if self._report.sampled and judged.row_exists and candidate.leaf is None:
            return  # what is known of rows is said of the random rows
        key = self._key_text(candidate)
        report.different += 1
        self._remember(id_, key)
        letter = self._dead_letters.get(str(id_))
        for deviation in judged.details.deviations:
            if letter is not None:
                deviation = dataclasses.replace(deviation, cause=LETTER_CAUSE)
            if deviation.kind is Kind.MISSING:
                report.missing += 1
                if candidate.leaf is not None and letter is None:
                    self._miss(candidate.leaf, id_, key)
                    continue
            elif deviation.kind is Kind.EXTRA:
                report.extra += 1
            elif deviation.kind is Kind.VECTOR and len(self._wrong) < _WRONG_VECTORS:
                pair = judged.details.vectors[deviation.field]
                self._wrong.append(WrongVector(id_, key, deviation, *pair))
                continue
            report.add(deviation, id_, key)

    def _miss(self, leaf: str, id_: PointId, key: tuple[str, ...] | None) -> None:
        self._leaves[leaf].missing += 1
        examples = self._missing.setdefault(leaf, [])
        if len(examples) < self._how.examples:
            examples.append((id_, key))

    def _key_text(self, candidate: Candidate) -> tuple[str, ...] | None:
        plan = self._planned.plan
        if candidate.key is None:
            return key_values_of_id(plan, str(candidate.id))
        row: Row = [None] * len(plan.columns)
        value: RawValue
        for position, value in zip(plan.key, candidate.key, strict=True):
            row[position] = value
        return self._key_values(row)

    def _remember(self, id_: PointId, key: tuple[str, ...] | None) -> None:
        findings = self._findings
        if len(findings.keys) + len(findings.ids) >= _REPAIRED:
            findings.overflow = True
        elif key is not None:
            findings.keys[id_] = key
        else:
            findings.ids.add(id_)

    def _conclude(self) -> None:
        """Say what the single differences mean together."""
        report = self._report
        deviations = recognise_swaps(self._comparer, self._wrong)
        for one, deviation in zip(self._wrong, deviations, strict=True):
            report.add(deviation, one.id, one.key)
        for message, count in self._findings.without_id.items():
            report.add(Deviation(Kind.UNMAPPABLE, text=message), count=count)
        for name, examples in self._missing.items():
            leaf = self._leaves[name]
            wholly = self._planned.table.partitioned and leaf.missing >= _WHOLLY * leaf.rows
            if wholly and not report.sampled:
                text = f"{leaf.missing} of its {leaf.rows} rows have no point"
                report.add(Deviation(Kind.PARTITION, name, text), count=leaf.missing)
            else:
                for id_, key in examples:
                    report.add(Deviation(Kind.MISSING), id_, key)
                more = leaf.missing - len(examples)
                report.add(Deviation(Kind.MISSING), count=more, example=False)
        self._missing.clear()
        if self._how.mode == "full" and report.missing != report.extra:
            text = (
                f"{report.rows} rows, {report.points} points: {report.missing} rows without a "
                f"point, {report.extra} points without a row"
            )
            report.add(Deviation(Kind.COUNT, text=text))
        elif report.missing and report.missing == report.extra:
            report.notes.append("counts agree, although as many points are missing as are extra")

    # -- counts

    async def _count_rows(self) -> tuple[LeafCount, ...]:
        table, selection = self._planned.table, self._planned.selection

        def count(connection: PgConnection) -> tuple[LeafCount, ...]:
            return count_rows(connection, table.leaves, selection)

        return await patiently(lambda: self._sides.asking.run(count))

    async def _compare_counts(self) -> None:
        """Compare counts of both sides; those of a system that is written are of different
        moments, so only what stays the same counts."""
        report, seen = self._report, set[int]()
        for _ in range(_COUNTS):
            report.rows = sum(leaf.rows for leaf in await self._count_rows())
            passed = await self._sides.stream.passed(await self._sides.stream.position())
            report.points = await patiently(self._writer.count)
            seen.add(report.rows - report.points)
            if 0 in seen:
                return
        still = passed in (Passed.YES, Passed.NO_SLOT)
        if passed is Passed.NOBODY:
            still = await self._sides.stream.changes_waiting(self._planned) is False
        if len(seen) > 1 or not still:
            report.notes.append(
                f"the counts, {report.rows} rows and {report.points} points, are of different "
                "moments: a full verification tells more"
            )
        else:
            text = f"{report.rows} rows, {report.points} points"
            report.add(Deviation(Kind.COUNT, text=text))

    def _tell(self, doing: str) -> None:
        report = self._report
        if doing == "points":
            self._progress(report.ids, report.points, doing, report.different)
        else:
            expected = report.rows if self._how.sample is None else self._how.sample
            self._progress(report.compared, expected, doing, report.different)


def is_unique(planned: PlannedTable) -> bool:
    """Whether the table's constraints keep two rows from having one key."""
    return _is_unique(planned.table, {planned.plan.columns[i].name for i in planned.plan.key})


def _is_unique(table: Table, key: set[str]) -> bool:
    if table.primary_key and set(table.primary_key) <= key and not table.children:
        return True
    return not table.children and any(
        index.unique
        and index.valid
        and index.predicate is None
        and not index.relation
        and {column.column for column in index.columns} <= key
        for index in table.indexes
    )


async def _all(tasks: deque[asyncio.Task[None]]) -> None:
    while tasks:
        await tasks.popleft()


def _vector_label(name: str) -> str:
    return name or "the unnamed vector"
