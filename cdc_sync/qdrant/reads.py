"""Reads points of one collection in pieces that come through: answers that are too large, pages
that strict mode does not allow, and requests above the rate limiter's capacity are made smaller.

An answer of more than :data:`~cdc_sync.qdrant.rpc.MAX_ANSWER_BYTES` is not taken, so that a few
large points more than expected do not cost any amount of memory; a single point is taken whatever
its size.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, TypeVar

from qdrant_client import grpc as q

from cdc_sync.qdrant import messages
from cdc_sync.qdrant.rpc import GET, SCROLL, Method, Rpc, RpcError

Response = TypeVar("Response")

#: What is read at once grows again by this part of it with every answer.
_GROWTH: Final = 8


class PointReads:
    """Reads of one collection."""

    def __init__(self, rpc: Rpc, collection: str) -> None:
        self._rpc = rpc
        self._collection = collection
        #: Points that are read at once, at most; None: as many as asked for.
        self._most: int | None = None
        #: Points of a page that strict mode allows.
        self._page: int | None = None

    async def get(
        self,
        ids: Sequence[bytes],
        lane: int = 0,
        *,
        with_payload: bool,
        with_vectors: bool = False,
        patient: bool = False,
    ) -> list[q.RetrievedPoint]:
        """The points of these (serialized) ids that exist. Raises :class:`RpcError`.

        A point that is too large for somebody on the way is left out, as if there was none: whoever
        asks takes the row from Postgres then. ``patient``: where the rate is limited, wait as long
        as the server says.
        """
        found: list[q.RetrievedPoint] = []
        start = 0
        while start < len(ids):
            some = ids[start : start + (self._most or len(ids))]
            request = messages.get(
                self._collection, some, with_payload=with_payload, with_vectors=with_vectors
            )
            try:
                answer = await self._answer(GET, request, lane, len(some), patient)
            except RpcError as failure:
                if not failure.oversized:
                    raise
                start += 1  # it is the only one asked for
                continue
            if answer is not None:
                found += answer.result
                start += len(some)
        return found

    async def scroll(self, request: q.ScrollPoints, *, patient: bool = False) -> q.ScrollResponse:
        """A page, of ``request.limit`` points at most. Raises :class:`RpcError`."""
        wanted = request.limit
        while True:
            request.limit = min(wanted, self._most or wanted, self._page or wanted)
            try:
                answer = await self._answer(
                    SCROLL, request.SerializeToString(), 0, request.limit, patient
                )
            except RpcError as failure:
                if not failure.page_limit or failure.page_limit >= request.limit:
                    raise
                self._page = failure.page_limit
                continue
            if answer is not None:
                return answer

    async def _answer(
        self, method: Method[Response], request: bytes, lane: int, points: int, patient: bool
    ) -> Response | None:
        """The answer; None if it is to be asked for again, perhaps for fewer points."""
        try:
            answer = await self._rpc.call(method, request, lane)
        except RpcError as failure:
            if failure.oversized and points == 1:
                return await self._rpc.call(method, request, lane, unlimited=True)
            if failure.oversized or (failure.over_capacity and points > 1):
                self._most = max(1, points // 2)
                return None
            if patient and failure.rate_limited and failure.retry_after is not None:
                await asyncio.sleep(failure.retry_after)
                return None
            raise
        if self._most is not None and points == self._most:
            self._most += max(1, points // _GROWTH)
        return answer
