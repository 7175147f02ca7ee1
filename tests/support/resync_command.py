"""``cdc-sync resync`` as a process, and a table whose points are tampered with."""

from __future__ import annotations

import json
from typing import Final

from qdrant_client import models as q

from tests.support.command_line import Done, in_process
from tests.support.fix_pipeline import Synced
from tests.support.fix_postgres import Database

SECRET: Final = "a-key-nobody-may-see"


def resync(synced: Synced, *arguments: str) -> Done:
    """Run the command with the daemon's configuration."""
    return in_process("resync", "--config", str(synced.daemon.config), *arguments)


def resynced(synced: Synced, *arguments: str) -> str:
    """Ask, and wait until it is done."""
    done = resync(synced, "--wait", "--timeout", "30", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n")
    return done.stdout


def create_docs(database: Database, rows: int = 30) -> None:
    database.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, note text, n int, emb vector(3));"
        f"INSERT INTO docs SELECT i, 'note ' || i, i, '[1,2,3]' FROM generate_series(1, {rows}) i"
    )


def points(synced: Synced) -> dict[q.ExtendedPointId, q.Record]:
    assert synced.qdrant is not None
    found, _ = synced.qdrant.client().scroll(
        synced.collection, limit=10_000, with_vectors=True, with_payload=True
    )
    return {record.id: record for record in found}


def put(synced: Synced, id_: int | str, record: q.Record | None = None) -> None:
    """Write a point behind the pipeline's back: as it was, or with what no row has."""
    assert synced.qdrant is not None
    point = q.PointStruct(
        id=id_,
        vector=(record.vector or {}) if record is not None else {"emb": [9.0, 9.0, 9.0]},
        payload=record.payload if record is not None else {"note": "wrong"},
    )
    synced.qdrant.client().upsert(synced.collection, [point], wait=True)


def remove(synced: Synced, *ids: int | str) -> None:
    assert synced.qdrant is not None
    synced.qdrant.client().delete(synced.collection, list(ids), wait=True)


def emit(database: Database, text: str) -> None:
    database.execute("SELECT pg_logical_emit_message(true, 'cdc_sync', %s)", (text,))


def request(synced: Synced, *keys: str, table: str = "public.docs") -> str:
    """A request in plain SQL's words."""
    body: dict[str, object] = {"pipeline": synced.daemon.slot, "table": table}
    if keys:
        body["keys"] = [[key] for key in keys]
    return json.dumps({"resync": body})


def outcome(synced: Synced, name: str) -> float:
    return synced.daemon.metric("cdc_sync_control_requests_total", outcome=name)


def different(synced: Synced) -> set[object]:
    return {difference.id for difference in synced.differences()}
