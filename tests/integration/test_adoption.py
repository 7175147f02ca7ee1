"""Taking over collections that Qdrant's migration tool has filled: what is right already is left
alone, the rest is repaired, and changes are followed from there on.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql
from qdrant_client import grpc as q

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError, ErrorKind, SinkError
from tests.support.fix_postgres import Database
from tests.support.oracle import assert_equal
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

WRITES = {"Upsert", "Delete", "UpdateBatch", "SetPayload", "OverwritePayload"}


# -- what the tool does (qdrant/migration, cmd/migrate_from_pg.go)


def tool_id(key: object) -> str:
    """``arbitraryIDToUUID(keyToString(key))`` for integers, UUIDs and texts."""
    text = str(key)
    try:
        return str(uuid.UUID(text))
    except ValueError:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, text))


def tool_value(value: object, type_: str) -> q.Value:
    """``sanitizeValue`` and ``NewValue``: what the tool makes of what pgx reads."""
    if value is None:
        return q.Value(null_value=q.NULL_VALUE)
    if isinstance(value, bool):
        return q.Value(bool_value=value)
    if type_ == "int2":
        return q.Value(string_value=str(value))  # Go's int16 is none of the types it knows
    if isinstance(value, int):
        return q.Value(integer_value=value)
    if isinstance(value, float):
        return q.Value(double_value=value)
    if isinstance(value, Decimal):
        digits = int(value.scaleb(-value.as_tuple().exponent))  # type: ignore[operator]
        exponent = value.as_tuple().exponent
        return q.Value(string_value=f"{{{digits} {exponent} false finite true}}")
    if isinstance(value, datetime):
        return q.Value(string_value=f"{value:%Y-%m-%dT%H:%M:%S}Z")
    if isinstance(value, date):
        return q.Value(string_value=f"{value:%Y-%m-%d}T00:00:00Z")
    if isinstance(value, list):
        values = [tool_value(item, "") for item in value]
        return q.Value(list_value=q.ListValue(values=values))
    if isinstance(value, dict):
        fields = {name: tool_value(item, "") for name, item in value.items()}
        return q.Value(struct_value=q.Struct(fields=fields))
    return q.Value(string_value=str(value))


def floats(value: object) -> object:
    """Go's encoding/json reads every number as float64."""
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, list):
        return [floats(item) for item in value]
    if isinstance(value, dict):
        return {name: floats(item) for name, item in value.items()}
    return value


def migrate_with_tool(
    database: Database,
    qdrant: QdrantTarget,
    collection: str,
    *,
    key: str = "id",
    table: str = "docs",
    metrics: Mapping[str, str] | None = None,
) -> None:
    """``qdrant-migration pg --pg.table docs --pg.key-column id``: all columns, batches of 50,
    every vector named after its column and, unless told otherwise, Cosine.
    """
    with psycopg.connect(database.url) as connection:
        types: dict[str, str] = dict(
            connection.execute(
                "SELECT attname::text, typname::text FROM pg_attribute"
                " JOIN pg_type t ON t.oid = atttypid"
                " WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped",
                (table,),
            ).fetchall()
        )
        sizes: dict[str, int] = dict(
            connection.execute(
                "SELECT attname::text, atttypmod FROM pg_attribute"
                " WHERE attrelid = %s::regclass AND attnum > 0"
                " AND format_type(atttypid, atttypmod) LIKE 'vector%%'",
                (table,),
            ).fetchall()
        )
        query = sql.SQL("SELECT * FROM {} ORDER BY {}").format(
            sql.Identifier(table), sql.Identifier(key)
        )
        cursor = connection.execute(query)
        names = [column.name for column in cursor.description or ()]
        rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    stub = qdrant.client().grpc_points
    params = {
        name: q.VectorParams(
            size=size, distance=q.Distance.Value((metrics or {}).get(name, "Cosine"))
        )
        for name, size in sizes.items()
    }
    qdrant.client().grpc_collections.Create(
        q.CreateCollection(
            collection_name=collection,
            vectors_config=q.VectorsConfig(params_map=q.VectorParamsMap(map=params)),
        )
    )
    points = [tool_point(row, key, types) for row in rows]
    for start in range(0, len(points), 50):
        stub.Upsert(
            q.UpsertPoints(collection_name=collection, wait=True, points=points[start : start + 50])
        )


def tool_point(row: Mapping[str, Any], key: str, types: Mapping[str, str]) -> q.PointStruct:
    vectors: dict[str, q.Vector] = {}
    payload: dict[str, q.Value] = {}
    for name, value in row.items():
        if types[name] == "vector" and value is not None:
            vectors[name] = q.Vector(dense=q.DenseVector(data=json.loads(value)))
        elif types[name] in ("json", "jsonb"):
            payload[name] = tool_value(floats(value), "")
        else:
            payload[name] = tool_value(value, types[name])
    return q.PointStruct(
        id=q.PointId(uuid=tool_id(row[key])),
        payload=payload,
        vectors=q.Vectors(vectors=q.NamedVectors(vectors=vectors)),
    )


# -- the tables


def create_docs(database: Database, rows: int = 260) -> None:
    """Columns of types that the tool maps as this program does."""
    database.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, title text, n int, price float8, ok bool,"
        " tags text[], meta jsonb, at timestamptz, owner uuid, emb vector(8))"
    )
    generator = np.random.default_rng(11)
    with database.connect() as connection, connection.cursor() as cursor:
        for n in range(rows):
            emb = "[" + ",".join(map(str, generator.normal(size=8))) + "]"
            cursor.execute(
                "INSERT INTO docs VALUES (%s, %s, %s, %s, %s, %s, %s,"
                " timestamptz '2026-01-31 10:20:30+00' + %s * interval '1 hour', %s, %s)",
                (
                    n - 20,
                    f"title {n}" if n % 7 else None,
                    n * 1000,
                    n / 7,
                    n % 2 == 0,
                    ["a", None, f"t{n}"],
                    json.dumps({"s": "x", "f": n + 0.5, "l": [None, True, {"k": "v"}]}),
                    n,
                    uuid.UUID(int=n << 64),
                    emb,
                ),
            )


def adopting(
    database: Database,
    qdrant: QdrantTarget,
    collection: str,
    *,
    table: Mapping[str, object] | None = None,
    migration: Mapping[str, object] | None = None,
) -> Settings:
    return pipeline_settings(
        database,
        qdrant,
        {
            "name": "docs",
            "collection": collection,
            "ids": "qdrant-migration",
            **(table or {}),
        },
        migration={"adopt": True, **(migration or {})},
    )


def writes(qdrant: QdrantTarget, collection: str) -> dict[str, int]:
    """Points in write requests to the collection so far, by operation."""
    found: dict[str, int] = {}
    for entry in qdrant.script.log():
        if entry["operation"] in WRITES and entry["collection"] == collection:
            count = int(entry["points"])
            found[entry["operation"]] = found.get(entry["operation"], 0) + count
    return found


def count(qdrant: QdrantTarget, collection: str) -> int:
    return qdrant.client().count(collection, exact=True).count


async def check_streaming(life: Running, database: Database) -> None:
    """Every kind of change, then a full comparison."""
    database.execute("UPDATE docs SET title = 'changed' WHERE id = 1")
    database.execute("UPDATE docs SET emb = '[8,7,6,5,4,3,2,1]' WHERE id = 2")
    database.execute("UPDATE docs SET id = 100001 WHERE id = 3")
    database.execute("DELETE FROM docs WHERE id = 4")
    database.execute("INSERT INTO docs (id, title) VALUES (100000, 'new')")
    await life.assert_equal(ids="qdrant-migration")


@pytest.fixture
def collection(database18: Database, qdrant_private: QdrantTarget) -> str:
    """A collection that the tool has made of ``docs``."""
    create_docs(database18)
    name = qdrant_private.new_collection_name()
    migrate_with_tool(database18, qdrant_private, name)
    return name


# -- adoption


async def test_a_collection_of_the_tool_is_found_equal_and_followed(
    database18: Database, qdrant_private: QdrantTarget, collection: str
) -> None:
    qdrant_private.script.clear_log()
    settings = adopting(database18, qdrant_private, collection)
    async with running(settings, database18, qdrant_private) as life:
        assert writes(qdrant_private, collection) == {}
        assert count(qdrant_private, collection) == 260
        await life.assert_equal(ids="qdrant-migration")
        await check_streaming(life, database18)
        await life.stop()
    # Another start is one of any pipeline: nothing is compared again.
    qdrant_private.script.clear_log()
    async with running(settings, database18, qdrant_private) as life:
        database18.execute("DELETE FROM docs WHERE id = 5")
        await life.assert_equal(ids="qdrant-migration")
    assert writes(qdrant_private, collection) == {"Delete": 1}


async def test_differing_and_missing_points_are_repaired_and_extra_ones_removed(
    database18: Database, qdrant_private: QdrantTarget, collection: str
) -> None:
    # What a one-shot copy misses: changes since.
    database18.execute("UPDATE docs SET title = 'later' WHERE id BETWEEN 10 AND 14")
    database18.execute("UPDATE docs SET emb = '[1,2,3,4,5,6,7,8]' WHERE id BETWEEN 20 AND 22")
    database18.execute("UPDATE docs SET emb = NULL WHERE id = 30")
    database18.execute("INSERT INTO docs (id) SELECT n FROM generate_series(5000, 5006) n")
    database18.execute("DELETE FROM docs WHERE id BETWEEN 40 AND 50")
    qdrant_private.script.clear_log()
    settings = adopting(database18, qdrant_private, collection)
    async with running(settings, database18, qdrant_private) as life:
        assert writes(qdrant_private, collection) == {"Upsert": 5 + 3 + 1 + 7, "Delete": 11}
        assert life.metric("orphans_total", table="public.docs") == 11
        await life.assert_equal(ids="qdrant-migration")
        await check_streaming(life, database18)


async def test_extra_points_are_kept_if_they_are_only_reported(
    database18: Database, qdrant_private: QdrantTarget, collection: str
) -> None:
    database18.execute("DELETE FROM docs WHERE id BETWEEN 40 AND 50")
    database18.execute("UPDATE docs SET n = 1 WHERE id = 60")
    qdrant_private.script.clear_log()
    settings = adopting(
        database18, qdrant_private, collection, migration={"extra_points": "report"}
    )
    async with running(settings, database18, qdrant_private) as life:
        assert writes(qdrant_private, collection) == {"Upsert": 1}
        assert life.metric("orphans_total", table="public.docs") == 11
        assert count(qdrant_private, collection) == 260
        database18.execute("DELETE FROM docs WHERE id = 61")
        await life.caught_up()
        assert count(qdrant_private, collection) == 259


async def test_columns_that_the_tool_writes_otherwise_are_repaired(
    database18: Database, qdrant_private: QdrantTarget
) -> None:
    """docs/adopting.md lists them; each of these rows differs by one."""
    database18.execute(
        "CREATE TABLE docs (id bigint PRIMARY KEY, small int2, amount numeric(10,2), day date,"
        " at timestamp, meta jsonb, emb vector(2))"
    )
    database18.execute(
        "INSERT INTO docs (id, small, amount, day, at, meta, emb) VALUES"
        " (0, NULL, NULL, NULL, '2026-01-31 10:20:30', '{\"f\": 1.5}', '[1,2]'),"
        " (1, 5, NULL, NULL, NULL, NULL, '[1,2]'),"
        " (2, NULL, 12.50, NULL, NULL, NULL, '[1,2]'),"
        " (3, NULL, NULL, '2026-01-31', NULL, NULL, '[1,2]'),"
        " (4, NULL, NULL, NULL, '2026-01-31 10:20:30.5', NULL, '[1,2]'),"
        " (5, NULL, NULL, NULL, NULL, '{\"i\": 1}', '[1,2]'),"
        " (6, NULL, NULL, NULL, NULL, NULL, NULL)"
    )
    collection = qdrant_private.new_collection_name()
    migrate_with_tool(database18, qdrant_private, collection)
    qdrant_private.script.clear_log()
    settings = adopting(database18, qdrant_private, collection)
    async with running(settings, database18, qdrant_private) as life:
        assert writes(qdrant_private, collection) == {"Upsert": 6}
        await life.assert_equal(ids="qdrant-migration")


KEYS = [
    ("text", "'user:' || n", "qdrant-migration"),
    ("text", "md5(n::text)::uuid::text", "qdrant-migration-uuid"),
    ("text", "md5(n::text)", "qdrant-migration-hex"),
    ("uuid", "md5(n::text)::uuid", "qdrant-migration"),
    ("smallint", "n - 3", "qdrant-migration"),
]


@pytest.mark.parametrize(("type_", "value", "ids"), KEYS)
async def test_keys_of_every_kind(
    database18: Database, qdrant_private: QdrantTarget, type_: str, value: str, ids: str
) -> None:
    database18.execute(f"CREATE TABLE docs (id {type_} PRIMARY KEY, note text, emb vector(2))")
    database18.execute(
        f"INSERT INTO docs SELECT {value}, 'note', '[1,2]' FROM generate_series(1, 30) n"
    )
    collection = qdrant_private.new_collection_name()
    migrate_with_tool(database18, qdrant_private, collection)
    qdrant_private.script.clear_log()
    settings = adopting(database18, qdrant_private, collection, table={"ids": ids})
    async with running(settings, database18, qdrant_private) as life:
        # A smallint is a string in the tool's payload.
        expected = {"Upsert": 30} if type_ == "smallint" else {}
        assert writes(qdrant_private, collection) == expected
        database18.execute("UPDATE docs SET note = 'changed' WHERE ctid = '(0,1)'")
        database18.execute("DELETE FROM docs WHERE ctid = '(0,2)'")
        await life.assert_equal(ids=ids)
        assert count(qdrant_private, collection) == 29


async def test_a_metric_of_the_tools_own_must_be_named(
    database18: Database, qdrant_private: QdrantTarget
) -> None:
    create_docs(database18, rows=5)
    database18.execute("CREATE INDEX ON docs USING hnsw (emb vector_l2_ops)")
    collection = qdrant_private.new_collection_name()
    migrate_with_tool(database18, qdrant_private, collection)
    settings = adopting(database18, qdrant_private, collection)
    with pytest.raises(SinkError) as caught:
        async with running(settings, database18, qdrant_private):
            pass
    assert caught.value.kind is ErrorKind.COLLECTION_MISMATCH
    assert "Cosine" in caught.value.message
    assert "metrics" in (caught.value.remedy or "")
    assert writes(qdrant_private, collection) == {}
    cosine = adopting(database18, qdrant_private, collection, table={"metrics": {"emb": "cosine"}})
    qdrant_private.script.clear_log()
    async with running(cosine, database18, qdrant_private) as life:
        assert writes(qdrant_private, collection) == {}
        await life.assert_equal(ids="qdrant-migration")


async def test_without_adopt_a_collection_with_points_is_refused(
    database18: Database, qdrant_private: QdrantTarget
) -> None:
    create_docs(database18, rows=5)
    collection = qdrant_private.new_collection_name()
    migrate_with_tool(database18, qdrant_private, collection)
    settings = adopting(database18, qdrant_private, collection, migration={"adopt": False})
    with pytest.raises(SinkError) as caught:
        async with running(settings, database18, qdrant_private):
            pass
    assert caught.value.kind is ErrorKind.COLLECTION_MISMATCH
    assert "adopt" in (caught.value.remedy or "")
    assert count(qdrant_private, collection) == 5


async def test_keys_without_an_id_of_the_tool_are_refused(
    database18: Database, qdrant_private: QdrantTarget
) -> None:
    database18.execute("CREATE TABLE docs (id numeric PRIMARY KEY, emb vector(2))")
    collection = qdrant_private.new_collection_name()
    migrate_with_tool(database18, qdrant_private, collection)
    with pytest.raises(ConfigError, match="numeric"):
        async with running(
            adopting(database18, qdrant_private, collection), database18, qdrant_private
        ):
            pass


async def test_keys_that_may_share_an_id_are_dead_letters_and_keep_their_points(
    database18: Database, qdrant_private: QdrantTarget
) -> None:
    database18.execute("CREATE TABLE docs (id text PRIMARY KEY, emb vector(2))")
    keys: Sequence[str] = ("a", "b", "0123456789abcdef0123456789abcdef")
    for key in keys:
        database18.execute("INSERT INTO docs VALUES (%s, '[1,2]')", (key,))
    collection = qdrant_private.new_collection_name()
    migrate_with_tool(database18, qdrant_private, collection)
    settings = adopting(database18, qdrant_private, collection)
    async with running(settings, database18, qdrant_private) as life:
        assert count(qdrant_private, collection) == 3
        assert life.metric("dead_letters_pending", table="public.docs") == 1
        database18.execute("INSERT INTO docs VALUES (%s, '[1,2]')", (str(uuid.UUID(int=5)),))
        database18.execute("INSERT INTO docs VALUES (%s, '[1,2]')", (f"{uuid.UUID(int=5).hex}",))
        database18.execute("INSERT INTO docs VALUES (%s, '[1,2]')", (tool_id("a"),))
        await life.caught_up()
        assert count(qdrant_private, collection) == 4
        assert life.metric("dead_letters_pending", table="public.docs") == 3
        (found,) = qdrant_private.client().retrieve(collection, [tool_id("a")])
        assert found.payload == {"id": "a"}


# -- adoption that meets faults, and writers


async def test_failures_on_the_way_change_nothing(
    database18: Database, qdrant_private: QdrantTarget, collection: str
) -> None:
    database18.execute("UPDATE docs SET title = 'later' WHERE id BETWEEN 10 AND 14")
    database18.execute("DELETE FROM docs WHERE id BETWEEN 40 AND 50")
    script = qdrant_private.script
    script.reject("Get", "UNAVAILABLE", times=4)
    script.reject("Get", "RESOURCE_EXHAUSTED", "rate limit", retry_after=0, times=2)
    script.reject("Scroll", "UNAVAILABLE", times=2)
    script.fail_after_apply("Upsert", times=3)
    script.fail_after_apply("Delete", times=2)
    settings = adopting(database18, qdrant_private, collection)
    async with running(settings, database18, qdrant_private) as life:
        assert life.metric("orphans_total", table="public.docs") == 11
        await life.assert_equal(ids="qdrant-migration")
        await check_streaming(life, database18)


async def test_an_interrupted_adoption_is_finished_by_the_next_start(
    database18: Database, qdrant_private: QdrantTarget, collection: str
) -> None:
    database18.execute("UPDATE docs SET title = 'later' WHERE id BETWEEN 10 AND 14")
    database18.execute("DELETE FROM docs WHERE id BETWEEN 40 AND 50")
    script = qdrant_private.script
    settings = adopting(database18, qdrant_private, collection)
    for operation in ("Get", "Upsert", "Scroll", "Delete"):
        script.hold(operation)
        async with running(settings, database18, qdrant_private, wait=False) as life:
            await life.wait(lambda: script.held() > 0, f"{operation} to be held")
            life.task.cancel()
            script.release()
            script.clear()
        assert count(qdrant_private, collection) >= 249
    async with running(settings, database18, qdrant_private) as life:
        await life.assert_equal(ids="qdrant-migration")
        assert count(qdrant_private, collection) == 249
        await check_streaming(life, database18)


async def test_changes_while_a_collection_is_adopted(
    database18: Database, qdrant_private: QdrantTarget, collection: str
) -> None:
    script = qdrant_private.script
    settings = adopting(database18, qdrant_private, collection)
    script.hold("Get")
    async with running(settings, database18, qdrant_private, wait=False) as life:
        await life.wait(lambda: script.held() > 0, "the comparison")
        # Of the snapshot's future, whatever the comparison finds.
        database18.execute("UPDATE docs SET title = 'meanwhile' WHERE id % 5 = 0")
        database18.execute("DELETE FROM docs WHERE id % 7 = 0")
        database18.execute("UPDATE docs SET id = id + 1000 WHERE id % 11 = 0")
        database18.execute("INSERT INTO docs (id) SELECT n FROM generate_series(5000, 5006) n")
        script.release()
        await life.wait_streaming()
        await life.assert_equal(ids="qdrant-migration")


# -- other collections


LANGCHAIN = """
CREATE TABLE langchain_pg_collection (uuid uuid PRIMARY KEY, name varchar, cmetadata json);
CREATE TABLE langchain_pg_embedding (
    id varchar PRIMARY KEY, collection_id uuid REFERENCES langchain_pg_collection,
    embedding vector(2), document varchar, cmetadata jsonb);
INSERT INTO langchain_pg_collection VALUES ('00000000-0000-0000-0000-000000000001', 'docs', '{}');
INSERT INTO langchain_pg_embedding
SELECT %s, '00000000-0000-0000-0000-000000000001', '[1,2]', 'text', '{"page": 1}'
FROM generate_series(1, 60) n
"""


@pytest.mark.parametrize(
    ("key", "ids"),
    [
        ("'doc ' || n", "qdrant-migration"),
        ("md5(n::text)::uuid::text", "qdrant-migration-uuid"),
        ("'doc ' || n", "native"),
    ],
)
async def test_a_collection_of_a_preset_is_found_equal(
    database18: Database, qdrant_private: QdrantTarget, key: str, ids: str
) -> None:
    """Another pipeline takes over what one has filled, with either kind of ids."""
    for statement in (LANGCHAIN % key).split(";"):
        database18.execute(statement)
    collection = qdrant_private.new_collection_name()
    table = {
        "name": "langchain_pg_embedding",
        "preset": "langchain",
        "preset_collection": "docs",
        "collection": collection,
        "ids": ids,
    }
    first = pipeline_settings(database18, qdrant_private, table)
    async with running(first, database18, qdrant_private) as life:
        assert count(qdrant_private, collection) == 60
        await life.stop()
    if ids != "native":
        keys = database18.execute("SELECT id FROM langchain_pg_embedding")
        points = qdrant_private.client().scroll(collection, limit=100)[0]
        assert {point.id for point in points} == {tool_id(key) for (key,) in keys}
    database18.execute("UPDATE langchain_pg_embedding SET document = 'new' WHERE ctid = '(0,1)'")
    qdrant_private.script.clear_log()
    second = pipeline_settings(database18, qdrant_private, table, migration={"adopt": True})
    async with running(second, database18, qdrant_private):
        assert writes(qdrant_private, collection) == {"Upsert": 1}
        assert count(qdrant_private, collection) == 60


async def test_an_embedded_collection_is_adopted_too(
    database18: Database, qdrant_private: QdrantTarget, tmp_path: Path
) -> None:
    """The records of the pipeline are lost, the points are not."""
    create_docs(database18)
    target = {"url": f"edge:{tmp_path / 'edge'}"}
    table = {"name": "docs", "collection": "docs", "ids": "qdrant-migration"}
    first = pipeline_settings(database18, qdrant_private, table, target=target)
    async with running(first, database18, qdrant_private) as life:
        await life.stop()
    database18.execute("UPDATE docs SET title = 'later' WHERE id BETWEEN 10 AND 14")
    database18.execute("DELETE FROM docs WHERE id BETWEEN 40 AND 50")
    second = pipeline_settings(
        database18, qdrant_private, table, target=target, migration={"adopt": True}
    )
    async with running(second, database18, qdrant_private) as life:
        assert life.metric("orphans_total", table="public.docs") == 11
        await life.caught_up()
        await life.stop()
    assert_equal(
        database18.url, "docs", qdrant_url=target["url"], collection="docs", ids="qdrant-migration"
    )
