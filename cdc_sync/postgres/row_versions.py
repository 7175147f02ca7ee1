"""Rows with what tells whether they were changed: their versions."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import psycopg

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.mapping.plan import ColumnPlan, TablePlan
from cdc_sync.mapping.table import PgType
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import PgConnection, translate
from cdc_sync.postgres.refetch import fetch_rows, widen_xid
from cdc_sync.postgres.snapshot import TransactionSnapshot
from cdc_sync.postgres.written import write_out
from cdc_sync.rows import RawValue, Row

_XID: Final = PgType(28, "pg_catalog", "xid")
_SYSTEM_COLUMNS: Final = (ColumnPlan("xmin", _XID), ColumnPlan("xmax", _XID))
_xid = struct.Struct(">I").unpack


@dataclass(frozen=True, slots=True)
class RowVersion:
    """A row, and what changes whenever it is changed or locked. ``changing``: a transaction that is
    not over, as far as a snapshot taken after the read shows, has changed or locked it."""

    row: Row
    version: bytes
    changing: bool


def fetch_versions(
    conn: PgConnection,
    plan: TablePlan,
    keys: Sequence[Sequence[RawValue]],
    row_filter: str | None = None,
) -> list[RowVersion]:
    """Read the rows with these keys as :func:`~cdc_sync.postgres.refetch.fetch_rows` does.

    A role that may read some columns only is not shown transaction ids; the version is then the
    content. Errors as there.
    """
    versioned = dataclasses.replace(plan, columns=(*plan.columns, *_SYSTEM_COLUMNS))
    try:
        rows = fetch_rows(conn, versioned, keys, (), row_filter)
    except SourceError as error:
        if error.kind is not ErrorKind.SOURCE_PERMISSION:
            raise
        return [
            RowVersion(row, repr(row).encode(), False)
            for row in fetch_rows(conn, plan, keys, (), row_filter)
        ]
    snapshot = _snapshot(conn)
    width = len(plan.columns)
    return [_version(row, width, snapshot) for row in rows]


def _version(row: Row, width: int, snapshot: TransactionSnapshot) -> RowVersion:
    created, changed = row[width], row[width + 1]
    assert isinstance(created, bytes)
    assert isinstance(changed, bytes)
    (xmax,) = _xid(changed)
    changing = xmax != 0 and not snapshot.sees(widen_xid(xmax, snapshot.xmax))
    return RowVersion(row[:width], created + changed, changing)


def _snapshot(conn: PgConnection) -> TransactionSnapshot:
    try:
        row = conn.execute("SELECT pg_catalog.pg_current_snapshot()::text").fetchone()
    except psycopg.Error as exc:
        raise translate(exc, "looking for open transactions") from exc
    assert row is not None
    return TransactionSnapshot.parse(str(row[0]))


@dataclass(frozen=True, slots=True)
class SettledPosition:
    """A position of the WAL behind everything that was visible when it was taken, and a transaction
    id (64 bit) above all that were running then."""

    lsn: Lsn
    horizon: int


def settled_position(conn: PgConnection) -> SettledPosition:
    """Take the position. The connection must be in autocommit mode and idle. Raises
    :class:`SourceError`."""
    write_out(conn)
    try:
        row = conn.execute("SELECT pg_catalog.pg_current_wal_flush_lsn()::text").fetchone()
    except psycopg.Error as exc:
        raise translate(exc, "reading the position of the WAL") from exc
    assert row is not None
    return SettledPosition(Lsn.parse(str(row[0])), _snapshot(conn).xmax)
