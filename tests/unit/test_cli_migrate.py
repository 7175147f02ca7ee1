"""``cdc-sync migrate``: command lines written for Qdrant's own tool, our own flags, and what is
printed at the end."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass, field
from types import ModuleType

import pytest

from cdc_sync.cli import main
from cdc_sync.cli.official import libpq_url, with_port
from cdc_sync.config import Settings
from cdc_sync.errors import ErrorKind, ExitCode, SourceError
from cdc_sync.postgres.counting import LeafCount
from cdc_sync.sync.summary import CopySummary, Counts, TableSummary
from tests.support.command_line import API_KEY, ONE_TABLE, SECRET, URL, output

pytestmark = pytest.mark.usefixtures("clean_environment")

#: The example of that tool's own README, with every flag that it has for Postgres.
OFFICIAL = (
    "--pg.url", URL, "--pg.table", "your_table", "--pg.key-column", "id",
    "--pg.columns", "id,title,embedding",
    "--qdrant.url", "http://target:6334", "--qdrant.api-key", API_KEY,
    "--qdrant.collection", "target-collection",
    "--qdrant.distance-metric", "embedding=dot;other=euclid",
    "--migration.batch-size", "64", "--migration.num-workers=4", "--migration.restart",
    "--migration.create-collection=false", "--migration.offsets-collection", "_offsets",
    "--migration.batch-delay", "20",
)  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """As :class:`cdc_sync.sync.migrate.SlotAfter`, whose module is replaced here."""

    name: str = "cdc_sync"
    publication: str = "cdc_sync"
    kept: bool = True
    publication_kept: bool = True
    retained_bytes: int | None = 5_000_000
    wal_limit_bytes: int | None = None

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "kept": self.kept}


@dataclass
class Result:
    exit_code: int = 0
    summary: CopySummary | None = None
    slot: Slot | None = None


@dataclass
class Engine:
    """Stands in for the migration: records what it was started with."""

    result: Result = field(default_factory=Result)
    error: BaseException | None = None
    settings: list[Settings] = field(default_factory=list)
    options: list[tuple[bool, bool]] = field(default_factory=list)

    def migrate(self, settings: Settings, *, restart: bool, remove: bool) -> Result:
        self.settings.append(settings)
        self.options.append((restart, remove))
        if self.error is not None:
            raise self.error
        return self.result


def counts(rows: int, points: int, agree: bool | None, meaning: str = "equal") -> Counts:
    return Counts(rows, points, agree, meaning)


def summary(*tables: Counts) -> CopySummary:
    return CopySummary(
        tuple(
            TableSummary(f"public.t{i}", f"t{i}", 1200, 1200, 4_000_000, 2.0, 3, 1, counted)
            for i, counted in enumerate(tables)
        ),
        2.0,
        7,
    )


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine(Result(0, summary(counts(1200, 1200, True)), Slot()))
    module = ModuleType("cdc_sync.sync.migrate")
    module.migrate = made.migrate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cdc_sync.sync.migrate", module)
    return made


# -- command lines of the official tool


@pytest.mark.parametrize("word", [["pg"], []], ids=["pg", "without"])
def test_a_command_line_of_the_official_tool_works_unchanged(
    engine: Engine, capsys: pytest.CaptureFixture[str], word: list[str]
) -> None:
    assert main(["migrate", *word, *OFFICIAL]) == 0
    (settings,) = engine.settings
    (table,) = settings.tables
    assert settings.source.url.get_secret_value() == URL
    assert (table.name, table.key, table.collection) == ("your_table", ["id"], "target-collection")
    assert table.columns == ["id", "title", "embedding"]
    assert table.metrics == {"embedding": "dot", "other": "euclid"}
    assert settings.qdrant.url == "http://target:6334"
    assert settings.qdrant.api_key is not None
    assert settings.qdrant.api_key.get_secret_value() == API_KEY
    migration = settings.migration
    assert (migration.batch_size, migration.num_workers, migration.batch_delay) == (64, 4, 20)
    assert migration.create_collection is False
    assert engine.options == [(True, False)]
    _, err = output(capsys)
    assert "note: --migration.offsets-collection has no effect" in err


def test_globals_of_the_official_tool_stand_before_or_after_the_word(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.error = SourceError(ErrorKind.SOURCE_UNAVAILABLE, "away")
    line = ["migrate", "--debug", "--skip-tls-verification", "pg", *ONE_TABLE, "--trace"]
    assert main(line) == ExitCode.UNAVAILABLE
    _, err = output(capsys)
    assert "Traceback" in err
    assert "--skip-tls-verification has no effect: certificates are always verified" in err
    assert "note: --trace" in err


@pytest.mark.parametrize(
    ("arguments", "restart", "create", "adopt"),
    [
        ([], False, True, False),
        (["--migration.restart"], True, True, False),
        (["--migration.restart=true"], True, True, False),
        (["--migration.restart=false"], False, True, False),
        (["--migration.restart=NO", "-c"], False, True, False),
        (["--migration.create-collection"], False, True, False),
        (["--migration.create-collection=False"], False, False, False),
        (["--migration.create-collection=0"], False, False, False),
        (["--no-migration.create-collection"], False, False, False),
        (["--migration.adopt"], False, True, True),
        (["--adopt=yes"], False, True, True),
        (["--adopt", "--no-migration.adopt"], False, True, False),
    ],
)
def test_switches_take_a_value_or_none(
    engine: Engine, arguments: list[str], restart: bool, create: bool, adopt: bool
) -> None:
    assert main(["migrate", "pg", *ONE_TABLE, *arguments]) == 0
    (settings,) = engine.settings
    assert engine.options == [(restart, False)]
    assert settings.migration.create_collection is create
    assert settings.migration.adopt is adopt


def test_a_switch_that_is_not_given_leaves_the_file_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDC_SYNC_MIGRATION__CREATE_COLLECTION", "false")
    assert main(["migrate", *ONE_TABLE]) == 0
    assert main(["migrate", *ONE_TABLE, "-c"]) == 0
    assert [s.migration.create_collection for s in engine.settings] == [False, True]


@pytest.mark.parametrize("value", ["maybe", "", "2"])
def test_a_switch_with_another_value_is_a_usage_error(
    engine: Engine, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    arguments = ["migrate", *ONE_TABLE, f"--migration.create-collection={value}"]
    assert main(arguments) == ExitCode.USAGE
    assert "expected true or false" in output(capsys)[1]
    assert engine.settings == []


@pytest.mark.parametrize("short", [["-b", "64"], ["-b64"], ["--migration.batch-size=64"]])
def test_the_short_flag_of_the_batch_size(engine: Engine, short: list[str]) -> None:
    assert main(["migrate", "pg", *ONE_TABLE, *short]) == 0
    assert engine.settings[0].migration.batch_size == 64


@pytest.mark.parametrize(
    "arguments",
    [
        ["--qdrant.distance-metric=a=dot;b=cosine"],
        ["--qdrant.distance-metric", "a=dot", "--qdrant.distance-metric", "b=cosine"],
        ["--qdrant.distance-metric", "a=dot,b=cosine"],
        ["--qdrant.distance-metric", "a=DOT; b = Cosine;"],
    ],
)
def test_metrics_in_every_form(engine: Engine, arguments: list[str]) -> None:
    assert main(["migrate", *ONE_TABLE, *arguments]) == 0
    assert engine.settings[0].tables[0].metrics == {"a": "dot", "b": "cosine"}


@pytest.mark.parametrize(
    ("arguments", "columns"),
    [
        (["--pg.columns", "a,b"], ["a", "b"]),
        (["--pg.columns=a", "--pg.columns=b"], ["a", "b"]),
        (["--pg.columns", r"a\,b,c\d"], ["a,b", r"c\d"]),
        (["--pg.columns", '"a,b", c'], ["a,b", "c"]),
    ],
)
def test_columns_in_every_form(engine: Engine, arguments: list[str], columns: list[str]) -> None:
    assert main(["migrate", *ONE_TABLE, *arguments]) == 0
    assert engine.settings[0].tables[0].columns == columns


def test_our_own_flags(engine: Engine) -> None:
    arguments = [
        "--pg.key-column", "tenant,id", "--pg.where", "deleted_at IS NULL",
        "--source.slot", "s1", "--source.publication", "P 1", "--migration.window", "2.5",
        "--migration.executor", "ray", "--migration.ids", "qdrant-migration",
        "--migration.drop-slot",
    ]  # fmt: skip
    line = ["--pg.url", URL, "--pg.table", 'app."My Docs"', *arguments]
    assert main(["migrate", *line]) == 0
    (settings,) = engine.settings
    (table,) = settings.tables
    assert (table.name, table.key) == ('app."My Docs"', ["tenant", "id"])
    assert (table.where, table.ids) == ("deleted_at IS NULL", "qdrant-migration")
    assert (settings.source.slot, settings.source.publication) == ("s1", "P 1")
    assert (settings.migration.window_seconds, settings.migration.executor) == (2.5, "ray")
    assert engine.options == [(False, True)]


def test_another_source_is_refused(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", "chroma", *ONE_TABLE]) == ExitCode.USAGE
    assert "'chroma' is no source; the only one is pg" in output(capsys)[1]
    assert main(["migrate", "pg", *ONE_TABLE, "more"]) == ExitCode.USAGE
    assert engine.settings == []


def test_the_version_and_the_help_are_asked_for_as_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["migrate", "--version"]) == 0
    assert output(capsys)[0].startswith("cdc-sync ")
    assert main(["migrate", "-h"]) == 0
    assert "Usage: cdc-sync migrate" in output(capsys)[0]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("http://h", "http://h:80"),
        ("https://h", "https://h:443"),
        ("https://[::1]/", "https://[::1]:443/"),
        ("http://h:6334", "http://h:6334"),
        ("edge:/tmp/x", "edge:/tmp/x"),
        ("http://h:x", "http://h:x"),
    ],
)
def test_a_port_that_is_left_out_is_that_of_the_official_tool_after_its_word(
    engine: Engine, capsys: pytest.CaptureFixture[str], given: str, read: str
) -> None:
    assert with_port(given)[0] == read
    assert main(["migrate", "pg", *ONE_TABLE, "--qdrant.url", given]) == 0
    assert main(["migrate", *ONE_TABLE, "--qdrant.url", given]) == 0
    assert [s.qdrant.url for s in engine.settings] == [read, given]
    assert ("names no port" in output(capsys)[1]) == (given != read)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("postgres://u@h/d?sslmode=disable", "postgres://u@h/d?sslmode=disable"),
        (
            "postgres://u@h/d?search_path=app&sslmode=disable",
            "postgres://u@h/d?sslmode=disable&options=-c%20search_path%3Dapp",
        ),
        ("postgres://u@h/d?pool_max_conns=3&default_query_exec_mode=exec", "postgres://u@h/d"),
        (
            "postgresql://h/d?options=-c%20a%3Db&search_path=a%20b",
            "postgresql://h/d?options=-c%20a%3Db%20-c%20search_path%3Da%5C%20b",
        ),
        ("postgres://u:p?x=1@h/d", "postgres://u:p?x=1@h/d"),
        ("host=h dbname=d", "host=h dbname=d"),
        ("postgres://h/d?sea rch=1", "postgres://h/d?sea rch=1"),
    ],
)
def test_urls_of_the_go_driver(given: str, read: str) -> None:
    assert libpq_url(given) == read


# -- the end


def test_the_summary_and_the_slot_that_stays(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["migrate", "pg", *OFFICIAL]
    assert main(line) == 0
    out, err = output(capsys)
    header, row = out.splitlines()
    assert row.split() == [
        "public.t0", "t0", "1,200", "4.0", "MB", "2.0", "s", "600", "rows/s", "3", "1", "1,200",
        "1,200", "equal",
    ]  # fmt: skip
    assert header.split()[:3] == ["table", "collection", "copied"]
    assert "WARNING: the replication slot cdc_sync stays" in err
    assert "5.0 MB now" in err
    assert "until the disk of Postgres is full" in err
    run, again = (
        shlex.split(text.strip()) for text in err.splitlines() if text.startswith("    cdc-sync")
    )
    assert run[:2] == ["cdc-sync", "run"]
    assert again[:2] == ["cdc-sync", "migrate"]
    assert again[-1] == "--migration.drop-slot"
    assert not {"--migration.restart", "--migration.offsets-collection", "_offsets", "pg"} & {
        *run, *again,
    }  # fmt: skip
    assert run[run.index("--pg.url") + 1] == "postgresql://sync:***@db.invalid/app"


def test_the_command_to_go_on_is_one_that_run_takes(
    engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ["--pg.url", "postgresql://h/d", "--pg.table", "pg", "--pg.columns", "migrate"]
    switches = ["--json", "-c", "--adopt", "--migration.offsets-collection=x", "--debug"]
    assert main(["--debug", "migrate", *switches, "pg", *table]) == 0
    err = output(capsys)[1]
    line = next(text for text in err.splitlines() if "cdc-sync run" in text)
    started: list[Settings] = []

    def run_pipeline(settings: Settings, *, restart: bool) -> int:
        started.append(settings)
        return 0

    module = ModuleType("cdc_sync.sync.daemon")
    module.run_pipeline = run_pipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cdc_sync.sync.daemon", module)
    assert main(shlex.split(line)[1:]) == 0
    assert started == engine.settings


def test_a_limited_slot_says_so(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.result.slot = Slot(wal_limit_bytes=10**9)
    assert main(["migrate", *ONE_TABLE]) == 0
    assert "up to 1.0 GB (max_slot_wal_keep_size), past which the slot is lost" in output(capsys)[1]


def test_a_slot_that_was_removed_is_no_warning(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.result.slot = Slot(kept=False, publication_kept=False)
    assert main(["migrate", *ONE_TABLE, "--migration.drop-slot"]) == 0
    out, err = output(capsys)
    assert err == ""
    assert out.endswith(
        "Removed: slot cdc_sync, publication cdc_sync, and the records of this pipeline.\n"
    )


def test_json_is_all_there_is_on_standard_output(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    leaves = (LeafCount("public.t0_a", 700), LeafCount("public.t0_b", 500))
    engine.result.summary = summary(
        Counts(1200, 1200, True, "equal", leaves), counts(7, 5, False, "2 rows have no point")
    )
    engine.result.exit_code = ExitCode.DIFFERENCES
    assert main(["migrate", *ONE_TABLE, "--json"]) == ExitCode.DIFFERENCES
    out, err = output(capsys)
    shown = json.loads(out)
    assert "WARNING" in err
    assert shown["exit_code"] == 3
    assert shown["total"] == {
        "tables": 2, "rows": 2400, "points": 1205, "bytes": 8_000_000, "seconds": 2.0,
        "rows_per_second": 1200.0, "retries": 7, "dead_letters": 2, "source_rows": 1207,
        "agree": False,
    }  # fmt: skip
    first, second = shown["tables"]
    assert first["partitions"] == [
        {"name": "public.t0_a", "source_rows": 700},
        {"name": "public.t0_b", "source_rows": 500},
    ]
    assert (second["agree"], second["meaning"]) == (False, "2 rows have no point")


def test_what_does_not_agree_is_explained(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.result.summary = summary(
        counts(7, 5, False, "2 rows have no point"), counts(9, 8, None, "being written")
    )
    main(["migrate", *ONE_TABLE])
    lines = output(capsys)[0].splitlines()
    assert lines[1].endswith("DIFFERENT")
    assert lines[2].endswith("being written")
    assert lines[3].split()[0] == "all"
    assert lines[4:] == ["public.t0: 2 rows have no point.", "public.t1: being written."]


def test_a_migration_that_was_stopped_says_how_to_go_on(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.result = Result(130)
    assert main(["migrate", *ONE_TABLE]) == 130
    out, err = output(capsys)
    assert out == ""
    assert "Run the same command again" in err


def test_no_secret_in_what_is_printed_at_the_end(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--pg.url={URL}", "--pg.table", "t", f"--qdrant.api-key={API_KEY}"]
    assert main(["migrate", *arguments]) == 0
    assert SECRET not in "".join(output(capsys))
