"""Somebody who has a fresh clone, reads README.md and nothing else, and copies its commands."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from tests.operate.dashboard import ROOT

PATIENCE_SECONDS: Final = 120.0

_Section: TypeAlias = str


def fresh_clone(directory: Path) -> Path:
    """Clone the repository, as it would be if what is not committed yet were."""
    clone = directory / "cdc_sync"
    if not (ROOT / ".git").exists():
        # These are the files of a release.
        return shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    # Whoever runs the tests need not own the tree.
    config = directory / "gitconfig"
    config.write_text("[safe]\n\tdirectory = *\n", encoding="utf-8")
    environ = {**os.environ, "GIT_CONFIG_GLOBAL": str(config), "GIT_OPTIONAL_LOCKS": "0"}

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(
            ["git", *arguments], env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return [path for path in done.stdout.split("\0") if path]

    git("clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone))
    for path in git("-C", str(ROOT), "diff", "-z", "--name-only", "HEAD"):
        if not (ROOT / path).exists():
            (clone / path).unlink(missing_ok=True)
    for path in git("-C", str(ROOT), "ls-files", "-z", "-mo", "--exclude-standard"):
        if (ROOT / path).is_file():
            (clone / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, clone / path)
    return clone


@dataclass(frozen=True)
class Readme:
    """The blocks of README.md, and what a reader has to put in of their own."""

    text: str
    #: What is written there, and what belongs in its place: addresses, and the password.
    own: Mapping[str, str]

    @classmethod
    def of(cls, clone: Path, *, postgres: str, qdrant: str, http: str, password: str) -> Readme:
        """Read it. Addresses: ``postgres`` host, port and database, ``qdrant`` and ``http`` URLs
        without a slash at the end.

        This is the one place in which anything is substituted.
        """
        own = {
            "db.example.com/app": postgres,
            "http://localhost:6334": qdrant,
            # Its port is 9464 unless another pipeline of this machine has that.
            "http://127.0.0.1:9464": http,
            "127.0.0.1:9464": http.removeprefix("http://"),
            "cdc-sync status ": f"cdc-sync status --url {http} ",
            "'…'": f"'{password}'",
        }
        text = (clone / "README.md").read_text(encoding="utf-8")
        for written in own:
            assert written in text, written
        return cls(text, own)

    def block(self, language: str, section: _Section, first: str = "") -> str:
        """The block of that section, in that language, that begins so."""
        (body,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## )", self.text, re.M | re.S)
        found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", body, re.M | re.S)
        (block,) = (one for one in found if one.startswith(first))
        return self._mine(block)

    def commands(self, section: _Section, first: str = "") -> list[str]:
        """The command lines of such a block of shell."""
        return [line for line in self.block("bash", section, first).splitlines() if line.strip()]

    def _mine(self, text: str) -> str:
        # In one pass: what was put in is not looked at again.
        pattern = "|".join(map(re.escape, self.own))
        return re.sub(pattern, lambda found: self.own[found[0]], text)


class Shell:
    """A terminal in a directory. Lines that change the shell itself (``export``, ``.``) count for
    all that follow."""

    def __init__(self, directory: Path, environ: Mapping[str, str]) -> None:
        self.directory = directory
        self._environ = dict(environ)
        self._before: list[str] = []

    def type(self, line: str, *, wanted: int = 0, seconds: float = 600.0) -> str:
        """Type a line and wait for its end; returns all that it said."""
        done = subprocess.run(
            self._words(line),
            cwd=self.directory,
            env=self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == wanted, f"{line}\n{done.returncode}\n{done.stdout[-4000:]}"
        for part in line.split("&&"):
            if shlex.split(part, comments=True)[:1] in (["export"], ["."]):
                self._before.append(part.strip())
        return done.stdout

    def leave_running(self, line: str) -> Running:
        """Type a line that does not end by itself."""
        log = self.directory.parent / "running.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                self._words(f"exec {line}"),
                cwd=self.directory,
                env=self._environ,
                stdout=out,
                stderr=out,
            )
        return Running(process, log)

    def _words(self, line: str) -> Sequence[str]:
        return ["bash", "-c", "\n".join(["set -e", *self._before, line])]


@dataclass
class Running:
    """A command that goes on."""

    process: subprocess.Popen[bytes]
    log: Path

    def interrupt(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        """End it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        """The end of what it has written."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-4000:]


def clean_environ(**more: str) -> dict[str, str]:
    """The environment of a new terminal: nothing of this test run, no virtual environment."""
    ours = re.compile(r"CDC_SYNC_|PYTEST_|PYTHON|VIRTUAL_ENV|MAKE|PG[A-Z]+$")
    kept = {name: value for name, value in os.environ.items() if not ours.match(name)}
    return {**kept, **more}


def stand_in_environment(directory: Path) -> Path:
    """A virtual environment in which all is installed already: commands of the running one, on the
    code of the directory that they are started in. Returns its place."""
    place = directory / "environment"
    (place / "bin").mkdir(parents=True)
    for name, words in (("python", ""), ("cdc-sync", " -m cdc_sync")):
        command = place / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n', encoding="utf-8")
        command.chmod(0o755)
    for name in (".pip", ".demo", ".dev"):
        (place / name).touch()
    return place


def edit(config: Path, wanted: str) -> None:
    """Put the values of a short configuration into the long one that has every key, as somebody
    with an editor does: the first line of that section with that key, a comment or not."""
    lines = config.read_text(encoding="utf-8").splitlines()
    for section, content in tomllib.loads(wanted).items():
        header, values = f"[{section}]", content
        if isinstance(content, list):
            header, (values,) = f"[[{section}]]", content
        start = lines.index(header)
        for key, value in values.items():
            number = next(i for i in range(start, len(lines)) if re.match(rf"#?{key} = ", lines[i]))
            assert not any(line.startswith("[") for line in lines[start + 1 : number]), key
            lines[number] = f'{key} = "{value}"'
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
