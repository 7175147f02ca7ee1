"""``cdc-sync check``."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.options import takes_settings
from cdc_sync.errors import CdcSyncError, ExitCode, policy

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings
    from cdc_sync.sync.findings import Finding

_COLOURS = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "error": typer.colors.RED}
_SEVERITY_WIDTH = len("warning")


@takes_settings
def check(
    loaded: LoadedSettings,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    sql: Annotated[
        bool,
        typer.Option("--sql", help="Print the SQL of a role with the least rights, and end."),
    ] = False,
    sql_role: Annotated[
        str | None,
        typer.Option(
            "--sql-role",
            metavar="NAME",
            help="The role for --sql. Default: the connected one, or cdc_sync for a superuser.",
        ),
    ] = None,
) -> int:
    """Say what stands in the way of a run.

    Looks at Postgres, Qdrant and the tables; changes nothing. Exit code 0 if there is no error.
    """
    if sql or sql_role is not None:
        from cdc_sync.sync.check import role_sql

        typer.echo(role_sql(loaded.settings, sql_role), nl=False)
        return ExitCode.OK
    from cdc_sync.sync.check import run_checks
    from cdc_sync.sync.findings import Finding

    try:
        findings = run_checks(loaded.settings)
    except CdcSyncError as error:
        # A check that cannot go on is a finding too: with --json there is always JSON.
        findings = [Finding.from_error("check", error)]
    typer.echo(_as_json(findings) if as_json else _as_text(findings))
    return exit_code(findings)


def exit_code(findings: Sequence[Finding]) -> int:
    """0 without errors, else the exit code of the first error's kind."""
    for finding in findings:
        if finding.severity == "error":
            return policy(finding.kind).exit_code if finding.kind else ExitCode.CONFIG
    return ExitCode.OK


def _as_json(findings: Sequence[Finding]) -> str:
    from cdc_sync.ops.redaction import redact

    entries = [
        {
            "severity": finding.severity,
            "subject": finding.subject,
            "message": redact(finding.message),
            "remedy": redact(finding.remedy),
            "kind": finding.kind.value if finding.kind else None,
        }
        for finding in findings
    ]
    ok = exit_code(findings) == ExitCode.OK
    return json.dumps({"ok": ok, "findings": entries}, indent=2, ensure_ascii=False)


def _as_text(findings: Sequence[Finding]) -> str:
    from cdc_sync.ops.redaction import redact

    width = max((len(finding.subject) for finding in findings), default=0)
    indent = " " * (_SEVERITY_WIDTH + 2)
    lines = []
    for finding in findings:
        severity = _coloured(f"{finding.severity:<{_SEVERITY_WIDTH}}", finding.severity)
        message = textwrap.indent(finding.message, indent + " " * (width + 2)).lstrip()
        lines.append(f"{severity}  {finding.subject:<{width}}  {message}")
        if finding.remedy:
            # Left-aligned under each other, so that SQL can be copied as it is.
            lines.append(textwrap.indent(finding.remedy, indent))
    errors = sum(finding.severity == "error" for finding in findings)
    warnings = sum(finding.severity == "warning" for finding in findings)
    lines += ["", f"{_counted(errors, 'error')}, {_counted(warnings, 'warning')}"]
    return redact("\n".join(lines))


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def _coloured(text: str, severity: str) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return typer.style(text, fg=_COLOURS[severity])
