"""A TCP proxy that fails on command: it stands between the daemon and Postgres, or the daemon and
Qdrant.

All connections are served by one thread. The controls may be called from any thread and take effect
before they return.
"""

from __future__ import annotations

import enum
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Protocol, Self

import pytest

_CHUNK_BYTES: Final = 64 * 1024
#: What is held per direction and connection before the sender feels it, as a router's queue would.
_HELD_BYTES: Final = 1024 * 1024
_CONNECT_SECONDS: Final = 5.0


class Direction(enum.Enum):
    """The way bytes go."""

    UP = "client to server"
    DOWN = "server to client"


class _Pipe:
    """One direction of one connection."""

    def __init__(self, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        self.direction = direction
        self.source = source
        self.sink = sink
        self.held: deque[tuple[float, bytes]] = deque()
        self.held_bytes = 0
        self.source_ended = False
        self.finished = False

    def read(self, delay_seconds: float) -> None:
        data = self.source.recv(_CHUNK_BYTES)
        if data:
            self.held.append((time.monotonic() + delay_seconds, data))
            self.held_bytes += len(data)
        else:
            self.source_ended = True

    def write(self, limit: int | None) -> int:
        """Send what is held and due, at most ``limit`` bytes; return how many went."""
        due, data = self.held[0]
        part = data if limit is None else data[:limit]
        sent = self.sink.send(part) if part else 0
        self.held_bytes -= sent
        if sent < len(data):
            self.held[0] = (due, data[sent:])
        else:
            self.held.popleft()
        return sent


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.abandoned = False
        self.pipes = (
            _Pipe(Direction.UP, client, server),
            _Pipe(Direction.DOWN, server, client),
        )

    def reset(self) -> None:
        """Close both sides so that each peer receives RST."""
        for side in (self.client, self.server):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            side.close()

    def close(self) -> None:
        self.client.close()
        self.server.close()


class TcpProxy:
    """Forwards connections from a free local port to ``upstream_host:upstream_port``.

    Use it as a context manager, or call :meth:`close`. ``upstream`` may be set anew at any time and
    counts for later connections.
    """

    def __init__(self, upstream_host: str, upstream_port: int) -> None:
        self.upstream = (upstream_host, upstream_port)
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        self._stalled: set[Direction] = set()
        self._delay_seconds = 0.0
        self._cut_after: dict[Direction, int] = {}
        self._forwarded = dict.fromkeys(Direction, 0)
        self._accepted = 0
        self._cuts = 0
        self._closing = False
        self._waker, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        listener = self._listen(0)
        self._listener: socket.socket | None = listener
        self.host: str = listener.getsockname()[0]
        self.port: int = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)
        self._thread.start()

    # -- observing

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        with self._lock:
            return len(self._connections)

    @property
    def accepted(self) -> int:
        """How many connections were accepted so far."""
        with self._lock:
            return self._accepted

    @property
    def cuts(self) -> int:
        """How many connections were reset by :meth:`cut` and :meth:`cut_after`."""
        with self._lock:
            return self._cuts

    def forwarded(self, direction: Direction) -> int:
        """Return how many bytes went in a direction so far, over all connections."""
        with self._lock:
            return self._forwarded[direction]

    # -- failing

    def cut(self) -> int:
        """Reset every open connection (both peers receive RST); return how many there were."""
        with self._lock:
            cut = self._reset_all()
        self._wake()
        return cut

    def cut_after(self, count: int, direction: Direction = Direction.DOWN) -> None:
        """Reset all connections once ``count`` more bytes went in ``direction``: in the middle of a
        message.

        Not one byte more is forwarded; fewer may arrive, because RST overtakes what the kernel
        still holds. Happens once.
        """
        with self._lock:
            self._cut_after[direction] = count
        self._wake()

    def stall(self, direction: Direction | None = None) -> None:
        """Stop forwarding in one direction, or in both; connections stay open, and new ones are
        accepted.
        """
        with self._lock:
            self._stalled.update(Direction if direction is None else {direction})
        self._wake()

    def resume(self, direction: Direction | None = None) -> None:
        """Undo :meth:`stall`; nothing that was sent meanwhile is lost."""
        with self._lock:
            self._stalled.difference_update(Direction if direction is None else {direction})
        self._wake()

    def abandon(self) -> int:
        """Forward nothing more over the connections that are open now, and leave them open: half
        of each is gone, and neither peer is told. Return how many there are; later ones work."""
        with self._lock:
            for connection in self._connections:
                connection.abandoned = True
            count = len(self._connections)
        self._wake()
        return count

    def cut_abandoned(self) -> None:
        """Reset the connections left by :meth:`abandon`."""
        with self._lock:
            for connection in [one for one in self._connections if one.abandoned]:
                self._drop(connection)
        self._wake()

    def delay(self, seconds: float) -> None:
        """Hold whatever arrives from now on for ``seconds`` before it is forwarded; 0 ends it."""
        with self._lock:
            self._delay_seconds = seconds
        self._wake()

    def refuse(self) -> None:
        """Refuse new connections, as a host without a listener does; open ones go on."""
        with self._lock:
            if self._listener is not None:
                # For their clients these are open already.
                while self._accept_one(self._listener):
                    pass
                self._listener.close()
                self._listener = None
        self._wake()

    def accept(self) -> None:
        """Accept connections again, on the same port."""
        with self._lock:
            if self._listener is None:
                self._listener = self._listen(self.port)
        self._wake()

    def close(self) -> None:
        """Close the port and every connection, and end the thread."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake()
        self._thread.join()
        if self._listener is not None:
            self._listener.close()
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._waker.close()
        self._woken.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- the thread

    @staticmethod
    def _listen(port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(64)
        listener.setblocking(False)
        return listener

    def _wake(self) -> None:
        self._waker.send(b"x")

    def _run(self) -> None:
        while True:
            # A new selector each time: tests have a handful of connections, and every control may
            # change which sockets matter.
            with selectors.DefaultSelector() as selector:
                with self._lock:
                    if self._closing:
                        return
                    timeout = self._register(selector)
                events = selector.select(timeout)
            with self._lock:
                self._serve({key.fileobj: mask for key, mask in events})

    def _register(self, selector: selectors.BaseSelector) -> float | None:
        """Register every socket that can make progress; return the seconds until held bytes fall
        due.
        """
        selector.register(self._woken, selectors.EVENT_READ)
        if self._listener is not None:
            selector.register(self._listener, selectors.EVENT_READ)
        now = time.monotonic()
        timeout: float | None = None
        for connection in self._connections:
            if connection.abandoned:
                continue
            wanted: dict[socket.socket, int] = {connection.client: 0, connection.server: 0}
            for pipe in connection.pipes:
                if pipe.direction in self._stalled:
                    continue
                if not pipe.source_ended and pipe.held_bytes < _HELD_BYTES:
                    wanted[pipe.source] |= selectors.EVENT_READ
                if pipe.held and pipe.held[0][0] <= now:
                    wanted[pipe.sink] |= selectors.EVENT_WRITE
                elif pipe.held:
                    wait = pipe.held[0][0] - now
                    timeout = wait if timeout is None else min(timeout, wait)
            for side, events in wanted.items():
                if events:
                    selector.register(side, events)
        return timeout

    def _serve(self, ready: Mapping[object, int]) -> None:
        """Do what the sockets allow. What changed while the lock was open is looked at again, not
        assumed.
        """
        if self._woken in ready:
            self._woken.recv(4096)
        if self._closing:
            return
        if self._listener is not None and self._listener in ready:
            self._accept_one(self._listener)
        for connection in list(self._connections):
            if connection not in self._connections or connection.abandoned:
                continue  # reset by cut_after of an earlier one, or left alone
            try:
                for pipe in connection.pipes:
                    self._serve_pipe(pipe, ready)
            except OSError:
                # One peer is gone; the other is told in the same way.
                self._drop(connection)
                continue
            if all(pipe.finished for pipe in connection.pipes):
                self._connections.remove(connection)
                connection.close()

    def _serve_pipe(self, pipe: _Pipe, ready: Mapping[object, int]) -> None:
        if pipe.finished or pipe.direction in self._stalled:
            return
        readable = ready.get(pipe.source, 0) & selectors.EVENT_READ
        if readable and not pipe.source_ended and pipe.held_bytes < _HELD_BYTES:
            try:
                pipe.read(self._delay_seconds)
            except BlockingIOError:
                pass
        while pipe.held and pipe.held[0][0] <= time.monotonic():
            limit = self._cut_after.get(pipe.direction)
            try:
                sent = pipe.write(limit)
            except BlockingIOError:
                return
            self._forwarded[pipe.direction] += sent
            if limit is not None:
                self._cut_after[pipe.direction] = limit - sent
                if limit == sent:
                    del self._cut_after[pipe.direction]
                    self._reset_all()
                    return
        if pipe.source_ended and not pipe.held:
            pipe.finished = True
            pipe.sink.shutdown(socket.SHUT_WR)

    def _accept_one(self, listener: socket.socket) -> bool:
        """Accept a connection if one waits; return whether one did."""
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return False
        self._accepted += 1
        try:
            # Blocks the thread for a moment; upstreams are on this machine.
            server = socket.create_connection(self.upstream, timeout=_CONNECT_SECONDS)
        except OSError:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            return True
        for side in (client, server):
            side.setblocking(False)
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections.append(_Connection(client, server))
        return True

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
            connection.reset()

    def _reset_all(self) -> int:
        count = len(self._connections)
        for connection in self._connections:
            connection.reset()
        self._connections.clear()
        self._cuts += count
        return count


class ProxyTo(Protocol):
    """Starts proxies that live until the end of the test."""

    def __call__(self, upstream_host: str, upstream_port: int) -> TcpProxy: ...


@pytest.fixture
def proxy_to() -> Iterator[ProxyTo]:
    """A factory of proxies, closed after the test."""
    with ExitStack() as stack:

        def make(upstream_host: str, upstream_port: int) -> TcpProxy:
            return stack.enter_context(TcpProxy(upstream_host, upstream_port))

        yield make
