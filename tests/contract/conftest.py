"""Fixtures of the sink's contract, whose tests run on the embedded engine and on a server, and of
what is relied on in a server."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from qdrant_client import QdrantClient

from cdc_sync.config import QdrantSettings
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Sink, TableWriter
from tests.support.fix_qdrant import QdrantTarget
from tests.support.qdrant_cases import create_plain, create_rich
from tests.support.sink_rows import items_plan
from tests.support.sinks import ready, settings_of


@pytest.fixture(params=["edge", "server"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> QdrantSettings:
    if request.param == "edge":
        return QdrantSettings.model_validate({"url": f"edge:{tmp_path / 'edge'}"})
    target: QdrantTarget = request.getfixturevalue("qdrant")
    # Small requests, so that a few hundred points exercise cutting and lanes.
    return settings_of(target, request_points=50, request_bytes=4096)


@pytest.fixture
async def sink(settings: QdrantSettings) -> AsyncIterator[Sink]:
    opened = await open_sink(settings)
    yield opened
    await opened.close()


@pytest.fixture
def collection() -> str:
    return f"items_{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def writer(sink: Sink, collection: str) -> TableWriter:
    return await ready(sink, items_plan(collection))


@pytest.fixture
def client(qdrant: QdrantTarget) -> QdrantClient:
    return qdrant.client()


@pytest.fixture
def plain(qdrant: QdrantTarget) -> str:
    return create_plain(qdrant)


@pytest.fixture
def rich(qdrant: QdrantTarget) -> str:
    return create_rich(qdrant)
