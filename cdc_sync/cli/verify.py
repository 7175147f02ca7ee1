"""``cdc-sync verify``: is every row its point, and every point a row's?"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.options import takes_settings

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings
    from cdc_sync.verify.data import Asked

_WAIT_SECONDS = 300.0
_PATIENCE_SECONDS = 60.0


@takes_settings
def verify_data(
    loaded: LoadedSettings,
    table: Annotated[
        list[str] | None,
        typer.Option(metavar="TABLE", help="Only this table; repeatable. Default: all."),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only so many random rows and points."),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help="Only rows for which this is true, in your own rights."),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(metavar="ROWS", min=1.0, help="Rows a second at the most.")
    ] = None,
    examples: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Examples of each kind of difference; all count."),
    ] = 5,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Have what differs read again, and verify that again afterwards."
        ),
    ] = False,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.0, help="How long --repair waits.")
    ] = _WAIT_SECONDS,
    patience: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.0,
            help="How long a running pipeline may stand still while its changes are waited for.",
        ),
    ] = _PATIENCE_SECONDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> int:
    """Compare every row with its point, and look for points without a row.

    Beside a running pipeline or a stopped one; without --repair it changes nothing on either side.
    cdc-sync verify search compares search results instead. Exit code 0 if all is equal, 3 if not.
    """
    if sample is not None and where is not None:
        raise typer.BadParameter("--sample and --where exclude each other.")
    if where is not None and not where.strip():
        raise typer.BadParameter("--where is empty.")
    from cdc_sync.verify.data import Asked
    from cdc_sync.verify.table import How

    how = How(sample=sample, where=where, rate=rate, examples=examples)
    asked = Asked(how, tuple(table or ()), patience)
    return _verify(loaded, asked, timeout if repair else None, as_json)


def _verify(
    loaded: LoadedSettings, asked: Asked, repair_seconds: float | None, as_json: bool
) -> int:
    """Verify, repair if so many seconds may be waited for it, and print the report."""
    from cdc_sync.cli.verify_text import report_text
    from cdc_sync.verify.data import verify
    from cdc_sync.verify.repair import repair
    from cdc_sync.verify.screen import open_screen

    with open_screen(sys.stderr) as screen:
        verified = verify(loaded.settings, asked, screen.show)
    report = verified.report
    if repair_seconds is not None and not report.equal:
        if not as_json:
            typer.echo(report_text(report) + "\n")
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            typer.echo(line, err=as_json)

        repair(loaded.settings, verified, repair_seconds, say)
        with open_screen(sys.stderr) as screen:
            report = verify(loaded.settings, asked, screen.show, before=verified).report
        report.repaired = said
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        typer.echo(report_text(report))
    return report.exit_code
