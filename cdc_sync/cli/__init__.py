"""The command line, ``cdc-sync``. One module a command; clients are imported by the commands."""

from __future__ import annotations

from cdc_sync.cli.entry import main

__all__ = ["main"]
