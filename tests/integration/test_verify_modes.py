"""``cdc-sync verify`` in all its modes, beside pipelines that are stopped, gone or embedded."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from qdrant_client import QdrantClient
from qdrant_client import models as q

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError, SourceError
from cdc_sync.sync.migrate import migrate
from cdc_sync.verify import stream, table
from cdc_sync.verify.data import Asked, Verified, verify
from cdc_sync.verify.repair import repair
from cdc_sync.verify.report import TableReport
from cdc_sync.verify.table import How
from tests.support.fix_postgres import Database
from tests.support.oracle import compare
from tests.support.pipeline_task import pipeline_settings
from tests.support.qdrant_control import QdrantTarget

_ROWS = 300


def create_items(database: Database, rows: int = _ROWS) -> None:
    database.execute(
        "CREATE TABLE items (id bigint PRIMARY KEY, note text, n int, emb vector(3));"
        "INSERT INTO items SELECT i, 'note ' || i, i, ARRAY[i, 1, 2]::vector"
        f" FROM generate_series(1, {rows}) i"
    )


def verified(settings: Settings, how: How | None = None, **asked: Any) -> Verified:
    def silent(*_: object) -> None:
        pass

    return verify(settings, Asked(how or How(), **asked), silent)


def copied(
    database: Database, qdrant: QdrantTarget, *tables: Mapping[str, object] | str, **more: Any
) -> Settings:
    """Tables that were copied, by a pipeline that is stopped."""
    settings = pipeline_settings(database, qdrant, *tables, **more)
    with contextlib.redirect_stderr(io.StringIO()):
        assert migrate(settings).exit_code == 0
    return settings


def only(verified: Verified) -> TableReport:
    (table,) = verified.report.tables
    return table


def kinds(table: TableReport) -> dict[str, int]:
    return {finding.kind.value: finding.count for finding in table.findings.values()}


def collection(settings: Settings) -> str:
    name = settings.tables[0].collection
    assert name is not None
    return name


def recreate(client: QdrantClient, name: str, vectors: q.VectorParams) -> None:
    """The collection with other vectors and the same points."""
    records, _ = client.scroll(name, limit=10_000, with_vectors=True)
    client.delete_collection(name)
    client.create_collection(name, {"emb": vectors})
    points = []
    for record in records:
        assert isinstance(record.vector, dict)
        vector = list(record.vector["emb"])
        vector += [1.0] * (vectors.size - len(vector))
        points.append(q.PointStruct(id=record.id, vector={"emb": vector}, payload=record.payload))
    client.upsert(name, points, wait=True)


def test_wrong_collections(database18: Database, qdrant: QdrantTarget) -> None:
    create_items(database18, 20)
    settings = copied(database18, qdrant, "items")
    client, name = qdrant.client(), collection(settings)
    recreate(client, name, q.VectorParams(size=3, distance=q.Distance.DOT))
    # Only the metric is wrong: the vectors are those that were written, as they were stored.
    assert kinds(only(verified(settings))) == {"metric": 1}
    recreate(client, name, q.VectorParams(size=4, distance=q.Distance.EUCLID))
    assert kinds(only(verified(settings))) == {"dimension": 1, "metric": 1}
    half = q.VectorParams(size=3, distance=q.Distance.COSINE, datatype=q.Datatype.FLOAT16)
    client.delete_collection(name)
    client.create_collection(name, {"emb": half})
    found = kinds(only(verified(settings)))
    assert found == {"datatype": 1, "count": 1, "missing": 20}
    client.delete_collection(name)
    client.create_collection(name, {"other": half})
    assert kinds(only(verified(settings)))["vector_config"] == 1
    client.delete_collection(name)
    table = only(verified(settings))
    assert kinds(table) == {"collection_missing": 1}
    assert verified(settings).report.exit_code == 3


def test_a_sample_says_how_sure_it_is(database18: Database, qdrant: QdrantTarget) -> None:
    create_items(database18)
    settings = copied(database18, qdrant, "items")
    table = only(verified(settings, How(sample=100, seed=1)))
    assert (table.compared, table.ids, table.different) == (100, 100, 0)
    assert table.bound() == pytest.approx(0.0295, abs=1e-3)
    assert table.equal
    client, name = qdrant.client(), collection(settings)
    client.set_payload(name, {"n": -1}, points=list(range(1, 151)), wait=True)
    point = q.PointStruct(id=9_000, vector={"emb": [1.0, 2.0, 3.0]}, payload={})
    client.upsert(name, [point], wait=True)
    report = verified(settings, How(sample=100, seed=2)).report
    table = only(Verified(report, []))
    assert 25 < kinds(table)["value"] < 75
    assert report.exit_code == 3
    # More than there are: all of them, each once.
    table = only(verified(settings, How(sample=5_000, seed=3)))
    assert table.compared == _ROWS
    assert kinds(table) == {"value": 150, "extra": 1, "count": 1}


def test_every_row_is_as_likely_as_any_other(database18: Database, qdrant: QdrantTarget) -> None:
    database18.execute(
        "CREATE TABLE parts (id int PRIMARY KEY, filler text, emb vector(2))"
        " PARTITION BY RANGE (id);"
        "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (101);"
        "CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (101) TO (1001);"
        # Rows of very different length, so that blocks hold very different numbers of them.
        "INSERT INTO parts SELECT i, repeat('x', CASE WHEN i <= 100 THEN 1500 ELSE 3 END), '[1,2]'"
        " FROM generate_series(1, 1000) i"
    )
    settings = copied(database18, qdrant, "parts")
    client, name = qdrant.client(), collection(settings)
    client.delete(name, list(range(1, 101)), wait=True)
    found = 0
    for seed in range(5):
        found += only(verified(settings, How(sample=200, seed=seed))).missing
    # 100 of 1000 sampled: ten times the standard deviation to each side.
    assert 10 < found < 190


def test_rows_of_a_predicate(database18: Database, qdrant: QdrantTarget) -> None:
    create_items(database18)
    settings = copied(database18, qdrant, "items")
    client, name = qdrant.client(), collection(settings)
    client.delete(name, [4, 5, 6, 7], wait=True)
    table = only(verified(settings, How(where="id % 2 = 0 AND id < 100 -- even")))
    assert (table.compared, kinds(table)) == (49, {"missing": 2})
    database18.execute("CREATE SEQUENCE numbers; CREATE TABLE stranger (id int PRIMARY KEY)")
    with pytest.raises(SourceError, match="nothing"):
        verified(settings, How(where="nothing = 1"))
    with pytest.raises(SourceError, match="read-only"):
        verified(settings, How(where="nextval('numbers') > 0"))
    with pytest.raises(ConfigError, match="does not belong"):
        verified(settings, tables=("stranger",))


def test_rows_that_share_an_id(database18: Database, qdrant: QdrantTarget) -> None:
    database18.execute(
        # A primary key is not inherited.
        "CREATE TABLE notes (id int PRIMARY KEY, note text, emb vector(2));"
        "CREATE TABLE more_notes () INHERITS (notes);"
        "ALTER TABLE more_notes ADD PRIMARY KEY (id);"
        "INSERT INTO notes SELECT i, 'x', '[1,2]' FROM generate_series(1, 50) i;"
        # The point of the second one is what both of its rows map to.
        "INSERT INTO more_notes SELECT i, CASE WHEN i = 50 THEN 'x' ELSE 'y' END, '[1,2]'"
        " FROM generate_series(49, 80) i"
    )
    settings = pipeline_settings(database18, qdrant, "notes")
    with contextlib.redirect_stderr(io.StringIO()):
        migrate(settings)
    table = only(verified(settings))
    assert kinds(table) == {"duplicate_id": 2}
    (finding,) = table.findings.values()
    assert {(example.id, example.text) for example in finding.examples} == {
        (49, "2 rows"),
        (50, "2 rows"),
    }


def test_without_a_slot_points_are_written_directly(
    database18: Database, qdrant: QdrantTarget
) -> None:
    create_items(database18)
    settings = pipeline_settings(database18, qdrant, "items")
    with contextlib.redirect_stderr(io.StringIO()):
        migrate(settings, remove=True)
    assert verified(settings).report.equal
    database18.execute("UPDATE items SET n = 0 WHERE id <= 3; DELETE FROM items WHERE id = 300")
    client, name = qdrant.client(), collection(settings)
    client.delete(name, [10, 11], wait=True)
    before = verified(settings)
    assert "nothing follows" in before.report.stream
    table = only(before)
    assert kinds(table) == {"value": 3, "extra": 1, "missing": 2, "count": 1}
    said: list[str] = []
    assert repair(settings, before, 60, said.append)
    assert said == ["public.items: 6 points written or removed"]
    assert only(verified(settings)).equal
    options = {"qdrant_url": qdrant.url, "collection": name, "api_key": qdrant.api_key}
    assert not compare(database18.url, "items", **options)  # type: ignore[arg-type]


def test_vectors_that_are_missing_or_too_many(database18: Database, qdrant: QdrantTarget) -> None:
    database18.execute(
        "CREATE TABLE items (id int PRIMARY KEY, emb vector(2), words sparsevec(9));"
        "INSERT INTO items SELECT i, CASE WHEN i > 4 THEN '[1,2]'::vector END,"
        " CASE WHEN i % 2 = 0 THEN '{1:2}/9'::sparsevec END FROM generate_series(1, 9) i"
    )
    settings = copied(database18, qdrant, "items")
    assert verified(settings).report.equal
    client, name = qdrant.client(), collection(settings)
    sparse = q.SparseVector(indices=[0], values=[2.0])
    client.update_vectors(name, [q.PointVectors(id=1, vector={"emb": [1.0, 2.0]})], wait=True)
    client.update_vectors(name, [q.PointVectors(id=3, vector={"words": sparse})], wait=True)
    client.delete_vectors(name, ["emb"], [7], wait=True)
    client.delete_vectors(name, ["words"], [2, 8], wait=True)
    (found,) = verified(settings).findings
    counts = {(one.kind.value, one.field): one.count for one in found.report.findings.values()}
    assert counts == {
        ("vector_unexpected", "emb"): 1,
        ("vector_unexpected", "words"): 1,
        ("vector_missing", "emb"): 1,
        ("vector_missing", "words"): 2,
    }
    assert set(found.keys) == {1, 3, 7, 2, 8}


def test_keys_that_points_tell(database18: Database, qdrant: QdrantTarget) -> None:
    """A payload that holds no key hides no other's."""
    database18.execute(
        "CREATE TABLE visits (at timestamptz, n int, emb vector(2), PRIMARY KEY (at, n));"
        "INSERT INTO visits SELECT to_timestamp(i), i, '[1,2]' FROM generate_series(1, 9) i"
    )
    settings = pipeline_settings(database18, qdrant, "visits")
    with contextlib.redirect_stderr(io.StringIO()):
        migrate(settings, remove=True)
    database18.execute("DELETE FROM visits WHERE n <= 3")
    client, name = qdrant.client(), collection(settings)
    records, _ = client.scroll(name)
    gone = {record.id for record in records if record.payload and record.payload["n"] <= 3}
    liar = "00000000-0000-4000-8000-00000000000a"
    said = {"at": "never", "n": 1}
    client.upsert(name, [q.PointStruct(id=liar, vector={}, payload=said)], wait=True)
    (found,) = verified(settings).findings
    assert (set(found.keys), found.ids) == (gone, {liar})
    assert repair(settings, verified(settings), 60, lambda _: None)
    assert verified(settings).report.equal


def test_an_embedded_database(database18: Database, qdrant: QdrantTarget, tmp_path: Path) -> None:
    create_items(database18)
    target = {"url": f"edge:{tmp_path}/edge"}
    settings = copied(database18, qdrant, "items", target=target)
    assert verified(settings).report.equal
    database18.execute("UPDATE items SET note = NULL WHERE id <= 3")
    table = only(verified(settings))
    assert (table.pending, table.equal) == (3, True)
    database18.execute("SELECT pg_logical_emit_message(true, 'other', 'x')")
    json.dumps(verified(settings).report.to_json())


def test_more_differences_than_are_held_at_once(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_items(database18)
    settings = copied(database18, qdrant, "items")
    client, name = qdrant.client(), collection(settings)
    client.set_payload(name, {"n": -1}, points=list(range(1, 101)), wait=True)
    client.delete(name, list(range(101, 201)), wait=True)
    points = [
        q.PointStruct(id=i, vector={"emb": [1.0, 2.0, 3.0]}, payload={})
        for i in range(5_000, 5_050)
    ]
    client.upsert(name, points, wait=True)
    monkeypatch.setattr(table, "_WAVE", 7)
    monkeypatch.setattr(table, "_REPAIRED", 20)
    monkeypatch.setattr(table, "_HELD_IDS", 90)
    before = verified(settings, How(examples=3))
    found = only(before)
    assert kinds(found) == {"value": 100, "missing": 100, "extra": 50, "count": 1}
    assert found.different == 250
    assert all(len(finding.examples) <= 3 for finding in found.findings.values())
    said: list[str] = []
    with contextlib.redirect_stderr(io.StringIO()):
        assert repair(settings, before, 60, said.append)
    assert "as a whole" in said[0]
    assert only(verified(settings)).equal


def test_a_role_that_may_read_some_columns(database18: Database, qdrant: QdrantTarget) -> None:
    create_items(database18, 30)
    settings = copied(database18, qdrant, {"name": "items", "columns": ["id", "note", "emb"]})
    role = database18.name
    database18.execute(
        f"CREATE ROLE {role} LOGIN REPLICATION PASSWORD 'x';"
        # No xmin and xmax, which tell the version of a row.
        f"GRANT SELECT (id, note, emb, ctid) ON items TO {role}"
    )
    database18.drop_later(role)
    where = database18.url.rpartition("@")[2]
    url = SecretStr(f"postgresql://{role}:x@{where}")
    source = settings.source.model_copy(update={"url": url})
    limited = settings.model_copy(update={"source": source})
    assert verified(limited).report.equal
    qdrant.client().delete(collection(settings), [3], wait=True)
    assert kinds(only(verified(limited))) == {"missing": 1, "count": 1}


def test_what_a_slot_holds_cannot_be_told(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_items(database18, 30)
    settings = copied(database18, qdrant, "items")
    database18.execute("UPDATE items SET n = 0 WHERE id = 1; UPDATE items SET n = 0 WHERE id = 2")
    qdrant.client().delete(collection(settings), [3], wait=True)
    monkeypatch.setattr(stream, "_PEEKED", 2)
    report = verified(settings).report
    assert (report.exit_code, only(Verified(report, [])).undecided) == (75, 3)
    assert "too many changes" in only(Verified(report, [])).notes[-1]
    monkeypatch.undo()
    table = only(verified(settings))
    assert (table.pending, kinds(table)) == (2, {"missing": 1, "count": 1})
    # A truncation changes every row.
    database18.execute("TRUNCATE items")
    table = only(verified(settings))
    assert (table.pending, table.equal) == (29, True)


def test_tables_that_share_a_collection(database18: Database, qdrant: QdrantTarget) -> None:
    database18.execute(
        "CREATE TABLE books (isbn text, edition int, title text, emb vector(3),"
        " PRIMARY KEY (isbn, edition));"
        "CREATE TABLE films (id uuid PRIMARY KEY, title text, emb vector(3));"
        "INSERT INTO books SELECT 'isbn ' || i, 1, 'title', '[1,2,3]'"
        " FROM generate_series(1, 40) i;"
        "INSERT INTO films SELECT gen_random_uuid(), 'title', '[1,2,3]' FROM generate_series(1, 40)"
    )
    shared = qdrant.new_collection_name()
    tables: list[dict[str, object]] = [
        {"name": "books", "collection": shared, "namespace": "b", "payload_key": "book"},
        {"name": "films", "collection": shared, "namespace": "f", "rename": {"id": "film"}},
    ]
    settings = copied(database18, qdrant, *tables)
    assert verified(settings).report.equal
    client = qdrant.client()
    records, _ = client.scroll(shared, limit=1_000, with_vectors=True)
    by_table = {one: [r for r in records if (r.payload or {})["_table"] == one] for one in "bf"}
    client.delete(shared, [by_table["b"][0].id, by_table["f"][0].id], wait=True)
    stranger = q.PointStruct(id=7, vector=by_table["f"][1].vector or {}, payload={"_table": "f"})
    client.upsert(shared, [stranger], wait=True)
    database18.execute("DELETE FROM books WHERE isbn = 'isbn 17'")
    books, films = verified(settings).report.tables
    assert kinds(books) == {"missing": 1, "count": 1}
    assert books.pending == 1
    assert kinds(films) == {"missing": 1, "extra": 1}
    assert "counts agree, although as many points are missing as are extra" in films.notes
    (table,) = verified(settings, tables=("films",)).report.tables
    assert table.table == "public.films"
