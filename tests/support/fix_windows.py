"""Fixtures of tests about windows of the copy, in the test's own process."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from cdc_sync.demo.embedded import PostgresServer, find_binaries
from tests.support.fix_postgres import Database, DatabaseFactory
from tests.support.windows import ROWS, Windows, create_paged


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Windows:
    """Lets windows be opened one at a time."""
    return Windows(monkeypatch)


@pytest.fixture
def all_events(caplog: pytest.LogCaptureFixture) -> None:
    """Have ``caplog`` keep what is logged for debugging, too."""
    caplog.set_level(logging.DEBUG, "cdc_sync")


@pytest.fixture(scope="module")
def standby_server() -> Iterator[PostgresServer]:
    """A server whose synchronous standby can be made to be missing, or to be late."""
    with PostgresServer(find_binaries(18)) as started:
        yield started


@pytest.fixture
def unseen(standby_server: PostgresServer, database18_factory: DatabaseFactory) -> Database:
    """A database with the paged table ``docs``, whose commits can be streamed before they are
    visible."""
    made = database18_factory(standby_server)
    create_paged(made, ROWS)
    return made
