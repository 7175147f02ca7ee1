"""``cdc-sync bench``: it measures, leaves nothing behind however it ends, and touches nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdc_sync.cli import main
from cdc_sync.config import Settings, SourceSettings
from cdc_sync.errors import ErrorKind, ExitCode, SourceError
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.measuring import connect_for_bench, discard_rows, drain_new_slot
from cdc_sync.qdrant import scratch
from cdc_sync.sync import bench
from cdc_sync.sync.bench_figures import Bounds
from cdc_sync.sync.bench_source import encoder, measure_copy
from cdc_sync.sync.planning import plan_pipeline
from tests.support.command_line import SECRET
from tests.support.daemon import write_config
from tests.support.fix_postgres import Database
from tests.support.least_privilege import least_privileged
from tests.support.qdrant_control import QdrantProcess, QdrantTarget
from tests.support.workload import create_everything_table, load

pytestmark = pytest.mark.usefixtures("clean_environment")

ROWS = 600
DOCS = f"""
CREATE TABLE docs (id bigint PRIMARY KEY, title text, price numeric, embedding vector(300));
CREATE TABLE small (id int PRIMARY KEY, embedding vector(3));
INSERT INTO docs SELECT i, 'title ' || i, i / 7.0, array_fill(i % 10, ARRAY[300])::vector
  FROM generate_series(1, {ROWS}) i;
INSERT INTO small SELECT i, '[1,2,3]' FROM generate_series(1, 20) i;
CREATE INDEX ON docs USING hnsw (embedding vector_l2_ops);
ANALYZE docs; ANALYZE small;
"""
FIGURES = {
    "copy_limit",
    "copy_unsent",
    "copy",
    "sink_limit",
    "stream_unsent",
    "stream",
    "updates_unsent",
    "updates",
}


@pytest.fixture(autouse=True)
def prefix(monkeypatch: pytest.MonkeyPatch) -> str:
    """How scratch collections of the test are named; on a shared server others may have theirs."""
    made = f"{scratch.PREFIX}{secrets.token_hex(4)}_"
    monkeypatch.setattr(scratch, "PREFIX", made)
    return made


@dataclasses.dataclass
class Bench:
    """Runs the command on a table ``docs`` with a configuration of its own."""

    directory: Path
    database: Database
    qdrant_url: str
    api_key: str | None = None
    pg_url: str | None = None
    tables: tuple[str, ...] = ("docs",)

    def config(self) -> Path:
        qdrant = {"url": self.qdrant_url} | ({"api_key": self.api_key} if self.api_key else {})
        return write_config(
            self.directory / "bench.toml",
            [{"name": name} for name in self.tables],
            source={"url": self.pg_url or self.database.url},
            qdrant=qdrant,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Its exit code, and what it printed."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main(["bench", "--config", str(self.config()), *arguments])
        return code, out.getvalue()

    def json(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        got, text = self.run("--json", "--rows", "400", "--seconds", "120", *arguments)
        content: dict[str, Any] = json.loads(text)
        assert got == code, text
        assert content["ok"] is (code == 0)
        return content

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """The command as a process of its own."""
        command = [sys.executable, "-m", "cdc_sync", "bench", "--config", str(self.config())]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CDC_SYNC_")}
        return subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )


@pytest.fixture
def docs(tmp_path: Path, database18: Database, qdrant: QdrantTarget) -> Bench:
    database18.execute(DOCS)
    return Bench(tmp_path, database18, qdrant.url, qdrant.api_key)


@pytest.fixture
def private(tmp_path: Path, database18: Database, qdrant_private: QdrantProcess) -> Bench:
    """With a server whose requests can be held and refused."""
    database18.execute(DOCS)
    return Bench(tmp_path, database18, qdrant_private.url, qdrant_private.api_key)


def scratch_of(target: QdrantTarget) -> list[str]:
    names = [one.name for one in target.client().get_collections().collections]
    return [name for name in names if name.startswith(scratch.PREFIX)]


def state_of(database: Database) -> list[tuple[object, ...]]:
    """The rows with their versions, and slots, publications and relations."""
    return database.execute(
        "SELECT (SELECT md5(string_agg(concat(xmin, xmax, ctid, id, title), ',' ORDER BY id))"
        "          FROM docs),"
        " (SELECT count(*) FROM pg_replication_slots WHERE database = current_database()),"
        " (SELECT count(*) FROM pg_publication), (SELECT count(*) FROM pg_class)"
    )


# -- what it says


def test_everything_is_measured_and_nothing_is_left(docs: Bench, qdrant: QdrantTarget) -> None:
    docs.tables = ("small", "docs")
    before = state_of(docs.database)
    found = docs.json()
    assert found["table"] == "public.docs"  # the larger one
    assert {figure["figure"] for figure in found["figures"]} == FIGURES
    for figure in found["figures"]:
        assert figure["rows"] >= 300, figure
        assert figure["rows_per_second"] > 0
        assert figure["bytes_per_second"] > 0
    assert found["sample_rows"] >= 300
    copy, stream = found["copy"], found["stream"]
    assert {table["table"]: table["rows"] for table in copy["tables"]} == {
        "public.docs": ROWS,
        "public.small": 20,
    }
    assert copy["seconds"] > 0
    assert copy["bottleneck"] in ("postgres", "cdc-sync", "qdrant", "waiting")
    assert copy["enough_workers"] >= 1
    # A vector of 300 dimensions and the rest of the row.
    assert stream["wal_bytes_per_row"] >= 1200
    assert stream["wal_bytes_per_row_from"] == "the size of the rows"
    expected = stream["rows_per_second"] * stream["wal_bytes_per_row"]
    assert stream["wal_bytes_per_second"] == pytest.approx(expected, rel=0.05)
    assert found["leftovers"] == found["findings"] == []
    assert scratch_of(qdrant) == []
    assert state_of(docs.database) == before


def test_the_text_says_the_same(docs: Bench) -> None:
    code, text = docs.run("--rows", "200", "--seconds", "120", "--table", "docs")
    assert code == 0
    for expected in (
        "public.docs, measured with up to",
        "COPY, read and dropped",
        "metadata updates into Qdrant",
        "the slow part:",
        "for about 600 rows in 1 table (estimates)",
        "could be followed",
    ):
        assert expected in text
    assert docs.database.url not in text


def test_seconds_bound_what_rows_do_not(docs: Bench, qdrant: QdrantTarget) -> None:
    found = docs.json("--seconds", "0.01")
    assert "copy_limit" in {figure["figure"] for figure in found["figures"]}
    assert scratch_of(qdrant) == []


def test_another_table_can_be_asked_for(docs: Bench) -> None:
    docs.tables = ("docs", "small")
    assert docs.json("--table", "public.small")["table"] == "public.small"
    (error,) = docs.json("--table", "nope", code=ExitCode.CONFIG)["findings"]
    assert "nope" in error["message"]
    assert "public.docs, public.small" in error["remedy"]


def test_an_embedded_database_is_measured_beside_the_one_in_use(
    docs: Bench, tmp_path: Path, qdrant: QdrantTarget
) -> None:
    path = tmp_path / "edge"
    docs.qdrant_url, docs.api_key = f"edge:{path}", None
    # There is none yet, and none is made.
    found = docs.json()
    assert {figure["figure"] for figure in found["figures"]} == FIGURES
    assert (found["copy"]["workers"], found["copy"]["enough_workers"]) == (1, 1)
    assert not path.exists()
    path.mkdir()
    with (path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert docs.json()["ok"] is True
    assert sorted(one.name for one in path.iterdir()) == ["lock"]


def test_a_table_without_rows(docs: Bench, qdrant: QdrantTarget) -> None:
    docs.database.execute("TRUNCATE docs")
    found = docs.json()
    assert (found["copy"], found["stream"]) == (None, None)
    (warning,) = found["findings"]
    assert "no row could be read" in warning["message"]


def test_a_table_without_vectors_has_no_updates_to_measure(docs: Bench) -> None:
    docs.database.execute(
        "CREATE TABLE plain (id int PRIMARY KEY, t text);"
        " INSERT INTO plain SELECT i, 'x' FROM generate_series(1, 400) i; ANALYZE plain"
    )
    docs.tables = ("plain",)
    found = docs.json()
    assert {figure["figure"] for figure in found["figures"]} == FIGURES - {
        "updates",
        "updates_unsent",
    }
    assert found["stream"]["updates_per_second"] is None


# -- the stream of a temporary slot


def writing(database: Database) -> Callable[[float], None]:
    """Passes the time in which changes gather, by making some."""

    def wait(seconds: float) -> None:
        database.execute("UPDATE docs SET price = price + 1 WHERE id <= 400")
        database.execute("INSERT INTO small SELECT i, '[1,2,3]' FROM generate_series(21, 120) i")

    return wait


def test_a_temporary_slot_shows_the_drain_limit(
    docs: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rights of the daemon, which are enough for all of it."""
    docs.tables = ("docs", "small")
    role = least_privileged(docs.database, [{"name": name} for name in docs.tables])
    docs.pg_url = role.url
    patched = functools.partial(drain_new_slot, wait=writing(docs.database))
    monkeypatch.setattr(bench, "drain_new_slot", patched)
    found = docs.json("--temporary-slot")
    drained = next(one for one in found["figures"] if one["figure"] == "drain_limit")
    assert drained["rows"] == 500
    assert found["stream"]["wal_bytes_per_row_from"] == "the stream"
    assert found["stream"]["wal_bytes_per_row"] > 50
    ((slots,),) = docs.database.execute(
        "SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE 'cdc_sync_bench_%'"
        " AND NOT temporary"
    )
    assert slots == 0


@pytest.mark.campaign
def test_a_temporary_slot_on_every_version(protocol_database: Database) -> None:
    protocol_database.execute("CREATE TABLE t (id int PRIMARY KEY, v text)")
    protocol_database.execute("CREATE PUBLICATION p FOR TABLE t")
    source = SourceSettings.model_validate({"url": protocol_database.url})

    def wait(seconds: float) -> None:
        ((temporary,),) = protocol_database.execute(
            "SELECT temporary FROM pg_replication_slots WHERE database = current_database()"
        )
        assert temporary is True
        protocol_database.execute("INSERT INTO t SELECT i, 'x' FROM generate_series(1, 7) i")
        protocol_database.execute("DELETE FROM t WHERE id > 5")

    drained = drain_new_slot(source, "p", 120.0, wait)
    assert (drained.rows, drained.updates) == (9, 2)
    assert drained.wal_bytes > drained.bytes > 0
    assert drained.seconds > 0


def test_a_quiet_server_has_no_drain_limit(docs: Bench) -> None:
    docs.database.execute("CREATE PUBLICATION cdc_sync FOR TABLE docs")
    (warning,) = docs.json("--temporary-slot", "--seconds", "0.5")["findings"]
    assert "0 changes" in warning["message"]
    assert "--seconds" in warning["remedy"]


def test_without_a_publication_no_slot_is_made(docs: Bench) -> None:
    (warning,) = docs.json("--temporary-slot")["findings"]
    assert "publication cdc_sync does not exist" in warning["message"]


def test_a_slot_that_waits_for_writers_is_given_up(docs: Bench) -> None:
    docs.database.execute("CREATE PUBLICATION cdc_sync FOR TABLE docs")
    source = SourceSettings.model_validate({"url": docs.database.url})
    with docs.database.connect(autocommit=False) as other:
        other.execute("INSERT INTO small VALUES (999, NULL)")
        with pytest.raises(SourceError) as caught:
            drain_new_slot(source, "cdc_sync", 0.2)
        other.rollback()
    assert caught.value.kind is ErrorKind.SLOT_BUSY


# -- Postgres in bad moods


def test_a_locked_table_is_waited_for_only_so_long(docs: Bench) -> None:
    with docs.database.connect(autocommit=False) as other:
        other.execute("LOCK TABLE docs IN ACCESS EXCLUSIVE MODE")
        (error,) = docs.json("--seconds", "0.3", code=ExitCode.TEMPORARY)["findings"]
        other.rollback()
    assert error["kind"] == "table_locked"


def test_a_slow_query_ends_with_its_time(docs: Bench) -> None:
    settings = Settings.model_validate(
        {"source": {"url": docs.database.url}, "tables": [{"name": "docs"}]}
    )
    with connect_for_bench(settings.source, 5.0) as connection:
        (planned,) = plan_pipeline(connection, settings).tables
        slow = dataclasses.replace(planned, row_filter="pg_sleep(0.02) IS NOT NULL")
        limit, unsent, sample = measure_copy(
            connection, slow, Bounds(100_000, 0.5), encoder(planned.plan, "http://x")
        )
        # 600 rows would take twelve seconds.
        assert max(limit.rows, unsent.rows, len(sample.points)) < ROWS
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_the_session_can_write_nothing(docs: Bench) -> None:
    source = SourceSettings.model_validate({"url": docs.database.url})
    with connect_for_bench(source, 5.0) as connection:
        with pytest.raises(SourceError, match="read-only"):
            discard_rows(connection, "INSERT INTO public.small VALUES (1000, NULL) RETURNING id")
        rows, size = discard_rows(connection, "SELECT id FROM public.docs")
    assert rows == ROWS
    assert size > ROWS * 8
    with connect(source) as other:
        assert other.execute("SELECT count(*) FROM public.small").fetchone() == (20,)


def test_a_server_that_is_away_is_said(docs: Bench) -> None:
    docs.pg_url = f"postgresql://nobody:{SECRET}@127.0.0.1:1/none"
    found = docs.json(code=ExitCode.UNAVAILABLE)
    assert [finding["subject"] for finding in found["findings"]] == ["postgres"]
    assert found["figures"] == []
    code, text = docs.run()
    assert (code, text.partition(" ")[0]) == (ExitCode.UNAVAILABLE, "error")
    assert SECRET not in json.dumps(found) + text


# -- Qdrant in bad moods


def test_without_qdrant_postgres_is_measured(docs: Bench, qdrant: QdrantTarget) -> None:
    docs.qdrant_url = "http://127.0.0.1:1"
    found = docs.json(code=ExitCode.UNAVAILABLE)
    assert {figure["figure"] for figure in found["figures"]} == {
        "copy_limit",
        "copy_unsent",
        "stream_unsent",
        "updates_unsent",
    }
    assert (found["copy"], found["stream"]) == (None, None)


@pytest.mark.parametrize("operation", ["Upsert", "CreateFieldIndex", "Collections.Create"])
def test_nothing_is_left_after_an_error(
    private: Bench, qdrant_private: QdrantProcess, operation: str
) -> None:
    private.database.execute("CREATE INDEX ON docs (title)")
    qdrant_private.script.reject(operation, "INTERNAL", "no", times=1)
    found = private.json(code=ExitCode.UNAVAILABLE)
    assert [finding["subject"] for finding in found["findings"]] == ["qdrant"]
    assert scratch_of(qdrant_private) == []


def test_a_collection_that_cannot_be_removed_is_named(
    private: Bench, qdrant_private: QdrantProcess, prefix: str
) -> None:
    script = qdrant_private.script
    script.reject("Upsert", "INTERNAL", "no", times=1)
    original = scratch.Scratch.remove

    async def remove(self: scratch.Scratch) -> None:
        script.reject("Collections.Delete", "UNAVAILABLE", "gone", times=1)
        await original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scratch.Scratch, "remove", remove)
        (error,) = private.json(code=ExitCode.UNAVAILABLE)["findings"]
    (name,) = scratch_of(qdrant_private)
    assert name in error["message"]
    assert "--remove-leftovers" in error["remedy"]
    assert private.run("--remove-leftovers") == (0, f"removed {name}\n")
    assert scratch_of(qdrant_private) == []
    assert private.run("--remove-leftovers") == (0, "nothing was left\n")


# -- however it ends


def held(target: QdrantProcess, process: subprocess.Popen[str]) -> None:
    """Wait until a request of the process is held."""
    deadline = time.monotonic() + 60
    while not target.script.held():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def all_scratch(target: QdrantTarget) -> list[str]:
    names = [one.name for one in target.client().get_collections().collections]
    return [name for name in names if name.startswith("_cdc_sync_bench_")]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_nothing_is_left_after_a_signal(
    private: Bench, qdrant_private: QdrantProcess, number: int, code: int
) -> None:
    script = qdrant_private.script
    script.hold("Upsert", times=100)
    process = private.start("--seconds", "60")
    held(qdrant_private, process)
    assert len(all_scratch(qdrant_private)) == 1
    process.send_signal(number)
    time.sleep(0.2)
    script.clear()
    script.release()
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert all_scratch(qdrant_private) == []


def test_what_a_kill_leaves_is_named_and_removed(
    private: Bench, qdrant_private: QdrantProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "PREFIX", "_cdc_sync_bench_")
    script = qdrant_private.script
    script.hold("Upsert", times=100)
    process = private.start("--seconds", "60")
    held(qdrant_private, process)
    process.kill()
    process.communicate()
    script.clear()
    script.release()
    (name,) = all_scratch(qdrant_private)
    found = private.json()
    assert found["leftovers"] == [name]
    assert all_scratch(qdrant_private) == [name]
    _, text = private.run("--rows", "50")
    assert f"leftovers     {name}" in text
    assert private.run("--remove-leftovers") == (0, f"removed {name}\n")
    assert all_scratch(qdrant_private) == []


def test_what_a_kill_leaves_beside_an_embedded_database(
    docs: Bench, tmp_path: Path, prefix: str
) -> None:
    path = tmp_path / "edge"
    path.mkdir()
    docs.qdrant_url, docs.api_key = f"edge:{path}", None
    left, busy = path / f"{prefix}left", path / f"{prefix}busy"
    for one in (left, busy):
        (one / "collections").mkdir(parents=True)
    with (busy / "lock").open("w") as lock:
        # Another bench is under way.
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert docs.json()["leftovers"] == [str(left)]
        assert docs.run("--remove-leftovers") == (0, f"removed {left}\n")
    assert [one.name for one in path.iterdir()] == [busy.name]


def test_columns_of_every_type(docs: Bench, tmp_path: Path) -> None:
    """In the stream that is made of rows they come out as in the copy: no point is refused."""
    with docs.database.connect() as connection:
        table = create_everything_table(connection, "everything", dim=16, key="composite")
        load(connection, table, 60)
        connection.execute("ANALYZE everything")
    docs.tables = ("everything",)
    for url, key in ((docs.qdrant_url, docs.api_key), (f"edge:{tmp_path / 'edge'}", None)):
        docs.qdrant_url, docs.api_key = url, key
        found = docs.json()
        assert {figure["figure"]: figure["rows"] for figure in found["figures"]} == dict.fromkeys(
            FIGURES, 60
        )
        assert found["findings"] == []
