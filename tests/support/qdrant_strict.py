"""Strict mode of the Qdrant test server: the limits of a collection's `strict_mode_config`, with
the real server's texts.

Source: qdrant/qdrant v1.19, lib/collection/src/operations/verification and
lib/collection/src/shards (rate limits). Left out: limits of filters, timeouts, sparse and
multivectors, payload indexes, and the cache of the collection's size. Rate limits are charged for
each operation of an UpdateBatch by itself, in order, so what comes before the one that is refused
is applied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from qdrant_client import grpc as q

from tests.support.qdrant_edits import touched
from tests.support.qdrant_faults import RateLimiter
from tests.support.qdrant_schema import dense_vectors
from tests.support.qdrant_status import RefusalError, bad_request
from tests.support.qdrant_storage import Collection, Registry


def _strict(problem: str, solution: str) -> RefusalError:
    return bad_request(f"{problem}. Help: {solution}")


def _check_limit(value: int, limit: int, name: str) -> None:
    if value > limit:
        raise _strict(
            f'Limit exceeded {value} > {limit} for "{name}"',
            f'Reduce the "{name}" parameter to or below {limit}.',
        )


def _check_size(collection: Collection, config: q.StrictModeConfig) -> None:
    points = collection.shard.info().points_count
    if config.HasField("max_collection_vector_size_bytes"):
        dimensions = sum(params.size for params in dense_vectors(collection.config).values())
        limit = config.max_collection_vector_size_bytes
        if points * dimensions * 4 >= limit:
            size = limit / (1 << 20)
            raise bad_request(f"Max vector storage size limit of {size:g}MB reached!")
    if config.HasField("max_points_count") and points >= config.max_points_count:
        raise bad_request(f"Max points count limit of {config.max_points_count} reached!")


def _check_write(
    collection: Collection, config: q.StrictModeConfig, kind: str, message: Any
) -> None:
    names = {"Upsert": "upsert limit", "upsert": "upsert limit"}
    names |= {"UpdateVectors": "update limit", "update_vectors": "update limit"}
    if kind not in names:
        return
    if config.HasField("upsert_max_batchsize"):
        _check_limit(len(message.points), config.upsert_max_batchsize, names[kind])
    _check_size(collection, config)


def _check_read(config: q.StrictModeConfig, method: str, message: Any) -> None:
    if method in ("Scroll", "Query") and config.HasField("max_query_limit"):
        _check_limit(message.limit, config.max_query_limit, "limit")
    forbidden = config.HasField("search_allow_exact") and not config.search_allow_exact
    if forbidden and method == "Count" and message.exact:
        raise _strict("Exact search disabled!", "Set exact=false.")


class StrictMode:
    """What stands before the services: refuses requests above a collection's limits."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._lock = threading.Lock()
        self._limiters: dict[tuple[str, str, int], RateLimiter] = {}

    def handle(
        self, method: str, writes: bool, request: Any, handle: Callable[[Any], object]
    ) -> object:
        """Answer by ``handle`` what the limits allow. Raises RefusalError."""
        name = self._registry.resolve(getattr(request, "collection_name", ""))
        if not name or not self._registry.exists(name):
            return handle(request)
        collection = self._registry.get(name)
        config = collection.config.strict_mode_config
        if not config.enabled:
            return handle(request)
        if method == "UpdateBatch":
            return self._batch(collection, config, request, handle)
        if writes:
            _check_write(collection, config, method, request)
            self._charge_write(name, config, [len(touched(method, request) or ())])
        elif method in ("Get", "Scroll", "Count"):
            _check_read(config, method, request)
            if config.HasField("read_rate_limit"):
                cost = len(request.ids) if method == "Get" else 1
                self._limiter(name, "Read", config.read_rate_limit).charge(cost)
        return handle(request)

    def _batch(
        self,
        collection: Collection,
        config: q.StrictModeConfig,
        request: q.UpdateBatchPoints,
        handle: Callable[[Any], object],
    ) -> object:
        messages = []
        for operation in request.operations:
            kind = operation.WhichOneof("operation")
            message = getattr(operation, kind) if kind is not None else operation
            _check_write(collection, config, kind or "", message)
            messages.append(message)
        costs = [len(touched("", message) or ()) for message in messages]
        try:
            self._charge_write(collection.name, config, costs)
        except _StoppedError as stopped:
            if stopped.done:
                first = q.UpdateBatchPoints()
                first.CopyFrom(request)
                del first.operations[stopped.done :]
                handle(first)
            raise stopped.refusal from None
        return handle(request)

    def _charge_write(self, name: str, config: q.StrictModeConfig, costs: Sequence[int]) -> None:
        if not config.HasField("write_rate_limit"):
            return
        limiter = self._limiter(name, "Write", config.write_rate_limit)
        for done, cost in enumerate(costs):
            try:
                limiter.charge(max(1, cost))
            except RefusalError as refusal:
                raise (_StoppedError(done, refusal) if len(costs) > 1 else refusal) from None

    def _limiter(self, name: str, kind: str, per_minute: int) -> RateLimiter:
        with self._lock:
            key = (name, kind, per_minute)
            return self._limiters.setdefault(key, RateLimiter(per_minute, kind))


class _StoppedError(Exception):
    """So many operations of a batch may be done, the next one is refused."""

    def __init__(self, done: int, refusal: RefusalError) -> None:
        super().__init__(refusal.message)
        self.done = done
        self.refusal = refusal
