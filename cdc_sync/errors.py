"""The error tree, and the one table that says what an error means for the daemon and its operator.

    CdcSyncError
    ├── ConfigError            settings that cannot work
    ├── SourceError            Postgres: connection, privileges, tables, slot, publication
    │   └── ProtocolError      a frame that is not what the protocol says
    ├── MappingError           a row or a column that cannot become a point
    ├── SinkError              Qdrant: connection, refusals, collections
    │   └── DimensionMismatchError   a collection of other dimensions
    └── StateError             our own records beside the data

Every error carries a :class:`ErrorKind`. :func:`policy` maps the kind to what is done about it;
nothing else in the program decides about retries or exit codes. Messages are sentences without row
values or secrets, and end up in logs as they are.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final


class Retry(enum.Enum):
    """What the daemon does after an error."""

    TIMED = "timed"  #: by itself, with backoff, for as long as it takes
    MANUAL = "manual"  #: stops; a restart may succeed once somebody has acted
    NEVER = "never"  #: stops; the same input gives the same error


class ExitCode(enum.IntEnum):
    """Exit codes of every command (sysexits where one fits)."""

    OK = 0
    BUG = 1
    USAGE = 2
    DIFFERENCES = 3
    DATA = 65
    UNAVAILABLE = 69
    TEMPORARY = 75
    PERMISSION = 77
    CONFIG = 78


class ErrorKind(enum.Enum):
    """Every way in which things go wrong; the values are stable names for metrics and logs."""

    CONFIG = "config"
    SOURCE_UNAVAILABLE = "source_unavailable"
    SOURCE_AUTH = "source_auth"
    SOURCE_PERMISSION = "source_permission"
    SOURCE_SETTING = "source_setting"
    SOURCE_CHANGED = "source_changed"
    SOURCE_REWOUND = "source_rewound"
    TABLE_LOCKED = "table_locked"
    TABLE_UNUSABLE = "table_unusable"
    PUBLICATION_UNUSABLE = "publication_unusable"
    SLOT_ACTIVE = "slot_active"
    SLOT_BUSY = "slot_busy"
    SLOT_LOST = "slot_lost"
    PROTOCOL = "protocol"
    MAPPING = "mapping"
    SINK_UNAVAILABLE = "sink_unavailable"
    SINK_UNKNOWN = "sink_unknown"
    SINK_RATE_LIMITED = "sink_rate_limited"
    SINK_FULL = "sink_full"
    SINK_REFUSED = "sink_refused"
    SINK_AUTH = "sink_auth"
    COLLECTION_MISMATCH = "collection_mismatch"
    COLLECTION_MISSING = "collection_missing"
    DEAD_LETTER_LIMIT = "dead_letter_limit"
    STATE = "state"


@dataclass(frozen=True, slots=True)
class Policy:
    """What an error kind means: how it is retried, the exit code if it ends the program, the
    operator's next step."""

    retry: Retry
    exit_code: ExitCode
    advice: str


_POLICIES: Final[dict[ErrorKind, Policy]] = {
    ErrorKind.CONFIG: Policy(Retry.NEVER, ExitCode.CONFIG, "Correct the configuration."),
    ErrorKind.SOURCE_UNAVAILABLE: Policy(
        Retry.TIMED, ExitCode.UNAVAILABLE, "See whether Postgres is up and reachable from here."
    ),
    ErrorKind.SOURCE_AUTH: Policy(
        Retry.MANUAL,
        ExitCode.PERMISSION,
        "Correct user and password, and pg_hba.conf on the server.",
    ),
    ErrorKind.SOURCE_PERMISSION: Policy(
        Retry.MANUAL, ExitCode.PERMISSION, "Grant what the message names; it gives the SQL."
    ),
    ErrorKind.SOURCE_SETTING: Policy(
        Retry.MANUAL, ExitCode.CONFIG, "Change the server setting that the message names."
    ),
    ErrorKind.SOURCE_CHANGED: Policy(
        Retry.MANUAL,
        ExitCode.CONFIG,
        "This is not the database the pipeline was started on; point it back, or copy anew with "
        "--migration.restart.",
    ),
    ErrorKind.SOURCE_REWOUND: Policy(
        Retry.MANUAL,
        ExitCode.DATA,
        "Changes were undone behind our back: let it copy anew by itself (source.on_slot_lost), or "
        "copy anew with --migration.restart.",
    ),
    ErrorKind.TABLE_LOCKED: Policy(
        Retry.TIMED,
        ExitCode.TEMPORARY,
        "Somebody has locked the table, or waits to; it goes on by itself once that is over.",
    ),
    ErrorKind.TABLE_UNUSABLE: Policy(
        Retry.MANUAL, ExitCode.CONFIG, "Change the table, or its entry in the configuration."
    ),
    ErrorKind.PUBLICATION_UNUSABLE: Policy(
        Retry.MANUAL, ExitCode.CONFIG, "Create or alter the publication with the SQL given."
    ),
    ErrorKind.SLOT_ACTIVE: Policy(
        Retry.TIMED,
        ExitCode.TEMPORARY,
        "Another process uses the slot; this one waits for its turn.",
    ),
    ErrorKind.SLOT_BUSY: Policy(
        Retry.TIMED, ExitCode.TEMPORARY, "Slot creation waits for open transactions; end them."
    ),
    ErrorKind.SLOT_LOST: Policy(
        Retry.MANUAL,
        ExitCode.DATA,
        "Changes since the last confirmed position are gone; have every table read again by "
        "source.on_slot_lost = recreate, or copy anew with --migration.restart.",
    ),
    ErrorKind.PROTOCOL: Policy(
        Retry.NEVER, ExitCode.BUG, "Report this with the message and the server version."
    ),
    ErrorKind.MAPPING: Policy(
        Retry.MANUAL, ExitCode.DATA, "Correct the row or the mapping of its column."
    ),
    ErrorKind.SINK_UNAVAILABLE: Policy(
        Retry.TIMED,
        ExitCode.UNAVAILABLE,
        "See whether Qdrant is up and its gRPC port reachable from here.",
    ),
    ErrorKind.SINK_UNKNOWN: Policy(
        Retry.TIMED,
        ExitCode.UNAVAILABLE,
        "Qdrant did not say whether a write took place; it is sent again.",
    ),
    ErrorKind.SINK_RATE_LIMITED: Policy(
        Retry.TIMED, ExitCode.UNAVAILABLE, "Qdrant limits the rate; raise the limit or wait."
    ),
    ErrorKind.SINK_FULL: Policy(
        Retry.TIMED,
        ExitCode.UNAVAILABLE,
        "Raise the limit that the message names (strict mode of the collection, or the node's "
        "quota), or make room; it goes on by itself then.",
    ),
    ErrorKind.SINK_REFUSED: Policy(
        Retry.NEVER, ExitCode.DATA, "Qdrant refuses the point; correct the row or the collection."
    ),
    ErrorKind.SINK_AUTH: Policy(
        Retry.MANUAL,
        ExitCode.PERMISSION,
        "Correct the API key; it needs write access to the collections.",
    ),
    ErrorKind.COLLECTION_MISMATCH: Policy(
        Retry.MANUAL,
        ExitCode.CONFIG,
        "Choose another collection, or drop this one; it is never changed silently.",
    ),
    ErrorKind.COLLECTION_MISSING: Policy(
        Retry.MANUAL,
        ExitCode.DATA,
        "The collection was removed; a running pipeline makes it again and copies the table.",
    ),
    ErrorKind.DEAD_LETTER_LIMIT: Policy(
        Retry.MANUAL,
        ExitCode.DATA,
        "Too many rows could not be written; see the reasons, then restart.",
    ),
    ErrorKind.STATE: Policy(
        Retry.MANUAL,
        ExitCode.DATA,
        "The pipeline's own records are damaged or from a newer version.",
    ),
}


def policy(kind: ErrorKind) -> Policy:
    """Return what is done about an error of this kind."""
    return _POLICIES[kind]


class CdcSyncError(Exception):
    """Something the operator can act on.

    ``message`` says what is wrong and where, ``remedy`` what to do next (exact SQL where SQL is the
    remedy; it may span lines). Without a remedy of its own an error shows the advice of its kind.
    """

    def __init__(self, kind: ErrorKind, message: str, remedy: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.remedy = remedy if remedy is not None else policy(kind).advice

    def __reduce__(self) -> tuple[type[CdcSyncError], tuple[ErrorKind, str, str]]:
        return (type(self), (self.kind, self.message, self.remedy))

    @property
    def policy(self) -> Policy:
        """What is done about this error."""
        return policy(self.kind)


class ConfigError(CdcSyncError):
    """Settings that cannot work."""

    def __init__(
        self, message: str, remedy: str | None = None, kind: ErrorKind = ErrorKind.CONFIG
    ) -> None:
        super().__init__(kind, message, remedy)

    def __reduce__(self) -> tuple[type[CdcSyncError], tuple[str, str, ErrorKind]]:  # type: ignore[override]
        return (type(self), (self.message, self.remedy, self.kind))


class SourceError(CdcSyncError):
    """Postgres is away, refuses, or is not set up for the pipeline."""


class ProtocolError(SourceError):
    """A replication frame or COPY row that is not what the protocol says."""

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(ErrorKind.PROTOCOL, message, remedy)

    def __reduce__(self) -> tuple[type[CdcSyncError], tuple[str, str]]:  # type: ignore[override]
        return (type(self), (self.message, self.remedy))


class MappingError(CdcSyncError):
    """A row or a column that cannot become (part of) a point. The message never holds the value."""

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(ErrorKind.MAPPING, message, remedy)

    def __reduce__(self) -> tuple[type[CdcSyncError], tuple[str, str]]:  # type: ignore[override]
        return (type(self), (self.message, self.remedy))


class SinkError(CdcSyncError):
    """Qdrant is away, refuses, or holds a collection that does not fit.

    ``retry_after_seconds`` is what the server asked for, when it did. ``completed`` are ids of
    points that were written for certain all the same, and need not be written again.
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        remedy: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(kind, message, remedy)
        self.retry_after_seconds = retry_after_seconds
        self.completed: frozenset[object] = frozenset()

    def __reduce__(self) -> tuple[type[CdcSyncError], tuple[ErrorKind, str, str, float | None]]:  # type: ignore[override]
        return (type(self), (self.kind, self.message, self.remedy, self.retry_after_seconds))


class DimensionMismatchError(SinkError):
    """A collection whose vectors differ from what is wanted in their dimensions only."""


class StateError(CdcSyncError):
    """The pipeline's own records cannot be read or written."""

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(ErrorKind.STATE, message, remedy)

    def __reduce__(self) -> tuple[type[CdcSyncError], tuple[str, str]]:  # type: ignore[override]
        return (type(self), (self.message, self.remedy))
