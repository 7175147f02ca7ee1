"""gRPC channels to a Qdrant server, and what its status codes mean.

The synchronous API with futures is used rather than ``grpc.aio``: both cost the same (measured:
0.12 to 0.5 ms a call, 0.7 to 0.9 ms with 800 kB), and a future's outcome stays ours when the
asyncio task that waits for it is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import grpc
from qdrant_client import grpc as q

from cdc_sync.config import QdrantSettings
from cdc_sync.credentials import Refusal
from cdc_sync.errors import ConfigError, ErrorKind, SinkError, policy
from cdc_sync.qdrant import answers
from cdc_sync.qdrant.api_keys import ApiKeys, metadata
from cdc_sync.qdrant.channel import credentials, files_seen, handshake_failure
from cdc_sync.qdrant.pace import Pace
from cdc_sync.qdrant.sink import RequestObserver

Response = TypeVar("Response")
AnyResponse = TypeVar("AnyResponse", covariant=True)


@dataclass(frozen=True, slots=True)
class Method(Generic[AnyResponse]):
    """A unary method: its path, response type, and whether it writes (and so must be awaited to its
    end).
    """

    path: str
    response: type[AnyResponse]
    writes: bool = False

    @property
    def name(self) -> str:
        """The method's bare name, for messages."""
        return self.path.rpartition("/")[2]


HEALTH_CHECK: Final = Method("/qdrant.Qdrant/HealthCheck", q.HealthCheckReply)
UPSERT: Final = Method("/qdrant.Points/Upsert", q.PointsOperationResponse, writes=True)
DELETE: Final = Method("/qdrant.Points/Delete", q.PointsOperationResponse, writes=True)
SET_PAYLOAD: Final = Method("/qdrant.Points/SetPayload", q.PointsOperationResponse, writes=True)
UPDATE_BATCH: Final = Method("/qdrant.Points/UpdateBatch", q.UpdateBatchResponse, writes=True)
CREATE_FIELD_INDEX: Final = Method(
    "/qdrant.Points/CreateFieldIndex", q.PointsOperationResponse, writes=True
)
GET: Final = Method("/qdrant.Points/Get", q.GetResponse)
SCROLL: Final = Method("/qdrant.Points/Scroll", q.ScrollResponse)
COUNT: Final = Method("/qdrant.Points/Count", q.CountResponse)
QUERY: Final = Method("/qdrant.Points/Query", q.QueryResponse)
COLLECTION_INFO: Final = Method("/qdrant.Collections/Get", q.GetCollectionInfoResponse)
LIST_COLLECTIONS: Final = Method("/qdrant.Collections/List", q.ListCollectionsResponse)
CREATE_COLLECTION: Final = Method(
    "/qdrant.Collections/Create", q.CollectionOperationResponse, writes=True
)
DELETE_COLLECTION: Final = Method(
    "/qdrant.Collections/Delete", q.CollectionOperationResponse, writes=True
)
UPDATE_COLLECTION: Final = Method(
    "/qdrant.Collections/Update", q.CollectionOperationResponse, writes=True
)
LIST_ALIASES: Final = Method("/qdrant.Collections/ListAliases", q.ListAliasesResponse)
UPDATE_ALIASES: Final = Method(
    "/qdrant.Collections/UpdateAliases", q.CollectionOperationResponse, writes=True
)

_MAX_CHANNELS: Final = 4
#: An answer may have so many bytes unless it is asked for as ``unlimited``: this bounds what a few
#: lanes read at once.
MAX_ANSWER_BYTES: Final = 16 << 20
#: A request may take the deadline for so many bytes; a larger one (a single large point) may take
#: longer, in proportion, but not more than so many times.
_DEADLINE_BYTES: Final = 4 << 20
_MAX_DEADLINES: Final = 10

_CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_send_message_length", -1),
    # A peer that vanished without a FIN is noticed while a call waits for it.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # The engine retries; a write must never be repeated behind its back.
    ("grpc.enable_retries", 0),
    # The default grows to two minutes, which would be the delay after Qdrant is back.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # One connection a channel, so that large requests do not share a flow-control window.
    ("grpc.use_local_subchannel_pool", 1),
)


class RpcError(Exception):
    """A call that did not end with status OK. Internal to the package: callers translate it."""

    def __init__(
        self,
        method: Method[object],
        code: grpc.StatusCode,
        details: str,
        retry_after: float | None,
    ) -> None:
        super().__init__(f"{method.name}: {code.name}: {details}")
        self.method = method
        self.code = code
        self.details = details
        self.retry_after = retry_after
        #: What becomes of the API key, where that is what was refused.
        self.refusal: Refusal | None = None

    @property
    def point_missing(self) -> bool:
        """A point that the operation needs does not exist."""
        return self.code is grpc.StatusCode.NOT_FOUND and "No point with id" in self.details

    @property
    def collection_missing(self) -> bool:
        """The collection (or alias) does not exist."""
        return self.code is grpc.StatusCode.NOT_FOUND and not self.point_missing

    @property
    def full(self) -> bool:
        """The collection or the node takes no more data, whatever it is."""
        return self.code in _FULL_CODES and answers.is_full(self.details)

    @property
    def invalid(self) -> bool:
        """Some point of the request is invalid by itself (no limit was reached)."""
        return (
            self.code is grpc.StatusCode.INVALID_ARGUMENT
            and not self.full
            and self.batch_limit is None
        )

    @property
    def batch_limit(self) -> int | None:
        """How many points strict mode allows a request, if there were more."""
        if self.code is not grpc.StatusCode.INVALID_ARGUMENT:
            return None
        return answers.batch_limit(self.details)

    @property
    def page_limit(self) -> int | None:
        """How many points strict mode allows a page, if more were asked for."""
        if self.code is not grpc.StatusCode.INVALID_ARGUMENT:
            return None
        return answers.page_limit(self.details)

    @property
    def exact_forbidden(self) -> bool:
        """Strict mode lets nobody count exactly."""
        return self.code is _C.INVALID_ARGUMENT and answers.exact_forbidden(self.details)

    @property
    def over_capacity(self) -> bool:
        """The request must be split: it can never pass the rate limiter."""
        return self.code is _C.RESOURCE_EXHAUSTED and answers.is_over_capacity(self.details)

    @property
    def oversized(self) -> bool:
        """Request or answer have too many bytes for somebody on the way."""
        return self.code in _OVERSIZED_CODES and answers.is_oversized(self.details)

    @property
    def key_refused(self) -> bool:
        """The API key, or token, is not one that the server knows. (One that may not do what was
        asked for is PERMISSION_DENIED.)"""
        return self.code is _C.UNAUTHENTICATED

    @property
    def timed_out(self) -> bool:
        """It was not answered in time, by our deadline or the server's."""
        return self.code is _C.DEADLINE_EXCEEDED

    @property
    def rate_limited(self) -> bool:
        """The request may pass later."""
        return (
            self.code is _C.RESOURCE_EXHAUSTED
            and not self.full
            and not self.over_capacity
            and not self.oversized
        )


_C = grpc.StatusCode
_FULL_CODES: Final = frozenset({_C.INVALID_ARGUMENT, _C.RESOURCE_EXHAUSTED, _C.INTERNAL})
_OVERSIZED_CODES: Final = frozenset(
    {_C.RESOURCE_EXHAUSTED, _C.OUT_OF_RANGE, _C.UNKNOWN, _C.INTERNAL, _C.CANCELLED}
)
_KINDS: Final[dict[grpc.StatusCode, ErrorKind]] = {
    _C.UNAVAILABLE: ErrorKind.SINK_UNAVAILABLE,
    _C.RESOURCE_EXHAUSTED: ErrorKind.SINK_RATE_LIMITED,
    _C.PERMISSION_DENIED: ErrorKind.SINK_AUTH,
    _C.UNAUTHENTICATED: ErrorKind.SINK_AUTH,
    _C.NOT_FOUND: ErrorKind.COLLECTION_MISSING,
    _C.INVALID_ARGUMENT: ErrorKind.SINK_REFUSED,
    _C.FAILED_PRECONDITION: ErrorKind.SINK_UNAVAILABLE,
    _C.ABORTED: ErrorKind.SINK_UNKNOWN,
    _C.UNIMPLEMENTED: ErrorKind.SINK_REFUSED,
    _C.ALREADY_EXISTS: ErrorKind.SINK_REFUSED,
}

_REMEDIES: Final[dict[grpc.StatusCode, str]] = {
    _C.UNIMPLEMENTED: (
        "Use the gRPC port (6334 by default) of a Qdrant server, version 1.14 or newer."
    ),
    _C.INVALID_ARGUMENT: (
        "Correct what Qdrant names; if it is a strict mode limit, raise it for this collection."
    ),
}


def reason(details: str) -> str:
    """Qdrant's reason in one short line, without lists, objects and quoted text that may hold row
    values.
    """
    text = " ".join(details.split())
    text = re.sub(r"\[[^\]]*\]?", "[...]", text)
    text = re.sub(r"\{[^}]*\}?", "{...}", text)
    text = re.sub(r'"[^"]*"?', '"..."', text)
    return text if len(text) <= 200 else text[:197] + "..."


def sink_error(failure: RpcError, target: str) -> SinkError:
    """What a failed call means: the error kind, which call on what, and the remedy."""
    kind = _KINDS.get(failure.code, ErrorKind.SINK_UNKNOWN)
    remedy = _REMEDIES.get(failure.code)
    if failure.full:
        kind, remedy = ErrorKind.SINK_FULL, policy(ErrorKind.SINK_FULL).advice
    if failure.code is _C.UNAVAILABLE and (broken := handshake_failure(failure.details, "Qdrant")):
        # Not a reason to stop a pipeline that runs: certificates are renewed.
        return SinkError(kind, broken.message, broken.remedy)
    if kind is ErrorKind.COLLECTION_MISSING:
        remedy = policy(kind).advice
    about = ""
    if (refusal := failure.refusal) is not None:
        about, remedy = refusal.about, refusal.remedy
        if refusal.waits:
            kind = ErrorKind.SINK_UNAVAILABLE
    return SinkError(
        kind,
        f"{failure.method.name} on {target} failed with {failure.code.name}: "
        f"{reason(failure.details).rstrip('.')}{about}.",
        remedy,
        failure.retry_after,
    )


def not_completed(status: int, method: Method[object], target: str) -> SinkError:
    """The error of a write that was answered, but not with Completed."""
    try:
        name = q.UpdateStatus.Name(status)
    except ValueError:
        name = str(status)
    return SinkError(
        ErrorKind.SINK_UNKNOWN, f"{method.name} on {target} was answered {name}, not Completed."
    )


class Rpc:
    """The channels to one server. Calls may overlap; which channel takes one is the caller's choice
    (``lane``).
    """

    def __init__(
        self,
        settings: QdrantSettings,
        host: str,
        port: int,
        *,
        secure: bool,
        observer: RequestObserver | None = None,
    ) -> None:
        target = f"{host}:{port}"
        self._observer = observer
        self._timeout = settings.timeout_seconds
        self._deadline_bytes = max(settings.request_bytes, _DEADLINE_BYTES)
        self._keys = ApiKeys(settings)
        self._target = target
        self._settings = settings
        self._files = files_seen(settings)
        self._trusted = credentials(settings, secure=secure)
        #: Called before each write; what it raises keeps the write from being begun.
        self.guard: Callable[[], None] | None = None
        self._under_way = 0
        #: Channels of certificates that were renewed, with calls that may not be over.
        self._former: list[grpc.Channel] = []
        self._lanes = min(_MAX_CHANNELS, settings.parallel_requests)
        self._channels = [self._open(MAX_ANSWER_BYTES) for _ in range(self._lanes)]
        self._stubs: dict[tuple[str, int], grpc.UnaryUnaryMultiCallable] = {}

    def paced(self, collection: str, pace: Pace, *, slower: bool) -> None:
        """Tell the observer how much of a collection may be in flight."""
        if self._observer is not None:
            self._observer.paced(collection, pace.window, pace.cause, slower=slower)

    def _open(self, answer_bytes: int) -> grpc.Channel:
        options = (*_CHANNEL_OPTIONS, ("grpc.max_receive_message_length", answer_bytes))
        if self._trusted is not None:
            return grpc.secure_channel(self._target, self._trusted, options)
        return grpc.insecure_channel(self._target, options)

    async def call(
        self, method: Method[Response], request: bytes, lane: int = 0, *, unlimited: bool = False
    ) -> Response:
        """Send a serialized request and return the response, which may have
        :data:`MAX_ANSWER_BYTES` unless ``unlimited``.

        An API key from a file is read again when the server refuses it, and the request, which was
        not carried out, is sent again.

        Raises :class:`RpcError`. When cancelled, a read is abandoned, but a write is awaited to
        its end (at most the deadline) before CancelledError goes on: nothing may be in flight any
        more for whoever comes next. A write is not begun if :attr:`guard` raises something.
        """
        if unlimited:
            lane = self._unlimited_lane()
        tried: list[str | None] = []
        while True:
            key = self._keys.next(tried)
            if method.writes and self.guard is not None:
                self.guard()
            try:
                response = await self._observed(method, request, lane, key)
            except RpcError as failure:
                if not failure.key_refused:
                    raise
                tried.append(key)
                if self._keys.next(tried) in tried:
                    failure.refusal = self._keys.refused(reason(failure.details))
                    raise
            else:
                if method is not HEALTH_CHECK:  # It needs no key.
                    self._keys.accepted(key)
                return response

    async def _observed(
        self, method: Method[Response], request: bytes, lane: int, key: str | None
    ) -> Response:
        if self._observer is None:
            return await self._call(method, request, lane, key)
        self._observer.started()
        started, code = time.perf_counter(), _C.OK.name
        try:
            return await self._call(method, request, lane, key)
        except RpcError as failure:
            code = failure.code.name
            raise
        except asyncio.CancelledError:
            code = _C.CANCELLED.name
            raise
        finally:
            self._observer.ended(method.name, code, time.perf_counter() - started)

    async def _call(
        self, method: Method[Response], request: bytes, lane: int, key: str | None
    ) -> Response:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish() -> None:
            if not done.done():
                done.set_result(None)

        def finished(_: object) -> None:
            # The loop may be closed by the time an abandoned read ends; nobody waits then.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(finish)

        rpc = self._stub(method, lane).future(
            request, timeout=self._deadline(request), metadata=metadata(key)
        )
        rpc.add_done_callback(finished)
        cancelled: asyncio.CancelledError | None = None
        self._under_way += 1
        while not done.done():
            try:
                await asyncio.wait((done,))
            except asyncio.CancelledError as exc:
                cancelled = exc
                if not method.writes:
                    rpc.cancel()
                    break
        self._under_way -= 1
        if self._former and not self._under_way:
            self._close_former()
        if cancelled is not None:
            raise cancelled
        if rpc.code() is not _C.OK:
            details = rpc.details() or ""
            if rpc.code() is _C.UNAVAILABLE and self._trusted is not None:
                details = self._renew() + details
            raise RpcError(method, rpc.code(), details, _retry_after(rpc.trailing_metadata()))
        response: Response = rpc.result()
        return response

    async def request(
        self, method: Method[Response], request: bytes, target: str, lane: int = 0
    ) -> Response:
        """As :meth:`call`, with failures as :class:`SinkError` that name ``target``."""
        try:
            return await self.call(method, request, lane)
        except RpcError as failure:
            raise sink_error(failure, target) from failure

    def _renew(self) -> str:
        """Take up certificates that were renewed since they were read: gRPC keeps to those that a
        channel was opened with. Returns what to say first of the error, if they are of no use."""
        seen = files_seen(self._settings)
        if seen == self._files:
            return ""
        try:
            self._trusted = credentials(self._settings, secure=True)
        except ConfigError as error:
            # Half of them are written, perhaps: looked at again with the next failure.
            return f"{error.message} "
        self._files = seen
        self._former += self._channels
        self._channels = [self._open(MAX_ANSWER_BYTES) for _ in range(self._lanes)]
        self._stubs.clear()
        if not self._under_way:
            self._close_former()
        return ""

    def _close_former(self) -> None:
        for channel in self._former:
            channel.close()
        self._former.clear()

    def _deadline(self, request: bytes) -> float:
        return self._timeout * max(1, min(len(request) // self._deadline_bytes, _MAX_DEADLINES))

    def _unlimited_lane(self) -> int:
        if len(self._channels) == self._lanes:
            self._channels.append(self._open(-1))
        return -1

    def _stub(self, method: Method[Response], lane: int) -> grpc.UnaryUnaryMultiCallable:
        index = lane if lane < 0 else lane % self._lanes
        stub = self._stubs.get((method.path, index))
        if stub is None:
            stub = self._channels[index].unary_unary(
                method.path,
                request_serializer=None,
                response_deserializer=method.response.FromString,  # type: ignore[attr-defined]
            )
            self._stubs[method.path, index] = stub
        return stub

    def close(self) -> None:
        """Close the channels; calls still under way fail."""
        self._close_former()
        for channel in self._channels:
            channel.close()


def _retry_after(trailers: Sequence[tuple[str, str | bytes]] | None) -> float | None:
    for key, value in trailers or ():
        if key.lower() == "retry-after":
            try:
                return max(0.0, float(value))
            except ValueError:
                return None
    return None
