"""The README keeps its word: its commands, tables are run and compared; the way that it leads
newcomers is walked by tests/operate/test_newcomer.py."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from cdc_sync.errors import ErrorKind, ExitCode, policy

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    """Every command of the README's shell blocks, without comments."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_make_targets_exist() -> None:
    targets = {words[1] for words in commands() if words[0] == "make"}
    assert {"demo", "test", "lint", "bench", "campaign"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_cdc_sync_commands_exist() -> None:
    ours = [words[1:] for words in commands() if words[0] == "cdc-sync"]
    assert len(ours) >= 4
    for words in ours:
        names = [word for word in words[:2] if re.fullmatch("[a-z]+", word)]
        done = subprocess.run(
            [sys.executable, "-m", "cdc_sync", *names, "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, words
        for word in words:
            if word.startswith("--"):
                assert word in done.stdout, word


def test_exit_codes_are_all_there() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert listed == {int(code) for code in ExitCode}
    assert {int(policy(kind).exit_code) for kind in ErrorKind} <= listed


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
