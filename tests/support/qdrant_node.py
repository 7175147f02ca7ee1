"""The services of the Qdrant test server, and the gateway in front of them."""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
from qdrant_client import grpc as q

from tests.support import qdrant_reads as reads
from tests.support.qdrant_edits import BATCHED, WRITES, edit, request_type, serialized, touched
from tests.support.qdrant_faults import Fault, FaultPlan, RequestLog
from tests.support.qdrant_schema import check_collection_name
from tests.support.qdrant_status import RefusalError, from_engine, unavailable, validation
from tests.support.qdrant_storage import Collection, Registry
from tests.support.qdrant_strict import StrictMode

CONTROL = "/cdc_sync.test.Control/Call"
OBSERVER = "x-test-observer"
"""Requests with this header meet no faults and are not logged."""

_WORKERS = 128
_POOL_MESSAGE_SIZE = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
]


@dataclass(frozen=True, slots=True)
class Route:
    """One method: its name in logs and faults, message types, what answers it, whether it writes
    points.
    """

    name: str
    request: type[Any]
    handle: Callable[[Any], Any]
    writes: bool = False


class Node:
    """The services behind the protocol."""

    def __init__(self, root: Path, version: str) -> None:
        self.version = version
        self.registry = Registry(root)

    def health(self, _: q.HealthCheckRequest) -> q.HealthCheckReply:
        return q.HealthCheckReply(title="qdrant - vector search engine", version=self.version)

    # Collections

    def create(self, request: q.CreateCollection) -> q.CollectionOperationResponse:
        check_collection_name(request.collection_name)
        self.registry.create(request)
        return q.CollectionOperationResponse(result=True)

    def describe(self, request: q.GetCollectionInfoRequest) -> q.GetCollectionInfoResponse:
        collection = self.registry.get(request.collection_name)
        return q.GetCollectionInfoResponse(result=collection.describe())

    def list_all(self, _: q.ListCollectionsRequest) -> q.ListCollectionsResponse:
        names = self.registry.names()
        return q.ListCollectionsResponse(
            collections=[q.CollectionDescription(name=name) for name in names]
        )

    def change(self, request: q.UpdateCollection) -> q.CollectionOperationResponse:
        self.registry.get(request.collection_name).change(request)
        return q.CollectionOperationResponse(result=True)

    def delete(self, request: q.DeleteCollection) -> q.CollectionOperationResponse:
        done = self.registry.delete(request.collection_name)
        return q.CollectionOperationResponse(result=done)

    def exists(self, request: q.CollectionExistsRequest) -> q.CollectionExistsResponse:
        found = self.registry.exists(request.collection_name)
        return q.CollectionExistsResponse(result=q.CollectionExists(exists=found))

    def change_aliases(self, request: q.ChangeAliases) -> q.CollectionOperationResponse:
        self.registry.change_aliases(list(request.actions))
        return q.CollectionOperationResponse(result=True)

    def _aliases(self, collection: str | None) -> q.ListAliasesResponse:
        pairs = self.registry.aliases(collection)
        return q.ListAliasesResponse(
            aliases=[
                q.AliasDescription(alias_name=alias, collection_name=name) for alias, name in pairs
            ]
        )

    def list_aliases(self, _: q.ListAliasesRequest) -> q.ListAliasesResponse:
        return self._aliases(None)

    def collection_aliases(self, request: q.ListCollectionAliasesRequest) -> q.ListAliasesResponse:
        return self._aliases(request.collection_name)

    # Points: reads

    def get(self, request: q.GetPoints) -> q.GetResponse:
        return q.GetResponse(result=reads.get(self.registry.get(request.collection_name), request))

    def count(self, request: q.CountPoints) -> q.CountResponse:
        number = reads.count(self.registry.get(request.collection_name), request)
        return q.CountResponse(result=q.CountResult(count=number))

    def scroll(self, request: q.ScrollPoints) -> q.ScrollResponse:
        page, following = reads.scroll(self.registry.get(request.collection_name), request)
        return q.ScrollResponse(result=page, next_page_offset=following)

    def query(self, request: q.QueryPoints) -> q.QueryResponse:
        return q.QueryResponse(
            result=reads.query(self.registry.get(request.collection_name), request)
        )

    def query_batch(self, request: q.QueryBatchPoints) -> q.QueryBatchResponse:
        collection = self.registry.get(request.collection_name)
        results = [reads.query(collection, item) for item in request.query_points]
        return q.QueryBatchResponse(result=[q.BatchResult(result=item) for item in results])

    def search(self, request: q.SearchPoints) -> q.SearchResponse:
        return q.SearchResponse(
            result=reads.search(self.registry.get(request.collection_name), request)
        )

    # Points: writes

    def write(self, method: str, request: Any) -> q.PointsOperationResponse:
        started = time.monotonic()
        collection = self.registry.get(request.collection_name)
        result = self._apply(collection, method, request, request)
        return q.PointsOperationResponse(result=result, time=time.monotonic() - started)

    def write_batch(self, request: q.UpdateBatchPoints) -> q.UpdateBatchResponse:
        """In order, each operation for itself; the first error is the answer, what was before it
        stays.
        """
        started = time.monotonic()
        collection = self.registry.get(request.collection_name)
        if not request.operations:
            raise validation("operations", "must be at least 1 characters")
        results = [
            self._apply(collection, BATCHED, operation, request) for operation in request.operations
        ]
        return q.UpdateBatchResponse(result=results, time=time.monotonic() - started)

    def _apply(
        self, collection: Collection, method: str, message: Any, options: Any
    ) -> q.UpdateResult:
        change = edit(method, message)
        if not options.wait:
            number, _ = collection.submit(change, serialized(method, message))
            return q.UpdateResult(operation_id=number, status=q.Acknowledged)
        number, done = collection.submit(change)
        try:
            done.result(timeout=options.timeout if options.HasField("timeout") else None)
        except NotYet:
            return q.UpdateResult(operation_id=number, status=q.WaitTimeout)
        return q.UpdateResult(operation_id=number, status=q.Completed)

    def services(self) -> dict[str, dict[str, Route]]:
        """Routes by service and method."""
        writes = {
            name: Route(name, request_type(name), functools.partial(self.write, name), True)
            for name in WRITES
        }
        points = {
            "Get": Route("Get", q.GetPoints, self.get),
            "Count": Route("Count", q.CountPoints, self.count),
            "Scroll": Route("Scroll", q.ScrollPoints, self.scroll),
            "Query": Route("Query", q.QueryPoints, self.query),
            "QueryBatch": Route("QueryBatch", q.QueryBatchPoints, self.query_batch),
            "Search": Route("Search", q.SearchPoints, self.search),
            "UpdateBatch": Route("UpdateBatch", q.UpdateBatchPoints, self.write_batch, True),
        }
        collections: dict[str, tuple[type[Any], Callable[[Any], Any]]] = {
            "Create": (q.CreateCollection, self.create),
            "Get": (q.GetCollectionInfoRequest, self.describe),
            "List": (q.ListCollectionsRequest, self.list_all),
            "Update": (q.UpdateCollection, self.change),
            "Delete": (q.DeleteCollection, self.delete),
            "CollectionExists": (q.CollectionExistsRequest, self.exists),
            "UpdateAliases": (q.ChangeAliases, self.change_aliases),
            "ListAliases": (q.ListAliasesRequest, self.list_aliases),
            "ListCollectionAliases": (q.ListCollectionAliasesRequest, self.collection_aliases),
        }
        return {
            "qdrant.Qdrant": {
                "HealthCheck": Route("HealthCheck", q.HealthCheckRequest, self.health)
            },
            "qdrant.Collections": {
                name: Route(f"Collections.{name}", message, handle)
                for name, (message, handle) in collections.items()
            },
            "qdrant.Points": points | writes,
        }


class Gateway:
    """Authentication, faults and the request log in front of the node; the control channel beside
    it.
    """

    def __init__(self, node: Node, api_key: str | None) -> None:
        self._node = node
        self._api_key = api_key
        self._faults = FaultPlan()
        self._log = RequestLog()
        self._strict = StrictMode(node.registry)
        self._commands: dict[str, Callable[..., object]] = {
            "fault": lambda operation, times, **fault: self._faults.add(
                operation, Fault(**fault), times
            ),
            "clear": self._faults.clear,
            "release": self._faults.release,
            "down": self._faults.set_down,
            "every": self._faults.set_every,
            "first_tries": self._faults.set_first_tries,
            "random": self._faults.set_random,
            "rate_limit": self._faults.set_rate_limit,
            "state": self._faults.state,
            "lag": node.registry.set_lag,
            "log": self._log.entries,
            "violations": self._log.violations,
            "clear_log": self._log.clear,
            "version": functools.partial(setattr, node, "version"),
            "optimize": lambda collection: node.registry.get(collection).shard.optimize(),
        }

    def answer(self, route: Route, request: Any, context: grpc.ServicerContext) -> Any:
        headers = dict(context.invocation_metadata())
        try:
            if route.name != "HealthCheck":
                self._authenticate(headers)
            if OBSERVER in headers:
                return self._handle(route, request)
            return self._logged(route, request, context)
        except RefusalError as refusal:
            if refusal.trailers:
                context.set_trailing_metadata(refusal.trailers)
            context.abort(refusal.code, refusal.message)

    def _authenticate(self, headers: dict[str, str | bytes]) -> None:
        if self._api_key is None:
            return
        given = headers.get("api-key")
        bearer = headers.get("authorization")
        if given is None and isinstance(bearer, str) and bearer.startswith("Bearer "):
            given = bearer.removeprefix("Bearer ")
        if given is None:
            raise RefusalError(
                grpc.StatusCode.UNAUTHENTICATED,
                "Must provide an API key or an Authorization bearer token",
            )
        if given != self._api_key:
            raise RefusalError(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key or JWT")

    def _handle(self, route: Route, request: Any) -> Any:
        try:
            return route.handle(request)
        except RefusalError:
            raise
        except Exception as error:  # the engine raises plain Exception
            raise from_engine(error) from error

    def _logged(self, route: Route, request: Any, context: grpc.ServicerContext) -> Any:
        name = self._node.registry.resolve(getattr(request, "collection_name", ""))
        keys = touched(route.name, request) if route.writes else ()
        flight = self._log.enter(route.name, name, keys, route.writes)
        context.add_callback(functools.partial(self._log.leave, flight, "client gone"))
        outcome = "OK"
        try:
            asked = request.SerializeToString(deterministic=True)
            fault = self._faults.take(route.name, flight.entry.points, asked)
            if fault is None:
                return self._strict.handle(
                    route.name, route.writes, request, functools.partial(self._handle, route)
                )
            outcome = f"OK ({fault.kind})"
            return self._faulty(route, request, context, fault)
        except RefusalError as refusal:
            outcome = refusal.code.name
            raise
        finally:
            self._log.leave(flight, outcome)

    def _faulty(
        self, route: Route, request: Any, context: grpc.ServicerContext, fault: Fault
    ) -> Any:
        kind = fault.kind
        if kind == "reject":
            raise fault.refusal()
        if kind == "crash_before_apply":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "silent_before_apply":
            _await_end(context)
        if kind == "slow":
            time.sleep(fault.seconds)
        if kind == "hold":
            self._faults.hold()
        if kind == "wait_timeout":
            return self._handle_timed_out(route, request)
        response = self._handle(route, request)
        if kind == "crash_after_apply":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "fail_after_apply":
            raise fault.refusal()
        if kind == "silent_after_apply":
            _await_end(context)
        return response

    def _handle_timed_out(self, route: Route, request: Any) -> Any:
        if not route.writes:
            raise RefusalError(grpc.StatusCode.DEADLINE_EXCEEDED, "Timeout: scripted")
        request.wait = False
        response = self._handle(route, request)
        for result in response.result if route.name == "UpdateBatch" else [response.result]:
            result.status = q.WaitTimeout
        return response

    def control(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """A command and its arguments as a JSON array; the answer is JSON too."""
        name, arguments, keywords = json.loads(request)
        if name not in self._commands:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"no command {name}")
        return json.dumps(self._commands[name](*arguments, **keywords)).encode()


def _await_end(context: grpc.ServicerContext) -> None:
    """Wait until the client has given up, then fail as nobody sees."""
    ended = threading.Event()
    if context.add_callback(ended.set):
        ended.wait()
    raise unavailable("scripted: never answered")


def build(gateway: Gateway, node: Node) -> grpc.Server:
    """The gRPC server with all services, not yet bound to a port."""
    server = grpc.server(ThreadPoolExecutor(_WORKERS), options=_POOL_MESSAGE_SIZE)
    for service, routes in node.services().items():
        handlers = {
            method: grpc.unary_unary_rpc_method_handler(
                functools.partial(gateway.answer, route),
                request_deserializer=route.request.FromString,
                response_serializer=lambda response: response.SerializeToString(),
            )
            for method, route in routes.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    _, service, method = CONTROL.split("/")
    control = {method: grpc.unary_unary_rpc_method_handler(gateway.control)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, control),))
    return cast("grpc.Server", server)
