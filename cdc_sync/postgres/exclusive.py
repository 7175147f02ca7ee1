"""One copy at a time: an advisory lock that a process holds while it prepares a slot and copies.

The slot itself is the lock of a streaming pipeline, but nobody is connected to it during the first
copy; a second process would take that for a copy that was abandoned. Nor does the slot say
whether workers of whoever had it last still write: while a window of the copy is open, its
snapshot's connection holds another lock, for which the next holder of the slot waits.
"""

from __future__ import annotations

import psycopg

from cdc_sync.config import SourceSettings
from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.postgres.connect import (
    PgConnection,
    closed_on_error,
    connect,
    set_lock_timeout,
    translate,
)

_LOCK = "SELECT pg_try_advisory_lock(hashtextextended('cdc_sync copy ' || %s, 0))"


def lock_pipeline(source: SourceSettings) -> PgConnection:
    """Take the lock of the slot's name; it is held until the connection returned is closed.

    Raises :class:`SourceError` SLOT_ACTIVE when another process holds it.
    """
    connection = connect(source, application_name="cdc_sync lock")
    with closed_on_error(connection):
        try:
            row = connection.execute(_LOCK, (source.slot,)).fetchone()
        except psycopg.Error as error:
            raise translate(error, "taking the lock of the pipeline") from error
        if row is None or not row[0]:
            raise SourceError(
                ErrorKind.SLOT_ACTIVE,
                f"another process is copying for the slot {source.slot}",
                "It goes on by itself when the other one ends.",
            )
    return connection


_REBUILD = "SELECT pg_advisory_lock(hashtextextended('cdc_sync rebuild ' || %s, 0))"
_REBUILD_SECONDS = 30.0


def lock_rebuild(source: SourceSettings) -> PgConnection:
    """Take the lock under which it is decided what becomes of rebuilds of the pipeline with this
    slot; it is held until the connection returned is closed. Raises :class:`SourceError`
    TABLE_LOCKED or SOURCE_UNAVAILABLE when it is not to be had in time."""
    connection = connect(source, application_name="cdc_sync lock")
    with closed_on_error(connection):
        set_lock_timeout(connection, _REBUILD_SECONDS)
        try:
            connection.execute(_REBUILD, (source.slot,))
        except psycopg.Error as error:
            raise translate(error, "taking the lock of rebuilds") from error
    return connection


_RECORDS = "SELECT pg_advisory_lock(hashtextextended('cdc_sync records ' || %s, 0))"
_RECORDS_SECONDS = 30.0


def lock_records(source: SourceSettings, pipeline: str) -> PgConnection:
    """Take the lock under which the pipeline's record is read, changed and written again; it is
    held until the connection returned is closed. Raises :class:`SourceError` TABLE_LOCKED or
    SOURCE_UNAVAILABLE when it is not to be had in time."""
    connection = connect(source, application_name="cdc_sync lock")
    with closed_on_error(connection):
        set_lock_timeout(connection, _RECORDS_SECONDS)
        try:
            connection.execute(_RECORDS, (pipeline,))
        except psycopg.Error as error:
            raise translate(error, "taking the lock of the pipeline's record") from error
    return connection


_WINDOW = "SELECT pg_advisory_lock(hashtextextended('cdc_sync window ' || %s, 0))"
#: How long a new holder of the slot waits for the workers of the last one.
_WINDOW_SECONDS = 30.0


def lock_window(connection: PgConnection, source: SourceSettings) -> None:
    """Hold the lock of the slot's windows until the connection is closed. Raises
    :class:`SourceError` SOURCE_UNAVAILABLE when it is not free in the connection's lock_timeout."""
    try:
        connection.execute(_WINDOW, (source.slot,))
    except psycopg.Error as error:
        raise translate(error, "waiting for the end of another process's window") from error


def wait_for_window(source: SourceSettings) -> None:
    """Wait until no window is open under this slot. With the slot in hand none can be opened by
    another process. Errors as :func:`lock_window`."""
    with connect(source, application_name="cdc_sync lock") as connection:
        set_lock_timeout(connection, _WINDOW_SECONDS)
        lock_window(connection, source)
