"""The file that ``cdc-sync baseline`` writes and ``cdc-sync verify search`` reads.

JSON, with a version. It holds keys of rows and query vectors, and values of rows only where they
were asked for: whoever may read the file sees those.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cdc_sync.errors import ConfigError

FORMAT: Final = "cdc_sync baseline"
VERSION: Final = 1

_ADVICE: Final = "Take a new one with cdc-sync baseline."


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class SparseQuery(_Part):
    """A sparse vector: 0-based indices, as many values, and its dimension."""

    indices: list[int]
    values: list[float]
    size: int


#: A query's vector: its components, or a sparse vector.
QueryVector = list[float] | SparseQuery


class Hit(_Part):
    """A row found: its key's values as Postgres writes them, in key order, and pgvector's distance:
    1 - cosine similarity, the negative inner product, or the distance itself."""

    key: list[str]
    distance: float


class Label(_Part):
    """How relevant a row is to a query; 0 is not at all."""

    key: list[str]
    grade: float = Field(1.0, ge=0, le=100)


class Query(_Part):
    """A query and what pgvector answers.

    ``exclude`` is the key of the row whose vector it is, which is left out of all results. The
    results have up to ``k`` rows. ``ties`` are rows as near as the last of ``exact``, any of which
    might stand in its place. ``index`` is None where no index gave the rows in their order.
    """

    number: int
    label: str | None = None
    table: str
    column: str
    origin: Literal["file", "sample"]
    vector: QueryVector
    k: int = Field(ge=1, le=1000)
    filter: str | None = None
    exclude: list[str] | None = None
    relevant: list[Label] | None = None
    exact: list[Hit]
    ties: list[Hit] = Field(default_factory=list)
    index: list[Hit] | None = None
    indexes_used: list[str] = Field(default_factory=list)


class Norms(_Part):
    """Lengths of the vectors of a sample of rows."""

    rows: int
    minimum: float
    maximum: float
    mean: float


class IndexEntry(_Part):
    """An index of a vector column. ``options`` holds the parameters in effect, pgvector's defaults
    included (``m``, ``ef_construction``; ``lists``)."""

    name: str
    method: str
    operator_class: str
    options: dict[str, int | str]
    holds: str
    partial: str | None = None
    partition: str | None = None
    valid: bool = True


class VectorEntry(_Part):
    """A vector column. ``quantization`` is what pgvector keeps of it in less precision: the column
    itself (halfvec, bit) or an index."""

    column: str
    vector: str
    type: str
    kind: str
    datatype: str
    dimension: int | None = None
    dimension_from: str | None = None
    metric: str
    metric_from: str
    indexes: list[IndexEntry]
    quantization: str | None = None
    norms: Norms | None = None


class Partition(_Part):
    """A leaf partition and its exact number of rows."""

    name: str
    rows: int


class PayloadField(_Part):
    """A field of the payload in the sampled rows: how often it had which type of JSON, and examples
    where values were asked for."""

    field: str
    types: dict[str, int]
    examples: list[object] | None = None


class TableColumn(_Part):
    """A column and what becomes of it."""

    column: str
    type: str
    becomes: str


class TableEntry(_Part):
    """The inventory of a table. ``rows`` is exact, at the time of the baseline."""

    table: str
    collection: str
    row_filter: str | None = None
    key: list[str]
    rows: int
    partitions: list[Partition]
    columns: list[TableColumn]
    vectors: list[VectorEntry]
    sampled_rows: int
    payload: list[PayloadField]


class Server(_Part):
    """The source."""

    postgres: str
    pgvector: str | None = None
    database: str
    settings: dict[str, str]


class Baseline(_Part):
    """What a source was like before a migration. See docs/search-quality.md."""

    format: Literal["cdc_sync baseline"] = "cdc_sync baseline"
    version: Literal[1] = 1
    created_at: str
    cdc_sync: str
    server: Server
    configuration: list[dict[str, object]]
    tables: list[TableEntry]
    queries: list[Query]
    notes: list[str] = Field(default_factory=list)


def write_baseline(baseline: Baseline, path: Path, *, overwrite: bool) -> None:
    """Write the file, readable by its owner only; whole or not at all.

    Raises :class:`ConfigError` when it exists, or cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if not overwrite:
            check_absent(path)
        partial.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(partial, flags, stat.S_IRUSR | stat.S_IWUSR), "wb") as file:
            file.write(as_json(baseline))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror}.", "Name a file that can be written."
        ) from error


def check_absent(path: Path) -> None:
    """Raise :class:`ConfigError` if there is a file."""
    if path.exists():
        raise ConfigError(f"{path} exists.", "Name another file, or replace it with --overwrite.")


def as_json(baseline: Baseline) -> bytes:
    """The file's content: each table and each query on a line of its own."""
    parts = []
    for name, value in baseline.model_dump(mode="json", exclude_none=True).items():
        if name in ("tables", "queries", "configuration"):
            lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in value)
            text = f"[\n{lines}\n]" if lines else "[]"
        else:
            text = json.dumps(value, ensure_ascii=False)
        parts.append(f"{json.dumps(name)}: {text}")
    content = ",\n".join(parts)
    return f"{{\n{content}\n}}\n".encode()


def read_baseline(path: Path) -> Baseline:
    """Read the file. Raises :class:`ConfigError`, whose text quotes nothing of it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"baseline {path} cannot be read: {error.strerror}.", _ADVICE) from error
    try:
        return Baseline.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        if where == "version":
            problem = "is of another version than this program reads"
        elif where == "format" or not where:
            problem = "is not a baseline"
        else:
            problem = f"is damaged at {where}"
        raise ConfigError(f"baseline {path} {problem}.", _ADVICE) from None
