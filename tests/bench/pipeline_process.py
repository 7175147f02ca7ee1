"""A real pipeline, which measures itself: the process that :mod:`tests.bench.pipeline` starts.

The clocks of a copy run from the moment at which the first chunk begins until the last is written;
those of a stream from START_REPLICATION until everything before a position is applied.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final
from unittest import mock

from cdc_sync.config import LogSettings, QdrantSettings, Settings
from cdc_sync.ops.logging import configure_logging
from cdc_sync.ops.metrics import Metrics
from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.qdrant.sink import RequestObserver, Sink
from cdc_sync.sync import copying, pipeline
from tests.bench.nulls import NullSink
from tests.bench.usage import Cost, Meter, Reading, Report, memory_mb

_PATIENCE_SECONDS: Final = 900.0
#: How often a position is looked at, and the state, which costs more.
_LOOK_SECONDS: Final = 0.005
_STATE_SECONDS: Final = 0.1
_PR_SET_PDEATHSIG: Final = 1


class _Latencies:
    """Stands in for the histogram: keeps every value."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def observe(self, seconds: float) -> None:
        self.values.append(seconds)


class _Watched:
    """The pipeline and what is measured of it."""

    def __init__(self, settings: Settings, meter: Meter) -> None:
        self._meter = meter
        self._metrics = Metrics()
        self._latencies = _Latencies()
        self._metrics.end_to_end_latency_seconds = self._latencies  # type: ignore[assignment]
        self.pipeline = pipeline.Pipeline(settings, metrics=self._metrics)
        self.stop = asyncio.Event()
        self._copy_began: Reading | None = None
        self._copy_ended: Reading | None = None
        self._copied_rows = 0
        self._stream_began: Reading | None = None
        self._stream_ended: Reading | None = None
        self._watch_copy()
        self._watch_stream()

    def _watch_copy(self) -> None:
        copy_chunk = copying.copy_chunk

        async def watched(*args: object) -> copying.ChunkResult:
            if self._copy_began is None:
                self._copy_began = self._meter.begin()
            result = await copy_chunk(*args)  # type: ignore[arg-type]
            self._copied_rows += result.rows
            self._copy_ended = self._meter.own()
            return result

        mock.patch.object(copying, "copy_chunk", watched).start()

    def _watch_stream(self) -> None:
        start = ReplicationConnection.start

        def watched(connection: ReplicationConnection, *args: object, **options: object) -> None:
            start(connection, *args, **options)  # type: ignore[arg-type]
            self._stream_began = self._meter.begin()

        mock.patch.object(ReplicationConnection, "start", watched).start()

    def answer(self, question: tuple[object, ...]) -> object:
        match question:
            case ("copied",):
                self._wait(lambda: self._state == "streaming", _STATE_SECONDS)
                if self._copy_ended is not None:
                    self._copy_ended = self._meter.with_others(self._copy_ended)
                return None
            case ("streams",):
                return self._state == "streaming"
            case ("applied", int(position)):
                self._wait(lambda: self.pipeline.positions.applied >= position, _LOOK_SECONDS)
                self._stream_ended = self._meter.end()
                return None
            case ("usage",):
                return self._meter.end()
            case ("latencies",):
                values, self._latencies.values = self._latencies.values, []
                return values
            case ("report",):
                return self._report()
        raise ValueError(f"no question {question!r}")

    @property
    def _state(self) -> str:
        return str(self.pipeline.board.snapshot()["state"])

    @staticmethod
    def _wait(condition: Callable[[], bool], pause: float) -> None:
        end = time.monotonic() + _PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError("what the benchmark waits for does not come")
            time.sleep(pause)

    def _report(self) -> Report:
        def cost(began: Reading | None, ended: Reading | None) -> Cost | None:
            return None if began is None or ended is None else began.until(ended)

        return Report(
            cost(self._copy_began, self._copy_ended),
            self._copied_rows,
            cost(self._stream_began, self._stream_ended),
            memory_mb(os.getpid(), "VmHWM"),
        )


def _opener(path: Path) -> Callable[[QdrantSettings, RequestObserver | None], object]:
    async def open_sink(settings: QdrantSettings, observer: RequestObserver | None = None) -> Sink:
        return NullSink(path)

    return open_sink


def main(pipe: Connection) -> None:
    """Run the pipeline that the other end describes, and answer its questions."""
    settings, null, others, parent = pipe.recv()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    configure_logging(LogSettings(level="info", format="json"))
    if null is not None:
        mock.patch.object(pipeline, "open_sink", _opener(null)).start()
    gc.freeze()  # as the daemon does
    asyncio.run(_run(settings, pipe, Meter(**others)))


async def _run(settings: Settings, pipe: Connection, meter: Meter) -> None:
    watched = _Watched(settings, meter)
    loop = asyncio.get_running_loop()

    def listen() -> None:
        while True:
            try:
                question = pipe.recv()
            except (EOFError, OSError):
                os._exit(1)  # The benchmark is gone.
            if question == ("stop",):
                loop.call_soon_threadsafe(watched.stop.set)
                return
            pipe.send(watched.answer(question))

    threading.Thread(target=listen, daemon=True).start()
    await watched.pipeline.run(watched.stop)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
