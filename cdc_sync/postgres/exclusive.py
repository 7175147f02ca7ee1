"""One copy at a time: an advisory lock that a process holds while it prepares a slot and copies.

The slot itself is the lock of a streaming pipeline, but nobody is connected to it during the first
copy; a second process would take that for a copy that was abandoned.
"""

from __future__ import annotations

import psycopg

from cdc_sync.config import SourceSettings
from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.postgres.connect import PgConnection, connect, translate

_LOCK = "SELECT pg_try_advisory_lock(hashtextextended('cdc_sync copy ' || %s, 0))"


def lock_pipeline(source: SourceSettings) -> PgConnection:
    """Take the lock of the slot's name; it is held until the connection returned is closed.

    Raises :class:`SourceError` SLOT_ACTIVE when another process holds it.
    """
    connection = connect(source, application_name="cdc_sync lock")
    try:
        row = connection.execute(_LOCK, (source.slot,)).fetchone()
    except psycopg.Error as error:
        connection.close()
        raise translate(error, "taking the lock of the pipeline") from error
    except BaseException:
        connection.close()
        raise
    if row is None or not row[0]:
        connection.close()
        raise SourceError(
            ErrorKind.SLOT_ACTIVE,
            f"another process is copying for the slot {source.slot}",
            "It goes on by itself when the other one ends.",
        )
    return connection
