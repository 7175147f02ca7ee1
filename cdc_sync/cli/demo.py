"""``cdc-sync demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    keep: Annotated[
        bool | None,
        typer.Option("--keep", help="Go on after the verdict, until Ctrl-C.", show_default=False),
    ] = None,
    rows: Annotated[int | None, typer.Option(metavar="N", help="Rows to begin with.")] = None,
    directory: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the data here. Default: a temporary directory."),
    ] = None,
    plain: Annotated[
        bool | None, typer.Option("--plain", help="Print lines only.", show_default=False)
    ] = None,
) -> int:
    """Show it at work, with Postgres and Qdrant embedded."""
    from cdc_sync.demo.run import run_demo

    return run_demo(keep=bool(keep), rows=rows, directory=directory, plain=bool(plain))
