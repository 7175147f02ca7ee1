"""What a new collection of the embedded database is like.

The settings of ``collection_config`` are those of a server; what belongs to several nodes, to a
server's limits or to its background work has no counterpart here and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias, TypeVar

import qdrant_edge as edge
from qdrant_client import models

from cdc_sync.errors import ConfigError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant.collection_config import (
    dense_params,
    plain,
    refusals_of,
    wanted_collection,
)
from cdc_sync.qdrant.differences import by_name, sentences
from cdc_sync.qdrant.rest_settings import Refusals

#: Qdrant's defaults, for the parameters that are left open.
_DEFAULT_HNSW: Final = {"m": 16, "ef_construct": 100, "full_scan_threshold": 10_000}
#: Settings that a server has and this engine has not.
_SERVER_ONLY: Final = (
    "shard_number",
    "sharding_method",
    "replication_factor",
    "write_consistency_factor",
    "wal_config",
    "strict_mode_config",
    "metadata",
)
_OPTIMIZERS: Final = (
    "deleted_threshold",
    "vacuum_min_vector_number",
    "default_segment_number",
    "max_segment_size",
    "indexing_threshold",
    "prevent_unoptimized",
)

E = TypeVar("E")
Quantization: TypeAlias = (
    edge.ScalarQuantizationConfig
    | edge.ProductQuantizationConfig
    | edge.BinaryQuantizationConfig
    | edge.TurboQuantQuantizationConfig
)


def edge_config(plan: TablePlan) -> edge.EdgeConfig:
    """The configuration of the plan's shard.

    Raises ConfigError without vectors, which Edge cannot do, and for settings as
    :func:`cdc_sync.qdrant.collection_config.wanted_collection` does, or which Edge has not.
    """
    if not plan.vectors:
        raise ConfigError(
            f"Table {plan.qualified_name} has no vector column, and an embedded database takes no "
            "collection without vectors.",
            "Leave the table out, or use a Qdrant server.",
        )
    refusals = refusals_of(plan)
    wanted = wanted_collection(plan)
    for name in _SERVER_ONLY:
        if getattr(wanted, name) is not None:
            raise _not_here(refusals, name)
    return edge.EdgeConfig(
        vectors={
            name: _vector(refusals, f"vectors.{name}", params, wanted.hnsw_config)
            for name, params in dense_params(wanted).items()
        },
        sparse_vectors={
            name: _sparse(refusals, f"sparse_vectors.{name}", params)
            for name, params in (wanted.sparse_vectors or {}).items()
        },
        on_disk_payload=wanted.on_disk_payload,
        hnsw_config=_hnsw(refusals, "hnsw_config", wanted.hnsw_config, None),
        quantization_config=_quantization(
            refusals, "quantization_config", wanted.quantization_config
        ),
        optimizers=_optimizers(refusals, wanted.optimizers_config),
        payload_memory=_member(
            refusals, "payload.memory", edge.Memory, wanted.payload and wanted.payload.memory
        ),
        id_tracker_memory=_member(
            refusals,
            "id_tracker.memory",
            edge.Memory,
            wanted.id_tracker and wanted.id_tracker.memory,
        ),
        wal_enabled=True,
    )


def _not_here(refusals: Refusals, path: str) -> ConfigError:
    return refusals.error(
        path, "is not for an embedded database", "Leave it out, or use a Qdrant server."
    )


def _member(refusals: Refusals, path: str, kind: type[E], value: object) -> E | None:
    """The engine's member of an enumeration for a value of the REST API, whose names differ in
    capitals and underscores only.
    """
    if value is None:
        return None
    text = str(getattr(value, "value", value))
    for name in dir(kind):
        if name.replace("_", "").lower() == text.replace("_", "").lower():
            member = getattr(kind, name)
            assert isinstance(member, kind)
            return member
    raise _not_here(refusals, f"{path} = {text}")


def _known(refusals: Refusals, path: str, kind: type[E], value: object) -> E:
    member = _member(refusals, path, kind, value)
    assert member is not None
    return member


def _vector(
    refusals: Refusals,
    path: str,
    params: models.VectorParams,
    whole: models.HnswConfigDiff | None,
) -> edge.EdgeVectorParams:
    multi = None
    if params.multivector_config is not None:
        multi = edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
    return edge.EdgeVectorParams(
        params.size,
        _known(refusals, f"{path}.distance", edge.Distance, params.distance),
        on_disk=params.on_disk,
        multivector_config=multi,
        datatype=_member(refusals, f"{path}.datatype", edge.VectorStorageDatatype, params.datatype),
        quantization_config=_quantization(
            refusals, f"{path}.quantization_config", params.quantization_config
        ),
        hnsw_config=_hnsw(refusals, f"{path}.hnsw_config", params.hnsw_config, whole),
        memory=_member(refusals, f"{path}.memory", edge.Memory, params.memory),
    )


def _hnsw(
    refusals: Refusals,
    path: str,
    given: models.HnswConfigDiff | None,
    whole: models.HnswConfigDiff | None,
) -> edge.HnswIndexConfig | None:
    """HNSW settings in full, which is how the engine takes them: what a vector leaves open is that
    of the whole collection, else Qdrant's default.
    """
    if given is None:
        return None
    values = {**_DEFAULT_HNSW, **(plain(whole) if whole is not None else {}), **plain(given)}
    settings = models.HnswConfigDiff.model_validate(values)
    assert settings.m is not None
    assert settings.ef_construct is not None
    assert settings.full_scan_threshold is not None
    return edge.HnswIndexConfig(
        settings.m,
        settings.ef_construct,
        settings.full_scan_threshold,
        settings.max_indexing_threads or 0,
        on_disk=settings.on_disk,
        payload_m=settings.payload_m,
        inline_storage=settings.inline_storage,
        memory=_member(refusals, f"{path}.memory", edge.Memory, settings.memory),
    )


def _sparse(
    refusals: Refusals, path: str, params: models.SparseVectorParams
) -> edge.EdgeSparseVectorParams:
    modifier = edge.Modifier.Idf if params.modifier is models.Modifier.IDF else None
    index = params.index
    if index is None:
        return edge.EdgeSparseVectorParams(modifier=modifier)
    return edge.EdgeSparseVectorParams(
        full_scan_threshold=index.full_scan_threshold,
        on_disk=index.on_disk,
        modifier=modifier,
        datatype=_member(
            refusals, f"{path}.index.datatype", edge.VectorStorageDatatype, index.datatype
        ),
        memory=_member(refusals, f"{path}.index.memory", edge.Memory, index.memory),
    )


def _quantization(
    refusals: Refusals, path: str, given: models.QuantizationConfig | None
) -> Quantization | None:
    if isinstance(given, models.ScalarQuantization):
        scalar = given.scalar
        return edge.ScalarQuantizationConfig(
            _known(refusals, f"{path}.scalar.type", edge.ScalarType, scalar.type),
            quantile=scalar.quantile,
            always_ram=scalar.always_ram,
            memory=_member(refusals, f"{path}.scalar.memory", edge.Memory, scalar.memory),
        )
    if isinstance(given, models.ProductQuantization):
        product = given.product
        where = f"{path}.product"
        return edge.ProductQuantizationConfig(
            _known(refusals, f"{where}.compression", edge.CompressionRatio, product.compression),
            always_ram=product.always_ram,
            memory=_member(refusals, f"{where}.memory", edge.Memory, product.memory),
        )
    if isinstance(given, models.BinaryQuantization):
        return _binary(refusals, f"{path}.binary", given.binary)
    if isinstance(given, models.TurboQuantization):
        turbo = given.turbo
        return edge.TurboQuantQuantizationConfig(
            always_ram=turbo.always_ram,
            bits=_member(refusals, f"{path}.turbo.bits", edge.TurboQuantBitSize, turbo.bits),
            memory=_member(refusals, f"{path}.turbo.memory", edge.Memory, turbo.memory),
        )
    return None


def _binary(
    refusals: Refusals, path: str, given: models.BinaryQuantizationConfig
) -> edge.BinaryQuantizationConfig:
    return edge.BinaryQuantizationConfig(
        always_ram=given.always_ram,
        encoding=_member(
            refusals, f"{path}.encoding", edge.BinaryQuantizationEncoding, given.encoding
        ),
        query_encoding=_member(
            refusals,
            f"{path}.query_encoding",
            edge.BinaryQuantizationQueryEncoding,
            given.query_encoding,
        ),
        memory=_member(refusals, f"{path}.memory", edge.Memory, given.memory),
    )


def _optimizers(
    refusals: Refusals, given: models.OptimizersConfigDiff | None
) -> edge.EdgeOptimizersConfig | None:
    if given is None:
        return None
    for name in plain(given):
        if name not in _OPTIMIZERS:
            raise _not_here(refusals, f"optimizers_config.{name}")
    return edge.EdgeOptimizersConfig(
        deleted_threshold=given.deleted_threshold,
        vacuum_min_vector_number=given.vacuum_min_vector_number,
        default_segment_number=given.default_segment_number,
        max_segment_size=given.max_segment_size,
        indexing_threshold=given.indexing_threshold,
        prevent_unoptimized=given.prevent_unoptimized,
    )


def edge_differences(plan: TablePlan, config: Mapping[str, object]) -> tuple[str, ...]:
    """Sentences about settings that the plan asks for and a shard, by its ``edge_config.json``, has
    otherwise.
    """
    edge_config(plan)
    found = {
        **config,
        "optimizers_config": config.get("optimizers"),
        "payload": {"memory": config.get("payload_memory")},
        "id_tracker": {"memory": config.get("id_tracker_memory")},
        "hnsw_config": config.get("hnsw_config") or _DEFAULT_HNSW,
        "sparse_vectors": {
            name: {"index": params, "modifier": params.get("modifier")}
            for name, params in _objects(config.get("sparse_vectors")).items()
        },
    }
    return sentences(plan.collection, by_name(plain(wanted_collection(plan))), found)


def _objects(value: object) -> dict[str, dict[str, object]]:
    if not isinstance(value, Mapping):
        return {}
    return {name: one for name, one in value.items() if isinstance(one, dict)}
