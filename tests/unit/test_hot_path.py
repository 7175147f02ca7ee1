"""The hot path on fixed input: what it sends, and that it takes no more instructions than once."""

from __future__ import annotations

import pytest

from tests.support import hot_path, instructions


@pytest.mark.parametrize("path", hot_path.PATHS)
def test_every_row_is_sent(path: hot_path.Path) -> None:
    run, nobody = hot_path.prepare(path, 300)
    run()
    # An update sends its payload, and its id twice: in the batch and in the barrier after it.
    requests, size = (8, 222) if path == "updates" else (4, 3323)
    assert nobody.requests == requests
    assert abs(nobody.request_bytes / 300 - size) < 10


@pytest.mark.slow(15)
@pytest.mark.timeout(900)
def test_no_more_instructions_than_before() -> None:
    """Renew the baseline, if a change is worth what it costs: python -m tests.support.instructions
    --renew"""
    if (reason := instructions.unavailable()) is not None:
        pytest.skip(reason)
    baseline = instructions.baseline()
    if baseline is None:
        pytest.skip("no baseline for this version of Python")
    assert not instructions.count().grown(baseline)


def test_growth_is_told() -> None:
    before = instructions.Counts({"copy": 1000, "inserts": 1000}, 500, {"numpy": "2"})
    now = instructions.Counts({"copy": 1090, "inserts": 1110}, 500, {"numpy": "2"})
    assert now.grown(before) == {"inserts": 0.11}
    # Another build that takes twice as many for everything, and another library.
    slower = instructions.Counts({"copy": 2380, "inserts": 2420}, 1000, {"numpy": "2"})
    assert slower.grown(before) == {"inserts": 0.21}
    other = instructions.Counts({"copy": 1190, "inserts": 1210}, 500, {"numpy": "3"})
    assert other.grown(before) == {"inserts": 0.21}
