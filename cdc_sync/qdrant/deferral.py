"""Building the HNSW index after a load instead of during it.

While a collection is deferred, its dense vectors have ``m = 0`` (and ``payload_m = 0`` where that
is used), which builds no graph. What they had, or are to have, is kept in the collection's own
metadata, so whoever ends the load can restore it, in whatever process, and a collection that was
not deferred by us is never touched. The settings of the collection as a whole, among which are the
server's defaults, stay as they are.

    metadata: {"cdc_sync": {"deferred_hnsw": {"<vector>": {"m": 32}, "<another>": {"m": null}}}}

null stands for the value of the collection as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from qdrant_client import grpc as q
from qdrant_client import models
from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc

from cdc_sync.errors import ConfigError
from cdc_sync.qdrant.collection_config import METADATA_KEY, dense_params

#: The oldest server that keeps metadata of collections.
OLDEST_SERVER: Final = (1, 16)
_KEY: Final = "deferred_hnsw"
#: What builds graphs, with Qdrant's default: the graph over all points, and those of payload
#: indexes.
_DEFAULTS: Final = {"m": 16, "payload_m": 0}

#: By vector name: the value of each deferred setting, None for that of the whole collection.
Deferred = dict[str, dict[str, int | None]]


def unsupported(version: str) -> ConfigError:
    """The error for a server that cannot remember what was deferred."""
    return ConfigError(
        f"migration.defer_hnsw needs Qdrant 1.16 or later; this server has version {version}",
        "Leave migration.defer_hnsw out, or upgrade Qdrant.",
    )


def defer(
    vectors: Mapping[str, models.VectorParams],
    whole: models.HnswConfigDiff | models.HnswConfig | None,
) -> Deferred:
    """What to take from these dense vectors so that no graph is built; empty if none would be."""
    deferred: Deferred = {}
    for name, params in vectors.items():
        taken: dict[str, int | None] = {}
        for setting, default in _DEFAULTS.items():
            own = getattr(params.hnsw_config, setting, None)
            inherited = getattr(whole, setting, None)
            effective = next((v for v in (own, inherited) if v is not None), default)
            if effective:
                taken[setting] = own
        if taken:
            deferred[name] = taken
    return deferred


def defer_settings(config: q.CollectionConfig) -> Deferred:
    """What to take from the dense vectors of a collection that exists."""
    rest = GrpcToRest.convert_collection_config(config)
    vectors = rest.params.vectors
    by_name = {"": vectors} if isinstance(vectors, models.VectorParams) else dict(vectors or {})
    return defer(by_name, rest.hnsw_config)


def defer_creation(wanted: models.CreateCollection, request: q.CreateCollection) -> None:
    """Make the request for a collection create it deferred."""
    deferred = defer(dense_params(wanted), wanted.hnsw_config)
    if not deferred:
        return
    config = request.vectors_config
    for name, taken in deferred.items():
        params = (
            config.params
            if config.WhichOneof("config") == "params"
            else config.params_map.map[name]
        )
        for setting in taken:
            setattr(params.hnsw_config, setting, 0)
    request.MergeFrom(q.CreateCollection(metadata=_record(deferred)))


def _record(deferred: Deferred | None) -> dict[str, q.Value]:
    record = None if not deferred else {_KEY: deferred}
    converted: dict[str, q.Value] = RestToGrpc.convert_payload({METADATA_KEY: record})
    return converted


def deferred_of(config: q.CollectionConfig) -> Deferred:
    """What was deferred of a collection; empty if nothing was."""
    # The conversion reads maps of messages, not single ones.
    metadata = GrpcToRest.convert_payload(config.metadata) if len(config.metadata) else {}
    record = metadata.get(METADATA_KEY)
    found = record.get(_KEY) if isinstance(record, dict) else None
    if not isinstance(found, dict):
        return {}
    return {
        name: {
            setting: value if isinstance(value, int) else None
            for setting, value in taken.items()
            if setting in _DEFAULTS
        }
        for name, taken in found.items()
        if isinstance(taken, dict)
    }


def remember_request(collection: str, deferred: Deferred | None) -> q.UpdateCollection:
    """The request that records what is deferred; None ends the record."""
    return q.UpdateCollection(collection_name=collection, metadata=_record(deferred))


def hnsw_request(
    collection: str, config: q.CollectionConfig, values: Deferred
) -> q.UpdateCollection | None:
    """The request that gives vectors these HNSW settings, None meaning the whole collection's.

    None if no vector of the collection is concerned.
    """
    request = q.UpdateCollection(collection_name=collection)
    vectors = config.params.vectors_config
    unnamed = vectors.WhichOneof("config") == "params"
    whole = {field.name: value for field, value in config.hnsw_config.ListFields()}
    concerned = False
    for name, settings in values.items():
        if name not in ({""} if unnamed else set(vectors.params_map.map)):
            continue
        concerned = True
        diff = request.vectors_config
        params = diff.params if unnamed else diff.params_map.map[name]
        for setting, value in settings.items():
            inherited = whole.get(setting, _DEFAULTS[setting])
            setattr(params.hnsw_config, setting, inherited if value is None else value)
    return request if concerned else None


def zeroed(deferred: Deferred) -> Deferred:
    """The values of deferred settings while they are deferred."""
    return {name: dict.fromkeys(taken, 0) for name, taken in deferred.items()}
