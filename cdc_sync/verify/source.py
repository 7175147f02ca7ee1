"""Postgres as a verification reads it: from threads, over one connection, in short transactions."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Final, Self, TypeVar

from cdc_sync.config import SourceSettings
from cdc_sync.errors import CdcSyncError, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.postgres.connect import PgConnection, connect, interrupt
from cdc_sync.rows import Row
from cdc_sync.sync.retry import is_transient

log = get_logger(__name__)

T = TypeVar("T")

#: How long one side may be away before the verification gives up.
_PATIENCE_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = 0.5


class SourceReader:
    """Runs queries in threads, one at a time, over a connection that is opened when it is
    needed."""

    def __init__(self, source: SourceSettings) -> None:
        self._source = source
        self._connection: PgConnection | None = None
        self._lock = threading.Lock()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        if self._lock.acquire(blocking=False):
            self._close()
            self._lock.release()
        elif self._connection is not None:
            # A thread cannot be cancelled: its query fails, and it closes the connection.
            interrupt(self._connection)

    async def run(self, query: Callable[[PgConnection], T]) -> T:
        """Run a query in a thread. Raises :class:`SourceError`."""
        return await asyncio.to_thread(self._run, query)

    async def opened(self) -> PgConnection:
        """The connection itself, in autocommit mode and idle. Raises :class:`SourceError`."""
        return await self.run(lambda connection: connection)

    def _run(self, query: Callable[[PgConnection], T]) -> T:
        with self._lock:
            try:
                return query(self._opened())
            except SourceError:
                self._close()
                raise
            finally:
                if self._closed:
                    self._close()

    async def batches(
        self, start: Callable[[PgConnection], Iterator[list[Row]]]
    ) -> AsyncIterator[list[Row]]:
        """Yield what an iterator yields, each batch read in a thread. Nothing else may run over
        this connection meanwhile. Raises :class:`SourceError`."""
        following = one_by_one(start)
        upcoming = asyncio.create_task(self.run(following))
        try:
            while (batch := await upcoming) is not None:
                # The next one is read while this one is compared.
                upcoming = asyncio.create_task(self.run(following))
                yield batch
        finally:
            if not upcoming.done():
                await asyncio.wait([upcoming])
            if not upcoming.cancelled():
                upcoming.exception()

    def _opened(self) -> PgConnection:
        if self._connection is None or self._connection.closed:
            self._connection = connect(self._source, application_name="cdc_sync verify")
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def one_by_one(
    start: Callable[[PgConnection], Iterator[T]],
) -> Callable[[PgConnection], T | None]:
    """A query for :meth:`SourceReader.run`: what comes next of the iterator that ``start`` makes
    when it is run first; None at its end."""
    iterator: Iterator[T] | None = None

    def following(connection: PgConnection) -> T | None:
        nonlocal iterator
        if iterator is None:
            iterator = start(connection)
        return next(iterator, None)

    return following


async def patiently(operation: Callable[[], Awaitable[T]]) -> T:
    """Try again for a while what fails because one side is away. Raises the last error."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return await operation()
        except CdcSyncError as error:
            if not is_transient(error) or time.monotonic() > deadline:
                raise
            log.info("verification_waits", kind=error.kind.value, reason=error.message)
        await asyncio.sleep(_PAUSE_SECONDS)


class Pace:
    """Lets so many rows a second through; None: any number."""

    def __init__(
        self,
        rows_a_second: float | None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._rate = rows_a_second
        self._monotonic = monotonic
        self._sleep = sleep
        self._free = monotonic()

    async def spend(self, rows: int) -> None:
        """Wait until so many more rows may be read."""
        if self._rate is None:
            return
        now = self._monotonic()
        self._free = max(self._free, now) + rows / self._rate
        # What was not used is not saved up, but for a moment.
        wait = self._free - now - rows / self._rate
        if wait > 0:
            await self._sleep(wait)
