"""What ``check`` wants to know of a collection on a server beyond whether it fits: its health, its
index, its limits, its replicas. Read-only, and without looking at points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import grpc
from qdrant_client import grpc as q

from cdc_sync.qdrant.collections import Collections
from cdc_sync.qdrant.deferral import deferred_of
from cdc_sync.qdrant.rpc import Method, Rpc, RpcError, sink_error

_CLUSTER_INFO: Final = Method(
    "/qdrant.Collections/CollectionClusterInfo", q.CollectionClusterInfoResponse
)
#: Answers that mean: it does not tell, or not us.
_NOT_TOLD: Final = frozenset(
    {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.NOT_FOUND}
)


@dataclass(frozen=True, slots=True)
class StrictLimits:
    """Limits of strict mode that a pipeline can run into; None: not limited. Rates are a minute and
    a replica of a shard."""

    upsert_points: int | None
    points: int | None
    vector_bytes: int | None
    writes_a_minute: int | None
    exact_counts: bool


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica of a shard: on which peer, and its state by Qdrant's name."""

    shard: int
    peer: int
    state: str


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """Where a collection lies: replicas of its shards, and transfers of shards under way."""

    replicas: tuple[Replica, ...]
    transfers: int

    @property
    def peers(self) -> int:
        """How many peers have a part of it."""
        return len({replica.peer for replica in self.replicas})


@dataclass(frozen=True, slots=True)
class CollectionFacts:
    """A collection as it is.

    ``status`` is green, yellow, grey or red; ``problem`` what the optimizer says. ``points`` and
    ``indexed_vectors`` are about right. ``indexing_threshold`` is in kilobytes, None where the
    server's default holds. ``without_graph`` are dense vectors that no HNSW graph is built for, and
    that were not deferred by us. ``in_memory`` are the dense vectors kept in memory. ``cluster`` is
    None where the server does not tell.
    """

    status: str
    problem: str
    points: int
    indexed_vectors: int
    indexing_threshold: int | None
    without_graph: tuple[str, ...]
    in_memory: tuple[str, ...]
    replication_factor: int
    limits: StrictLimits | None
    cluster: ClusterFacts | None


async def examine(rpc: Rpc, name: str) -> CollectionFacts | None:
    """Look at a collection (or alias); None when there is none. Raises
    :class:`~cdc_sync.errors.SinkError`."""
    info = await Collections(rpc).info(name)
    if info is None:
        return None
    return collection_facts(info, await _cluster(rpc, name))


async def _cluster(rpc: Rpc, name: str) -> ClusterFacts | None:
    request = q.CollectionClusterInfoRequest(collection_name=name)
    try:
        answer = await rpc.call(_CLUSTER_INFO, request.SerializeToString())
    except RpcError as failure:
        if failure.code in _NOT_TOLD:
            return None
        raise sink_error(failure, f"collection {name}") from failure
    return cluster_facts(answer)


def cluster_facts(answer: q.CollectionClusterInfoResponse) -> ClusterFacts:
    """The replicas that an answer names."""
    local = [
        Replica(shard.shard_id, answer.peer_id, _state(shard.state))
        for shard in answer.local_shards
    ]
    remote = [
        Replica(shard.shard_id, shard.peer_id, _state(shard.state))
        for shard in answer.remote_shards
    ]
    return ClusterFacts((*local, *remote), len(answer.shard_transfers))


def _state(number: int) -> str:
    try:
        return str(q.ReplicaState.Name(number))
    except ValueError:
        # Of a newer server.
        return f"state {number}"


def collection_facts(info: q.CollectionInfo, cluster: ClusterFacts | None) -> CollectionFacts:
    """What a description of a collection says."""
    config = info.config
    optimizers = config.optimizer_config
    threshold = optimizers.indexing_threshold if optimizers.HasField("indexing_threshold") else None
    whole = config.params
    return CollectionFacts(
        status=q.CollectionStatus.Name(info.status).lower(),
        problem=info.optimizer_status.error,
        points=info.points_count,
        indexed_vectors=info.indexed_vectors_count,
        indexing_threshold=threshold,
        without_graph=tuple(_without_graph(config)),
        in_memory=tuple(name for name, params in _dense(config).items() if not _is_on_disk(params)),
        replication_factor=whole.replication_factor if whole.HasField("replication_factor") else 1,
        limits=_limits(config),
        cluster=cluster,
    )


def _dense(config: q.CollectionConfig) -> Mapping[str, q.VectorParams]:
    vectors = config.params.vectors_config
    if vectors.WhichOneof("config") == "params":
        return {"": vectors.params}
    return dict(vectors.params_map.map)


def _is_on_disk(params: q.VectorParams) -> bool:
    tier = q.Memory.Name(params.memory) if params.HasField("memory") else ""
    return bool(params.on_disk) or tier in ("Cold", "Cached")


def _without_graph(config: q.CollectionConfig) -> Iterator[str]:
    deferred = deferred_of(config)
    for name, params in _dense(config).items():
        own = params.HasField("hnsw_config") and params.hnsw_config.HasField("m")
        m = params.hnsw_config.m if own else config.hnsw_config.m
        if (own or config.hnsw_config.HasField("m")) and m == 0 and name not in deferred:
            yield name


def _limits(config: q.CollectionConfig) -> StrictLimits | None:
    strict = config.strict_mode_config
    if not config.HasField("strict_mode_config") or not strict.enabled:
        return None

    def limit(name: str) -> int | None:
        return int(getattr(strict, name)) if strict.HasField(name) else None  # type: ignore[arg-type]

    return StrictLimits(
        upsert_points=limit("upsert_max_batchsize"),
        points=limit("max_points_count"),
        vector_bytes=limit("max_collection_vector_size_bytes"),
        writes_a_minute=limit("write_rate_limit"),
        exact_counts=not strict.HasField("search_allow_exact") or strict.search_allow_exact,
    )
