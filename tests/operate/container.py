"""Builds the image without a Docker daemon, and runs it as a container would be run.

buildah builds; a Debian of debootstrap stands in for the public base image, since a registry of
images is not within everybody's reach. Packages are downloaded before, by the hashes of the lock
files, and the build itself has no index. The container is a chroot in namespaces of its own: the
daemon is process 1, not root, and the root file system is read-only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from tests.operate.dashboard import ROOT
from tests.operate.prometheus import required_program
from tests.support.postgres_packages import cache_directory

_BASE: Final = "localhost/cdc-sync-test-base"
_IMAGE: Final = "localhost/cdc-sync-test"
_LOCKS: Final = ("docker/requirements.txt", "docker/requirements-build.txt")

# $1 root, $2 directory that is mounted at the same place, $3 user, then the command. As in a
# container: own /tmp and /dev/shm, no other device than these, everything else read-only.
_ENTER: Final = """
set -e
root=$1 shared=$2 user=$3; shift 3
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero random urandom; do
  touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm"; mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mkdir -p "$root$shared"; mount --bind "$shared" "$root$shared"
mount -t proc proc "$root/proc"
mount -o remount,bind,ro "$root"
exec /usr/sbin/chroot --userspec="$user" "$root" "$@"
"""


class Buildah:
    """buildah with a storage of its own; see :func:`opened`."""

    def __init__(self, directory: Path) -> None:
        self._command = [
            required_program("buildah", "buildah"),
            *("--root", str(directory / "root"), "--runroot", str(directory / "run")),
            *("--storage-driver", "vfs"),
        ]

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (arguments, done.stdout[-3000:], done.stderr[-3000:])
        return done.stdout.strip()


@dataclass(frozen=True, slots=True)
class Image:
    """A built image: its configuration (as Docker has it), and its files."""

    config: Mapping[str, Any]
    root: Path
    log: str

    @property
    def environ(self) -> dict[str, str]:
        """The variables it sets."""
        return dict(line.split("=", 1) for line in self.config["Env"])

    @property
    def command(self) -> list[str]:
        """Entry point and default arguments."""
        return [*self.config["Entrypoint"], *self.config["Cmd"]]


def base_tree() -> Path:
    """A minimal Debian with Python, kept between runs."""
    target = cache_directory() / "image-base-bookworm"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent))
        subprocess.run(
            [
                required_program("debootstrap", "debootstrap"), "--variant=minbase",
                "--include=python3,python3-venv", "bookworm", str(work / "tree"),
            ],
            check=True,
            capture_output=True,
        )  # fmt: skip
        for name in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(work / "tree" / name)
        (work / "tree").rename(target)
        work.rmdir()
    return target


def download_wheels(directory: Path) -> None:
    """What the lock files name, for the Python of the base image."""
    python = subprocess.run(
        ["chroot", str(base_tree()), "python3", "-c", "import sys; print(*sys.version_info[:2])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    for lock in _LOCKS:
        subprocess.run(
            [
                sys.executable, "-m", "pip", "download", "--quiet", "--require-hashes",
                "--only-binary", ":all:", "--python-version", ".".join(python),
                "--dest", str(directory), "--requirement", lock,
            ],
            cwd=ROOT,
            check=True,
        )  # fmt: skip


@contextmanager
def built_image(directory: Path) -> Iterator[Image]:
    """Build the image of docker/Dockerfile, and mount it; all is removed in the end."""
    wheels = directory / "wheels"
    wheels.mkdir()
    download_wheels(wheels)
    # The index of the build is given to it as anybody would give theirs.
    config = directory / "pip.conf"
    config.write_text("[global]\nno-index = true\nfind-links = /mnt/wheels\n", encoding="utf-8")
    buildah = Buildah(directory / "buildah")
    base = buildah("from", "scratch")
    buildah("copy", "--quiet", base, str(base_tree()), "/")
    buildah("commit", "--quiet", "--rm", base, _BASE)
    log = buildah(
        *("bud", "--isolation", "chroot", "--format", "docker"),
        *("--build-arg", f"BASE={_BASE}", "--build-arg", "REVISION=0123abc"),
        *("--secret", f"id=pip.conf,src={config}", "--volume", f"{wheels}:/mnt/wheels:ro"),
        *("--file", "docker/Dockerfile", "--tag", _IMAGE, "."),
    )
    container = buildah("from", _IMAGE)
    described = json.loads(buildah("inspect", container))
    root = Path(buildah("mount", container))
    try:
        yield Image(described["Docker"]["config"], root, log)
    finally:
        buildah("rm", container)
        buildah("rmi", "--all", "--force")


class Container:
    """One life of the image's command, or of another. ``shared`` is mounted at its own path."""

    def __init__(
        self,
        image: Image,
        shared: Path,
        command: Sequence[str],
        environ: Mapping[str, str],
        log: Path,
    ) -> None:
        self.image = image
        with log.open("ab") as output:
            self.outer = subprocess.Popen(
                [
                    required_program("unshare", "util-linux"),
                    *("--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"),
                    *("sh", "-c", _ENTER, "sh"),
                    *(str(image.root), str(shared), image.config["User"], *command),
                ],
                env={**image.environ, **environ},
                stdout=output,
                stderr=output,
            )

    @property
    def process(self) -> psutil.Process:
        """The process that is number 1 in there."""
        (child,) = psutil.Process(self.outer.pid).children()
        return child

    def terminate(self, timeout: float) -> int:
        """Send SIGTERM to process 1, as `docker stop` does; returns the exit code."""
        os.kill(self.process.pid, signal.SIGTERM)
        return self.outer.wait(timeout)

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run something beside it, as `docker exec` does."""
        return subprocess.run(
            [
                "nsenter", "--target", str(self.process.pid), "--mount", "--pid", "--ipc",
                "/usr/sbin/chroot", f"--userspec={self.image.config['User']}",
                str(self.image.root), *command,
            ],
            env=self.image.environ | self._environ(),
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip

    def _environ(self) -> dict[str, str]:
        return dict(self.process.environ())

    def close(self) -> None:
        """kill -9, if it still runs."""
        if self.outer.poll() is None:
            self.outer.kill()
        self.outer.wait()
