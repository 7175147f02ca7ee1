"""The commit that this program was built from, as far as the installation says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Final

from cdc_sync.loading import REVISION_VARIABLE

UNKNOWN: Final = "unknown"

_DISTRIBUTION: Final = "cdc-sync"
#: The source tree, if this runs from one.
_SOURCE: Final = Path(__file__).parents[2]
_COMMIT: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_GIT_FILE_BYTES: Final = 1 << 20


def revision(environ: Mapping[str, str] = os.environ, source: Path = _SOURCE) -> str:
    """Return the revision, or ``unknown``.

    In this order: the variable ``CDC_SYNC_REVISION``, which the image sets; what pip has put on
    record of an installation from git (``direct_url.json``, PEP 610); the commit that is checked
    out where this runs from a clone (``source``). Never raises.
    """
    given = environ.get(REVISION_VARIABLE, "").strip()
    return given or _installed() or _checked_out(source) or UNKNOWN


def _installed() -> str | None:
    try:
        text = metadata.distribution(_DISTRIBUTION).read_text("direct_url.json")
        record = json.loads(text) if text is not None else None
        commit = record["vcs_info"]["commit_id"] if record is not None else None
    except (metadata.PackageNotFoundError, OSError, ValueError, KeyError, TypeError):
        return None
    return commit if isinstance(commit, str) and commit else None


def _checked_out(source: Path) -> str | None:
    """The commit of HEAD, read from the files that git keeps: there need not be a git here."""
    # Whatever else may lie in a repository of somebody's own.
    if not (source / "pyproject.toml").is_file():
        return None
    directory = source / ".git"
    if directory.is_file():  # of a work tree, or a submodule
        directory = source / _read(directory).removeprefix("gitdir:").strip()
    head = _read(directory / "HEAD")
    if not head.startswith("ref:"):
        return _commit(head)
    name = head.removeprefix("ref:").strip()
    # Work trees share the branches of their repository.
    common = directory / (_read(directory / "commondir") or ".")
    for place in (directory, common):
        if found := _commit(_read(place / name)):
            return found
    for line in _read(common / "packed-refs").splitlines():
        commit, _, packed = line.partition(" ")
        if packed == name:
            return _commit(commit)
    return None


def _commit(text: str) -> str | None:
    return text if _COMMIT.fullmatch(text) else None


def _read(path: Path) -> str:
    """The file's text without blanks around it; empty where it cannot be read."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_GIT_FILE_BYTES).strip()
    except (OSError, ValueError):
        return ""
