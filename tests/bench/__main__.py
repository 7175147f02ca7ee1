"""``make bench``: what our part costs, beside the limits that Postgres sets, measured in the same
run.

- drain limit: reading a slot's binary pgoutput frames through libpq and dropping them
- copy limit: COPY BINARY of the table, read through libpq and dropped
- ours: the same frames or rows decoded, mapped and encoded into finished Qdrant requests, which
  nobody receives

Each figure is the median over rounds in which limit and ours take turns; the ratio is taken round
by round. Absolute rates mean little on a shared machine, ratios and CPU a row do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psycopg

from cdc_sync.config import SourceSettings
from cdc_sync.demo.binaries import find_binaries
from cdc_sync.demo.embedded import PostgresServer
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.planner import PlanOptions
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.pgoutput.messages import Relation
from cdc_sync.postgres.catalog import TypeResolver, find_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.postgres.slot import read_slot
from cdc_sync.postgres.snapshot import copy_query, copy_rows
from cdc_sync.sync.gather import Gatherer
from cdc_sync.sync.planning import plan_table
from cdc_sync.sync.routing import Binding, PlannedTable, bind

TABLE = """
    CREATE TABLE docs (
        id bigint PRIMARY KEY, title text NOT NULL, lang varchar(8), views int, score float8,
        active bool, created timestamptz, tags text[], meta jsonb, embedding vector({dim}))
"""

LOAD = """
    INSERT INTO docs
    SELECT i, 'title of document ' || i, 'en', i % 1000, i * 0.5, i % 2 = 0,
           '2026-01-01'::timestamptz + i * interval '1 second', ARRAY['a', 'tag' || i % 10],
           jsonb_build_object('source', 'web', 'page', i),
           (SELECT array_agg(sin(i * 0.37 + j)) FROM generate_series(1, {dim}) j)::vector({dim})
      FROM generate_series({first}, {last}) i
"""


@dataclass(frozen=True)
class Figure:
    """One measured way: medians over rounds. ``ratio``: rate relative to the limit's in the same
    round."""

    name: str
    rows: int
    rows_per_second: float
    cpu_microseconds_per_row: float
    ratio: float | None = None


@dataclass
class Sample:
    """One round: wall and CPU seconds of this process."""

    seconds: float
    cpu: float


def timed(action: Callable[[], None]) -> Sample:
    cpu, wall = time.process_time(), time.perf_counter()
    action()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


class Bench:
    """A table on an embedded server, a slot with its changes, and the ways of reading both."""

    def __init__(self, server: PostgresServer, rows: int, dim: int) -> None:
        self.rows, self.dim = rows, dim
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            connection.execute(TABLE.format(dim=dim))
            connection.execute("CREATE PUBLICATION bench FOR TABLE docs")
            self.insert_slot = self._slot(connection, "bench_insert")
            connection.execute(LOAD.format(dim=dim, first=1, last=rows))
            connection.execute("VACUUM ANALYZE docs")
            self.update_slot = self._slot(connection, "bench_update")
            connection.execute("UPDATE docs SET views = views + 1")
        self.source = SourceSettings(url=server.url(), slot="bench", publication="bench")
        with connect(self.source) as connection:
            self.planned = plan_table(find_table(connection, "docs"), PlanOptions(), None)
            self.types = TypeResolver(connection)
            for column in self.planned.table.columns:
                self.types.resolve(column.type.oid, column.type.typmod)
        self.codec = WireCodec(self.planned.plan)

    @staticmethod
    def _slot(connection: psycopg.Connection[tuple[object, ...]], name: str) -> str:
        connection.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", (name,))
        return name

    # -- the stream

    def drain(self, slot: str, take: Callable[[bytes], None] | None) -> Sample:
        """Read all changes of the slot, from its beginning (nothing is ever confirmed)."""
        self._wait_free(slot)
        connection = ReplicationConnection.open(self.source)
        try:
            connection.start(slot, "bench")
            return timed(lambda: self._read(connection, take))
        finally:
            connection.close()

    def _read(
        self, connection: ReplicationConnection, take: Callable[[bytes], None] | None
    ) -> None:
        seen = 0
        # Begin, Relation, Type and Commit are few beside the rows.
        while seen < self.rows:
            frames = connection.read(512, 1 << 20)
            if not frames:
                time.sleep(0.0002)
            for frame in frames:
                if take is not None:
                    take(frame)
            seen += len(frames)

    def _wait_free(self, slot: str) -> None:
        """Wait until the walsender of the last round has noticed that it is over."""
        with connect(self.source) as connection:
            while (found := read_slot(connection, slot)) is not None and found.active:
                time.sleep(0.01)

    def _route(self, relation: Relation) -> Binding | None:
        return bind(self.planned, relation, self.types.resolve)

    def apply_stream(self, slot: str) -> Sample:
        """Decode, coalesce, map and encode every change of the slot."""
        gatherer = Gatherer(self._route, batch_rows=4096, batch_bytes=16 << 20)

        def take(frame: bytes) -> None:
            gatherer.feed(frame)
            if gatherer.full:
                self._encode(gatherer)

        sample = self.drain(slot, take)
        if not gatherer.ready:
            return sample
        rest = timed(lambda: self._encode(gatherer))
        return Sample(sample.seconds + rest.seconds, sample.cpu + rest.cpu)

    def _encode(self, gatherer: Gatherer) -> None:
        codec = self.codec
        for table in gatherer.take().tables.values():
            changes, _ = table.split()
            for point_id, row in changes.upserts:
                codec.point(point_id, row)
            for point_id, row in changes.partials:
                codec.point_id(point_id)
                codec.payload_entries(row, 1)

    # -- the copy

    def copy_drain(self) -> None:
        with psycopg.connect(self.source.url.get_secret_value()) as connection:
            cursor = connection.cursor()
            with cursor.copy("COPY docs TO STDOUT (FORMAT binary)") as copy:
                while copy.read():
                    pass

    def copy_apply(self) -> None:
        planned: PlannedTable = self.planned
        point_id = compile_point_id(planned.plan)
        with connect(self.source, autocommit=False) as connection:
            query, text = copy_query(planned.plan, planned.table.leaves[0], 0, None, None)
            for rows in copy_rows(connection, query, text):
                for row in rows:
                    self.codec.point(point_id(row), row)


def measure(
    rows: int,
    rounds: int,
    limit: Callable[[], Sample],
    ours: Callable[[], Sample],
    names: tuple[str, str],
) -> list[Figure]:
    limit()  # once to warm caches on both sides
    limits, own = [], []
    for _ in range(rounds):
        limits.append(limit())
        own.append(ours())

    def figure(name: str, samples: list[Sample], ratio: float | None) -> Figure:
        return Figure(
            name,
            rows,
            round(rows / statistics.median(s.seconds for s in samples)),
            round(statistics.median(s.cpu for s in samples) / rows * 1e6, 2),
            ratio,
        )

    ratio = statistics.median(a.seconds / b.seconds for a, b in zip(limits, own, strict=True))
    return [figure(names[0], limits, None), figure(names[1], own, round(ratio, 3))]


def run(rows: int, dim: int, rounds: int) -> list[Figure]:
    with PostgresServer(find_binaries(18)) as server:
        bench = Bench(server, rows, dim)
        return [
            *measure(
                rows,
                rounds,
                lambda: bench.drain(bench.insert_slot, None),
                lambda: bench.apply_stream(bench.insert_slot),
                (f"stream, {dim}-d inserts: drain limit", "  ours into a null sink"),
            ),
            *measure(
                rows,
                rounds,
                lambda: bench.drain(bench.update_slot, None),
                lambda: bench.apply_stream(bench.update_slot),
                ("stream, metadata-only updates: drain limit", "  ours into a null sink"),
            ),
            *measure(
                rows,
                rounds,
                lambda: timed(bench.copy_drain),
                lambda: timed(bench.copy_apply),
                (f"copy, {dim}-d, one connection: copy limit", "  ours into a null sink"),
            ),
        ]


def table(figures: list[Figure]) -> str:
    lines = ["| figure | rows/s | CPU µs/row | of the limit |", "|---|---|---|---|"]
    lines += [
        f"| {f.name} | {f.rows_per_second:,.0f} | {f.cpu_microseconds_per_row} | "
        f"{'' if f.ratio is None else f.ratio} |"
        for f in figures
    ]
    return "\n".join(lines)


def write_readme(report: str) -> None:
    """Replace what stands between the markers of the README."""
    readme = Path(__file__).parents[2] / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- bench -->")
    _, _, after = rest.partition("<!-- /bench -->")
    readme.write_text(f"{before}<!-- bench -->\n{report}<!-- /bench -->{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    figures = run(arguments.rows, arguments.dim, arguments.rounds)
    report = (
        f"{table(figures)}\n\nPython {platform.python_version()}, Postgres 18, "
        f"{os.cpu_count()} cores shared by server and client, {arguments.rows:,} rows with 9 "
        "columns besides the vector, "
        f"median of {arguments.rounds} rounds.\n"
    )
    sys.stdout.write(report)
    if arguments.readme:
        write_readme(report)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(f) for f in figures], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
