"""Snapshots: held for the copy, shared with its workers, and the queries that read under them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import psycopg
from psycopg import pq

from cdc_sync.config import SourceSettings
from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.mapping.ids import key_plan
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.table import Leaf, Table, redefined
from cdc_sync.postgres.connect import (
    PgConnection,
    closed_on_error,
    connect,
    result_error,
    set_lock_timeout,
    translate,
)
from cdc_sync.postgres.copy_binary import BATCH_BYTES, copy_rows
from cdc_sync.postgres.exclusive import lock_window
from cdc_sync.postgres.identifiers import qualified, quote_ident, quote_literal
from cdc_sync.postgres.pg_types import sends_binary
from cdc_sync.postgres.slot import read_slot
from cdc_sync.postgres.watch import definitions
from cdc_sync.postgres.written import write_out

__all__ = [
    "BATCH_BYTES",
    "SnapshotHolder",
    "TableRewrittenError",
    "TransactionSnapshot",
    "begin_snapshot",
    "copy_query",
    "copy_rows",
    "import_snapshot",
    "key_query",
    "lock_and_verify",
    "select_list",
]

_SNAPSHOT_ID: Final = re.compile(r"[0-9A-F]+-[0-9A-F]+-[0-9]+")
_LOCKING: Final = "locking the tables"
_BEGIN: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"


class SnapshotGoneError(SourceError):
    """A snapshot cannot be imported any more; its kind is SOURCE_UNAVAILABLE."""


class TableRewrittenError(SourceError):
    """A table is not what was planned: rewritten, truncated or repartitioned since.

    A snapshot older than the rewrite sees it empty, so nothing must be copied under it: read the
    table anew and take another snapshot (R54).
    """


@dataclass(frozen=True, slots=True)
class TransactionSnapshot:
    """``pg_current_snapshot()``: which transactions (64-bit ids) a snapshot sees.

    All below ``xmin``, none from ``xmax`` on, and of those between all that are not in ``xip``.
    """

    xmin: int
    xmax: int
    xip: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``10:20:10,14``. Raises ``ValueError`` for anything else."""
        xmin, xmax, xip = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(int(xid) for xid in xip.split(",") if xid))

    def sees(self, xid: int) -> bool:
        """Whether the effects of a committed transaction are visible."""
        return xid < self.xmin or (xid < self.xmax and xid not in self.xip)


def run_command(conn: PgConnection, command: str, doing: str) -> pq.abc.PGresult:
    """Run a command as it is, outside of psycopg's own transaction handling."""
    try:
        result = conn.pgconn.exec_(command.encode())
    except psycopg.Error as exc:
        raise translate(exc, doing) from exc
    if result.status not in (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK):
        failure = result_error(conn, result)
        raise translate(failure, doing) from failure
    return result


def begin_snapshot(conn: PgConnection) -> TransactionSnapshot:
    """Begin a REPEATABLE READ READ ONLY transaction and return its snapshot."""
    run_command(conn, _BEGIN, "beginning a transaction")
    return _current(conn)


def _current(conn: PgConnection) -> TransactionSnapshot:
    result = run_command(conn, "SELECT pg_current_snapshot()", "taking a snapshot")
    value = result.get_value(0, 0)
    assert value is not None
    return TransactionSnapshot.parse(value.decode())


def import_snapshot(conn: PgConnection, snapshot_id: str) -> None:
    """Begin a REPEATABLE READ READ ONLY transaction under an exported snapshot.

    It stays good for the transaction after the exporter is gone. The connection must be outside of
    a transaction. Raises :class:`SnapshotGoneError` when the snapshot is gone.
    """
    if _SNAPSHOT_ID.fullmatch(snapshot_id) is None:
        raise ValueError(f"not a snapshot's name: {snapshot_id!r}")
    doing = "importing a snapshot"
    run_command(conn, _BEGIN, doing)
    try:
        run_command(conn, f"SET TRANSACTION SNAPSHOT '{snapshot_id}'", doing)
    except SourceError as exc:
        run_command(conn, "ROLLBACK", doing)
        raise SnapshotGoneError(
            ErrorKind.SOURCE_UNAVAILABLE,
            f"snapshot {snapshot_id} cannot be imported: {exc.message}",
            "Its exporter has gone; the copy starts again with another snapshot.",
        ) from exc


class SnapshotHolder:
    """A transaction that keeps a snapshot importable and the tables as they are, until closed.

    It also holds the lock of windows (:mod:`cdc_sync.postgres.exclusive`): whoever takes the slot
    meanwhile waits until this one's workers have ended. Workers import :attr:`snapshot_id` and may
    come and go meanwhile (R55). The tables are locked in
    ACCESS SHARE mode, so nobody truncates or rewrites them under the copy; they are compared with
    what was planned (R54).
    """

    def __init__(self, conn: PgConnection, snapshot_id: str, snapshot: TransactionSnapshot) -> None:
        self._conn = conn
        #: Name for :func:`import_snapshot`.
        self.snapshot_id = snapshot_id
        #: What it sees.
        self.snapshot = snapshot

    @classmethod
    def imported(
        cls,
        source: SourceSettings,
        snapshot_id: str,
        tables: Sequence[Table],
        *,
        lock_timeout_seconds: float = 60.0,
    ) -> Self:
        """Take over the snapshot that slot creation exported; its connection may then be closed.

        ``tables`` must have been read before the slot was made. Raises :class:`SourceError`:
        SOURCE_UNAVAILABLE when the snapshot is gone or a table stays locked, and
        :class:`TableRewrittenError`.
        """
        return cls._open(source, snapshot_id, tables, lock_timeout_seconds)

    @classmethod
    def fresh(
        cls, source: SourceSettings, tables: Sequence[Table], *, lock_timeout_seconds: float = 60.0
    ) -> Self:
        """Take a new snapshot, after locking the tables; everything that it shows is on the
        server's disk when this returns. Errors as :meth:`imported`, and SOURCE_UNAVAILABLE on a
        standby.
        """
        return cls._open(source, None, tables, lock_timeout_seconds)

    @classmethod
    def _open(
        cls,
        source: SourceSettings,
        snapshot_id: str | None,
        tables: Sequence[Table],
        lock_timeout_seconds: float,
    ) -> Self:
        conn = connect(source, application_name="cdc_sync snapshot")
        with closed_on_error(conn):
            set_lock_timeout(conn, lock_timeout_seconds)
            lock_window(conn, source)
            if snapshot_id is None:
                # LOCK takes no snapshot, so the snapshot of the next statement is newer than the
                # lock.
                run_command(conn, _BEGIN, "beginning a transaction")
            else:
                import_snapshot(conn, snapshot_id)
            lock_and_verify(conn, tables)
            with connect(source, application_name="cdc_sync snapshot") as other:
                _verify_definitions(other, tables)
                snapshot = _current(conn)
                if snapshot_id is None:
                    _check_primary(conn)
                    write_out(other)
            result = run_command(conn, "SELECT pg_export_snapshot()", "exporting the snapshot")
            exported = result.get_value(0, 0)
            assert exported is not None
            return cls(conn, exported.decode(), snapshot)

    def has_slot(self, name: str, walsender: int | None) -> bool:
        """Whether the server of the snapshot has that slot, in use by that process (R73). Asked
        over the snapshot's own connection: another might lead to another server."""
        slot = read_slot(self._conn, name)
        return slot is not None and slot.active_pid == walsender

    def check(self) -> None:
        """Make sure that the snapshot is still there. Raises :class:`SourceError` otherwise."""
        run_command(self._conn, "SELECT 1", "looking after the snapshot")

    def close(self) -> None:
        """Let go of snapshot and locks; may be called twice."""
        self._conn.close()


#: What the lock protects, as the catalog has it now: its functions do not go by the transaction's
#: snapshot.
_NOW: Final = """
SELECT to_regclass(%s)::oid::int8,
       ARRAY(WITH RECURSIVE tree (oid) AS (
               SELECT %s::oid UNION
               SELECT i.inhrelid FROM pg_inherits i JOIN tree
                   ON i.inhparent = tree.oid AND NOT i.inhdetachpending)
             SELECT c.oid::int8 FROM tree JOIN pg_class c USING (oid) WHERE c.relkind <> 'p')
"""


def lock_and_verify(conn: PgConnection, tables: Sequence[Table]) -> None:
    """Lock tables, with their partitions, in ACCESS SHARE mode and compare them with what was read.

    The connection must be in a transaction. Raises :class:`SourceError` SOURCE_UNAVAILABLE when a
    table stays locked, :class:`TableRewrittenError` when one is another, has other leaf partitions,
    or other storage (``relfilenode``) than when it was read.
    """
    if not tables:
        return
    _lock(conn, tables)
    try:
        for table in tables:
            _verify(conn, table)
    except psycopg.Error as exc:
        raise translate(exc, "comparing tables with what was planned") from exc


def _lock(conn: PgConnection, tables: Sequence[Table]) -> None:
    names = [table.only + qualified(table.schema, table.name) for table in tables]
    if _try_lock(conn, names):
        return
    for name in names:
        if not _try_lock(conn, [name]):
            # With SELECT on some columns LOCK is not allowed. A query takes the same lock and keeps
            # it, on partitions too; its snapshot may be older than the lock, which the comparison
            # that follows allows for.
            run_command(conn, f"SELECT FROM {name} LIMIT 0", _LOCKING)


def _try_lock(conn: PgConnection, names: Sequence[str]) -> bool:
    """Lock the tables, or none if the role may not."""
    statement = f"LOCK TABLE {', '.join(names)} IN ACCESS SHARE MODE"
    try:
        run_command(conn, f"SAVEPOINT locking; {statement}; RELEASE locking", _LOCKING)
    except SourceError as error:
        if error.kind is not ErrorKind.SOURCE_PERMISSION:
            raise
        run_command(conn, "ROLLBACK TO locking; RELEASE locking", _LOCKING)
        return False
    return True


def _verify(conn: PgConnection, table: Table) -> None:
    name = qualified(table.schema, table.name)
    row = conn.execute(_NOW, (name, table.oid)).fetchone()
    assert row is not None
    oid, leaves = row
    if not table.partitioned and not table.children:
        # Tables that inherit from it are left out, or there are none.
        leaves = [table.oid]
    if oid != table.oid:
        raise _rewritten(table, "it was dropped or renamed, and another has its name")
    if set(leaves) != {leaf.oid for leaf in table.leaves}:
        raise _rewritten(table, "partitions or children were attached or detached")
    filenodes = conn.execute(
        "SELECT l, pg_relation_filenode(l::oid)::int8 FROM unnest(%s::int8[]) l", (leaves,)
    ).fetchall()
    now: dict[int, int | None] = dict(filenodes)
    for leaf in table.leaves:
        if now[leaf.oid] != leaf.relfilenode:
            raise _rewritten(table, f"{leaf.schema}.{leaf.name} was truncated or rewritten")


def _verify_definitions(other: PgConnection, tables: Sequence[Table]) -> None:
    """Compare locked tables with their definitions when they were read.

    Over a connection of its own: a snapshot that is older than the lock shows the catalog as it
    was, while a query would meet the columns as they are.
    """
    now = definitions(other, [table.oid for table in tables])
    for table in tables:
        if redefined(table.definition, now.get(table.oid, "")):
            raise _rewritten(table, "its columns were altered")


def _check_primary(conn: PgConnection) -> None:
    """A standby shows the past, and what it shows has no place in the stream (R73)."""
    result = run_command(conn, "SELECT pg_is_in_recovery()", "asking whether this is the primary")
    if result.get_value(0, 0) == b"t":
        raise SourceError(
            ErrorKind.SOURCE_UNAVAILABLE,
            "the connection that was to take a snapshot has reached a standby",
            "Let every connection of source.url lead to the primary; with several hosts add "
            "target_session_attrs=primary.",
        )


def _rewritten(table: Table, reason: str) -> TableRewrittenError:
    return TableRewrittenError(
        ErrorKind.TABLE_UNUSABLE,
        f"table {table.qualified_name} changed while its copy was being prepared: {reason}",
        "Start cdc-sync again; it reads the table anew and copies it.",
    )


def select_list(plan: TablePlan) -> tuple[str, tuple[bool, ...]]:
    """Return the plan's columns as a select list, and which of them are selected as text.

    Text is taken where a type, or one below it, has no binary output function.
    """
    text = tuple(not sends_binary(column.type) for column in plan.columns)
    listed = ", ".join(
        quote_ident(column.name) + ("::text" if as_text else "")
        for column, as_text in zip(plan.columns, text, strict=True)
    )
    return listed, text


def copy_query(
    plan: TablePlan,
    leaf: Leaf,
    start_block: int,
    end_block: int | None,
    row_filter: str | None = None,
) -> tuple[str, tuple[bool, ...]]:
    """Return the query that reads blocks of a leaf in plan order, and which columns come as text.

    From ``start_block`` up to but not including ``end_block`` (None: to the end, also of what was
    added since). ``row_filter`` is the publication's. Exact under one snapshot only: an updated row
    moves.
    """
    if start_block < 0 or (end_block is not None and end_block < start_block):
        raise ValueError(f"not a range of blocks: {start_block} to {end_block}")
    listed, text = select_list(plan)
    conditions = [f"ctid >= {quote_literal(f'({start_block},0)')}::tid"]
    if end_block is not None:
        conditions.append(f"ctid < {quote_literal(f'({end_block},0)')}::tid")
    if row_filter is not None:
        conditions.append(f"({row_filter})")
    source = f"ONLY {qualified(leaf.schema, leaf.name)}"
    return f"SELECT {listed} FROM {source} WHERE {' AND '.join(conditions)}", text


def key_query(
    plan: TablePlan, leaf: Leaf, row_filter: str | None = None
) -> tuple[str, tuple[bool, ...]]:
    """Return the query that reads the key columns of a whole leaf, in key order, and which of them
    come as text.
    """
    listed, text = select_list(key_plan(plan))
    condition = "" if row_filter is None else f" WHERE ({row_filter})"
    return f"SELECT {listed} FROM ONLY {qualified(leaf.schema, leaf.name)}{condition}", text
