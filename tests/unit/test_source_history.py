"""What is put on record of the source: only what every later look at it must find again."""

from __future__ import annotations

import dataclasses
from typing import cast

import pytest

from cdc_sync.config import Settings
from cdc_sync.ops.metrics import Metrics
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.watch import SourcePosition
from cdc_sync.qdrant.sink import SourceMark, StateStore
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.source_history import SourceHistory

SETTINGS = Settings.model_validate(
    {
        "source": {"url": "postgresql://user@localhost/db"},
        "qdrant": {"url": "http://localhost:6334"},
        "pipeline": {"name": "p"},
        "tables": [{"name": "docs"}],
    }
)
#: Transaction ids until their numbers come round, and those before the ones here.
EPOCHS = 1 << 32
EPOCH = 3 * EPOCHS


class Store:
    """Keeps one mark."""

    def __init__(self) -> None:
        self.kept: SourceMark | None = None

    async def mark(self, pipeline: str) -> SourceMark | None:
        return self.kept

    async def save_mark(self, mark: SourceMark) -> None:
        self.kept = mark


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def history(store: Store, monkeypatch: pytest.MonkeyPatch) -> SourceHistory:
    async def none(*_: object) -> dict[int, str]:
        return {}

    monkeypatch.setattr(SourceHistory, "_identities", none)
    return SourceHistory(SETTINGS, cast(StateStore, store))


def seen(xmin: int, xmax: int, *running: int) -> SourcePosition:
    """A look at the source."""
    return SourcePosition(
        Lsn(100),
        Lsn(50),
        "reserved",
        None,
        True,
        None,
        EPOCH + xmin,
        EPOCH + xmax,
        frozenset(EPOCH + xid for xid in running),
    )


async def recorded(history: SourceHistory, store: Store) -> int:
    """The transaction on record once it was kept."""
    await history.keep(Relations((), SETTINGS, Metrics()), 100)
    assert store.kept is not None
    return store.kept.xid


@pytest.mark.requirement("R59")
async def test_a_transaction_that_is_not_visible_yet_is_not_recorded(
    history: SourceHistory, store: Store
) -> None:
    history.applied(6)
    history.observe(seen(7, 7))
    assert await recorded(history, store) == EPOCH + 6
    history.applied(7)
    history.observe(seen(7, 9, 7))
    history.observe(seen(7, 9, 7))
    assert await recorded(history, store) == EPOCH + 6
    history.observe(seen(9, 9))
    assert await recorded(history, store) == EPOCH + 7


@pytest.mark.requirement("R59")
async def test_under_load_it_is_the_last_one_of_the_look_before(
    history: SourceHistory, store: Store
) -> None:
    """The last one is newer than the look."""
    history.applied(10)
    history.observe(seen(5, 8))
    assert await recorded(history, store) == 0
    history.applied(30)
    history.observe(seen(25, 28))
    assert await recorded(history, store) == EPOCH + 10


@pytest.mark.requirement("R59")
async def test_what_was_applied_before_another_process_had_the_slot_does_not_count(
    history: SourceHistory, store: Store
) -> None:
    """It may have begun anew, since the source had gone back to before that."""
    history.applied(10)
    history.observe(seen(20, 20))
    assert await recorded(history, store) == EPOCH + 10
    await history.load()
    history.observe(seen(20, 20))
    assert await recorded(history, store) == EPOCH + 10
    store.kept = SourceMark("p", lsn=7, timeline=1, xid=EPOCH + 4)
    await history.load()
    history.observe(seen(30, 30))
    assert await recorded(history, store) == EPOCH + 4


# -- numbers that come round


def look(xmax: int, *running: int) -> SourcePosition:
    """A look at the source, of whatever epoch."""
    return dataclasses.replace(seen(0, 0), xmin=xmax, xmax=xmax, running=frozenset(running))


@pytest.mark.requirement("R75")
@pytest.mark.parametrize("first", [1000, EPOCHS - 5, 3 * EPOCHS + 7])
def test_a_transaction_stays_the_same_when_its_number_comes_round(
    history: SourceHistory, first: int
) -> None:
    """A quiet table in a busy cluster: its last transaction is long ago."""
    history.applied(first % EPOCHS)
    # In steps, as it looks every few seconds.
    for later in range(first + 10, first + 3 * EPOCHS, EPOCHS // 3):
        history.observe(look(later))
        assert history._visible_xid == first, later


def test_a_number_is_that_of_the_present(history: SourceHistory) -> None:
    history.applied(7)
    history.observe(look(2 * EPOCHS + 100))
    assert history._visible_xid == 2 * EPOCHS + 7
    history.applied(9)
    history.observe(look(2 * EPOCHS + 100))
    assert history._visible_xid == 2 * EPOCHS + 9


def test_one_that_is_not_over_is_looked_at_again(history: SourceHistory) -> None:
    history.applied(50)
    history.observe(look(100, 50))
    assert history._visible_xid == 0
    history.observe(look(100))
    assert history._visible_xid == 50
    history.applied(120)
    history.observe(look(110))
    assert history._visible_xid == 50
    history.observe(look(130))
    assert history._visible_xid == 120
