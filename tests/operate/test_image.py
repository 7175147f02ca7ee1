"""The image's parts that need no build: lock files, health check, what gets into it."""

from __future__ import annotations

import http.server
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cdc_sync.loading import REVISION_VARIABLE
from tests.operate.dashboard import ROOT

DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WANTED = {
    "requirements.txt": PROJECT["project"]["dependencies"],
    "requirements-build.txt": PROJECT["build-system"]["requires"],
}
_HEALTHCHECK = DOCKER / "healthcheck.py"


def pinned(lock: str) -> dict[str, list[Requirement]]:
    """What a lock file pins; a package can be there once for each version of Python."""
    text = (DOCKER / lock).read_text(encoding="utf-8").replace("\\\n", " ")
    found: dict[str, list[Requirement]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line.split(" --hash=")[0].strip())
            found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


@pytest.mark.parametrize("lock", WANTED)
def test_the_lock_is_of_these_dependencies(lock: str) -> None:
    """Otherwise: python docker/lock.py"""
    source = (
        "import runpy, sys; lock = runpy.run_path(sys.argv[1]);"
        " print(*(h for t, w in lock['requirements']().items() if t.name == sys.argv[2]"
        " for h in lock['header'](w).splitlines()), sep='\\n')"
    )
    header = subprocess.run(
        [sys.executable, "-c", source, str(DOCKER / "lock.py"), lock],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert header.startswith("# Written by")
    assert (DOCKER / lock).read_text(encoding="utf-8").startswith(header)


@pytest.mark.parametrize("lock", WANTED)
def test_the_pins_are_versions_that_fit(lock: str) -> None:
    pins = pinned(lock)
    for text in WANTED[lock]:
        wanted = Requirement(text)
        for pin in pins[canonicalize_name(wanted.name)]:
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            assert wanted.specifier.contains(specifier.version), text


@pytest.mark.parametrize("lock", WANTED)
def test_everything_is_hashed_and_no_place_is_named(lock: str) -> None:
    text = (DOCKER / lock).read_text(encoding="utf-8")
    assert not re.search(r"://|--index|--find-links|--trusted|@ ", text)
    entries = text.replace("\\\n", " ").splitlines()[2:]
    assert entries
    for entry in entries:
        assert re.fullmatch(r"[^ ]+==[^ ]+( ; .+?)?(\s+--hash=sha256:[0-9a-f]{64})+", entry), entry


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_the_lock_would_be_written_the_same_again() -> None:
    """By uv, which keeps the pins that fit."""
    pytest.importorskip("uv", reason="the group deployment")
    before = {lock: (DOCKER / lock).read_bytes() for lock in WANTED}
    try:
        subprocess.run([sys.executable, "docker/lock.py"], cwd=ROOT, check=True)
        assert {lock: (DOCKER / lock).read_bytes() for lock in WANTED} == before
    finally:
        for lock, text in before.items():
            (DOCKER / lock).write_bytes(text)


def test_it_does_not_run_as_root_and_gets_signals() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "USER 65532:65532" in final
    assert 'ENTRYPOINT ["/opt/cdc-sync/bin/cdc-sync"]' in final
    assert "STOPSIGNAL SIGTERM" in final
    assert "HEALTHCHECK" in final
    # Nothing but what was built is copied, and the tools that built it stay behind.
    assert re.findall(r"^(?:COPY|ADD) (.+)$", final, re.MULTILINE) == [
        "--from=build /opt/cdc-sync /opt/cdc-sync"
    ]


def test_it_is_told_its_revision() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "ARG REVISION=unknown\n" in final
    assert 'org.opencontainers.image.revision="${REVISION}"' in final
    assert f"{REVISION_VARIABLE}=${{REVISION}}\n" in final


def test_only_what_is_needed_is_sent_to_the_build() -> None:
    ignore = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignore[0] == "*"
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert copied == sent
    for name in copied:
        assert (ROOT / name).exists(), name


class _Answers(http.server.BaseHTTPRequestHandler):
    codes: dict[str, int] = {}  # noqa: RUF012

    def do_GET(self) -> None:
        self.send_response(self.codes[self.path])
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not to stderr."""


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("code", "arguments", "status"),
    [(200, [], 0), (503, [], 1), (200, ["/readyz"], 0), (302, [], 1)],
)
def test_the_health_check_says_what_the_endpoint_says(
    port: int, monkeypatch: pytest.MonkeyPatch, code: int, arguments: list[str], status: int
) -> None:
    monkeypatch.setattr(_Answers, "codes", {[*arguments, "/livez"][0]: code})
    monkeypatch.setenv("CDC_SYNC_HTTP__PORT", str(port))
    done = subprocess.run([sys.executable, _HEALTHCHECK, *arguments], check=False)
    assert done.returncode == status


def test_the_health_check_notices_that_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_SYNC_HTTP__PORT", "1")
    done = subprocess.run(
        [sys.executable, _HEALTHCHECK], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "port 1" in done.stderr
