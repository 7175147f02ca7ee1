"""The command line in tests: what it prints, checked for secrets, and the program as a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SECRET = "hunter2-never-print-me"
API_KEY = "the-api-key-nobody-may-see"
URL = f"postgresql://sync:{SECRET}@db.invalid/app"
ONE_TABLE = ("--pg.url", "postgresql://db.invalid/app", "--pg.table", "items")


def output(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    assert SECRET not in captured.out + captured.err
    assert API_KEY not in captured.out + captured.err
    return captured.out, captured.err


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
