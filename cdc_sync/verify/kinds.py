"""What can be wrong, by name, and what is likely behind it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


class Kind(enum.Enum):
    """Kinds of differences; the values are stable names for ``--json``."""

    COLLECTION = "collection_missing"
    DIMENSION = "dimension"
    METRIC = "metric"
    DATATYPE = "datatype"
    VECTOR_CONFIG = "vector_config"
    COUNT = "count"
    PARTITION = "partition_missing"
    MISSING = "missing"
    EXTRA = "extra"
    DUPLICATE = "duplicate_id"
    UNMAPPABLE = "unmappable"
    FIELD_MISSING = "field_missing"
    FIELD_UNEXPECTED = "field_unexpected"
    NULL_ABSENT = "null_absent"
    FIELD_TYPE = "field_type"
    VALUE = "value"
    VECTOR = "vector"
    VECTOR_MISSING = "vector_missing"
    VECTOR_UNEXPECTED = "vector_unexpected"
    VECTORS_SWAPPED = "vectors_swapped"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a kind means: a title, the likely cause where nothing more is known, what to do, and
    whether reading rows again mends it."""

    title: str
    cause: str
    remedy: str
    repairable: bool = True


_READ_AGAIN: Final = "cdc-sync verify --repair reads the rows again"
_PAYLOAD: Final = "another program wrote these points, or an older mapping did"
_NEW_COLLECTION: Final = "make the collection anew: a collection's vectors cannot be changed"

MEANINGS: Final[Mapping[Kind, Meaning]] = {
    Kind.COLLECTION: Meaning(
        "collection missing",
        "it was dropped, or never made",
        "a running pipeline makes it again and copies the table",
        repairable=False,
    ),
    Kind.DIMENSION: Meaning(
        "dimension", "the collection was made for other vectors", _NEW_COLLECTION, repairable=False
    ),
    Kind.METRIC: Meaning(
        "metric",
        "the collection was made with another distance, so results are ranked wrongly",
        _NEW_COLLECTION,
        repairable=False,
    ),
    Kind.DATATYPE: Meaning(
        "datatype",
        "the collection stores components in another precision",
        _NEW_COLLECTION,
        repairable=False,
    ),
    Kind.VECTOR_CONFIG: Meaning(
        "vectors of the collection",
        "the collection was made for other columns",
        _NEW_COLLECTION,
        repairable=False,
    ),
    Kind.COUNT: Meaning(
        "count",
        "fewer points than rows: a part was not copied, or points were removed; more: points that "
        "others wrote, or rows deleted while nothing followed them",
        "look at the missing and extra points",
        repairable=False,
    ),
    Kind.PARTITION: Meaning(
        "partition missing", "the partition was not copied, or its points were removed", _READ_AGAIN
    ),
    Kind.MISSING: Meaning(
        "missing point", "a failed part of a migration, or the point was removed", _READ_AGAIN
    ),
    Kind.EXTRA: Meaning(
        "extra point",
        "the row was deleted while nothing followed the table, or another program wrote it, such "
        "as a retried insert under a new id",
        "cdc-sync verify --repair removes it",
    ),
    Kind.DUPLICATE: Meaning(
        "duplicate id",
        "the key columns are not unique, so rows share a point",
        "name key columns that are unique",
        repairable=False,
    ),
    Kind.UNMAPPABLE: Meaning(
        "row without a point",
        "no point can be made of the row",
        "cdc-sync dlq list; correct the row",
        repairable=False,
    ),
    Kind.FIELD_MISSING: Meaning("payload field missing", _PAYLOAD, _READ_AGAIN),
    Kind.FIELD_UNEXPECTED: Meaning("payload field unexpected", _PAYLOAD, _READ_AGAIN),
    Kind.NULL_ABSENT: Meaning(
        "null turned absent", "NULLs were lost on export, as many tools do", _READ_AGAIN
    ),
    Kind.FIELD_TYPE: Meaning("field type changed", _PAYLOAD, _READ_AGAIN),
    Kind.VALUE: Meaning(
        "value differs", "an update that did not arrive, or another program wrote it", _READ_AGAIN
    ),
    Kind.VECTOR: Meaning(
        "vector differs", "an update that did not arrive, or another program wrote it", _READ_AGAIN
    ),
    Kind.VECTOR_MISSING: Meaning("vector missing", "the point was written without it", _READ_AGAIN),
    Kind.VECTOR_UNEXPECTED: Meaning(
        "vector unexpected", "the column is NULL now, or another program wrote it", _READ_AGAIN
    ),
    Kind.VECTORS_SWAPPED: Meaning(
        "vectors swapped",
        "ids and vectors were paired wrongly, as when results of an embedding batch are mixed up",
        _READ_AGAIN,
    ),
}


@dataclass(frozen=True, slots=True)
class Deviation:
    """One thing that is wrong with one point.

    ``field`` is a payload path or a vector's name ("" for the unnamed one or the point itself);
    ``text`` says in which way, without any value of the row; ``cause`` is what it looks like, if
    that is known better than the kind tells.
    """

    kind: Kind
    field: str = ""
    text: str = ""
    cause: str | None = None
