"""Messages of pgoutput, protocol 1 to 4.

One class a message; field order is wire order. Classes on the hot path are not frozen (a frozen
dataclass costs four times as much to make); nobody changes a message after decoding.

Source: PostgreSQL documentation, "Logical Replication Message Formats";
src/backend/replication/logical/proto.c. Times are microseconds since 2000-01-01 UTC. LSNs are plain
``int`` here; :class:`cdc_sync.pgoutput.lsn.Lsn` prints them. ``xid`` on messages inside a stream
block is the (sub)transaction they belong to, else ``None``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from cdc_sync.rows import Row

ReplicaIdentity: TypeAlias = Literal["d", "n", "f", "i"]


@dataclass(slots=True)
class Begin:
    """``B``: the transaction that follows committed at ``final_lsn`` (start of its commit
    record)."""

    final_lsn: int
    commit_time: int
    xid: int


@dataclass(slots=True)
class Commit:
    """``C``: end of a transaction; ``end_lsn`` is the byte after the commit record."""

    flags: int
    commit_lsn: int
    end_lsn: int
    commit_time: int


@dataclass(slots=True)
class Origin:
    """``O``: the transaction came from another replication origin."""

    lsn: int
    name: str


@dataclass(slots=True, frozen=True)
class RelationColumn:
    """A column of a :class:`Relation`; ``key`` says whether it is part of the replica identity."""

    name: str
    type_oid: int
    type_modifier: int
    key: bool


@dataclass(slots=True, frozen=True)
class Relation:
    """``R``: how tuples of this relation look from here on. ``namespace`` is "" for pg_catalog."""

    oid: int
    namespace: str
    name: str
    replica_identity: ReplicaIdentity
    columns: tuple[RelationColumn, ...]
    xid: int | None = None


@dataclass(slots=True, frozen=True)
class Type:
    """``Y``: name of a type with an OID of 10000 or more; for a domain the name of its base
    type."""

    oid: int
    namespace: str
    name: str
    xid: int | None = None


@dataclass(slots=True)
class Insert:
    """``I``: with a row filter, ``new`` may hold UNCHANGED values."""

    relation: int
    new: Row
    xid: int | None = None


@dataclass(slots=True)
class Update:
    """``U``: ``old`` is the old key (``old_is_key``, non-key columns ``None`` without meaning) or
    the whole old row."""

    relation: int
    old: Row | None
    old_is_key: bool
    new: Row
    xid: int | None = None


@dataclass(slots=True)
class Delete:
    """``D``: ``old`` as in :class:`Update`."""

    relation: int
    old: Row
    old_is_key: bool
    xid: int | None = None


@dataclass(slots=True)
class Truncate:
    """``T``: all published relations of one TRUNCATE command."""

    cascade: bool
    restart_identity: bool
    relations: tuple[int, ...]
    xid: int | None = None


@dataclass(slots=True)
class LogicalMessage:
    """``M``: written by ``pg_logical_emit_message``."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes
    xid: int | None = None


@dataclass(slots=True)
class StreamStart:
    """``S``: a block of changes of an open transaction follows."""

    xid: int
    first_segment: bool


@dataclass(slots=True)
class StreamStop:
    """``E``: end of the block."""


@dataclass(slots=True)
class StreamCommit:
    """``c``: the streamed transaction committed."""

    xid: int
    flags: int
    commit_lsn: int
    end_lsn: int
    commit_time: int


@dataclass(slots=True)
class StreamAbort:
    """``A``: ``subxid`` rolled back (the whole transaction if equal to ``xid``); LSN and time with
    parallel streaming."""

    xid: int
    subxid: int
    abort_lsn: int | None
    abort_time: int | None


@dataclass(slots=True)
class BeginPrepare:
    """``b``: changes of a prepared transaction follow."""

    prepare_lsn: int
    end_lsn: int
    prepare_time: int
    xid: int
    gid: str


@dataclass(slots=True)
class Prepare:
    """``P``, or ``p`` (``streamed``): the transaction is prepared."""

    flags: int
    prepare_lsn: int
    end_lsn: int
    prepare_time: int
    xid: int
    gid: str
    streamed: bool = False


@dataclass(slots=True)
class CommitPrepared:
    """``K``: COMMIT PREPARED."""

    flags: int
    commit_lsn: int
    end_lsn: int
    commit_time: int
    xid: int
    gid: str


@dataclass(slots=True)
class RollbackPrepared:
    """``r``: ROLLBACK PREPARED."""

    flags: int
    prepare_end_lsn: int
    rollback_end_lsn: int
    prepare_time: int
    rollback_time: int
    xid: int
    gid: str


Message: TypeAlias = (
    Begin
    | Commit
    | Origin
    | Relation
    | Type
    | Insert
    | Update
    | Delete
    | Truncate
    | LogicalMessage
    | StreamStart
    | StreamStop
    | StreamCommit
    | StreamAbort
    | BeginPrepare
    | Prepare
    | CommitPrepared
    | RollbackPrepared
)
