"""Partial writes to a server: rows of which some columns are UNCHANGED, whose stored values stay.

Every point takes up to three operations (its payload, its vectors, vectors that became NULL). With
``wait=true`` each would cost the server an msync of its own, so they go as one UpdateBatch with
``wait=false`` and a **barrier** after it: SetPayload of nothing, with ``wait=true``, on all ids of
the batch. Read in the server's source (1.18.3):

- one worker a shard applies operations strictly in WAL order, and the batch is in every shard's WAL
  when it is answered, so the barrier, which goes to exactly the shards that hold the ids, runs
  after it; ``wait=true`` msyncs the WAL before
  (``collection/src/update_workers/update_worker.rs``);
- merging an empty payload changes nothing, and points are looked up all the same: a missing one is
  NOT_FOUND (``shard/src/update.rs``, ``set_payload`` and ``check_unprocessed_points``); there is no
  validation of emptiness;
- a storage error during the batch leaves the segment in its failed state, in which every later
  operation on it fails with INTERNAL, the barrier too (``segment/src/segment/segment_ops.rs``,
  ``handle_point_version_and_failure``);
- strict mode, rate limits, permissions and conversions are checked before the WAL and answered to
  the batch itself.

What ``wait=false`` can still hide is a vector whose name, kind or dimension the collection does not
have. The encoder checks dimensions against the plan and the collection was checked against the plan
when the table was opened, so this takes a collection that somebody replaces by a different one
while we write; whole-point upserts report that.

A storage error while a point is read out of an indexed segment (to be moved) may also stay hidden,
if it has passed when the barrier reads the same point. Such an operation is not lost: the server
keeps it in its WAL as failed and applies it again, from there on in order
(``collection_updater.rs``, ``handle_update_result``; ``optimization_worker.rs``, ``try_recover``).

Batches of one or two operations are simply sent with ``wait=true``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from qdrant_client import grpc as q

from cdc_sync.errors import ErrorKind, MappingError, SinkError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.stored_doubles import may_be_written_back
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.qdrant import messages
from cdc_sync.qdrant.large_rows import LargeRows, is_large
from cdc_sync.qdrant.reads import PointReads
from cdc_sync.qdrant.rpc import (
    SET_PAYLOAD,
    UPDATE_BATCH,
    Rpc,
    RpcError,
    not_completed,
    sink_error,
)
from cdc_sync.rows import PointId, Row

#: How often a batch is applied again to the points that are left once some turned out to be
#: missing.
_ROUNDS: Final = 5
_NOTHING: Final[Mapping[str, bytes]] = {}
#: After so many rows whoever reads from Postgres gets a turn.
_SLICE: Final = 64


@dataclass(slots=True)
class Partial:
    """A partial row, encoded: entries of its whole payload, Vectors to write, names of vectors to
    remove. Not frozen, which would cost more than all else here; nobody changes one.
    """

    id: PointId
    id_bytes: bytes
    payload: bytes
    vectors: bytes | None
    nulls: tuple[str, ...]
    size: int

    def __len__(self) -> int:
        """Bytes in a request, about."""
        return self.size


def operations(batch: Sequence[Partial]) -> list[bytes]:
    """The batch as serialized PointsUpdateOperations. Their order is free: no two write the same
    part of a point.
    """
    found = [messages.overwrite_payload(one.id_bytes, one.payload) for one in batch]
    vectors = [(one.id_bytes, one.vectors) for one in batch if one.vectors is not None]
    if vectors:
        found.append(messages.update_vectors(vectors))
    by_names: dict[tuple[str, ...], list[bytes]] = {}
    for one in batch:
        if one.nulls:
            by_names.setdefault(one.nulls, []).append(one.id_bytes)
    found += [messages.delete_vectors(ids, names) for names, ids in by_names.items()]
    return found


def _encode(codec: WireCodec, id_: PointId, row: Row, kept: Mapping[str, bytes]) -> Partial:
    id_bytes = codec.point_id(id_)
    payload, vectors, nulls = codec.partial(row, kept)
    size = len(payload) + 2 * len(id_bytes) + (0 if vectors is None else len(vectors))
    return Partial(id_, id_bytes, payload, vectors, nulls, size)


def _may_be_written_back(value: q.Value) -> bool:
    kind = value.WhichOneof("kind")
    if kind == "double_value":
        return may_be_written_back(value.double_value)
    if kind == "list_value":
        return all(map(_may_be_written_back, value.list_value.values))
    if kind == "struct_value":
        return all(map(_may_be_written_back, value.struct_value.fields.values()))
    return True


class PartialWriter:
    """Encodes and writes partial rows of one table."""

    def __init__(
        self, rpc: Rpc, reads: PointReads, plan: TablePlan, codec: WireCodec, large: LargeRows
    ) -> None:
        self._rpc = rpc
        self._large = large
        self._reads = reads
        self._plan = plan
        self._codec = codec
        self._target = f"collection {plan.collection}"

    async def encode(
        self, rows: Sequence[tuple[PointId, Row]], lane: int, *, large: bool = False
    ) -> tuple[list[Partial], list[PointId], list[tuple[PointId, str]]]:
        """Encode rows, filling UNCHANGED payload fields from the stored payload. ``large``: some
        row may be.

        Returns the partials, the ids that are missing in Qdrant (or lack a field they would have to
        keep, or cannot keep it as it is), and refusals of the mapping.
        """
        gaps: dict[PointId, list[str]] = {}
        for id_, row in rows:
            if unknown := self._codec.unknown_fields(row):
                gaps[id_] = unknown
        stored = await self._stored(gaps, lane) if gaps else {}
        encoded: list[Partial] = []
        missing: list[PointId] = []
        refused: list[tuple[PointId, str]] = []
        for id_, row in rows:
            kept: Mapping[str, bytes] = _NOTHING
            if self._codec.has_unknown_object(row):
                missing.append(id_)
                continue
            if gaps and id_ in gaps:
                fields, there = gaps[id_], stored.get(id_, _NOTHING)
                if any(field not in there for field in fields):
                    missing.append(id_)
                    continue
                kept = {field: there[field] for field in fields}
            try:
                if large and is_large(row):
                    encode = partial(_encode, id_=id_, row=row, kept=kept)
                    encoded.append(await self._large.encode(row, encode))
                else:
                    encoded.append(_encode(self._codec, id_, row, kept))
                    if not len(encoded) % _SLICE:
                        await asyncio.sleep(0)
            except MappingError as exc:
                refused.append((id_, exc.message))
        return encoded, missing, refused

    async def write(self, batch: Sequence[Partial], lane: int) -> list[PointId]:
        """Write a batch and return the ids that are missing. Raises :class:`RpcError` and
        :class:`SinkError`.
        """
        missing: list[PointId] = []
        left: Sequence[Partial] = batch
        for _ in range(_ROUNDS):
            if not left:
                return missing
            try:
                await self._write_once(left, lane)
            except RpcError as failure:
                if not failure.point_missing:
                    raise
            else:
                return missing
            # Operations of several points stop at the missing one, so what is present is written
            # again.
            present = await self._present(left, lane)
            missing += [one.id for one in left if one.id not in present]
            left = [one for one in left if one.id in present]
        raise SinkError(
            ErrorKind.SINK_UNKNOWN,
            f"Points of {self._target} keep disappearing while they are updated; "
            "another program deletes them.",
            "Let cdc_sync alone write to the collection.",
        )

    async def _write_once(self, batch: Sequence[Partial], lane: int) -> None:
        todo = operations(batch)
        wait = len(todo) <= 2
        request = messages.update_batch(self._plan.collection, todo, wait=wait)
        answer = await self._rpc.call(UPDATE_BATCH, request, lane)
        if wait:
            for result in answer.result:
                if result.status != q.UpdateStatus.Completed:
                    raise not_completed(result.status, UPDATE_BATCH, self._target)
            return
        barrier = messages.touch(self._plan.collection, [one.id_bytes for one in batch])
        done = await self._rpc.call(SET_PAYLOAD, barrier, lane)
        if done.result.status != q.UpdateStatus.Completed:
            raise not_completed(done.result.status, SET_PAYLOAD, self._target)

    async def _present(self, batch: Sequence[Partial], lane: int) -> Collection[PointId]:
        points = await self._get([one.id_bytes for one in batch], lane, with_payload=False)
        return {messages.point_id_value(point.id) for point in points}

    async def _stored(
        self, gaps: Mapping[PointId, Sequence[str]], lane: int
    ) -> dict[PointId, Mapping[str, bytes]]:
        """The fields of these names, by id, from the payload or the object in it that holds what
        columns became. Every value still a serialized Value, so that it goes back exactly as it
        came; those that must not go back are left out.
        """
        wanted = [self._codec.point_id(id_) for id_ in gaps]
        points = await self._get(wanted, lane, with_payload=True)
        found: dict[PointId, Mapping[str, bytes]] = {}
        for point in points:
            fields = point.payload
            if self._plan.payload_key is not None:
                # Indexing a map of messages would make the entry.
                nested = fields.get(self._plan.payload_key)
                fields = {} if nested is None else nested.struct_value.fields
            id_ = messages.point_id_value(point.id)
            found[id_] = {
                name: fields[name].SerializeToString()
                for name in gaps.get(id_, ())
                if name in fields and _may_be_written_back(fields[name])
            }
        return found

    async def _get(
        self, ids: Sequence[bytes], lane: int, *, with_payload: bool
    ) -> Sequence[q.RetrievedPoint]:
        try:
            return await self._reads.get(ids, lane, with_payload=with_payload)
        except RpcError as failure:
            raise sink_error(failure, self._target) from failure
