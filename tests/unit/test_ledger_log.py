"""The check of a daemon's log finds chunks that are copied again and ledgers that forget."""

from __future__ import annotations

from pathlib import Path

from tests.support.ledger_log import Event, blocks_done, check_ledger, logged_events

TABLE = "public.items"


def copied(start: int, end: int | None, leaf: int = 7) -> Event:
    return {"event": "chunk_copied", "table": TABLE, "leaf_oid": leaf, "start": start, "end": end}


def saved(*done: tuple[int, int | None], leaf: int = 7) -> Event:
    return {"event": "ledger_saved", "table": TABLE, "leaves": {str(leaf): [list(d) for d in done]}}


def about(event: str) -> Event:
    return {"event": event, "table": TABLE}


def test_a_copy_that_goes_on_is_without_fault() -> None:
    report = check_ledger(
        [saved(), copied(0, 16), copied(16, 32), saved((0, 16)), copied(16, 32), saved((0, None))]
    )
    assert report.faults == []
    assert report.chunks[TABLE] == 3
    assert report.saves == 2


def test_what_was_on_record_is_copied_again() -> None:
    assert len(check_ledger([saved((0, 32)), copied(16, 32)]).faults) == 1
    assert len(check_ledger([saved((0, None)), copied(160, None)]).faults) == 1
    assert check_ledger([saved((0, 32)), copied(32, 48), copied(0, 16, leaf=8)]).faults == []


def test_a_ledger_forgets() -> None:
    assert len(check_ledger([saved((0, 32)), saved(), copied(0, 16)]).faults) == 1
    assert len(check_ledger([saved((0, None)), saved((0, 64))]).faults) == 1
    assert len(check_ledger([saved((0, 32)), saved((16, 64))]).faults) == 1


def test_a_copy_may_begin_anew_if_the_log_says_so() -> None:
    assert (
        check_ledger([saved((0, 32)), saved(), about("copy_restarted"), copied(0, 16)]).faults == []
    )
    for event in ("resync_started", "table_copied", "copy_started"):
        assert check_ledger([saved((0, 32)), about(event), saved(), copied(0, 16)]).faults == []


def test_lines_that_a_kill_has_cut_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(
        '{"event": "chunk_copied", "ta{"event": "state"}\n'
        '{"event": "ledger_saved", "table": "public.items",'
        ' "leaves": {"7": [[0, 16], [32, null]]}}\n'
        "Traceback\n",
        encoding="utf-8",
    )
    events = logged_events(path)
    assert len(events) == 1
    assert blocks_done(events, TABLE) == {"7": [(0, 16), (32, None)]}
