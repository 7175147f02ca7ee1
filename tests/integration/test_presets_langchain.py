"""Preset langchain, with the library itself on both sides: what it finds through Qdrant is what it
finds through pgvector, whatever it writes in between."""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from qdrant_client import models

from cdc_sync.errors import ConfigError, SourceError
from cdc_sync.postgres.connect import connect
from cdc_sync.sync.planning import plan_pipeline
from tests.support.fix_libraries import (
    DIM,
    WORDS,
    Hit,
    alchemy_url,
    caught_up,
    embed,
    payloads,
    same,
)
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget


class LangChain:
    """PGVector on the one side, QdrantVectorStore on the other."""

    def __init__(self, engine: Any, qdrant: QdrantTarget) -> None:
        self._engine = engine
        self._qdrant = qdrant
        base = pytest.importorskip("langchain_core.embeddings").Embeddings
        self.document = pytest.importorskip("langchain_core.documents").Document
        self._postgres = pytest.importorskip("langchain_postgres")
        self._other = pytest.importorskip("langchain_qdrant")
        methods = {
            "embed_query": lambda self, text: embed(text),
            "embed_documents": lambda self, texts: [embed(text) for text in texts],
        }
        self._embeddings = type("Embeddings", (base,), methods)()

    def source(self, name: str, **options: object) -> Any:
        return self._postgres.PGVector(
            embeddings=self._embeddings, connection=self._engine, collection_name=name, **options
        )

    def target(self, collection: str) -> Any:
        return self._other.QdrantVectorStore(
            client=self._qdrant.new_client(),
            collection_name=collection,
            embedding=self._embeddings,
        )

    def from_source(self, store: Any, query: str, k: int = 5, **options: object) -> list[Hit]:
        found = store.similarity_search_with_score(query, k=k, **options)
        # A cosine distance, and the similarity of Qdrant.
        return [Hit(d.page_content, d.metadata, 1 - score) for d, score in found]

    def from_target(self, store: Any, query: str, k: int = 5, **options: object) -> list[Hit]:
        hits = []
        for found, score in store.similarity_search_with_score(query, k=k, **options):
            metadata = dict(found.metadata)
            del metadata["_id"], metadata["_collection_name"]
            hits.append(Hit(found.page_content, metadata, score))
        return hits

    def compare(self, source: Any, target: Any) -> None:
        for word in (*WORDS, "another"):
            ours = self.from_target(target, word)
            same(self.from_source(source, word), ours)
            assert ours
        even = models.FieldCondition(key="metadata.even", match=models.MatchValue(value=True))
        same(
            self.from_source(source, "alpha", filter={"even": {"$eq": True}}),
            self.from_target(target, "alpha", filter=models.Filter(must=[even])),
        )
        late = models.FieldCondition(key="metadata.n", range=models.Range(gte=4))
        same(
            self.from_source(source, "beta", filter={"n": {"$gte": 4}}),
            self.from_target(target, "beta", filter=models.Filter(must=[late])),
        )

    def documents(self, *extra: str) -> list[Any]:
        return [
            self.document(
                page_content=word,
                metadata={"n": n, "even": n % 2 == 0, "deep": {"tags": [word, None], "x": 0.5}},
            )
            for n, word in enumerate((*WORDS, *extra))
        ]


@pytest.fixture
def langchain(
    database18: Database, create_engine: Callable[[str], Any], qdrant: QdrantTarget
) -> LangChain:
    return LangChain(create_engine(alchemy_url(database18)), qdrant)


def langchain_table(**more: object) -> dict[str, object]:
    return {"name": "langchain_pg_embedding", "preset": "langchain", **more}


async def test_langchain_collection_through_every_kind_of_change(
    database18: Database, qdrant: QdrantTarget, langchain: LangChain
) -> None:
    docs, other = langchain.source("docs"), langchain.source("other")
    ids = docs.add_documents(langchain.documents())
    other.add_documents(langchain.documents("not one of these"))
    collection = qdrant.new_collection_name()
    table = langchain_table(preset_collection="docs", collection=collection)
    settings = pipeline_settings(database18, qdrant, table)
    async with running(settings, database18, qdrant) as life:
        target = langchain.target(collection)
        langchain.compare(docs, target)
        # The ids that the library gave its documents are the points'.
        assert set(payloads(qdrant, collection)) == set(ids)
        (found,) = target.get_by_ids([ids[3]])
        assert (found.page_content, found.metadata["_id"]) == (WORDS[3], ids[3])

        changed = langchain.documents()[2:4]
        changed[0].page_content, changed[1].metadata = "changed", {"n": 99, "even": True}
        docs.add_documents(changed, ids=ids[2:4])
        docs.add_documents(langchain.documents("added")[-1:])
        docs.delete(ids=ids[:2])
        other.add_documents(langchain.documents("still not one of these")[-2:])
        await caught_up(life)
        langchain.compare(docs, target)
        assert len(payloads(qdrant, collection)) == 9
        assert langchain.from_target(target, "changed", 1)[0].text == "changed"
        # The application's own statements work: no column was taken into a row filter.
        database18.execute("UPDATE langchain_pg_embedding SET document = document || '!'")
        database18.execute("DELETE FROM langchain_pg_embedding WHERE document = 'eta!'")
        await caught_up(life)
        langchain.compare(docs, target)
        docs.delete_collection()
        await caught_up(life)
        assert payloads(qdrant, collection) == {}
        assert database18.execute("SELECT count(*) FROM langchain_pg_embedding") == [(12,)]


async def test_langchain_rows_move_between_collections(
    database18: Database, qdrant: QdrantTarget, langchain: LangChain
) -> None:
    """A row that comes has a text that is too large for the message, and must be read again."""
    docs, other = langchain.source("docs"), langchain.source("other")
    noise = random.Random(1).randbytes(20_000).hex()
    docs.add_documents(langchain.documents())
    (moving,) = other.add_documents([langchain.document(page_content=noise, metadata={"n": 1})])
    collection = qdrant.new_collection_name()
    table = langchain_table(preset_collection="docs", collection=collection)
    move = (
        "UPDATE langchain_pg_embedding SET collection_id ="
        " (SELECT uuid FROM langchain_pg_collection WHERE name = %s) WHERE id = %s"
    )
    async with running(pipeline_settings(database18, qdrant, table), database18, qdrant) as life:
        target = langchain.target(collection)
        assert len(payloads(qdrant, collection)) == len(WORDS)
        database18.execute(move, ("docs", moving))
        await caught_up(life)
        langchain.compare(docs, target)
        assert langchain.from_target(target, noise, 1)[0].text == noise
        database18.execute(move, ("other", moving))
        await caught_up(life)
        langchain.compare(docs, target)
        assert moving not in payloads(qdrant, collection)
        # Both ways in one transaction, with another key, and to no collection at all.
        new = str(uuid.uuid4())
        with database18.connect(autocommit=False) as connection:
            connection.execute(move, ("docs", moving))
            connection.execute(
                "UPDATE langchain_pg_embedding SET id = %s WHERE id = %s", (new, moving)
            )
            connection.execute(
                "UPDATE langchain_pg_embedding SET collection_id = NULL WHERE document = 'alpha'"
            )
            connection.commit()
        await caught_up(life)
        assert len(payloads(qdrant, collection)) == len(WORDS)
        assert payloads(qdrant, collection)[new]["page_content"] == noise
        with database18.connect(autocommit=False) as connection:
            connection.execute(
                "UPDATE langchain_pg_embedding SET id = %s, collection_id = NULL WHERE id = %s",
                (moving, new),
            )
            connection.commit()
        await caught_up(life)
        assert {new, moving} & set(payloads(qdrant, collection)) == set()
        langchain.compare(docs, target)


async def test_langchain_all_collections_in_one(
    database18: Database, qdrant: QdrantTarget, langchain: LangChain
) -> None:
    docs, other = langchain.source("docs", embedding_length=DIM), langchain.source("other")
    # Ids of the application's own: numbers, names, and what looks like a uuid.
    upper = "7F3E9D52-3A41-4D0B-9A53-0C8F6A2F4B11"
    mine = ["1", "doc/2", "É", upper, upper.lower().replace("-", "")]
    docs.add_documents(langchain.documents()[:5], ids=mine)
    other.add_documents([langchain.document(page_content="other", metadata={"n": 50})])
    collection = qdrant.new_collection_name()
    settings = pipeline_settings(database18, qdrant, langchain_table(collection=collection))
    async with running(settings, database18, qdrant) as life:
        ((key,),) = database18.execute(
            "SELECT uuid::text FROM langchain_pg_collection WHERE name = 'docs'"
        )
        match = models.MatchValue(value=str(key))
        only = models.Filter(must=[models.FieldCondition(key="collection_id", match=match)])
        target = langchain.target(collection)
        docs.add_documents(langchain.documents()[5:], ids=[f"x{n}" for n in range(5)])
        docs.delete(ids=mine[:1])
        await caught_up(life)
        for word in WORDS:
            ours = langchain.from_target(target, word, filter=only)
            same(langchain.from_source(docs, word), ours)
        assert len(langchain.from_target(target, "other", 100)) == 10
        kept = {payload["id"] for payload in payloads(qdrant, collection).values()}
        assert {*mine[1:], "x0"} < kept
        schema = qdrant.client().get_collection(collection).payload_schema
        assert schema["collection_id"].data_type == models.PayloadSchemaType.UUID


async def test_langchain_community_layout(
    database18: Database, qdrant: QdrantTarget, langchain: LangChain
) -> None:
    """The table of langchain-community, which had a uuid key."""
    database18.execute(
        """
        CREATE TABLE langchain_pg_collection (uuid uuid PRIMARY KEY, name varchar, cmetadata json);
        CREATE TABLE langchain_pg_embedding (
            uuid uuid PRIMARY KEY, collection_id uuid REFERENCES langchain_pg_collection
            ON DELETE CASCADE, embedding vector, document varchar, cmetadata json,
            custom_id varchar);
        INSERT INTO langchain_pg_collection VALUES (gen_random_uuid(), 'docs', NULL);
        """
    )
    key = uuid.uuid4()
    for own_id, document, metadata in ((key, "alpha", '{"n": 1}'), (uuid.uuid4(), None, None)):
        database18.execute(
            "INSERT INTO langchain_pg_embedding SELECT %s, uuid, %s, %s, %s, NULL"
            " FROM langchain_pg_collection",
            (own_id, json.dumps(embed("alpha" if document else "x")), document, metadata),
        )
    collection = qdrant.new_collection_name()
    table = langchain_table(preset_collection="docs", collection=collection)
    async with running(pipeline_settings(database18, qdrant, table), database18, qdrant):
        found = langchain.from_target(langchain.target(collection), "alpha")
        assert [(hit.text, hit.metadata) for hit in found] == [("alpha", {"n": 1}), ("", {})]
        assert payloads(qdrant, collection)[str(key)]["metadata"] == {"n": 1}


async def test_langchain_pgvectorstore(
    database18: Database, qdrant: QdrantTarget, langchain: LangChain
) -> None:
    """The newer store: metadata in columns of their own, and the rest in a json column."""
    postgres = pytest.importorskip("langchain_postgres")
    pg_engine = postgres.PGEngine.from_connection_string(alchemy_url(database18))
    columns = [postgres.Column("n", "INTEGER"), postgres.Column("even", "BOOLEAN")]
    pg_engine.init_vectorstore_table("notes", DIM, metadata_columns=columns)
    store = postgres.PGVectorStore.create_sync(
        pg_engine, langchain._embeddings, "notes", metadata_columns=["n", "even"]
    )
    database18.execute("CREATE INDEX ON notes (n)")
    ids = store.add_documents(langchain.documents())
    collection = qdrant.new_collection_name()
    settings = pipeline_settings(
        database18, qdrant, {"name": "notes", "preset": "langchain", "collection": collection}
    )
    async with running(settings, database18, qdrant) as life:
        target = langchain.target(collection)
        for change in range(2):
            for word in WORDS:
                same(langchain.from_source(store, word), langchain.from_target(target, word))
            late = models.FieldCondition(key="metadata.n", range=models.Range(gte=4))
            same(
                langchain.from_source(store, "beta", filter={"n": {"$gte": 4}}),
                langchain.from_target(target, "beta", filter=models.Filter(must=[late])),
            )
            if not change:
                store.delete(ids=ids[:2])
                store.add_documents(langchain.documents("new")[-1:])
                database18.execute("UPDATE notes SET n = NULL, even = NULL WHERE content = 'eta'")
                await caught_up(life)
        assert set(ids[2:]) < set(payloads(qdrant, collection))
        fields = {name for payload in payloads(qdrant, collection).values() for name in payload}
        assert fields == {"page_content", "metadata"}
        assert "metadata.n" in qdrant.client().get_collection(collection).payload_schema
        # A column that is added while it runs is metadata too.
        database18.execute("ALTER TABLE notes ADD COLUMN author text")
        database18.execute("UPDATE notes SET author = 'me'")
        await caught_up(life)
        found = payloads(qdrant, collection).values()
        assert {payload["metadata"]["author"] for payload in found} == {"me"}
    await pg_engine.close()


async def test_langchain_goes_on_after_a_stop(
    database18: Database, qdrant: QdrantTarget, langchain: LangChain
) -> None:
    docs, other = langchain.source("docs"), langchain.source("other")
    ids = docs.add_documents(langchain.documents())
    collection = qdrant.new_collection_name()
    table = langchain_table(preset_collection="docs", collection=collection)
    settings = pipeline_settings(database18, qdrant, table)
    async with running(settings, database18, qdrant) as life:
        assert life.metric("snapshot_rows_total", table="public.langchain_pg_embedding") == 10
        await life.stop()
    docs.delete(ids=ids[:3])
    docs.add_documents(langchain.documents("new")[-1:])
    other.add_documents(langchain.documents())
    # The name of a collection is not what its rows are told by; at a start it must be there.
    rename = "UPDATE langchain_pg_collection SET name = %s WHERE name = %s"
    async with running(settings, database18, qdrant) as life:
        database18.execute(rename, ("files", "docs"))
        database18.execute("UPDATE langchain_pg_embedding SET document = document || '!'")
        await caught_up(life)
        database18.execute(rename, ("docs", "files"))
        langchain.compare(docs, langchain.target(collection))
        assert len(payloads(qdrant, collection)) == 8
        assert life.metric("snapshot_rows_total", table="public.langchain_pg_embedding") == 0


def test_langchain_mistakes(
    database18: Database, qdrant: QdrantTarget, langchain: LangChain
) -> None:
    langchain.source("docs")

    def refusal(**table: object) -> ConfigError:
        settings = pipeline_settings(database18, qdrant, langchain_table(**table))
        with connect(settings.source) as connection, pytest.raises(ConfigError) as caught:
            plan_pipeline(connection, settings)
        return caught.value

    error = refusal(preset_collection="dogs")
    assert "has no collection of that name" in error.message
    assert "'dogs'" in error.message
    assert refusal(preset="vecs", preset_collection="docs").message.endswith("langchain only")
    settings = pipeline_settings(
        database18,
        qdrant,
        langchain_table(preset_collection="docs"),
        pg_url=database18.create_cdc_role(["langchain_pg_embedding"]).url,
    )
    with connect(settings.source) as connection, pytest.raises(SourceError) as denied:
        plan_pipeline(connection, settings)
    assert "permission denied for table langchain_pg_collection" in denied.value.message
    database18.execute("ALTER TABLE langchain_pg_embedding RENAME cmetadata TO meta")
    error = refusal()
    assert "needs a column cmetadata (json or jsonb)" in error.message
    assert "found collection_id, document, embedding, id, meta" in error.message
    assert "langchain-postgres 0.0.19" in str(error.remedy)
