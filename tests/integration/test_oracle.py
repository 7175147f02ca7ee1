"""The oracle itself: it accepts what is right and sees every kind of damage."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, cast

import numpy as np
import pytest
import qdrant_edge as edge
from qdrant_client import models

from cdc_sync.demo.embedded import PostgresServer
from tests.support import oracle
from tests.support.fix_postgres import Database, create_database, drop_database
from tests.support.oracle_types import OracleError
from tests.support.qdrant_control import QdrantTarget

SCHEMA: Final = """
CREATE TYPE mood AS ENUM ('sad', 'très happy');
CREATE TYPE pair AS (n int4, "t x" text, at timestamptz, tags text[]);
CREATE DOMAIN amount AS numeric(10, 2) CHECK (VALUE >= 0);
CREATE TABLE items (
  id int8 PRIMARY KEY, title text, flag bool, small int2, ratio float4, wide float8, price amount,
  big numeric, code bpchar(4), day date, at timestamp, attz timestamptz, clock time, clockz timetz,
  span interval, cash money, net inet, bits bit(3), raw bytea, doc jsonb, plain json, words text[],
  grid int4[], mood mood, pair pair, pairs pair[], r int4range, tr tsrange, mr int4multirange,
  attrs hstore, p point, l lseg, b box, pa path, po polygon, c circle, u uuid, reg regclass,
  lsn pg_lsn, nothing text,
  dense vector(3), half halfvec(2), sparse sparsevec(5), multi vector(2)[], mask bit(4)
);
"""

ROWS: Final = r"""
INSERT INTO items VALUES (1, 'tïtle "q" \ ,', true, -3, 0.1, 0.1, 12.50, 9223372036854775808, 'ab',
  '2026-01-31', '2026-01-31 10:20:30.00012', '2026-01-31 10:20:30+05:30', '10:20:30.5',
  '10:20:30+05:30', '1 year 2 mons 3 days 04:05:06.7', -1234.5, '10.0.0.1/8', '101', '\xdeadbeef',
  '{"a": [1, 2.0, null, {"b": "x"}], "big": 9223372036854775808, "f": 1.50, "e": 1e400}',
  '{"k": 1, "k": 2, "x": 1e2}', '{a,"b \"c\", {d}",NULL,"NULL",""}', '[0:1][1:2]={{1,2},{3,4}}',
  'très happy', ROW(7, 'a "b", (c)\', '2026-01-01 00:00Z', '{x,"y z"}'),
  ARRAY[ROW(1, NULL, NULL, NULL)::pair, NULL], '[1,10)', '(,2026-01-01 12:00]', '{[1,3),[5,8)}',
  'a=>1, "b \"c"=>NULL, d=>"=>,"', '(1,-2.5)', '[(0,0),(1,1)]', '(1,1),(0,0)', '[(0,0),(1,1)]',
  '((0,0),(1,1),(2,0))', '<(1,2),3>', '550E8400-E29B-41D4-A716-446655440000', 'pg_class',
  '16/B374D848', NULL, '[1,2,3]', '[0.1,60000]', '{1:1.5,4:-2}/5', '{"[1,2]","[3,4]"}', '1010');
INSERT INTO items (id, big, wide, ratio, day, at, attz, mr, r, words) VALUES
  (-2, 'NaN', 'Infinity', 'NaN', '0044-03-15 BC', 'infinity', '10000-01-01 00:00:00.5Z', '{}',
   'empty', '{}'),
  (3, 1.10, '-0', 1e20, '-infinity', '0044-03-15 00:00:00 BC', NULL, NULL, '[5,)', NULL),
  (4, 123456789012345678.123456789, 1e300, NULL, NULL, NULL, NULL, NULL, NULL, NULL),
  (5, 1000, 5, 5, NULL, NULL, NULL, NULL, NULL, NULL);
"""

#: Written by hand from docs/mapping.md.
FIRST: Final[dict[str, object]] = {
    "id": 1,
    "title": 'tïtle "q" \\ ,',
    "flag": True,
    "small": -3,
    "ratio": float(np.float32(0.1)),
    "wide": 0.1,
    "price": 12.5,
    "big": "9223372036854775808",
    "code": "ab  ",
    "day": "2026-01-31",
    "at": "2026-01-31T10:20:30.000120Z",
    "attz": "2026-01-31T04:50:30Z",
    "clock": "10:20:30.500000",
    "clockz": "10:20:30+05:30",
    "span": "P1Y2M3DT4H5M6.7S",
    "cash": "-1234.50",
    "net": "10.0.0.1/8",
    "bits": "101",
    "raw": "3q2+7w==",
    "doc": {
        "a": [1, 2.0, None, {"b": "x"}],
        "big": "9223372036854775808",
        "f": 1.5,
        "e": "1" + "0" * 400,
    },
    "plain": {"k": 2, "x": 100.0},
    "words": ["a", 'b "c", {d}', None, "NULL", ""],
    "grid": [[1, 2], [3, 4]],
    "mood": "très happy",
    "pair": {"n": 7, "t x": 'a "b", (c)\\', "at": "2026-01-01T00:00:00Z", "tags": ["x", "y z"]},
    "pairs": [{"n": 1, "t x": None, "at": None, "tags": None}, None],
    "r": {"lower": 1, "upper": 10, "bounds": "[)"},
    "tr": {"lower": None, "upper": "2026-01-01T12:00:00Z", "bounds": "(]"},
    "mr": [
        {"lower": 1, "upper": 3, "bounds": "[)"},
        {"lower": 5, "upper": 8, "bounds": "[)"},
    ],
    "attrs": {"a": "1", 'b "c': None, "d": "=>,"},
    "p": {"x": 1.0, "y": -2.5},
    "l": {"points": [{"x": 0.0, "y": 0.0}, {"x": 1.0, "y": 1.0}]},
    "b": {"high": {"x": 1.0, "y": 1.0}, "low": {"x": 0.0, "y": 0.0}},
    "pa": {"open": True, "points": [{"x": 0.0, "y": 0.0}, {"x": 1.0, "y": 1.0}]},
    "po": {"points": [{"x": 0.0, "y": 0.0}, {"x": 1.0, "y": 1.0}, {"x": 2.0, "y": 0.0}]},
    "c": {"center": {"x": 1.0, "y": 2.0}, "radius": 3.0},
    "u": "550e8400-e29b-41d4-a716-446655440000",
    "reg": 1259,
    "lsn": "16/B374D848",
    "nothing": None,
}
NULLS: Final[dict[str, object]] = dict.fromkeys(FIRST)
PAYLOADS: Final[dict[int | str, dict[str, object]]] = {
    1: FIRST,
    # uuid5 of ["-2"]
    "8a37fc69-9abb-5894-8e5d-a4c97ee08f50": NULLS
    | {"id": -2, "day": "0044-03-15 BC", "at": "infinity", "mr": [], "r": {"empty": True}}
    | {"attz": "10000-01-01T00:00:00.500000Z", "words": []},
    3: NULLS
    | {"id": 3, "big": 1.1, "wide": -0.0, "ratio": float(np.float32(1e20)), "day": "-infinity"}
    | {"at": "0044-03-15T00:00:00Z BC", "r": {"lower": 5, "upper": None, "bounds": "[)"}},
    4: NULLS | {"id": 4, "big": "123456789012345678.123456789", "wide": 1e300},
    5: NULLS | {"id": 5, "big": 1000, "wide": 5.0, "ratio": 5.0},
}
VECTORS: Final[dict[str, object]] = {
    "dense": [1.0, 2.0, 3.0],
    "half": [0.1, 60000.0],
    "sparse": models.SparseVector(indices=[3, 0], values=[-2.0, 1.5]),
    "multi": [[1.0, 2.0], [3.0, 4.0]],
    "mask": [1.0, 0.0, 1.0, 0.0],
}


class Store(Protocol):
    """A collection that a test writes without the product."""

    url: str
    name: str

    def put(
        self, id_: int | str, payload: Mapping[str, object], vectors: Mapping[str, object]
    ) -> None: ...

    def delete(self, id_: int | str) -> None: ...

    def close(self) -> None: ...


class ServerStore:
    def __init__(self, target: QdrantTarget) -> None:
        self.url = target.url
        self.name = target.new_collection_name("oracle")
        self._client = target.client()
        dense = models.VectorParams(size=3, distance=models.Distance.COSINE)
        half = models.VectorParams(
            size=2, distance=models.Distance.DOT, datatype=models.Datatype.FLOAT16
        )
        comparator = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        multi = models.VectorParams(
            size=2, distance=models.Distance.COSINE, multivector_config=comparator
        )
        mask = models.VectorParams(
            size=4, distance=models.Distance.MANHATTAN, datatype=models.Datatype.UINT8
        )
        self._client.create_collection(
            self.name,
            vectors_config={"dense": dense, "half": half, "multi": multi, "mask": mask},
            sparse_vectors_config={"sparse": models.SparseVectorParams()},
        )

    def put(
        self, id_: int | str, payload: Mapping[str, object], vectors: Mapping[str, object]
    ) -> None:
        point = models.PointStruct(
            id=id_, payload=dict(payload), vector=cast("models.VectorStruct", dict(vectors))
        )
        self._client.upsert(self.name, [point], wait=True)

    def delete(self, id_: int | str) -> None:
        self._client.delete(self.name, models.PointIdsList(points=[id_]), wait=True)

    def close(self) -> None:
        self._client.delete_collection(self.name)


class EdgeStore:
    def __init__(self, path: Path) -> None:
        self.url = f"edge:{path}"
        self.name = "weird/näme.x"
        directory = path / "collections" / "weird%2Fn%C3%A4me%2Ex"
        directory.parent.mkdir(parents=True)
        params = edge.EdgeVectorParams
        max_sim = edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
        half, uint8 = edge.VectorStorageDatatype.Float16, edge.VectorStorageDatatype.Uint8
        config = edge.EdgeConfig(
            vectors={
                "dense": params(3, edge.Distance.Cosine),
                "half": params(2, edge.Distance.Dot, datatype=half),
                "multi": params(2, edge.Distance.Cosine, multivector_config=max_sim),
                "mask": params(4, edge.Distance.Manhattan, datatype=uint8),
            },
            sparse_vectors={"sparse": edge.EdgeSparseVectorParams()},
        )
        self._shard = edge.EdgeShard.create(str(directory), config)

    def put(
        self, id_: int | str, payload: Mapping[str, object], vectors: Mapping[str, object]
    ) -> None:
        converted = {
            name: edge.SparseVector(one.indices, one.values)
            if isinstance(one, models.SparseVector)
            else one
            for name, one in vectors.items()
        }
        point = edge.Point(id_, cast("edge.Vector", converted), dict(payload))
        self._shard.update(edge.UpdateOperation.upsert_points([point]))

    def delete(self, id_: int | str) -> None:
        self._shard.update(edge.UpdateOperation.delete_points([id_]))

    def close(self) -> None:
        self._shard.close()


@dataclass
class World:
    """A table, and a collection that is what it should be until a test damages it."""

    database: Database
    store: Store

    def repair(self, *too_many: int | str) -> None:
        for id_ in too_many:
            self.store.delete(id_)
        for id_, payload in PAYLOADS.items():
            self.store.put(id_, payload, VECTORS if id_ == 1 else {})

    def differences(self) -> list[oracle.Difference]:
        return oracle.compare(
            self.database.url,
            "items",
            qdrant_url=self.store.url,
            collection=self.store.name,
            bit_vectors=["mask"],
        )


@pytest.fixture(scope="module")
def items(postgres18: PostgresServer) -> Iterator[Database]:
    """A database with the table, for tests that only damage the collection."""
    database = create_database(postgres18)
    try:
        database.execute(SCHEMA + ROWS)
        yield database
    finally:
        drop_database(database)


@pytest.fixture(scope="module")
def server_world(items: Database, qdrant_session: QdrantTarget) -> Iterator[World]:
    store = ServerStore(qdrant_session)
    yield World(items, store)
    store.close()


@pytest.fixture(scope="module")
def edge_world(items: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    store = EdgeStore(tmp_path_factory.mktemp("edge"))
    yield World(items, store)
    store.close()


@pytest.fixture(params=["server", "edge"])
def world(request: pytest.FixtureRequest) -> World:
    world: World = request.getfixturevalue(f"{request.param}_world")
    world.repair()
    return world


def test_accepts_what_is_right(world: World) -> None:
    assert world.differences() == []
    rows = oracle.assert_equal(
        world.database.url,
        "public.items",
        qdrant_url=world.store.url,
        collection=world.store.name,
        bit_vectors=["mask"],
        rows=5,
    )
    assert rows == 5


Damage = Callable[[dict[str, object], dict[str, object]], None]


def payload_damage(path: str, value: object) -> Damage:
    def damage(payload: dict[str, object], vectors: dict[str, object]) -> None:
        *above, last = path.split("/")
        inside = payload
        for name in above:
            inside = cast("dict[str, object]", inside[name])
        inside[last] = value

    return damage


def vector_damage(name: str, value: object) -> Damage:
    def damage(payload: dict[str, object], vectors: dict[str, object]) -> None:
        vectors[name] = value

    return damage


def absent(name: str) -> Damage:
    def damage(payload: dict[str, object], vectors: dict[str, object]) -> None:
        payload.pop(name, None)
        vectors.pop(name, None)

    return damage


DAMAGES: Final[dict[str, tuple[Damage, str, str]]] = {
    "stale": (payload_damage("title", "old"), "payload", "title"),
    "truncated": (payload_damage("title", 'tïtle "q" \\ '), "payload", "title"),
    "integer turned double": (payload_damage("small", -3.0), "payload", "small"),
    "double turned integer": (payload_damage("p/y", -2), "payload", "p.y"),
    "double off by 1e-13": (payload_damage("wide", 0.1 + 1e-13), "payload", "wide"),
    "double of another sign": (payload_damage("wide", -0.1), "payload", "wide"),
    "integer turned string": (payload_damage("small", "-3"), "payload", "small"),
    "integer turned bool": (payload_damage("id", True), "payload", "id"),
    "bool turned integer": (payload_damage("flag", 1), "payload", "flag"),
    "null turned absent": (absent("nothing"), "payload", "nothing"),
    "null turned string": (payload_damage("nothing", "null"), "payload", "nothing"),
    "value turned null": (payload_damage("title", None), "payload", "title"),
    "nested": (payload_damage("doc/f", "1.50"), "payload", "doc.f"),
    "element lost": (payload_damage("words", ["a", None, "NULL", ""]), "payload", "words"),
    "element of an array": (payload_damage("grid", [[1, 2], [4, 4]]), "payload", "grid[1][0]"),
    "field too many": (payload_damage("secret", 1), "payload", "secret"),
    "nested field too many": (payload_damage("doc/z", None), "payload", "doc.z"),
    "dense off by 1e-3": (vector_damage("dense", [1.0, 2.001, 3.0]), "vector", "dense"),
    "dense turned round": (vector_damage("dense", [-1.0, -2.0, -3.0]), "vector", "dense"),
    "dense absent": (absent("dense"), "vector", "dense"),
    "half off": (vector_damage("half", [0.1001, 60000.0]), "vector", "half"),
    "half overflown": (vector_damage("half", [0.1, 70000.0]), "vector", "half"),
    "sparse value": (
        vector_damage("sparse", models.SparseVector(indices=[0, 3], values=[1.5, -2.001])),
        "vector",
        "sparse",
    ),
    "sparse index": (
        vector_damage("sparse", models.SparseVector(indices=[1, 4], values=[1.5, -2.0])),
        "vector",
        "sparse",
    ),
    "sparse item lost": (
        vector_damage("sparse", models.SparseVector(indices=[0], values=[1.5])),
        "vector",
        "sparse",
    ),
    "row of a multivector lost": (vector_damage("multi", [[1.0, 2.0]]), "vector", "multi"),
    "row of a multivector off": (
        vector_damage("multi", [[1.0, 2.0], [3.0, 4.01]]),
        "vector",
        "multi",
    ),
    "bit flipped": (vector_damage("mask", [1.0, 0.0, 1.0, 1.0]), "vector", "mask"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_sees_a_damaged_point(server_world: World, name: str) -> None:
    server_world.repair()
    damage, kind, field = DAMAGES[name]
    payload, vectors = copy.deepcopy(dict(FIRST)), copy.deepcopy(dict(VECTORS))
    damage(payload, vectors)
    server_world.store.put(1, payload, vectors)
    found = [(one.kind, one.id, one.field) for one in server_world.differences()]
    assert found == [(kind, 1, field)]


def test_sees_damage_of_every_kind_at_once(world: World) -> None:
    payload = {name: value for name, value in FIRST.items() if name != "nothing"}
    world.store.put(1, payload | {"small": -3.0}, VECTORS | {"dense": [1.0, 2.001, 3.0]})
    found = {(one.kind, one.field) for one in world.differences()}
    assert found == {("payload", "nothing"), ("payload", "small"), ("vector", "dense")}


def test_minus_zero_is_not_zero(world: World) -> None:
    world.store.put(3, PAYLOADS[3] | {"wide": 0.0}, {})
    (difference,) = world.differences()
    assert (difference.id, difference.field) == (3, "wide")


def test_sees_a_lost_point(world: World) -> None:
    world.store.delete(4)
    (difference,) = world.differences()
    assert (difference.kind, difference.id) == ("missing", 4)


@pytest.mark.parametrize("id_", [2, "00000000-0000-0000-0000-000000000000"])
def test_sees_a_point_too_many(world: World, id_: int | str) -> None:
    world.store.put(id_, PAYLOADS[4], {})
    (difference,) = world.differences()
    world.repair(id_)
    assert (difference.kind, difference.id) == ("extra", id_)


def test_sees_a_point_under_another_id(world: World) -> None:
    world.store.delete(4)
    world.store.put(40, PAYLOADS[4], {})
    found = {(one.kind, one.id) for one in world.differences()}
    world.repair(40)
    assert found == {("missing", 4), ("extra", 40)}


def test_sees_a_vector_that_should_be_absent(world: World) -> None:
    world.store.put(4, PAYLOADS[4], {"dense": [0.0, 0.0, 0.0]})
    (difference,) = world.differences()
    assert (difference.kind, difference.id, difference.field) == ("vector", 4, "dense")


def test_sees_rows_that_came_later(database18: Database, server_world: World) -> None:
    database18.execute(SCHEMA + ROWS)
    later = World(database18, server_world.store)
    later.repair()
    later.database.execute("INSERT INTO items (id) VALUES (100); UPDATE items SET u = NULL")
    assert {(one.kind, one.id) for one in later.differences()} == {("missing", 100), ("payload", 1)}


def test_assert_equal_fails_and_says_where(server_world: World) -> None:
    world, too_many = server_world, range(1000, 1030)
    world.repair()
    for id_ in too_many:
        world.store.put(id_, {}, {})
    with pytest.raises(AssertionError, match="30 differences between items") as caught:
        oracle.assert_equal(
            world.database.url,
            "items",
            qdrant_url=world.store.url,
            collection=world.store.name,
            bit_vectors=["mask"],
        )
    world.repair(*too_many)
    assert str(caught.value).count("extra 10") == 20


def test_an_empty_table_does_not_pass_for_a_full_one(server_world: World) -> None:
    world = server_world
    world.repair()
    with pytest.raises(AssertionError, match="has 5 rows, not 6"):
        oracle.assert_equal(
            world.database.url,
            "items",
            qdrant_url=world.store.url,
            collection=world.store.name,
            bit_vectors=["mask"],
            rows=6,
        )


def test_options(database18: Database, qdrant: QdrantTarget) -> None:
    database18.execute(
        "CREATE TABLE t (a text, b numeric, v vector(2), n int, x bytea, left_out int,"
        " PRIMARY KEY (b, a));"
        "INSERT INTO t VALUES ('ä\"', 1.50, '[3,4]', NULL, '\\x00', 1);"
    )
    client, name = qdrant.client(), qdrant.new_collection_name()
    client.create_collection(
        name, vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT)
    )
    # uuid5 of ["shop",["1.5","ä\""]]
    id_ = "b9b7765c-d001-53bb-80d5-19bfd021a3c1"
    payload = {"a": 'ä"', "b": "1.50", "_table": "shop"}
    client.upsert(
        name,
        [
            models.PointStruct(id=id_, payload=payload, vector=[3.0, 4.0]),
            models.PointStruct(id=7, payload={"_table": "other"}, vector=[3.0, 4.0]),
        ],
        wait=True,
    )

    def compare(**changed: object) -> list[oracle.Difference]:
        options = oracle.Options(
            columns=["a", "b", "v", "n", "x"],
            namespace="shop",
            drop_nulls=True,
            numeric_as_string=True,
            skip_bytea=True,
            unnamed_vector="v",
        )
        options.update(cast("oracle.Options", changed))
        return oracle.compare(
            database18.url, "t", qdrant_url=qdrant.url, collection=name, **options
        )

    assert compare() == []
    assert [one.field for one in compare(drop_nulls=False)] == ["n"]
    assert [one.field for one in compare(skip_bytea=False)] == ["x"]
    assert [one.field for one in compare(numeric_as_string=False)] == ["b"]
    assert [one.field for one in compare(columns=None)] == ["left_out"]
    assert {one.kind for one in compare(namespace="other")} == {"missing", "extra"}
    assert {one.kind for one in compare(unnamed_vector=None)} == {"collection", "vector"}
    assert {one.kind for one in compare(key=["a"])} == {"missing", "extra"}
    assert [one.kind for one in compare(where="n > 0")] == ["extra"]


def test_cosine_vectors_that_are_stored_as_they_are(
    database18: Database, qdrant: QdrantTarget
) -> None:
    vectors = ["[0,0]", "[1e-5,2e-5]", "[1e20,1e20]", "[1e18,2e18]", "[0.6,0.8]", "[3e-4,4e-4]"]
    database18.execute("CREATE TABLE t (id int PRIMARY KEY, v vector(2), h halfvec(2))")
    client, name = qdrant.client(), qdrant.new_collection_name()
    cosine = models.Distance.COSINE
    half = models.VectorParams(size=2, distance=cosine, datatype=models.Datatype.FLOAT16)
    client.create_collection(
        name, vectors_config={"v": models.VectorParams(size=2, distance=cosine), "h": half}
    )
    for number, text in enumerate(vectors):
        database18.execute("INSERT INTO t VALUES (%s, %s, '[0.3,-7]')", (number, text))
        vector = [float(one) for one in text.strip("[]").split(",")]
        point = models.PointStruct(
            id=number, payload={"id": number}, vector={"v": vector, "h": [0.3, -7.0]}
        )
        client.upsert(name, [point], wait=True)

    def differences() -> list[int]:
        found = oracle.compare(database18.url, "t", qdrant_url=qdrant.url, collection=name)
        return [one.id for one in found if isinstance(one.id, int)]

    assert differences() == []
    for number in range(len(vectors)):
        if number != 2:  # its norm overflows, and what is stored for it is no vector any more
            database18.execute("UPDATE t SET v = v + '[0,1e-5]' WHERE id = %s", (number,))
    assert sorted(differences()) == [0, 1, 4, 5]
    database18.execute("UPDATE t SET h = '[0.35,-7]' WHERE id = 3")
    assert sorted(differences()) == [0, 1, 3, 4, 5]


def test_refuses_what_it_cannot_judge(database18: Database, qdrant: QdrantTarget) -> None:
    client, name = qdrant.client(), qdrant.new_collection_name()
    client.create_collection(name, vectors_config={})
    database18.execute(
        "CREATE TABLE nokey (a int); CREATE TABLE odd (a int PRIMARY KEY, q tsquery);"
    )
    for table, message in (("nokey", "no primary key"), ("odd", "tsquery"), ("gone", "no table")):
        with pytest.raises(OracleError, match=message):
            oracle.compare(database18.url, table, qdrant_url=qdrant.url, collection=name)


def test_two_rows_of_one_id(database18: Database, qdrant: QdrantTarget) -> None:
    client, name = qdrant.client(), qdrant.new_collection_name()
    client.create_collection(name, vectors_config={})
    database18.execute("CREATE TABLE t (a int); INSERT INTO t VALUES (1), (1);")
    client.upsert(name, [models.PointStruct(id=1, payload={"a": 1}, vector={})], wait=True)
    (difference,) = oracle.compare(
        database18.url, "t", qdrant_url=qdrant.url, collection=name, key=["a"]
    )
    assert (difference.kind, difference.id) == ("duplicate", 1)
