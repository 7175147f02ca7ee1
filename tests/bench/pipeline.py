"""A real pipeline in a process of its own, which measures itself.

The clocks of a copy run from the moment at which the first chunk begins until the last is written;
those of a stream from START_REPLICATION until everything before a position is applied.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, Self
from unittest import mock

from cdc_sync.config import LogSettings, QdrantSettings, Settings
from cdc_sync.ops.logging import configure_logging
from cdc_sync.ops.metrics import Metrics
from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.qdrant.sink import RequestObserver, Sink
from cdc_sync.sync import copying, pipeline
from tests.bench.nulls import NullSink
from tests.bench.usage import Cost, Meter, Reading, memory_mb

_PATIENCE_SECONDS: Final = 900.0
#: How often a position is looked at, and the state, which costs more.
_LOOK_SECONDS: Final = 0.005
_STATE_SECONDS: Final = 0.1
_PR_SET_PDEATHSIG: Final = 1


@dataclass(frozen=True)
class Report:
    """What a life measured: the cost of the copy and its rows, of the stream up to a position, and
    the peak of its memory, in MB."""

    copy: Cost | None
    copied_rows: int
    stream: Cost | None
    peak_mb: float


def settings_for(
    source_url: str,
    name: str,
    tables: Mapping[str, str],
    *,
    qdrant: Mapping[str, object] | None = None,
    workers: int = 1,
) -> Settings:
    """Settings of a pipeline over tables, by the names of their collections."""
    return Settings.model_validate(
        {
            "source": {"url": source_url, "slot": name, "publication": name},
            "qdrant": dict(qdrant or {}),
            "tables": [{"name": t, "collection": c} for t, c in tables.items()],
            "pipeline": {"name": name},
            "migration": {"num_workers": workers, "window_seconds": 3600},
            "http": {"enabled": False},
        }
    )


class BenchPipeline:
    """One life of a pipeline, in a process of its own that ends with this one."""

    def __init__(
        self, settings: Settings, log: Path, *, null: Path | None = None, **others: int | None
    ) -> None:
        """``null``: the directory of a sink that drops all, instead of the one in the settings.
        ``others``: names and process ids of what else is measured."""
        context = multiprocessing.get_context("spawn")
        self._log = log
        self._pipe, theirs = context.Pipe()
        # Not a daemon: it has children of its own, the copy workers.
        self._process = context.Process(
            target=_main, args=(settings, str(log), theirs, null, others, os.getpid())
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process.pid is not None
        return self._process.pid

    def wait_copied(self) -> None:
        """Wait until all tables are copied and it streams."""
        self._ask("copied")

    def streams(self) -> bool:
        """Whether all tables are copied and it streams."""
        return self._ask("streams") is True

    def wait_applied(self, position: int) -> None:
        """Wait until everything before a position is applied."""
        self._ask("applied", position)

    def usage(self) -> Reading:
        """The clocks now."""
        answer = self._ask("usage")
        assert isinstance(answer, Reading)
        return answer

    def latencies(self) -> list[float]:
        """Seconds from commit to Completed, one a transaction, since the last call."""
        answer = self._ask("latencies")
        assert isinstance(answer, list)
        return answer

    def report(self) -> Report:
        """What was measured so far."""
        answer = self._ask("report")
        assert isinstance(answer, Report)
        return answer

    def stop(self) -> None:
        """Stop it in good order."""
        with contextlib.suppress(OSError):
            self._pipe.send(("stop",))
        self._process.join(60)
        if self._process.exitcode != 0:
            raise RuntimeError(f"a pipeline did not end well:\n{self.log_tail()}")

    def close(self) -> None:
        """End it, however it stands."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def log_tail(self) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-3000:]

    def _ask(self, *question: object) -> object:
        try:
            self._pipe.send(question)
            if not self._pipe.poll(_PATIENCE_SECONDS):
                raise RuntimeError(f"a pipeline does not answer:\n{self.log_tail()}")
            return self._pipe.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"a pipeline has ended:\n{self.log_tail()}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def life(
    settings: Settings, log: Path, *, null: Path | None = None, **others: int | None
) -> Iterator[BenchPipeline]:
    """A life that is stopped in good order unless something fails."""
    with BenchPipeline(settings, log, null=null, **others) as running:
        yield running
        running.stop()


# -- the other process


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
                self._copy_began = self._meter.read()
            result = await copy_chunk(*args)  # type: ignore[arg-type]
            self._copied_rows += result.rows
            self._copy_ended = self._meter.read()
            return result

        mock.patch.object(copying, "copy_chunk", watched).start()

    def _watch_stream(self) -> None:
        start = ReplicationConnection.start

        def watched(connection: ReplicationConnection, *args: object, **options: object) -> None:
            start(connection, *args, **options)  # type: ignore[arg-type]
            self._stream_began = self._meter.read()

        mock.patch.object(ReplicationConnection, "start", watched).start()

    def answer(self, question: tuple[object, ...]) -> object:
        match question:
            case ("copied",):
                self._wait(lambda: self._state == "streaming", _STATE_SECONDS)
                return None
            case ("streams",):
                return self._state == "streaming"
            case ("applied", int(position)):
                self._wait(lambda: self.pipeline.positions.applied >= position, _LOOK_SECONDS)
                self._stream_ended = self._meter.read()
                return None
            case ("usage",):
                return self._meter.read()
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


def _main(
    settings: Settings,
    log: str,
    pipe: Connection,
    null: Path | None,
    others: Mapping[str, int | None],
    parent: int,
) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    configure_logging(LogSettings(level="info", format="json"))
    if null is not None:
        mock.patch.object(pipeline, "open_sink", _opener(null)).start()
    asyncio.run(_run(settings, pipe, Meter(**others)))


def _opener(path: Path) -> Callable[[QdrantSettings, RequestObserver | None], object]:
    async def open_sink(settings: QdrantSettings, observer: RequestObserver | None = None) -> Sink:
        return NullSink(path)

    return open_sink


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
