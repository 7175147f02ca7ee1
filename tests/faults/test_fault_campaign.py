"""The fault campaign (see ``campaign/``): whatever is done to the daemon and what is around it,
once everything is quiet both sides are equal.

TEST_FAULTS_SECONDS says how long new rounds begin (default 180), TEST_FAULTS_SEED with which seed
(default: another each time, shown in the test's id and at the end of the run), TEST_FAULTS_ROUND
with which round to begin, TEST_FAULTS_WITH which events to have that are left out otherwise, and
TEST_FAULTS_ONLY which to have alone.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from tests.faults.campaign.events import EVENTS
from tests.faults.campaign.report import CampaignLog
from tests.faults.campaign.rounds import Campaign, Runner, event_names
from tests.faults.campaign.schedule import Round, schedule
from tests.support.fix_campaign import campaign_seed
from tests.support.fix_postgres import PrivatePostgres

_SECONDS = float(os.environ.get("TEST_FAULTS_SECONDS") or "180")

#: A half-open replication connection is noticed within twice of wal_sender_timeout.
_POSTGRES = {"wal_sender_timeout": "4s", "max_connections": "200", "max_wal_size": "1GB"}


def test_a_seed_gives_one_schedule() -> None:
    def rounds(seed: int, *optional: str) -> list[Round]:
        return list(itertools.islice(schedule(seed, frozenset(optional)), 40))

    assert rounds(1) == rounds(1)
    assert rounds(1) != rounds(2)
    kinds = {planned.event.kind for one in rounds(1) for planned in one.events}
    assert kinds == {one.kind for one in EVENTS.values() if not one.optional}
    with_more = {p.event.kind for one in rounds(1, "slot_dropped") for p in one.events}
    assert with_more == EVENTS.keys()
    for one in rounds(1):
        assert all(one.sink in planned.event.sinks for planned in one.events)


@pytest.mark.slow(seconds=200)
@pytest.mark.timeout(_SECONDS + 600)
@pytest.mark.parametrize("seed", [campaign_seed()])
def test_fault_campaign(seed: int, private_postgres: PrivatePostgres, tmp_path: Path) -> None:
    first = int(os.environ.get("TEST_FAULTS_ROUND") or "0")
    optional = event_names(os.environ.get("TEST_FAULTS_WITH", ""))
    only = event_names(os.environ.get("TEST_FAULTS_ONLY", ""))
    log = CampaignLog(seed, tmp_path / "campaign.log")
    log.say(f"{_SECONDS:g} seconds; again: make faults DURATION={_SECONDS:g} SEED={seed}")
    runner = Runner(
        Campaign(seed, _SECONDS, tmp_path, first, optional, only), private_postgres(_POSTGRES), log
    )
    try:
        runner.run()
    except Exception as error:
        again = f"make faults DURATION=1 SEED={seed} ROUND={log.round}"
        raise AssertionError(f"{error}\n{log.lines_of_round()}\nagain: {again}") from error
    finally:
        log.say(log.summary())
        log.close()
    log_memory = runner.peak_bytes / 1e6
    assert log_memory < 600, f"the daemon grew to {log_memory:.0f} MB"
