"""The command line in tests: what it prints, checked for secrets, and the program in this process
and as one of its own."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from cdc_sync.cli import main
from cdc_sync.ops.redaction import forget_secrets

SECRET = "hunter2-never-print-me"
API_KEY = "the-api-key-nobody-may-see"
URL = f"postgresql://sync:{SECRET}@db.invalid/app"
ONE_TABLE = ("--pg.url", "postgresql://db.invalid/app", "--pg.table", "items")


def output(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
    assert API_KEY not in captured.out + captured.err
    return captured.out, captured.err


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def in_process(*arguments: str) -> Done:
    """Run a command in this process, which is much faster."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    forget_secrets()
    return Done(code, out.getvalue(), err.getvalue())


def python(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("CDC_SYNC_")}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**inherited, **environ},
        check=False,
    )
