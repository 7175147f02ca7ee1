"""Orphans: points that have no row. Found by comparing all ids of a collection with the ids of all
rows, part by part, so that memory is bounded.

The parts are hash buckets of the ids. A sweep of one bucket reads the key columns of the whole
table and the ids of the whole collection, and holds the bucket's ids in 8 or 16 bytes each.
"""

from __future__ import annotations

import asyncio
import functools
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cdc_sync.errors import MappingError
from cdc_sync.mapping.ids import compile_key_id
from cdc_sync.mapping.migration_ids import SharedIdError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.snapshot import copy_rows
from cdc_sync.qdrant.sink import TableWriter
from cdc_sync.rows import PointId, Row

#: Ids that a bucket should have at most, about.
BUCKET_IDS: Final = 1_000_000
_NUMBER_BYTES: Final = 8
_UUID_BYTES: Final = 16
#: How numpy sees ids as packed. Strings of bytes are compared as memory, NULs included.
_NUMBER: Final = "<u8"
_UUID: Final = "S16"
_BATCH_ROWS: Final = 8192
_SCROLL_PAGE: Final = 4096


def buckets_for(points: int) -> int:
    """Into how many buckets to divide this many ids."""
    return max(1, -(-points // BUCKET_IDS))


def bucket_of(id_: PointId, buckets: int) -> int:
    """The bucket of an id, from 0 to ``buckets`` - 1: the same on every machine, in every run."""
    return zlib.crc32(_packed(id_)) % buckets


def _packed(id_: PointId) -> bytes:
    if isinstance(id_, int):
        return id_.to_bytes(_NUMBER_BYTES, "little")
    return bytes.fromhex(id_.replace("-", ""))


class KnownIds:
    """The ids of one bucket that rows have: an exact set, 8 bytes a number and 16 a UUID."""

    def __init__(self, bucket: int, buckets: int) -> None:
        if not 0 <= bucket < buckets:
            raise ValueError(f"no bucket {bucket} of {buckets}")
        self._bucket = bucket
        self._buckets = buckets
        # Numbers and UUIDs never equal each other, so each kind has a store of its own.
        self._numbers = bytearray()
        self._uuids = bytearray()
        self._sorted = True

    def __len__(self) -> int:
        """Ids added; one added twice counts twice."""
        return len(self._numbers) // _NUMBER_BYTES + len(self._uuids) // _UUID_BYTES

    def add(self, id_: PointId) -> None:
        """Add an id, if it is of this bucket."""
        packed = _packed(id_)
        if self._buckets > 1 and zlib.crc32(packed) % self._buckets != self._bucket:
            return
        if isinstance(id_, int):
            self._numbers += packed
        else:
            self._uuids += packed
        self._sorted = False

    def missing_from(self, ids: Iterable[PointId]) -> list[PointId]:
        """Those of the ids that are of this bucket and were not added, in their order."""
        ours = list(ids)
        if self._buckets > 1:
            ours = [id_ for id_ in ours if bucket_of(id_, self._buckets) == self._bucket]
        numbers = [id_ for id_ in ours if isinstance(id_, int)]
        uuids = [id_ for id_ in ours if not isinstance(id_, int)]
        self._sort()
        known = _found(self._numbers, numbers, _NUMBER) | _found(self._uuids, uuids, _UUID)
        return [id_ for id_ in ours if id_ not in known]

    def repeated(self) -> list[PointId]:
        """The ids that were added more than once, each once."""
        self._sort()
        numbers = _repeated(np.frombuffer(self._numbers, _NUMBER))
        uuids = _repeated(np.frombuffer(self._uuids, _UUID))
        return [*numbers.tolist(), *(_uuid(uuids[i : i + 1].tobytes()) for i in range(len(uuids)))]

    def _sort(self) -> None:
        if not self._sorted:
            np.frombuffer(self._numbers, _NUMBER).sort()
            np.frombuffer(self._uuids, _UUID).sort()
            self._sorted = True


def _repeated(ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.unique(ids[1:][ids[1:] == ids[:-1]])


def _uuid(packed: bytes) -> PointId:
    return str(uuid.UUID(bytes=packed))


def _found(store: bytearray, ids: Sequence[PointId], dtype: str) -> set[PointId]:
    """Those of the ids that are in a sorted store."""
    known = np.frombuffer(store, dtype)
    if not len(known):
        return set()
    wanted = np.frombuffer(b"".join(map(_packed, ids)), dtype)
    places = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return {id_ for id_, is_there in zip(ids, known[places] == wanted, strict=True) if is_there}


async def sweep(
    connection: PgConnection,
    writer: TableWriter,
    plan: TablePlan,
    queries: Sequence[tuple[str, Sequence[bool]]],
    bucket: int,
    buckets: int,
) -> list[PointId]:
    """Return the ids of one bucket that the collection has and the table has not.

    ``connection`` has imported the snapshot; ``queries`` are of
    :func:`~cdc_sync.postgres.snapshot.key_query`, one a leaf. Nothing else may write to the
    collection meanwhile. Raises :class:`SourceError` and :class:`SinkError`.
    """
    known = KnownIds(bucket, buckets)
    point_id = compile_key_id(plan)
    for query, text_columns in queries:
        batches = copy_rows(connection, query, text_columns, batch_rows=_BATCH_ROWS)
        while await _in_thread(functools.partial(_add_next, batches, point_id, known)):
            pass
    orphans: list[PointId] = []
    async for ids in writer.scroll_ids(_SCROLL_PAGE):
        orphans += known.missing_from(ids)
    return orphans


def _add_next(
    batches: Iterator[list[Row]], point_id: Callable[[Row], PointId], known: KnownIds
) -> bool:
    """Add the ids of the next batch; False when there is none."""
    rows = next(batches, None)
    if rows is None:
        return False
    for row in rows:
        try:
            known.add(point_id(row))
        except MappingError as error:
            # The row is a dead letter of the copy. A point that the migration tool made of it is
            # not without a row.
            if isinstance(error.__cause__, SharedIdError):
                known.add(error.__cause__.id)
    return True


async def _in_thread(function: Callable[[], bool]) -> bool:
    """Run in a thread, which is waited for even if this is cancelled: it uses the connection."""
    running = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(running)
    finally:
        if not running.done():
            await asyncio.wait([running])
