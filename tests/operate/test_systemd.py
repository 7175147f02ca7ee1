"""The systemd unit: what systemd-analyze says of it, and what the daemon tells systemd."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from cdc_sync.config import PipelineSettings
from cdc_sync.errors import ExitCode
from cdc_sync.ops.notify import Notifier
from cdc_sync.ops.status import StatusBoard
from cdc_sync.sync.daemon import _tell
from cdc_sync.sync.pipeline import Pipeline
from tests.operate.dashboard import ROOT
from tests.operate.prometheus import required_program
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database

UNIT = ROOT / "docker" / "systemd" / "cdc-sync.service"
#: systemd-analyze calls less than 5.0 "OK".
EXPOSURE = 2.0

_NO_SUCH_CALL = 77
#: PR_SET_NO_NEW_PRIVS, then PR_SET_MDWE with PR_MDWE_REFUSE_EXEC_GAIN.
_WITHOUT_NEW_CODE = """#!{python}
import ctypes, os, sys
prctl = ctypes.CDLL(None).prctl
if prctl(38, 1, 0, 0, 0) != 0 or prctl(65, 1, 0, 0, 0) != 0:
    sys.exit(77)
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""


def settings() -> dict[str, list[str]]:
    """The values of each key; a key may be there several times."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def seconds(key: str) -> float:
    (value,) = settings()[key]
    return float(value)


def test_it_is_verified(tmp_path: Path) -> None:
    analyze = required_program("systemd-analyze", "systemd")
    program = tmp_path / "cdc-sync"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    unit = tmp_path / UNIT.name
    text = UNIT.read_text(encoding="utf-8")
    unit.write_text(text.replace("/opt/cdc-sync/bin/cdc-sync", str(program)), encoding="utf-8")
    done = subprocess.run(
        [analyze, "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_hardened() -> None:
    analyze = required_program("systemd-analyze", "systemd")
    done = subprocess.run(
        [analyze, "security", "--offline=true", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"exposure level for \S+: ([\d.]+) (\w+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) < EXPOSURE, done.stdout
    assert found[2] in ("OK", "SAFE", "PERFECT")


def test_its_times_leave_room_for_ours() -> None:
    pipeline = PipelineSettings()
    assert seconds("TimeoutStopSec") >= pipeline.shutdown_timeout_seconds + 10
    assert seconds("WatchdogSec") >= 30
    assert seconds("TimeoutStartSec") >= pipeline.startup_timeout_seconds + 60


def test_it_gives_up_where_somebody_has_to_act() -> None:
    (codes,) = settings()["RestartPreventExitStatus"]
    assert {int(code) for code in codes.split()} == {
        ExitCode.USAGE,
        ExitCode.DATA,
        ExitCode.PERMISSION,
        ExitCode.CONFIG,
    }


def test_its_command_and_variables_exist() -> None:
    (command,) = settings()["ExecStart"]
    assert command.split()[1:] == ["run", "--config", "/etc/cdc-sync/cdc-sync.toml"]
    text = UNIT.read_text(encoding="utf-8")
    assert set(re.findall(r"CDC_SYNC_\w+", text)) == {
        "CDC_SYNC_SOURCE__PASSWORD_FILE",
        "CDC_SYNC_QDRANT__API_KEY_FILE",
        "CDC_SYNC_LOG__FORMAT",
    }


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(tmp_path / "notify"))
        bound.setblocking(False)
        yield bound


def heard(listener: socket.socket) -> list[str]:
    """What has come until now."""
    messages = []
    while True:
        try:
            messages += listener.recv(4096).decode().split("\n")
        except BlockingIOError:
            return messages


async def test_the_watchdog_is_fed_only_while_something_moves(listener: socket.socket) -> None:
    board = StatusBoard("p")
    notifier = Notifier({"NOTIFY_SOCKET": listener.getsockname(), "WATCHDOG_USEC": "40000"})
    telling = asyncio.create_task(_tell(cast(Pipeline, SimpleNamespace(board=board)), notifier))

    async def hear() -> set[str]:
        heard(listener)
        messages: list[str] = []
        while len(messages) < 8:
            await asyncio.sleep(0.01)
            messages += heard(listener)
        return set(messages)

    try:
        # Alive, and not ready: neither side has answered.
        assert await hear() == {"STATUS=starting", "WATCHDOG=1"}
        board.set_source(True)
        board.set_sink(True)
        board.set_state("streaming")
        await asyncio.sleep(0.1)
        board.stuck("stuck at 0/1")
        await asyncio.sleep(0.1)
        assert "READY=1" in heard(listener)
        assert await hear() == {"STATUS=streaming"}
        board.stuck(None)
        assert "WATCHDOG=1" in await hear()
        # Qdrant away is no reason to be killed.
        board.set_sink(False, "away")
        await asyncio.sleep(0.1)
        assert "WATCHDOG=1" in await hear()
        board.supervisor_died("no longer supervised")
        await asyncio.sleep(0.1)
        assert await hear() == {"STATUS=streaming"}
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        notifier.close()


@pytest.mark.campaign
def test_a_daemon_that_may_map_no_code_copies_and_streams(
    database18: Database,
    sync_table: SyncTable,
    listener: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """As under MemoryDenyWriteExecute and NoNewPrivileges; and it says when it is ready."""
    python = tmp_path / "python"
    python.write_text(_WITHOUT_NEW_CODE.format(python=sys.executable), encoding="utf-8")
    python.chmod(0o755)
    if subprocess.run([python, "-c", ""], check=False).returncode == _NO_SUCH_CALL:
        pytest.skip("the kernel has no PR_SET_MDWE (6.3 and later)")
    database18.execute("CREATE TABLE docs (id int PRIMARY KEY, emb vector(2))")
    database18.execute("INSERT INTO docs SELECT i, ARRAY[i, 1] FROM generate_series(1, 50) i")
    synced = sync_table(database18, "docs", start=False)
    monkeypatch.setenv("NOTIFY_SOCKET", listener.getsockname())
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(python))
        synced.daemon.start()
    database18.execute("UPDATE docs SET emb = '[7,7]' WHERE id = 7")
    synced.assert_equal()
    synced.daemon.wait(lambda: "READY=1" in heard(listener), "READY=1")
    assert synced.daemon.terminate() == 0
    assert "STOPPING=1" in heard(listener)
