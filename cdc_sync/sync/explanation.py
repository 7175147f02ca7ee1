"""What ``plan`` says: facts about the pipeline and its tables, for people and as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from cdc_sync.sync.findings import Finding


@dataclass(frozen=True, slots=True)
class VectorExplained:
    """A vector: what it is and where that was found. ``settings`` are those that a new collection
    gives it, by Qdrant's REST names.
    """

    name: str
    column: str
    kind: str
    dimension: int | None
    dimension_from: str | None
    metric: str
    metric_from: str
    datatype: str
    settings: dict[str, object]


@dataclass(frozen=True, slots=True)
class ColumnExplained:
    """A column, its type, and what becomes of it."""

    name: str
    type: str
    becomes: str


@dataclass(frozen=True, slots=True)
class PartitionExplained:
    """A relation that holds rows: bytes on disk without indexes, and chunks it is cut into."""

    name: str
    bytes: int
    chunks: int


@dataclass(slots=True)
class TableExplained:
    """A table. ``rows`` is the planner's estimate, ``rows_from`` says how good it is; ``bytes`` are
    on disk, without indexes; ``vector_bytes`` what the vectors of so many rows take in Qdrant.
    """

    table: str
    collection: str
    key: list[str]
    key_from: str
    ids: str
    columns: list[ColumnExplained]
    vectors: list[VectorExplained]
    payload_indexes: list[dict[str, str]]
    collection_config: dict[str, object]
    partitions: list[PartitionExplained]
    rows: int | None
    rows_from: str
    bytes: int
    vector_bytes: int | None
    chunks: int
    row_filter: str | None
    warnings: list[str]
    notes: list[str]
    #: Known only where Qdrant answers.
    collection_exists: bool | None = None
    points: int | None = None
    action: str = "is decided by what Qdrant holds"


@dataclass(slots=True)
class Explained:
    """What a run would do. Sections of what could not be read are empty; ``findings`` say why."""

    server: dict[str, object] = field(default_factory=dict)
    publication: dict[str, object] = field(default_factory=dict)
    slot: dict[str, object] = field(default_factory=dict)
    wal: dict[str, object] = field(default_factory=dict)
    qdrant: dict[str, object] = field(default_factory=dict)
    copy: dict[str, object] = field(default_factory=dict)
    tables: list[TableExplained] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def as_json(explained: Explained) -> dict[str, object]:
    """The explanation as JSON has it; error kinds by name."""
    content = dataclasses.asdict(explained)
    for entry, finding in zip(content["findings"], explained.findings, strict=True):
        entry["kind"] = finding.kind.value if finding.kind is not None else None
    return content
