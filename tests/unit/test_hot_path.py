"""The hot path on fixed input: what it sends, and that it takes no more instructions than before."""

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
    tolerance = instructions.TOLERANCE
    if instructions.baseline_libraries() != instructions.libraries():
        # Other versions of numpy and orjson take more, or less, for the same.
        tolerance *= 2
    counts = instructions.count()
    grown = {
        path: f"{counts[path]:,} instructions a row, {before:,} before"
        for path, before in baseline.items()
        if counts[path] > before * (1 + tolerance)
    }
    assert not grown
