"""Presets, with the libraries themselves on both sides: what a library finds through Qdrant is what
it finds through pgvector, whatever it writes in between."""

from __future__ import annotations

import hashlib
import json
import random
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
from qdrant_client import models

from cdc_sync.errors import ConfigError, SourceError
from cdc_sync.postgres.connect import connect
from cdc_sync.sync.planning import plan_pipeline
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
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


# -- LangChain


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


async def caught_up(life: Running) -> None:
    await life.caught_up()
    assert life.qdrant.violations() == []


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


# -- LlamaIndex


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


# -- vecs


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
