"""``cdc-sync check``."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.options import takes_settings
from cdc_sync.errors import CdcSyncError, ExitCode, policy

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings
    from cdc_sync.sync.findings import Finding

_COLOURS = {
    "ok": typer.colors.GREEN,
    "advice": typer.colors.CYAN,
    "warning": typer.colors.YELLOW,
    "error": typer.colors.RED,
}
_SEVERITY_WIDTH = len("warning")
_INDENT = " " * (_SEVERITY_WIDTH + 2)
_WIDTH = 80
_SIDES = {"postgres": "Postgres", "qdrant": "Qdrant"}
#: Words of a text; what is quoted stays together, since it may be SQL. An apostrophe is no quote.
_WORD = re.compile(r"""(?:"[^"]*"|(?<!\w)'[^']*'|\S)+""")


@takes_settings
def check(
    loaded: LoadedSettings,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings fail, too.")] = False,
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
    """Say what stands in the way of a run, or will cost something.

    Looks at Postgres, Qdrant and the tables; changes nothing. Exit code 0 if there is no error.
    """
    if sql or sql_role is not None:
        from cdc_sync.sync.check import role_sql

        typer.echo(role_sql(loaded.settings, sql_role), nl=False)
        return ExitCode.OK
    from cdc_sync.sync.check import run_checks
    from cdc_sync.sync.known_findings import failed

    try:
        findings = run_checks(loaded.settings)
    except CdcSyncError as error:
        # A check that cannot go on is a finding too: with --json there is always JSON.
        findings = [failed("check", "check", error)]
    code = exit_code(findings, strict=strict)
    typer.echo(_as_json(findings, ok=code == ExitCode.OK) if as_json else _as_text(findings))
    return code


def exit_code(findings: Sequence[Finding], *, strict: bool = False) -> int:
    """0 without errors, else the exit code of the first error's kind. ``strict``: warnings count as
    errors of the configuration, after the errors."""
    for finding in findings:
        if finding.severity == "error":
            return policy(finding.kind).exit_code if finding.kind else ExitCode.CONFIG
    if strict and any(finding.severity == "warning" for finding in findings):
        return ExitCode.CONFIG
    return ExitCode.OK


def _as_json(findings: Sequence[Finding], *, ok: bool) -> str:
    from cdc_sync.ops.redaction import redact

    entries = [
        {
            **({"id": finding.id, "side": finding.side} if finding.id else {}),
            "severity": finding.severity,
            "subject": finding.subject,
            "message": redact(finding.message),
            "remedy": redact(finding.remedy),
            "kind": finding.kind.value if finding.kind else None,
        }
        for finding in findings
    ]
    return json.dumps({"ok": ok, "findings": entries}, indent=2, ensure_ascii=False)


def _as_text(findings: Sequence[Finding]) -> str:
    from cdc_sync.ops.redaction import redact

    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(_heading(finding), []).append(finding)
    lines = []
    for heading, group in groups.items():
        lines += [heading] if heading else []
        width = max(len(_label(finding)) for finding in group)
        for finding in group:
            lines += _entry(finding, width)
        lines.append("")
    lines.append(_counts(findings))
    return redact("\n".join(lines))


def _heading(finding: Finding) -> str:
    """Under what a finding stands: its side, its table, or its collection."""
    from cdc_sync.sync.known_findings import KNOWN

    known = KNOWN.get(finding.id)
    if known is None or known.scope == "side":
        return _SIDES.get(finding.side, "")
    subject = finding.subject
    return f"Table {subject}" if known.scope == "table" else subject[0].upper() + subject[1:]


def _label(finding: Finding) -> str:
    return finding.id or finding.subject


def _entry(finding: Finding, width: int) -> Iterator[str]:
    """``severity  label  message`` where that fits a line; else the message is below."""
    severity = _coloured(f"{finding.severity:<{_SEVERITY_WIDTH}}", finding.severity)
    beside = _SEVERITY_WIDTH + 2 + width + 2 + len(finding.message) <= _WIDTH
    if beside and "\n" not in finding.message:
        yield f"{severity}  {_label(finding):<{width}}  {finding.message}"
    else:
        yield f"{severity}  {_label(finding)}"
        yield from _wrapped(finding.message)
    if finding.remedy:
        yield from _wrapped(finding.remedy)


def _wrapped(text: str) -> Iterator[str]:
    """Lines below each other, left-aligned, so that SQL can be copied as it is; no line is broken
    within quotes."""
    for line in text.splitlines():
        if len(_INDENT) + len(line) <= _WIDTH:
            yield _INDENT + line
            continue
        margin = _INDENT + line[: len(line) - len(line.lstrip())]
        current = ""
        for word in _WORD.findall(line):
            if current and len(margin) + len(current) + 1 + len(word) > _WIDTH:
                yield margin + current
                current = word
            else:
                current = f"{current} {word}" if current else word
        yield margin + current


def _counts(findings: Sequence[Finding]) -> str:
    counted = {
        severity: sum(finding.severity == severity for finding in findings)
        for severity in ("error", "warning", "advice")
    }
    text = f"{_counted(counted['error'], 'error')}, {_counted(counted['warning'], 'warning')}"
    if counted["advice"]:
        text += f", {_counted(counted['advice'], 'piece')} of advice"
    return text


def _counted(count: int, noun: str) -> str:
    return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


def _coloured(text: str, severity: str) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return typer.style(text, fg=_COLOURS[severity])
