"""The daemon: a pipeline with its signals, logs, metrics and HTTP endpoint."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine

from cdc_sync import credentials
from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ConfigError, ExitCode
from cdc_sync.ops.http import HttpServer, start_http_server
from cdc_sync.ops.logging import configure_logging, get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.notify import Notifier
from cdc_sync.ops.recent_events import RecentEvents
from cdc_sync.ops.revision import revision
from cdc_sync.ops.status import StatusBoard
from cdc_sync.sync.copy_report import CopyReporter
from cdc_sync.sync.credential_log import CredentialLog
from cdc_sync.sync.pipeline import Pipeline
from cdc_sync.sync.progress import ProgressScreen, ProgressWatch, on_terminal
from cdc_sync.sync.supervision import supervised
from cdc_sync.sync.swaps import Swaps
from cdc_sync.sync.task_dump import dump_tasks
from cdc_sync.sync.transport import transport_warnings

log = get_logger(__name__)

#: How long the pipeline may take to end after its drain was cancelled.
_CANCEL_SECONDS = 0.5
#: How often the service manager is told how things are, at the least.
_TELL_SECONDS = 5.0


#: Awaited with a pipeline that has ended by itself.
After = Callable[[Pipeline], Awaitable[None]]
#: What goes on beside a pipeline until it ends.
Beside = Callable[[Pipeline], Coroutine[None, None, None]]


def run_pipeline(
    settings: Settings,
    *,
    restart: bool = False,
    once: bool = False,
    after: After | None = None,
    beside: Beside | None = None,
    swaps: Swaps | None = None,
) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code. Raises :class:`CdcSyncError` for what
    needs somebody to act.

    The first signal drains: the batch in flight is finished and confirmed. A second one exits at
    once, which is safe: what was not confirmed is sent again. ``once``: return by itself when every
    table is copied and caught up, once ``after`` has been awaited; a signal before that ends with
    128 and its number. ``beside`` is run as a task until the pipeline ends.
    ``swaps``: what becomes of messages of rebuilds, if not what is usual.
    """
    screen = ProgressScreen() if settings.log.format != "json" and on_terminal(sys.stderr) else None
    recent = RecentEvents()
    stream = None if screen is None else screen.log_stream
    configure_logging(settings.log, stream, recent=recent)
    credentials.listen(CredentialLog(settings))
    metrics = Metrics(revision())
    board = StatusBoard(
        settings.pipeline.name,
        slot=settings.source.slot,
        publication=settings.source.publication,
        metrics=metrics,
        events=recent,
    )
    server = _listen(settings, board, metrics, once)
    try:
        if server is not None:
            log.info("http_listening", host=server.host, port=server.port)
        for side, sentence in transport_warnings(settings):
            log.warning("connection_unprotected", side=side, reason=sentence)
        pipeline = Pipeline(settings, metrics=metrics, board=board, swaps=swaps)
        # What was imported is not looked through again with every collection of garbage, which
        # would hold the stream for tens of milliseconds.
        gc.freeze()
        code = asyncio.run(_Life(pipeline, restart, once, after, beside, screen).run())
    finally:
        credentials.listen(None)
        if server is not None:
            server.stop()
    log.info("stopped")
    return code


def _listen(
    settings: Settings, board: StatusBoard, metrics: Metrics, once: bool
) -> HttpServer | None:
    try:
        return start_http_server(settings.http, board, metrics)
    except ConfigError as error:
        if not once:
            raise
        # A daemon on this machine has the port; a migration does not need it.
        log.warning("http_not_listening", reason=error.message)
        return None


class _Life:
    """A pipeline from its start to its end, with its signals and those who watch it."""

    def __init__(
        self,
        pipeline: Pipeline,
        restart: bool,
        once: bool,
        after: After | None,
        beside: Beside | None,
        screen: ProgressScreen | None,
    ) -> None:
        self._pipeline = pipeline
        self._restart = restart
        self._once = once
        self._after = after
        self._beside = beside
        self._screen = screen
        self._stop = asyncio.Event()
        self._received: signal.Signals | None = None
        self._notifier = Notifier()

    async def run(self) -> int:
        """Returns the exit code."""
        loop = asyncio.get_running_loop()
        for received in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(received, self._on_signal, received)
        loop.add_signal_handler(signal.SIGUSR1, dump_tasks)
        board = self._pipeline.board
        reporter = CopyReporter(self._pipeline, summaries=not self._once)
        watching = [
            supervised(_tell(self._pipeline, self._notifier), "notification", board, vital=True),
            supervised(ProgressWatch(board, self._screen).run(), "progress", board),
            supervised(reporter.run(), "copy report", board),
        ]
        if self._beside is not None:
            watching.append(supervised(self._beside(self._pipeline), "companion", board))
        try:
            await self._pipeline.run(self._stop, restart=self._restart, once=self._once)
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            if self._received is None and self._after is not None:
                await self._finish(self._after)
        except CdcSyncError as error:
            # Said in words, not by a traceback: the cause is outside of the program.
            log.error("failed", kind=error.kind.value, error=error.message, remedy=error.remedy)  # noqa: TRY400
            raise
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            self._notifier.close()
            for received in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                loop.remove_signal_handler(received)
        return self._code()

    async def _finish(self, after: After) -> None:
        """What comes after the pipeline; a signal ends that too."""
        work = asyncio.ensure_future(after(self._pipeline))
        self._stop.clear()
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not work.done():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        else:
            work.result()

    def _on_signal(self, received: signal.Signals) -> None:
        if self._received is not None:
            os._exit(128 + received)
        log.info("stopping", signal=received.name)
        self._received = received
        self._notifier.stopping()
        self._stop.set()
        grace = threading.Timer(
            self._pipeline.settings.pipeline.shutdown_timeout_seconds + _CANCEL_SECONDS,
            _abandon,
            (self._code(),),
        )
        grace.daemon = True
        grace.start()

    def _code(self) -> int:
        """A daemon that is stopped has done its work; a migration has not."""
        return 128 + self._received if self._once and self._received else ExitCode.OK


async def _tell(pipeline: Pipeline, notifier: Notifier) -> None:
    """Tell the service manager: ready once both sides were there, then that every loop turns."""
    if not notifier.enabled:
        return
    ready = False
    while True:
        board = pipeline.board
        state = board.snapshot()["state"]
        # A stopped table is no reason to end a daemon that has just started.
        checks = [check for check in board.readiness() if check.name != "tables"]
        if not ready and all(check.ok for check in checks):
            ready = notifier.ready()
        notifier.status(str(state))
        if all(check.ok for check in board.liveness()):
            notifier.watchdog()
        await asyncio.sleep(min(notifier.watchdog_seconds or _TELL_SECONDS, _TELL_SECONDS))


def _abandon(code: int) -> None:
    """The grace period is over, and something still waits for Qdrant or Postgres.

    Safe: what was not confirmed is sent again by the next start. Workers die with this process.
    """
    log.warning("drain_abandoned")
    logging.shutdown()
    os._exit(code)
