"""What a check of the setup finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cdc_sync.errors import CdcSyncError, ErrorKind

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    ``subject`` is what was looked at ("server", "public.items", "slot"), ``message`` how it is,
    ``remedy`` what to do (exact SQL where SQL is the remedy, may span lines; empty when there is
    nothing to do). ``kind`` is given for errors: it decides the exit code. No text holds row values
    or secrets.
    """

    severity: Severity
    subject: str
    message: str
    remedy: str = ""
    kind: ErrorKind | None = None

    @classmethod
    def from_error(cls, subject: str, error: CdcSyncError) -> Finding:
        """The finding that an error is."""
        return cls("error", subject, error.message, error.remedy, error.kind)
