"""Every finding that ``check`` can make, by its stable id; ``docs/check.md`` explains them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from cdc_sync.errors import CdcSyncError, ErrorKind
from cdc_sync.sync.findings import Finding, Severity, Side

#: What a finding is about: a side as a whole, one table, or one collection. Its subject is then the
#: table's name, or ``collection`` and the collection's.
Scope = Literal["side", "table", "collection"]


@dataclass(frozen=True, slots=True)
class KnownFinding:
    """A kind of finding: whose matter it is, what it is about, and how severe it can be."""

    side: Side
    scope: Scope
    severities: tuple[Severity, ...]


def _postgres(*severities: Severity) -> KnownFinding:
    return KnownFinding("postgres", "side", severities)


def _table(*severities: Severity) -> KnownFinding:
    return KnownFinding("postgres", "table", severities)


def _qdrant(*severities: Severity) -> KnownFinding:
    return KnownFinding("qdrant", "side", severities)


def _collection(*severities: Severity) -> KnownFinding:
    return KnownFinding("qdrant", "collection", severities)


KNOWN: Final[Mapping[str, KnownFinding]] = {
    "check": KnownFinding("", "side", ("error",)),
    "postgres-transport": _postgres("warning"),
    "postgres-connection": _postgres("ok", "error"),
    "postgres-version": _postgres("ok", "advice", "warning", "error"),
    "postgres-standby": _postgres("error"),
    "wal-level": _postgres("ok", "error"),
    "output-plugin": _postgres("error"),
    "replication-role": _postgres("ok", "error"),
    "replication-connection": _postgres("ok", "error"),
    "pooler": _postgres("warning", "error"),
    "session-settings": _postgres("warning"),
    "role-timeouts": _postgres("advice"),
    "replication-room": _postgres("ok", "error"),
    "connection-room": _postgres("warning"),
    "publication": _postgres("ok", "warning", "error"),
    "slot": _postgres("ok", "warning", "error"),
    "rebuild-slot": _postgres("warning"),
    "slot-wal-limit": _postgres("ok", "warning"),
    "slot-idle-timeout": _postgres("warning"),
    "wal-sender-timeout": _postgres("advice", "warning"),
    "open-transactions": _postgres("advice", "warning"),
    "failover": _postgres("advice", "warning"),
    "standby-snapshot": _postgres("advice"),
    "clock": _postgres("ok", "advice", "warning"),
    "postgres-facts": _postgres("advice"),
    "tables": _postgres("error"),
    "table": _table("ok", "warning"),
    "partitions": _table("error"),
    "replica-identity": _table("advice", "error"),
    "table-privileges": _table("error"),
    "toast": _table("ok", "advice"),
    "vector-storage": _table("advice"),
    "rebuilt-table": _table("warning"),
    "qdrant-transport": _qdrant("warning"),
    "qdrant-connection": _qdrant("ok", "error"),
    "qdrant-version": _qdrant("advice", "error"),
    "edge-disk": _qdrant("ok", "warning"),
    "collection": _collection("ok", "error"),
    "collection-settings": _collection("warning"),
    "collection-status": _collection("advice", "warning"),
    "collection-index": _collection("advice", "warning"),
    "collection-memory": _collection("advice"),
    "collection-replicas": _collection("advice", "warning"),
    "strict-mode": _collection("advice", "warning"),
    "collection-facts": _collection("advice"),
}


def finding(
    id_: str,
    severity: Severity,
    subject: str,
    message: str,
    remedy: str = "",
    kind: ErrorKind | None = None,
) -> Finding:
    """A finding of ``check``. The id and its severity must be known."""
    known = KNOWN[id_]
    assert severity in known.severities, (id_, severity)
    return Finding(severity, subject, message, remedy, kind, id_, known.side)


def failed(id_: str, subject: str, error: CdcSyncError) -> Finding:
    """The finding that an error is."""
    return finding(id_, "error", subject, error.message, error.remedy, error.kind)
