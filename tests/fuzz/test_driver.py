"""The campaign's own command."""

from __future__ import annotations

from tests.fuzz.__main__ import shares
from tests.fuzz.targets import TARGETS


def test_runs_are_divided_over_all_targets() -> None:
    for runs in (1, 1000, 1_000_000):
        divided = shares(runs, list(TARGETS))
        assert divided.keys() == TARGETS.keys()
        assert min(divided.values()) > 0
        assert runs <= sum(divided.values()) <= runs + len(TARGETS)
    assert shares(10, ["values"]) == {"values": 10}
