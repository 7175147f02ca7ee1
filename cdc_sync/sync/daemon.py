"""The daemon: a pipeline with its signals, logs, metrics and HTTP endpoint."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import traceback

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ExitCode
from cdc_sync.ops.http import start_http_server
from cdc_sync.ops.logging import configure_logging, get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.notify import Notifier
from cdc_sync.ops.status import StatusBoard
from cdc_sync.sync.pipeline import Pipeline

log = get_logger(__name__)

#: How long the pipeline may take to end after its drain was cancelled.
_CANCEL_SECONDS = 0.5
#: How often the service manager is told how things are, at the least.
_TELL_SECONDS = 5.0


def run_pipeline(settings: Settings, *, restart: bool = False) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code. Raises :class:`CdcSyncError` for what
    needs somebody to act.

    The first signal drains: the batch in flight is finished and confirmed. A second one exits at
    once, which is safe: what was not confirmed is sent again.
    """
    configure_logging(settings.log)
    metrics = Metrics()
    board = StatusBoard(
        settings.pipeline.name,
        slot=settings.source.slot,
        publication=settings.source.publication,
        metrics=metrics,
    )
    server = start_http_server(settings.http, board, metrics)
    try:
        if server is not None:
            log.info("http_listening", host=server.host, port=server.port)
        asyncio.run(_run(Pipeline(settings, metrics=metrics, board=board), restart))
    finally:
        if server is not None:
            server.stop()
    log.info("stopped")
    return ExitCode.OK


async def _run(pipeline: Pipeline, restart: bool) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    notifier = Notifier()

    def on_signal(received: signal.Signals) -> None:
        if stop.is_set():
            os._exit(128 + received)
        log.info("stopping", signal=received.name)
        notifier.stopping()
        stop.set()
        grace = threading.Timer(
            pipeline.settings.pipeline.shutdown_timeout_seconds + _CANCEL_SECONDS, _abandon
        )
        grace.daemon = True
        grace.start()

    for received in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(received, on_signal, received)
    loop.add_signal_handler(signal.SIGUSR1, _dump_tasks)
    telling = asyncio.create_task(_tell(pipeline, notifier))
    try:
        await pipeline.run(stop, restart=restart)
    except CdcSyncError as error:
        # Said in words, not by a traceback: the cause is outside of the program.
        log.error("failed", kind=error.kind.value, error=error.message, remedy=error.remedy)  # noqa: TRY400
        raise
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)
        notifier.close()
        for received in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            loop.remove_signal_handler(received)


async def _tell(pipeline: Pipeline, notifier: Notifier) -> None:
    """Tell the service manager: ready once both sides were there, then that every loop turns."""
    if not notifier.enabled:
        return
    ready = False
    while True:
        board = pipeline.board
        state = board.snapshot()["state"]
        if not ready and all(check.ok for check in board.readiness()):
            ready = True
            notifier.ready()
        notifier.status(str(state))
        if all(check.ok for check in board.liveness()):
            notifier.watchdog()
        await asyncio.sleep(min(notifier.watchdog_seconds or _TELL_SECONDS, _TELL_SECONDS))


def _abandon() -> None:
    """The grace period is over, and something still waits for Qdrant or Postgres.

    Safe: what was not confirmed is sent again by the next start. Workers die with this process.
    """
    log.warning("drain_abandoned")
    logging.shutdown()
    os._exit(ExitCode.OK)


def _dump_tasks() -> None:
    """SIGUSR1: where every task and thread stands, to stderr."""
    for task in asyncio.all_tasks():
        task.print_stack(file=sys.stderr)
    for frame in sys._current_frames().values():
        traceback.print_stack(frame, file=sys.stderr)
