"""The fault campaign with administrators among its events: whatever they do to the publication,
partitions, columns, names and rights, several of them at once and beside crashes, once all of it is
put back that no pipeline can live with both sides are equal.

As test_fault_campaign.py, with TEST_FAULTS_SEED for its seed. Longer:
``make faults WITH=administrators DURATION=1800``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.campaign.rounds import POSTGRES_SETTINGS, Campaign, run_campaign
from tests.support.fix_campaign import campaign_seed
from tests.support.fix_postgres import PrivatePostgres

_SECONDS = 60.0


@pytest.mark.slow(seconds=130)
@pytest.mark.timeout(_SECONDS + 900)
@pytest.mark.parametrize("seed", [campaign_seed()], ids=["seed"])
def test_administrators(seed: int, private_postgres: PrivatePostgres, tmp_path: Path) -> None:
    campaign = Campaign(seed, _SECONDS, tmp_path, more="administrators")
    run_campaign(campaign, private_postgres(POSTGRES_SETTINGS))
