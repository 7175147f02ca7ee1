"""Writes the points of one table to a Qdrant server.

A batch is cut into requests over disjoint ids, of which a few are sent side by side, each on a lane
(:mod:`cdc_sync.qdrant.lanes`); the next request is encoded when one has been answered, so encoding
and the server's work overlap. How many go together, and how large one may be, follows the answers
(:mod:`cdc_sync.qdrant.pace`).
Deletes go first: where a collection is full, they make room. The ``timeout`` field of update
requests is left unset: past it a server says WaitTimeout, which tells no more than the deadline of
the call, and servers before 1.17 ignore it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeAlias, TypeVar

from qdrant_client import grpc as q
from qdrant_client.conversions.conversion import grpc_to_payload

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ErrorKind, MappingError, SinkError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.qdrant import answers, messages
from cdc_sync.qdrant.collections import Collections
from cdc_sync.qdrant.lanes import Lanes
from cdc_sync.qdrant.large_rows import LargeRows, is_large
from cdc_sync.qdrant.pace import Pace
from cdc_sync.qdrant.partials import Partial, PartialWriter
from cdc_sync.qdrant.reads import PointReads
from cdc_sync.qdrant.rpc import (
    DELETE,
    QUERY,
    UPSERT,
    Method,
    Rpc,
    RpcError,
    not_completed,
    reason,
    sink_error,
)
from cdc_sync.qdrant.settle import settle
from cdc_sync.qdrant.sink import (
    Applied,
    Changes,
    PreparedRequest,
    RetrievedPoint,
    StoredPoint,
    StoredVector,
)
from cdc_sync.rows import PointId, Row

#: Ids a request of deletes, at most: they are small.
_DELETE_IDS: Final = 4096
#: Below this many points a request is not cut smaller to occupy another lane.
_MIN_POINTS: Final = 64
#: Rows that are encoded together. After them whoever reads from Postgres gets a turn, so that it
#: need not wait for us.
_SLICE: Final = 64

Item = TypeVar("Item")
Encoded = TypeVar("Encoded", bytes, Partial)


@dataclass(slots=True)
class _Outcome:
    completed: set[PointId] = field(default_factory=set)
    missing: set[PointId] = field(default_factory=set)
    refused: list[tuple[PointId, str]] = field(default_factory=list)
    unmappable: set[PointId] = field(default_factory=set)


@dataclass(slots=True)
class _Left:
    """Rows that are not encoded yet, and the points that did not go into the last request."""

    rows: Iterator[tuple[PointId, Row]]
    encoded: deque[tuple[PointId, bytes]] = field(default_factory=deque)


#: Sends one part of a batch on a lane.
_Job: TypeAlias = Callable[[int, _Outcome], Coroutine[None, None, None]]


class ServerWriter:
    """A :class:`~cdc_sync.qdrant.sink.TableWriter` for a server."""

    def __init__(
        self,
        rpc: Rpc,
        settings: QdrantSettings,
        plan: TablePlan,
        pace: Pace | None = None,
        lanes: Lanes | None = None,
    ) -> None:
        self._rpc = rpc
        self._settings = settings
        self._plan = plan
        self._pace = Pace(settings) if pace is None else pace
        self._lanes = Lanes(settings.parallel_requests) if lanes is None else lanes
        self._codec = WireCodec(plan)
        self._large = LargeRows(plan, settings.max_row_bytes)
        self._reads = PointReads(rpc, plan.collection)
        self._partials = PartialWriter(rpc, self._reads, plan, self._codec, self._large)
        self._collections = Collections(rpc)
        self._filter = messages.table_filter(plan)
        self._target = f"collection {plan.collection}"

    @property
    def plan(self) -> TablePlan:
        """The plan it was made for."""
        return self._plan

    @property
    def values_nulled(self) -> int:
        """NaN and infinities written as null so far."""
        return self._codec.non_finite + self._large.non_finite

    async def apply(self, changes: Changes) -> Applied:
        """See :meth:`~cdc_sync.qdrant.sink.TableWriter.apply`."""
        require_disjoint(changes)
        jobs = deque(self._cut(changes))
        outcome = _Outcome()
        together = min(self._pace.requests, len(jobs))
        try:
            if together == 1:
                await self._work(jobs, outcome)
            else:
                await settle(
                    [asyncio.create_task(self._work(jobs, outcome)) for _ in range(together)]
                )
        except SinkError as error:
            error.completed = frozenset(outcome.completed - outcome.missing)
            raise
        return Applied(
            frozenset(outcome.missing), tuple(outcome.refused), frozenset(outcome.unmappable)
        )

    def prepare(self, rows: Sequence[tuple[PointId, Row]]) -> list[PreparedRequest]:
        """Encode rows, of which points can be made, into requests of the largest size, to be sent
        later: what the server takes without us. Their send() knows no pace and never divides.
        """
        requests: list[PreparedRequest] = []
        points: list[bytes] = []
        size = 0

        def finish() -> None:
            request = messages.upsert(self._plan.collection, points)
            requests.append(PreparedRequest(len(points), partial(self._send_prepared, request)))

        for id_, row in rows:
            point = self._codec.point(id_, row)
            too_large = size + len(point) > self._settings.request_bytes
            if points and (too_large or len(points) >= self._settings.request_points):
                finish()
                points, size = [], 0
            points.append(point)
            size += len(point)
        if points:
            finish()
        return requests

    async def _send_prepared(self, request: bytes, lane: int) -> None:
        try:
            await self._update(UPSERT, request, lane)
        except RpcError as failure:
            raise sink_error(failure, self._target) from failure

    def _cut(self, changes: Changes) -> list[_Job]:
        requests, most = self._pace.requests, self._settings.request_points

        def size(count: int) -> int:
            return min(most, max(-(-(count + changes.beside) // requests), _MIN_POINTS))

        upserts = _slices(changes.upserts, size(len(changes.upserts)))
        partials = _slices(changes.partials, size(len(changes.partials)))
        return [
            *(partial(self._delete, ids) for ids in _slices(changes.deletes, _DELETE_IDS)),
            *(partial(self._upsert, changes.large, rows) for rows in upserts),
            *(partial(self._partial, changes.large, rows) for rows in partials),
        ]

    async def _work(self, jobs: deque[_Job], outcome: _Outcome) -> None:
        try:
            while jobs:
                job = jobs.popleft()
                async with self._lanes.one() as lane:
                    await job(lane, outcome)
        except BaseException:
            # The batch is going to be applied again as a whole: the others need not start more of
            # it.
            jobs.clear()
            raise

    async def _upsert(
        self, large: bool, rows: Sequence[tuple[PointId, Row]], lane: int, outcome: _Outcome
    ) -> None:
        async def send(points: Sequence[tuple[PointId, bytes]]) -> None:
            request = messages.upsert(self._plan.collection, [point for _, point in points])
            await self._update(UPSERT, request, lane)

        for some in self._portions(rows):
            left = _Left(iter(some))
            while request := await self._next_request(left, large, outcome):
                await self._divide(request, send, outcome)

    async def _next_request(
        self, left: _Left, large: bool, outcome: _Outcome
    ) -> list[tuple[PointId, bytes]]:
        """Encode the points of the next request, as many as the pace allows bytes for."""
        most, size = self._pace.bytes, 0
        request: list[tuple[PointId, bytes]] = []
        # Large rows are encoded in a thread, and for them the others need not wait.
        async with contextlib.nullcontext() if large else self._lanes.encoding:
            while left.encoded or await self._encode_next(left, large, outcome):
                encoded = left.encoded
                while encoded:
                    size += len(encoded[0][1])
                    if request and size > most:
                        return request
                    request.append(encoded.popleft())
        return request

    async def _encode_next(self, left: _Left, large: bool, outcome: _Outcome) -> bool:
        """Encode the next rows, one where it may be large; False if there are no more."""
        some = list(itertools.islice(left.rows, 1 if large else _SLICE))
        if large and some and is_large(some[0][1]):
            points = [await self._large_point(*some[0])]
        else:
            points = self._codec.points(some)
        for (id_, _), point in zip(some, points, strict=True):
            if isinstance(point, MappingError):
                outcome.refused.append((id_, point.message))
                outcome.unmappable.add(id_)
            else:
                left.encoded.append((id_, point))
        # Whoever reads from Postgres gets a turn.
        if large or len(some) == _SLICE:
            await asyncio.sleep(0)
        return bool(some)

    async def _large_point(self, id_: PointId, row: Row) -> bytes | MappingError:
        try:
            return await self._large.encode(row, partial(_point, id_, row))
        except MappingError as error:
            return error

    async def _partial(
        self, large: bool, rows: Sequence[tuple[PointId, Row]], lane: int, outcome: _Outcome
    ) -> None:
        async def send(points: Sequence[tuple[PointId, Partial]]) -> None:
            outcome.missing.update(await self._partials.write([one for _, one in points], lane))

        for some in self._portions(rows):
            encoded, missing, refused = await self._encode_partials(large, some, lane)
            outcome.missing.update(missing)
            outcome.refused.extend(refused)
            outcome.unmappable.update(id_ for id_, _ in refused)
            most = self._pace.bytes
            request: list[tuple[PointId, Partial]] = []
            size = 0
            for one in encoded:
                if request and size + len(one) > most:
                    await self._divide(request, send, outcome)
                    request, size = [], 0
                request.append((one.id, one))
                size += len(one)
            if request:
                await self._divide(request, send, outcome)

    async def _encode_partials(
        self, large: bool, rows: Sequence[tuple[PointId, Row]], lane: int
    ) -> tuple[list[Partial], list[PointId], list[tuple[PointId, str]]]:
        epoch = self._pace.sent(len(rows))
        try:
            return await self._partials.encode(rows, lane, large=large)
        except SinkError as error:
            self._slow_down(error, epoch)
            raise
        finally:
            self._pace.ended(len(rows))

    async def _delete(self, ids: Sequence[PointId], lane: int, outcome: _Outcome) -> None:
        async def send(some: Sequence[tuple[PointId, bytes]]) -> None:
            request = messages.delete(self._plan.collection, [id_ for _, id_ in some])
            await self._update(DELETE, request, lane)

        # They are small, so there may be many; but the rate limiter counts them like points.
        for some in [ids] if self._pace.cause is None else self._portions(ids):
            await self._divide([(id_, self._codec.point_id(id_)) for id_ in some], send, outcome)

    def _portions(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """Slices, each as large as the pace allows by then."""
        start = 0
        while start < len(items):
            some = items[start : start + self._pace.points]
            yield some
            start += len(some)

    async def _divide(
        self,
        items: Sequence[tuple[PointId, Encoded]],
        send: Callable[[Sequence[tuple[PointId, Encoded]]], Coroutine[None, None, None]],
        outcome: _Outcome,
    ) -> None:
        """Send items, in smaller parts as long as Qdrant takes something in them as invalid, or the
        whole as too large.
        """
        epoch, started = self._pace.sent(len(items)), time.monotonic()
        try:
            await send(items)
        except RpcError as failure:
            parts = self._parts(failure, items, epoch, outcome)
        except SinkError as error:
            self._slow_down(error, epoch)
            raise
        else:
            self._pace.completed(time.monotonic() - started)
            outcome.completed.update([id_ for id_, _ in items])
            return
        finally:
            self._pace.ended(len(items))
        for part in parts:
            await self._divide(part, send, outcome)

    def _parts(
        self,
        failure: RpcError,
        items: Sequence[tuple[PointId, Encoded]],
        epoch: int,
        outcome: _Outcome,
    ) -> list[Sequence[tuple[PointId, Encoded]]]:
        """The parts in which to send what was not taken; none if it never will be. Raises what no
        smaller request would mend.
        """
        count = len(items)
        half = max(1, count // 2)
        limit = failure.batch_limit
        if failure.oversized:
            size = sum(len(one) for _, one in items)
            most = answers.message_limit(failure.details)
            if count == 1:
                outcome.refused.append((items[0][0], _too_large(size, most, failure)))
                return []
            self._pace.limit_bytes(size // 2 if most is None else most)
        elif limit is not None and count > 1:
            self._pace.limit_points(max(1, limit))
            return _slices(items, max(1, min(limit, half)))
        elif failure.over_capacity and count > 1:
            self._pace.limit_points(half)
        elif failure.invalid:
            if count == 1:
                outcome.refused.append((items[0][0], reason(failure.details)))
                return []
        else:
            error = sink_error(failure, self._target)
            error.__cause__ = failure
            self._slow_down(error, epoch)
            raise error
        return _slices(items, half)

    def _slow_down(self, error: SinkError, epoch: int) -> None:
        """Send less at once, if that is what an error of a request calls for."""
        failure = error.__cause__
        if not isinstance(failure, RpcError):
            # Answered, but not with Completed: not in time.
            if error.kind is ErrorKind.SINK_UNKNOWN:
                self._pace.shrink("deadline", epoch)
        elif failure.timed_out:
            self._pace.shrink("deadline", epoch)
        elif failure.rate_limited:
            self._pace.shrink("rate_limit", epoch)
            if error.retry_after_seconds is not None:
                error.retry_after_seconds *= self._pace.patience

    async def _update(
        self, method: Method[q.PointsOperationResponse], request: bytes, lane: int
    ) -> None:
        answer = await self._rpc.call(method, request, lane)
        if answer.result.status != q.UpdateStatus.Completed:
            raise not_completed(answer.result.status, method, self._target)

    async def clear(self) -> None:
        """Remove every point of the table, by ids, page by page.

        Deleting by filter would be one operation, but one that can outlast any deadline and then
        never completes; and servers from 1.16 to 1.18 evaluate the filter again when they replay
        their WAL.
        """
        while True:
            ids, _ = await self._scroll_page(_DELETE_IDS, None)
            if not ids:
                return
            outcome = _Outcome()
            await self._delete(ids, 0, outcome)
            if outcome.refused:
                raise ValueError(f"{self._target} refuses ids that it returned itself")

    async def count(self) -> int:
        """Exact number of points of the table."""
        return await self._collections.count(self._plan.collection, self._filter)

    async def retrieve(self, ids: Sequence[PointId]) -> list[RetrievedPoint]:
        """The points of these ids that exist, in any order, with payload and vectors."""
        jobs = deque(_slices(ids, self._settings.request_points))
        found: list[RetrievedPoint] = []
        lanes = min(self._settings.parallel_requests, len(jobs))
        await settle(
            [asyncio.create_task(self._retrieve(lane, jobs, found)) for lane in range(lanes)]
        )
        return found

    async def _retrieve(
        self, lane: int, jobs: deque[Sequence[PointId]], found: list[RetrievedPoint]
    ) -> None:
        while jobs:
            ids = [self._codec.point_id(id_) for id_ in jobs.popleft()]
            try:
                points = await self._reads.get(
                    ids, lane, with_payload=True, with_vectors=True, patient=True
                )
            except RpcError as failure:
                raise sink_error(failure, self._target) from failure
            found += [
                RetrievedPoint(
                    messages.point_id_value(point.id),
                    grpc_to_payload(point.payload),
                    messages.retrieved_vectors(point.vectors),
                )
                for point in points
            ]

    async def scroll_ids(self, page: int = 1000) -> AsyncIterator[list[PointId]]:
        """All ids of the table's points, in pages."""
        offset: q.PointId | None = None
        while True:
            ids, offset = await self._scroll_page(page, offset)
            if ids:
                yield ids
            if offset is None:
                return

    async def _scroll_page(
        self, page: int, offset: q.PointId | None
    ) -> tuple[list[PointId], q.PointId | None]:
        answer = await self._scroll(page, offset, payload=False, vectors=False)
        ids = [messages.point_id_value(point.id) for point in answer.result]
        return ids, answer.next_page_offset if answer.HasField("next_page_offset") else None

    async def _scroll(
        self, page: int, offset: q.PointId | None, *, payload: bool, vectors: bool
    ) -> q.ScrollResponse:
        request = q.ScrollPoints(
            collection_name=self._plan.collection,
            filter=self._filter,
            offset=offset,
            limit=page,
            with_payload=q.WithPayloadSelector(enable=payload),
            with_vectors=q.WithVectorsSelector(enable=vectors),
        )
        try:
            return await self._reads.scroll(request, patient=True)
        except RpcError as failure:
            raise sink_error(failure, self._target) from failure

    async def scroll_points(
        self, page: int = 256, with_vectors: bool = True
    ) -> AsyncIterator[list[StoredPoint]]:
        """All points of the table with their payload, in pages."""
        offset: q.PointId | None = None
        while True:
            answer = await self._scroll(page, offset, payload=True, vectors=with_vectors)
            if answer.result:
                yield [
                    StoredPoint(
                        messages.point_id_value(point.id),
                        grpc_to_payload(point.payload),
                        messages.stored_vectors(point.vectors),
                    )
                    for point in answer.result
                ]
            if not answer.HasField("next_page_offset"):
                return
            offset = answer.next_page_offset

    async def search(
        self, vector_name: str, vector: StoredVector, limit: int
    ) -> list[tuple[PointId, float, dict[str, object]]]:
        """The ``limit`` nearest points of the table with score and payload, best first."""
        request = q.QueryPoints(
            collection_name=self._plan.collection,
            query=q.Query(nearest=messages.vector_input(vector)),
            using=vector_name or None,
            filter=self._filter,
            limit=limit,
            with_payload=q.WithPayloadSelector(enable=True),
        )
        answer = await self._rpc.request(QUERY, request.SerializeToString(), self._target)
        return [
            (messages.point_id_value(point.id), float(point.score), grpc_to_payload(point.payload))
            for point in answer.result
        ]


def require_disjoint(changes: Changes) -> None:
    """Raise ValueError if an id occurs twice: two requests would then race for the point."""
    ids = {id_ for id_, _ in changes.upserts}
    ids.update(id_ for id_, _ in changes.partials)
    ids.update(changes.deletes)
    if len(ids) != len(changes):
        raise ValueError("a point id occurs twice in one batch; coalesce it first")


def _point(id_: PointId, row: Row, codec: WireCodec) -> bytes:
    return codec.point(id_, row)


def _too_large(size: int, most: int | None, failure: RpcError) -> str:
    limit = "" if most is None else f" of {most} bytes"
    said = reason(failure.details).rstrip(".")
    return f"The point has {size} bytes, above the limit{limit} of a message to Qdrant: {said}"


def _slices(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
