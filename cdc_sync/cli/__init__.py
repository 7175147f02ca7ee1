"""The command line, ``cdc-sync``. One module a command; clients are imported by the commands."""

from __future__ import annotations

from collections.abc import Sequence

from cdc_sync.cli.process_list import hide_secrets

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. ``arguments`` default to ``sys.argv[1:]``."""
    if arguments is None:
        hide_secrets()
    # Not before: importing takes longer than anybody should have to look at a password.
    from cdc_sync.cli.entry import main as run

    return run(arguments)
