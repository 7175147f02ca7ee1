"""Fixtures that give tests a Qdrant server: the test server of this repository, or a real one.

With CDC_SYNC_TEST_QDRANT_URL (gRPC address, `http(s)://host:6334`) and optionally
CDC_SYNC_TEST_QDRANT_API_KEY set, the fixture `qdrant` uses that server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdc_sync.qdrant.server_state import COLLECTION
from tests.support.qdrant_control import Faults, QdrantProcess, QdrantTarget

__all__ = ["Faults", "QdrantProcess", "QdrantTarget", "qdrant", "qdrant_private", "qdrant_session"]

_URL = "CDC_SYNC_TEST_QDRANT_URL"
_API_KEY = "CDC_SYNC_TEST_QDRANT_API_KEY"


@pytest.fixture(scope="session")
def qdrant_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QdrantTarget]:
    """The server all tests of the session share; use `qdrant` instead."""
    url = os.environ.get(_URL)
    if url:
        target = QdrantTarget(url, os.environ.get(_API_KEY) or None)
    else:
        target = QdrantProcess(tmp_path_factory.mktemp("qdrant"))
    try:
        yield target
    finally:
        target.close()


def _collections(target: QdrantTarget) -> set[str]:
    return {collection.name for collection in target.client().get_collections().collections}


@pytest.fixture
def qdrant(qdrant_session: QdrantTarget) -> Iterator[QdrantTarget]:
    """A running server. Collections made during the test, and scripted faults, are removed after
    it; the records of pipelines before it too.
    """
    before = _collections(qdrant_session)
    if COLLECTION in before:
        qdrant_session.client().delete_collection(COLLECTION)
        before.remove(COLLECTION)
    if qdrant_session.faults is not None:
        qdrant_session.faults.clear_log()
    yield qdrant_session
    if qdrant_session.faults is not None:
        qdrant_session.faults.clear()
    for name in _collections(qdrant_session) - before:
        qdrant_session.client().delete_collection(name)


@pytest.fixture
def scripted(qdrant: QdrantTarget) -> QdrantTarget:
    """The server of `qdrant`, to be given faults. Skipped where a real one is asked for."""
    if qdrant.faults is None:
        pytest.skip("a real server has no scripted faults")
    return qdrant


@pytest.fixture
def faults(scripted: QdrantTarget) -> Faults:
    """The faults of that server."""
    return scripted.script


@pytest.fixture
def qdrant_private(tmp_path: Path) -> Iterator[QdrantProcess]:
    """A test server of the test's own, to be killed, restarted and given faults. Skipped where a
    real one is asked for.
    """
    if os.environ.get(_URL):
        pytest.skip(f"needs scripted faults or kill -9, which the server of {_URL} has not")
    target = QdrantProcess(tmp_path / "qdrant")
    try:
        yield target
    finally:
        target.close()
