"""``cdc-sync demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Go on after the verdict, until Ctrl-C."),
    ] = False,
    rows: Annotated[int | None, typer.Option(metavar="N", help="Rows to begin with.")] = None,
    directory: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the data here. Default: a temporary directory."),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Print lines only.")] = False,
) -> int:
    """Show it at work, with Postgres and Qdrant embedded."""
    from cdc_sync.demo.run import run_demo

    return run_demo(keep=keep, rows=rows, directory=directory, plain=plain)
