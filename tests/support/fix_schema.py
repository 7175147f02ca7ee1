"""Fixtures of tests of schema events."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest

from cdc_sync.sync import stopped_tables
from tests.support.fix_postgres import Database
from tests.support.schema_scene import CREATE


@pytest.fixture
def tried_seldom() -> Iterator[None]:
    """Everything is tried again because something has changed, not because of the time; but for a
    table that is planned while the stream is still before the change, and stops once more."""
    with mock.patch.multiple(stopped_tables, RETRY_SECONDS=30.0, FIRST_PAUSE_SECONDS=30.0):
        yield


@pytest.fixture
def schema_tables(database18: Database) -> None:
    """The tables of a scene: ``docs`` and ``others``."""
    database18.execute(CREATE)
