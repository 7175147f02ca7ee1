"""Preset llamaindex, with the library itself on both sides: what it finds through Qdrant is what it
finds through pgvector, whatever it writes in between."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from qdrant_client import models

from tests.support.fix_libraries import DIM, WORDS, alchemy_url, caught_up, embed, payloads
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget


class LlamaIndex:
    """PGVectorStore on the one side, QdrantVectorStore on the other."""

    def __init__(self, database: Database, engine: Any, qdrant: QdrantTarget) -> None:
        self._database = database
        self._engine = engine
        asynchronous = pytest.importorskip("sqlalchemy.ext.asyncio")
        self._async_engine = asynchronous.create_async_engine(alchemy_url(database))
        self._qdrant = qdrant
        self.schema = pytest.importorskip("llama_index.core.schema")
        self.types = pytest.importorskip("llama_index.core.vector_stores.types")
        self._postgres = pytest.importorskip("llama_index.vector_stores.postgres")
        self._other = pytest.importorskip("llama_index.vector_stores.qdrant")

    def source(self, **options: object) -> Any:
        url = alchemy_url(self._database)
        return self._postgres.PGVectorStore(
            connection_string=url,
            async_connection_string=url,
            engine=self._engine,
            # Never used, but the one is not taken without the other.
            async_engine=self._async_engine,
            table_name="notes",
            embed_dim=DIM,
            **options,
        )

    def target(self, collection: str) -> Any:
        return self._other.QdrantVectorStore(
            collection_name=collection, client=self._qdrant.new_client()
        )

    def nodes(self) -> list[Any]:
        """Nodes of every kind, of three documents."""
        made = []
        for n, word in enumerate(WORDS):
            source = self.schema.RelatedNodeInfo(node_id=f"doc{n % 3}")
            common: dict[str, object] = {
                "embedding": embed(word),
                "metadata": {"n": n, "word": word, "tags": [word, "ü\u2028"], "text": "mine"},
                "relationships": {self.schema.NodeRelationship.SOURCE: source},
                "excluded_llm_metadata_keys": ["n"],
            }
            text = f'{word} "quoted" \\ ü \u2028 \x7f'
            if n == 7:
                made.append(
                    self.schema.ImageNode(text=text, image_url="http://example.org/x", **common)
                )
            elif n == 8:
                made.append(self.schema.IndexNode(text=text, index_id="other", **common))
            elif n == 9:
                resource = self.schema.MediaResource(text=text)
                made.append(self.schema.Node(text_resource=resource, **common))
            else:
                made.append(self.schema.TextNode(text=text, start_char_idx=n, **common))
        return made

    def found(self, store: Any, word: str, **options: object) -> list[tuple[object, float]]:
        query = self.types.VectorStoreQuery(
            query_embedding=embed(word), similarity_top_k=5, **options
        )
        result = store.query(query)
        dumps = [node.model_dump(exclude={"embedding"}) for node in result.nodes]
        return list(zip(dumps, result.similarities, strict=True))

    def compare(self, source: Any, target: Any, abs_error: float = 1e-5) -> None:
        def filters(operator: str, key: str, value: object) -> Any:
            one = self.types.MetadataFilter(key=key, value=value, operator=operator)
            return self.types.MetadataFilters(filters=[one])

        queries: list[tuple[str, dict[str, object]]] = [(word, {}) for word in WORDS]
        queries += [
            ("alpha", {"filters": filters("==", "word", "zeta")}),
            ("alpha", {"filters": filters(">=", "n", 6)}),
            ("alpha", {"filters": filters("in", "word", ["eta", "iota", "beta"])}),
            ("alpha", {"filters": filters("==", "ref_doc_id", "doc1")}),
        ]
        for word, options in queries:
            one = self.found(source, word, **options)
            other = self.found(target, word, **options)
            assert [node for node, _ in one] == [node for node, _ in other]
            scores = [score for _, score in other]
            assert [score for _, score in one] == pytest.approx(scores, abs=abs_error)
            assert one


@pytest.fixture
def llamaindex(
    database18: Database, create_engine: Callable[[str], Any], qdrant: QdrantTarget
) -> LlamaIndex:
    # Its own statements need the client-side parameters of psycopg2.
    engine = create_engine(alchemy_url(database18, "psycopg2"))
    return LlamaIndex(database18, engine, qdrant)


LLAMAINDEX_STORES: list[dict[str, object]] = [
    {},
    {"use_jsonb": True, "hybrid_search": True},
    {
        "use_halfvec": True,
        "hnsw_kwargs": {"hnsw_m": 8, "hnsw_ef_construction": 32, "hnsw_ef_search": 40},
    },
]


@pytest.mark.parametrize("options", LLAMAINDEX_STORES, ids=["json", "hybrid", "halfvec"])
async def test_llamaindex_through_every_kind_of_change(
    database18: Database,
    qdrant: QdrantTarget,
    llamaindex: LlamaIndex,
    options: Mapping[str, object],
) -> None:
    source = llamaindex.source(**options)
    nodes = llamaindex.nodes()
    source.add(nodes[:8])
    collection = qdrant.new_collection_name()
    settings = pipeline_settings(
        database18, qdrant, {"name": "data_notes", "preset": "llamaindex", "collection": collection}
    )
    async with running(settings, database18, qdrant) as life:
        target = llamaindex.target(collection)
        error = 1e-3 if options.get("use_halfvec") else 1e-5
        source.add(nodes[8:])
        await caught_up(life)
        llamaindex.compare(source, target, error)
        # Point for point what the library writes to Qdrant itself.
        own = qdrant.new_collection_name()
        llamaindex.target(own).add(nodes)
        by_word = {payload["word"]: payload for payload in payloads(qdrant, own).values()}
        ours = {payload["word"]: payload for payload in payloads(qdrant, collection).values()}
        assert ours == by_word
        schema = qdrant.client().get_collection(collection).payload_schema
        assert schema["doc_id"].data_type == models.PayloadSchemaType.KEYWORD

        source.delete("doc0")
        source.delete_nodes(node_ids=[nodes[1].node_id])
        again = nodes[2].model_copy()
        again.set_content("replaced")
        source.delete_nodes(node_ids=[again.node_id])
        source.add([again])
        await caught_up(life)
        llamaindex.compare(source, target, error)
        assert len(payloads(qdrant, collection)) == 5
        qdrant.client().delete_collection(own)


async def test_llamaindex_nodes_by_id(
    database18: Database, qdrant: QdrantTarget, llamaindex: LlamaIndex
) -> None:
    """With the node id as replica identity it is the point id, as in the library's own points."""
    source = llamaindex.source()
    nodes = llamaindex.nodes()
    source.add(nodes)
    database18.execute(
        "ALTER TABLE data_notes ALTER node_id SET NOT NULL;"
        "CREATE UNIQUE INDEX data_notes_node_id ON data_notes (node_id);"
        "ALTER TABLE data_notes REPLICA IDENTITY USING INDEX data_notes_node_id"
    )
    collection = qdrant.new_collection_name()
    settings = pipeline_settings(
        database18, qdrant, {"name": "data_notes", "preset": "llamaindex", "collection": collection}
    )
    async with running(settings, database18, qdrant) as life:
        target = llamaindex.target(collection)
        assert set(payloads(qdrant, collection)) == {node.node_id for node in nodes}
        source.delete_nodes(node_ids=[nodes[1].node_id])
        await caught_up(life)
        llamaindex.compare(source, target)
        wanted = [nodes[n].node_id for n in (0, 1, 4, 9)]
        found = {node.node_id: node for node in target.get_nodes(node_ids=wanted)}
        assert set(found) == {wanted[0], *wanted[2:]}
        assert found[wanted[2]].get_content() == nodes[4].get_content()
        query = llamaindex.types.VectorStoreQuery(query_embedding=embed("zeta"), similarity_top_k=3)
        assert target.query(query).ids == source.query(query).ids


async def test_llamaindex_update_without_the_large_columns(
    database18: Database, qdrant: QdrantTarget, llamaindex: LlamaIndex
) -> None:
    """Text and metadata are one field in Qdrant: what a message lacks of them is read again."""
    source = llamaindex.source(use_jsonb=True)
    nodes = llamaindex.nodes()
    noise = random.Random(2)
    for node in nodes:
        node.set_content(noise.randbytes(9_000).hex())
        node.metadata["noise"] = noise.randbytes(9_000).hex()
    source.add(nodes)
    collection = qdrant.new_collection_name()
    settings = pipeline_settings(
        database18, qdrant, {"name": "data_notes", "preset": "llamaindex", "collection": collection}
    )
    async with running(settings, database18, qdrant) as life:
        target = llamaindex.target(collection)
        vector = json.dumps(embed("moved"))
        database18.execute("UPDATE data_notes SET embedding = %s WHERE id = 1", (vector,))
        database18.execute("UPDATE data_notes SET text = 'short' WHERE id = 2")
        database18.execute("UPDATE data_notes SET metadata_ = metadata_ - 'noise' WHERE id = 3")
        database18.execute("UPDATE data_notes SET embedding = NULL WHERE id = 4")
        await caught_up(life)
        llamaindex.compare(source, target)
        assert "noise" not in payloads(qdrant, collection)[3]
        labels = {"table": "public.data_notes", "resolution": "refetched"}
        assert life.metric("unchanged_toast_total", **labels) >= 3
