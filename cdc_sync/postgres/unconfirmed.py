"""What a slot holds that nobody has confirmed: the changes that a stopped pipeline will still
apply."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import psycopg

from cdc_sync.postgres.connect import PgConnection, translate
from cdc_sync.postgres.identifiers import quote_ident

_PAGE: Final = 2_000
_PEEK: Final = """
SELECT data FROM pg_catalog.pg_logical_slot_peek_binary_changes(
         %s, NULL, %s, 'proto_version', '1', 'publication_names', %s)
"""


def unconfirmed_frames(
    conn: PgConnection, slot: str, publication: str, *, limit: int, timeout_seconds: float
) -> Iterator[bytes]:
    """Yield the pgoutput messages, protocol 1 in text format, behind the slot's position.

    So many at the least as ``limit`` says, if there are so many: the server ends at the end of a
    transaction. Nothing is consumed. Nobody may be using the slot. The connection must be in
    autocommit mode and idle until the iterator is exhausted or closed. Raises
    :class:`SourceError`, SLOT_ACTIVE while a process uses the slot.
    """
    try:
        with conn.transaction():
            conn.execute(f"SET LOCAL statement_timeout = {round(timeout_seconds * 1000)}")
            with conn.cursor("cdc_sync_unconfirmed") as cursor:
                cursor.itersize = _PAGE
                cursor.execute(_PEEK, (slot, limit, quote_ident(publication)))
                for row in cursor:
                    yield bytes(row[0])
    except psycopg.Error as exc:
        raise translate(exc, f"looking into slot {slot}") from exc
