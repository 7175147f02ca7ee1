"""The HTTP endpoint and the board behind it."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from cdc_sync.config import HttpSettings
from cdc_sync.errors import ConfigError
from cdc_sync.ops import http as http_module
from cdc_sync.ops.http import MAX_CONNECTIONS, HttpServer, start_http_server
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import HEARTBEAT_LIMIT_SECONDS, StatusBoard


class Clock:
    """A monotonic clock that stands still until told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def board(metrics: Metrics, clock: Clock) -> StatusBoard:
    return StatusBoard(
        "default", slot="cdc_sync", publication="pub", metrics=metrics, monotonic=clock
    )


@pytest.fixture
def server(board: StatusBoard, metrics: Metrics) -> Iterator[HttpServer]:
    with HttpServer("127.0.0.1", 0, board=board, metrics=metrics) as running:
        yield running


def request(
    server: HttpServer, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()


def get_json(server: HttpServer, path: str) -> tuple[int, dict[str, object]]:
    status, headers, body = request(server, path)
    assert headers["Content-Type"] == "application/json"
    return status, json.loads(body)


def failing(body: dict[str, object]) -> list[str]:
    checks = body["checks"]
    assert isinstance(checks, list)
    return [check["name"] for check in checks if not check["ok"]]


# -- liveness


def test_a_new_process_is_alive(server: HttpServer) -> None:
    status, body = get_json(server, "/livez")
    assert status == 200
    assert body["ok"] is True


def test_a_stuck_loop_is_not_alive_and_is_named(
    server: HttpServer, board: StatusBoard, clock: Clock
) -> None:
    board.heartbeat("stream")
    board.heartbeat("writer")
    clock.now += HEARTBEAT_LIMIT_SECONDS
    board.heartbeat("writer")
    assert get_json(server, "/livez")[0] == 200
    clock.now += 0.1
    status, body = get_json(server, "/livez")
    assert status == 503
    assert failing(body) == ["stream"]
    board.retire("stream")
    board.retire("never heard of")
    assert get_json(server, "/livez")[0] == 200


def test_without_a_supervisor_it_is_not_alive(server: HttpServer, board: StatusBoard) -> None:
    board.supervisor_died("ValueError")
    status, body = get_json(server, "/livez")
    assert status == 503
    assert failing(body) == ["supervisor"]


def test_liveness_does_not_depend_on_the_two_ends(server: HttpServer, board: StatusBoard) -> None:
    board.set_source(False, "refused")
    board.set_sink(False, "refused")
    board.set_state("failed")
    assert get_json(server, "/livez")[0] == 200


# -- readiness


@pytest.mark.parametrize(
    ("state", "source", "sink", "ready"),
    [
        ("starting", True, True, False),
        ("standby", None, None, True),
        ("standby", False, False, True),
        ("snapshotting", True, True, True),
        ("catching_up", True, True, True),
        ("streaming", True, True, True),
        ("streaming", False, True, False),
        ("streaming", True, False, False),
        ("streaming", None, True, False),
        ("draining", True, True, False),
        ("failed", True, True, False),
    ],
)
def test_readiness(
    server: HttpServer,
    board: StatusBoard,
    state: str,
    source: bool | None,
    sink: bool | None,
    ready: bool,
) -> None:
    board.set_state(state)  # type: ignore[arg-type]
    if source is not None:
        board.set_source(source, None if source else "connection refused")
    if sink is not None:
        board.set_sink(sink)
    status, body = get_json(server, "/readyz")
    assert (status == 200) is ready
    assert body["ok"] is ready
    assert bool(failing(body)) is not ready
    assert get_json(server, "/status")[1]["ready"] is ready


def test_an_end_that_failed_says_why(server: HttpServer, board: StatusBoard) -> None:
    board.set_state("streaming")
    board.set_sink(True)
    board.set_source(False, "no route to postgres://u:hunter2@h/d")
    _, body = get_json(server, "/readyz")
    checks = body["checks"]
    assert isinstance(checks, list)
    assert checks[1]["message"] == "no route to postgres://u:***@h/d"


# -- status


def test_the_status_is_the_documented_contract(
    server: HttpServer, board: StatusBoard, clock: Clock
) -> None:
    board.set_state("streaming")
    board.set_source(True)
    board.set_sink(False, "connection refused")
    board.positions(server=0x16_B374_D848, received=2)
    board.positions(applied=1)
    board.set_lag(lag_bytes=7, seconds=0.5)
    board.set_versions(postgres="16.3")
    board.table("public.items").update(
        collection="items",
        state="failed",
        rows_estimated=400,
        error="cannot use postgres://u:hunter2@h",
        remedy="ALTER TABLE x",
    )
    board.table("public.items").add(rows_copied=4, changes_applied=2, dead_letters=1)
    board.heartbeat("stream")
    clock.now += 2
    status, body = get_json(server, "/status")
    assert status == 200
    assert set(body) == {
        "format", "pipeline", "time", "state", "state_since", "message", "summary", "attention",
        "alive", "ready", "source", "sink", "positions", "lag", "lag_history", "slot", "slowed",
        "rebuilds", "verification", "dead_letters", "tables", "tasks", "events", "versions",
        "started", "uptime_seconds",
    }  # fmt: skip
    assert body["format"] == 1
    assert body["pipeline"] == {"name": "default", "slot": "cdc_sync", "publication": "pub"}
    assert body["positions"] == {
        "server": "16/B374D848",
        "received": "0/2",
        "applied": "0/1",
        "acknowledged": None,
    }
    assert body["lag"] == {"bytes": 7, "seconds": 0.5}
    assert body["tables"] == [
        {
            "name": "public.items",
            "collection": "items",
            "state": "failed",
            "rows_copied": 4,
            "rows_estimated": 400,
            "rows_exact": False,
            "bytes_copied": 0,
            "retries": 0,
            "changes_applied": 2,
            "dead_letters": 1,
            "waiting": None,
            "error": "cannot use postgres://u:***@h",
            "remedy": "ALTER TABLE x",
            "copy_seconds": None,
        }
    ]
    assert body["tasks"] == [{"name": "stream", "heartbeat_age_seconds": 2.0}]
    assert body["uptime_seconds"] == 2.0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(body["started"]))
    source, sink, versions = body["source"], body["sink"], body["versions"]
    assert isinstance(source, dict)
    assert isinstance(sink, dict)
    assert isinstance(versions, dict)
    assert (source["up"], source["error"]) == (True, None)
    assert (sink["up"], sink["error"]) == (False, "connection refused")
    assert versions["postgres"] == "16.3"
    assert versions["qdrant"] is None


def test_the_state_keeps_its_time_while_it_stays(board: StatusBoard) -> None:
    board.set_state("streaming")
    first = board.snapshot()["state_since"]
    time.sleep(0.005)
    board.set_state("streaming", "still")
    assert board.snapshot()["state_since"] == first
    board.set_state("draining")
    assert board.snapshot()["state_since"] != first


def test_a_snapshot_does_not_change_with_the_board(board: StatusBoard) -> None:
    board.table("a").update(rows_copied=1)
    before = board.snapshot()
    board.table("a").update(rows_copied=2)
    tables = before["tables"]
    assert isinstance(tables, list)
    assert tables[0]["rows_copied"] == 1


def test_the_board_mirrors_to_the_metrics(board: StatusBoard, metrics: Metrics) -> None:
    board.set_state("streaming")
    board.set_source(True)
    board.set_sink(False)
    board.set_lag(lag_bytes=1, seconds=3.5)
    board.table("a").update(state="streaming")
    board.table("b")
    board.heartbeat("stream")
    read = metrics.registry.get_sample_value
    assert read("cdc_sync_state", {"state": "streaming"}) == 1
    assert read("cdc_sync_source_up") == 1
    assert read("cdc_sync_sink_up") == 0
    assert read("cdc_sync_lag_seconds") == 3.5
    assert read("cdc_sync_tables", {"state": "streaming"}) == 1
    assert read("cdc_sync_tables", {"state": "pending"}) == 1
    assert read("cdc_sync_tables_waiting") == 0
    board.table("a").update(waiting="somebody has it locked")
    assert read("cdc_sync_tables_waiting") == 1
    board.table("a").update(waiting=None)
    assert read("cdc_sync_tables_waiting") == 0
    beat = read("cdc_sync_loop_heartbeat_timestamp_seconds", {"task": "stream"})
    assert beat == pytest.approx(time.time(), abs=60)
    board.retire("stream")
    assert read("cdc_sync_loop_heartbeat_timestamp_seconds", {"task": "stream"}) is None


def test_the_board_is_safe_to_write_and_read_at_once(board: StatusBoard) -> None:
    errors: list[BaseException] = []

    def write(name: str) -> None:
        try:
            for number in range(300):
                board.table(f"{name}{number}").update(state="copying", rows_copied=number)
                board.heartbeat(f"{name}{number}")
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        board.snapshot()
        board.liveness()
    assert errors == []
    tables = board.snapshot()["tables"]
    assert isinstance(tables, list)
    assert len(tables) == 900


# -- metrics


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("application/openmetrics-text;version=1.0.0", "application/openmetrics-text"),
        ("\xff;;;q=x", "text/plain"),
    ],
)
def test_the_exposition_format_follows_the_client(
    server: HttpServer, accept: str, content_type: str
) -> None:
    status, headers, body = request(server, "/metrics?x=1", headers={"Accept": accept})
    assert status == 200
    assert headers["Content-Type"].startswith(content_type)
    assert b"cdc_sync_build_info" in body
    assert body.endswith(b"# EOF\n") is (content_type == "application/openmetrics-text")


def test_a_collector_that_fails_gives_500_and_the_next_request_works(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(accept: str) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(http_module, "choose_encoder", broken)
        status, body = get_json(server, "/metrics")
    assert status == 500
    assert "RuntimeError" not in json.dumps(body)
    assert [record.message for record in caplog.records] == ["http_response_failed"]
    assert request(server, "/metrics")[0] == 200


# -- the protocol


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/readyz", "/status", "/nowhere"])
def test_head_is_get_without_the_body(server: HttpServer, path: str) -> None:
    status, headers, body = request(server, path, "HEAD")
    expected, _, whole = request(server, path)
    assert status == expected
    assert body == b""
    assert int(headers["Content-Length"]) == pytest.approx(len(whole), abs=200)


@pytest.mark.parametrize(
    "path", ["/index.html", "/metricsx", "/livez/", "/../etc/passwd", "/a//", "/%00"]
)
def test_another_path_is_404_in_json(server: HttpServer, path: str) -> None:
    status, body = get_json(server, path)
    assert status == 404
    assert body["paths"] == ["/", "/metrics", "/livez", "/readyz", "/status"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "<script>"])
def test_another_method_is_405_in_json(server: HttpServer, method: str) -> None:
    status, headers, body = request(server, "/livez", method)
    assert status == 405
    assert headers["Allow"] == "GET, HEAD"
    assert json.loads(body) == {"error": "method not allowed"}


def test_the_server_does_not_tell_its_python(server: HttpServer) -> None:
    assert request(server, "/livez")[1]["Server"] == "cdc-sync"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/9.9\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"",
    ],
)
def test_what_is_no_request_does_no_harm(
    server: HttpServer, sent: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    received = b""
    client = socket.create_connection((server.host, server.port), timeout=10)
    with client, contextlib.suppress(ConnectionError):
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        received = client.recv(65536)
    assert b"<html" not in received.lower()
    assert b"200 OK" not in received
    assert request(server, "/livez")[0] == 200
    assert capfd.readouterr().err == ""


def test_a_client_that_resets_the_connection_is_no_error(
    server: HttpServer, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(5):
        client = socket.create_connection((server.host, server.port))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        client.close()
    assert request(server, "/livez")[0] == 200
    assert capfd.readouterr().err == ""


# -- slow clients


def _connection_threads() -> int:
    return sum("process_request" in thread.name for thread in threading.enumerate())


def test_clients_that_say_nothing_do_not_block_others(server: HttpServer) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS * 2):
            client = socket.create_connection((server.host, server.port), timeout=10)
            stack.callback(client.close)
            client.sendall(b"GET /livez HT")
        started = time.monotonic()
        assert request(server, "/livez")[0] == 200
        assert time.monotonic() - started < 2
        while _connection_threads() > MAX_CONNECTIONS:
            assert time.monotonic() - started < 4, "the oldest connections are not cut off"
            time.sleep(0.02)


def test_a_client_that_never_ends_is_cut_off(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_module, "CONNECTION_SECONDS", 1.0)
    with socket.create_connection((server.host, server.port), timeout=10) as client:
        started = time.monotonic()
        # A byte now and then keeps every single read short of its timeout.
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 8:
                client.sendall(b"G")
                client.settimeout(0.1)
                with contextlib.suppress(TimeoutError):
                    if client.recv(1) == b"":
                        break
        assert time.monotonic() - started < 5


def test_a_client_that_does_not_read_does_not_block_others(
    server: HttpServer, metrics: Metrics
) -> None:
    for number in range(400):
        metrics.add_table(f"public.table_{number}")
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect((server.host, server.port))
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        time.sleep(0.2)
        started = time.monotonic()
        assert request(server, "/livez")[0] == 200
        assert time.monotonic() - started < 2


def test_it_answers_while_somebody_else_holds_the_interpreter_busy(server: HttpServer) -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        assert request(server, "/livez")[0] == 200
    finally:
        stop.set()
        thread.join()


# -- listening


def test_two_servers_on_one_port_are_refused_with_a_remedy(
    server: HttpServer, board: StatusBoard, metrics: Metrics
) -> None:
    with pytest.raises(ConfigError) as caught:
        HttpServer("127.0.0.1", server.port, board=board, metrics=metrics)
    assert f"127.0.0.1:{server.port}" in caught.value.message
    assert "--http.port" in (caught.value.remedy or "")
    assert request(server, "/livez")[0] == 200


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid", "not a host"])
def test_an_address_of_somebody_else_is_refused(
    board: StatusBoard, metrics: Metrics, host: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        HttpServer(host, 0, board=board, metrics=metrics)
    assert "--http.host" in (caught.value.remedy or "")


def test_the_port_is_free_again_after_stop(board: StatusBoard, metrics: Metrics) -> None:
    first = HttpServer("127.0.0.1", 0, board=board, metrics=metrics)
    first.start()
    request(first, "/livez")
    port = first.port
    first.stop()
    second = HttpServer("127.0.0.1", port, board=board, metrics=metrics)
    second.stop()


def test_stop_does_not_wait_for_stuck_clients(board: StatusBoard, metrics: Metrics) -> None:
    server = HttpServer("127.0.0.1", 0, board=board, metrics=metrics)
    server.start()
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"GET")
        time.sleep(0.1)
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 3


def test_ipv6_where_there_is_any(board: StatusBoard, metrics: Metrics) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 here")
    with HttpServer("::1", 0, board=board, metrics=metrics) as server:
        assert server.url == f"http://[::1]:{server.port}"
        assert request(server, "/livez")[0] == 200


def test_it_can_be_turned_off(board: StatusBoard, metrics: Metrics) -> None:
    assert start_http_server(HttpSettings(enabled=False), board, metrics) is None
    running = start_http_server(HttpSettings(port=0), board, metrics)
    assert running is not None
    assert request(running, "/livez")[0] == 200
    running.stop()
