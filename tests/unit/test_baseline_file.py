"""Baselines and files of queries that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdc_sync.errors import ConfigError
from cdc_sync.verify.baseline_file import (
    Baseline,
    Hit,
    Query,
    Server,
    SparseQuery,
    as_json,
    read_baseline,
    write_baseline,
)
from cdc_sync.verify.baseline_queries import parse_vector, read_queries, vector_text


def baseline(**more: object) -> Baseline:
    query = Query(
        number=1,
        table="public.docs",
        column="embedding",
        origin="sample",
        vector=[0.1, 2.0],
        k=10,
        exact=[Hit(key=["a", "ü"], distance=0.5)],
    )
    sparse = query.model_copy(
        update={"number": 2, "vector": SparseQuery(indices=[0, 4], values=[0.5, 1], size=9)}
    )
    return Baseline.model_validate(
        {
            "created_at": "2026-01-31T10:00:00+00:00",
            "cdc_sync": "1",
            "server": Server(postgres="18.1", database="app", settings={}),
            "configuration": [],
            "tables": [],
            "queries": [query, sparse],
            **more,
        }
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    write_baseline(baseline(), path, overwrite=False)
    assert read_baseline(path) == baseline()
    assert json.loads(path.read_bytes())["version"] == 1
    with pytest.raises(ConfigError, match="exists"):
        write_baseline(baseline(), path, overwrite=False)
    write_baseline(baseline(notes=["again"]), path, overwrite=True)
    assert read_baseline(path).notes == ["again"]
    with pytest.raises(ConfigError, match="cannot be written"):
        write_baseline(baseline(), tmp_path / "absent" / "b.json", overwrite=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "another version"),
        ({"format": "something"}, "is not a baseline"),
        ({"queries": [{"number": 1}]}, "is damaged at queries.0"),
        ({"surprise": 1}, "is damaged at surprise"),
    ],
)
def test_files_that_are_something_else(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "b.json"
    path.write_text(json.dumps({**json.loads(as_json(baseline())), **change}))
    with pytest.raises(ConfigError, match=message):
        read_baseline(path)


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00\xff", '{"format": "cdc_sync baseline"}'])
def test_files_that_are_no_baseline(tmp_path: Path, content: str) -> None:
    path = tmp_path / "b.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"is not a baseline|is damaged"):
        read_baseline(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_baseline(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no query"),
        ("[]", "holds no query"),
        ("{", "line 1 is not JSON"),
        ("[{]", "its content is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("17", "query 1 of the file is no object"),
        ("[1]", "query 1 of the file is no object"),
        ("{}", "has no vector"),
        ('{"vector": []}', "no list of numbers"),
        ('{"vector": [1, "secret"]}', "no finite numbers"),
        ('{"vector": [1, true]}', "no finite numbers"),
        ('{"vector": [1e39]}', "no finite numbers"),
        ('{"vector": [NaN]}', "line 1 is not JSON"),
        ('{"vector": [1], "k": 0}', "k that is not 1 to 1000"),
        ('{"vector": [1], "k": true}', "k that is not 1 to 1000"),
        ('{"vector": [1], "filter": 5}', "filter that is no text"),
        ('{"vector": [1], "filters": "x"}', "unknown part 'filters'"),
        ('{"vector": {"indices": [1]}}', "sparse vector that is not"),
        ('{"vector": {"indices": [1, 1], "values": [1, 2]}}', "without distinct indices"),
        ('{"vector": {"indices": [-1], "values": [1]}}', "without distinct indices"),
        ('{"vector": [1], "relevant": []}', "no list of keys"),
        ('{"vector": [1], "relevant": [1.5]}', "neither text nor integer"),
        ('{"vector": [1], "relevant": [{"key": 1, "grade": -1}]}', "grade that is not"),
        ('{"vector": [1], "relevant": [{"grade": 1}]}', "relevant row that is not"),
    ],
)
def test_files_of_queries_that_are_wrong(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        read_queries(path)
    assert "secret" not in str(raised.value)


def test_both_forms_of_files(tmp_path: Path) -> None:
    path = tmp_path / "q"
    path.write_text('\n{"vector": [1]}\n\n{"vector": [2], "relevant": {"5": 2, "7": 1}}\n')
    lines = read_queries(path)
    path.write_text('[{"vector": [1]}, {"vector": [2], "relevant": [{"key": 5, "grade": 2}, 7]}]')
    array = read_queries(path)
    assert [one.vector for one in lines] == [one.vector for one in array] == [[1], [2]]
    assert lines[1].relevant == array[1].relevant
    assert [one.number for one in lines] == [1, 2]


@pytest.mark.parametrize("text", ["[1,-2.5,1e-05]", "{1:1.5,30:-2}/30", "{}/3", "[0.1]"])
def test_vectors_as_text(text: str) -> None:
    again = parse_vector(vector_text(parse_vector(text), bits=False))
    assert again == parse_vector(text)


def test_bits_as_text() -> None:
    assert vector_text(parse_vector("0101"), bits=True) == "0101"
