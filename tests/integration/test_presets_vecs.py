"""Preset vecs, with the library itself on both sides: what it finds through Qdrant is what it
finds through pgvector, whatever it writes in between."""

from __future__ import annotations

import json
import random
import uuid

import pytest
from qdrant_client import models

from tests.support.fix_libraries import DIM, WORDS, caught_up, embed, payloads
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget


async def test_vecs(database18: Database, qdrant: QdrantTarget) -> None:
    vecs = pytest.importorskip("vecs")
    client = vecs.create_client(database18.url)
    source = client.get_or_create_collection("docs", dimension=DIM)
    noise = random.Random(3)
    records = [
        (f"key {n}", embed(word), {"word": word, "n": n, "long": noise.randbytes(4_000).hex()})
        for n, word in enumerate(WORDS)
    ]
    source.upsert([*records, (str(uuid.UUID(int=1 << 100)), embed("bare"), {})])
    source.create_index(measure=vecs.IndexMeasure.l2_distance)
    collection = qdrant.new_collection_name()
    table = {"name": "vecs.docs", "preset": "vecs", "collection": collection}

    def compare(word: str, filters: dict[str, object] | None, own: models.Filter | None) -> None:
        found = source.query(
            embed(word), limit=5, filters=filters, measure="l2_distance", include_metadata=True
        )
        points = qdrant.client().query_points(collection, embed(word), query_filter=own, limit=5)
        ours = []
        for point in points.points:
            payload = dict(point.payload or {})
            ours.append((payload.pop("_id"), payload))
        assert ours == [(key, metadata) for key, metadata in found]
        assert ours

    async with running(pipeline_settings(database18, qdrant, table), database18, qdrant) as life:
        for change in range(2):
            for word in WORDS:
                compare(word, None, None)
            condition = models.FieldCondition(key="n", range=models.Range(gte=4))
            compare("alpha", {"n": {"$gte": 4}}, models.Filter(must=[condition]))
            if change:
                break
            source.delete(["key 1", "key 2"])
            source.upsert([("key 3", embed("moved"), {"word": "moved", "n": 77})])
            # The metadata is large, and not in the message.
            database18.execute(
                "UPDATE vecs.docs SET vec = %s WHERE id = 'key 5'", (json.dumps(embed("there")),)
            )
            await caught_up(life)
        assert len(payloads(qdrant, collection)) == 9
        assert payloads(qdrant, collection)[str(uuid.UUID(int=1 << 100))] == {
            "_id": str(uuid.UUID(int=1 << 100))
        }
        params = qdrant.client().get_collection(collection).config.params.vectors
        assert isinstance(params, models.VectorParams)
        assert params.distance is models.Distance.EUCLID
    client.disconnect()
