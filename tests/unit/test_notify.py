"""Service notification: what systemd hears."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from cdc_sync.ops.notify import Notifier
from cdc_sync.ops.status import StatusBoard
from cdc_sync.sync.daemon import _tell
from cdc_sync.sync.pipeline import Pipeline


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(tmp_path / "notify"))
        bound.settimeout(2)
        yield bound


@pytest.fixture
def notifier(listener: socket.socket) -> Iterator[Notifier]:
    made = Notifier({"NOTIFY_SOCKET": listener.getsockname()})
    yield made
    made.close()


def test_each_message_is_one_datagram(notifier: Notifier, listener: socket.socket) -> None:
    notifier.ready("streaming")
    notifier.ready()
    notifier.status("lag 3 s")
    notifier.watchdog()
    notifier.stopping()
    received = [listener.recv(1024) for _ in range(5)]
    assert received == [
        b"READY=1\nSTATUS=streaming",
        b"READY=1",
        b"STATUS=lag 3 s",
        b"WATCHDOG=1",
        b"STOPPING=1",
    ]


def test_a_status_cannot_add_assignments_or_show_passwords(
    notifier: Notifier, listener: socket.socket
) -> None:
    notifier.status("cannot reach postgres://u:hunter2@h/d\nWATCHDOG=trigger" + "x" * 5000)
    message = listener.recv(8192)
    assert b"\n" not in message
    assert b"hunter2" not in message
    assert len(message) < 600


def test_an_abstract_socket_is_reached() -> None:
    name = f"cdc-sync-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(f"\0{name}")
        bound.settimeout(2)
        notifier = Notifier({"NOTIFY_SOCKET": f"@{name}"})
        notifier.ready()
        assert bound.recv(1024) == b"READY=1"
        notifier.close()


@pytest.mark.parametrize("value", ["", "relative/path", "vsock:2:1234"])
def test_without_a_usable_socket_nothing_happens(value: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": value, "WATCHDOG_USEC": "1000000"})
    assert not notifier.enabled
    assert notifier.watchdog_seconds is None
    notifier.ready()
    notifier.close()


def test_a_manager_that_has_gone_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "absent")})
    notifier.watchdog()
    notifier.watchdog()
    assert [record.message for record in caplog.records] == ["service_notification_failed"]
    notifier.close()


def test_a_manager_that_does_not_read_never_blocks(
    notifier: Notifier, listener: socket.socket
) -> None:
    for _ in range(10_000):
        notifier.watchdog()
    assert listener.recv(1024) == b"WATCHDOG=1"


def test_that_it_has_started_is_said_until_it_is_heard(
    notifier: Notifier, listener: socket.socket
) -> None:
    while notifier.ready():
        pass
    assert not notifier.ready()
    listener.recv(1024)
    assert notifier.ready()
    assert not Notifier({}).ready()


async def test_a_manager_that_is_busy_hears_it_later(
    notifier: Notifier, listener: socket.socket
) -> None:
    while notifier.ready():
        pass
    notifier.watchdog_seconds = 0.01
    board = StatusBoard("p")
    board.set_source(True)
    board.set_sink(True)
    board.set_state("streaming")
    telling = asyncio.create_task(_tell(cast(Pipeline, SimpleNamespace(board=board)), notifier))
    try:
        await asyncio.sleep(0.1)
        listener.setblocking(False)
        while _waits(listener):
            pass
        heard: set[bytes] = set()
        async with asyncio.timeout(60):
            for message in iter(lambda: _waits(listener), b"READY=1"):
                heard.add(message)
                await asyncio.sleep(0.01)
        assert heard <= {b"", b"STATUS=streaming", b"WATCHDOG=1"}
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


def _waits(listener: socket.socket) -> bytes:
    """The next message, or nothing."""
    try:
        return listener.recv(4096)
    except BlockingIOError:
        return b""


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_wants_to_hear_twice_in_its_time(
    variables: dict[str, str], seconds: float | None
) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": "/run/notify", **variables})
    assert notifier.watchdog_seconds == seconds
