"""What the tests with the libraries of the presets share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest

from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running
from tests.support.qdrant_control import QdrantTarget

DIM = 8
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa")


def embed(text: str) -> list[float]:
    """A vector that depends on the text and on nothing else."""
    digest = hashlib.sha256(text.encode()).digest()
    return [byte / 255 - 0.5 for byte in digest[:DIM]]


class Hit(NamedTuple):
    """What a library found, without what differs between its stores by design."""

    text: str
    metadata: Mapping[str, object]
    score: float


def same(one: Sequence[Hit], other: Sequence[Hit]) -> None:
    assert [(hit.text, hit.metadata) for hit in one] == [(hit.text, hit.metadata) for hit in other]
    assert [hit.score for hit in one] == pytest.approx([hit.score for hit in other], abs=1e-5)


def alchemy_url(database: Database, driver: str = "psycopg") -> str:
    return database.url.replace("postgresql://", f"postgresql+{driver}://", 1)


@pytest.fixture
def create_engine() -> Iterator[Callable[[str], Any]]:
    """Makes engines for the libraries, and closes their connections after the test."""
    sqlalchemy = pytest.importorskip("sqlalchemy")
    engines: list[Any] = []

    def create(url: str) -> Any:
        engines.append(sqlalchemy.create_engine(url))
        return engines[-1]

    yield create
    for engine in engines:
        engine.dispose()


def payloads(qdrant: QdrantTarget, collection: str) -> dict[object, dict[str, Any]]:
    points, _ = qdrant.client().scroll(collection, limit=1000)
    return {point.id: dict(point.payload or {}) for point in points}


async def caught_up(life: Running) -> None:
    await life.caught_up()
    assert life.qdrant.violations() == []
