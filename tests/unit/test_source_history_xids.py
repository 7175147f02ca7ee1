"""Which transaction goes on record as the newest that the source is known to have."""

from __future__ import annotations

from typing import Any, cast

import pytest

from cdc_sync.config import Settings
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.watch import SourcePosition
from cdc_sync.qdrant.sink import StateStore
from cdc_sync.sync.source_history import SourceHistory

_EPOCH = 1 << 32


def history() -> SourceHistory:
    settings = Settings.model_validate(
        {
            "source": {"url": "postgresql://user@localhost/db"},
            "qdrant": {"url": "http://localhost:6334"},
            "tables": [{"name": "docs"}],
        }
    )
    return SourceHistory(settings, cast("StateStore", None))


def seen(xmax: int, *running: int) -> SourcePosition:
    nothing: Any = None
    return SourcePosition(
        Lsn(1), nothing, nothing, nothing, nothing, nothing, xmax, xmax, frozenset(running)
    )


@pytest.mark.requirement("R75")
@pytest.mark.parametrize("first", [1000, _EPOCH - 5, 3 * _EPOCH + 7])
def test_a_transaction_stays_the_same_when_its_number_comes_round(first: int) -> None:
    """A quiet table in a busy cluster: its last transaction is long ago."""
    kept = history()
    kept.applied(first % _EPOCH)
    # In steps, as it looks every few seconds.
    for later in range(first + 10, first + 3 * _EPOCH, _EPOCH // 3):
        kept.observe(seen(later))
        assert kept._visible_xid == first, later


def test_a_number_is_that_of_the_present() -> None:
    kept = history()
    kept.applied(7)
    kept.observe(seen(2 * _EPOCH + 100))
    assert kept._visible_xid == 2 * _EPOCH + 7
    kept.applied(9)
    kept.observe(seen(2 * _EPOCH + 100))
    assert kept._visible_xid == 2 * _EPOCH + 9


def test_one_that_is_not_over_is_looked_at_again() -> None:
    kept = history()
    kept.applied(50)
    kept.observe(seen(100, 50))
    assert kept._visible_xid == 0
    kept.observe(seen(100))
    assert kept._visible_xid == 50
    kept.applied(120)
    kept.observe(seen(110))
    assert kept._visible_xid == 50
    kept.observe(seen(130))
    assert kept._visible_xid == 120
