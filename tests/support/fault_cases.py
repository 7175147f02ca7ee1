"""What the fault tests of the daemon share: a table under load, waiting, and a second daemon."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.support.daemon import Daemon
from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database
from tests.support.qdrant_control import Faults, QdrantProcess
from tests.support.workload import EverythingTable, Writer, create_everything_table, load

#: Wide enough that the vector is TOASTed, so updates come without it.
DIM = 640


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait for something that no daemon needs to be alive for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        time.sleep(0.02)


def create_loaded(database: Database, rows: int = 200, seed: int = 1) -> EverythingTable:
    """Create the table ``everything`` with so many rows."""
    with database.connect() as connection:
        table = create_everything_table(connection, "everything", dim=DIM)
        # Without an estimate of its rows it is cut small enough for several workers.
        connection.execute("ALTER TABLE everything SET (autovacuum_enabled = false)")
        load(connection, table, rows, seed=seed)
    return table


def wait_copying(synced: Synced, faults: Faults) -> None:
    """Wait until rows of the copy are being written."""
    synced.daemon.wait(
        lambda: any(e["collection"] == synced.collection and e["points"] for e in faults.log()),
        "the copy",
    )


def begin_slow_copy(
    database: Database,
    sync_table: SyncTable,
    qdrant: QdrantProcess,
    *,
    request_seconds: float,
    workers: int = 2,
    **daemon: object,
) -> Synced:
    """Create ``everything`` with 1,000 rows, start a daemon for it, and wait until rows of the copy
    are being written; every request takes so long. Keywords are for ``sync_table``."""
    create_loaded(database, rows=1000)
    synced = sync_table(
        database,
        "everything",
        qdrant=qdrant,
        start=False,
        migration={"num_workers": workers},
        **daemon,
    )
    qdrant.script.slow("Upsert", request_seconds, times=10_000)
    synced.daemon.start(wait=False)
    wait_copying(synced, qdrant.script)
    return synced


def create_items(database: Database, rows: int) -> None:
    """Create the small table ``items``: ``id``, ``note``, ``emb vector(4)``."""
    database.execute("CREATE TABLE items (id bigint PRIMARY KEY, note text, emb vector(4))")
    database.execute(
        "INSERT INTO items SELECT i, 'note ' || i, ARRAY[mod(i, 7), 1, mod(i, 3), 0.5]::vector(4)"
        " FROM generate_series(1, %s) i",
        (rows,),
    )


@contextlib.contextmanager
def under_load(
    database: Database, table: EverythingTable, *, seed: int, reconnect: bool = False
) -> Iterator[None]:
    """Run writers meanwhile; some transactions must have been committed by the end."""
    writers = [
        Writer(
            database.url,
            table,
            seed=seed * 10 + n,
            key_space=400,
            reconnect=reconnect,
            pause_seconds=0.005,
        )
        for n in range(2)
    ]
    for writer in writers:
        writer.start()
    try:
        yield
    finally:
        committed = sum(writer.finish().committed for writer in writers)
    assert committed > 10


def check(daemon: Daemon, path: str, name: str) -> tuple[int, str | None]:
    """The status of ``/livez`` or ``/readyz``, and the message of one of its checks."""
    status, text = daemon.get(path)
    found = next((c for c in json.loads(text)["checks"] if c["name"] == name), None)
    return status, None if found is None else found["message"]


def is_ready(daemon: Daemon) -> bool:
    return daemon.get("/readyz")[0] == 200


def twin(
    synced: Synced,
    directory: Path,
    pipeline: Mapping[str, object] | None = None,
    table_settings: Mapping[str, object] | None = None,
) -> Daemon:
    """Another daemon for the same pipeline; the caller closes it."""
    assert synced.qdrant is not None
    directory.mkdir()
    return Daemon(
        directory,
        pg_url=synced.database.url,
        qdrant_url=synced.qdrant_url,
        api_key=synced.qdrant.api_key,
        tables=[{"name": synced.table, "collection": synced.collection, **(table_settings or {})}],
        slot=synced.daemon.slot,
        pipeline=pipeline,
    )


def slot_active(database: Database, slot: str) -> bool:
    """Whether somebody streams from the slot."""
    rows = database.execute("SELECT active FROM pg_replication_slots WHERE slot_name = %s", (slot,))
    return rows == [(True,)]
