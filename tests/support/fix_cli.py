"""The fixture of tests that call the command line in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cdc_sync.ops.redaction import forget_secrets


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No settings from outside, and no secrets left to be masked in later tests."""
    for name in list(os.environ):
        if name.startswith("CDC_SYNC_"):
            monkeypatch.delenv(name)
    yield
    forget_secrets()
