"""Presets as options and plans: what they add, what they leave, what they refuse; and the object
that several columns make, in both encodings."""

from __future__ import annotations

import dataclasses
import json
import struct
import uuid
from collections.abc import Sequence

import pytest
from qdrant_client import grpc

from cdc_sync.errors import ConfigError, MappingError
from cdc_sync.mapping.ids import compile_point_id, plan_fingerprint
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import ColumnPlan, IdScheme, Part, PayloadIndex, PayloadIndexType
from cdc_sync.mapping.planner import build_plan, replan
from cdc_sync.mapping.presets import PresetName, expand, lacks_dimension
from cdc_sync.mapping.python import PythonCodec
from cdc_sync.mapping.table import Column, Index, IndexColumn, PgType, Table
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.pgoutput import messages as m
from cdc_sync.rows import UNCHANGED, RawValue, Row, TextValue
from cdc_sync.sync.gather import Gatherer
from cdc_sync.sync.routing import PlannedTable, bind
from tests.support import frames
from tests.support.mapping_types import core, pgvector, table_plan
from tests.support.points import payload_of

UUID = uuid.UUID("0e37df36-f698-4ce6-a37d-6ddb4a8a1a33")
VECTOR = pgvector("vector", 2)
LANGCHAIN = {
    "id": core("varchar"),
    "collection_id": core("uuid"),
    "embedding": VECTOR,
    "document": core("varchar"),
    "cmetadata": core("jsonb"),
}
PGVECTORSTORE = {
    "langchain_id": core("uuid"),
    "content": core("text"),
    "embedding": VECTOR,
    "likes": core("int4"),
    "content_tsv": core("tsvector"),
    "langchain_metadata": core("json"),
}
LLAMAINDEX = {
    "id": core("int8"),
    "text": core("varchar"),
    "metadata_": core("json"),
    "node_id": core("varchar"),
    "embedding": VECTOR,
    "text_search_tsv": core("tsvector"),
}
VECS = {"id": core("varchar"), "vec": VECTOR, "metadata": core("jsonb")}


def table(columns: dict[str, PgType], *, identity: Sequence[str] | None = None) -> Table:
    """A table whose first column is the primary key."""
    key = next(iter(columns))
    indexes = [Index("t_pkey", "btree", (IndexColumn(key, "ops"),), unique=True, primary=True)]
    if identity is not None:
        names = tuple(IndexColumn(name, "ops") for name in identity)
        indexes.append(Index("t_identity", "btree", names, unique=True))
    not_null = {key, *(identity or ())}
    return Table(
        oid=16384,
        schema="public",
        name="t",
        partitioned=False,
        columns=tuple(
            Column(name, number, type_, not_null=name in not_null)
            for number, (name, type_) in enumerate(columns.items(), 1)
        ),
        primary_key=(key,),
        replica_identity="d" if identity is None else "i",
        identity_columns=(key,) if identity is None else tuple(identity),
        indexes=tuple(indexes),
        leaves=(),
    )


def outcome(
    preset: PresetName,
    source: Table,
    options: PlanOptions | None = None,
    collection: bytes | None = None,
) -> dict[str, tuple[object, ...]]:
    """What becomes of each column: its field, its vector's name and metric, or its part."""
    options = expand(preset, source, options or PlanOptions(), collection).options
    found: dict[str, tuple[object, ...]] = {}
    for column in build_plan(source, options).plan.columns:
        if column.vector is not None:
            found[column.name] = ("vector", column.vector.name, column.vector.metric.value)
        elif column.part is not None:
            found[column.name] = (column.part, *([column.field] if column.field else []))
        else:
            found[column.name] = (column.field,)
    return found


def refusal(
    preset: PresetName,
    columns: dict[str, PgType],
    options: PlanOptions | None = None,
    collection: bytes | None = None,
) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        expand(preset, table(columns), options or PlanOptions(), collection)
    assert caught.value.message.startswith("public.t: ")
    return caught.value


# -- what becomes of the columns


def test_langchain_tables() -> None:
    everything = {
        "id": ("id",),
        "collection_id": ("collection_id",),
        "embedding": ("vector", "", "Cosine"),
        "document": ("page_content",),
        "cmetadata": ("metadata",),
    }
    assert outcome("langchain", table(LANGCHAIN)) == everything
    one = {**everything, "collection_id": (Part.HIDDEN,)}
    assert outcome("langchain", table(LANGCHAIN), None, UUID.bytes) == one
    community = {("uuid" if k == "id" else k): v for k, v in LANGCHAIN.items()}
    assert outcome("langchain", table({**community, "uuid": core("uuid")}))["uuid"] == ("uuid",)
    assert outcome("langchain", table(PGVECTORSTORE)) == {
        "langchain_id": (Part.HIDDEN,),
        "content": ("page_content",),
        "embedding": ("vector", "", "Cosine"),
        "likes": (Part.MEMBER, "likes"),
        "langchain_metadata": (Part.MEMBERS,),
    }


def test_llamaindex_and_vecs_tables() -> None:
    by_row = {
        "id": (Part.HIDDEN,),
        "text": (Part.NODE_TEXT,),
        "metadata_": (Part.MEMBERS,),
        "embedding": ("vector", "", "Cosine"),
    }
    assert outcome("llamaindex", table(LLAMAINDEX)) == by_row
    by_node = {**by_row, "node_id": (Part.HIDDEN,), "id": ("id",)}
    assert outcome("llamaindex", table(LLAMAINDEX, identity=["node_id"])) == by_node
    assert outcome("vecs", table(VECS)) == {
        "id": ("_id",),
        "vec": ("vector", "", "Cosine"),
        "metadata": (Part.MEMBERS,),
    }


def test_llamaindex_compares_by_cosine_whatever_index_it_made() -> None:
    source = table(LLAMAINDEX)
    index = Index("i", "hnsw", (IndexColumn("embedding", "vector_l2_ops"),))
    source = dataclasses.replace(source, indexes=(*source.indexes, index))
    assert outcome("llamaindex", source)["embedding"] == ("vector", "", "Cosine")
    options = PlanOptions(metrics={"embedding": "euclid"})
    assert outcome("llamaindex", source, options)["embedding"] == ("vector", "", "Euclid")


def test_node_ids_that_are_not_the_key_are_warned_of_with_the_sql() -> None:
    (warning,) = expand("llamaindex", table(LLAMAINDEX), PlanOptions()).warnings
    assert "ALTER TABLE public.t REPLICA IDENTITY USING INDEX t_node_id;" in warning
    assert (
        expand("llamaindex", table(LLAMAINDEX, identity=["node_id"]), PlanOptions()).warnings == ()
    )


def test_what_is_configured_comes_first() -> None:
    options = PlanOptions(
        rename={"embedding": "text-dense", "document": "text", "id": "key"},
        exclude=("cmetadata_old",),
        constants={"source": "x"},
        drop_nulls=("cmetadata",),
        numeric_as_string=True,
    )
    source = table({**LANGCHAIN, "cmetadata_old": core("jsonb"), "extra": core("int4")})
    assert outcome("langchain", source, options, UUID.bytes) == {
        "id": ("key",),
        "collection_id": (Part.HIDDEN,),
        "embedding": ("vector", "text-dense", "Cosine"),
        "document": ("text",),
        "cmetadata": ("metadata",),
        "extra": ("extra",),
    }
    expanded = expand("langchain", source, options).options
    assert expanded.drop_nulls == ("cmetadata", "document")
    assert expanded.constants == {"source": "x"}
    assert expand("langchain", source, PlanOptions(drop_nulls=True)).options.drop_nulls is True
    # A column the preset would leave out, or hide, is taken where it is asked for.
    options = PlanOptions(rename={"node_id": "node", "id": "row"})
    found = outcome("llamaindex", table(LLAMAINDEX), options)
    assert (found["node_id"], found["id"]) == (("node",), ("row",))


def test_columns_of_the_configuration_and_the_preset() -> None:
    options = PlanOptions(columns=("document", "cmetadata", "embedding"))
    found = outcome("langchain", table({**LANGCHAIN, "extra": core("int4")}), options, UUID.bytes)
    assert set(found) == {"id", "collection_id", "document", "cmetadata", "embedding"}
    assert found["collection_id"] == (Part.HIDDEN,)
    error = refusal("langchain", LANGCHAIN, PlanOptions(columns=("document", "embedding")))
    assert "`columns` leaves out column cmetadata" in error.message
    error = refusal("vecs", VECS, PlanOptions(exclude=("metadata",)))
    assert "`exclude` leaves out column metadata" in error.message
    excluded = PlanOptions(exclude=("collection_id",))
    assert outcome("langchain", table(LANGCHAIN), excluded, UUID.bytes)["collection_id"] == (
        Part.HIDDEN,
    )
    assert "collection_id" not in outcome("langchain", table(LANGCHAIN), excluded)


def test_payload_indexes() -> None:
    def indexes(preset: PresetName, source: Table) -> tuple[PayloadIndex, ...]:
        return build_plan(
            source, expand(preset, source, PlanOptions()).options
        ).plan.payload_indexes

    assert indexes("langchain", table(LANGCHAIN)) == (
        PayloadIndex("collection_id", PayloadIndexType.UUID),
    )
    assert indexes("llamaindex", table(LLAMAINDEX)) == (
        PayloadIndex("doc_id", PayloadIndexType.KEYWORD),
    )
    source = table(PGVECTORSTORE)
    likes = Index("i", "btree", (IndexColumn("likes", "int4_ops"),))
    source = dataclasses.replace(source, indexes=(*source.indexes, likes))
    assert indexes("langchain", source) == (
        PayloadIndex("likes", PayloadIndexType.INTEGER, "metadata"),
    )


# -- refusals


@pytest.mark.parametrize(
    ("preset", "columns", "lost"),
    [
        ("langchain", LANGCHAIN, "collection_id"),
        ("langchain", LANGCHAIN, "document"),
        ("langchain", PGVECTORSTORE, "embedding"),
        ("llamaindex", LLAMAINDEX, "metadata_"),
        ("llamaindex", LLAMAINDEX, "node_id"),
        ("vecs", VECS, "vec"),
    ],
)
def test_a_missing_column_is_named(
    preset: PresetName, columns: dict[str, PgType], lost: str
) -> None:
    error = refusal(preset, {name: type_ for name, type_ in columns.items() if name != lost})
    assert f"preset {preset} needs a column {lost} (" in error.message
    assert "found " in error.message
    assert str(error.remedy).startswith("The preset knows the tables of ")
    error = refusal(preset, {"id": core("int8"), "title": core("text")})
    assert "and found id, title" in error.message


def test_a_column_of_another_type_is_named() -> None:
    error = refusal("langchain", {**LANGCHAIN, "cmetadata": core("text")})
    assert "column cmetadata is of type text; preset langchain expects json or jsonb" in str(error)
    error = refusal("vecs", {**VECS, "vec": core("float4")})
    assert "column vec is of type float4; preset vecs expects vector or halfvec" in str(error)
    error = refusal("langchain", {**PGVECTORSTORE, "langchain_metadata": core("text")})
    assert "langchain_metadata" in error.message


def test_settings_that_contradict_a_preset() -> None:
    assert "`payload_key`" in refusal("vecs", VECS, PlanOptions(payload_key="x")).message
    error = refusal("langchain", PGVECTORSTORE, None, UUID.bytes)
    assert "`preset_collection` is for the tables of LangChain's PGVector" in error.message
    # A constant, or another column, that would be the same field.
    for options in (
        PlanOptions(constants={"metadata": 1}),
        PlanOptions(rename={"id": "page_content"}),
    ):
        source = table(LANGCHAIN)
        with pytest.raises(ConfigError):
            build_plan(source, expand("langchain", source, options).options)


def test_a_vector_without_dimension_is_looked_up() -> None:
    bare = table({**LANGCHAIN, "embedding": pgvector("vector")})
    assert lacks_dimension("langchain", bare, PlanOptions())
    assert not lacks_dimension("langchain", bare, PlanOptions(dimensions={"embedding": 3}))
    assert not lacks_dimension("langchain", table(LANGCHAIN), PlanOptions())
    assert not lacks_dimension("vecs", table(LANGCHAIN), PlanOptions())
    # Indexes on a cast tell it, unless they differ: each may be for one LangChain collection.
    indexes = [
        Index(name, "hnsw", (IndexColumn(None, "vector_cosine_ops", f"(embedding)::vector({n})"),))
        for name, n in (("three", 3), ("three again", 3), ("four", 4))
    ]
    told = dataclasses.replace(bare, indexes=(*bare.indexes, *indexes[:2]))
    assert not lacks_dimension("langchain", told, PlanOptions())
    assert lacks_dimension(
        "langchain", dataclasses.replace(told, indexes=tuple(indexes)), PlanOptions()
    )


# -- ids


def test_text_keys_that_spell_a_uuid_are_that_id_and_no_two_keys_share_one() -> None:
    source = table(LANGCHAIN)
    plan = build_plan(source, expand("langchain", source, PlanOptions()).options).plan
    assert plan.id_scheme is IdScheme.TEXT_UUID
    point_id = compile_point_id(plan)

    def of(key: RawValue) -> str:
        return str(point_id([key, None, None, None, None]))

    text = str(UUID)
    assert of(text.encode()) == text
    assert of(TextValue(text.encode())) == text
    hashed = of(b"doc 1")
    others = [text.upper(), text.replace("-", ""), "{" + text + "}", f"{text} ", "", hashed]
    ids = {of(key.encode()) for key in others}
    assert len(ids) == len(others)
    assert {uuid.UUID(one).version for one in ids} == {8}
    assert not ids & {text, hashed}
    for version in (1, 3, 4, 5, 6, 7):
        one = text[:14] + str(version) + text[15:]
        assert of(one.encode()) == one
    for bad in (None, UNCHANGED, b"\xff"):
        with pytest.raises(MappingError):
            of(bad)
    # Several tables in one collection: what looks the same must not be the same point.
    shared = expand("langchain", source, PlanOptions(namespace="a")).options
    assert build_plan(source, shared).plan.id_scheme is IdScheme.HASHED


# -- the object of several columns


ID = ColumnPlan("id", core("int8"), "id")
TEXT = ColumnPlan("text", core("text"), None, None, Part.NODE_TEXT)
META = ColumnPlan("meta", core("json"), None, None, Part.MEMBERS)
LIKES = ColumnPlan("likes", core("float8"), "stars", None, Part.MEMBER)


def payload(columns: Sequence[ColumnPlan], *row: RawValue, under: str | None = None) -> object:
    """The payload by both encodings, which must agree."""
    plan = dataclasses.replace(table_plan(ID, *columns), object_field=under, constants=(("c", 1),))
    whole: Row = [struct.pack(">q", 7), *row]
    codec, python = WireCodec(plan), PythonCodec(plan)
    found = python.payload(whole)
    if UNCHANGED in whole:
        assert codec.has_unknown_object(whole)
        assert python.has_unknown_object(whole)
        return found
    assert not codec.has_unknown_object(whole)
    assert not python.has_unknown_object(whole)
    point = grpc.PointStruct.FromString(codec.point(7, whole))
    assert payload_of(point) == found
    return found


def test_members_become_fields_and_those_of_others_stay() -> None:
    meta = b'{"a": [1, null], "id": "theirs", "c": "theirs", "": 0, "deep": {"id": 2}}'
    assert payload([META], meta) == {"id": 7, "c": 1, "a": [1, None], "": 0, "deep": {"id": 2}}
    assert payload([META], None) == {"id": 7, "c": 1}
    assert payload([META], b"{}") == {"id": 7, "c": 1}
    # What is no object has no members.
    assert payload([META], b"[1]") == {"id": 7, "c": 1, "meta": [1]}
    assert payload([META], b'"x"') == {"id": 7, "c": 1, "meta": "x"}
    assert payload([META], b"null") == {"id": 7, "c": 1}


def test_an_object_under_a_field_takes_columns_of_its_own() -> None:
    likes = struct.pack(">d", 2.5)
    inside = payload([META, LIKES], b'{"id": 1, "stars": 0}', likes, under="metadata")
    assert inside == {"id": 7, "c": 1, "metadata": {"id": 1, "stars": 2.5}}
    assert payload([META, LIKES], None, None, under="metadata") == {
        "id": 7,
        "c": 1,
        "metadata": {"stars": None},
    }
    nan = struct.pack(">d", float("nan"))
    assert payload([LIKES], nan, under="m") == {"id": 7, "c": 1, "m": {"stars": None}}


def test_a_part_that_is_not_in_the_message_leaves_the_object_out() -> None:
    for row in ((UNCHANGED, b"x"), (b"{}", UNCHANGED)):
        assert payload([META, TEXT], *row) == {"id": 7, "c": 1}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"id_": "n", "text": "", "x": 1}, {"id_": "n", "text": "tü\u2028", "x": 1}),
        (
            {"id_": "n", "class_name": "Node"},
            {
                "id_": "n",
                "class_name": "Node",
                "text_resource": {
                    "embeddings": None,
                    "text": "tü\u2028",
                    "path": None,
                    "url": None,
                    "mimetype": None,
                },
            },
        ),
    ],
)
def test_the_text_goes_back_into_its_node(content: object, expected: object) -> None:
    meta = json.dumps({"_node_content": json.dumps(content), "k": 1}).encode()
    found = payload([META, TEXT], meta, "tü\u2028".encode())
    assert isinstance(found, dict)
    assert found["_node_content"] == json.dumps(expected, ensure_ascii=False)
    assert {"id": 7, "c": 1, "k": 1}.items() <= found.items()
    assert "text" not in found


def test_the_text_beside_what_is_no_node() -> None:
    for meta in (b"{}", b'{"_node_content": "not json"}', b'{"_node_content": "[1]"}', None):
        found = payload([META, TEXT], meta, b"words")
        assert isinstance(found, dict)
        assert found["text"] == "words"
    # An older version's metadata may have a text of its own.
    assert payload([META, TEXT], b'{"text": "mine"}', b"words") == {"id": 7, "c": 1, "text": "mine"}
    escaped = payload([META, TEXT], b'{"_node_content": "{\\"a\\": \\"\\\\ud800\\"}"}', b"x")
    assert isinstance(escaped, dict)
    assert "\ufffd" in escaped["_node_content"]


def test_bad_bytes_name_the_column() -> None:
    with pytest.raises(MappingError, match="column meta does not hold a value of type json"):
        payload([META], b"{")


def test_parts_are_in_the_fingerprint() -> None:
    plain = table_plan(ID, dataclasses.replace(META, part=None))
    plans = [plain, table_plan(ID, META), dataclasses.replace(plain, object_field="m")]
    assert len({plan_fingerprint(plan) for plan in plans}) == 3


# -- while it runs


def test_columns_that_come_and_go() -> None:
    source = table(PGVECTORSTORE)
    options = expand("langchain", source, PlanOptions()).options
    plan = build_plan(source, options).plan
    columns = [(column.name, column.type) for column in plan.columns]
    grown = replan(plan, [*columns, ("author", core("text"))], options)
    assert grown.columns[-1] == ColumnPlan("author", core("text"), "author", None, Part.MEMBER)
    assert [column.part for column in grown.columns[:-1]] == [c.part for c in plan.columns]
    shrunk = replan(grown, [column for column in columns if column[0] != "likes"], options)
    assert "likes" not in {column.name for column in shrunk.columns}
    with pytest.raises(MappingError, match="column langchain_metadata, which the table's preset"):
        replan(plan, [c for c in columns if c[0] != "langchain_metadata"], options)

    source = table(LLAMAINDEX)
    options = expand("llamaindex", source, PlanOptions()).options
    plan = build_plan(source, options).plan
    columns = [(column.name, column.type) for column in plan.columns]
    assert replan(plan, columns, options) == plan


class Feed:
    """A gatherer of one LangChain collection's rows, fed with changes of one transaction."""

    def __init__(self) -> None:
        source = table(LANGCHAIN)
        options = expand("langchain", source, PlanOptions(), UUID.bytes).options
        planned = PlannedTable(source, build_plan(source, options).plan, options)
        oids = {name: number for number, name in enumerate(LANGCHAIN, 100)}
        types = {oids[name]: type_ for name, type_ in LANGCHAIN.items()}
        self.relation = m.Relation(
            16384,
            "public",
            "t",
            "d",
            tuple(m.RelationColumn(name, oids[name], -1, name == "id") for name in LANGCHAIN),
        )
        self.gatherer = Gatherer(
            lambda relation: bind(planned, relation, lambda oid, typmod: types[oid]),
            batch_rows=1000,
            batch_bytes=1 << 20,
        )
        self.send(m.Begin(100, 0, 1))
        self.send(self.relation)

    def send(self, message: m.Message) -> None:
        self.gatherer.feed(b"w" + struct.pack(">QQq", 1, 1, 0) + frames.encode(message))

    def changes(self) -> tuple[set[object], set[object], set[object], set[object]]:
        """Ids of upserts, partials and deletes, and of what must be read again."""
        (batch,) = self.gatherer.take().tables.values()
        changes, fetch = batch.split()
        upserts: set[object] = {point_id for point_id, _ in changes.upserts}
        partials: set[object] = {point_id for point_id, _ in changes.partials}
        return upserts, partials, set(changes.deletes), set(fetch)


def key(number: int) -> str:
    return str(uuid.UUID(int=(4 << 76) | number))


def langchain_row(number: int, collection: bytes | None, document: RawValue = b"x") -> Row:
    return [key(number).encode(), collection, b"\0\2\0\0" + bytes(8), document, b"\x01{}"]


OURS, OTHERS = UUID.bytes, uuid.UUID(int=5).bytes


@pytest.mark.parametrize("form", [OURS, TextValue(str(UUID).encode())], ids=["binary", "text"])
def test_rows_of_other_collections_are_passed_over(form: bytes) -> None:
    feed = Feed()
    feed.send(m.Insert(16384, langchain_row(1, form)))
    feed.send(m.Insert(16384, langchain_row(2, OTHERS)))
    feed.send(m.Insert(16384, langchain_row(3, None)))
    feed.send(m.Update(16384, None, False, langchain_row(4, form, UNCHANGED)))
    feed.send(m.Update(16384, None, False, langchain_row(5, OTHERS, UNCHANGED)))
    feed.send(m.Delete(16384, [key(6).encode(), None, None, None, None], True))
    # In, out, and in again; the last without the text.
    feed.send(m.Insert(16384, langchain_row(7, form)))
    feed.send(m.Update(16384, None, False, langchain_row(7, OTHERS)))
    feed.send(m.Update(16384, None, False, langchain_row(7, form, UNCHANGED)))
    # Another key and another collection at once.
    old: Row = [key(8).encode(), None, None, None, None]
    feed.send(m.Update(16384, old, True, langchain_row(9, OTHERS)))
    feed.send(m.Insert(16384, langchain_row(10, OTHERS)))
    feed.send(m.Update(16384, None, False, langchain_row(10, form)))
    upserts, partials, deletes, fetch = feed.changes()
    assert upserts == {key(1), key(10)}
    assert partials == {key(4)}
    assert deletes == {key(5), key(6), key(8)}
    assert fetch == {key(7)}
    assert feed.gatherer.ignored_changes == 3


def test_a_collection_column_that_is_gone_stops_the_table() -> None:
    feed = Feed()
    columns = tuple(c for c in feed.relation.columns if c.name != "collection_id")
    with pytest.raises(MappingError, match="collection_id"):
        feed.send(dataclasses.replace(feed.relation, columns=columns))


def test_the_rows_to_read_are_the_publications_and_the_collections() -> None:
    source = table(LANGCHAIN)
    options = expand("langchain", source, PlanOptions(), UUID.bytes).options
    planned = PlannedTable(source, build_plan(source, options).plan, options)
    condition = f"\"collection_id\" = '{UUID}'::pg_catalog.uuid"
    assert planned.selection == condition
    filtered = dataclasses.replace(planned, row_filter="(a > 1) OR b")
    assert filtered.selection == f"((a > 1) OR b) AND {condition}"
    assert filtered.row_filter == "(a > 1) OR b"
    assert dataclasses.replace(filtered, options=PlanOptions()).selection == "(a > 1) OR b"
