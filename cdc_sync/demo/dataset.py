"""The data set of the demo: texts about software packages, typed columns, embeddings.

``data/README.md`` says where it comes from. The first :data:`FIRST_ROWS` packages fill the table,
the rest are what the demo's writer inserts later. A package's id in the table is its position in
the file plus one.
"""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import dataclass, fields
from datetime import datetime
from decimal import Decimal
from importlib import resources
from typing import Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from cdc_sync.errors import ConfigError

Vector: TypeAlias = NDArray[np.float32]
Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

#: Packages that are in the table when the demo's pipeline starts.
FIRST_ROWS: Final = 2000
#: Dimension of the embeddings.
DIMENSIONS: Final = 384


@dataclass(frozen=True, slots=True)
class Package:
    """One text with its typed columns, in the order of the table's columns.

    Sizes are bytes. ``ratio`` is the installed size by the download size; ``released`` the last
    release upstream has announced; ``relations`` lists other packages by kind ("depends",
    "suggests"...).
    """

    name: str
    section: str
    priority: str
    version: str
    installed_size: int
    download_size: int
    ratio: Decimal | None
    released: datetime | None
    homepage: str | None
    tags: list[str] | None
    relations: dict[str, Json] | None
    essential: bool
    summary: str
    description: str


#: Columns that are plain values of :class:`Package`: all but the id and the embedding.
VALUE_COLUMNS: Final = tuple(field.name for field in fields(Package))


@dataclass(frozen=True, slots=True)
class Query:
    """A question in plain words and its embedding."""

    text: str
    vector: Vector


@dataclass(frozen=True, slots=True)
class Dataset:
    """``packages[i]`` has the embedding ``vectors[i]`` (float32, (n, 384), about unit length) and
    the id ``i + 1``.

    The first ``first`` packages fill the table, those from ``spare`` on come later. ``rewritten``
    gives, by position, the embedding of the summary alone: what the vector becomes when the
    description is cut to its summary.
    """

    packages: tuple[Package, ...]
    vectors: Vector
    rewritten: dict[int, Vector]
    queries: tuple[Query, ...]
    first: int
    spare: int


def load_dataset(rows: int | None = None) -> Dataset:
    """Read the data set that ships with the package; ``rows`` (1 to 2000) takes only so many into
    the table at first.

    Raises ConfigError if ``rows`` is out of range.
    """
    first = FIRST_ROWS if rows is None else rows
    if not 1 <= first <= FIRST_ROWS:
        raise ConfigError(
            f"The demo's data set has {FIRST_ROWS} rows to start with, {first} were asked for.",
            f"Ask for 1 to {FIRST_ROWS} rows.",
        )
    text = gzip.decompress(_data("packages.jsonl.gz")).decode()
    packages = tuple(_package(line) for line in text.splitlines())
    with np.load(io.BytesIO(_data("vectors.npz")), allow_pickle=False) as arrays:
        vectors = arrays["rows"].astype(np.float32)
        positions = arrays["rewritten_rows"].tolist()
        rewritten = arrays["rewritten"].astype(np.float32)
        asked = arrays["queries"].astype(np.float32)
    questions = cast("list[str]", json.loads(_data("queries.json")))
    return Dataset(
        packages=packages,
        vectors=vectors,
        rewritten={at: rewritten[i] for i, at in enumerate(positions) if at < first},
        queries=tuple(Query(*pair) for pair in zip(questions, asked, strict=True)),
        first=first,
        spare=FIRST_ROWS,
    )


def vector_literal(vector: Vector) -> str:
    """The vector in pgvector's text input form; every float32 survives it exactly."""
    return "[" + ",".join(map(repr, vector.tolist())) + "]"


def _data(name: str) -> bytes:
    return (resources.files("cdc_sync.demo") / "data" / name).read_bytes()


def _package(line: str) -> Package:
    values = json.loads(line)
    if values["ratio"] is not None:
        values["ratio"] = Decimal(values["ratio"])
    if values["released"] is not None:
        values["released"] = datetime.fromisoformat(values["released"])
    return Package(**values)
