"""What a new collection is like: the plan's vectors, and the settings of ``collection_config``.

Settings go by the names of Qdrant's REST API (``PUT /collections/<name>``); vectors by theirs in
the collection. The plan decides what vectors there are, their size and distance; the rest can be
set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from pydantic import BaseModel
from qdrant_client import grpc as q
from qdrant_client import models
from qdrant_client.conversions.conversion import RestToGrpc

from cdc_sync.mapping.plan import Datatype, Metric, TablePlan, VectorKind, VectorPlan
from cdc_sync.qdrant.rest_settings import Refusals, mapping, validated

#: The key of our own records in a collection's metadata.
METADATA_KEY: Final = "cdc_sync"

_DISTANCES: Final = {
    Metric.COSINE: models.Distance.COSINE,
    Metric.EUCLID: models.Distance.EUCLID,
    Metric.DOT: models.Distance.DOT,
    Metric.MANHATTAN: models.Distance.MANHATTAN,
}
#: Decided by the plan, each with the setting of the table that changes it.
_OF_THE_PLAN: Final = {
    "size": "The dimension comes from the column's type, or from `dimensions`.",
    "distance": "Set the column's metric with `metrics`.",
    "multivector_config": "An array of vectors becomes a multivector, compared by max_sim.",
}


def refusals_of(plan: TablePlan) -> Refusals:
    """What makes the errors about the plan's ``collection_config``."""
    return Refusals(plan.qualified_name)


def wanted_collection(plan: TablePlan) -> models.CreateCollection:
    """The collection that the plan and its ``collection_config`` ask for, without metadata of our
    own. Raises ConfigError naming the setting that Qdrant does not know, that has the wrong type,
    or that contradicts the plan.
    """
    refusals = refusals_of(plan)
    given = mapping(refusals, "", plan.collection_config)
    vectors = _dense(refusals, plan, given.pop("vectors", {}))
    sparse = _sparse(refusals, plan, given.pop("sparse_vectors", {}))
    metadata = _metadata(refusals, given.pop("metadata", {}))
    wanted = validated(refusals, models.CreateCollection, "", given)
    _check_usable(refusals, wanted, metadata)
    unnamed = vectors.get("") if len(vectors) == 1 else None
    return wanted.model_copy(
        update={
            "vectors": vectors if unnamed is None else unnamed,
            "sparse_vectors": sparse or None,
            "metadata": metadata or None,
        }
    )


def _metadata(refusals: Refusals, value: object) -> dict[str, object]:
    given = mapping(refusals, "metadata", value)
    try:
        # Dates of TOML become text.
        return dict(json.loads(json.dumps(given, default=str, allow_nan=False)))
    except ValueError as error:
        raise refusals.error(
            "metadata", "has a number that is not finite", "JSON has finite numbers only."
        ) from error


def _dense(refusals: Refusals, plan: TablePlan, value: object) -> dict[str, models.VectorParams]:
    planned = {v.name: v for v in plan.vectors if v.kind is not VectorKind.SPARSE}
    given = mapping(refusals, "vectors", value)
    if list(planned) == [""] and given and "" not in given:
        # As in the REST API, the parameters of the only vector, which has no name.
        given = {"": given}
    _check_names(refusals, "vectors", given, planned)
    return {
        name: _vector(refusals, vector, _path(name), mapping(refusals, _path(name), given[name]))
        if name in given
        else _vector(refusals, vector, _path(name), {})
        for name, vector in planned.items()
    }


def _path(name: str) -> str:
    return f"vectors.{name}" if name else "vectors"


def _vector(
    refusals: Refusals, vector: VectorPlan, path: str, given: Mapping[str, object]
) -> models.VectorParams:
    params = _planned_params(vector)
    for name, remedy in _OF_THE_PLAN.items():
        if name in given and given[name] != params.get(name):
            raise refusals.error(f"{path}.{name}", "contradicts the table", remedy)
    hnsw = {
        **_planned_hnsw(vector),
        **mapping(refusals, f"{path}.hnsw_config", given.get("hnsw_config", {})),
    }
    settings = {**params, **given}
    if hnsw:
        settings["hnsw_config"] = hnsw
    return validated(refusals, models.VectorParams, path, settings)


def _planned_params(vector: VectorPlan) -> dict[str, object]:
    params: dict[str, object] = {
        "size": vector.size,
        "distance": _DISTANCES[vector.metric].value,
    }
    if vector.datatype is not Datatype.FLOAT32:
        params["datatype"] = vector.datatype.value
    if vector.kind is VectorKind.MULTI:
        params["multivector_config"] = {"comparator": "max_sim"}
    return params


def _planned_hnsw(vector: VectorPlan) -> dict[str, object]:
    found = {"m": vector.hnsw_m, "ef_construct": vector.hnsw_ef_construct}
    return {name: value for name, value in found.items() if value is not None}


def _sparse(
    refusals: Refusals, plan: TablePlan, value: object
) -> dict[str, models.SparseVectorParams]:
    planned = {v.name: v for v in plan.vectors if v.kind is VectorKind.SPARSE}
    given = mapping(refusals, "sparse_vectors", value)
    _check_names(refusals, "sparse_vectors", given, planned)
    return {
        name: validated(
            refusals, models.SparseVectorParams, f"sparse_vectors.{name}", given.get(name, {})
        )
        for name in planned
    }


def _check_names(
    refusals: Refusals, path: str, given: Mapping[str, object], planned: Mapping[str, VectorPlan]
) -> None:
    for name in given:
        if name not in planned:
            names = ", ".join(one or "(unnamed)" for one in planned) or "none"
            kind = "sparse" if path == "sparse_vectors" else "dense"
            raise refusals.error(
                f"{path}.{name}",
                f"is not a {kind} vector of the table's collection",
                f"Its {kind} vectors are: {names}.",
            )


def _check_usable(
    refusals: Refusals, wanted: models.CreateCollection, metadata: Mapping[str, object]
) -> None:
    """Refuse what Qdrant takes but this program cannot work with."""
    if wanted.sharding_method is models.ShardingMethod.CUSTOM:
        raise refusals.error(
            "sharding_method",
            "is custom, and no shard keys are written",
            "Leave it out: points are spread over the shards by their ids.",
        )
    optimizers = wanted.optimizers_config
    if optimizers is not None and optimizers.prevent_unoptimized:
        raise refusals.error(
            "optimizers_config.prevent_unoptimized",
            "makes every write wait until its points are indexed",
            "Leave it out. To load first and index afterwards, set migration.defer_hnsw.",
        )
    if METADATA_KEY in metadata:
        raise refusals.error(
            f"metadata.{METADATA_KEY}",
            "is where this program keeps its own records",
            "Take another name.",
        )


def create_request(plan: TablePlan) -> q.CreateCollection:
    """The request that creates the plan's collection. Raises ConfigError as
    :func:`wanted_collection`.
    """
    wanted = wanted_collection(plan)
    request = q.CreateCollection(collection_name=plan.collection)
    try:
        _fill(request, wanted)
    except (ValueError, TypeError, OverflowError) as error:
        # What is left are integers in `metadata` that no payload can have.
        raise refusals_of(plan).error(
            "", "has a number that is too large for Qdrant", "Give a smaller one."
        ) from error
    return request


def _fill(request: q.CreateCollection, wanted: models.CreateCollection) -> None:
    vectors = wanted.vectors
    request.vectors_config.CopyFrom(
        RestToGrpc.convert_vectors_config({} if vectors is None else vectors)
    )
    if wanted.sparse_vectors:
        sparse = RestToGrpc.convert_sparse_vector_config(wanted.sparse_vectors)
        request.sparse_vectors_config.CopyFrom(sparse)
    request.MergeFrom(
        q.CreateCollection(
            shard_number=wanted.shard_number,
            replication_factor=wanted.replication_factor,
            write_consistency_factor=wanted.write_consistency_factor,
            on_disk_payload=wanted.on_disk_payload,
            metadata=RestToGrpc.convert_payload(wanted.metadata) if wanted.metadata else None,
        )
    )
    if wanted.sharding_method is models.ShardingMethod.AUTO:
        request.sharding_method = q.ShardingMethod.Auto
    _fill_parts(request, wanted)


def _fill_parts(request: q.CreateCollection, wanted: models.CreateCollection) -> None:
    if (hnsw := wanted.hnsw_config) is not None:
        request.hnsw_config.CopyFrom(RestToGrpc.convert_hnsw_config_diff(hnsw))
    if (wal := wanted.wal_config) is not None:
        request.wal_config.CopyFrom(RestToGrpc.convert_wal_config_diff(wal))
    if (optimizers := wanted.optimizers_config) is not None:
        converted = RestToGrpc.convert_optimizers_config_diff(optimizers)
        request.optimizers_config.CopyFrom(converted)
    if (quantization := wanted.quantization_config) is not None:
        request.quantization_config.CopyFrom(RestToGrpc.convert_quantization_config(quantization))
    if (strict := wanted.strict_mode_config) is not None:
        request.strict_mode_config.CopyFrom(RestToGrpc.convert_strict_mode_config(strict))
    if (payload := wanted.payload) is not None:
        request.payload.CopyFrom(RestToGrpc.convert_payload_storage_params(payload))
    if (tracker := wanted.id_tracker) is not None:
        request.id_tracker.CopyFrom(RestToGrpc.convert_id_tracker_params(tracker))


def dense_params(wanted: models.CreateCollection) -> dict[str, models.VectorParams]:
    """The dense vectors by name, "" for the unnamed one."""
    vectors = wanted.vectors
    if isinstance(vectors, models.VectorParams):
        return {"": vectors}
    return dict(vectors or {})


def plain(part: BaseModel) -> dict[str, object]:
    """The settings that are given, as in JSON."""
    return part.model_dump(mode="json", exclude_none=True)


def check_config(plan: TablePlan) -> None:
    """Raise ConfigError unless the plan's ``collection_config`` can be used."""
    create_request(plan)


def vector_settings(plan: TablePlan, vector: VectorPlan) -> dict[str, object]:
    """The settings a new collection gives a vector beyond size, distance and datatype, by Qdrant's
    REST names. Raises ConfigError as :func:`wanted_collection`.
    """
    wanted = wanted_collection(plan)
    dense, sparse = dense_params(wanted), wanted.sparse_vectors or {}
    params = sparse[vector.name] if vector.kind is VectorKind.SPARSE else dense[vector.name]
    known = {"size", "distance", "datatype", "multivector_config"}
    return {name: value for name, value in plain(params).items() if name not in known}
