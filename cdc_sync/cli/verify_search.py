"""``cdc-sync verify search``."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.baseline import progress_line
from cdc_sync.cli.options import takes_settings
from cdc_sync.errors import ExitCode

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings
    from cdc_sync.verify.quality import Verdict
    from cdc_sync.verify.search_report import SearchReport


class FailOn(enum.StrEnum):
    """From which verdict on the exit code is 3."""

    INVESTIGATE = "investigate"
    FAIL = "fail"
    NEVER = "never"


class Against(enum.StrEnum):
    """What Qdrant's results are compared with."""

    EXACT = "exact"
    INDEX = "index"


@takes_settings
def verify_search(
    loaded: LoadedSettings,
    baseline: Annotated[
        Path, typer.Option(metavar="FILE", help="What cdc-sync baseline has written.")
    ] = Path("baseline.json"),
    against: Annotated[
        Against,
        typer.Option(help="Compare with pgvector's exact results, or with those of its index."),
    ] = Against.EXACT,
    fail_on: Annotated[
        FailOn, typer.Option(help="The verdict from which on the exit code is 3.")
    ] = FailOn.INVESTIGATE,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as a page with plots.")
    ] = None,
) -> int:
    """Ask a baseline's queries in Qdrant, and judge the results.

    By the tiers and thresholds of Qdrant's guide: spot check, recall, labelled relevance. Reads
    only. Exit code 0 pass, 3 otherwise.
    """
    from cdc_sync.ops.redaction import redact
    from cdc_sync.verify import search, search_report
    from cdc_sync.verify.baseline_file import read_baseline

    taken = read_baseline(baseline)
    options = search.SearchOptions(against=against.value)
    with progress_line() as progress:
        report = search.verify_search(loaded.settings, taken, options, progress)
    if html is not None:
        _write_page(report, html)
    if as_json:
        typer.echo(json.dumps(search_report.as_json(report), indent=2, ensure_ascii=False))
    else:
        typer.echo(redact(search_report.as_text(report)))
    return _exit_code(report.verdict, fail_on)


def _exit_code(verdict: Verdict, fail_on: FailOn) -> int:
    severities = {FailOn.INVESTIGATE: 1, FailOn.FAIL: 2, FailOn.NEVER: 3}
    return ExitCode.DIFFERENCES if verdict.severity >= severities[fail_on] else ExitCode.OK


def _write_page(report: SearchReport, path: Path) -> None:
    from cdc_sync.errors import ConfigError
    from cdc_sync.ops.redaction import redact
    from cdc_sync.verify.search_html import as_html

    try:
        path.write_text(redact(as_html(report)), "utf-8")
    except OSError as error:
        raise ConfigError(
            f"--html {path} cannot be written: {error.strerror}.",
            "Name a file that can be written.",
        ) from error
