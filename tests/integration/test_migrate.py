"""``cdc-sync migrate`` as a process: it copies, catches up and ends, and ``run`` goes on from
there."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cdc_sync.errors import ExitCode
from cdc_sync.mapping.table import Leaf
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.counting import changes_waiting, count_rows, expect_rows
from tests.support.daemon import Daemon
from tests.support.fix_postgres import Database
from tests.support.oracle import assert_equal
from tests.support.pipeline_task import pipeline_settings
from tests.support.qdrant_control import QdrantProcess, QdrantTarget

_SECONDS = 60.0


@dataclass
class Ended:
    """A migration that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.out)
        return shown

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]


@dataclass
class Source:
    """A database and where it is to be migrated to, as command lines."""

    database: Database
    qdrant: QdrantTarget
    collection: str

    def arguments(self, *more: str, table: str = "docs") -> list[str]:
        key = ["--qdrant.api-key", self.qdrant.api_key] if self.qdrant.api_key else []
        return [
            "--pg.url", self.database.url, "--pg.table", table,
            "--qdrant.url", self.qdrant.url, "--qdrant.collection", self.collection, *key,
            "--source.slot", self.slot, "--source.publication", self.slot,
            "--pipeline.name", self.slot, "--http.port", "0", *more,
        ]  # fmt: skip

    @property
    def slot(self) -> str:
        return f"m_{self.database.name}"[:60]

    def start(self, *more: str, table: str = "docs", **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable, "-m", "cdc_sync", "migrate", "pg",
                *self.arguments(*more, table=table),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("CDC_SYNC_")} | environ,
            start_new_session=True,
        )  # fmt: skip

    def migrate(self, *more: str, table: str = "docs", **environ: str) -> Ended:
        with self.start(*more, table=table, **environ) as process:
            try:
                out, err = process.communicate(timeout=_SECONDS)
            finally:
                process.kill()
        return Ended(process.returncode, out, err)

    def slots(self) -> list[tuple[object, ...]]:
        return self.database.execute(
            "SELECT slot_name, active FROM pg_replication_slots WHERE database = current_database()"
        )

    def publications(self) -> list[object]:
        return [name for (name,) in self.database.execute("SELECT pubname FROM pg_publication")]

    def assert_equal(self, table: str = "docs") -> None:
        assert_equal(
            self.database.url,
            table,
            qdrant_url=self.qdrant.url,
            collection=self.collection,
            api_key=self.qdrant.api_key,
        )


def fill(database: Database, rows: int, table: str = "docs") -> None:
    database.execute(
        f"CREATE TABLE {table} (id bigint PRIMARY KEY, note text, emb vector(3));"
        f"INSERT INTO {table} SELECT i, 'note ' || i, ARRAY[i, 1, 2]::vector"
        f"  FROM generate_series(1, {rows}) i"
    )


@pytest.fixture
def source(database18: Database, qdrant: QdrantTarget) -> Source:
    return Source(database18, qdrant, qdrant.new_collection_name())


@contextmanager
def daemon(source: Source, tmp_path: Path, table: str = "docs") -> Iterator[Daemon]:
    with Daemon(
        tmp_path,
        pg_url=source.database.url,
        qdrant_url=source.qdrant.url,
        api_key=source.qdrant.api_key,
        tables=[{"name": table, "collection": source.collection}],
        slot=source.slot,
    ) as made:
        yield made


# -- from start to end


def test_a_migration_ends_and_run_goes_on_without_a_gap(source: Source, tmp_path: Path) -> None:
    fill(source.database, 500)
    ended = source.migrate()
    assert ended.code == 0, ended.err
    source.assert_equal()
    assert source.slots() == [(source.slot, False)]
    assert "WARNING: the replication slot" in ended.err
    assert "equal" in ended.out.splitlines()[1]
    source.database.execute(
        "UPDATE docs SET note = 'x' WHERE id < 10; DELETE FROM docs WHERE id = 9"
    )
    with daemon(source, tmp_path) as follower:
        follower.start()
        follower.wait_caught_up()
        source.assert_equal()
        assert not [e for e in follower.events() if e["event"] == "copy_started"]


def test_the_summary_counts_both_sides_exactly(source: Source) -> None:
    fill(source.database, 1234)
    ended = source.migrate("--json")
    assert ended.code == 0, ended.err
    (table,) = ended.json["tables"]
    assert (table["rows"], table["points"], table["source_rows"]) == (1234, 1234, 1234)
    assert table["agree"] is True
    assert table["bytes"] > 1234 * 12
    assert table["seconds"] > 0
    assert table["rows_per_second"] > 0
    assert (table["retries"], table["dead_letters"]) == (0, 0)
    assert ended.json["slot"]["kept"] is True
    assert ended.json["slot"]["retained_bytes"] >= 0


def test_counts_are_of_every_partition(source: Source) -> None:
    source.database.execute(
        "CREATE TABLE docs (id bigint, part int, emb vector(3), PRIMARY KEY (part, id))"
        "  PARTITION BY LIST (part);"
        "CREATE TABLE docs_a PARTITION OF docs FOR VALUES IN (1);"
        "CREATE TABLE docs_b PARTITION OF docs FOR VALUES IN (2) PARTITION BY RANGE (id);"
        "CREATE TABLE docs_b1 PARTITION OF docs_b FOR VALUES FROM (0) TO (1000);"
        "CREATE TABLE docs_c PARTITION OF docs DEFAULT;"
        "INSERT INTO docs SELECT i, 1 + (i % 7 = 0)::int, '[1,2,3]' FROM generate_series(1, 700) i"
    )
    ended = source.migrate("--json")
    assert ended.code == 0, ended.err
    (table,) = ended.json["tables"]
    assert {p["name"]: p["source_rows"] for p in table["partitions"]} == {
        "public.docs_a": 600, "public.docs_b1": 100, "public.docs_c": 0,
    }  # fmt: skip
    assert (table["source_rows"], table["points"], table["agree"]) == (700, 700, True)


def test_a_second_migration_copies_nothing_and_catches_up(source: Source) -> None:
    fill(source.database, 300)
    assert source.migrate().code == 0
    source.database.execute("DELETE FROM docs WHERE id <= 100; UPDATE docs SET note = 'y'")
    ended = source.migrate("--json")
    assert ended.code == 0, ended.err
    (table,) = ended.json["tables"]
    assert (table["seconds"], table["source_rows"], table["points"]) == (None, 200, 200)
    source.assert_equal()


def test_a_migration_under_writes_ends(source: Source) -> None:
    fill(source.database, 3000)
    finish = threading.Event()

    def write() -> None:
        with source.database.connect() as connection:
            number = 10_000
            while not finish.is_set():
                number += 1
                connection.execute("INSERT INTO docs VALUES (%s, 'w', '[1,2,3]')", (number,))
                connection.execute("DELETE FROM docs WHERE id = %s", (number - 9_999,))
                time.sleep(0.002)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        ended = source.migrate("--json", "--migration.window", "0.5")
    finally:
        finish.set()
        writer.join()
    assert ended.code == 0, ended.err
    (table,) = ended.json["tables"]
    assert table["agree"] is not False
    # The rest is in the slot.
    assert source.migrate().code == 0
    source.assert_equal()


def test_restart_copies_again(source: Source) -> None:
    fill(source.database, 50)
    assert source.migrate().code == 0
    ended = source.migrate("--json", "--migration.restart")
    assert ended.code == 0, ended.err
    assert ended.json["tables"][0]["rows"] == 50
    source.assert_equal()


# -- the names that the official tool takes


@pytest.mark.parametrize("name", ["My.Docs", "my-docs"])
def test_a_table_is_found_by_its_bare_name_as_that_tool_finds_it(source: Source, name: str) -> None:
    fill(source.database, 20, f'"{name}"')
    ended = source.migrate(table=name)
    assert ended.code == 0, ended.err
    source.assert_equal(f'"{name}"')


def test_a_name_as_in_sql_comes_first(source: Source) -> None:
    fill(source.database, 20, '"Docs"')
    fill(source.database, 30, "docs")
    ended = source.migrate("--json", table="Docs")
    assert ended.json["tables"][0]["rows"] == 30


def test_the_schema_in_the_search_path_of_the_url(source: Source) -> None:
    source.database.execute("CREATE SCHEMA app")
    fill(source.database, 20, "app.docs")
    mark = "&" if "?" in source.database.url else "?"
    url = f"{source.database.url}{mark}search_path=app,public"
    ended = source.migrate("--json", "--pg.url", url)
    assert ended.code == 0, ended.err
    assert ended.json["tables"][0]["table"] == "app.docs"


def test_a_schema_qualified_name_and_a_composite_key(source: Source) -> None:
    source.database.execute(
        'CREATE SCHEMA "App"; CREATE TABLE "App"."Docs" (tenant int, "Id" text, emb vector(2),'
        ' PRIMARY KEY ("Id", tenant));'
        """INSERT INTO "App"."Docs" SELECT 1, 'k' || i, '[1,2]' FROM generate_series(1, 9) i"""
    )
    ended = source.migrate("--json", "--pg.key-column", "tenant,Id", table='"App"."Docs"')
    assert ended.code == 0, ended.err
    assert ended.json["tables"][0]["points"] == 9


# -- what stays


def test_drop_slot_leaves_nothing_behind(source: Source) -> None:
    fill(source.database, 40)
    ended = source.migrate("--migration.drop-slot")
    assert ended.code == 0, ended.err
    assert source.slots() == []
    assert source.publications() == []
    assert "Removed: slot" in ended.out
    assert "WARNING" not in ended.err
    source.assert_equal()


def test_drop_slot_leaves_a_publication_that_is_not_ours(source: Source) -> None:
    fill(source.database, 40)
    source.database.execute(f"CREATE PUBLICATION {source.slot} FOR TABLE docs")
    ended = source.migrate("--json", "--migration.drop-slot")
    assert ended.code == 0, ended.err
    assert source.slots() == []
    assert source.publications() == [source.slot]
    assert ended.json["slot"]["publication_kept"] is True


def test_what_an_earlier_migration_left_is_removed_by_the_next(source: Source) -> None:
    fill(source.database, 40)
    assert source.migrate().code == 0
    assert source.publications() == [source.slot]
    assert source.migrate("--migration.drop-slot").code == 0
    assert (source.slots(), source.publications()) == ([], [])


def test_a_row_that_cannot_be_written_is_a_difference(source: Source) -> None:
    fill(source.database, 40)
    source.database.execute("ALTER TABLE docs ALTER COLUMN emb TYPE vector")
    source.database.execute("UPDATE docs SET emb = '[1,2]' WHERE id = 7")
    config = {"dimensions": {"emb": 3}, "name": "docs", "collection": source.collection}
    ended = source.migrate("--json", table="docs", CDC_SYNC_TABLES=json.dumps([config]))
    assert ended.code == ExitCode.DIFFERENCES, ended.err
    (table,) = ended.json["tables"]
    assert (table["source_rows"], table["points"], table["dead_letters"]) == (40, 39, 1)
    assert table["agree"] is False
    assert "dead letters" in table["meaning"]


def test_without_create_collection_a_missing_one_is_an_error(source: Source) -> None:
    fill(source.database, 5)
    ended = source.migrate("--migration.create-collection=false")
    assert ended.code == ExitCode.CONFIG, ended.err
    assert source.collection in ended.err
    assert (source.slots(), source.publications()) == ([], [])


def test_what_was_migrated_and_left_alone_is_adopted(source: Source) -> None:
    fill(source.database, 200)
    assert source.migrate("--migration.drop-slot").code == 0
    source.database.execute("DELETE FROM docs WHERE id <= 20")
    source.database.execute("UPDATE docs SET note = 'z' WHERE id > 190")
    refused = source.migrate()
    assert refused.code == ExitCode.CONFIG, refused.err
    assert (source.slots(), source.publications()) == ([], [])
    ended = source.migrate("--json", "--migration.adopt")
    assert ended.code == 0, ended.err
    assert ended.json["tables"][0]["agree"] is True
    source.assert_equal()


# -- being stopped


def test_a_signal_drains_and_the_next_migration_goes_on(
    database18: Database, qdrant_private: QdrantProcess
) -> None:
    source = Source(database18, qdrant_private, "docs")
    fill(source.database, 60_000)
    qdrant_private.script.slow("upsert", 0.05, times=100_000)
    with source.start() as process:
        for _ in range(400):
            if source.slots() and _points(source) > 0:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=_SECONDS)
    assert process.returncode == 128 + signal.SIGINT, err
    assert out == ""
    assert "Run the same command again" in err
    assert 0 < _points(source) < 60_000
    qdrant_private.script.clear()
    ended = source.migrate("--json")
    assert ended.code == 0, ended.err
    assert ended.json["tables"][0]["agree"] is True
    source.assert_equal()


def _points(source: Source) -> int:
    client = source.qdrant.client()
    if not client.collection_exists(source.collection):
        return 0
    return client.count(source.collection, exact=True).count


def test_a_terminal_shows_a_bar_and_the_summary(source: Source) -> None:
    fill(source.database, 20_000)
    slowly = ("--migration.num-workers", "1", "-b", "1000", "--migration.batch-delay", "250")
    text, code = _on_terminal(source.arguments(*slowly))
    assert code == 0, text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"public\.docs +\S+ +[\d,]+/20,000 rows", plain), plain
    assert "rows/s" in plain
    assert "copying" in plain
    assert "equal" in plain
    # Whole lines of the log, above the bar.
    assert re.search(r"^\d\d:\d\d:\d\d\.\d+ info +pipeline_planned", plain, re.MULTILINE)


def _on_terminal(arguments: list[str]) -> tuple[str, int]:
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160", "LINES": "50"}
    with subprocess.Popen(
        [sys.executable, "-m", "cdc_sync", "migrate", *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
        start_new_session=True,
    ) as process:
        os.close(follower)
        pieces = []
        try:
            while piece := os.read(leader, 65536):
                pieces.append(piece)
        except OSError:
            pass  # the terminal has been closed at its other end
        finally:
            os.close(leader)
        code = process.wait(_SECONDS)
    return b"".join(pieces).decode(errors="replace").replace("\r\n", "\n"), code


# -- run, and the queries


def test_run_sums_up_its_copy_in_the_log(source: Source, tmp_path: Path) -> None:
    fill(source.database, 321)
    with daemon(source, tmp_path) as follower:
        follower.start()
        follower.wait(
            lambda: len([e for e in follower.events() if e["event"] == "copy_summary"]) == 2,
            "the summary",
        )
        table, total = [e for e in follower.events() if e["event"] == "copy_summary"]
        assert (table["table"], table["source_rows"], table["points"]) == ("public.docs", 321, 321)
        assert (table["agree"], total["agree"], total["rows"]) == (True, True, 321)


def _leaves(database: Database, url: str) -> tuple[Leaf, ...]:
    settings = pipeline_settings(database, QdrantTarget(url), "docs")
    with connect(settings.source) as connection:
        return find_table(connection, "docs").leaves


def test_rows_are_counted_under_the_filter(database18: Database, qdrant: QdrantTarget) -> None:
    fill(database18, 1000)
    leaves = _leaves(database18, qdrant.url)
    settings = pipeline_settings(database18, qdrant, "docs")
    with connect(settings.source) as connection:
        for row_filter, rows in ((None, 1000), ("id <= 10 -- ten", 10), ("note IS NULL", 0)):
            (counted,) = count_rows(connection, leaves, row_filter)
            assert (counted.name, counted.rows) == ("public.docs", rows)
        database18.execute("ANALYZE docs")
        assert expect_rows(connection, leaves, None) == 1000
        assert 1 <= expect_rows(connection, leaves, "id <= 10") <= 50
        assert count_rows(connection, (), None) == ()


def test_a_count_is_not_fooled_by_statistics(database18: Database, qdrant: QdrantTarget) -> None:
    fill(database18, 1000)
    database18.execute("ANALYZE docs; DELETE FROM docs WHERE id > 400")
    settings = pipeline_settings(database18, qdrant, "docs")
    with connect(settings.source) as connection:
        (counted,) = count_rows(connection, _leaves(database18, qdrant.url), None)
    assert counted.rows == 400


def test_changes_that_wait_in_a_slot_are_seen(database18: Database, qdrant: QdrantTarget) -> None:
    fill(database18, 1)
    fill(database18, 1, "others")
    database18.execute('CREATE PUBLICATION "P 1" FOR TABLE docs, others')
    database18.execute("SELECT pg_create_logical_replication_slot('w', 'pgoutput')")
    ((docs, others),) = database18.execute(
        "SELECT 'docs'::regclass::int8, 'others'::regclass::int8"
    )
    assert isinstance(docs, int)
    assert isinstance(others, int)
    settings = pipeline_settings(database18, qdrant, "docs")
    with connect(settings.source) as connection:
        assert changes_waiting(connection, "w", "P 1", docs) is False
        database18.execute("CREATE TABLE unpublished (a int); INSERT INTO unpublished VALUES (1)")
        assert changes_waiting(connection, "w", "P 1", docs) is False
        database18.execute("UPDATE others SET note = 'x'")
        assert changes_waiting(connection, "w", "P 1", docs) is False
        assert changes_waiting(connection, "w", "P 1", others) is True
        database18.execute("TRUNCATE others")
        assert changes_waiting(connection, "w", "P 1", docs) is True
        assert changes_waiting(connection, "absent", "P 1", docs) is None
        database18.execute("SELECT pg_drop_replication_slot('w')")
