"""Progress and summary of a copy: rates, what is exact and what is estimated, what a difference
means, and what is drawn or logged."""

from __future__ import annotations

import asyncio
import io
import logging
import re

import pytest
from rich.console import Console

from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.sync import progress
from cdc_sync.sync.copy_report import log_summary
from cdc_sync.sync.progress import (
    CopyProgress,
    ProgressScreen,
    ProgressWatch,
    TableProgress,
    duration_text,
    lag_text,
    on_terminal,
    progress_table,
    rows_text,
    size_text,
)
from cdc_sync.sync.summary import CopySummary, Counts, TableSummary, difference


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board(clock: Clock) -> StatusBoard:
    made = StatusBoard("default", metrics=Metrics(), monotonic=clock)
    made.table("public.items").update(state="copying", rows_estimated=1000)
    return made


# -- rates


def test_there_is_no_rate_from_one_sample(board: StatusBoard, clock: Clock) -> None:
    table = CopyProgress(board, monotonic=clock).sample()[0]
    assert (table.rows, table.rows_per_second, table.eta_seconds) == (0, None, None)
    assert table.fraction == 0.0


def test_the_rate_is_of_the_last_half_minute(board: StatusBoard, clock: Clock) -> None:
    seen = CopyProgress(board, monotonic=clock)
    seen.sample()
    for _ in range(100):
        clock.now += 1
        board.table("public.items").add(rows_copied=1)
        seen.sample()
    assert seen.sample()[0].rows_per_second == pytest.approx(1.0)
    for _ in range(31):
        clock.now += 1
        board.table("public.items").add(rows_copied=10)
        seen.sample()
    table = seen.sample()[0]
    assert table.rows_per_second == pytest.approx(10.0)
    assert table.eta_seconds == pytest.approx((1000 - 410) / 10)


def test_rows_of_an_earlier_run_are_no_rate(board: StatusBoard, clock: Clock) -> None:
    board.table("public.items").update(rows_copied=900)
    seen = CopyProgress(board, monotonic=clock)
    seen.sample()
    clock.now += 10
    board.table("public.items").add(rows_copied=10)
    table = seen.sample()[0]
    assert table.rows_per_second == pytest.approx(1.0)
    assert table.eta_seconds == pytest.approx(90.0)


def test_a_copy_that_begins_anew_has_no_negative_rate(board: StatusBoard, clock: Clock) -> None:
    board.table("public.items").update(rows_copied=900)
    seen = CopyProgress(board, monotonic=clock)
    seen.sample()
    clock.now += 1
    board.table("public.items").update(rows_copied=0)
    assert seen.sample()[0].rows_per_second is None
    clock.now += 1
    board.table("public.items").update(rows_copied=50)
    assert seen.sample()[0].rows_per_second == pytest.approx(50.0)


@pytest.mark.parametrize(
    ("rows", "expected", "exact", "fraction", "eta"),
    [
        (500, 1000, True, 0.5, True),
        (1000, 1000, True, 1.0, True),
        (1500, 1000, False, 0.99, False),
        (1500, 1000, True, 1.0, False),
        (10, 0, False, 0.99, False),
        (10, None, False, None, False),
    ],
)
def test_an_estimate_that_was_too_low_is_never_done(
    board: StatusBoard,
    clock: Clock,
    rows: int,
    expected: int | None,
    exact: bool,
    fraction: float | None,
    eta: bool,
) -> None:
    seen = CopyProgress(board, monotonic=clock)
    seen.sample()
    clock.now += 1
    board.table("public.items").update(rows_copied=rows, rows_estimated=expected, rows_exact=exact)
    table = seen.sample()[0]
    assert table.fraction == fraction
    assert (table.eta_seconds is not None) == eta


def test_counts_say_whether_they_are_estimated(board: StatusBoard, clock: Clock) -> None:
    seen = CopyProgress(board, monotonic=clock)
    board.table("public.items").update(rows_copied=12_000)
    assert rows_text(seen.sample()[0]) == "12,000/~1,000 rows (estimated)"
    board.table("public.items").update(rows_estimated=90_000, rows_exact=True)
    assert rows_text(seen.sample()[0]) == "12,000/90,000 rows"
    board.table("public.items").update(rows_estimated=None)
    assert rows_text(seen.sample()[0]) == "12,000 rows"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (7 * 10**12, "7.0 TB")],
)
def test_sizes(value: int, text: str) -> None:
    assert size_text(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_the_lag_in_words() -> None:
    assert lag_text(None, None) is None
    assert lag_text(12_000_000, 3.42) == "12.0 MB, 3.4 s behind"
    assert lag_text(None, 3.0) == "3.0 s behind"


# -- the time of a copy


def test_the_time_of_a_copy_is_from_its_first_to_its_last_chunk(
    board: StatusBoard, clock: Clock
) -> None:
    clock.now += 5
    board.table("public.items").update(state="catching_up")
    clock.now += 5
    assert board.copy_seconds() == 5.0
    board.table("public.items").update(state="copying")  # the next window
    clock.now += 5
    board.table("public.items").update(state="streaming")
    clock.now += 100
    assert board.copy_seconds() == 15.0
    board.table("public.other").update(state="copying")
    clock.now += 1
    board.table("public.other").update(state="streaming")
    assert board.copy_seconds() == 116.0


def test_a_table_copied_again_has_a_time_of_its_own(board: StatusBoard, clock: Clock) -> None:
    board.table("public.items").update(state="streaming")
    clock.now += 1000
    board.table("public.items").update(state="copying")
    clock.now += 3
    board.table("public.items").update(state="streaming")
    assert board.copy_seconds() == 3.0


def test_nothing_copied_has_no_time() -> None:
    board = StatusBoard("default")
    board.table("a").update(state="streaming")
    assert board.copy_seconds() is None


# -- what is shown


def events(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, object]]:
    return [
        vars(record)["event_fields"] for record in caplog.records if record.getMessage() == event
    ]


async def test_without_a_terminal_there_is_a_line_now_and_then(
    board: StatusBoard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.05)
    board.table("public.done").update(state="streaming")
    board.set_lag(lag_bytes=7, seconds=0.5)
    with caplog.at_level(logging.INFO, "cdc_sync"):
        watch = asyncio.create_task(ProgressWatch(board).run())
        for _ in range(30):
            board.table("public.items").add(rows_copied=2, bytes_copied=10)
            await asyncio.sleep(0.01)
        board.table("public.items").update(state="streaming")
        await asyncio.sleep(0.05)
        lines = len(events(caplog, "copy_progress"))
        await asyncio.sleep(0.15)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
    found = events(caplog, "copy_progress")
    assert 2 <= len(found) <= 8
    assert len(found) == lines
    assert {entry["table"] for entry in found} == {"public.items"}
    last = found[-1]
    assert (last["rows_expected"], last["expected_by"]) == (1000, "estimate")
    assert (last["lag_bytes"], last["lag_seconds"]) == (7, 0.5)
    assert isinstance(last["rows"], int)
    assert last["bytes"] == last["rows"] * 5


async def test_a_short_copy_is_not_worth_a_line(
    board: StatusBoard, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "cdc_sync"):
        watch = asyncio.create_task(ProgressWatch(board).run())
        await asyncio.sleep(0.05)
        board.table("public.items").update(state="streaming")
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
    assert events(caplog, "copy_progress") == []


def test_the_screen_has_a_line_a_table_and_logs_above_it(
    board: StatusBoard, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    terminal = Terminal()
    screen = ProgressScreen(terminal)
    screen.log_stream.write("before\n")
    seen = CopyProgress(board, monotonic=clock)
    seen.sample()
    clock.now += 1
    board.table("public.items").add(rows_copied=250, bytes_copied=1_000_000)
    screen.show(seen.sample(), (4096, 1.5))
    screen.log_stream.write("12:00:00 \x1b[32minfo\x1b[0m  [not markup] above\n")
    screen.show(None, (None, None))
    screen.log_stream.write("after\n")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "info  [not markup] above" in text
    (line,) = {line.strip() for line in text.splitlines() if "public.items" in line}
    for part in ("250/~1,000 rows (estimated)", "1.0 MB", "250 rows/s", "ETA 0:03", "copying"):
        assert part in line
    assert "4.1 kB, 1.5 s behind" in text


@pytest.mark.parametrize("width", [80, 100, 129, 130, 200])
def test_a_narrow_terminal_shows_less_and_cuts_nothing_off(width: int) -> None:
    tables = [
        TableProgress(
            "public.documents", "copying", 1_250_000, 8_000_000, False, 10**10, 4123.0, 1637.0
        ),
        TableProgress("app.items", "pending", 0, 9000, True, 0, None, None),
        TableProgress("app.unknown", "copying", 5, None, False, 0, None, None),
    ]
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    console.print(progress_table(tables, (12_000_000, 3.4), width))
    text = stream.getvalue()
    assert "…" not in text
    assert len(text.splitlines()) == 4
    for part in ("1,250,000/~8,000,000", "estimated", "4,123 rows/s", "ETA 27:17", "pending"):
        assert part in text
    assert ("10.0 GB" in text) == (width >= 130)
    assert "stream 12.0 MB, 3.4 s behind" in text


@pytest.mark.parametrize("term", ["", "dumb", "unknown"])
def test_a_terminal_that_cannot_draw_is_none(monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    monkeypatch.setenv("TERM", term)
    assert not on_terminal(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert on_terminal(Terminal())
    assert not on_terminal(io.StringIO())


# -- what a difference means


@pytest.mark.parametrize(
    ("rows", "points", "letters", "moving", "live", "said"),
    [
        (10, 7, 0, False, False, "3 rows have no point: rows of equal keys share one"),
        (10, 7, 3, False, True, "3 rows have no point: 3 could not be written and are dead"),
        (10, 7, 2, False, True, "3 rows have no point: rows of equal keys"),
        (7, 10, 0, False, False, "3 points have no row"),
        (10, 7, 0, True, True, "the source is being written: the counts are of different moments"),
        (10, 7, 0, True, False, "the changes wait in the slot, and cdc-sync run applies them"),
        (10, 7, 0, None, False, "not known whether the source has been written"),
    ],
)
def test_a_difference_is_explained(
    rows: int, points: int, letters: int, moving: bool | None, live: bool, said: str
) -> None:
    assert said in difference(rows, points, letters, moving, live)


def table_summary(name: str, agree: bool | None) -> TableSummary:
    return TableSummary(name, name, 10, 10, 100, 2.0, 0, 0, Counts(10, 10, agree, "meaning"))


@pytest.mark.parametrize(
    ("answers", "all_of_them"),
    [
        ([True, True], True),
        ([True, None], None),
        ([False, None], False),
        ([], True),
    ],
)
def test_the_tables_agree_when_each_does(
    answers: list[bool | None], all_of_them: bool | None
) -> None:
    made = CopySummary(tuple(table_summary(f"t{i}", a) for i, a in enumerate(answers)), 2.0)
    assert made.agree is all_of_them


def test_the_summary_is_an_event_a_table_and_one_for_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = CopySummary((table_summary("a", True), table_summary("b", False)), 4.0)
    with caplog.at_level(logging.INFO, "cdc_sync"):
        log_summary(made)
    first, second, total = events(caplog, "copy_summary")
    assert (first["table"], first["agree"], first["rows_per_second"]) == ("a", True, 5.0)
    assert (second["table"], second["agree"]) == ("b", False)
    assert (total["tables"], total["rows"], total["rows_per_second"]) == (2, 20, 5.0)
    assert [r.levelno for r in caplog.records] == [logging.INFO, logging.WARNING, logging.INFO]
