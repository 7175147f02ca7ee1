"""A daemon between servers of its own, a load, and a Prometheus that watches them with the shipped
rules, made quicker."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psycopg

from tests.operate.dashboard import ALERTS, quicker
from tests.operate.prometheus import Prometheus
from tests.support.daemon import Daemon
from tests.support.fix_postgres import Database
from tests.support.qdrant_control import QdrantProcess

#: A minute of the rules takes two seconds here.
FACTOR: Final = 30
SCRAPE_SECONDS: Final = 0.5
ROWS: Final = 4_000
SLOT: Final = "shop"
_WAL_BYTES_PER_SECOND: Final = 8_000_000

#: What is no duration in square brackets or after ``for``, and has to be smaller all the same.
_THRESHOLDS: Final = (
    ("cdc_sync_lag_seconds > 60", "cdc_sync_lag_seconds > 2"),
    ("cdc_sync_lag_seconds > 900", "cdc_sync_lag_seconds > 30"),
    ("2 * 3600", "240"),
    # A loop that waits turns once a second.
    ("heartbeat_timestamp_seconds > 60", "heartbeat_timestamp_seconds > 8"),
    ("timestamp_seconds > 300", "timestamp_seconds > 10"),
    ("wal_bytes > 10e9", "wal_bytes > 64e6"),
)
#: A bug to be alarmed by: on SIGUSR2 the daemon's main thread stands still while a file is there.
_HANG: Final = """
import os, signal, time

def hang(*_):
    while os.path.exists({flag!r}):
        time.sleep(0.1)

signal.signal(signal.SIGUSR2, hang)
"""
_SCHEMA: Final = f"""
CREATE TABLE products (id bigint PRIMARY KEY, note text, emb vector);
CREATE TABLE reviews (id bigint PRIMARY KEY, emb vector(3));
INSERT INTO products SELECT i, 'first', ARRAY[i, 1, 2]::vector FROM generate_series(1, {ROWS}) i;
INSERT INTO reviews SELECT i, ARRAY[i, 1, 2]::vector FROM generate_series(1, 100) i;
ANALYZE;
"""


def incident_rules() -> str:
    """The shipped rules for a world in which everything happens thirty times as fast."""
    text = ALERTS.read_text(encoding="utf-8")
    for shipped, scaled in _THRESHOLDS:
        assert text.count(shipped) == 1, shipped
        text = text.replace(shipped, scaled)
    return quicker(text, FACTOR)


def make_tables(database: Database) -> None:
    """Create and fill the tables."""
    database.execute(_SCHEMA)


def hanging_while(directory: Path) -> Path:
    """The file that keeps the daemon of that directory from going on."""
    return directory / "hang"


def make_daemon(
    directory: Path, database: Database, qdrant: QdrantProcess, batch_delay: int
) -> Daemon:
    """A daemon for both tables that is quick to notice things, and can be made to hang."""
    hook = directory / "hook" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(_HANG.format(flag=str(hanging_while(directory))), encoding="utf-8")
    daemon = Daemon(
        directory,
        pg_url=database.url,
        qdrant_url=qdrant.url,
        tables=[{"name": "products", "dimensions": {"emb": 3}}, {"name": "reviews"}],
        slot=SLOT,
        pipeline={"let_go_seconds": 5.0, "heartbeat_seconds": 0.5},
        migration={
            "num_workers": 1,
            "batch_size": 100,
            "batch_delay": batch_delay,
            "chunk_rows": 500,
        },
        env={"PYTHONPATH": str(hook.parent)},
    )
    with daemon.config.open("a", encoding="utf-8") as config:
        config.write("[verify]\ncontinuous = true\nrows_per_second = 4000\npause_seconds = 25\n")
    return daemon


@dataclass
class Load:
    """Transactions of an application, unless paused, and as much WAL besides as is asked for."""

    database: Database
    wal_bytes: int = 0
    paused: bool = False
    committed: int = 0
    _stopping: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[Load]:
        """Write until left; a server that is away is waited for."""
        threads = [threading.Thread(target=self._again, args=(f,)) for f in (self._rows, self._wal)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stopping.set()
            for thread in threads:
                thread.join()

    def _again(self, work: Callable[[psycopg.Connection[tuple[object, ...]]], None]) -> None:
        while not self._stopping.is_set():
            try:
                with self.database.connect() as connection:
                    work(connection)
            except psycopg.OperationalError:
                self._stopping.wait(0.2)

    def _rows(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        for number in itertools.count(self.committed):
            if self._stopping.wait(0.02):
                return
            while self.paused and not self._stopping.wait(0.2):
                pass
            id_ = number % ROWS + 1
            statement = (
                "UPDATE products SET note = %(n)s::text WHERE id = %(id)s",
                "UPDATE products SET emb = ARRAY[%(n)s, 2, 3]::vector WHERE id = %(id)s",
                "DELETE FROM products WHERE id = %(id)s",
                "INSERT INTO products VALUES (%(id)s, 'new', '[1,2,3]') ON CONFLICT DO NOTHING",
            )[number // 7 % 4]
            connection.execute(statement, {"n": number, "id": id_})
            self.committed += 1

    def _wal(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        while not self._stopping.wait(0.1):
            if size := min(self.wal_bytes, _WAL_BYTES_PER_SECOND // 10):
                self.wal_bytes -= size
                connection.execute(
                    "SELECT pg_logical_emit_message(false, 'load', repeat('x', %s))", (size,)
                )


@dataclass
class Scene:
    """Everything of an incident, and what happened when."""

    directory: Path
    daemon: Daemon
    database: Database
    qdrant: QdrantProcess
    prometheus: Prometheus
    load: Load

    @classmethod
    @contextmanager
    def open(
        cls,
        directory: Path,
        database: Database,
        qdrant: QdrantProcess,
        *,
        batch_delay: int = 0,
    ) -> Iterator[Scene]:
        """Make the tables; start a daemon, a load and a Prometheus that scrapes. With a delay
        (milliseconds a batch of 100 rows) scrapes see the copy at work."""
        make_tables(database)
        with (
            Prometheus(
                directory / "prometheus", interval_seconds=SCRAPE_SECONDS, rules=incident_rules()
            ) as prometheus,
            make_daemon(directory, database, qdrant, batch_delay) as daemon,
            Load(database).running() as load,
        ):
            scene = cls(directory, daemon, database, qdrant, prometheus, load)
            scene.start()
            yield scene

    def start(self, *arguments: str) -> None:
        """Start the daemon, and scrape it where it listens now."""
        self.daemon.start(*arguments, wait=False)
        self.prometheus.scrape(self.daemon.port)

    def afterwards(self) -> Path:
        """A configuration in which the reviews have another collection."""
        text = self.daemon.config.read_text(encoding="utf-8")
        name = 'name = "reviews"\n'
        assert text.count(name) == 1
        path = self.directory / "afterwards.toml"
        path.write_text(text.replace(name, f'{name}collection = "reviews_v2"\n'), encoding="utf-8")
        return path

    def rebuild(self, *arguments: str) -> None:
        """Run ``cdc-sync rebuild`` for the reviews to its end."""
        command = [sys.executable, "-m", "cdc_sync", "rebuild", "--table", "reviews"]
        done = subprocess.run(
            [*command, "--config", str(self.daemon.config), *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Have the daemon's main thread stand still."""
        flag = hanging_while(self.directory)
        flag.touch()
        assert self.daemon.process is not None
        self.daemon.process.send_signal(signal.SIGUSR2)
        try:
            yield
        finally:
            flag.unlink()

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 120.0) -> float:
        """Wait, and return when it was so (Unix time)."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{what} did not come within {seconds:g} s; firing: {self.prometheus.firing()}"
                    f"\n{self.daemon.log()[-3000:]}"
                )
            time.sleep(0.2)
        return time.time()

    def wait_quiet(self, seconds: float = 240.0) -> None:
        """Wait until no alert fires any more."""
        self.wait(lambda: not self.prometheus.firing(), "the end of all alerts", seconds)

    def fired(self, start: float, end: float) -> dict[str, float]:
        """Alerts that fired between two times, and when each began to, in seconds after the
        first."""
        found: dict[str, float] = {}
        for series in self.prometheus.query_range('ALERTS{alertstate="firing"}', start, end):
            name = series.labels["alertname"]
            first = series.points[0][0] - start
            found[name] = min(first, found.get(name, first))
        return found
