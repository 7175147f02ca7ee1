"""The fault campaign (see ``campaign/``): whatever is done to the daemon and what is around it,
once everything is quiet both sides are equal.

TEST_FAULTS_SECONDS says how long new rounds begin (default 180), TEST_FAULTS_SEED with which seed
(default: another each time, shown in the test's id and at the end of the run), TEST_FAULTS_ROUND
with which round to begin, and TEST_FAULTS_WITH which events to have that are left out otherwise.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.campaign.report import CampaignLog
from tests.faults.campaign.rounds import Campaign, Runner, optional_events
from tests.support.fix_campaign import campaign_seed
from tests.support.fix_postgres import PrivatePostgres

_SECONDS = float(os.environ.get("TEST_FAULTS_SECONDS") or "180")

#: A half-open replication connection is noticed within twice of wal_sender_timeout.
_POSTGRES = {"wal_sender_timeout": "4s", "max_connections": "200", "max_wal_size": "1GB"}


@pytest.mark.slow
@pytest.mark.timeout(_SECONDS + 600)
@pytest.mark.parametrize("seed", [campaign_seed()])
def test_fault_campaign(seed: int, private_postgres: PrivatePostgres, tmp_path: Path) -> None:
    first = int(os.environ.get("TEST_FAULTS_ROUND") or "0")
    optional = optional_events(os.environ.get("TEST_FAULTS_WITH", ""))
    log = CampaignLog(seed, tmp_path / "campaign.log")
    log.say(f"{_SECONDS:g} seconds; again: make faults DURATION={_SECONDS:g} SEED={seed}")
    runner = Runner(
        Campaign(seed, _SECONDS, tmp_path, first, optional), private_postgres(_POSTGRES), log
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
