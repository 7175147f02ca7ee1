"""Sending at the pace of a server that is simulated, time and all: how much is sent, how often it
is refused, and that everything arrives whatever the limits are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeVar, cast

import grpc
import pytest
from qdrant_client import grpc as q

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import CdcSyncError, SinkError
from cdc_sync.qdrant.pace import Pace
from cdc_sync.qdrant.rpc import Method, Rpc, RpcError
from cdc_sync.qdrant.sink import Applied, Changes
from cdc_sync.qdrant.writer import ServerWriter
from cdc_sync.rows import UNCHANGED
from cdc_sync.sync.retry import retrying
from cdc_sync.sync.writing import writing
from tests.support.sink_rows import item, items_plan

Response = TypeVar("Response")
_C = grpc.StatusCode

SETTINGS = QdrantSettings(parallel_requests=4, request_points=50)


class Server:
    """Points by id, a rate limit in tokens a minute, and a number of points above which requests
    in flight together are not answered in time (but applied, each second one)."""

    def __init__(self, *, a_minute: int | None = None, at_once: int | None = None) -> None:
        self.points: dict[int, str] = {}
        self.requests = self.refused = 0
        self.time = 0.0
        self._capacity = a_minute
        self._tokens = float(a_minute or 0)
        self._charged = 0.0
        self._at_once = at_once
        self._in_flight = 0

    async def call(
        self, method: Method[Response], request: bytes, lane: int = 0, *, unlimited: bool = False
    ) -> Response:
        self.requests += 1
        message = _REQUESTS[method.name](request)
        points = len(_ids(message))
        self._in_flight += points
        try:
            # All lanes send before the first is answered.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if self._at_once is not None and self._in_flight > self._at_once:
                self.refused += 1
                if self.refused % 2:
                    self._apply(message)
                raise RpcError(method, _C.DEADLINE_EXCEEDED, "Deadline Exceeded", None)
            return cast("Response", self._handle(method, message))
        finally:
            self._in_flight -= points

    def _handle(self, method: Method[Response], message: object) -> object:
        if isinstance(message, q.UpdateBatchPoints):
            results = []
            for operation in message.operations:
                self._charge(method, len(_ids(operation)))
                self._apply(operation)
                results.append(q.UpdateResult(status=q.Completed))
            return q.UpdateBatchResponse(result=results)
        self._charge(method, len(_ids(message)))
        self._apply(message)
        return q.PointsOperationResponse(result=q.UpdateResult(status=q.Completed))

    def _charge(self, method: Method[Response], cost: int) -> None:
        if self._capacity is None:
            return
        rate = self._capacity / 60
        self._tokens = min(self._capacity, self._tokens + (self.time - self._charged) * rate)
        self._charged = self.time
        if cost <= self._tokens:
            self._tokens -= cost
            return
        self.refused += 1
        if cost > self._capacity:
            text = "request larger than rate limiter capacity, please try to split your request"
            raise RpcError(method, _C.RESOURCE_EXHAUSTED, text, None)
        wait = float(-(-(cost - self._tokens) // rate))
        text = f"Rate limiting exceeded: Write rate limit exceeded: requires {cost} tokens"
        raise RpcError(method, _C.RESOURCE_EXHAUSTED, text, max(1.0, wait))

    def _apply(self, message: object) -> None:
        if isinstance(message, q.UpsertPoints):
            for point in message.points:
                self.points[point.id.num] = point.payload["title"].string_value
        elif isinstance(message, q.UpdateBatchPoints):
            for operation in message.operations:
                self._apply(operation)
        elif isinstance(message, q.PointsUpdateOperation):
            if message.WhichOneof("operation") == "overwrite_payload":
                title = message.overwrite_payload.payload["title"].string_value
                for number in _ids(message):
                    self.points[number] = title
        elif isinstance(message, q.DeletePoints):
            for number in _ids(message):
                self.points.pop(number, None)

    async def sleep(self, seconds: float) -> None:
        self.time += seconds


_REQUESTS = {
    "Upsert": q.UpsertPoints.FromString,
    "Delete": q.DeletePoints.FromString,
    "UpdateBatch": q.UpdateBatchPoints.FromString,
    "SetPayload": q.SetPayloadPoints.FromString,
}


def _ids(message: object) -> list[int]:
    if isinstance(message, q.UpdateBatchPoints):
        return [number for operation in message.operations for number in _ids(operation)]
    if isinstance(message, q.PointsUpdateOperation):
        kind = message.WhichOneof("operation")
        inner = getattr(message, str(kind))
        if kind == "update_vectors":
            return [point.id.num for point in inner.points]
        return [one.num for one in inner.points_selector.points.ids]
    if isinstance(message, q.UpsertPoints):
        return [point.id.num for point in message.points]
    if isinstance(message, q.SetPayloadPoints):
        return [one.num for one in message.points_selector.points.ids]
    assert isinstance(message, q.DeletePoints)
    return [one.num for one in message.points.points.ids]


def writer_of(server: Server) -> tuple[ServerWriter, Pace]:
    pace = Pace(SETTINGS, clock=lambda: server.time)
    return ServerWriter(cast("Rpc", server), SETTINGS, items_plan("items"), pace), pace


async def write(server: Server, writer: ServerWriter, changes: Changes) -> int:
    """Write as the pipeline does; returns how often it was tried again."""
    tries = 0

    def again(error: CdcSyncError, seconds: float) -> None:
        nonlocal tries
        assert isinstance(error, SinkError)
        tries += 1
        assert tries < 1000, "it would never end"

    applied = await retrying(writing(writer, changes), again, server.sleep)
    assert applied == Applied()
    return tries


def rows(count: int, title: str) -> Changes:
    return Changes(upserts=[(n, item(n, title)) for n in range(count)])


def partials(numbers: Sequence[int], title: str) -> Changes:
    """Updates that write payload and one vector, and leave the other as it is."""
    return Changes(partials=[(n, item(n, title, None, (0.0, 1.0), UNCHANGED)) for n in numbers])


@pytest.mark.parametrize("a_minute", [10, 60, 140, 1000])
async def test_everything_gets_through_a_rate_limit_at_about_its_rate(a_minute: int) -> None:
    server = Server(a_minute=a_minute)
    writer, _ = writer_of(server)
    await write(server, writer, rows(1000, "a"))
    assert server.points == dict.fromkeys(range(1000), "a")
    ideal = max(0.0, 1000 - a_minute) / a_minute * 60
    assert server.time <= 2.0 * ideal + 60, "the rate is used, not wasted by waiting"


@pytest.mark.parametrize("a_minute", [20, 60, 140])
async def test_partials_get_through_though_a_batch_costs_more_than_the_limiter_holds(
    a_minute: int,
) -> None:
    """Each operation of a batch is charged, and those before the refused one again with the next
    try: if batches stayed as they are it would never end."""
    server = Server()
    writer, _ = writer_of(server)
    await write(server, writer, rows(200, "a"))
    server = Server(a_minute=a_minute)
    server.points = dict.fromkeys(range(200), "a")
    writer, pace = writer_of(server)
    await write(server, writer, partials(range(200), "b"))
    assert server.points == dict.fromkeys(range(200), "b")
    assert pace.cause == "rate_limit"


async def test_deletes_are_charged_too() -> None:
    server = Server(a_minute=100)
    server.points = dict.fromkeys(range(1000), "a")
    writer, _ = writer_of(server)
    await write(server, writer, Changes(deletes=list(range(1000))))
    assert server.points == {}


@pytest.mark.parametrize("at_once", [1, 7, 60, 150])
async def test_a_server_that_is_slow_with_much_is_sent_little(at_once: int) -> None:
    """It settles: hardly a request fails, once the server's measure is found; and when the server
    has recovered, everything is sent again."""
    server = Server(at_once=at_once)
    writer, pace = writer_of(server)
    await write(server, writer, rows(800, "a"))
    first_requests, first_refused = server.requests, server.refused
    await write(server, writer, rows(800, "b"))
    assert server.points == dict.fromkeys(range(800), "b")
    refused = server.refused - first_refused
    assert refused / (server.requests - first_requests) < 0.2
    assert pace.window <= 2 * at_once + 2
    assert pace.window >= at_once // 4
    server._at_once = None
    for _ in range(40):
        await write(server, writer, rows(800, "c"))
    assert (pace.window, pace.cause) == (200, None)


async def test_while_all_goes_well_requests_are_as_configured() -> None:
    server = Server()
    writer, pace = writer_of(server)
    for _ in range(10):
        await write(server, writer, rows(800, "a"))
    assert server.requests == 10 * 800 / 50
    assert pace.cause is None
