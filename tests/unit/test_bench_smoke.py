"""The benchmark runs: every way of measuring, with a few rows."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator

import pytest

from tests.bench.__main__ import BENCHES, main
from tests.bench.copy_figures import loaded
from tests.bench.datasets import Source, insert
from tests.bench.engine import Scratch, copy_blocks, exported_snapshot, read_rows
from tests.bench.limits import AppliedCost
from tests.bench.pipeline import life, settings_for
from tests.bench.setting import QUICK, Setting
from tests.bench.sink_figures import TRANSACTION_ROWS, transactions
from tests.bench.sinks import EdgeBench, encoded_requests
from tests.bench.stream_figures import datasets, measure_stream, stream_figures
from tests.support.fix_postgres import Database

ROWS = 40
#: Those that differ from each other in more than their columns.
STREAMED = {"inserts-768-each", "updates", "mixed"}


@pytest.fixture
def bench(database18: Database) -> Iterator[Setting]:
    scale = dataclasses.replace(QUICK, rows=ROWS, rounds=1)
    scratch = Scratch()
    try:
        yield Setting(Source(database18.url, database18.server.pid), scratch, scale, 2)
    finally:
        scratch.close()


def test_stream(bench: Setting) -> None:
    for dataset in datasets(ROWS):
        if dataset.name not in STREAMED:
            continue
        ratio, cpu = stream_figures(bench, only=dataset.name)
        assert ratio.value is not None
        assert cpu.value is not None
        assert ratio.value.value > 0
        assert cpu.value.value > 0
        slots = f"SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{dataset.slot}'"
        assert bench.source.scalar(slots) == "0"


def test_the_stream_can_be_measured_again(bench: Setting) -> None:
    """Nothing is confirmed, so each round reads the same changes."""
    limit, ours = measure_stream(bench, datasets(ROWS)[0], 2, warm_up=0)
    assert len(limit) == len(ours) == 2


def test_copy_into_nothing(bench: Setting) -> None:
    settings, source = bench.source.settings("bench"), bench.source
    requests: list[bytes] = []
    with loaded(bench, "docs", 16, ROWS) as planned, exported_snapshot(source.url) as snapshot:
        cost, rows = copy_blocks(
            settings,
            snapshot,
            planned,
            (0, None),
            bench.scratch.new(),
            bench.meter,
            keep=requests.append,
        )
        assert rows == ROWS
        assert cost.cpu > 0
        # What the sink limit sends is what the copy would have sent.
        assert encoded_requests(planned, read_rows(settings, planned)) == requests


def test_sink_limit(bench: Setting) -> None:
    with loaded(bench, "docs", 16, ROWS) as planned:
        rows = read_rows(bench.source.settings("bench"), planned)
        cost = EdgeBench(bench.scratch).limit(planned, rows, bench.meter)
        assert cost.seconds > 0
        assert isinstance(cost, AppliedCost)
        assert cost.durable > 0


@pytest.mark.parametrize("last", [1, 500, 501, 1700])
def test_streamed_rows_are_transactions_of_some(bench: Setting, last: int) -> None:
    """Every row stands in one of them, and once."""
    with loaded(bench, "sunk", 768, 0):
        bench.source.execute(*transactions(1, last))
        found = bench.source.scalar(
            "SELECT format('%s %s %s', count(*), min(id), max(id)) FROM sunk"
        )
        most = bench.source.scalar(
            "SELECT max(n) FROM (SELECT count(*) n FROM sunk GROUP BY xmin::text) t"
        )
    assert found == f"{last} 1 {last}"
    assert int(most) == min(last, TRANSACTION_ROWS)


def test_pipeline_in_a_process(bench: Setting) -> None:
    """It measures its copy, its stream and its latencies by itself, in two lives."""
    source, name, records = bench.source, f"bench_{uuid.uuid4().hex[:12]}", bench.scratch.new()
    log = bench.scratch.new()
    with loaded(bench, "docs", 16, ROWS):
        settings = settings_for(source.url, name, {"docs": "points"})
        try:
            with life(settings, log, null=records) as running:
                running.wait_copied()
                assert running.streams()
                assert running.report().copied_rows == ROWS
            source.execute(insert("docs", 16, f"{ROWS} + 1", f"{2 * ROWS}"))
            with life(settings, log, null=records) as running:
                running.wait_applied(source.position())
                report = running.report()
                assert len(running.latencies()) == 1
            assert report.copy is None
            assert report.stream is not None
            assert report.stream.cpu > 0
            assert report.peak_mb > 10
        finally:
            source.drop_slot(name)
            source.execute(f"DROP PUBLICATION IF EXISTS {name}")


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--write", "--only", "copy"])
    assert refused.value.code == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in BENCHES)
