"""The pipeline's records on a server: points without vectors in a collection of their own.

A pipeline is one point, a dead letter is one point. Ids are UUIDv5 of what they stand for, so
writing again replaces. The collection is created by the first write; reading never creates
anything.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Final

from qdrant_client import grpc as q
from qdrant_client.conversions.conversion import grpc_to_payload, payload_to_grpc

from cdc_sync.mapping.plan import PayloadIndex, PayloadIndexType
from cdc_sync.mapping.protobuf import delimited
from cdc_sync.qdrant import messages
from cdc_sync.qdrant.collections import Collections
from cdc_sync.qdrant.reads import PointReads
from cdc_sync.qdrant.records import (
    Record,
    dead_letter,
    dead_letter_record,
    ledger_record,
    mark_record,
    pipeline_record,
    pipeline_state,
    rebuild_record,
    rebuild_state,
    source_mark,
    table_ledger,
    table_verification,
    verification_record,
)
from cdc_sync.qdrant.rpc import (
    DELETE,
    GET,
    UPSERT,
    Rpc,
    RpcError,
    not_completed,
    sink_error,
)
from cdc_sync.qdrant.sink import (
    DeadLetter,
    PipelineState,
    RebuildState,
    SourceMark,
    TableLedger,
    TableVerification,
)

COLLECTION: Final = "_cdc_sync"
_TARGET: Final = f"collection {COLLECTION}"
_PAGE: Final = 500
_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_URL, "cdc_sync records")


def record_id(*parts: str) -> bytes:
    """The serialized point id of a record named by these parts."""
    name = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return bytes(q.PointId(uuid=str(uuid.uuid5(_NAMESPACE, name))).SerializeToString())


class ServerStateStore:
    """A :class:`~cdc_sync.qdrant.sink.StateStore` in collection ``_cdc_sync``."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._collections = Collections(rpc)
        self._reads = PointReads(rpc, COLLECTION)
        self._page = _PAGE

    async def load(self, pipeline: str) -> PipelineState | None:
        """The pipeline's record, or None."""
        record = await self._get(record_id(pipeline))
        if record is None:
            return None
        return pipeline_state(record, f"The record of pipeline {pipeline} in {_TARGET}")

    async def save(self, state: PipelineState) -> None:
        """Write the pipeline's record."""
        await self._write([(record_id(state.pipeline), pipeline_record(state))])

    async def forget(self, pipeline: str) -> None:
        """Remove the pipeline's record, its mark, its ledgers, its dead letters and what is known
        of its verification."""
        letters = [
            record_id(pipeline, letter.table, letter.key)
            for letter in await self.dead_letters(pipeline)
        ]
        ledgers = [_ledger_id(pipeline, one.table) for one in await self.ledgers(pipeline)]
        verified = [
            _verification_id(pipeline, one.table) for one in await self.verifications(pipeline)
        ]
        # The pipeline's own record goes last: it is what says that there may be more to remove.
        await self._remove([*letters, *ledgers, *verified, _mark_id(pipeline), record_id(pipeline)])

    async def mark(self, pipeline: str) -> SourceMark | None:
        """The last mark kept, or None."""
        record = await self._get(_mark_id(pipeline))
        if record is None:
            return None
        return source_mark(record, f"The mark of pipeline {pipeline} in {_TARGET}")

    async def save_mark(self, mark: SourceMark) -> None:
        """Keep a mark."""
        await self._write([(_mark_id(mark.pipeline), mark_record(mark))])

    async def _get(self, id_: bytes) -> Record | None:
        request = messages.get(COLLECTION, [id_], with_payload=True)
        try:
            answer = await self._rpc.call(GET, request)
        except RpcError as failure:
            if failure.collection_missing:
                return None
            raise sink_error(failure, _TARGET) from failure
        return grpc_to_payload(answer.result[0].payload) if answer.result else None

    async def ledgers(self, pipeline: str) -> list[TableLedger]:
        """The ledgers of copies under way, by table."""
        records = await self._scroll(pipeline, "ledger")
        found = [table_ledger(record, f"A ledger in {_TARGET}") for record in records]
        return sorted(found, key=lambda ledger: ledger.table)

    async def save_ledger(self, ledger: TableLedger) -> None:
        """Keep a ledger."""
        await self._write([(_ledger_id(ledger.pipeline, ledger.table), ledger_record(ledger))])

    async def drop_ledger(self, pipeline: str, table: str) -> None:
        """Remove a table's ledger."""
        await self._remove([_ledger_id(pipeline, table)])

    async def verifications(self, pipeline: str) -> list[TableVerification]:
        """How far the continuous verification is, by table."""
        records = await self._scroll(pipeline, "verification")
        found = [table_verification(record, f"A verification in {_TARGET}") for record in records]
        return sorted(found, key=lambda one: one.table)

    async def save_verification(self, verification: TableVerification) -> None:
        """Keep how far it is."""
        id_ = _verification_id(verification.pipeline, verification.table)
        await self._write([(id_, verification_record(verification))])

    async def rebuilds(self, pipeline: str) -> list[RebuildState]:
        """The rebuilds under way of the pipeline's tables, by table."""
        records = await self._scroll(pipeline, "rebuild")
        found = [rebuild_state(record, f"A rebuild in {_TARGET}") for record in records]
        return sorted(found, key=lambda one: one.table)

    async def rebuild(self, pipeline: str, table: str) -> RebuildState | None:
        """The rebuild under way of a table, or None."""
        record = await self._get(_rebuild_id(pipeline, table))
        return None if record is None else rebuild_state(record, f"A rebuild in {_TARGET}")

    async def save_rebuild(self, rebuild: RebuildState) -> None:
        """Keep the record of a rebuild; it replaces the table's earlier one."""
        id_ = _rebuild_id(rebuild.pipeline, rebuild.table)
        await self._write([(id_, rebuild_record(rebuild))])

    async def drop_rebuild(self, pipeline: str, table: str) -> None:
        """Remove the record of a table's rebuild, present or not."""
        await self._remove([_rebuild_id(pipeline, table)])

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters."""
        # The last of equal ones counts, as if they were written one by one.
        points = {
            record_id(letter.pipeline, letter.table, letter.key): dead_letter_record(letter)
            for letter in letters
        }
        await self._write(list(points.items()))

    async def dead_letters(self, pipeline: str) -> list[DeadLetter]:
        """All dead letters of the pipeline, by table and key."""
        records = await self._scroll(pipeline, "dead_letter")
        found = [dead_letter(record, f"A dead letter in {_TARGET}") for record in records]
        return sorted(found, key=lambda letter: (letter.table, letter.key))

    async def _scroll(self, pipeline: str, kind: str) -> list[Record]:
        found: list[Record] = []
        request = q.ScrollPoints(
            collection_name=COLLECTION,
            filter=q.Filter(must=[_equals("pipeline", pipeline), _equals("kind", kind)]),
            with_payload=q.WithPayloadSelector(enable=True),
        )
        while True:
            request.limit = _PAGE
            try:
                answer = await self._reads.scroll(request, patient=True)
            except RpcError as failure:
                if failure.collection_missing:
                    return []
                raise sink_error(failure, _TARGET) from failure
            found += [grpc_to_payload(point.payload) for point in answer.result]
            if not answer.HasField("next_page_offset"):
                return found
            request.offset.CopyFrom(answer.next_page_offset)

    async def release(self, pipeline: str, letters: Sequence[tuple[str, str]]) -> None:
        """Remove dead letters by (table, key)."""
        await self._remove([record_id(pipeline, table, key) for table, key in letters])

    async def _write(self, records: Sequence[tuple[bytes, Record]]) -> None:
        start, created = 0, False
        while start < len(records):
            points = [_point(id_, record) for id_, record in records[start : start + self._page]]
            try:
                answer = await self._rpc.call(UPSERT, messages.upsert(COLLECTION, points))
            except RpcError as failure:
                if failure.collection_missing and not created:
                    await self._create()
                    created = True
                elif len(points) > 1 and (
                    failure.oversized or failure.over_capacity or failure.batch_limit is not None
                ):
                    half = len(points) // 2
                    self._page = max(1, min(half, failure.batch_limit or half))
                else:
                    raise sink_error(failure, _TARGET) from failure
                continue
            if answer.result.status != q.UpdateStatus.Completed:
                raise not_completed(answer.result.status, UPSERT, _TARGET)
            start += len(points)

    async def _create(self) -> None:
        request = q.CreateCollection(collection_name=COLLECTION)
        request.vectors_config.params_map.SetInParent()
        await self._collections.create(request)
        for name in ("pipeline", "kind"):
            await self._collections.create_index(
                COLLECTION, PayloadIndex(name, PayloadIndexType.KEYWORD)
            )

    async def _remove(self, ids: Sequence[bytes]) -> None:
        for start in range(0, len(ids), _PAGE):
            request = messages.delete(COLLECTION, ids[start : start + _PAGE])
            try:
                answer = await self._rpc.call(DELETE, request)
            except RpcError as failure:
                if failure.collection_missing:
                    return
                raise sink_error(failure, _TARGET) from failure
            if answer.result.status != q.UpdateStatus.Completed:
                raise not_completed(answer.result.status, DELETE, _TARGET)


def _mark_id(pipeline: str) -> bytes:
    return record_id(pipeline, "mark")


def _ledger_id(pipeline: str, table: str) -> bytes:
    # No dead letter has a name of this shape: theirs are three parts.
    return record_id(pipeline, "ledger", table, "")


def _verification_id(pipeline: str, table: str) -> bytes:
    return record_id(pipeline, "verification", table, "")


def _rebuild_id(pipeline: str, table: str) -> bytes:
    return record_id(pipeline, "rebuild", table, "")


def _point(id_: bytes, record: Record) -> bytes:
    """A serialized PointStruct without vectors."""
    entries = payload_to_grpc(record)
    point = q.PointStruct(payload=entries, vectors=q.Vectors(vectors=q.NamedVectors()))
    return delimited(1, id_) + bytes(point.SerializeToString())


def _equals(name: str, value: str) -> q.Condition:
    return q.Condition(field=q.FieldCondition(key=name, match=q.Match(keyword=value)))
