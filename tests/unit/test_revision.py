"""Which commit the program says it was built from, in every way of installing it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from cdc_sync.cli import main
from cdc_sync.loading import REVISION_VARIABLE, load_settings
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.revision import revision

COMMIT = "0123456789abcdef" * 2 + "01234567"
OTHER = COMMIT[::-1]

Record = Callable[[object], None]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    """Have pip's record of the installation say something; None: nothing."""

    class Distribution:
        def __init__(self, content: object) -> None:
            self._text = content if isinstance(content, str | None) else json.dumps(content)

        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return self._text

    def put(content: object) -> None:
        monkeypatch.setattr(metadata, "distribution", lambda _: Distribution(content))

    put(None)
    return put


def clone(directory: Path, **files: str) -> Path:
    """A source tree whose ``.git`` holds these files; ``__`` is a slash."""
    (directory / ".git").mkdir(parents=True)
    (directory / "pyproject.toml").touch()
    for name, text in files.items():
        path = directory / ".git" / name.replace("__", "/").replace("_", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return directory


def of(source: Path, **environ: str) -> str:
    return revision(environ, source)


def test_the_variable_goes_first(record: Record, tmp_path: Path) -> None:
    record({"url": "https://example.com/x.git", "vcs_info": {"vcs": "git", "commit_id": OTHER}})
    source = clone(tmp_path, HEAD=COMMIT)
    assert of(source, CDC_SYNC_REVISION=" v1.2-3-gabc\n") == "v1.2-3-gabc"
    assert of(source, CDC_SYNC_REVISION="") == OTHER


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "{",
        "[]",
        "null",
        {},
        {"url": "file:///source", "dir_info": {"editable": True}},
        {"url": "file:///cdc_sync.whl", "archive_info": {}},
        {"vcs_info": None},
        {"vcs_info": {"vcs": "git"}},
        {"vcs_info": {"commit_id": 7}},
        {"vcs_info": {"commit_id": ""}},
    ],
    ids=str,
)
def test_an_installation_from_elsewhere_than_git_has_no_revision(
    record: Record, tmp_path: Path, content: object
) -> None:
    record(content)
    assert of(tmp_path) == "unknown"
    assert of(clone(tmp_path, HEAD=COMMIT)) == COMMIT


def test_a_program_that_was_not_installed_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert of(tmp_path) == "unknown"


@pytest.mark.usefixtures("record")
def test_a_clone_says_what_is_checked_out(tmp_path: Path) -> None:
    branch = "ref: refs/heads/topic/x\n"
    assert of(clone(tmp_path / "detached", HEAD=f"{COMMIT}\n")) == COMMIT
    loose = clone(tmp_path / "loose", HEAD=branch, refs__heads__topic__x=f"{COMMIT}\n")
    assert of(loose) == COMMIT
    packed = f"# pack-refs with: peeled\n{OTHER} refs/heads/topic/xy\n{COMMIT} refs/heads/topic/x\n"
    assert of(clone(tmp_path / "packed", HEAD=branch, packed_refs=packed)) == COMMIT
    both = {"refs__heads__topic__x": COMMIT, "packed_refs": packed.replace(COMMIT, OTHER)}
    assert of(clone(tmp_path / "both", HEAD=branch, **both)) == COMMIT


@pytest.mark.usefixtures("record")
@pytest.mark.parametrize(
    "files",
    [
        {},
        {"HEAD": ""},
        {"HEAD": "ref: refs/heads/main"},
        # What git leaves there where it keeps branches in another form.
        {"HEAD": "ref: refs/heads/.invalid"},
        {"HEAD": "ref: ../config", "config": "[core]"},
        {"HEAD": "ref: refs", "refs__heads__main": COMMIT},
        {"HEAD": COMMIT[1:]},
        {"HEAD": "ref: refs/heads/main", "packed_refs": "garbage refs/heads/main"},
    ],
    ids=str,
)
def test_what_cannot_be_read_is_unknown(tmp_path: Path, files: dict[str, str]) -> None:
    assert of(clone(tmp_path, **files)) == "unknown"


@pytest.mark.usefixtures("record")
def test_a_file_that_is_no_text_is_unknown(tmp_path: Path) -> None:
    source = clone(tmp_path)
    (source / ".git" / "HEAD").write_bytes(b"\xff\xfe\x00")
    assert of(source) == "unknown"


@pytest.mark.usefixtures("record")
def test_the_repository_of_somebody_else_is_not_looked_at(tmp_path: Path) -> None:
    """As where packages are installed into a directory that is under version control."""
    source = clone(tmp_path, HEAD=COMMIT)
    (source / "pyproject.toml").unlink()
    assert of(source) == "unknown"


@pytest.mark.usefixtures("record")
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_itself_says_the_same(tmp_path: Path) -> None:
    """A repository, a work tree of it, both with loose and with packed branches."""
    identity = {f"GIT_{who}_{what}": "x@x" for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")}  # fmt: skip
    environ = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_DEFAULT_REF_FORMAT": "files", **identity,
    }  # fmt: skip
    main_tree, other = tmp_path / "main", tmp_path / "other"

    def git(*arguments: str, directory: Path = main_tree) -> str:
        command = ["git", "-C", str(directory), *arguments]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    main_tree.mkdir()
    (main_tree / "pyproject.toml").touch()
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    git("worktree", "add", "--quiet", "-b", "topic/x", str(other))
    git("commit", "--quiet", "--allow-empty", "-m", "two", directory=other)
    for _ in range(2):
        found = [of(main_tree), of(other)]
        assert found == [git("rev-parse", "HEAD"), git("rev-parse", "HEAD", directory=other)]
        assert found[0] != found[1]
        git("pack-refs", "--all")


def test_the_variable_is_no_setting_and_no_mistake() -> None:
    flags = {"pg.url": "postgresql://h/d", "pg.table": "t"}
    load_settings(None, flags, {REVISION_VARIABLE: COMMIT})


def test_version_and_metric_say_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(REVISION_VARIABLE, "abc1234")
    assert main(["version"]) == 0
    assert re.search(r"^revision +abc1234$", capsys.readouterr().out, re.MULTILINE)
    page = generate_latest(Metrics(revision()).registry).decode()
    assert 'revision="abc1234"' in page
