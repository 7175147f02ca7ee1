"""Tells about the copies of a running pipeline: how many rows are to be expected when one begins,
and its summary when it has ended."""

from __future__ import annotations

import asyncio

from cdc_sync.errors import CdcSyncError
from cdc_sync.ops.logging import get_logger
from cdc_sync.sync.pipeline import Pipeline
from cdc_sync.sync.summary import CopySummary, Summarizer, set_expected

log = get_logger(__name__)

_LOOK_SECONDS = 0.5


class CopyReporter:
    """Watches the board. With ``summaries`` a copy that has ended is summed up in the log."""

    def __init__(self, pipeline: Pipeline, *, summaries: bool) -> None:
        self._pipeline = pipeline
        self._summaries = summaries
        self._expecting: asyncio.Task[None] | None = None
        self._reported: float | None = None

    async def run(self) -> None:
        """Until cancelled. That something cannot be counted is logged, and harms nobody."""
        try:
            while True:
                await self._look()
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            await self._stop_expecting()

    async def _look(self) -> None:
        tables = self._pipeline.board.snapshot()["tables"]
        assert isinstance(tables, list)
        states = {entry["state"] for entry in tables}
        if "copying" in states:
            if self._expecting is None:
                self._expecting = asyncio.create_task(self._expect())
            return
        await self._stop_expecting()
        seconds = self._pipeline.board.copy_seconds()
        over = states.isdisjoint(("pending", "catching_up"))
        if self._summaries and over and seconds not in (None, self._reported):
            self._reported = seconds
            await self._summarize()

    async def _expect(self) -> None:
        pipeline = self._pipeline
        try:
            await set_expected(pipeline.settings, pipeline.tables, pipeline.board)
        except CdcSyncError as error:
            log.info("rows_not_counted", reason=error.message)

    async def _stop_expecting(self) -> None:
        if self._expecting is not None:
            self._expecting.cancel()
            await asyncio.gather(self._expecting, return_exceptions=True)
            self._expecting = None

    async def _summarize(self) -> None:
        pipeline = self._pipeline
        try:
            summary = await Summarizer(
                pipeline.settings,
                pipeline.sink,
                pipeline.tables,
                pipeline.board,
                pipeline.metrics,
                live=True,
            ).run()
        except CdcSyncError as error:
            log.warning("copy_not_summarized", reason=error.message)
            return
        log_summary(summary)


def log_summary(summary: CopySummary) -> None:
    """One event ``copy_summary`` a table, and one without a table for all."""
    for table in summary.tables:
        write = log.warning if table.counts.agree is False else log.info
        write("copy_summary", **table.to_json())
    log.info("copy_summary", **summary.total())
