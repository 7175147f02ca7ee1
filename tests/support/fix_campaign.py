"""The seed of the fault campaigns: chosen once per run of the tests, the same in all of its
processes, and shown at the end. No part of the tests' names, so that what has failed is found again
in a run of its own."""

from __future__ import annotations

import os
import random
from typing import Final

import pytest

SEED: Final = "TEST_FAULTS_SEED"


def campaign_seed() -> int:
    """The seed of this run."""
    return int(os.environ[SEED])


def pytest_configure() -> None:
    """Choose a seed unless one is given; processes started from here on inherit it."""
    if not os.environ.get(SEED):
        os.environ[SEED] = str(random.SystemRandom().randrange(1, 1_000_000))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the seed if the campaign was run."""
    stats = terminalreporter.stats
    reports = [*stats.get("passed", ()), *stats.get("failed", ()), *stats.get("error", ())]
    names = ("::test_fault_campaign[", "::test_administrators[")
    if any(name in getattr(report, "nodeid", "") for report in reports for name in names):
        terminalreporter.write_line(f"fault campaign: {SEED}={campaign_seed()}")
