"""The demo's data set: complete, consistent, small, and free of what must not be in it."""

from __future__ import annotations

import re
from decimal import Decimal
from importlib import resources

import numpy as np
import pytest

from cdc_sync.demo.dataset import (
    DIMENSIONS,
    FIRST_ROWS,
    Dataset,
    load_dataset,
    vector_literal,
)
from cdc_sync.errors import ConfigError

SPARE_ROWS = 200
LIMIT_BYTES = 4 * 1024 * 1024
#: Names of the table's enum type.
PRIORITIES = {"required", "important", "standard", "optional", "extra"}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset()


def test_counts(dataset: Dataset) -> None:
    assert len(dataset.packages) == FIRST_ROWS + SPARE_ROWS
    assert dataset.vectors.shape == (FIRST_ROWS + SPARE_ROWS, DIMENSIONS)
    assert (dataset.first, dataset.spare) == (FIRST_ROWS, FIRST_ROWS)
    assert len(dataset.rewritten) == 240
    assert len(dataset.queries) == 6


def test_files_are_small_and_documented() -> None:
    files = {
        entry.name: len(entry.read_bytes())
        for entry in (resources.files("cdc_sync.demo") / "data").iterdir()
    }
    assert set(files) == {"README.md", "packages.jsonl.gz", "queries.json", "vectors.npz"}
    assert sum(files.values()) <= LIMIT_BYTES


def test_vectors_are_distinct_unit_vectors(dataset: Dataset) -> None:
    for vectors in (
        dataset.vectors,
        np.stack(list(dataset.rewritten.values())),
        np.stack([query.vector for query in dataset.queries]),
    ):
        assert vectors.dtype == np.float32
        # float16 keeps eleven bits of each component.
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=5e-4)
    assert len(np.unique(dataset.vectors, axis=0)) > 0.99 * len(dataset.vectors)


def test_rewritten_vectors_belong_to_their_rows(dataset: Dataset) -> None:
    """The vector of a summary is near that of the whole text, and yet another one."""
    similarities = [
        float(vector @ dataset.vectors[position]) for position, vector in dataset.rewritten.items()
    ]
    assert min(similarities) > 0.2
    assert np.mean(similarities) > 0.75
    assert max(similarities) < 0.9999


def test_the_vectors_mean_something(dataset: Dataset) -> None:
    """Were vectors and texts shifted against each other, these would not find each other."""
    scores = dataset.vectors @ np.stack([query.vector for query in dataset.queries]).T
    best = {
        query.text: {dataset.packages[int(i)].name for i in np.argsort(-scores[:, at])[:8]}
        for at, query in enumerate(dataset.queries)
    }
    assert "graphicsmagick" in best["edit photos from the command line"]
    assert "smplayer" in best["watch films and videos"]
    assert "stellarium" in best["learn about stars and planets"]
    assert "wireshark" in best["find out what is slowing down my network"]


def test_every_column_is_what_the_table_takes(dataset: Dataset) -> None:
    names = set()
    for package in dataset.packages:
        names.add(package.name)
        assert package.priority in PRIORITIES
        assert 0 <= package.installed_size < 2**63
        assert 0 < package.download_size < 2**31
        assert package.ratio is None or Decimal(0) < package.ratio < Decimal(10**9)
        assert package.released is None or package.released.utcoffset() is not None
        assert package.tags is None or all(tag and tag == tag.strip() for tag in package.tags)
        assert package.relations is None or set(package.relations) <= {
            "depends",
            "recommends",
            "suggests",
            "conflicts",
            "provides",
        }
        assert package.summary
        assert package.description
        assert "\x00" not in package.summary + package.description
    assert len(names) == len(dataset.packages)


def test_there_are_nulls_and_values_in_every_nullable_column(dataset: Dataset) -> None:
    first = dataset.packages[:FIRST_ROWS]
    for column in ("released", "homepage", "tags", "relations"):
        empty = sum(getattr(package, column) is None for package in first)
        assert 0 < empty < len(first), column
    assert any(package.essential for package in first)


def test_sizes_vary_enough_for_some_rows_to_be_out_of_line(dataset: Dataset) -> None:
    lengths = np.array([len(package.description) for package in dataset.packages])
    assert np.quantile(lengths, 0.1) < 200
    assert np.quantile(lengths, 0.9) > 600


def test_no_addresses_of_people(dataset: Dataset) -> None:
    address = re.compile(r"[\w.+-]+@[\w-]+\.\w+")
    for package in dataset.packages:
        for text in (package.summary, package.description, package.homepage or ""):
            assert not address.search(text), package.name
            assert "mailto:" not in text


def test_vector_literals_are_exact(dataset: Dataset) -> None:
    for vector in (*dataset.vectors[:20], dataset.queries[0].vector):
        parsed = np.array(vector_literal(vector)[1:-1].split(","), dtype=np.float32)
        assert (parsed == vector).all()


@pytest.mark.parametrize("rows", [1, 7, FIRST_ROWS])
def test_fewer_rows_keep_the_spare_ones_apart(rows: int) -> None:
    dataset = load_dataset(rows)
    assert dataset.first == rows
    assert dataset.spare == FIRST_ROWS
    assert all(position < rows for position in dataset.rewritten)


@pytest.mark.parametrize("rows", [0, -1, FIRST_ROWS + 1])
def test_rows_out_of_range_are_refused(rows: int) -> None:
    with pytest.raises(ConfigError, match="2000 rows"):
        load_dataset(rows)
