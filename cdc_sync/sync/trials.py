"""Trying again: what the daemon does while Postgres or Qdrant is away, and what it shows of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from cdc_sync.errors import CdcSyncError, ErrorKind, SinkError, SourceError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics, State
from cdc_sync.ops.status import StatusBoard
from cdc_sync.sync.retry import is_sink_trouble, is_transient, retrying

log = get_logger(__name__)

T = TypeVar("T")


class StoppedError(Exception):
    """The pipeline is to stop while it waits for something to come back."""


class Trials:
    """Runs operations until they work, as long as the pipeline is not to stop."""

    def __init__(self, metrics: Metrics, board: StatusBoard, stop: asyncio.Event) -> None:
        self._metrics = metrics
        self._board = board
        self._logged: State | None = None
        self.stop = stop

    def state(self, state: State, message: str | None = None) -> None:
        """Show what the pipeline is doing, and why where that does not say it."""
        self._board.set_state(state, message)
        if state != self._logged:
            self._logged = state
            log.info("state", state=state)

    async def until(
        self,
        operation: Callable[[], Awaitable[T]],
        budget_seconds: float | None = None,
        retry: Callable[[BaseException], bool] = is_transient,
    ) -> T:
        """Try until it works; raises :class:`StoppedError` rather than wait when it is to stop."""

        async def sleep(seconds: float) -> None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), seconds)
            if self.stop.is_set():
                raise StoppedError

        started = time.monotonic()
        failed: set[type[CdcSyncError]] = set()

        def on_retry(error: CdcSyncError, seconds: float) -> None:
            if budget_seconds is not None and time.monotonic() - started > budget_seconds:
                raise error
            failed.add(SinkError if isinstance(error, SinkError) else SourceError)
            self.stalled(error, seconds)

        result = await retrying(operation, on_retry, sleep, retry)
        if SinkError in failed:
            self._board.set_sink(True)
        if SourceError in failed:
            self._board.set_source(True)
        return result

    async def until_sink(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Try until Qdrant takes it; what ails Postgres is raised."""
        return await self.until(operation, retry=is_sink_trouble)

    def stalled(self, error: CdcSyncError, seconds: float) -> None:
        """Show that something is tried again after so many seconds, and why. That another process
        still has the slot is no news: one that stands by looks for its turn for months."""
        stood_by = False
        if isinstance(error, SinkError):
            # Room is made by somebody, and nobody else says how.
            full = error.kind is ErrorKind.SINK_FULL
            text = f"{error.message} {error.remedy}" if full else error.message
            self._board.set_sink(False, text)
            self._metrics.sink_retries[error.kind].inc()
        elif isinstance(error, SourceError):
            self._metrics.source_reconnects[error.kind].inc()
            if error.kind is ErrorKind.SLOT_ACTIVE:
                stood_by = self._logged == "standby"
                self.state("standby")
            else:
                self._board.set_source(False, error.message)
        self._metrics.count_error(error.kind)
        if not stood_by:
            log.warning(
                "retrying", kind=error.kind.value, error=error.message, seconds=round(seconds, 2)
            )
