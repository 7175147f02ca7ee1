"""A connection pooler before a Postgres server, as PgBouncer and its like are.

It answers the client's start itself, with a process id of its own invention, and gives each query
(up to its Sync) the next of its own sessions on the server. What the start-up packet asks for may
be dropped, and replication refused, passed through, or led to another server.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

import psycopg

_PARAMETERS: Final = ("server_version", "client_encoding", "standard_conforming_strings")
_SSL_REQUEST: Final = 80877103
_GSS_REQUEST: Final = 80877104
_INVENTED_PID: Final = 1_999_999_999
_REFUSAL: Final = "unsupported startup parameter: replication"


class Pooler:
    """Listens on ``port`` of 127.0.0.1 while it is open as a context.

    ``url`` is where its sessions go, ``sessions`` how many a client shares; ``keeps_options``:
    whether settings of the start-up packet reach them. ``replication``: the port on 127.0.0.1 that
    replication connections are led to, None: they are refused.
    """

    def __init__(
        self,
        url: str,
        *,
        sessions: int = 1,
        keeps_options: bool = True,
        replication: int | None = None,
    ) -> None:
        self._url = url
        self._sessions = sessions
        self._keeps_options = keeps_options
        self._replication = replication
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closed = False

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        # A client that goes away, or the pooler's end, closes a socket somebody reads from.
        with client, self._held(client), contextlib.suppress(OSError, EOFError):
            packet = self._start_up(client)
            parameters = _parse(packet)
            if "replication" not in parameters:
                self._pool(client, parameters)
            elif self._replication is None:
                client.sendall(_message(b"E", f"SFATAL\0C08P01\0M{_REFUSAL}\0".encode() + b"\0"))
            else:
                self._pass_through(client, packet, self._replication)

    @contextlib.contextmanager
    def _held(self, one: socket.socket) -> Iterator[None]:
        self._open.add(one)
        try:
            yield
        finally:
            self._open.discard(one)

    def _start_up(self, client: socket.socket) -> bytes:
        while True:
            (length,) = struct.unpack("!I", _exactly(client, 4))
            body = _exactly(client, length - 4)
            if struct.unpack("!I", body[:4])[0] not in (_SSL_REQUEST, _GSS_REQUEST):
                return struct.pack("!I", length) + body
            client.sendall(b"N")

    def _pass_through(self, client: socket.socket, packet: bytes, port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as server, self._held(server):
            server.sendall(packet)
            self._start(_pump, server, client)
            _pump(client, server)

    def _pool(self, client: socket.socket, parameters: dict[str, str]) -> None:
        options = parameters.get("options", "") if self._keeps_options else ""
        with contextlib.ExitStack() as stack:
            connections = [
                stack.enter_context(
                    psycopg.connect(self._url, options=options, client_encoding="UTF8")
                )
                for _ in range(self._sessions)
            ]
            backends = [
                stack.enter_context(socket.fromfd(c.fileno(), socket.AF_INET, socket.SOCK_STREAM))
                for c in connections
            ]
            for backend in backends:
                backend.setblocking(True)
                backend.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                stack.enter_context(self._held(backend))
            shown = b"".join(
                _message(b"S", f"{name}\0{connections[0].info.parameter_status(name)}\0".encode())
                for name in _PARAMETERS
            )
            key = _message(b"K", struct.pack("!II", _INVENTED_PID, 1))
            client.sendall(_message(b"R", bytes(4)) + shown + key + _message(b"Z", b"I"))
            self._answer(client, backends)

    def _answer(self, client: socket.socket, backends: list[socket.socket]) -> None:
        turn = 0
        while True:
            kind, message = _read(client)
            if kind == b"X":
                return
            backend = backends[turn % len(backends)]
            backend.sendall(message)
            if kind not in (b"Q", b"S"):
                continue
            while kind != b"Z":
                kind, message = _read(backend)
                client.sendall(message)
            turn += 1


def _parse(packet: bytes) -> dict[str, str]:
    words = packet[8:].rstrip(b"\0").split(b"\0")
    texts = [word.decode() for word in words]
    return dict(zip(texts[::2], texts[1::2], strict=False))


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


def _read(source: socket.socket) -> tuple[bytes, bytes]:
    head = _exactly(source, 5)
    (length,) = struct.unpack("!I", head[1:])
    return head[:1], head + _exactly(source, length - 4)


def _exactly(source: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = source.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)
