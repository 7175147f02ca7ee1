"""What a check of the setup finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cdc_sync.errors import CdcSyncError, ErrorKind

Severity = Literal["ok", "advice", "warning", "error"]
#: Whose matter a finding is; "" where it is neither's.
Side = Literal["", "postgres", "qdrant"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    ``severity``: an error keeps the pipeline from running, a warning will cost something sooner or
    later, advice is worth knowing. ``subject`` is what was looked at ("server", "public.items",
    "slot"), ``message`` how it is, ``remedy`` what to do (exact SQL where SQL is the remedy, may
    span lines; empty when there is nothing to do). ``kind`` is given for errors: it decides the
    exit code. ``id`` is a stable name of the kind of finding, "" if it has none; those of ``check``
    are in :mod:`cdc_sync.sync.known_findings`. No text holds row values or secrets.
    """

    severity: Severity
    subject: str
    message: str
    remedy: str = ""
    kind: ErrorKind | None = None
    id: str = ""
    side: Side = ""

    @classmethod
    def from_error(cls, subject: str, error: CdcSyncError) -> Finding:
        """The finding that an error is."""
        return cls("error", subject, error.message, error.remedy, error.kind)
