"""What the configuration says about a table, as the mapping takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cdc_sync.mapping.migration_ids import NATIVE_IDS
from cdc_sync.mapping.plan import Constant, Part, PayloadIndexType


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the configuration says about a table. ``metrics`` are by column: cosine, euclid, dot,
    manhattan. ``drop_nulls``, ``numeric_as_string`` and ``skip_bytea`` are for all columns or for
    those named. ``ids`` is "native", or the value of an :class:`IdScheme` of the migration tool.
    ``where`` and ``shard`` say which rows are kept; the mapping does not use them.

    ``parts`` are the columns that make an object, or are hidden; ``other_columns`` is what payload
    columns of which nothing is said are to it. ``text_uuids``: texts that spell a uuid become that
    point id. ``indexes`` are on payload fields. ``only``: of the published rows, those are kept
    whose column has this value, in binary format.
    """

    key: Sequence[str] | None = None
    columns: Sequence[str] | None = None
    collection: str | None = None
    metrics: Mapping[str, str] = field(default_factory=dict)
    dimensions: Mapping[str, int] = field(default_factory=dict)
    unnamed_vector: str | None = None
    bit_vectors: Sequence[str] = ()
    namespace: str | None = None
    drop_nulls: bool | tuple[str, ...] = False
    numeric_as_string: bool | tuple[str, ...] = False
    skip_bytea: bool | tuple[str, ...] = False
    exclude: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    payload_key: str | None = None
    where: str | None = None
    shard: str | None = None
    ids: str = NATIVE_IDS
    # What a preset adds; see mapping/presets.py.
    parts: Mapping[str, Part] = field(default_factory=dict)
    other_columns: Part | None = None
    object_field: str | None = None
    text_uuids: bool = False
    indexes: Mapping[str, PayloadIndexType] = field(default_factory=dict)
    only: tuple[str, bytes] | None = None
    # Left out of what options are told apart by: an existing collection keeps its settings.
    collection_config: Mapping[str, object] = field(default_factory=dict, repr=False)
