"""Plays an application for docker/compose.yaml: makes the demo's table and changes it for ever.

    python writer.py CONNECTION_STRING

The password is read from the file named by PASSWORD_FILE. ``/tmp/ready`` says that the table is
filled; an existing table is gone on with.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import psycopg
from psycopg import sql

from cdc_sync.demo.dataset import Dataset, load_dataset, vector_literal
from cdc_sync.demo.table import COLUMNS, TABLE, create_indexes, create_table, load_rows, row_values

#: Transactions a second, about; every so often a burst of ten times as many.
RATE = 20.0
BURST_EVERY_SECONDS = 300.0
BURST_SECONDS = 20.0

_METADATA = "UPDATE packages SET version = %s, installed_size = %s, tags = %s WHERE id = ANY(%s)"
_VECTOR = "UPDATE packages SET embedding = %s::vector WHERE id = %s"
_INSERT = sql.SQL("INSERT INTO {} ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
    sql.Identifier(TABLE),
    sql.SQL(", ").join(map(sql.Identifier, COLUMNS)),
    sql.SQL(", ").join([sql.Placeholder()] * len(COLUMNS)),
)


def prepare(connection: psycopg.Connection, dataset: Dataset) -> None:
    """Make and fill the table, and the publication, unless they are there."""
    with connection.transaction():
        found = connection.execute("SELECT to_regclass(%s)", (f"public.{TABLE}",)).fetchone()
        if found is not None and found[0] is not None:
            return
        create_table(connection)
        for _ in load_rows(connection, dataset):
            pass
        for _ in create_indexes(connection):
            pass
        connection.execute(
            sql.SQL(
                "CREATE PUBLICATION cdc_sync FOR TABLE {} WITH (publish_via_partition_root = true)"
            ).format(sql.Identifier(TABLE))
        )


def write(connection: psycopg.Connection, dataset: Dataset, random_: random.Random) -> None:
    """One transaction: metadata of some rows, a vector, a deletion, or a row that comes back."""
    ids = random_.sample(range(1, len(dataset.packages) + 1), random_.randint(1, 10))
    position = ids[0] - 1
    package = dataset.packages[position]
    action = random_.choices(("metadata", "vector", "delete", "insert"), (50, 20, 10, 20))[0]
    with connection.transaction():
        if action == "metadata":
            version = f"{package.version}+{random_.randint(1, 999)}"
            values = (version, random_.randint(1, 10**6), ["written", package.section], ids)
            connection.execute(_METADATA, values)
        elif action == "vector":
            vector = dataset.vectors[position] + random_.uniform(-0.01, 0.01)
            connection.execute(_VECTOR, (vector_literal(vector), ids[0]))
        elif action == "delete":
            connection.execute(f"DELETE FROM {TABLE} WHERE id = %s", (ids[0],))
        else:
            row = row_values(ids[0], package, dataset.vectors[position])
            connection.execute(_INSERT, row)


def pause(started: float) -> float:
    """Seconds between two transactions."""
    bursting = (time.monotonic() - started) % BURST_EVERY_SECONDS < BURST_SECONDS
    return 1 / RATE / (10 if bursting else 1)


def main() -> None:
    """Write until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    file = os.environ.get("PASSWORD_FILE")
    password = Path(file).read_text(encoding="utf-8").strip() if file else None
    dataset = load_dataset()
    random_ = random.Random()
    started = time.monotonic()
    with psycopg.connect(sys.argv[1], password=password, autocommit=True) as connection:
        prepare(connection, dataset)
        Path(tempfile.gettempdir(), "ready").touch()
        while True:
            write(connection, dataset, random_)
            time.sleep(pause(started))


if __name__ == "__main__":
    main()
