"""Finds and removes what a killed owner of an embedded Postgres left behind.

A server's directory holds ``owner.lock``, locked by the owning process for as long as it lives. The
lock is a POSIX record lock: the kernel drops it however the process ends, and forked children do
not inherit it. A directory whose lock can be taken therefore has no owner any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cdc_sync.errors import ConfigError

__all__ = [
    "DIRECTORY_PREFIX",
    "LOCK_NAME",
    "OwnerLock",
    "Postmaster",
    "postmaster_of",
    "remove_server_directory",
    "sweep",
]

#: How temporary directories of servers are named.
DIRECTORY_PREFIX: Final = "cdc-sync-pg-"
#: The file in a server's directory that its owner holds locked.
LOCK_NAME: Final = "owner.lock"
_SYSV_SEGMENTS: Final = Path("/proc/sysvipc/shm")
_IPC_RMID: Final = 0

# Closing any descriptor of a locked file drops a POSIX lock, so this process must never open its
# own lock files again.
_own_directories: set[Path] = set()


@dataclass(frozen=True, slots=True)
class Postmaster:
    """What ``postmaster.pid`` says; ``shared_memory`` is (key, id) of the System V segment."""

    pid: int
    status: str
    shared_memory: tuple[int, int] | None


class OwnerLock:
    """The mark that a live process owns a server's directory.

    :raises ConfigError: another process owns it, or this process does already.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        if directory in _own_directories:
            raise ConfigError(
                f"This process already has a server in {directory}.", "Close that server first."
            )
        path = directory / LOCK_NAME
        if path.exists():
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self._lock(path)
        else:
            # Named only once it is locked: a sweep never sees a lock file that nobody holds yet.
            new = directory / f"{LOCK_NAME}.{os.getpid()}"
            self._descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._lock(new)
            new.rename(path)
        _own_directories.add(directory)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        _end_postmaster(directory / "data")

    def _lock(self, path: Path) -> None:
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = (
                os.pread(self._descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            )
            os.close(self._descriptor)
            raise ConfigError(
                f"The directory {path.parent} is in use by process {owner}.",
                "Use another directory, or end that process.",
            ) from None

    def release(self) -> None:
        """Give the directory up."""
        if self._directory in _own_directories:
            _own_directories.discard(self._directory)
            os.close(self._descriptor)


def postmaster_of(data_directory: Path) -> Postmaster | None:
    """Read ``postmaster.pid`` of a data directory; None when there is none or it is not fully
    written.

    Lines: pid, data directory, start time, port, socket directory, address, "key id" of the
    segment, status.
    """
    try:
        lines = (data_directory / "postmaster.pid").read_text().splitlines()
        pid = int(lines[0])
        segment: tuple[int, int] | None = None
        if len(lines) > 6 and lines[6].split():
            key, identifier = lines[6].split()
            segment = (int(key), int(identifier))
    except (OSError, ValueError, IndexError):
        # Absent, or read while the postmaster writes it.
        return None
    return Postmaster(pid, lines[7].strip() if len(lines) > 7 else "", segment)


def sweep(root: Path, server_uid: int) -> list[Path]:
    """Remove the temporary server directories below ``root`` whose owners are dead; return those
    removed.

    Only directories of the present user or of the account that runs servers are touched.
    """
    removed = []
    for directory in root.glob(f"{DIRECTORY_PREFIX}*"):
        path = directory.resolve()
        if path in _own_directories or directory.is_symlink():
            continue
        try:
            ours = directory.stat().st_uid in (os.geteuid(), server_uid)
            abandoned = ours and _abandoned(directory)
        except OSError:
            # Gone meanwhile, or not ours to read.
            continue
        if abandoned:
            remove_server_directory(directory)
            removed.append(directory)
    return removed


def _abandoned(directory: Path) -> bool:
    try:
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        # Being made at this moment, unless it has been so for an hour.
        return time.time() - directory.stat().st_mtime > 3600
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def remove_server_directory(directory: Path) -> None:
    """End the server that still runs in ``directory``, if any, and remove the directory."""
    data = directory / "data"
    postmaster = postmaster_of(data)
    _end_postmaster(data)
    if postmaster is not None and postmaster.shared_memory is not None:
        _remove_segment(*postmaster.shared_memory)
    shutil.rmtree(directory, ignore_errors=True)


def _end_postmaster(data_directory: Path) -> None:
    """End a postmaster whose owner is dead, first by an immediate shutdown, then by SIGKILL."""
    postmaster = postmaster_of(data_directory)
    if postmaster is None:
        return
    for number, seconds in ((signal.SIGQUIT, 10.0), (signal.SIGKILL, 5.0)):
        if not _runs_in(postmaster.pid, data_directory):
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(postmaster.pid, number)
        deadline = time.monotonic() + seconds
        while _runs_in(postmaster.pid, data_directory) and time.monotonic() < deadline:
            time.sleep(0.02)


def _runs_in(pid: int, data_directory: Path) -> bool:
    """Whether ``pid`` is the postmaster of ``data_directory``, which is its working directory, and
    not a later process.
    """
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")) == data_directory.resolve()
    except OSError:
        return False


def _remove_segment(key: int, identifier: int) -> None:
    """Remove the System V segment that a killed postmaster leaves behind, if no process is attached
    to it.
    """
    try:
        lines = _SYSV_SEGMENTS.read_text().splitlines()
    except OSError:
        return
    for line in lines[1:]:
        # key shmid perms size cpid lpid nattch ...
        fields = line.split()
        if (int(fields[0]), int(fields[1])) == (key, identifier) and int(fields[6]) == 0:
            ctypes.CDLL(None).shmctl(identifier, _IPC_RMID, None)
