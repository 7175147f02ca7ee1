"""What a campaign does things to: Postgres, Qdrant, a proxy before each, and the daemon, which is
started again whenever it has ended, as a service manager does."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import json
import math
import random
import signal
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import psutil
import psycopg

from cdc_sync.demo.embedded import PostgresServer
from tests.faults.campaign.commands import Commands
from tests.faults.campaign.estate import Estate
from tests.faults.campaign.load import TABLE_SETTINGS, Load, NotPossibleError
from tests.faults.campaign.report import CampaignLog
from tests.support.daemon import Daemon, write_config
from tests.support.fix_postgres import Database
from tests.support.least_privilege import least_privileged, through
from tests.support.proxy import TcpProxy
from tests.support.qdrant_control import Faults, QdrantProcess

SinkName = Literal["server", "edge"]

_DEADLINE_SECONDS: Final = 4.0
LET_GO_SECONDS: Final = 4.0
_DRAIN_SECONDS: Final = 5.0
#: What the daemon ends with when its own records cannot be written.
STATE_EXIT: Final = 65
#: What it may end with while somebody keeps it from following its tables: it says what is wrong.
_ADVICE_EXITS: Final = frozenset({65, 69, 75, 77, 78})
#: Until a daemon has seen that what was wrong is put back.
_ADVICE_SECONDS: Final = 60.0
_BUGS: Final = (b"Report this with the trace", b"never retrieved", b"Fatal Python error")
_WANTED: Final = ("resync_wanted", "sweep_wanted")
_COMPLETED: Final = ("resync_completed", "sweep_completed", "partitions_copied", "table_copied")
#: Until it streams, the tables that a new slot, or another collection of one, makes it read again
#: are not known yet.
_NEW_SLOT: Final = "a new slot"
_MARKS: Final = (
    b"_wanted",
    b"_completed",
    b"partitions_copied",
    b"table_copied",
    b"stream_begins_anew",
    b"tables_planned_anew",
    b"streaming_started",
    b'"state"',
)


class CampaignError(AssertionError):
    """The daemon did what it must not do."""


class Keeper:
    """Starts the daemon again whenever it has ended."""

    def __init__(self, daemon: Daemon, log: CampaignLog) -> None:
        self.daemon = daemon
        self.reader = LogReader(daemon)
        self._log = log
        self._rests_until = 0.0
        #: Until when it may end with what is for its operator to mend.
        self.advises_until = 0.0
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
            if not self.excuses(code):
                raise CampaignError(f"the daemon ended with {code}:\n{self.daemon.log()[-6000:]}")
            self._log.say(f"the daemon ended with {code}, as it should")
            self._expected = True
            self._rests_until = time.monotonic() + 0.3
        if time.monotonic() >= self._rests_until:
            self.start()

    def excuses(self, code: int) -> bool:
        """Whether an exit code is no fault at the moment."""
        advises = code in _ADVICE_EXITS and time.monotonic() < self.advises_until
        return bool(self.excused[code]) or advises

    def rest(self, seconds: float) -> None:
        """Let it be down for so long from now on, if it is."""
        self._rests_until = time.monotonic() + seconds

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
        if code != 0 and not self.excuses(code) and not too_early:
            raise CampaignError(f"SIGTERM ended it with {code}:\n{self.daemon.log()[-6000:]}")
        self._rests_until = time.monotonic() + rest_seconds
        return time.monotonic() - started

    def send(self, number: signal.Signals) -> None:
        if self.daemon.running and self.daemon.process is not None:
            self.daemon.process.send_signal(number)

    def note_memory(self) -> None:
        if self.daemon.running:
            self.peak_bytes = max(self.peak_bytes, self.daemon.anonymous_bytes())

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
        elif name == "tables_planned_anew":
            self.wanted = {_NEW_SLOT}
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
        *,
        administrators: bool = False,
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
        self.estate = Estate.create(database, database.name) if administrators else None
        self._choose = random.Random(seed)
        pg_url = self._source()

        def keeper(place: Path) -> Keeper:
            place.mkdir(exist_ok=True)
            return Keeper(self._make_daemon(place, pg_url, target), log)

        self.keeper = keeper(directory)
        #: A second process with the same configuration, and whether it is to run.
        self.other = keeper(directory / "other") if administrators else None
        self._has_other = False
        self.commands = Commands(directory, log) if administrators else None
        self._due: list[_Due] = []
        self._numbers = itertools.count()

    def _make_daemon(self, directory: Path, pg_url: str, target: str) -> Daemon:
        return Daemon(
            directory,
            pg_url=pg_url,
            qdrant_url=target,
            tables=self.tables,
            slot=self.database.name,
            pipeline={
                "batch_rows": 200,
                "let_go_seconds": LET_GO_SECONDS,
                "shutdown_timeout_seconds": _DRAIN_SECONDS,
                "startup_timeout_seconds": 300,
                "status_interval_seconds": 1,
                # What was refused while a table was altered is written before both are compared.
                **({"dead_letter_retry_seconds": 10} if self.estate is not None else {}),
            },
            qdrant={"timeout_seconds": _DEADLINE_SECONDS},
            migration={
                "num_workers": 2,
                "window_seconds": 1.0,
                "chunk_rows": 100,
                "batch_delay": 120,
            },
        )

    def _source(self) -> str:
        """The URL for the daemon. Where there are administrators, every second publication is
        theirs, and the pipeline's role may only read."""
        if self.estate is None or self._choose.random() < 0.5:
            return self.database.url_through(self.postgres_proxy)
        name = self.database.name
        role = None
        while role is None:
            # Autovacuum may be at work in the tables.
            with contextlib.suppress(psycopg.errors.DeadlockDetected):
                role = least_privileged(
                    self.database, self.tables, publication=name, pipeline={"name": name}
                )
        self.estate.grant(role.name)
        return through(role, f"{self.postgres_proxy.host}:{self.postgres_proxy.port}")

    @property
    def tables(self) -> tuple[Mapping[str, object], ...]:
        """How the tables are configured."""
        return (*TABLE_SETTINGS, *(self.estate.settings if self.estate is not None else ()))

    @property
    def daemon(self) -> Daemon:
        """The daemon; the first, if there are two."""
        return self.keeper.daemon

    @property
    def reader(self) -> LogReader:
        """What its log says."""
        return self.keeper.reader

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

    # -- the load

    def start(self, seed: int) -> None:
        """Let writers change rows."""
        self.load.start(seed)
        if self.estate is not None:
            self.estate.start(seed)
            self.allow_advice()

    def finish(self) -> Counter[str]:
        """Stop them; returns what they did."""
        done = self.load.finish()
        if self.estate is not None:
            done += self.estate.finish()
        return done

    def where(self, table: str) -> str | None:
        """The row filter of a table."""
        return next(
            (str(t["where"]) for t in self.tables if t["name"] == table and "where" in t), None
        )

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
        for keeper in self.keepers:
            keeper.tend()
            keeper.reader.read()

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
        if self.estate is not None:
            self.estate.restore()
            self._end_commands()
            self._end_other()
            for keeper in self.keepers:
                keeper.advises_until = time.monotonic() + _ADVICE_SECONDS
            self.load.redefined = time.monotonic()

    def _do(self, due: _Due) -> None:
        self.log.say(f"  {due.what}")
        with contextlib.suppress(NotPossibleError):
            due.action()

    # -- a second process

    @property
    def keepers(self) -> tuple[Keeper, ...]:
        """Those of the processes that are to run."""
        return (self.keeper, self.other) if self._has_other and self.other else (self.keeper,)

    def start_other(self) -> None:
        """Start a second process."""
        if self._has_other or self.other is None:
            raise NotPossibleError("there are two already")
        self.other.start()
        self._has_other = True

    def active(self) -> Keeper | None:
        """Whoever streams, if that is known."""
        for keeper in self.keepers:
            with contextlib.suppress(OSError, AssertionError):
                if keeper.daemon.running and keeper.daemon.status().get("state") == "streaming":
                    return keeper
        return None

    @property
    def has_streamed(self) -> bool:
        """Whether the pipeline is past its first copy."""
        return any(b'"streaming"' in k.daemon.log_path.read_bytes() for k in self.keepers)

    def _end_other(self) -> None:
        """One of the two ends, be it the one that streams or the one that waits."""
        if not self._has_other:
            return
        assert self.other is not None
        if self._choose.random() < 0.5:
            self.keeper, self.other = self.other, self.keeper
        self._has_other = False
        self.log.say("one of the two ends")
        with contextlib.suppress(NotPossibleError):
            if self._choose.random() < 0.5:
                self.other.kill(0)
            else:
                self.other.stop(0)

    def allow_advice(self) -> None:
        """Until the end of the round something may be wrong that is not the daemon's to mend."""
        for keeper in (self.keeper, self.other):
            if keeper is not None:
                keeper.advises_until = math.inf

    def configure_anew(self, rest_seconds: float) -> None:
        """Start every process again, by the configuration as it is now."""
        for keeper in (self.keeper, self.other):
            if keeper is not None:
                self._write_config(keeper.daemon.config, self.tables)
        for keeper in self.keepers:
            with contextlib.suppress(NotPossibleError):
                keeper.stop(rest_seconds)

    @staticmethod
    def _write_config(
        path: Path, tables: Sequence[Mapping[str, object]], to: Path | None = None
    ) -> None:
        sections = tomllib.loads(path.read_text(encoding="utf-8"))
        del sections["tables"]
        write_config(to or path, tables, **sections)

    # -- commands

    def the_commands(self) -> Commands:
        """The commands of administrators."""
        assert self.commands is not None
        return self.commands

    def command(self, *arguments: str) -> str:
        """Start a command beside the daemon; it is waited for at the end of the round."""
        return self.the_commands().start(self.daemon.config, *arguments)

    def rebuild_arguments(self, table: str) -> tuple[str, ...]:
        """``cdc-sync rebuild`` of a table into a new collection."""
        assert self.commands is not None
        assert self.estate is not None
        self.postgres()
        if not self.estate.begin_rebuild(table):
            raise NotPossibleError("the table lacks columns at the moment")
        collection = f"{table}_v{next(self._numbers)}"
        tables = [
            {**one, "collection": collection} if one["name"] == table else one
            for one in self.tables
        ]
        path = self.daemon.config.with_name(f"{collection}.toml")
        self._write_config(self.daemon.config, tables, path)
        self.commands.rebuilds.add(table)
        return ("rebuild", "--to", str(path), "--table", table, "--alias", f"{table}_live")

    def _end_commands(self) -> None:
        """Wait for the commands, and give up the rebuilds that are left."""
        assert self.commands is not None
        self._tend_until(self.commands.over)
        for table in sorted(self.commands.rebuilds):
            self.command("rebuild", "--table", table, "--abort")
            self._tend_until(self.commands.over)
        self.commands.rebuilds.clear()
        if self.estate is not None:
            self.estate.rebuilding.clear()

    def _tend_until(self, over: Callable[[], bool]) -> None:
        while not over():
            self.tick()
            time.sleep(0.05)

    def take_collections(self) -> None:
        """A table that was rebuilt has another collection; so has the configuration then."""
        if self.estate is None:
            return
        self.estate.copied = True
        for table in self.daemon.status()["tables"]:
            if table["collection"] is not None:
                name = str(table["name"]).partition(".")[2]
                self.estate.collections[name] = str(table["collection"])
        for keeper in (self.keeper, self.other):
            if keeper is not None:
                self._write_config(keeper.daemon.config, self.tables)

    # -- the end

    def close(self) -> None:
        if self.commands is not None:
            self.commands.close()
        if self.other is not None:
            self.other.daemon.close()
        self.daemon.close()
        self.postgres_proxy.close()
        if self.qdrant_proxy is not None:
            self.qdrant_proxy.close()
        if self.qdrant is not None:
            self.qdrant.close()

    def collections(self) -> Mapping[str, str]:
        """The collection of each table."""
        return {str(one["name"]): str(one["collection"]) for one in self.tables}
