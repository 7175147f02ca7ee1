"""The fault campaign (see ``campaign/``): whatever is done to the daemon and what is around it,
once everything is quiet both sides are equal.

TEST_FAULTS_SECONDS says how long new rounds begin (default 120), TEST_FAULTS_SEED with which seed
(default: another each time, shown at the end of the run), TEST_FAULTS_ROUND with which round to
begin, TEST_FAULTS_WITH which events to have that are left out otherwise, and
TEST_FAULTS_ONLY which to have alone. ``administrators`` among them are all that
``campaign/administrators.py`` and ``campaign/acts.py`` have (test_administrators.py).
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from tests.faults.campaign.events import EVENTS
from tests.faults.campaign.rounds import POSTGRES_SETTINGS, Campaign, run_campaign
from tests.faults.campaign.schedule import Round, schedule
from tests.support.fix_campaign import campaign_seed
from tests.support.fix_postgres import PrivatePostgres

_SECONDS = float(os.environ.get("TEST_FAULTS_SECONDS") or "120")


def test_a_seed_gives_one_schedule() -> None:
    def rounds(seed: int, *optional: str) -> list[Round]:
        return list(itertools.islice(schedule(seed, frozenset(optional)), 40))

    assert rounds(1) == rounds(1)
    assert rounds(1) != rounds(2)
    kinds = {planned.event.kind for one in rounds(1) for planned in one.events}
    assert kinds == {one.kind for one in EVENTS.values() if not one.optional}
    optional = {one.kind for one in EVENTS.values() if one.optional}
    with_more = {p.event.kind for one in rounds(1, *optional) for p in one.events}
    assert with_more == EVENTS.keys()
    for one in rounds(1):
        assert all(one.sink in planned.event.sinks for planned in one.events)


@pytest.mark.slow(seconds=140)
@pytest.mark.timeout(_SECONDS + 600)
@pytest.mark.parametrize("seed", [campaign_seed()], ids=["seed"])
def test_fault_campaign(seed: int, private_postgres: PrivatePostgres, tmp_path: Path) -> None:
    run_campaign(
        Campaign(
            seed,
            _SECONDS,
            tmp_path,
            int(os.environ.get("TEST_FAULTS_ROUND") or "0"),
            os.environ.get("TEST_FAULTS_WITH", ""),
            os.environ.get("TEST_FAULTS_ONLY", ""),
        ),
        private_postgres(POSTGRES_SETTINGS),
    )
