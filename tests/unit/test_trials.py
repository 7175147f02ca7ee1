"""What is logged of tries: news, not their number."""

from __future__ import annotations

import asyncio

import pytest

from cdc_sync.errors import ErrorKind, SinkError, SourceError
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.sync.trials import Trials


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def trials(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> Trials:
    caplog.set_level("INFO")
    return Trials(metrics, StatusBoard("p", metrics=metrics), asyncio.Event())


def test_a_standby_says_once_that_it_is_one(
    trials: Trials, metrics: Metrics, caplog: pytest.LogCaptureFixture
) -> None:
    held = SourceError(ErrorKind.SLOT_ACTIVE, "another has it")
    for _ in range(1000):
        trials.stalled(held, 2.0)
    assert caplog.messages == ["state", "retrying"]
    assert metrics.source_reconnects[ErrorKind.SLOT_ACTIVE]._value.get() == 1000
    trials.state("streaming")
    trials.state("streaming")
    trials.stalled(held, 2.0)
    assert caplog.messages[2:] == ["state", "state", "retrying"]


def test_what_else_fails_while_it_stands_by_is_said(
    trials: Trials, caplog: pytest.LogCaptureFixture
) -> None:
    held = SourceError(ErrorKind.SLOT_ACTIVE, "another has it")
    trials.stalled(held, 2.0)
    for kind in (ErrorKind.SINK_UNAVAILABLE, ErrorKind.SINK_RATE_LIMITED):
        trials.stalled(SinkError(kind, "away"), 1.0)
    trials.stalled(SourceError(ErrorKind.SOURCE_UNAVAILABLE, "away"), 1.0)
    trials.stalled(held, 2.0)
    assert caplog.messages == ["state", *["retrying"] * 4]
