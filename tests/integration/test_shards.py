"""`pipeline.shard`: n pipelines keep a table between them, each row exactly once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import pytest

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError, SinkError
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.shards import MAX_SHARDS, shard_filter
from cdc_sync.sync.planning import plan_pipeline
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.source_tables import find

COUNT = 3

#: Key columns by type, and an expression that makes many of them from i.
KEYS = {
    "int2": "i::int2",
    "int4": "i * 7919",
    "int8": "i::int8 * -1234567890123",
    "oid": "i::oid",
    "uuid": "md5(i::text)::uuid",
    "text": "'k ' || i",
    "varchar(20)": "'k ' || i",
    "char(20)": "'k ' || i",
    "name": "('k ' || i)::name",
    '"char"': 'chr(32 + i % 90)::"char"',
    "bool": "i % 2 = 0",
    "numeric": "i / 7.0",
    "float4": "i / 7.0",
    "float8": "-i / 7.0",
    "date": "DATE '2020-01-01' + i",
    "timestamp": "TIMESTAMP '2020-01-01' + i * INTERVAL '1 hour'",
    "timestamptz": "TIMESTAMPTZ '2020-01-01 00:00+00' + i * INTERVAL '1 hour'",
    "time": "TIME '00:00' + i * INTERVAL '1 minute'",
    "timetz": "TIMETZ '00:00+02' + i * INTERVAL '1 minute'",
    "interval": "i * INTERVAL '1 hour'",
    "money": "i::money",
    "inet": "'10.0.0.0'::inet + i",
    "cidr": "set_masklen('10.0.0.0'::inet + i, 32)::cidr",
    "macaddr": "('08:00:2b:00:' || lpad(to_hex(i / 256), 2, '0') || ':'"
    " || lpad(to_hex(i % 256), 2, '0'))::macaddr",
    "macaddr8": "('08:00:2b:00:00:00:' || lpad(to_hex(i / 256), 2, '0') || ':'"
    " || lpad(to_hex(i % 256), 2, '0'))::macaddr8",
    "pg_lsn": "('0/' || to_hex(i))::pg_lsn",
    "xid8": "i::text::xid8",
    "bit(16)": "i::bit(16)",
    "varbit": "i::bit(16)::varbit",
    "bytea": "decode(md5(i::text), 'hex')",
}
ROWS = 600


def shards_of(database: Database, table: str, key: Sequence[str], count: int) -> list[str]:
    found = find(database, table)
    return [shard_filter(found, key, f"{index}/{count}") for index in range(1, count + 1)]


def rows_of(database: Database, table: str, condition: str = "true") -> list[tuple[object, ...]]:
    return database.execute(f'SELECT t::text FROM "{table}" t WHERE {condition}')


def test_each_row_is_in_exactly_one_shard(protocol_database: Database) -> None:
    """Keys of every type, alone and together; every version takes the filters in a publication."""
    database = protocol_database
    columns = ", ".join(f"k{number} {type_} NOT NULL" for number, type_ in enumerate(KEYS))
    database.execute(
        f'CREATE TABLE docs ({columns}, "odd ""name" int NOT NULL DEFAULT 1);'
        f"INSERT INTO docs SELECT {', '.join(KEYS.values())} FROM generate_series(1, {ROWS}) i"
    )
    table, publications = find(database, "docs"), []
    for number, type_ in enumerate(KEYS):
        for count, key in (
            (1, [f"k{number}"]),
            (7, [f"k{number}"]),
            (2, ['odd "name', f"k{number}"]),
        ):
            filters = [shard_filter(table, key, f"{i}/{count}") for i in range(1, count + 1)]
            parts = ", ".join(f"count(*) FILTER (WHERE {one})" for one in filters)
            once = " + ".join(f"({one})::int" for one in filters)
            ((wrong, *sizes),) = database.execute(
                f"SELECT count(*) FILTER (WHERE ({once}) IS DISTINCT FROM 1), {parts} FROM docs"
            )
            assert wrong == 0, type_
            if type_ not in ("bool", '"char"'):
                # A shard has half of its share at the least.
                assert min(map(int, map(str, sizes))) > ROWS / count / 2, type_
            name = f"pub_{number}_{count}"
            publications.append(f"CREATE PUBLICATION {name} FOR TABLE docs WHERE ({filters[-1]});")
    if database.major >= 15:
        database.execute("".join(publications))


def test_every_version_divides_alike(protocol_database: Database) -> None:
    """So that an upgraded server goes on with the division there is."""
    protocol_database.execute(
        "CREATE TABLE t (id bigint, name text, day timestamptz, PRIMARY KEY (id, name, day));"
        "INSERT INTO t SELECT i, 'n' || i, TIMESTAMPTZ '2024-01-01 00:00+00' + i * INTERVAL '1 s'"
        " FROM generate_series(-4, 15) i"
    )
    filters = shards_of(protocol_database, "t", ["id", "name", "day"], 4)
    cases = " ".join(f"WHEN {one} THEN {index}" for index, one in enumerate(filters, 1))
    ((found,),) = protocol_database.execute(
        f"SELECT string_agg((CASE {cases} END)::text, '' ORDER BY id) FROM t"
    )
    assert found == "31323344214332343133"


def test_equal_keys_are_in_one_shard(database18: Database) -> None:
    """The point's id is the same, so two pipelines would write to it."""
    database18.execute(
        "CREATE TABLE t (n numeric NOT NULL, f float8 NOT NULL, c char(9) NOT NULL, i int2)"
    )
    table = find(database18, "t")
    for name, one, other in (("n", "1.0", "1.000"), ("f", "0", "'-0'"), ("c", "'a'", "'a   '")):
        for index in range(1, 30):
            condition = shard_filter(table, [name], f"{index}/29")
            query = "SELECT {0} FROM (SELECT {2}::{3} AS {1}) t"
            type_ = {"n": "numeric", "f": "float8", "c": "char(9)"}[name]
            assert database18.execute(query.format(condition, name, one, type_)) == (
                database18.execute(query.format(condition, name, other, type_))
            )
    # A key whose columns may be NULL, as long as nobody refuses it: NULL is a value like others.
    database18.execute("INSERT INTO t SELECT 1, 1, 'a', NULL FROM generate_series(1, 3)")
    parts = [rows_of(database18, "t", one) for one in shards_of(database18, "t", ["i"], 5)]
    assert sorted(map(len, parts)) == [0, 0, 0, 0, 3]


@pytest.mark.parametrize("shard", ["5/4", f"1/{MAX_SHARDS + 1}", "9999999999/9999999999"])
def test_a_shard_that_is_none_is_refused(
    database18: Database, qdrant: QdrantTarget, shard: str
) -> None:
    database18.execute("CREATE TABLE docs (id int PRIMARY KEY)")
    settings = pipeline_settings(database18, qdrant, "docs", pipeline={"shard": shard})
    with (
        connect(settings.source) as connection,
        pytest.raises(ConfigError, match=r"pipeline\.shard"),
    ):
        plan_pipeline(connection, settings)


def test_keys_that_row_filters_cannot_read(database18: Database) -> None:
    database18.execute(
        "CREATE TYPE mood AS ENUM ('a', 'b'); CREATE DOMAIN code AS text;"
        "CREATE TABLE docs (m mood, c code, x citext, id int, PRIMARY KEY (m, c, x, id))"
    )
    table = find(database18, "docs")
    for key in (["m"], ["c"], ["x"], ["m", "c", "x"]):
        with pytest.raises(ConfigError, match="built-in type"):
            shard_filter(table, key, "1/2")
    # One column that can be read is enough: what it says of a key never changes.
    condition = shard_filter(table, ["m", "c", "x", "id"], "1/2")
    database18.execute(f"CREATE PUBLICATION pub FOR TABLE docs WHERE ({condition})")


# -- pipelines


def shard_settings(
    database: Database, qdrant: QdrantTarget, collection: str, **table: object
) -> list[Settings]:
    return [
        pipeline_settings(
            database,
            qdrant,
            {"name": "docs", "collection": collection, **table},
            pipeline={"shard": f"{index}/{COUNT}"},
        )
        for index in range(1, COUNT + 1)
    ]


def create_docs(database: Database, rows: int = 40) -> None:
    database.execute(
        "CREATE TABLE docs (id int, org text, note text, emb vector(3), PRIMARY KEY (org, id));"
        "INSERT INTO docs SELECT i, 'org ' || i % 5, 'note ' || i, '[1,2,3]'"
        f" FROM generate_series(1, {rows}) i"
    )


async def assert_divided(lives: Sequence[Running], where: str = "true") -> None:
    """Each shard is exactly its rows, and together they are the collection."""
    database, qdrant = lives[0].database, lives[0].qdrant
    collection = str(lives[0].pipeline.settings.tables[0].collection)
    for life in lives:
        shard = str(life.pipeline.settings.pipeline.shard)
        condition = shard_filter(find(database, "docs"), ["org", "id"], shard)
        await life.assert_equal(where=f"({where}) AND ({condition})", shard=shard)
    ((rows,),) = database.execute(f"SELECT count(*) FROM docs WHERE {where}")
    assert qdrant.client().count(collection, exact=True).count == rows


@pytest.mark.parametrize("where", [None, "org <> 'org 1'"])
async def test_pipelines_share_a_table_and_a_collection(
    database: Database, qdrant: QdrantTarget, where: str | None
) -> None:
    create_docs(database)
    collection = qdrant.new_collection_name()
    options = {} if where is None else {"where": where}
    async with contextlib.AsyncExitStack() as stack:
        lives = [
            await stack.enter_async_context(running(settings, database, qdrant))
            for settings in shard_settings(database, qdrant, collection, **options)
        ]
        await assert_divided(lives, where or "true")
        database.execute("UPDATE docs SET note = 'x' WHERE id % 2 = 0")
        # Keys move from shard to shard.
        database.execute("UPDATE docs SET id = id + 100 WHERE id % 3 = 0")
        database.execute("UPDATE docs SET org = 'org 1' WHERE id % 7 = 0")
        database.execute("DELETE FROM docs WHERE id % 5 = 0")
        await assert_divided(lives, where or "true")


async def test_truncate_takes_the_points_of_the_own_shard_only(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """TRUNCATE knows no row filter. A pipeline that comes to it late must leave alone what the
    others have written since."""
    create_docs(database18)
    every = shard_settings(database18, qdrant, qdrant.new_collection_name())
    async with running(every[0], database18, qdrant) as late:
        await late.stop()
    async with contextlib.AsyncExitStack() as stack:
        lives = [
            await stack.enter_async_context(running(settings, database18, qdrant))
            for settings in every[1:]
        ]
        database18.execute("TRUNCATE docs")
        database18.execute("INSERT INTO docs SELECT i, 'new' FROM generate_series(1, 30) i")
        for life in lives:
            await life.caught_up()
        lives.append(await stack.enter_async_context(running(every[0], database18, qdrant)))
        await assert_divided(lives)


async def test_a_shard_is_copied_anew_without_the_others(
    database18: Database, qdrant: QdrantTarget
) -> None:
    create_docs(database18)
    every = shard_settings(database18, qdrant, qdrant.new_collection_name())
    async with contextlib.AsyncExitStack() as stack:
        for settings in every:
            async with running(settings, database18, qdrant) as life:
                await life.stop()
        # Lost together with its slot, it starts from nothing, beside the points of the others.
        database18.execute("DELETE FROM docs WHERE id % 2 = 0")
        database18.execute("SELECT pg_drop_replication_slot(%s)", (every[0].source.slot,))
        life = await stack.enter_async_context(running(every[0], database18, qdrant, restart=True))
        lives = [life] + [
            await stack.enter_async_context(running(settings, database18, qdrant))
            for settings in every[1:]
        ]
        await assert_divided(lives)


async def test_another_division_needs_another_collection(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """Of rows that were deleted in between, points of the old shards would stay."""
    create_docs(database18)
    collection = qdrant.new_collection_name()
    whole = pipeline_settings(database18, qdrant, {"name": "docs", "collection": collection})
    async with running(whole, database18, qdrant) as life:
        await life.stop()
    with pytest.raises(SinkError, match="no shard of 3"):
        async with running(shard_settings(database18, qdrant, collection)[0], database18, qdrant):
            pass


async def test_the_documented_sql_is_taken(database18: Database, qdrant: QdrantTarget) -> None:
    """A publication made by hand, as docs/mapping.md says."""
    create_docs(database18)
    settings = shard_settings(database18, qdrant, qdrant.new_collection_name())[1]
    database18.execute(
        f'CREATE PUBLICATION "{settings.source.publication}" FOR TABLE ONLY docs WHERE ('
        "((hashtextextended(org, 0) # hashint8extended(id, 1))"
        " & 9223372036854775807) % 3 = 1) WITH (publish_via_partition_root = true)"
    )
    async with running(settings, database18, qdrant) as life:
        database18.execute("UPDATE docs SET note = 'x'")
        condition = shard_filter(find(database18, "docs"), ["org", "id"], "2/3")
        await life.assert_equal(where=condition, shard="2/3")
