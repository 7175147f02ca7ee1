"""Writes the lock files of the image: what pyproject.toml asks for, pinned, with hashes.

    python docker/lock.py            keeps the pins that still fit
    python docker/lock.py --upgrade  takes the newest versions that fit

Needs uv (pip install uv). Where packages come from is not written down: pip is told that where the
image is built.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

DIRECTORY = Path(__file__).parent
PYPROJECT = DIRECTORY.parent / "pyproject.toml"


def requirements() -> dict[Path, list[str]]:
    """What each lock file is made from: the program's dependencies, and what builds its wheel."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    return {
        DIRECTORY / "requirements.txt": project["project"]["dependencies"],
        DIRECTORY / "requirements-build.txt": project["build-system"]["requires"],
    }


def header(wanted: Sequence[str]) -> str:
    """The first lines of a lock file; the digest tells whether it is still the right one."""
    digest = hashlib.sha256("\n".join(sorted(wanted)).encode()).hexdigest()
    return f"# Written by docker/lock.py from pyproject.toml; do not edit.\n# Of: {digest}\n"


def lock(target: Path, wanted: Sequence[str], arguments: Sequence[str]) -> None:
    """Write one lock file, for Python 3.11 and later."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("UV_", "PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"))
    }
    with tempfile.TemporaryDirectory() as name:
        source, output = Path(name, "wanted.in"), Path(name, "locked.txt")
        source.write_text("\n".join(wanted) + "\n", encoding="utf-8")
        if target.exists():
            # uv keeps the pins it finds there.
            output.write_text(target.read_text(encoding="utf-8"), encoding="utf-8")
        subprocess.run(
            [
                sys.executable, "-m", "uv", "pip", "compile", str(source), "--quiet",
                "--output-file", str(output),
                "--generate-hashes", "--universal", "--python-version", "3.11",
                "--no-annotate", "--no-header", "--no-emit-index-url", "--no-emit-find-links",
                *arguments,
            ],
            env=environ,
            check=True,
        )  # fmt: skip
        target.write_text(header(wanted) + output.read_text(encoding="utf-8"), encoding="utf-8")


def main() -> None:
    """Write both."""
    for target, wanted in requirements().items():
        lock(target, wanted, sys.argv[1:])


if __name__ == "__main__":
    main()
