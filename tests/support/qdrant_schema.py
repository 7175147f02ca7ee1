"""Collection configurations of the Qdrant test server: defaults, changes, and what the embedded
engine is told of them.
"""

from __future__ import annotations

import qdrant_edge as edge
from qdrant_client import grpc as q

from tests.support.qdrant_convert import PLACEHOLDER, json_value
from tests.support.qdrant_status import invalid, validation, wrong_input

_DISTANCES = {
    q.Cosine: edge.Distance.Cosine,
    q.Euclid: edge.Distance.Euclid,
    q.Dot: edge.Distance.Dot,
    q.Manhattan: edge.Distance.Manhattan,
}
_DATATYPES = {
    q.Float32: edge.VectorStorageDatatype.Float32,
    q.Float16: edge.VectorStorageDatatype.Float16,
    q.Uint8: edge.VectorStorageDatatype.Uint8,
}
_MAX_DIMENSION = 65536
_FORBIDDEN_IN_NAMES = '<>:"/\\|?*\0\x1f'


def check_collection_name(name: str) -> None:
    """Refuse what the server's field validation refuses: empty, over 255 characters, characters of
    paths.
    """
    if not 1 <= len(name) <= 255:
        raise validation(
            "collection_name", f'value "{name}" invalid, must be from 1 to 255 characters'
        )
    for character in _FORBIDDEN_IN_NAMES:
        if character in name:
            raise validation(
                "collection_name",
                f'value "{name}" invalid, collection name cannot contain "{character}" char',
            )


def _defaults() -> q.CollectionConfig:
    return q.CollectionConfig(
        params=q.CollectionParams(
            shard_number=1, on_disk_payload=True, replication_factor=1, write_consistency_factor=1
        ),
        hnsw_config=q.HnswConfigDiff(
            m=16, ef_construct=100, full_scan_threshold=10000, max_indexing_threads=0, on_disk=False
        ),
        optimizer_config=q.OptimizersConfigDiff(
            deleted_threshold=0.2,
            vacuum_min_vector_number=1000,
            default_segment_number=0,
            indexing_threshold=10000,
            flush_interval_sec=5,
        ),
        wal_config=q.WalConfigDiff(wal_capacity_mb=32, wal_segments_ahead=0, wal_retain_closed=1),
    )


def _check_vectors(config: q.CollectionConfig) -> None:
    for name, params in dense_vectors(config).items():
        where = f"vectors_config.params_map.map[{name}]" if name else "vectors_config.params"
        if not 1 <= params.size <= _MAX_DIMENSION:
            raise validation(
                f"{where}.size",
                f"value {params.size} invalid, must be from 1 to {_MAX_DIMENSION}",
            )
        if params.distance not in _DISTANCES:
            raise wrong_input(f"Unknown distance of vector '{name}'")
    both = dense_vectors(config).keys() & config.params.sparse_vectors_config.map.keys()
    if both:
        raise wrong_input(f"Dense and sparse vectors share the name {min(both)}")


def collection_config(request: q.CreateCollection) -> q.CollectionConfig:
    """The full configuration of a collection to be created, defaults filled in."""
    config = _defaults()
    params = config.params
    if request.HasField("vectors_config"):
        params.vectors_config.CopyFrom(request.vectors_config)
    else:
        params.vectors_config.params_map.SetInParent()
    if request.HasField("sparse_vectors_config"):
        params.sparse_vectors_config.CopyFrom(request.sparse_vectors_config)
    for name in ("shard_number", "on_disk_payload", "replication_factor"):
        if request.HasField(name):
            setattr(params, name, getattr(request, name))
    if request.HasField("write_consistency_factor"):
        params.write_consistency_factor = request.write_consistency_factor
    if request.HasField("sharding_method"):
        params.sharding_method = request.sharding_method
    if request.HasField("payload"):
        params.payload.CopyFrom(request.payload)
    config.hnsw_config.MergeFrom(request.hnsw_config)
    config.optimizer_config.MergeFrom(request.optimizers_config)
    config.wal_config.MergeFrom(request.wal_config)
    if request.HasField("quantization_config"):
        config.quantization_config.CopyFrom(request.quantization_config)
    if request.HasField("strict_mode_config"):
        config.strict_mode_config.CopyFrom(request.strict_mode_config)
    for key, value in request.metadata.items():
        config.metadata[key].CopyFrom(value)
    _check_vectors(config)
    return config


def update_config(config: q.CollectionConfig, request: q.UpdateCollection) -> q.CollectionConfig:
    """The configuration after an update: given settings replace, metadata is merged by top-level
    key, null removes.
    """
    changed = q.CollectionConfig()
    changed.CopyFrom(config)
    changed.hnsw_config.MergeFrom(request.hnsw_config)
    changed.optimizer_config.MergeFrom(request.optimizers_config)
    for field, value in request.params.ListFields():
        if field.name == "payload":
            changed.params.payload.MergeFrom(request.params.payload)
        else:
            setattr(changed.params, field.name, value)
    if request.HasField("strict_mode_config"):
        changed.strict_mode_config.MergeFrom(request.strict_mode_config)
    if request.HasField("quantization_config"):
        _update_quantization(changed, request.quantization_config)
    _update_vectors(changed, request)
    for key, value in request.metadata.items():
        if json_value(value) is None:
            changed.metadata.pop(key, None)
        else:
            changed.metadata[key].CopyFrom(value)
    return changed


def _update_quantization(config: q.CollectionConfig, diff: q.QuantizationConfigDiff) -> None:
    kind = diff.WhichOneof("quantization")
    if kind == "disabled":
        config.ClearField("quantization_config")
    elif kind is not None:
        getattr(config.quantization_config, kind).CopyFrom(getattr(diff, kind))


def _update_vectors(config: q.CollectionConfig, request: q.UpdateCollection) -> None:
    diff = request.vectors_config
    diffs = {"": diff.params} if diff.WhichOneof("config") == "params" else diff.params_map.map
    for name, change in diffs.items():
        present = dense_vectors(config)
        if name not in present:
            raise wrong_input(f"Not existing vector name error: {name}")
        present[name].hnsw_config.MergeFrom(change.hnsw_config)
        if change.HasField("on_disk"):
            present[name].on_disk = change.on_disk
        if change.HasField("memory"):
            present[name].memory = change.memory
    for name, sparse in request.sparse_vectors_config.map.items():
        if name not in config.params.sparse_vectors_config.map:
            raise wrong_input(f"Not existing vector name error: {name}")
        config.params.sparse_vectors_config.map[name].MergeFrom(sparse)


def dense_vectors(config: q.CollectionConfig) -> dict[str, q.VectorParams]:
    """Parameters by vector name ('': the unnamed one). The values are the configuration's own."""
    vectors = config.params.vectors_config
    kind = vectors.WhichOneof("config")
    if kind == "params":
        return {"": vectors.params}
    return {name: vectors.params_map.map[name] for name in vectors.params_map.map}


def _engine_dense(params: q.VectorParams) -> edge.EdgeVectorParams:
    multi = None
    if params.HasField("multivector_config"):
        multi = edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
    return edge.EdgeVectorParams(
        size=params.size,
        distance=_DISTANCES[params.distance],
        multivector_config=multi,
        datatype=_DATATYPES.get(params.datatype),
    )


def _engine_sparse(params: q.SparseVectorParams) -> edge.EdgeSparseVectorParams:
    idf = params.HasField("modifier") and params.modifier == q.Idf
    return edge.EdgeSparseVectorParams(
        modifier=edge.Modifier.Idf if idf else None,
        datatype=_DATATYPES.get(params.index.datatype),
    )


def engine_config(config: q.CollectionConfig) -> edge.EdgeConfig:
    """What the engine needs of it: vectors and HNSW. Placement (memory or disk) and quantization
    are left out.
    """
    dense = {name: _engine_dense(params) for name, params in dense_vectors(config).items()}
    sparse = {
        name: _engine_sparse(params)
        for name, params in config.params.sparse_vectors_config.map.items()
    }
    if not dense and not sparse:
        dense = {PLACEHOLDER: edge.EdgeVectorParams(size=1, distance=edge.Distance.Dot)}
    hnsw = config.hnsw_config
    return edge.EdgeConfig(
        vectors=dense or None,
        sparse_vectors=sparse or None,
        hnsw_config=edge.HnswIndexConfig(
            m=hnsw.m, ef_construct=hnsw.ef_construct, full_scan_threshold=hnsw.full_scan_threshold
        ),
        max_search_threads=1,
        wal_enabled=True,
    )


_INDEX_TYPES = {
    q.FieldTypeKeyword: (q.Keyword, edge.PayloadSchemaType.Keyword),
    q.FieldTypeInteger: (q.Integer, edge.PayloadSchemaType.Integer),
    q.FieldTypeFloat: (q.Float, edge.PayloadSchemaType.Float),
    q.FieldTypeGeo: (q.Geo, edge.PayloadSchemaType.Geo),
    q.FieldTypeText: (q.Text, edge.PayloadSchemaType.Text),
    q.FieldTypeBool: (q.Bool, edge.PayloadSchemaType.Bool),
    q.FieldTypeDatetime: (q.Datetime, edge.PayloadSchemaType.Datetime),
    q.FieldTypeUuid: (q.Uuid, edge.PayloadSchemaType.Uuid),
}
_INDEX_PARAMS = {
    "keyword_index_params": q.FieldTypeKeyword,
    "integer_index_params": q.FieldTypeInteger,
    "float_index_params": q.FieldTypeFloat,
    "geo_index_params": q.FieldTypeGeo,
    "text_index_params": q.FieldTypeText,
    "bool_index_params": q.FieldTypeBool,
    "datetime_index_params": q.FieldTypeDatetime,
    "uuid_index_params": q.FieldTypeUuid,
}


def payload_index(
    request: q.CreateFieldIndexCollection,
) -> tuple[q.PayloadSchemaInfo, edge.PayloadSchemaType | edge.IntegerIndexParams]:
    """The index as the server reports it and as the engine takes it."""
    if not request.field_name:
        raise validation("field_name", 'value "" invalid, must be at least 1 characters')
    info = q.PayloadSchemaInfo()
    if not request.HasField("field_type"):
        raise invalid("cannot convert field_type")
    kind = request.field_index_params.WhichOneof("index_params")
    if kind is not None:
        if _INDEX_PARAMS[kind] != request.field_type:
            raise invalid(f"field_type does not match {kind}")
        info.params.CopyFrom(request.field_index_params)
    info.data_type, schema = _INDEX_TYPES[request.field_type]
    if kind == "integer_index_params":
        params = request.field_index_params.integer_index_params
        if not params.lookup and not params.range:
            raise validation(
                "field_index_params", "the 'lookup' and 'range' capabilities can't be both disabled"
            )
        return info, edge.IntegerIndexParams(lookup=params.lookup, range=params.range)
    return info, schema
