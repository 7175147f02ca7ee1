"""SQL filters of baseline queries: Qdrant's translation selects the rows that Postgres does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Sink
from cdc_sync.verify.filters import translate_filter
from tests.support.fix_postgres import Connection, Database
from tests.support.fix_qdrant import QdrantTarget
from tests.support.search_scene import fill, scene_settings

SCHEMA = """
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE TABLE docs (
    id bigint PRIMARY KEY, lang text, n int, big bigint, f double precision, f4 real,
    price numeric(10,2), ok boolean, day date, at timestamptz, naive timestamp, tags text[],
    nums int[], meta jsonb, who uuid, feeling mood, code char(4), dom positive, "Odd ""name" text,
    embedding vector(2) NOT NULL
);
CREATE INDEX ON docs (lang);
CREATE INDEX ON docs (n);
CREATE INDEX ON docs (at);
CREATE INDEX ON docs (ok);
CREATE INDEX ON docs USING gin (tags);
INSERT INTO docs SELECT i,
    (ARRAY['en','de','',NULL,'O''Hara','en '])[1 + i % 6],
    (ARRAY[0,1,-1,2147483647,NULL,5])[1 + i % 6],
    (ARRAY[0,9007199254740993,-9223372036854775808,NULL,7])[1 + i % 5],
    (ARRAY[0,0.1,-1.5,1e300,NULL,5])[1 + i % 6],
    (ARRAY[0,0.1,-1.5,NULL,5]::real[])[1 + i % 5],
    (ARRAY[0,0.10,9.99,NULL,5])[1 + i % 5],
    (ARRAY[true,false,NULL])[1 + i % 3],
    (ARRAY['2024-01-31','1999-12-31','infinity',NULL,'2024-02-01']::date[])[1 + i % 5],
    (ARRAY['2024-01-31 10:00:00.000123+00','1999-12-31 23:59:59+02','-infinity',NULL]
        ::timestamptz[])[1 + i % 4],
    (ARRAY['2024-01-31 10:00:00','1999-12-31 23:59:59.5',NULL]::timestamp[])[1 + i % 3],
    CASE i % 6 WHEN 0 THEN ARRAY['en','x'] WHEN 1 THEN '{}' WHEN 2 THEN NULL
        WHEN 3 THEN ARRAY['x',NULL] WHEN 4 THEN ARRAY['en',NULL] ELSE ARRAY['y'] END,
    CASE i % 4 WHEN 0 THEN ARRAY[1,5] WHEN 1 THEN '{}' WHEN 2 THEN NULL ELSE ARRAY[5,NULL] END,
    CASE i % 10 WHEN 0 THEN '{"k": "en"}' WHEN 1 THEN '{"k": null}' WHEN 2 THEN '{}'
        WHEN 3 THEN NULL WHEN 4 THEN '{"k": 5, "a": {"b c": "en"}}' WHEN 5 THEN '{"k": ["en"]}'
        WHEN 6 THEN '{"k": {"en": 1}}' WHEN 7 THEN '{"k": true}' WHEN 8 THEN '{"k": "5"}'
        ELSE '["en"]' END::jsonb,
    (ARRAY['0a0b0c0d-0000-4000-8000-000000000001',NULL]::uuid[])[1 + i % 2],
    (ARRAY['sad','ok',NULL]::mood[])[1 + i % 3],
    (ARRAY['ab','abcd',NULL])[1 + i % 3],
    (ARRAY[1,7,NULL])[1 + i % 3],
    (ARRAY['a','b',NULL])[1 + i % 3],
    ARRAY[i, 1]::vector
  FROM generate_series(0, 119) i;
"""

#: Conditions that are true, false and unknown of some rows each.
ATOMS = (
    "lang = 'en'",
    "lang <> 'en'",
    "lang = 'O''Hara'",
    "'de' = lang",
    "lang IS NULL",
    "lang IS NOT NULL",
    "lang IN ('en', 'de')",
    "lang NOT IN ('en', 'de')",
    "lang IN ('en', NULL)",
    "lang NOT IN ('en', NULL)",
    "lang = ANY (ARRAY['en', ''])",
    "lang = ANY ('{en,\"O''Hara\",NULL}')",
    "lang = ANY ('{}')",
    "lang LIKE 'en'",
    "lang NOT LIKE 'e\\n'",
    "lang = NULL",
    "lang IS DISTINCT FROM 'en'",
    "lang IS NOT DISTINCT FROM NULL",
    "n = 5",
    "n = 5.5",
    "n <> 1",
    "n < 1.5",
    "n > -0.5",
    "n <= 5",
    "5 > n",
    "n BETWEEN 0 AND 5",
    "n NOT BETWEEN '0' AND 1",
    "n IN (1, 5, -1)",
    "n = '2147483647'",
    "big = 9007199254740993",
    "big = 9007199254740992",
    "big = -9223372036854775808",
    "big > 0",
    "big = 9223372036854775808",
    "f = 0.1",
    "f > 0",
    "f <= -1.5",
    "f < 1e301",
    "f4 = 0.1",
    "f4 = '0.1'",
    "f4 > 0.1",
    "f4 >= '0.1'",
    "price = 9.99",
    "price > 0.1",
    "price <= '0.10'",
    "ok",
    "ok = false",
    "ok IS TRUE",
    "ok IS NOT FALSE",
    "ok IS UNKNOWN",
    "ok <> true",
    "day = '2024-01-31'",
    "day > '2000-01-01'",
    "day <= DATE '2024-01-31'",
    "at = '2024-01-31T10:00:00.000123Z'",
    "at < '2000-01-01'",
    "at >= '1999-12-31 21:59:59+00'",
    "at <> '1999-12-31 23:59:59+02'",
    "naive > '2000-01-01 00:00'",
    "naive = '1999-12-31 23:59:59.5'::timestamp",
    "'en' = ANY (tags)",
    "NOT ('en' = ANY (tags))",
    "5 = ANY (nums)",
    "meta ->> 'k' = 'en'",
    "meta ->> 'k' <> 'en'",
    "meta ->> 'k' = '5'",
    "meta ->> 'k' = 'true'",
    "meta ->> 'k' IS NULL",
    "meta ->> 'k' IN ('en', 'true')",
    "meta -> 'a' ->> 'b c' = 'en'",
    "meta ->> 'absent' = 'x'",
    "who = '0A0B0C0D-0000-4000-8000-000000000001'",
    "feeling = 'ok'",
    "feeling <> 'sad'",
    "feeling IS NULL",
    "code = 'ab'",
    "code = 'ab  '",
    "code <> 'abcd'",
    "dom > 1",
    '"Odd ""name" = \'a\'',
    "id IN (1, 2, 3)",
    "id < 50",
)


class Scene:
    """The table, its points, and what both sides select."""

    def __init__(
        self, connection: Connection, sink: Sink, plan: TablePlan, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._connection = connection
        self._searcher = sink.searcher(plan)
        self._loop = loop
        self.plan = plan

    def source(self, sql: str) -> set[object]:
        found = self._connection.execute(f"SELECT id FROM docs WHERE {sql}").fetchall()
        return {row[0] for row in found}

    def qdrant(self, text: str) -> set[object]:
        translated = translate_filter(text, self.plan)
        if translated.nothing:
            return set()
        found = self._loop.run_until_complete(
            self._searcher.nearest("embedding", [1.0, 1.0], 1000, translated.condition, exact=True)
        )
        return {id_ for id_, _ in found}

    def check(self, text: str) -> None:
        expected = self.source(text)
        assert self.qdrant(text) == expected, text
        # What is sent to Postgres means what was written.
        assert self.source(translate_filter(text, self.plan).sql) == expected, text


@pytest.fixture(params=["server", "edge"])
def settings(request: pytest.FixtureRequest, database18: Database, tmp_path: Path) -> Settings:
    target: QdrantTarget | str = str(tmp_path / "edge")
    if request.param == "server":
        target = request.getfixturevalue("qdrant")
    database18.execute(SCHEMA)
    return scene_settings(database18, target, {"name": "docs", "rename": {'Odd "name': "odd"}})


@contextlib.contextmanager
def opened(settings: Settings, database: Database) -> Iterator[Scene]:
    """The table copied, and both sides to be asked."""
    (plan,) = fill(settings)
    loop = asyncio.new_event_loop()
    sink = loop.run_until_complete(open_sink(settings.qdrant))
    try:
        with database.connect() as connection:
            connection.execute("SET timezone = 'UTC'")
            yield Scene(connection, sink, plan, loop)
    finally:
        loop.run_until_complete(sink.close())
        loop.close()


@pytest.fixture
def scene(settings: Settings, database18: Database) -> Iterator[Scene]:
    with opened(settings, database18) as made:
        yield made


conditions = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        inner.map(lambda one: f"NOT ({one})"),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}) AND ({two[1]})"),
        st.tuples(inner, inner).map(lambda two: f"({two[0]} OR {two[1]})"),
        inner.map(lambda one: f"({one}) IS NOT TRUE"),
    ),
    max_leaves=6,
)


def test_both_sides_select_the_same_rows(scene: Scene) -> None:
    for atom in ATOMS:
        scene.check(atom)
        scene.check(f"NOT ({atom})")
        scene.check(f"({atom}) IS UNKNOWN")

    @given(conditions)
    @hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def same(text: str) -> None:
        scene.check(text)

    same()


def test_rows_without_nulls_in_the_payload(database18: Database, qdrant: QdrantTarget) -> None:
    database18.execute(SCHEMA)
    section = {"name": "docs", "rename": {'Odd "name': "odd"}, "drop_nulls": True}
    settings = scene_settings(database18, qdrant, section)
    with opened(settings, database18) as scene:
        for atom in ATOMS:
            if "ANY (tags)" in atom or "ANY (nums)" in atom:
                with pytest.raises(CdcSyncError, match="drop_nulls"):
                    scene.qdrant(atom)
            else:
                scene.check(f"NOT ({atom})")
