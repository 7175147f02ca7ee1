"""The pipeline dies at every point between "read from Postgres" and "confirmed to Postgres", and
between the steps of a copy: it goes on, with nothing lost and nothing extra (invariants 1 and 3).

``make campaign`` crashes each point 100 times (TEST_FAILPOINT_CRASHES says otherwise).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support import breaks
from tests.support.crash_series import CrashSeries
from tests.support.failpoints import FAILPOINTS, Failpoint, resolve
from tests.support.fix_postgres import Database
from tests.support.pipeline_process import Break
from tests.support.qdrant_control import QdrantTarget

_CRASHES = int(os.environ.get("TEST_FAILPOINT_CRASHES") or "100")

_GROUPS = {
    "stream": [x for x in FAILPOINTS.values() if x.sink == "server" and x.needs != "copy"],
    "copy": [x for x in FAILPOINTS.values() if x.sink == "server" and x.needs == "copy"],
    "edge": [x for x in FAILPOINTS.values() if x.sink == "edge"],
}


def crash(
    database: Database,
    request: pytest.FixtureRequest,
    directory: Path,
    failpoints: Iterable[Failpoint],
    times: int,
) -> None:
    points = list(failpoints)
    qdrant: QdrantTarget | None = None
    if points[0].sink == "server":
        qdrant = request.getfixturevalue("qdrant")
    series = CrashSeries(database, qdrant, directory, points, seed=len(points[0].name))
    series.run(times)
    assert all(series.crashes[point.name] >= times for point in points)


def test_every_failpoint_is_there() -> None:
    for failpoint in FAILPOINTS.values():
        owner, name = resolve(failpoint)
        assert callable(getattr(owner, name)), failpoint.name
    assert sum(map(len, _GROUPS.values())) == len(FAILPOINTS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.requirement("R41", "R42")
@pytest.mark.parametrize("group", _GROUPS)
def test_a_crash_at_each(
    database18: Database, tmp_path: Path, request: pytest.FixtureRequest, group: str
) -> None:
    crash(database18, request, tmp_path, _GROUPS[group], 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("failpoint", "sabotage", "crashes"),
    [
        ("before requests", breaks.told_before_it_is_written, 3),
        ("ledger saved", breaks.ledgers_say_done_too_early, 12),
    ],
)
def test_a_mistake_is_noticed(
    database18: Database,
    tmp_path: Path,
    qdrant: QdrantTarget,
    failpoint: str,
    sabotage: Break,
    crashes: int,
) -> None:
    points = [FAILPOINTS[failpoint]]
    series = CrashSeries(database18, qdrant, tmp_path, points, seed=1, sabotage=sabotage)
    with pytest.raises(AssertionError, match=r"missing|payload|vector|extra"):
        series.run(crashes)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.requirement("R41", "R42")
@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_hundred_crashes(
    database18: Database, tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    crash(database18, request, tmp_path, [FAILPOINTS[name]], _CRASHES)
