"""What the vector indexes of a table say about a column: metric, HNSW parameters, dimension, and
what they suggest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cdc_sync.mapping.index_expressions import (
    IndexedVector,
    IndexUse,
    indexed_vector,
)
from cdc_sync.mapping.plan import Metric, VectorPlan
from cdc_sync.mapping.table import Index, IndexColumn, Table
from cdc_sync.mapping.vectors import vector_base

_METRICS: Final = {
    "cosine_ops": Metric.COSINE,
    "l2_ops": Metric.EUCLID,
    "ip_ops": Metric.DOT,
    "l1_ops": Metric.MANHATTAN,
    "hamming_ops": Metric.MANHATTAN,
}
_METHODS: Final = frozenset({"hnsw", "ivfflat", "scann"})
#: Operator classes of AlloyDB's ScaNN, which are called by the distance alone.
_SCANN: Final = {"cosine": Metric.COSINE, "l2": Metric.EUCLID, "dot_product": Metric.DOT}
#: Methods of Postgres itself, whose indexes of a vector compare it as a value.
_PLAIN_METHODS: Final = frozenset({"btree", "hash", "gin", "gist", "spgist", "brin"})
#: Operator classes of vectors are called after their type and what they compare by, in other
#: extensions too that index pgvector's types.
_OPCLASS_TYPES: Final = frozenset({"vector", "halfvec", "sparsevec", "bit"})
_DISTANCES: Final = frozenset({*_METRICS, "jaccard_ops"})
#: pgvector's own defaults of hnsw (src/hnsw.h).
_DEFAULT_M: Final = 16
_DEFAULT_EF_CONSTRUCTION: Final = 64
_DEFAULT_LISTS: Final = 100


@dataclass(frozen=True, slots=True)
class VectorIndex:
    """A valid index of a vector column. ``metric`` is None for a distance that Qdrant has not, and
    where it is not that of the column's own vectors (signs, parts of them).
    """

    index: Index
    vector: IndexedVector
    metric: Metric | None

    @property
    def name(self) -> str:
        """The index's name."""
        return self.index.name

    @property
    def of_values(self) -> bool:
        """Whether it compares the column's own vectors, in whatever precision."""
        return self.vector.use in (IndexUse.WHOLE, IndexUse.HALF)

    @property
    def opclass(self) -> str:
        """Operator class, without schema."""
        return _opclass(self.index.columns[0])


@dataclass(frozen=True, slots=True)
class VectorIndexes:
    """What the valid indexes of a vector column say, in the table's order; ``invalid`` names those
    that are not finished.
    """

    found: tuple[VectorIndex, ...]
    invalid: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, Metric]:
        """Metric by index name."""
        return {one.name: one.metric for one in self.found if one.metric is not None}

    @property
    def unsupported(self) -> tuple[str, ...]:
        """Names of indexes of an operator class that no metric of Qdrant matches."""
        return tuple(one.name for one in self.found if one.of_values and one.metric is None)

    @property
    def dimensions(self) -> dict[str, int]:
        """Dimension by index name, of those that give one to a column without."""
        return {
            one.name: one.vector.dimension for one in self.found if one.vector.dimension is not None
        }

    @property
    def hnsw_m(self) -> int | None:
        """The largest ``m`` of the HNSW indexes, None for pgvector's default."""
        return self._largest("m", _DEFAULT_M)

    @property
    def hnsw_ef_construct(self) -> int | None:
        """The largest ``ef_construction`` of the HNSW indexes, None for pgvector's default."""
        return self._largest("ef_construction", _DEFAULT_EF_CONSTRUCTION)

    def _largest(self, option: str, default: int) -> int | None:
        values = [
            _option(one.index, option, default)
            for one in self.found
            if one.index.method == "hnsw" and one.vector.use is not IndexUse.PART
        ]
        largest = max(values, default=default)
        return None if largest == default else largest


def vector_indexes(table: Table, column: str) -> VectorIndexes:
    """Collect what the vector indexes of a column say, partial ones, those of partitions and those
    on expressions included.
    """
    found: list[VectorIndex] = []
    invalid: list[str] = []
    for index in table.indexes:
        if not _is_vector_index(index):
            continue
        part = index.columns[0]
        vector = _indexed(part)
        if vector is None or vector.column != column:
            continue
        if index.valid:
            found.append(VectorIndex(index, vector, _metric(part, vector)))
        else:
            invalid.append(index.name)
    return VectorIndexes(tuple(found), tuple(invalid))


def _opclass(part: IndexColumn) -> str:
    return part.opclass.rpartition(".")[2].strip('"')


def _is_vector_index(index: Index) -> bool:
    if not index.columns:
        return False
    type_, _, distance = _opclass(index.columns[0]).partition("_")
    return index.method in _METHODS or (type_ in _OPCLASS_TYPES and distance in _DISTANCES)


def _indexed(part: IndexColumn) -> IndexedVector | None:
    if part.column is not None:
        return IndexedVector(part.column)
    return indexed_vector(part.expression or "")


def _metric(part: IndexColumn, vector: IndexedVector) -> Metric | None:
    if vector.use not in (IndexUse.WHOLE, IndexUse.HALF):
        return None
    opclass = _opclass(part)
    metric = _SCANN.get(opclass, _METRICS.get(opclass.partition("_")[2]))
    # Unit vectors are ranked alike by angle, dot product and distance; only Cosine makes them so.
    normalized = vector.normalized and metric in (Metric.DOT, Metric.EUCLID)
    return Metric.COSINE if normalized else metric


def _option(index: Index, name: str, default: int) -> int:
    value = index.options.get(name, "")
    return int(value) if value.isdecimal() else default


# -- what the operator is told of them


def index_notes(table: Table, vectors: Sequence[tuple[str, VectorPlan]]) -> tuple[str, ...]:
    """Return sentences about the vector indexes of columns: what is taken from them, what they
    suggest, and what has no counterpart. Nothing of it is done unless it is configured.
    """
    notes: list[str] = []
    for column, plan in vectors:
        facts = vector_indexes(table, column)
        for one in facts.found:
            notes += _notes(table, column, plan, one)
        notes += [
            f"index {name} of column {column} is not valid (its creation has not ended, or has "
            "failed): it is not used"
            for name in facts.invalid
        ]
    notes += _unused(table, {column for column, _ in vectors})
    return tuple(f"{table.qualified_name}: {note}" for note in notes)


def _notes(table: Table, column: str, plan: VectorPlan, one: VectorIndex) -> Iterator[str]:
    name, index = one.name, one.index
    half = vector_base(next(c.type for c in table.columns if c.name == column)).name == "halfvec"
    if one.vector.use is IndexUse.HALF and not half and plan.datatype.value != "float16":
        yield (
            f"index {name} holds column {column} in half precision; to store it so in Qdrant, in "
            f"half the space: {_setting(plan, 'datatype', 'float16')}"
        )
    if one.vector.use is IndexUse.BINARY:
        yield (
            f"index {name} holds the signs of column {column} only, for a first pass; what Qdrant "
            "has for that is binary quantization, which compares the best again by the whole "
            f"vectors: {_setting(plan, 'quantization_config', '')}"
        )
    if one.vector.use is IndexUse.PART:
        yield (
            f"index {name} is on a part of column {column}; the whole vector is taken, and nothing "
            "from this index"
        )
    if one.vector.normalized and one.metric is Metric.COSINE and one.opclass[-10:] != "cosine_ops":
        yield f"index {name} normalizes column {column}: its metric is Cosine"
    if index.method == "ivfflat":
        yield (
            f"index {name} is IVFFlat (lists = {_option(index, 'lists', _DEFAULT_LISTS)}): its "
            "metric is taken. Qdrant builds an HNSW index instead, which finds more of the true "
            "neighbours than IVFFlat does with its usual few probes, so results may differ, for "
            "the better"
        )
    elif index.method != "hnsw":
        yield (
            f"index {name} is of the method {index.method}: its metric is taken; Qdrant builds an "
            "HNSW index with its own defaults"
        )
    if index.predicate is not None:
        yield (
            f"index {name} is partial; Qdrant's index covers every point, filters go by the payload"
        )
    if index.relation:
        yield f"index {name} is on the partition {index.relation} only, and taken for all"


def _setting(plan: VectorPlan, name: str, value: str) -> str:
    content = f'{name} = "{value}"' if value else f"{name} = {{ binary = {{}} }}"
    if not plan.name:
        return f"collection_config = {{ vectors = {{ {content} }} }}"
    key = plan.name if plan.name.isidentifier() and plan.name.isascii() else f'"{plan.name}"'
    return f"collection_config = {{ vectors = {{ {key} = {{ {content} }} }} }}"


def _unused(table: Table, vectors: set[str]) -> Iterator[str]:
    """What is indexed as a vector though it does not become one."""
    for index in table.indexes:
        if not _is_vector_index(index):
            yield from _unknown(index, vectors)
            continue
        vector = _indexed(index.columns[0])
        if vector is None:
            yield f"index {index.name} is on an expression that is not understood: it is not used"
        elif vector.column not in vectors:
            yield (
                f"index {index.name} is on column {vector.column}, which does not become a vector: "
                "it is not used"
            )


def _unknown(index: Index, vectors: set[str]) -> Iterator[str]:
    """An index of a method that nobody here knows, whose operator class says no metric."""
    if index.method in _PLAIN_METHODS or not index.columns:
        return
    part = index.columns[0]
    if part.column in vectors:
        yield (
            f"index {index.name} of column {part.column} is of the method {index.method} with the "
            f"operator class {_opclass(part)}, which is not known here: no metric is taken from "
            "it; say which one it is with `metrics`"
        )
