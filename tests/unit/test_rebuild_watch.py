"""Since when the slots of rebuilds have not been read, and when somebody hears of it."""

from __future__ import annotations

import logging

import pytest

from cdc_sync.ops.attention import UNUSED_SECONDS, RebuildSlot, rebuild_remedy
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.sync.doctor_server import rebuild_slot_findings
from cdc_sync.sync.monitor import RebuildWatch

NOW = 1_800_000_000.0
HOUR = 3600.0


def slot(
    number: int = 1, *, in_use: bool = False, kept: int | None = 5_000_000, table: str | None = "t"
) -> RebuildSlot:
    return RebuildSlot(f"s_rebuild_{number}", table, in_use, kept)


def test_the_time_runs_from_the_first_look_and_ends_when_somebody_reads() -> None:
    watch = RebuildWatch()
    (seen,) = watch.look([slot()], NOW)
    assert seen.unused_since == NOW
    (seen,) = watch.look([slot(kept=7)], NOW + 5)
    assert (seen.unused_since, seen.retained_bytes) == (NOW, 7)
    (seen,) = watch.look([slot(in_use=True)], NOW + 10)
    assert seen.unused_since is None
    (seen,) = watch.look([slot()], NOW + 15)
    assert seen.unused_since == NOW + 15
    assert watch.look([], NOW + 20) == []
    (seen,) = watch.look([slot()], NOW + 25)
    assert seen.unused_since == NOW + 25


def test_it_is_said_after_a_while_and_once_an_hour(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    watch, said = RebuildWatch(), caplog.records
    for seconds in range(0, int(UNUSED_SECONDS), 5):
        watch.look([slot(), slot(2, in_use=True), slot(3, kept=None)], NOW + seconds)
    assert not said
    for seconds in range(int(UNUSED_SECONDS), int(UNUSED_SECONDS + 2 * HOUR), 5):
        watch.look([slot(), slot(2, in_use=True), slot(3, kept=None)], NOW + seconds)
    assert [record.message for record in said] == ["rebuild_slot_unread"] * 2
    # Gone on with, and left once more.
    later = NOW + UNUSED_SECONDS + 2 * HOUR
    watch.look([slot(in_use=True)], later)
    watch.look([slot()], later + 5)
    watch.look([slot()], later + UNUSED_SECONDS)
    assert len(said) == 2
    watch.look([slot()], later + UNUSED_SECONDS + 5)
    assert len(said) == 3


def test_the_status_tells_after_the_same_time() -> None:
    board = StatusBoard("default", slot="s", publication="p")
    left = RebuildSlot("s_rebuild_1", "public.t", False, 5_000_000, unused_since=1.0)
    board.set_rebuilds([left, slot(2, in_use=True), slot(3)])
    assert board.snapshot()["attention"] == [
        {
            "severity": "warning",
            "title": "A rebuild of public.t is half done",
            "text": "Nobody reads its slot s_rebuild_1, and Postgres keeps 5 MB of WAL for it.",
            "remedy": "Go on with it by the same cdc-sync rebuild, or remove it: cdc-sync rebuild "
            "--table public.t --abort",
            "since": "1970-01-01T00:00:01.000Z",
        }
    ]
    board.set_rebuilds([])
    assert board.snapshot()["attention"] == []


@pytest.mark.parametrize(
    ("since", "kept", "left"),
    [
        (None, 1, False),
        (NOW, None, False),
        (NOW - UNUSED_SECONDS + 1, 1, False),
        (NOW - UNUSED_SECONDS, 1, True),
    ],
)
def test_a_slot_is_left_when_it_keeps_wal_for_long(
    since: float | None, kept: int | None, left: bool
) -> None:
    assert RebuildSlot("s", "t", False, kept, since).is_left(NOW) is left


def test_of_a_table_that_is_gone_the_slot_itself_is_removed() -> None:
    remedy = rebuild_remedy(slot(table=None))
    assert "SELECT pg_drop_replication_slot('s_rebuild_1');" in remedy
    assert "--abort" not in remedy


def test_check_names_those_that_nobody_reads() -> None:
    found = list(
        rebuild_slot_findings([slot(), slot(2, in_use=True), slot(3, kept=None, table=None)])
    )
    assert [(one.id, one.severity, one.subject) for one in found] == [
        ("rebuild-slot", "warning", "s_rebuild_1"),
        ("rebuild-slot", "warning", "s_rebuild_3"),
    ]
    assert "a rebuild of t, is read by nobody, and keeps" in found[0].message
    assert "a rebuild, is read by nobody, and is lost" in found[1].message


def test_samples_that_stay_are_never_away() -> None:
    """A sample that is missing once has the alert wait from the beginning."""
    metrics = Metrics()
    metrics.set_rebuild_slots([slot(), slot(2)])
    child = metrics.rebuild_slot_active.labels("t", "s_rebuild_1")
    metrics.set_rebuild_slots([slot(kept=None), slot(3, table=None, in_use=True)])
    assert metrics.rebuild_slot_active.labels("t", "s_rebuild_1") is child

    def samples(name: str) -> dict[tuple[str, str], float]:
        return {
            (sample.labels["table"], sample.labels["slot"]): sample.value
            for family in metrics.registry.collect()
            if family.name == f"cdc_sync_{name}"
            for sample in family.samples
        }

    assert samples("rebuild_slot_active") == {("t", "s_rebuild_1"): 0, ("", "s_rebuild_3"): 1}
    assert samples("rebuild_slot_retained_wal_bytes") == {("", "s_rebuild_3"): 5_000_000}
    metrics.set_rebuild_slots([])
    assert samples("rebuild_slot_active") == {}
    assert samples("rebuild_slot_retained_wal_bytes") == {}
