"""The lag that is shown: 0 when caught up, growing whenever nobody can say that it is not."""

from __future__ import annotations

import time

import pytest

from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.sync import stream
from cdc_sync.sync.stream import Positions, publish_lag

NOW = 1_000_000.0
#: Longer than anything may be on its way.
LATER = NOW + stream._ON_ITS_WAY_SECONDS + 40


def caught_up() -> Positions:
    return Positions(received=100, applied=100, confirmed=100, server_end=100)


def test_nothing_is_behind_when_caught_up() -> None:
    positions = caught_up()
    positions.see_server(100, NOW)
    assert positions.age(LATER) == 0


def test_the_oldest_commit_that_is_not_applied_counts() -> None:
    positions = caught_up()
    positions.oldest_commit = NOW - 7
    assert positions.age(NOW) == 7
    positions.oldest_commit = NOW + 3  # the server's clock is ahead of ours
    assert positions.age(NOW) == 0


def test_what_is_on_its_way_is_no_lag() -> None:
    positions = caught_up()
    positions.see_server(200, NOW)
    assert positions.age(NOW + 1) == 0
    positions.received = 200
    assert positions.age(LATER) == 0


def test_what_does_not_arrive_counts_from_when_it_was_first_seen() -> None:
    positions = caught_up()
    positions.see_server(200, NOW)
    positions.see_server(300, NOW + 20)
    assert positions.age(LATER) == LATER - NOW
    positions.received = 250  # all that had been written by then
    assert positions.age(LATER) == 0
    positions.see_server(300, LATER)
    assert positions.age(LATER + 10) == 10


def test_a_position_confirmed_by_another_process_counts_as_arrived() -> None:
    positions = caught_up()
    positions.see_server(200, NOW)
    positions.go_back(200)
    assert positions.age(LATER) == 0


def test_while_nobody_can_ask_the_server_the_lag_grows() -> None:
    positions = caught_up()
    positions.blind_since = NOW
    assert positions.age(NOW + 30) == 30
    positions.see_server(100, NOW + 30)
    assert positions.age(NOW + 30) == 0


def test_a_new_slot_forgets_what_was_seen_of_the_old_one() -> None:
    positions = caught_up()
    positions.see_server(200, NOW)
    positions.begin(150)
    assert positions.age(LATER) == 0


def shown(positions: Positions, board: StatusBoard, metrics: Metrics) -> tuple[object, object]:
    publish_lag(positions, metrics, board)
    lag = board.snapshot()["lag"]
    assert isinstance(lag, dict)
    return lag["bytes"], lag["seconds"]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def board(metrics: Metrics) -> StatusBoard:
    return StatusBoard("default", metrics=metrics)


def stages(metrics: Metrics) -> float:
    read = metrics.registry.get_sample_value
    return sum(
        read("cdc_sync_lag_bytes", {"stage": stage}) or 0
        for stage in ("receive", "apply", "acknowledge")
    )


def test_before_the_slots_position_is_known_nothing_is_said(
    board: StatusBoard, metrics: Metrics
) -> None:
    positions = Positions()
    positions.see_server(5_000_000_000, time.time())
    assert shown(positions, board, metrics) == (None, None)
    assert stages(metrics) == 0
    assert metrics.registry.get_sample_value("cdc_sync_lag_seconds") is None


def test_the_stages_add_up_to_the_lag(board: StatusBoard, metrics: Metrics) -> None:
    positions = Positions(received=170, applied=120, confirmed=100, server_end=200)
    assert shown(positions, board, metrics) == (100, 0)
    assert stages(metrics) == 100


def test_before_a_session_has_received_anything_the_confirmed_position_counts(
    board: StatusBoard, metrics: Metrics
) -> None:
    positions = Positions(received=0, applied=100, confirmed=100, server_end=130)
    assert shown(positions, board, metrics)[0] == 30
    assert stages(metrics) == 30


def test_on_standby_the_lag_is_somebody_elses(
    board: StatusBoard, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = caught_up()
    positions.see_server(200, time.time() - 1000)
    board.set_state("standby")
    # What holds the slot may be the rest of a connection of our own.
    assert shown(positions, board, metrics)[1] == pytest.approx(1000, abs=60)
    monkeypatch.setattr(stream, "_STANDBY_SECONDS", -1.0)
    assert shown(positions, board, metrics) == (None, None)
    monkeypatch.undo()
    positions.go_back(300)
    board.set_state("streaming")
    assert shown(positions, board, metrics) == (0, 0)
