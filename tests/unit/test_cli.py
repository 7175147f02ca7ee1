"""The command line: what it calls, what it prints, how it ends, and what it never prints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from cdc_sync.cli import main
from cdc_sync.config import Settings, TableSettings
from cdc_sync.errors import (
    CdcSyncError,
    ConfigError,
    ErrorKind,
    ExitCode,
    SinkError,
    SourceError,
)
from cdc_sync.loading import FLAGS, TABLE_FLAGS
from cdc_sync.settings_schema import SECTIONS
from cdc_sync.sync.findings import Finding
from tests.support.command_line import API_KEY, ONE_TABLE, SECRET, URL, output, python

COMMANDS: tuple[tuple[str, ...], ...] = (
    (),
    ("run",),
    ("migrate",),
    ("plan",),
    ("resync",),
    ("verify",),
    ("dlq",),
    ("dlq", "list"),
    ("dlq", "show"),
    ("dlq", "retry"),
    ("dlq", "drop"),
    ("check",),
    ("bench",),
    ("status",),
    ("demo",),
    ("version",),
    ("config",),
    ("config", "init"),
    ("config", "show"),
)


pytestmark = pytest.mark.usefixtures("clean_environment")


@dataclass
class Daemon:
    """Stands in for the pipeline: records what it was started with."""

    result: int = 0
    error: BaseException | None = None
    settings: list[Settings] = field(default_factory=list)
    restart: list[bool] = field(default_factory=list)

    def run_pipeline(self, settings: Settings, *, restart: bool = False) -> int:
        self.settings.append(settings)
        self.restart.append(restart)
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Daemon:
    made = Daemon()
    module = ModuleType("cdc_sync.sync.daemon")
    module.run_pipeline = made.run_pipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cdc_sync.sync.daemon", module)
    return made


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> list[Finding | CdcSyncError]:
    """What the checks find; an error in it is raised."""
    made: list[Finding | CdcSyncError] = []

    def run_checks(settings: Settings) -> list[Finding]:
        for item in made:
            if isinstance(item, CdcSyncError):
                raise item
        return [item for item in made if isinstance(item, Finding)]

    module = ModuleType("cdc_sync.sync.check")
    module.run_checks = run_checks  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cdc_sync.sync.check", module)
    return made


# -- help


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_imports_no_client_and_no_pydantic(command: tuple[str, ...]) -> None:
    program = (
        "import sys\n"
        "from cdc_sync.cli import main\n"
        f"code = main([*{command!r}, '--help'])\n"
        "heavy = {'psycopg', 'qdrant_client', 'grpc', 'pydantic', 'pydantic_settings', 'numpy',"
        " 'rich', 'orjson', 'prometheus_client', 'asyncio'} & set(sys.modules)\n"
        "sys.exit(code or (f'imported: {heavy}' if heavy else 0))\n"
    )
    done = python("-c", program)
    assert done.returncode == 0, done.stderr
    assert "Usage: cdc-sync" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_there_at_once(command: tuple[str, ...]) -> None:
    """In 0.3 s of processor time, which other work on the machine lengthens less than the clock's:
    it waits for nothing."""
    fastest = float("inf")
    for _ in range(12):
        before = children_seconds()
        assert python("-m", "cdc_sync", *command, "--help").returncode == 0
        fastest = min(fastest, children_seconds() - before)
        if fastest < 0.3:
            return
    pytest.fail(f"--help took {fastest:.2f} s at best")


def children_seconds() -> float:
    """Processor time of the processes that were waited for."""
    times = os.times()
    return times.children_user + times.children_system


def test_help_names_every_flag_of_the_guides(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--pg.url", "--pg.table", "--pg.key-column", "--pg.columns", "--qdrant.url",
        "--qdrant.api-key", "--qdrant.collection", "--qdrant.distance-metric",
        "--migration.num-workers", "--migration.batch-size", "--migration.batch-delay",
        "--migration.create-collection", "--migration.restart", "--adopt",
        "--http.port", "--http.host", "--log.level", "--log.format", "--pipeline.name", "--config",
    ]  # fmt: skip
    assert main(["run", "--help"]) == 0
    out, _ = output(capsys)
    assert [flag for flag in flags if flag not in out] == []


@pytest.mark.parametrize("command", ["run", "migrate", "plan", "check"])
def test_every_flag_of_a_setting_is_an_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    words = re.split(r"[\s,]+", output(capsys)[0])
    assert {f"--{flag}" for flag in (*FLAGS, *TABLE_FLAGS)} <= set(words)


def test_help_names_only_variables_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--help"])
    text = re.sub(r"\s+", " ", output(capsys)[0])
    named = re.findall(r"CDC_SYNC_(\w+)__(\w+)", text)
    assert len(named) >= 8
    for section, key in named:
        assert key.lower() in SECTIONS[section.lower()].model_fields


def test_no_command_prints_the_help_and_is_a_usage_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == ExitCode.USAGE
    assert "Commands:" in output(capsys)[0]


# -- run


def test_run_passes_the_settings_on(daemon: Daemon) -> None:
    code = main(
        [
            "run", "--pg.url", URL, "--pg.table", "items", "--pg.key-column", "id",
            "--pg.columns", "id,title,embedding", "--qdrant.url", "http://q:6334",
            "--qdrant.api-key", API_KEY, "--qdrant.collection", "goods",
            "--qdrant.distance-metric", "embedding=dot", "--qdrant.distance-metric", "b=cosine",
            "--migration.num-workers", "3", "--http.port", "0", "--http.host", "0.0.0.0",
            "--log.level", "error", "--log.format", "json", "--pipeline.name", "mine",
        ]
    )  # fmt: skip
    assert code == 0
    (settings,) = daemon.settings
    assert settings.source.url.get_secret_value() == URL
    assert settings.tables == [
        TableSettings(
            name="items",
            key=["id"],
            columns=["id", "title", "embedding"],
            collection="goods",
            metrics={"embedding": "dot", "b": "cosine"},
        )
    ]
    assert settings.qdrant.url == "http://q:6334"
    assert settings.qdrant.api_key is not None
    assert settings.qdrant.api_key.get_secret_value() == API_KEY
    assert settings.migration.num_workers == 3
    assert settings.pipeline.name == "mine"
    assert (settings.http.host, settings.http.port) == ("0.0.0.0", 0)
    assert (settings.log.level, settings.log.format) == ("error", "json")
    assert daemon.restart == [False]


def test_restart_is_passed_on(daemon: Daemon) -> None:
    assert main(["run", *ONE_TABLE, "--migration.restart"]) == 0
    assert daemon.restart == [True]


def test_flags_override_the_file_and_the_environment(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[source]\nurl = 'file'\n[http]\nport = 1\n[[tables]]\nname = 'a'\n")
    monkeypatch.setenv("CDC_SYNC_HTTP__PORT", "2")
    monkeypatch.setenv("CDC_SYNC_SOURCE__URL", "environment")
    assert main(["run", "--config", str(config), "--http.port", "3"]) == 0
    (settings,) = daemon.settings
    assert settings.http.port == 3
    assert settings.source.url.get_secret_value() == "environment"


def test_the_exit_code_of_the_pipeline_is_that_of_the_command(daemon: Daemon) -> None:
    daemon.result = 7
    assert main(["run", *ONE_TABLE]) == 7


@pytest.mark.parametrize("kind", ErrorKind)
def test_an_error_ends_with_message_remedy_and_its_exit_code(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], kind: ErrorKind
) -> None:
    daemon.error = CdcSyncError(kind, "The slot is gone.", "SELECT 1;\nSELECT 2;")
    assert main(["run", *ONE_TABLE]) == daemon.error.policy.exit_code
    _, err = output(capsys)
    assert err == "error: The slot is gone.\ntry: SELECT 1;\n     SELECT 2;\n"


def test_an_unexpected_error_is_one_line_without_debug(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.error = ValueError(f"bad {URL}")
    assert main(["run", *ONE_TABLE]) == ExitCode.BUG
    _, err = output(capsys)
    assert "Traceback" not in err
    assert "Unexpected ValueError" in err
    assert "--debug" in err


@pytest.mark.parametrize("arguments", [["--debug", "run"], ["run", "--log.level", "debug"]])
def test_debug_shows_the_trace_without_secrets(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    daemon.error = ValueError(f"bad {URL} and {SECRET}")
    code = main([*arguments, "--pg.url", URL, "--pg.table", "items"])
    assert code == ExitCode.BUG
    _, err = output(capsys)
    assert "Traceback" in err
    assert "postgresql://sync:***@db.invalid/app and ***" in err


def test_log_level_debug_from_the_file_shows_the_trace(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDC_SYNC_LOG__LEVEL", "debug")
    daemon.error = SourceError(ErrorKind.SOURCE_UNAVAILABLE, "away")
    assert main(["run", *ONE_TABLE]) == ExitCode.UNAVAILABLE
    assert "Traceback" in output(capsys)[1]


def test_an_interrupt_ends_with_130(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.error = KeyboardInterrupt()
    assert main(["run", *ONE_TABLE]) == 130
    assert "Traceback" not in output(capsys)[1]


def test_the_handler_of_sigterm_is_put_back(daemon: Daemon) -> None:
    before = signal.getsignal(signal.SIGTERM)
    main(["run", *ONE_TABLE])
    assert signal.getsignal(signal.SIGTERM) is before


# -- usage


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run", "--pg.tabel", "x"], "--pg.tabel"),
        (["rum"], "rum"),
        (["run", "--pg.url"], "--pg.url"),
        (["run", URL], "unexpected extra argument"),
        (["run", f"--pg.ulr={URL}"], "--pg.ulr"),
        (["demo", "--rows", "many"], "--rows"),
        (["config"], ""),
    ],
)
def test_a_usage_error_ends_with_2(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == ExitCode.USAGE
    out, err = output(capsys)
    assert named in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["run"], "source.url is not set"),
        (["run", *ONE_TABLE, "--http.port", "x"], "flag --http.port"),
        (["run", *ONE_TABLE, "--log.level", "loud"], "flag --log.level"),
        (["run", "--config", "/nowhere/c.toml"], "/nowhere/c.toml"),
        (["run", *ONE_TABLE, "--qdrant.distance-metric", "cosine"], "column=metric"),
        (["check"], "source.url is not set"),
        (["config", "show"], "source.url is not set"),
    ],
)
def test_wrong_settings_end_with_78(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == ExitCode.CONFIG
    _, err = output(capsys)
    assert err.startswith("error: ")
    assert named in err
    assert "\ntry: " in err


# -- secrets


def test_secrets_on_the_command_line_work_and_are_commented_on(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--pg.url", URL, "--pg.table", "t", "--qdrant.api-key", API_KEY]
    assert main(["run", *arguments]) == 0
    out, err = output(capsys)
    assert out == ""
    assert "CDC_SYNC_SOURCE__URL_FILE" in err
    assert "CDC_SYNC_QDRANT__API_KEY_FILE" in err


def test_without_secrets_there_is_no_hint(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDC_SYNC_QDRANT__API_KEY", API_KEY)
    assert main(["run", *ONE_TABLE]) == 0
    assert output(capsys) == ("", "")


@pytest.mark.parametrize(
    "error",
    [
        ConfigError(f"cannot use {API_KEY}"),
        SinkError(ErrorKind.SINK_AUTH, f"api-key {API_KEY}", f"url {URL}"),
        RuntimeError(f"{SECRET}"),
        UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, API_KEY),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["plain", "debug"])
def test_no_error_shows_a_secret(
    daemon: Daemon,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    debug: list[str],
) -> None:
    monkeypatch.setenv("CDC_SYNC_QDRANT__API_KEY", API_KEY)
    monkeypatch.setenv("CDC_SYNC_SOURCE__URL", URL)
    daemon.error = error
    assert main([*debug, "run", "--pg.table", "t"]) != 0
    output(capsys)


# -- check


def test_check_prints_findings_for_people(
    findings: list[Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    findings += [
        Finding("ok", "server", "PostgreSQL 16.3"),
        Finding("warning", "max_slot_wal_keep_size", "is -1", "ALTER SYSTEM\n  SET x = 1;"),
    ]
    assert main(["check", *ONE_TABLE]) == ExitCode.OK
    out, _ = output(capsys)
    assert out.splitlines() == [
        "ok       server                  PostgreSQL 16.3",
        "warning  max_slot_wal_keep_size  is -1",
        "         ALTER SYSTEM",
        "           SET x = 1;",
        "",
        "no errors, 1 warning",
    ]


def test_check_ends_with_the_code_of_the_first_error(
    findings: list[Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    findings += [
        Finding("warning", "a", "m", kind=ErrorKind.CONFIG),
        Finding("error", "b", "m", "r", ErrorKind.SOURCE_PERMISSION),
        Finding("error", "c", "m", "r", ErrorKind.SINK_UNAVAILABLE),
    ]
    assert main(["check", *ONE_TABLE]) == ExitCode.PERMISSION
    assert "2 errors, 1 warning" in output(capsys)[0]


def test_check_json_is_for_machines(
    findings: list[Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    findings += [
        Finding("ok", "server", "fine"),
        Finding("error", "tables", f"cannot use {URL}", "SELECT 1", ErrorKind.TABLE_UNUSABLE),
    ]
    assert main(["check", *ONE_TABLE, "--json"]) == ExitCode.CONFIG
    assert json.loads(output(capsys)[0]) == {
        "ok": False,
        "findings": [
            {
                "severity": "ok",
                "subject": "server",
                "message": "fine",
                "remedy": "",
                "kind": None,
            },
            {
                "severity": "error",
                "subject": "tables",
                "message": "cannot use postgresql://sync:***@db.invalid/app",
                "remedy": "SELECT 1",
                "kind": "table_unusable",
            },
        ],
    }


def test_a_check_that_breaks_off_is_a_finding(
    findings: list[Finding | CdcSyncError], capsys: pytest.CaptureFixture[str]
) -> None:
    findings.append(SourceError(ErrorKind.SOURCE_UNAVAILABLE, "cannot connect"))
    assert main(["check", *ONE_TABLE, "--json"]) == ExitCode.UNAVAILABLE
    (entry,) = json.loads(output(capsys)[0])["findings"]
    assert (entry["severity"], entry["message"]) == ("error", "cannot connect")
    assert entry["remedy"]


# -- demo


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[dict[str, object]] = []

    def run_demo(**options: object) -> int:
        calls.append(options)
        return 3

    module = ModuleType("cdc_sync.demo.run")
    module.run_demo = run_demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cdc_sync.demo.run", module)
    assert main(["demo"]) == 3
    arguments = ["--keep", "--rows", "5", "--directory", str(tmp_path), "--plain"]
    assert main(["demo", *arguments]) == 3
    assert calls == [
        {"keep": False, "rows": None, "directory": None, "plain": False},
        {"keep": True, "rows": 5, "directory": tmp_path, "plain": True},
    ]


# -- version, and the program as a whole


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    shown = dict(line.split(maxsplit=1) for line in output(capsys)[0].splitlines())
    assert shown["psycopg"] == metadata.version("psycopg")
    assert shown["qdrant-client"] == metadata.version("qdrant-client")
    assert re.fullmatch(r"\d+\.\d+", shown["libpq"])
    assert main(["version", "--json"]) == 0
    assert json.loads(output(capsys)[0]).keys() == shown.keys()


def test_the_module_can_be_run() -> None:
    done = python("-m", "cdc_sync", "check", CDC_SYNC_SOURCE__ULR=URL)
    assert done.returncode == ExitCode.CONFIG
    assert "did you mean CDC_SYNC_SOURCE__URL." in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_gone_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cdc_sync", "config", "init"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writer)
    assert done.stderr == ""
