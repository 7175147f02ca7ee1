"""Looks up what is installed in the databases of known vulnerabilities: ``make audit``.

    python -m tests.audit

Exit code 1 if there are findings. Where no database answers, nothing has been audited: that is
said, and the exit code is 0, since it says nothing about the packages; with ``--strict`` it is 2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TextIO

#: Databases, in the order in which they are asked.
SERVICES: Final = ("pypi", "osv")
_SECONDS: Final = 300.0

#: Returns what pip-audit prints as JSON for a service, empty if it fails.
Ask = Callable[[str], str]


@dataclass(frozen=True)
class Audit:
    """``audited``: packages that a database knows; ``skipped``: others; ``findings``: lines."""

    audited: int
    skipped: tuple[str, ...]
    findings: tuple[str, ...]


def ask(service: str) -> str:
    """Run pip-audit on this environment."""
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable"]
    command += ["--progress-spinner", "off", "--format", "json", "--vulnerability-service", service]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout


def read(output: str) -> Audit | None:
    """What pip-audit found; None if it did not get that far."""
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return None
    known = [package for package in packages if "skip_reason" not in package]
    return Audit(
        len(known),
        tuple(package["name"] for package in packages if "skip_reason" in package),
        tuple(
            f"{package['name']} {package['version']}: {found['id']}"
            f" (fixed in {', '.join(found['fix_versions']) or 'no version yet'})"
            for package in known
            for found in package["vulns"]
        ),
    )


def audit(ask: Ask, out: TextIO, *, strict: bool = False) -> int:
    """Ask one service after the other until one knows packages; returns the exit code."""
    for service in SERVICES:
        result = read(ask(service))
        if result is None or not result.audited:
            out.write(f"audit: {service} cannot be reached, or knows none of the packages\n")
            continue
        for finding in result.findings:
            out.write(f"audit: {finding}\n")
        skipped = f", {len(result.skipped)} unknown to {service}" if result.skipped else ""
        out.write(
            f"audit: {result.audited} packages{skipped}, {len(result.findings)} vulnerabilities\n"
        )
        return 1 if result.findings else 0
    out.write("audit: NOTHING HAS BEEN AUDITED, no database of vulnerabilities can be reached\n")
    return 2 if strict else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Audit the installed packages")
    parser.add_argument("--strict", action="store_true", help="fail if no database can be reached")
    return audit(ask, sys.stdout, strict=parser.parse_args(arguments).strict)


if __name__ == "__main__":
    sys.exit(main())
