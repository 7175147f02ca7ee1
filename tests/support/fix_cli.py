"""The fixture of tests that call the command line in this process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from cdc_sync.ops.logging import EventHandler
from cdc_sync.ops.redaction import forget_secrets


@pytest.fixture(autouse=True)
def _log_handlers_end_with_their_test() -> Iterator[None]:
    """A command that ran in this process has left one, to a stream that is closed by now."""
    yield
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, EventHandler):
            root.removeHandler(handler)
            handler.close()


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings from outside, and no secrets left to be masked in later tests."""
    for name in list(os.environ):
        if name.startswith("CDC_SYNC_"):
            monkeypatch.delenv(name)
    yield
    forget_secrets()
