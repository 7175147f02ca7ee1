"""Databases whose encoding is not UTF-8: names and values arrive as in any other."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import psycopg
import pytest

from cdc_sync.demo.embedded import PostgresServer
from tests.support.fix_postgres import Database, drop_database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

#: ``{0}`` is a text that takes other bytes in UTF-8 than in the database.
_TABLE = """
CREATE TYPE mood AS ENUM ('{0}', 'b');
CREATE TYPE place AS (name text, tags text[]);
CREATE TYPE textrange AS RANGE (subtype = text, multirange_type_name = textmultirange);
CREATE TABLE "t{0}" ("k{0}" text PRIMARY KEY, "{0}" text, padded char(6), named name, folded citext,
    mood mood, old json, doc jsonb, pairs hstore, listed hstore[], words tsvector, tags text[],
    place place, span textrange, spans textmultirange, emb vector(3))
"""
_ROW = """
INSERT INTO "t{0}" VALUES ('{0}{1}', '{0}', '{0}', '{0}', '{0}', '{0}', '{{"{0}": "{0}"}}',
    '{{"{0}": ["{0}"]}}', '"{0}"=>"x{0}", k=>"", {0}y=>NULL, a=>"{0}{0}"',
    ARRAY['{0}=>{0}'::hstore], '{0}', ARRAY['{0}', NULL, 'a{0}'], ROW('{0}', ARRAY['{0}']),
    textrange('{0}', '{0}x', '[]'), textmultirange(textrange('{0}', '{0}x', '[]')), '[1,2,3]')
"""

Made = Callable[[str], Database]


@pytest.fixture
def encoded(postgres18: PostgresServer) -> Iterator[Made]:
    """Makes a database of an encoding; texts go to it and come from it in UTF-8."""
    made: list[Database] = []

    def make(encoding: str) -> Database:
        name = f"test_{encoding.lower()}_{secrets.token_hex(3)}"
        with psycopg.connect(postgres18.url(), autocommit=True) as connection:
            connection.execute(
                f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}'"
                " LC_COLLATE 'C' LC_CTYPE 'C'"
            )
        url = f"{postgres18.url(name)}?client_encoding=utf8"
        made.append(Database(url, name, postgres18, postgres18.major))
        for extension in ("vector", "hstore", "citext"):
            made[-1].execute(f"CREATE EXTENSION {extension}")
        return made[-1]

    yield make
    for database in made:
        drop_database(database)


@pytest.mark.requirement("R18", "R83")
@pytest.mark.parametrize(
    # In EUC_JP the last one has three bytes, in UTF-8 two.
    ("encoding", "text"),
    [("LATIN1", "äß"), ("EUC_JP", "日本"), ("EUC_JP", "\u00e9")],
)
async def test_copied_and_streamed(
    encoded: Made, qdrant: QdrantTarget, encoding: str, text: str
) -> None:
    database = encoded(encoding)
    database.execute(_TABLE.format(text))
    database.execute(_ROW.format(text, 1) + ";" + _ROW.format(text, 2))
    settings = pipeline_settings(database, qdrant, f'"t{text}"')
    async with running(settings, database, qdrant) as life:
        database.execute(_ROW.format(text, 3) + ";" + _ROW.format(text, 4))
        key = f'"k{text}"'
        database.execute(f"UPDATE \"t{text}\" SET {key} = '{text}5' WHERE {key} = '{text}4'")
        database.execute(f"DELETE FROM \"t{text}\" WHERE {key} = '{text}1'")
        await life.assert_equal()
        client, name = qdrant.client(), str(settings.tables[0].collection)
        points, _ = client.scroll(name)
        assert len(points) == 3
        pairs = {text: f"x{text}", "k": "", f"{text}y": None, "a": text * 2}
        assert all(p.payload and p.payload["pairs"] == pairs for p in points)


#: Too long and too random to stay in the row, and to be sent by an update of something else.
_LONG = "(SELECT string_agg(md5(k::text), '') FROM generate_series(1, 300) k)"


@pytest.mark.requirement("R18", "R23", "R49")
async def test_bytes_that_are_no_text(encoded: Made, qdrant: QdrantTarget) -> None:
    """What a database without an encoding holds need not be UTF-8: it is copied, streamed and read
    again all the same. A key that is not is a dead letter, and a message of another program does
    not stop the stream."""
    database = encoded("SQL_ASCII")
    database.execute(
        "CREATE TABLE docs (id text PRIMARY KEY, n int, body text, pairs hstore, emb vector(2));"
        rf"INSERT INTO docs VALUES ('a', 1, E'x\xe4' || {_LONG}, hstore('k', E'\xff'), '[1,2]')"
    )
    settings = pipeline_settings(database, qdrant, "docs")
    async with running(settings, database, qdrant) as life:
        database.execute(
            r"SELECT pg_logical_emit_message(true, E'other\xe4', 'x');"
            r"INSERT INTO docs VALUES (E'\xe4', 1, 'z', NULL, '[1,2]'),"
            rf" ('b', 1, E'y\xe4' || {_LONG}, hstore('k', E'\xff'), '[1,2]')"
        )
        await life.caught_up()
        assert life.metric("dead_letters_pending", table="public.docs") == 1
        client, name = qdrant.client(), str(settings.tables[0].collection)
        for _ in range(2):
            points, _ = client.scroll(name)
            found = {p.payload["id"]: p.payload for p in points if p.payload}
            assert set(found) == {"a", "b"}
            assert found["a"]["body"][:3] == "x\ufffdc"
            assert found["b"]["body"][:3] == "y\ufffdc"
            assert found["a"]["pairs"] == found["b"]["pairs"] == {"k": "\ufffd"}
            client.delete(name, [point.id for point in points], wait=True)
            database.execute("UPDATE docs SET n = 2 WHERE id IN ('a', 'b')")
            await life.caught_up()
        refetched = {"table": "public.docs", "resolution": "refetched"}
        assert life.metric("unchanged_toast_total", **refetched) == 4
