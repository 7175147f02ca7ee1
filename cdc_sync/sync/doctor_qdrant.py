"""What ``check`` says of Qdrant and of each collection. Pure: from the facts to findings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.mapping.plan import Datatype, TablePlan, VectorKind
from cdc_sync.qdrant.deferral import OLDEST_SERVER as OLDEST_DEFERRING
from cdc_sync.qdrant.deferral import unsupported as cannot_defer
from cdc_sync.qdrant.examination import CollectionFacts, StrictLimits
from cdc_sync.sync.findings import Finding
from cdc_sync.sync.known_findings import failed, finding
from cdc_sync.sync.progress import size_text

#: The newest minor version whose behaviour is known.
_NEWEST: Final = (1, 19)
#: Before it a write that did not finish in time is not told apart from one that did.
_TIMEOUTS_SINCE: Final = (1, 17)
#: Before it points that were deleted by a filter can come back after a crash (qdrant issue 9575).
_FILTERS_SINCE: Final = (1, 19)
_FILTER_FAULT_SINCE: Final = (1, 16)

#: Vectors kept in memory are worth a word from so many bytes.
_LARGE_BYTES: Final = 4 << 30
#: Of a point in memory beside its vectors, as a factor; Qdrant's own rule of thumb is 1.5.
_MEMORY_FACTOR: Final = 1.5
#: Indexing by Qdrant begins at its threshold; more unindexed points than this need a reason.
_UNINDEXED_POINTS: Final = 100_000
_COMPONENT_BYTES: Final = {Datatype.FLOAT16: 2, Datatype.UINT8: 1}
_ACTIVE: Final = "Active"


def release(version: str) -> tuple[int, int] | None:
    """Major and minor number of a version; None of a build that has none."""
    parts = version.lstrip("v").split("-")[0].split(".")
    try:
        return int(parts[0]), int(parts[1])
    except (ValueError, IndexError):
        return None


def server_findings(settings: Settings, version: str, marked: bool) -> Iterator[Finding]:
    """What a server of this version lacks. ``marked``: some table shares its collection, so its
    points are removed by a filter where it is truncated."""
    found = release(version)
    if found is None:
        return
    if settings.migration.defer_hnsw and found < OLDEST_DEFERRING:
        yield failed("qdrant-version", "qdrant version", cannot_defer(version))
    if found > _NEWEST:
        yield finding(
            "qdrant-version",
            "advice",
            "qdrant version",
            f"Qdrant {version} is newer than what this version of cdc-sync knows (1.14 to "
            f"{_NEWEST[0]}.{_NEWEST[1]})",
            "Look for a newer cdc-sync; try this one on a copy of your data first.",
        )
    elif marked and _FILTER_FAULT_SINCE <= found < _FILTERS_SINCE:
        yield finding(
            "qdrant-version",
            "advice",
            "qdrant version",
            f"Qdrant {version}: points that TRUNCATE removed from a shared collection can come "
            "back after a crash of Qdrant (fixed in 1.19)",
            "Upgrade Qdrant to 1.19, or give each table a collection of its own.",
        )
    elif found < _TIMEOUTS_SINCE:
        yield finding(
            "qdrant-version",
            "advice",
            "qdrant version",
            f"Qdrant {version} works; since 1.17 it says whether a slow write was taken, so that "
            "less is sent twice",
            "Plan an upgrade of Qdrant.",
        )


def collection_findings(
    settings: Settings, plan: TablePlan, facts: CollectionFacts, rows: int | None
) -> Iterator[Finding]:
    """How a collection is. ``rows`` of its table, by an estimate; None: not known."""
    subject = f"collection {plan.collection}"
    yield from _status(subject, facts)
    yield from _index(subject, facts)
    yield from _memory(subject, plan, facts, rows)
    yield from _replicas(subject, facts)
    if facts.limits is not None:
        yield from _limits(settings, subject, plan, facts.limits, rows)


def _status(subject: str, facts: CollectionFacts) -> Iterator[Finding]:
    if facts.status == "red":
        yield finding(
            "collection-status",
            "warning",
            subject,
            "its status is red: Qdrant could not apply an operation, or optimise",
            "See Qdrant's log and its disk; a restart of Qdrant applies what is left.",
        )
    elif facts.status == "grey":
        yield finding(
            "collection-status",
            "advice",
            subject,
            "its status is grey: optimisations wait, and begin with the next write",
        )


def _index(subject: str, facts: CollectionFacts) -> Iterator[Finding]:
    if facts.indexing_threshold == 0:
        yield finding(
            "collection-index",
            "warning",
            subject,
            "indexing_threshold is 0: no HNSW graph is ever built, so every search reads all "
            "vectors",
            "Set optimizers_config.indexing_threshold of the collection to 10000 once it is "
            'filled: PATCH /collections/… {"optimizers_config": {"indexing_threshold": 10000}}',
        )
    elif facts.without_graph:
        names = ", ".join(name or "(unnamed)" for name in facts.without_graph)
        yield finding(
            "collection-index",
            "warning",
            subject,
            f"hnsw_config.m is 0 for vector {names}: no graph is built, so every search reads all "
            "vectors",
            "Set hnsw_config.m of the collection to 16 once it is filled: PATCH /collections/… "
            '{"hnsw_config": {"m": 16}}',
        )
    elif facts.points >= _UNINDEXED_POINTS and not facts.indexed_vectors:
        yield finding(
            "collection-index",
            "advice",
            subject,
            f"none of its {facts.points} points is in an index yet",
            "Wait for its status to become green; if it stays, see Qdrant's log.",
        )


def _memory(
    subject: str, plan: TablePlan, facts: CollectionFacts, rows: int | None
) -> Iterator[Finding]:
    point = sum(
        vector.size * _COMPONENT_BYTES.get(vector.datatype, 4)
        for vector in plan.vectors
        if vector.name in facts.in_memory
        and vector.kind is VectorKind.DENSE
        and vector.size is not None
    )
    needed = round(point * max(rows or 0, facts.points) * _MEMORY_FACTOR)
    if needed >= _LARGE_BYTES:
        yield finding(
            "collection-memory",
            "advice",
            subject,
            f"its vectors are kept in memory, which takes about {size_text(needed)}",
            "If the nodes have less: on_disk = true for the vectors, or quantization; for a "
            "collection that is still to be made in collection_config of the table.",
        )


def _replicas(subject: str, facts: CollectionFacts) -> Iterator[Finding]:
    cluster = facts.cluster
    if cluster is None:
        return
    ill = [replica for replica in cluster.replicas if replica.state != _ACTIVE]
    if ill:
        listed = ", ".join(f"shard {r.shard} on peer {r.peer}: {r.state}" for r in ill[:5])
        more = f", and {len(ill) - 5} more" if len(ill) > 5 else ""
        yield finding(
            "collection-replicas",
            "warning",
            subject,
            f"not all replicas are active ({listed}{more}): writes may be refused or not be on all "
            "of them",
            "See GET /cluster and GET /collections/…/cluster; bring the nodes back, or wait for "
            "the transfers to end.",
        )
    elif cluster.transfers:
        yield finding(
            "collection-replicas",
            "advice",
            subject,
            f"{cluster.transfers} transfers of shards are under way; writes are slower meanwhile",
        )
    if cluster.peers > 1 and facts.replication_factor < 2:
        yield finding(
            "collection-replicas",
            "advice",
            subject,
            f"it lies on {cluster.peers} peers with replication_factor 1: while one is away, "
            "writes to its shards wait",
            "For a collection that is still to be made: collection_config = "
            "{ replication_factor = 2 }.",
        )


def _limits(
    settings: Settings, subject: str, plan: TablePlan, limits: StrictLimits, rows: int | None
) -> Iterator[Finding]:
    """Limits of strict mode that the pipeline will run into."""
    yield from _request_limits(settings.qdrant.request_points, subject, limits, rows)
    yield from _sizes(subject, plan, limits, rows)
    if not limits.exact_counts:
        yield finding(
            "strict-mode",
            "advice",
            subject,
            "search_allow_exact is false: counts are made by reading all ids, which takes long",
            "Allow exact counts, if summaries and verify take too long.",
        )


def _strict(subject: str, message: str, remedy: str) -> Finding:
    return finding("strict-mode", "warning", subject, message, remedy)


def _request_limits(
    request: int, subject: str, limits: StrictLimits, rows: int | None
) -> Iterator[Finding]:
    batch, rate = limits.upsert_points, limits.writes_a_minute
    if batch is not None and batch < request:
        yield _strict(
            subject,
            f"upsert_max_batchsize is {batch}, a request has up to {request} points: larger ones "
            "are refused and sent again in parts",
            f"Set qdrant.request_points = {batch}."
            if batch
            else "Raise upsert_max_batchsize: with 0 nothing can be written.",
        )
    if rate is None:
        return
    if rate < request:
        yield _strict(
            subject,
            f"write_rate_limit is {rate} points a minute, a request has up to {request}: larger "
            "ones never pass, and are sent again in parts",
            f"Raise write_rate_limit, or set qdrant.request_points = {max(1, rate)}.",
        )
    hours = (rows or 0) / max(1, rate) / 60
    if hours >= 1:
        yield _strict(
            subject,
            f"write_rate_limit is {rate} points a minute a shard: the copy of about {rows} rows "
            f"into one shard takes {hours:.0f} hours",
            "Raise write_rate_limit, at least for the copy.",
        )


def _sizes(
    subject: str, plan: TablePlan, limits: StrictLimits, rows: int | None
) -> Iterator[Finding]:
    if rows is None:
        return
    if limits.points is not None and limits.points < rows:
        yield _strict(
            subject,
            f"max_points_count is {limits.points}, the table has about {rows} rows: the copy will "
            "stall",
            "Raise max_points_count of the collection's strict mode.",
        )
    needed = rows * sum(vector.size for vector in plan.vectors if vector.size is not None) * 4
    if limits.vector_bytes is not None and limits.vector_bytes < needed:
        yield _strict(
            subject,
            f"max_collection_vector_size_bytes is {size_text(limits.vector_bytes)}, the vectors "
            f"of the table take about {size_text(needed)}: the copy will stall",
            "Raise max_collection_vector_size_bytes of the collection's strict mode.",
        )


def disk_finding(path: str, free: int, needed: int | None) -> Finding:
    """Room on the disk of an embedded database. ``needed``: bytes of the tables, about."""
    if needed is not None and free < needed:
        return finding(
            "edge-disk",
            "warning",
            "edge disk",
            f"{path} has {size_text(free)} left, the tables will take about {size_text(needed)}",
            "Name a directory on a larger disk in qdrant.url.",
        )
    return finding("edge-disk", "ok", "edge disk", f"{size_text(free)} left on the disk of {path}")
