"""The failing TCP proxy, in front of an echo server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.proxy import Direction, ProxyTo, TcpProxy


class EchoServer:
    """Echoes what it receives; on ``END`` of a stream it sends what it has and closes."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.received = 0
        self.resets = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(65536):
                    self.received += len(data)
                    connection.sendall(data)
            except OSError:
                self.resets += 1


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    server = EchoServer()
    yield server
    server.listener.shutdown(socket.SHUT_RDWR)
    server.listener.close()


@pytest.fixture
def proxy(echo: EchoServer, proxy_to: ProxyTo) -> TcpProxy:
    return proxy_to("127.0.0.1", echo.port)


def connect(proxy: TcpProxy) -> socket.socket:
    return socket.create_connection((proxy.host, proxy.port), timeout=5)


def read(client: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count and (part := client.recv(min(count - len(data), 65536))):
        data += part
    return bytes(data)


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def test_forwards_and_counts(proxy: TcpProxy) -> None:
    with connect(proxy) as client:
        client.sendall(b"hello")
        assert read(client, 5) == b"hello"
        assert proxy.connections == proxy.accepted == 1
    assert proxy.forwarded(Direction.UP) == proxy.forwarded(Direction.DOWN) == 5
    eventually(lambda: proxy.connections == 0)


def test_large_transfer_against_a_slow_reader(proxy: TcpProxy) -> None:
    data = bytes(range(256)) * 40_000
    with connect(proxy) as client:
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        time.sleep(0.1)
        assert read(client, len(data)) == data
        sender.join()


def test_half_closed_connection_still_answers(proxy: TcpProxy) -> None:
    with connect(proxy) as client:
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert read(client, 100) == b"last words"


def test_cut_resets_both_sides(proxy: TcpProxy, echo: EchoServer) -> None:
    with connect(proxy) as client:
        client.sendall(b"x")
        assert read(client, 1) == b"x"
        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    eventually(lambda: echo.resets == 1)
    assert proxy.cuts == 1
    with connect(proxy) as client:
        client.sendall(b"y")
        assert read(client, 1) == b"y"


def test_stall_holds_everything_and_loses_nothing(proxy: TcpProxy, echo: EchoServer) -> None:
    with connect(proxy) as client:
        client.sendall(b"a")
        assert read(client, 1) == b"a"
        proxy.stall()
        client.sendall(b"bc")
        with connect(proxy) as second:
            second.sendall(b"z")
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                client.recv(1)
            assert echo.received == 1
            proxy.resume()
            client.settimeout(5)
            assert read(client, 2) == b"bc"
            assert read(second, 1) == b"z"


def test_stall_of_one_direction(proxy: TcpProxy, echo: EchoServer) -> None:
    proxy.stall(Direction.DOWN)
    with connect(proxy) as client:
        client.sendall(b"abc")
        eventually(lambda: echo.received == 3)
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)
        proxy.resume(Direction.DOWN)
        client.settimeout(5)
        assert read(client, 3) == b"abc"


def test_stall_pushes_back_on_the_sender(proxy: TcpProxy, echo: EchoServer) -> None:
    proxy.stall()
    with connect(proxy) as client:
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.sendall(bytes(64 * 1024 * 1024))
    assert echo.received == 0


def test_delay_keeps_order_and_bandwidth(proxy: TcpProxy) -> None:
    proxy.delay(0.15)
    with connect(proxy) as client:
        started = time.monotonic()
        for number in range(50):
            client.sendall(bytes([number]))
            time.sleep(0.001)
        assert read(client, 50) == bytes(range(50))
        taken = time.monotonic() - started
    # There and back, once for all: not once for each chunk.
    assert 0.3 <= taken < 2


def test_refuse_and_accept(proxy: TcpProxy) -> None:
    with connect(proxy) as client:
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        client.sendall(b"still")
        assert read(client, 5) == b"still"
        proxy.accept()
        with connect(proxy) as other:
            other.sendall(b"again")
            assert read(other, 5) == b"again"


@pytest.mark.parametrize("count", [0, 1, 1000, 100_000])
def test_cut_after_forwards_not_one_byte_more(
    proxy: TcpProxy, echo: EchoServer, count: int
) -> None:
    proxy.cut_after(count, Direction.UP)

    def send_for_ever() -> None:
        with connect(proxy) as client:
            while True:
                client.sendall(bytes(500))
                time.sleep(0.0005)

    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        send_for_ever()
    assert proxy.forwarded(Direction.UP) == count
    assert echo.received <= count
    with connect(proxy) as client:
        client.sendall(b"once only")
        assert read(client, 9) == b"once only"


def test_upstream_away_resets_the_client(proxy_to: ProxyTo) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    proxy = proxy_to("127.0.0.1", port)

    def converse() -> None:
        with connect(proxy) as client:
            client.recv(1)

    with pytest.raises(ConnectionResetError):
        converse()


def test_new_upstream_counts_for_new_connections(proxy: TcpProxy) -> None:
    other = EchoServer()
    try:
        with connect(proxy) as first:
            first.sendall(b"a")
            assert read(first, 1) == b"a"
            proxy.upstream = ("127.0.0.1", other.port)
            with connect(proxy) as second:
                second.sendall(b"b")
                assert read(second, 1) == b"b"
        assert other.received == 1
    finally:
        other.listener.shutdown(socket.SHUT_RDWR)
        other.listener.close()
