"""How much is measured, and what every measurement needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from cdc_sync.demo.binaries import find_binaries
from cdc_sync.demo.embedded import PostgresServer
from tests.bench.datasets import POSTGRES_SETTINGS, Source
from tests.bench.engine import Scratch
from tests.bench.usage import Meter


@dataclass(frozen=True, slots=True)
class Scale:
    """Rows, rounds and seconds of the measurements.

    ``rows``: rows of a stream or copy into nothing; those into sinks have ``sink_rows``.
    ``transactions``: rows of single transactions for the memory, ``table_rows`` sizes of tables for
    growth, ``tables`` and ``columns`` the numbers of them that are compared.
    """

    name: str
    rows: int
    rounds: int
    sink_rows: int
    sink_rounds: int
    client_rows: int
    latency_seconds: float
    latency_rounds: int
    idle_seconds: float
    idle_tables: int
    transactions: tuple[int, ...]
    table_rows: tuple[int, ...]
    growth_rows: int
    growth_rounds: int
    collections_rounds: int
    tables: tuple[int, ...]
    columns: tuple[int, ...]
    rival_rows: int


QUICK: Final = Scale(
    name="quick",
    rows=6_000,
    rounds=3,
    sink_rows=3_000,
    sink_rounds=2,
    client_rows=2_000,
    latency_seconds=3.0,
    latency_rounds=1,
    idle_seconds=10.0,
    idle_tables=100,
    transactions=(1_000, 100_000),
    table_rows=(10_000, 50_000),
    growth_rows=10_000,
    growth_rounds=3,
    collections_rounds=1,
    tables=(1, 100),
    columns=(8, 32),
    rival_rows=5_000,
)
DEFAULT: Final = Scale(
    name="default",
    rows=20_000,
    rounds=9,
    sink_rows=8_000,
    sink_rounds=5,
    client_rows=6_000,
    latency_seconds=6.0,
    latency_rounds=3,
    idle_seconds=60.0,
    idle_tables=100,
    transactions=(1_000, 100_000, 1_000_000),
    table_rows=(10_000, 100_000, 400_000),
    growth_rows=20_000,
    growth_rounds=5,
    collections_rounds=3,
    tables=(1, 10, 100),
    columns=(8, 16, 32, 64),
    rival_rows=20_000,
)
FULL: Final = Scale(
    name="full",
    rows=40_000,
    rounds=11,
    sink_rows=20_000,
    sink_rounds=7,
    client_rows=10_000,
    latency_seconds=20.0,
    latency_rounds=5,
    idle_seconds=60.0,
    idle_tables=100,
    transactions=(1_000, 100_000, 1_000_000, 10_000_000),
    table_rows=(10_000, 100_000, 2_000_000),
    growth_rows=40_000,
    growth_rounds=7,
    collections_rounds=5,
    tables=(1, 10, 100),
    columns=(8, 16, 32, 64, 128),
    rival_rows=100_000,
)


@dataclass(frozen=True, slots=True)
class Setting:
    """A source, a place for what sinks keep, and the scale. ``cores``: CPUs that Postgres, we and
    the sink share."""

    source: Source
    scratch: Scratch
    scale: Scale
    cores: int

    @property
    def meter(self) -> Meter:
        """The clocks of this process and of Postgres."""
        return Meter(postgres=self.source.pid)

    def name(self) -> str:
        """A name that no pipeline, slot or publication has yet."""
        return f"bench_{self.scratch.new().name}"

    def say(self, text: str) -> None:
        """Tell on standard error how far it is."""
        sys.stderr.write(f"  {text}\n")
        sys.stderr.flush()


@contextmanager
def setting(scale: Scale, cores: int) -> Iterator[Setting]:
    """Start a server and make a directory; both are removed at the end."""
    server = PostgresServer(find_binaries(18))
    scratch = Scratch()
    try:
        server.start(POSTGRES_SETTINGS)
        yield Setting(Source(server.url(), server.pid), scratch, scale, cores)
    finally:
        server.close()
        scratch.close()
