"""Having the WAL written before what it says is copied.

With ``synchronous_commit = off`` a transaction is visible before its WAL is on disk, and a crash of
the server undoes it. The stream brings only what is on disk, so it never takes back what was read
of such a transaction.
"""

from __future__ import annotations

import time
from typing import Final

import psycopg

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.postgres.connect import PgConnection, translate

#: How long to wait for the WAL writer; ``wal_writer_delay`` is 10 seconds at the most.
_WRITTEN_SECONDS: Final = 30.0


def write_out(conn: PgConnection) -> None:
    """Have everything committed so far written to the server's disk.

    Our own commit waits for the WAL before it, and for no standby. The connection must be in
    autocommit mode and idle. Raises :class:`SourceError`.
    """
    try:
        row = conn.execute(
            "SELECT pg_current_wal_insert_lsn() <= pg_current_wal_flush_lsn()"
        ).fetchone()
        if row == (True,):
            return
        conn.execute("SET synchronous_commit = local")
        conn.execute("SELECT pg_logical_emit_message(true, 'cdc_sync snapshot', '')")
    except psycopg.errors.InsufficientPrivilege:
        _wait_written(conn)
    except psycopg.Error as exc:
        raise translate(exc, "having the WAL written") from exc


def _wait_written(conn: PgConnection) -> None:
    """The same for a role that may not write such a message: a transaction that only takes an id
    has the WAL writer write up to its commit, in its own time (``wal_writer_delay``)."""
    deadline = time.monotonic() + _WRITTEN_SECONDS
    written = "SELECT pg_current_wal_flush_lsn() >= %s::pg_lsn"
    try:
        taken = conn.execute("SELECT pg_current_wal_insert_lsn()::text, pg_current_xact_id()")
        row = taken.fetchone()
        assert row is not None
        while conn.execute(written, row[:1]).fetchone() != (True,):
            if time.monotonic() > deadline:
                raise SourceError(
                    ErrorKind.SOURCE_UNAVAILABLE,
                    f"the server has not written its WAL within {_WRITTEN_SECONDS:g} s",
                    "Let the role of cdc-sync execute pg_logical_emit_message, which has it "
                    "written at once.",
                )
            time.sleep(0.02)
    except psycopg.Error as exc:
        raise translate(exc, "waiting for the WAL to be written") from exc
