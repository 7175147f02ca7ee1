"""The HTTP endpoint: the status page, ``/metrics``, ``/livez``, ``/readyz``, ``/status``, in a
thread of its own.

It answers from memory only, so it keeps answering while the event loop is stuck or Postgres and
Qdrant are away; that is what lets ``/livez`` tell one from the other. Clients cannot wait each
other out: every connection has its own thread, ends after one response, is cut off after
:data:`CONNECTION_SECONDS`, and past :data:`MAX_CONNECTIONS` the oldest is cut off for the newest.
"""

from __future__ import annotations

import contextlib
import errno
import http.server
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from types import TracebackType
from typing import Final, Self

import orjson
from prometheus_client.exposition import choose_encoder

from cdc_sync.config import HttpSettings
from cdc_sync.errors import ConfigError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.page import NOTHING_ALLOWED, status_page
from cdc_sync.ops.status import Check, StatusBoard

log = get_logger(__name__)

CONNECTION_SECONDS: Final = 15.0
MAX_CONNECTIONS: Final = 64
_READ_SECONDS: Final = 5.0
_REAP_SECONDS: Final = 0.1
_JSON: Final = "application/json"
_HTML: Final = "text/html; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Response:
    """What is answered; ``policy`` is the Content-Security-Policy."""

    status: HTTPStatus
    content_type: str
    body: bytes
    policy: str = NOTHING_ALLOWED


class HttpServer:
    """Serves a board and metrics until :meth:`stop`; a context manager."""

    def __init__(self, host: str, port: int, *, board: StatusBoard, metrics: Metrics) -> None:
        """Bind. Raises :class:`ConfigError` when the address cannot be listened on."""
        self._server = _bind(host, port, _Endpoints(board, metrics))
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_REAP_SECONDS,), name="http", daemon=True
        )

    @property
    def host(self) -> str:
        """Address listened on."""
        return str(self._server.server_address[0])

    @property
    def port(self) -> int:
        """Port listened on; the one that was free if 0 was asked for."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Base URL, without a slash at the end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and free the port."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
        self._server.cut_all()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def start_http_server(
    settings: HttpSettings, board: StatusBoard, metrics: Metrics
) -> HttpServer | None:
    """Start the endpoint, unless settings turn it off. Raises :class:`ConfigError`."""
    if not settings.enabled:
        return None
    server = HttpServer(settings.host, settings.port, board=board, metrics=metrics)
    server.start()
    return server


# -- what is answered


class _Endpoints:
    """Paths and their responses."""

    def __init__(self, board: StatusBoard, metrics: Metrics) -> None:
        self._board = board
        self._metrics = metrics
        self._paths: dict[str, Callable[[str], Response]] = {
            "/": lambda _: _page(),
            "/metrics": self._exposition,
            "/livez": lambda _: _checks(self._board.liveness()),
            "/readyz": lambda _: _checks(self._board.readiness()),
            "/status": lambda _: _json(HTTPStatus.OK, self._board.snapshot()),
        }

    def respond(self, target: str, accept: str) -> Response:
        """The response to GET; ``accept`` is the request's Accept header."""
        answer = self._paths.get(target.partition("?")[0])
        if answer is None:
            return _json(HTTPStatus.NOT_FOUND, {"error": "not found", "paths": [*self._paths]})
        try:
            return answer(accept)
        except Exception:  # a fault here must not take the endpoint down; it is logged
            log.exception("http_response_failed", path=target.partition("?")[0])
            return _json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "internal error, see the log"})

    def _exposition(self, accept: str) -> Response:
        self._board.refresh_lag()
        encode, content_type = choose_encoder(accept)
        return Response(HTTPStatus.OK, content_type, encode(self._metrics.registry))


def _page() -> Response:
    page = status_page()
    return Response(HTTPStatus.OK, _HTML, page.body, page.policy)


def _checks(checks: Sequence[Check]) -> Response:
    ok = all(check.ok for check in checks)
    status = HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE
    return _json(status, {"ok": ok, "checks": [check.to_json() for check in checks]})


def _json(status: HTTPStatus, body: object) -> Response:
    return Response(status, _JSON, orjson.dumps(body, option=orjson.OPT_APPEND_NEWLINE))


# -- how


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request; HTTP/1.0, so that no idle connection stays."""

    timeout = _READ_SECONDS
    server: _Server

    def do_GET(self) -> None:
        self._answer(self.server.endpoints.respond(self.path, self.headers.get("Accept") or ""))

    def do_HEAD(self) -> None:
        self.do_GET()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what the parser refuses, as JSON; the request's text is not repeated."""
        status = HTTPStatus(code)
        if status is HTTPStatus.NOT_IMPLEMENTED:
            status = HTTPStatus.METHOD_NOT_ALLOWED
        self._answer(_json(status, {"error": status.phrase.lower()}))

    def version_string(self) -> str:
        return "cdc-sync"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a line a probe would drown the rest."""

    def _answer(self, response: Response) -> None:
        self.send_response(response.status)
        if response.status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(len(response.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", response.policy)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)


class _Server(http.server.ThreadingHTTPServer):
    """Threads bounded in number and in time."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, family: socket.AddressFamily, address: tuple[str, int], endpoints: _Endpoints
    ) -> None:
        self.address_family = family
        self.endpoints = endpoints
        self._open: dict[socket.socket, float] = {}
        self._open_lock = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks DNS for the name of the address, which can take many seconds.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        with self._open_lock:
            self._open[request] = time.monotonic()
            oldest = next(iter(self._open)) if len(self._open) > MAX_CONNECTIONS else None
            if oldest is not None:
                # No longer ours at once, not only when its thread notices: the next newcomer must
                # not find the same one to cut off.
                del self._open[oldest]
        if oldest is not None:
            _cut(oldest)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        with self._open_lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Cut off whoever has been here too long, however busy it keeps the connection."""
        limit = time.monotonic() - CONNECTION_SECONDS
        with self._open_lock:
            overdue = [request for request, opened in self._open.items() if opened < limit]
        for request in overdue:
            _cut(request)

    def cut_all(self) -> None:
        """Cut off everybody."""
        with self._open_lock:
            remaining = list(self._open)
        for request in remaining:
            _cut(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are no errors of ours; the rest is logged and not printed."""
        if isinstance(sys.exception(), OSError):
            log.debug("http_client_gone", error=type(sys.exception()).__name__)
        else:
            log.exception("http_response_failed")


def _cut(request: socket.socket) -> None:
    # It may have been closed in the meantime; its thread does the rest.
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


def _bind(host: str, port: int, endpoints: _Endpoints) -> _Server:
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
        return _Server(family, (str(address[0]), port), endpoints)
    except OSError as error:
        raise _bind_error(host, port, error) from error


def _bind_error(host: str, port: int, error: OSError) -> ConfigError:
    reason = error.strerror or type(error).__name__
    message = f"Cannot listen on {host}:{port} (http.host, http.port): {reason}."
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        remedy = "Set http.host (--http.host) to an address of this machine, such as 127.0.0.1."
    elif error.errno == errno.EADDRINUSE:
        remedy = (
            "Another process has the port, perhaps another cdc-sync. Set http.port (--http.port) "
            "to a free one; 0 picks one."
        )
    elif error.errno == errno.EACCES:
        remedy = "Ports below 1024 need privileges. Set http.port (--http.port) to a higher one."
    else:
        remedy = "Set http.host and http.port, or http.enabled to false."
    return ConfigError(message, remedy)
