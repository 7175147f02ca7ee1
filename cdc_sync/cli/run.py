"""``cdc-sync run``."""

from __future__ import annotations

import contextlib
import signal
import sys
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.options import takes_settings

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings


Restart = Annotated[
    bool,
    typer.Option(
        "--migration.restart",
        help="Forget the pipeline's records, clear its collections and copy again.",
    ),
]


@takes_settings
def run(loaded: LoadedSettings, restart: Restart = False) -> int:
    """Copy the tables, then follow every change, until stopped.

    Takes a TOML file, or flags for one table; flags override the file.
    """
    with ended_by_sigterm():
        from cdc_sync.sync.daemon import run_pipeline

        if not loaded.settings.verify.continuous:
            return run_pipeline(loaded.settings, restart=restart)
        from cdc_sync.verify.continuous import verify_continuously

        return run_pipeline(loaded.settings, restart=restart, beside=verify_continuously)


@contextlib.contextmanager
def ended_by_sigterm(exit_code: int = 0) -> Iterator[None]:
    """Let SIGTERM end the process while imports are under way.

    As process 1 of a container there is no default action. The pipeline installs its own handler.
    """

    def leave(_number: int, _frame: types.FrameType | None) -> None:
        sys.exit(exit_code)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
