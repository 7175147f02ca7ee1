"""The demo: its writer and its verdict on a real Postgres, and the whole run as people start it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import psycopg
import pytest

from cdc_sync.demo.dataset import Dataset, load_dataset
from cdc_sync.demo.leftovers import DIRECTORY_PREFIX
from cdc_sync.demo.run import INTERRUPTED, run_demo
from cdc_sync.demo.table import create_indexes, create_table, load_rows, search_postgres
from cdc_sync.demo.verdict import ExpectedPoint, compare, read_rows
from cdc_sync.demo.writer import KEY_OFFSET, Writer
from cdc_sync.errors import ConfigError, ExitCode
from cdc_sync.qdrant.edge_writer import EdgeWriter
from cdc_sync.qdrant.sink import Applied, Changes, StoredPoint
from tests.support.fix_postgres import Database

ROWS: Final = 300

#: Starts the demo as the command line does, with the options given as Python source.
START: Final = "import sys; from cdc_sync.demo.run import run_demo; sys.exit(run_demo({}))"


@pytest.fixture
def dataset() -> Dataset:
    return load_dataset(ROWS)


@pytest.fixture
def connection(database18: Database, dataset: Dataset) -> Iterator[psycopg.Connection]:
    """A database with the demo's table in it."""
    with psycopg.connect(database18.url, autocommit=True) as connection:
        create_table(connection)
        assert list(load_rows(connection, dataset))[-1] == ROWS
        create_indexes(connection)
        yield connection


def stored(expected: Mapping[int, ExpectedPoint]) -> list[StoredPoint]:
    """The points that a faultless pipeline would have written."""
    return [
        StoredPoint(
            key,
            dict(row.payload),
            {} if row.vector is None else {"embedding": list(row.vector)},
        )
        for key, row in expected.items()
    ]


async def one_page(points: list[StoredPoint]) -> AsyncIterator[list[StoredPoint]]:
    yield points


def test_the_loaded_table_is_the_data_set(connection: psycopg.Connection, dataset: Dataset) -> None:
    rows = read_rows(connection)
    assert sorted(rows) == list(range(1, ROWS + 1))
    for key, row in rows.items():
        package = dataset.packages[key - 1]
        assert row.payload["name"] == package.name
        assert row.payload["tags"] == package.tags
        assert row.payload["relations"] == package.relations
        assert row.payload["installed_size"] == package.installed_size
        assert np.array_equal(np.array(row.vector, np.float32), dataset.vectors[key - 1])


def test_some_vectors_are_out_of_line(connection: psycopg.Connection) -> None:
    """Only then do metadata updates reach the pipeline without their vectors."""
    table = connection.execute("SELECT 'packages'::regclass::oid").fetchone()
    assert table is not None
    chunks = f"SELECT count(DISTINCT chunk_id) FROM pg_toast.pg_toast_{table[0]}"
    found = connection.execute(chunks.encode()).fetchone()
    assert found is not None
    assert ROWS * 0.2 < found[0] < ROWS


def test_the_writer_does_everything_and_counts_right(
    database18: Database, connection: psycopg.Connection, dataset: Dataset
) -> None:
    query = dataset.queries[0]
    first = search_postgres(connection, query, 5)
    doomed = (first[1].id,)
    writer = Writer(database18.url, dataset, 0.5, query, doomed)
    writer.start()
    writer.join(60)
    assert not writer.running
    tally = writer.tally
    for kind in ("inserted", "metadata", "vectors", "moved", "deleted", "rolled_back"):
        assert getattr(tally, kind) > 0, kind
    rows = read_rows(connection)
    assert len(rows) == ROWS + tally.inserted - tally.deleted
    assert doomed[0] not in rows
    assert any(key >= KEY_OFFSET for key in rows)
    assert len(writer.marks) == tally.transactions
    assert list(writer.marks) == sorted(writer.marks, key=lambda mark: mark.lsn)
    assert search_postgres(connection, query, 5) != first


def test_the_writer_stops_early(database18: Database, connection: psycopg.Connection) -> None:
    writer = Writer(database18.url, load_dataset(ROWS), 600)
    writer.start()
    time.sleep(0.3)
    writer.stop()
    writer.join(10)
    assert not writer.running


def test_an_error_of_the_writer_is_raised(database18: Database) -> None:
    """There is no table."""
    writer = Writer(database18.url, load_dataset(ROWS), 1)
    writer.start()
    with pytest.raises(psycopg.errors.UndefinedTable):
        writer.join(10)


async def test_the_verdict_finds_one_damaged_point_among_many(
    connection: psycopg.Connection,
) -> None:
    expected = read_rows(connection)
    assert (await compare(expected, one_page(stored(expected)))).equal

    points = stored(expected)
    points[123].payload["installed_size"] = float(str(points[123].payload["installed_size"]))
    verdict = await compare(expected, one_page(points))
    assert not verdict.equal
    assert verdict.different == 1
    assert f"point {points[123].id}: installed_size" in verdict.differences[0]

    points = stored(expected)
    points[45].vectors["embedding"] = points[46].vectors["embedding"]
    verdict = await compare(expected, one_page(points))
    assert verdict.differences == (f"point {points[45].id}: embedding differs",)

    # A change that the pipeline would have missed.
    connection.execute("UPDATE packages SET tags = '{}' WHERE id = 9")
    verdict = await compare(read_rows(connection), one_page(stored(expected)))
    assert verdict.different == 1


def test_arguments_that_cannot_work_are_refused(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(ConfigError, match="not an empty directory"):
        run_demo(directory=tmp_path)
    with pytest.raises(ConfigError, match="2000 rows"):
        run_demo(rows=2001)
    with pytest.raises(ConfigError, match="needs some time"):
        run_demo(seconds=0)


@contextlib.contextmanager
def started(options: str, temporary: Path) -> Iterator[subprocess.Popen[str]]:
    """The demo in a process of its own; its temporary files go to ``temporary``."""
    process = subprocess.Popen(
        [sys.executable, "-c", START.format(options)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    with process:
        try:
            yield process
        finally:
            # Nothing to do unless the test has failed before it was over.
            process.kill()


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Read the output up to the line in which ``pattern`` is found."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if re.search(pattern, line):
            return seen
    raise AssertionError(f"{pattern!r} did not come:\n{seen}")


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A directory that the account which runs Postgres for root can enter, too.

    Not below pytest's own: that is for its owner only, and every session makes it so again.
    """
    with tempfile.TemporaryDirectory(prefix="cdc-sync-demo-test-") as name:
        directory = Path(name)
        directory.chmod(0o711)
        yield directory


def leftovers(temporary: Path) -> list[Path]:
    return list(temporary.glob(f"{DIRECTORY_PREFIX}*"))


@pytest.mark.slow
def test_a_full_run_ends_equal(temporary: Path) -> None:
    with started("plain=True, seconds=5", temporary) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == ExitCode.OK, output
    assert re.search(r"EQUAL  \d+ rows, \d+ points, 0 different", output), output
    assert "\x1b" not in output
    assert "Traceback" not in output
    assert output.count("pgvector") >= 3
    assert leftovers(temporary) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_kept_running_until_a_signal(temporary: Path, number: signal.Signals) -> None:
    with started("plain=True, seconds=1, rows=200, keep=True", temporary) as process:
        seen = read_until(process, "^psql ")
        url = re.search(r"psql '(.*)'", seen)
        assert url is not None
        with psycopg.connect(url.group(1), autocommit=True) as connection:
            connection.execute("DELETE FROM packages WHERE id = (SELECT min(id) FROM packages)")
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
    # The verdict was spoken before; ending what was kept is no failure.
    assert "EQUAL" in seen
    assert process.returncode == ExitCode.OK, seen + rest
    assert "Traceback" not in rest
    assert leftovers(temporary) == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["listens on", r"rows \d+  points \d+"])
def test_interrupted_in_the_midst(temporary: Path, moment: str) -> None:
    with started("plain=True, seconds=60", temporary) as process:
        seen = read_until(process, moment)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED, seen + rest
    assert "Traceback" not in rest
    assert leftovers(temporary) == []


@pytest.mark.slow
def test_a_pipeline_that_forgets_deletes_is_found_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole run again, with a fault in the pipeline: the demo must not end with 0."""
    apply = EdgeWriter.apply

    async def forgetful(self: EdgeWriter, changes: Changes) -> Applied:
        changes.deletes.clear()
        return await apply(self, changes)

    monkeypatch.setattr(EdgeWriter, "apply", forgetful)
    assert run_demo(plain=True, seconds=0.5, rows=100) == ExitCode.DIFFERENCES
    output = capsys.readouterr().out
    assert "DIFFERENT" in output
    assert re.search(r"point \d+: has no row", output)
