"""A Postgres server of one's own, run from a directory of binaries, for the demo and for the tests.

The server listens on 127.0.0.1 (password, SCRAM) and on a Unix socket in a directory that nobody
else can enter. It belongs to the process that started it and does not outlive it: ``close`` runs at
interpreter exit, a small watchdog process ends the server when its owner dies without that, and
whatever survives both (the watchdog was killed too) is found by its lock file and removed when the
next server starts.

Linux only: process relations are read from ``/proc``.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self
from urllib.parse import quote

from cdc_sync.demo.binaries import Account, BinDir, find_binaries, readable_binaries
from cdc_sync.demo.leftovers import (
    DIRECTORY_PREFIX,
    LOCK_NAME,
    OwnerLock,
    postmaster_of,
    remove_server_directory,
    sweep,
)
from cdc_sync.errors import ConfigError, ErrorKind, SourceError

__all__ = ["DEFAULT_SETTINGS", "BinDir", "PostgresServer", "StopMode", "find_binaries"]

StopMode = Literal["smart", "fast", "immediate"]

#: What the server runs with unless ``start`` says otherwise. Without fsync a crash of the machine
#: may damage the data; a crash of the server does not.
DEFAULT_SETTINGS: Final[Mapping[str, str]] = {
    "wal_level": "logical",
    "max_replication_slots": "64",
    "max_wal_senders": "64",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "fsync": "off",
    "full_page_writes": "off",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %u@%d ",
    "lc_messages": "C",
    # Files in the data directory instead of /dev/shm, which is tiny in containers and keeps
    # segments after a SIGKILL.
    "dynamic_shared_memory_type": "mmap",
}

_STOP_SIGNALS: Final[Mapping[StopMode, signal.Signals]] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
_SOCKET_PATH_BYTES: Final = 107
_LOG_TAIL_LINES: Final = 20
_PORT_ATTEMPTS: Final = 5
#: Below the range from which Linux takes the ports of outgoing connections, so that a restart finds
#: its port free.
_PORTS: Final = range(20000, 32000)

# Reads the postmaster's pid, then waits. A second line means that the server was stopped; end of
# file without one means that the owner died. The working directory tells the postmaster from a
# later process with the same pid.
_WATCHDOG: Final = """
read pid || exit 0
read stopped && exit 0
running() { [ "$(readlink "/proc/$pid/cwd")" = "$1" ]; }
running "$1" && kill -QUIT "$pid"
tries=0
while running "$1" && [ "$tries" -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
running "$1" && kill -KILL "$pid"
[ -z "$2" ] || rm -rf -- "$2"
[ -z "$3" ] || rm -rf -- "$3"
"""


class PostgresServer:
    """A Postgres server owned by this process.

    ``directory`` receives the data, the log and the password. When it is None a temporary one is
    made, and removed by
    :meth:`close`; a directory given by the caller stays, and can be used again by a later process.

    Used as a context manager it is initialised and started on entry and closed on exit.
    """

    def __init__(
        self, binaries: BinDir | None = None, directory: Path | None = None, port: int | None = None
    ) -> None:
        self._account = Account.for_server()
        self.binaries = readable_binaries(binaries or find_binaries(), self._account)
        self._temporary = directory is None
        self._port = port
        self._settings: dict[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._owner_pid = os.getpid()
        self._closed = False
        self._socket_directory: Path | None = None
        self._password: str | None = None
        self.directory = self._make_directory(directory)
        self._lock = OwnerLock(self.directory)
        atexit.register(self.close)

    # -- what it is

    @property
    def major(self) -> int:
        """The major version of the server."""
        return self.binaries.major

    @property
    def host(self) -> str:
        """The address the server listens on."""
        return "127.0.0.1"

    @property
    def port(self) -> int:
        """The TCP port; the same after every restart. Known once the server has been started.

        :raises RuntimeError: the server was never started.
        """
        if self._port is None:
            raise RuntimeError("the server has not been started")
        return self._port

    @property
    def data_directory(self) -> Path:
        """The data directory (``PGDATA``)."""
        return self.directory / "data"

    @property
    def log_file(self) -> Path:
        """The server's log."""
        return self.directory / "postgres.log"

    @property
    def socket_directory(self) -> Path:
        """The directory of the Unix socket; only the owner of the server (and root) can enter it.

        :raises RuntimeError: the server was never started.
        """
        if self._socket_directory is None:
            raise RuntimeError("the server has not been started")
        return self._socket_directory

    @property
    def running(self) -> bool:
        """Whether the postmaster is alive."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, or None when it does not run."""
        return self._process.pid if self._process is not None and self.running else None

    def url(
        self,
        database: str = "postgres",
        user: str = "postgres",
        password: str | None = None,
        *,
        host: str | None = None,
        port: int | None = None,
    ) -> str:
        """Return a connection URI over TCP. The superuser's password is filled in; others' must be
        given.

        ``host`` and ``port`` lead the connection through a proxy.
        """
        if password is None and user == "postgres":
            password = self._password
        credentials = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
        address = f"{host or self.host}:{self.port if port is None else port}"
        return f"postgresql://{credentials}@{address}/{quote(database, safe='')}"

    def log_tail(self, lines: int = _LOG_TAIL_LINES) -> str:
        """Return the last lines of the log, or an empty string when there is none."""
        if not self.log_file.is_file():
            return ""
        with self.log_file.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 65536))
            text = file.read().decode("utf-8", "replace")
        return "\n".join(text.splitlines()[-lines:])

    # -- life

    def initdb(self) -> None:
        """Create the data directory; does nothing when it is there already.

        :raises ConfigError: the directory holds data of another major version.
        :raises SourceError: ``initdb`` failed.
        """
        version_file = self.data_directory / "PG_VERSION"
        password_file = self.directory / "password"
        if version_file.is_file():
            present = version_file.read_text().strip()
            if present != str(self.major):
                raise ConfigError(
                    f"{self.data_directory} holds data of Postgres {present},"
                    f" and these binaries are {self.major}.",
                    "Use another directory, or remove this one.",
                )
            self._password = password_file.read_text().strip()
            return
        self._password = secrets.token_urlsafe(18)
        password_file.touch(mode=0o600)
        password_file.write_text(self._password + "\n")
        self._account.take(password_file)
        # Renamed when complete: a killed initdb leaves files that look like a data directory.
        unfinished = self.directory / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [
            str(self.binaries.program("initdb")),
            f"--pgdata={unfinished}",
            "--username=postgres",
            f"--pwfile={password_file}",
            "--auth-local=trust",
            "--auth-host=scram-sha-256",
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",
        ]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.directory,
            env=_environment(),
            umask=0o077,
            start_new_session=True,
            check=False,
            **self._account.credentials(),
        )
        if done.returncode != 0:
            output = done.stdout.decode("utf-8", "replace").strip()
            raise SourceError(
                ErrorKind.SOURCE_UNAVAILABLE,
                f"initdb of Postgres {self.binaries.version} failed:\n{output}",
            )
        unfinished.rename(self.data_directory)

    def start(
        self, settings: Mapping[str, str] | None = None, timeout_seconds: float = 60.0
    ) -> None:
        """Start the server and wait until it accepts connections; creates the data directory when
        needed.

        ``settings`` are laid over :data:`DEFAULT_SETTINGS` and kept for later restarts. They go to
        a configuration file, so that ``ALTER SYSTEM`` can still override them.

        :raises SourceError: it did not come up; the message ends with the tail of its log.
        """
        if self._closed:
            raise RuntimeError("the server has been closed")
        if self.running:
            raise RuntimeError("the server runs already")
        self._settings.update(settings or {})
        self.initdb()
        self._end_process()
        for attempt in range(_PORT_ATTEMPTS):
            first = self._port is None
            if first:
                self._port = _free_port()
            log_start = self.log_file.stat().st_size if self.log_file.exists() else 0
            self._configure()
            self._launch()
            if self._wait_ready(timeout_seconds):
                return
            ended = self._how_it_ended(timeout_seconds)
            # Between choosing the port and listening on it somebody else may have taken it.
            with self.log_file.open("rb") as file:
                file.seek(log_start)
                taken = b"could not create any TCP/IP sockets" in file.read()
            self._escalate()
            if not (taken and first) or attempt == _PORT_ATTEMPTS - 1:
                break
            self._port = None
        raise SourceError(
            ErrorKind.SOURCE_UNAVAILABLE,
            f"Postgres {self.binaries.version} in {self.directory} did not start: {ended}."
            f" The end of its log:\n{self.log_tail()}",
        )

    def stop(self, mode: StopMode = "fast", timeout_seconds: float = 60.0) -> None:
        """Stop the server; does nothing when it does not run.

        ``smart`` waits for clients to leave, ``fast`` disconnects them and writes a checkpoint (but
        waits for walsenders to send everything), ``immediate`` is a crash that leaves recovery to
        the next start.

        :raises SourceError: it still runs after ``timeout_seconds``.
        """
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(_STOP_SIGNALS[mode])
            try:
                process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                raise SourceError(
                    ErrorKind.SOURCE_UNAVAILABLE,
                    f"Postgres did not stop ({mode}) within {timeout_seconds:g} s."
                    f" The end of its log:\n{self.log_tail()}",
                ) from None
        self._end_process()

    def kill(self) -> None:
        """Kill the postmaster and all its children with SIGKILL, as the out-of-memory killer or a
        power cut would.
        """
        process = self._process
        if process is not None and process.poll() is None:
            # Stopped first, so that it cannot start another child between listing and killing them.
            process.send_signal(signal.SIGSTOP)
            children = _children(process.pid)
            for pid in (process.pid, *children):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            _wait_gone(children)
        self._end_process()

    def restart(self, mode: StopMode = "fast", settings: Mapping[str, str] | None = None) -> None:
        """Stop and start again on the same port, with ``settings`` laid over those in force."""
        self.stop(mode)
        self.start(settings)

    def close(self) -> None:
        """Stop the server by all means, release the directory, and remove it when it is a temporary
        one.
        """
        if self._closed or os.getpid() != self._owner_pid:
            # A forked child inherits the object and the exit handler, but owns nothing.
            return
        self._closed = True
        atexit.unregister(self.close)
        self._escalate()
        if self._socket_directory is not None and self._socket_directory != self.directory:
            shutil.rmtree(self._socket_directory, ignore_errors=True)
        if self._temporary:
            remove_server_directory(self.directory)
        self._lock.release()

    def __enter__(self) -> Self:
        try:
            if not self.running:
                self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- parts

    def _make_directory(self, directory: Path | None) -> Path:
        if directory is None:
            root = self._account.temporary_root()
            sweep(root, self._account.uid)
            made = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir=root))
        else:
            made = directory.absolute()
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Its owner is about to change and files to be written: not to a directory in other use.
            if any(made.iterdir()) and not (made / LOCK_NAME).exists():
                raise ConfigError(
                    f"{made} is neither empty nor the directory of an embedded Postgres.",
                    "Choose a new or empty directory.",
                )
        self._account.take(made)
        made = made.resolve()
        if self._account.switch and not self._account.can_enter(made):
            raise ConfigError(
                f"Root runs Postgres as an unprivileged user, and that user cannot reach {made}.",
                "Choose a directory that every user can reach, below /var/lib or /tmp for example.",
            )
        return made

    def _configure(self) -> None:
        """Write the settings to a file that the main configuration includes."""
        socket_path = self.directory / f".s.PGSQL.{self.port}"
        if len(os.fsencode(socket_path)) <= _SOCKET_PATH_BYTES:
            self._socket_directory = self.directory
        elif self._socket_directory is None:
            self._socket_directory = Path(tempfile.mkdtemp(prefix="cdc-pg-", dir="/tmp"))
            self._account.take(self._socket_directory)
        settings = {
            **DEFAULT_SETTINGS,
            "listen_addresses": self.host,
            "unix_socket_directories": str(self._socket_directory),
            # Connections over the socket need no password; the mode keeps other users out.
            "unix_socket_permissions": "0700",
            **self._settings,
            "port": str(self.port),
        }
        own = self.data_directory / "cdc_sync.conf"
        lines = [f"{name} = '{_quoted(value)}'\n" for name, value in settings.items()]
        own.write_text("".join(lines))
        self._account.take(own)
        main = self.data_directory / "postgresql.conf"
        include = f"include '{own.name}'\n"
        text = main.read_text()
        if include not in text:
            main.write_text(f"{text}\n{include}")

    def _launch(self) -> None:
        self._watchdog = subprocess.Popen(
            [
                "/bin/sh",
                "-c",
                _WATCHDOG,
                "sh",
                str(self.data_directory),
                str(self.directory) if self._temporary else "",
                "" if self.socket_directory == self.directory else str(self.socket_directory),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            **self._account.credentials(),
        )
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [self.binaries.program("postgres"), "-D", self.data_directory],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.data_directory,
                env=_environment(),
                umask=0o077,
                # Ctrl-C in the owner's terminal goes to its process group; the server ends when the
                # owner says so.
                start_new_session=True,
                **self._account.credentials(),
            )
        self._tell_watchdog(f"{self._process.pid}\n")

    def _wait_ready(self, timeout_seconds: float) -> bool:
        """Wait for the postmaster to report itself ready in its pid file (as pg_ctl does)."""
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline and self.running:
            found = postmaster_of(self.data_directory)
            if found is not None and found.pid == self.pid and found.status in ("ready", "standby"):
                return True
            time.sleep(0.02)
        return False

    def _how_it_ended(self, waited_seconds: float) -> str:
        """Say how a start went wrong: a process that is killed early writes nothing to its log."""
        code = None if self._process is None else self._process.poll()
        if code is None:
            return f"it was not ready within {waited_seconds:g} s"
        if code < 0:
            return f"it was ended by signal {-code} ({signal.strsignal(-code)})"
        return f"it ended with exit code {code}"

    def _escalate(self) -> None:
        """Stop with growing force: a walsender whose client does not read holds up a fast stop."""
        # Data about to be removed need no shutdown checkpoint.
        modes: tuple[StopMode, ...] = ("fast", "immediate")
        for mode in modes[1:] if self._closed and self._temporary else modes:
            with contextlib.suppress(SourceError):
                self.stop(mode, timeout_seconds=10.0)
                return
        self.kill()

    def _end_process(self) -> None:
        """Forget a postmaster that has ended, and let its watchdog go."""
        if self._process is not None and self._process.poll() is None:
            raise RuntimeError("the postmaster still runs")
        self._process = None
        if self._watchdog is not None:
            self._tell_watchdog("stopped\n")
            if self._watchdog.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._watchdog.stdin.close()
            self._watchdog.wait()
            self._watchdog = None

    def _tell_watchdog(self, line: str) -> None:
        if self._watchdog is not None and self._watchdog.stdin is not None:
            # A watchdog that somebody killed is missed only when the owner dies too; the next start
            # cleans up then.
            with contextlib.suppress(BrokenPipeError):
                self._watchdog.stdin.write(line.encode())
                self._watchdog.stdin.flush()


def _environment() -> dict[str, str]:
    """Return the environment of the server: none of the caller's PG* variables, plain messages."""
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "''")


def _free_port() -> int:
    # SystemRandom: test runs seed the global generator alike, and would all try the same ports.
    for port in random.SystemRandom().sample(_PORTS, 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise SourceError(
        ErrorKind.SOURCE_UNAVAILABLE, "No free TCP port was found for the embedded Postgres."
    )


def _children(parent: int) -> list[int]:
    """Return the pids of the children of ``parent``. Backends have sessions of their own, so no
    group holds them all.
    """
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # "pid (name) state ppid ...", where the name may contain spaces and parentheses.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent:
            found.append(int(entry.name))
    return found


def _wait_gone(pids: list[int]) -> None:
    """Wait until killed processes are gone or zombies, so that the data directory is free for a
    restart.
    """
    deadline = time.monotonic() + 10
    for pid in pids:
        while time.monotonic() < deadline:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                break
            if state in "ZX":
                break
            time.sleep(0.01)
