"""Scripted failures of the Qdrant test server, and its log of requests.

Faults are queued per operation and used up first in, first out. Operation names are the methods of
the Points service ("Upsert", "UpdateBatch", ...), those of the Collections service with a prefix
("Collections.Create"), "HealthCheck", "write" for any write of points, and "*" for anything.
"""

from __future__ import annotations

import collections
import random
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias, get_args

import grpc

from tests.support.qdrant_convert import PointKey
from tests.support.qdrant_status import RefusalError, rate_limited, unavailable

FaultKind: TypeAlias = Literal[
    "reject",
    "slow",
    "hold",
    "wait_timeout",
    "fail_after_apply",
    "silent_after_apply",
    "silent_before_apply",
    "crash_before_apply",
    "crash_after_apply",
]
RandomKind: TypeAlias = Literal[
    "unavailable", "internal", "rate_limited", "lost_response", "wait_timeout", "slow"
]
RANDOM_KINDS: tuple[RandomKind, ...] = (
    "unavailable",
    "internal",
    "rate_limited",
    "lost_response",
    "wait_timeout",
    "slow",
)
_LOG_LIMIT = 200_000
_VIOLATION_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one request.

    ``reject``: answered with ``code``, ``message`` and, if ``retry_after`` (s) is given, that
    trailer; not applied.
    ``slow``: applied after ``seconds``. ``hold``: applied when released, even if the client is gone
    by then.
    ``wait_timeout``: queued and answered with status WaitTimeout. ``fail_after_apply``: applied,
    then answered with
    ``code``. ``silent_*``: never answered, so the client runs into its deadline. ``crash_*``: the
    process kills itself.
    """

    kind: FaultKind
    code: str = "UNAVAILABLE"
    message: str = "Socket closed"
    retry_after: float | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(FaultKind):
            raise ValueError(f"unknown kind of fault {self.kind}: one of {get_args(FaultKind)}")
        if self.code not in grpc.StatusCode.__members__:
            raise ValueError(f"unknown gRPC code {self.code}")

    def refusal(self) -> RefusalError:
        trailers = () if self.retry_after is None else (("retry-after", f"{self.retry_after:g}"),)
        return RefusalError(grpc.StatusCode[self.code], self.message, trailers)


class _RandomFaults:
    """Faults of writes by chance; the seed reproduces them if requests come one at a time."""

    def __init__(self, probability: float, seed: int, kinds: Sequence[RandomKind]) -> None:
        self._probability = probability
        self._random = random.Random(seed)
        self._kinds = tuple(kinds)

    def draw(self) -> Fault | None:
        if self._random.random() >= self._probability:
            return None
        kind = self._random.choice(self._kinds)
        if kind == "unavailable":
            return Fault("reject")
        if kind == "internal":
            return Fault("reject", "INTERNAL", "Service internal error: scripted")
        if kind == "rate_limited":
            message = "Rate limiting exceeded: scripted"
            return Fault("reject", "RESOURCE_EXHAUSTED", message, retry_after=1)
        if kind == "lost_response":
            return Fault("fail_after_apply")
        if kind == "wait_timeout":
            return Fault("wait_timeout")
        return Fault("slow", seconds=self._random.uniform(0.0, 0.1))


class RateLimiter:
    """A token bucket of points per minute that starts full, as the server's strict mode has it."""

    def __init__(self, per_minute: int, kind: str = "Write") -> None:
        self._capacity = per_minute
        self._kind = kind
        self._tokens = float(per_minute)
        self._moment = time.monotonic()
        self._lock = threading.Lock()

    def charge(self, cost: int) -> None:
        """Take so many tokens. Raises RefusalError if there are not that many."""
        with self._lock:
            self._charge(cost)

    def _charge(self, cost: int) -> None:
        now = time.monotonic()
        rate = self._capacity / 60
        self._tokens = min(self._capacity, self._tokens + (now - self._moment) * rate)
        self._moment = now
        if cost > self._capacity:
            raise rate_limited(
                f"{self._kind} rate limit exceeded, request larger than rate limiter capacity, "
                "please try to split your request",
                None,
            )
        if cost > self._tokens:
            wait = (cost - self._tokens) / rate
            raise rate_limited(
                f"{self._kind} rate limit exceeded: Operation requires {cost} tokens but only "
                f"{self._tokens:.1f} were available. Retry after {int(-(-wait // 1))}s",
                wait,
            )
        self._tokens -= cost


class FaultPlan:
    """Server side of the faults: which one the next request gets."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[str, collections.deque[Fault]] = {}
        self._random: _RandomFaults | None = None
        self._limiter: RateLimiter | None = None
        self._down = False
        #: Requests that were refused once, while all are to be.
        self._met: set[tuple[str, bytes]] | None = None
        #: Of how many requests one is refused, and how many come before the next such one.
        self._every: int | None = None
        self._before = 0
        self._gate = threading.Event()
        self._held = 0

    def add(self, operation: str, fault: Fault, times: int = 1) -> None:
        with self._lock:
            queue = self._queues.setdefault(operation, collections.deque())
            queue.extend([fault] * times)
            if fault.kind == "hold":
                self._gate.clear()

    def clear(self) -> None:
        """Forget all faults and let go what is held."""
        with self._lock:
            self._queues.clear()
            self._random = None
            self._limiter = None
            self._down = False
            self._met = None
            self._every = None
        self._gate.set()

    def release(self) -> None:
        """Let go every request held now; queued holds that no request has met yet still hold."""
        gate, self._gate = self._gate, threading.Event()
        gate.set()

    def set_down(self, down: bool) -> None:
        self._down = down

    def set_first_tries(self, refused: bool) -> None:
        """Whether every request is refused when it comes for the first time from now on."""
        with self._lock:
            self._met = set() if refused else None

    def set_every(self, every: int | None, before: int) -> None:
        """Refuse one of so many requests, the first one after ``before`` others."""
        with self._lock:
            self._every, self._before = every, before

    def set_random(self, probability: float, seed: int, kinds: Sequence[RandomKind]) -> None:
        with self._lock:
            self._random = _RandomFaults(probability, seed, kinds) if probability else None

    def set_rate_limit(self, per_minute: int | None) -> None:
        with self._lock:
            self._limiter = RateLimiter(per_minute) if per_minute else None

    def take(self, operation: str, points: int | None, request: bytes) -> Fault | None:
        """The fault of the next request; ``points`` it writes, None for reads. Raises RefusalError
        while down or limited.
        """
        if self._down:
            raise unavailable("failed to connect to all addresses; scripted: the server is down")
        writes = points is not None
        with self._lock:
            if self._met is not None and (operation, request) not in self._met:
                self._met.add((operation, request))
                raise unavailable(f"scripted: the first try of {operation}")
            if self._every is not None:
                self._before = (self._before or self._every) - 1
                if self._before == 0:
                    raise unavailable(f"scripted: one of {self._every} requests")
            for name in (operation, "write", "*") if writes else (operation, "*"):
                queue = self._queues.get(name)
                if queue:
                    return queue.popleft()
            if points is not None and self._limiter is not None:
                self._limiter.charge(max(points, 1))
            return self._random.draw() if self._random is not None and writes else None

    def hold(self) -> None:
        """Block until released."""
        gate = self._gate
        with self._lock:
            self._held += 1
        try:
            gate.wait()
        finally:
            with self._lock:
                self._held -= 1

    def state(self) -> dict[str, int]:
        with self._lock:
            queued = sum(len(queue) for queue in self._queues.values())
            return {"queued": queued, "held": self._held}


@dataclass(slots=True)
class Entry:
    """One request in the log. Times in seconds of the server's monotonic clock; ``points`` is None
    for reads.
    """

    operation: str
    collection: str
    points: int | None
    start: float
    end: float | None = None
    outcome: str = ""
    in_flight: int = 0


@dataclass(slots=True)
class _Flight:
    entry: Entry
    keys: frozenset[PointKey] | None
    over: bool = False


@dataclass(frozen=True, slots=True)
class Violation:
    """Two write requests in flight together that touch the same point (``point`` '*': one of them
    touches all).
    """

    collection: str
    point: PointKey
    operation: str
    other_operation: str


@dataclass(slots=True)
class RequestLog:
    """What was asked, and what was in flight together."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _entries: collections.deque[Entry] = field(
        default_factory=lambda: collections.deque(maxlen=_LOG_LIMIT)
    )
    _flights: dict[str, list[_Flight]] = field(default_factory=dict)
    _violations: list[Violation] = field(default_factory=list)

    def enter(
        self, operation: str, collection: str, keys: Iterable[PointKey] | None, writes: bool
    ) -> _Flight:
        """Note the arrival of a request. ``keys``: the points it writes, None: all of the
        collection.
        """
        written = frozenset(keys) if keys is not None else None
        points = (len(written) if written is not None else 0) if writes else None
        flight = _Flight(Entry(operation, collection, points, time.monotonic()), written)
        with self._lock:
            self._entries.append(flight.entry)
            if writes:
                others = self._flights.setdefault(collection, [])
                flight.entry.in_flight = len(others)
                for other in others:
                    self._compare(flight, other)
                others.append(flight)
        return flight

    def _compare(self, flight: _Flight, other: _Flight) -> None:
        if len(self._violations) >= _VIOLATION_LIMIT:
            return
        both: Iterable[PointKey]
        if flight.keys is None or other.keys is None:
            both = ("*",)
        else:
            both = flight.keys & other.keys
        for point in both:
            entry = flight.entry
            self._violations.append(
                Violation(entry.collection, point, entry.operation, other.entry.operation)
            )

    def leave(self, flight: _Flight, outcome: str) -> None:
        """Note that the request is answered, or its client gone. Only the first call counts."""
        with self._lock:
            if flight.over:
                return
            flight.over = True
            flight.entry.end = time.monotonic()
            flight.entry.outcome = outcome
            if flight.entry.points is not None:
                self._flights[flight.entry.collection].remove(flight)

    def entries(self) -> list[dict[str, object]]:
        with self._lock:
            return [asdict(entry) for entry in self._entries]

    def violations(self) -> list[dict[str, object]]:
        with self._lock:
            return [asdict(violation) for violation in self._violations]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._violations.clear()
