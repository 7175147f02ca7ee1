"""What a campaign does things to: Postgres, Qdrant, a proxy before each, and the daemon, which is
started again whenever it has ended, as a service manager does."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import psutil

from cdc_sync.demo.embedded import PostgresServer
from tests.faults.campaign.load import TABLE_SETTINGS, Load, NotPossibleError
from tests.faults.campaign.report import CampaignLog
from tests.support.daemon import Daemon
from tests.support.fix_postgres import Database
from tests.support.proxy import TcpProxy
from tests.support.qdrant_control import Faults, QdrantProcess

SinkName = Literal["server", "edge"]

_DEADLINE_SECONDS: Final = 4.0
LET_GO_SECONDS: Final = 4.0
_DRAIN_SECONDS: Final = 5.0
#: What the daemon ends with when its own records cannot be written.
STATE_EXIT: Final = 65
_BUGS: Final = (b"Report this with the trace", b"never retrieved", b"Fatal Python error")
_WANTED: Final = ("resync_wanted", "sweep_wanted")
_COMPLETED: Final = ("resync_completed", "sweep_completed", "table_copied")
#: Between these, the tables that a new slot makes it read again are not known yet.
_NEW_SLOT: Final = "a new slot"
_MARKS: Final = (
    b"_wanted",
    b"_completed",
    b"table_copied",
    b"stream_begins_anew",
    b"streaming_started",
    b'"state"',
)


class CampaignError(AssertionError):
    """The daemon did what it must not do."""


class Keeper:
    """Starts the daemon again whenever it has ended."""

    def __init__(self, daemon: Daemon, log: CampaignLog) -> None:
        self.daemon = daemon
        self._log = log
        self._rests_until = 0.0
        self._expected = False
        #: Exit codes that are no fault at the moment, each by how many events.
        self.excused: Counter[int] = Counter()
        self.starts = 0
        self.peak_bytes = 0

    def start(self) -> None:
        self.daemon.start(wait=False)
        self.starts += 1
        self._expected = False

    def tend(self) -> None:
        """Look after it; called often."""
        process = self.daemon.process
        assert process is not None
        code = process.poll()
        if code is None:
            return
        if not self._expected:
            if not self.excused[code]:
                raise CampaignError(f"the daemon ended with {code}:\n{self.daemon.log()[-6000:]}")
            self._log.say(f"the daemon ended with {code}, as it should")
            self._expected = True
            self._rests_until = time.monotonic() + 0.3
        if time.monotonic() >= self._rests_until:
            self.start()

    def kill(self, rest_seconds: float) -> None:
        """kill -9."""
        self._need_running()
        self._expected = True
        self.daemon.kill()
        self._rests_until = time.monotonic() + rest_seconds

    def stop(self, rest_seconds: float) -> float:
        """SIGTERM; returns the seconds that it took."""
        self._need_running()
        self._expected = True
        started = time.monotonic()
        self.send(signal.SIGCONT)
        code = self.daemon.terminate(_DRAIN_SECONDS + 15)
        # Before it says anything, Python is starting, and SIGTERM does what it does by itself.
        too_early = code == -signal.SIGTERM and not self.daemon.log()
        if code != 0 and not self.excused[code] and not too_early:
            raise CampaignError(f"SIGTERM ended it with {code}:\n{self.daemon.log()[-6000:]}")
        self._rests_until = time.monotonic() + rest_seconds
        return time.monotonic() - started

    def send(self, number: signal.Signals) -> None:
        if self.daemon.running and self.daemon.process is not None:
            self.daemon.process.send_signal(number)

    def note_memory(self) -> None:
        if self.daemon.running:
            self.peak_bytes = max(self.peak_bytes, self.daemon.peak_rss_bytes())

    def workers(self) -> list[psutil.Process]:
        """Processes that copy."""
        try:
            return [x for x in self.daemon.children() if "spawn_main" in " ".join(x.cmdline())]
        except psutil.Error:
            return []

    def _need_running(self) -> None:
        if not self.daemon.running:
            raise NotPossibleError("the daemon does not run")


class LogReader:
    """Reads on in the daemon's log, for which tables it wants to read again and has not yet."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._offset = 0
        self._rest = b""
        self.wanted: set[str] = set()
        self.bugs: list[str] = []

    def read(self) -> None:
        """Take in what has been written since."""
        if not self._daemon.log_path.exists():
            return
        with self._daemon.log_path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line)

    def _line(self, line: bytes) -> None:
        # Not every traceback: at this level of logging, what ends it as it should has one too.
        if any(mark in line for mark in _BUGS):
            self.bugs.append(line.decode(errors="replace")[:2000])
        if not any(mark in line for mark in _MARKS):
            return
        try:
            event = json.loads(line)
        except ValueError:
            return  # Two lives may write into one line.
        name, table = event.get("event"), str(event.get("table"))
        if name == "state" and event.get("state") == "starting":
            self.wanted.clear()
        elif name == "stream_begins_anew":
            self.wanted.add(_NEW_SLOT)
        elif name == "streaming_started":
            self.wanted.discard(_NEW_SLOT)
        elif name in _WANTED:
            self.wanted.add(table)
        elif name in _COMPLETED:
            self.wanted.discard(table)


@dataclass(order=True)
class _Due:
    at: float
    number: int
    what: str = field(compare=False)
    at_the_end: bool = field(compare=False)
    action: Callable[[], None] = field(compare=False)


class Site:
    """One pipeline with all that is around it."""

    def __init__(
        self,
        directory: Path,
        server: PostgresServer,
        database: Database,
        qdrant: QdrantProcess | None,
        log: CampaignLog,
        seed: int,
    ) -> None:
        directory.mkdir(parents=True)
        self.sink: SinkName = "edge" if qdrant is None else "server"
        self.server = server
        self.database = database
        self.qdrant = qdrant
        self.log = log
        self.postgres_up = True
        self.qdrant_up = qdrant is not None
        self.load = Load.create(database, seed)
        self.postgres_proxy = TcpProxy(server.host, server.port)
        self.qdrant_proxy: TcpProxy | None = None
        target, self.target_url = self._target(directory)
        slot = database.name
        self.daemon = Daemon(
            directory,
            pg_url=database.url_through(self.postgres_proxy),
            qdrant_url=target,
            tables=TABLE_SETTINGS,
            slot=slot,
            pipeline={
                "batch_rows": 200,
                "let_go_seconds": LET_GO_SECONDS,
                "shutdown_timeout_seconds": _DRAIN_SECONDS,
                "startup_timeout_seconds": 300,
                "status_interval_seconds": 1,
            },
            qdrant={"timeout_seconds": _DEADLINE_SECONDS},
            migration={
                "num_workers": 2,
                "window_seconds": 1.0,
                "chunk_rows": 100,
                "batch_delay": 120,
            },
        )
        self.keeper = Keeper(self.daemon, log)
        self.reader = LogReader(self.daemon)
        self._due: list[_Due] = []
        self._numbers = itertools.count()

    def _target(self, directory: Path) -> tuple[str, str]:
        """The URL for the daemon, and the one for those who compare."""
        if self.qdrant is None:
            url = f"edge:{directory / 'edge'}"
            return url, url
        host, _, port = self.qdrant.url.rpartition("://")[2].rpartition(":")
        self.qdrant_proxy = TcpProxy(host, int(port))
        return f"http://{self.qdrant_proxy.host}:{self.qdrant_proxy.port}", self.qdrant.url

    @property
    def pipeline(self) -> str:
        return self.daemon.slot

    @property
    def edge_directory(self) -> Path:
        return Path(self.target_url.removeprefix("edge:"))

    # -- what events need

    def postgres(self) -> PostgresServer:
        """Postgres, if it is there at the moment."""
        if not self.postgres_up:
            raise NotPossibleError("Postgres is down already")
        return self.server

    def script(self) -> Faults:
        """The faults of the Qdrant test server, if it is there at the moment."""
        if self.qdrant is None or not self.qdrant_up:
            raise NotPossibleError("Qdrant is down already")
        return self.qdrant.script

    def proxy(self, choose: random.Random) -> tuple[str, TcpProxy]:
        """One of the proxies."""
        sides = [("postgres", self.postgres_proxy)]
        if self.qdrant_proxy is not None:
            sides.append(("qdrant", self.qdrant_proxy))
        return choose.choice(sides)

    # -- time

    def later(
        self, seconds: float, what: str, action: Callable[[], None], *, at_the_end: bool = True
    ) -> None:
        """Do something after so many seconds, and at the end of the round at the latest, unless
        that is not ``at_the_end``."""
        due = time.monotonic() + seconds
        heapq.heappush(self._due, _Due(due, next(self._numbers), what, at_the_end, action))

    def tick(self) -> None:
        """Do what is due, and look after the daemon."""
        while self._due and self._due[0].at <= time.monotonic():
            self._do(heapq.heappop(self._due))
        self.keeper.tend()
        self.reader.read()

    @property
    def streams_since(self) -> float:
        """When the daemon began to stream, about, by the monotonic clock."""
        return time.monotonic() - float(self.daemon.status()["uptime_seconds"])

    def mend(self) -> None:
        """Undo everything that is still to be undone, and end all faults."""
        while any(due.at_the_end for due in self._due):
            for due in sorted(due for due in self._due if due.at_the_end):
                self._due.remove(due)
                self._do(due)
        heapq.heapify(self._due)
        for proxy in (self.postgres_proxy, self.qdrant_proxy):
            if proxy is not None:
                proxy.resume()
                proxy.accept()
                proxy.delay(0)
        if self.qdrant is not None:
            self.qdrant.script.clear()
            self.qdrant.script.lag(0)

    def _do(self, due: _Due) -> None:
        self.log.say(f"  {due.what}")
        with contextlib.suppress(NotPossibleError):
            due.action()

    # -- the end

    def close(self) -> None:
        self.daemon.close()
        self.postgres_proxy.close()
        if self.qdrant_proxy is not None:
            self.qdrant_proxy.close()
        if self.qdrant is not None:
            self.qdrant.close()

    def collections(self) -> Mapping[str, str]:
        """The collection of each table."""
        return {str(one["name"]): str(one["collection"]) for one in TABLE_SETTINGS}
