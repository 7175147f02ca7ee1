"""The book of stopped tables: when they are tried again, and what is shown."""

from __future__ import annotations

import logging

import pytest

from cdc_sync.errors import (
    CdcSyncError,
    ConfigError,
    ErrorKind,
    MappingError,
    SinkError,
    SourceError,
    StateError,
)
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.sync.stopped_tables import (
    FIRST_PAUSE_SECONDS,
    RETRY_SECONDS,
    StoppedTables,
    concerns_one_table,
)

NAME = "public.docs"
ERROR = SourceError(ErrorKind.TABLE_UNUSABLE, "table public.docs was dropped", "Create it.")


class Book:
    """Stopped tables by a clock of the test's own."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.metrics = Metrics()
        self.board = StatusBoard("p", metrics=self.metrics)
        self.tables = StoppedTables(self.metrics, self.board, lambda: self.now)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"cdc_sync_{name}", labels)


def test_a_table_is_tried_at_once_and_then_after_pauses_that_double_up_to_a_minute() -> None:
    book = Book()
    book.tables.stop(NAME, ERROR)
    assert book.tables.due() == [NAME]
    pauses = [FIRST_PAUSE_SECONDS * 2**n for n in range(5)] + [RETRY_SECONDS] * 3
    assert pauses[4] < RETRY_SECONDS
    for pause in pauses:
        book.tables.stop(NAME, ERROR)
        book.now += pause - 0.5
        assert book.tables.due() == []
        book.now += 0.5
        assert book.tables.due() == [NAME]


def test_it_is_tried_when_the_catalog_shows_something_else_or_when_asked_for() -> None:
    book = Book()
    book.tables.stop(NAME, ERROR)
    book.tables.trying(NAME, "a")
    book.tables.stop(NAME, ERROR)
    book.tables.observe({NAME: "a", "public.others": "x"})
    assert book.tables.due() == []
    book.tables.observe({NAME: "b"})
    assert book.tables.due() == [NAME]
    book.tables.stop(NAME, ERROR)
    book.tables.observe({NAME: "b"})
    assert book.tables.due() == []
    book.tables.hurry(NAME)
    book.tables.hurry("public.others")
    assert book.tables.due() == [NAME]


def test_a_table_that_cannot_stay_is_not_copied_all_the_time() -> None:
    book = Book()
    book.tables.stop(NAME, ERROR)
    book.tables.planned(NAME)
    assert book.tables.holds(NAME)
    assert not book.tables.waits(NAME)
    assert book.tables.due() == []
    for pause in (FIRST_PAUSE_SECONDS, 2 * FIRST_PAUSE_SECONDS, 4 * FIRST_PAUSE_SECONDS):
        book.tables.start(NAME)
        assert not book.tables.holds(NAME)
        book.now += 5
        book.tables.stop(NAME, ERROR)
        assert book.tables.due() == []
        book.now += pause
        assert book.tables.due() == [NAME]


def test_a_table_that_has_run_for_long_is_tried_at_once_again() -> None:
    book = Book()
    for _ in range(9):
        book.tables.stop(NAME, ERROR)
    book.tables.start(NAME)
    book.now += RETRY_SECONDS
    book.tables.stop(NAME, ERROR)
    assert book.tables.due() == [NAME]
    book.tables.stop(NAME, ERROR)
    book.now += FIRST_PAUSE_SECONDS
    assert book.tables.due() == [NAME]


def test_what_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cdc_sync")
    book = Book()
    book.tables.stop(NAME, ERROR)
    book.tables.stop(NAME, MappingError("another error", "Another remedy."))
    assert [record.message for record in caplog.records].count("table_stopped") == 1
    shown = book.board.table(NAME).to_json()
    assert (shown["state"], shown["error"]) == ("stopped", "another error")
    assert shown["remedy"] == "Another remedy."
    assert book.metric("table_stopped", table=NAME) == 1
    assert book.metric("tables", state="stopped") == 1
    assert book.metric("schema_changes_total", table=NAME, outcome="refused") == 1
    (check,) = [check for check in book.board.readiness() if check.name == "tables"]
    assert not check.ok
    assert NAME in str(check.message)
    book.tables.start(NAME)
    shown = book.board.table(NAME).to_json()
    assert (shown["state"], shown["error"], shown["remedy"]) == ("copying", None, None)
    assert book.metric("table_stopped", table=NAME) == 0
    assert [check.ok for check in book.board.readiness() if check.name == "tables"] == [True]


@pytest.mark.parametrize(
    ("error", "of_one"),
    [
        (MappingError("x"), True),
        (ConfigError("x"), True),
        (SourceError(ErrorKind.SOURCE_PERMISSION, "x"), True),
        (SinkError(ErrorKind.COLLECTION_MISSING, "x"), True),
        (SinkError(ErrorKind.SINK_REFUSED, "x"), True),
        (SourceError(ErrorKind.SOURCE_UNAVAILABLE, "x"), False),
        (SourceError(ErrorKind.SLOT_LOST, "x"), False),
        (SinkError(ErrorKind.SINK_AUTH, "x"), False),
        (SinkError(ErrorKind.SINK_UNKNOWN, "x"), False),
        (StateError("x"), False),
        (CdcSyncError(ErrorKind.DEAD_LETTER_LIMIT, "x"), False),
        (RuntimeError("x"), False),
    ],
)
def test_whose_error_it_is(error: BaseException, of_one: bool) -> None:
    assert concerns_one_table(error) is of_one
