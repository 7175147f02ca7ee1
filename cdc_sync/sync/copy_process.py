"""Worker processes of the copy: both ends of the pipe between the daemon and one of them.

The daemon sends chunks, and None for the worker to let go of the snapshot. It answers with reports
of retries as they happen, then with the result or the error; None once the snapshot is let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import multiprocessing
import os
import pickle
import signal
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final, TypeAlias

from cdc_sync.errors import CdcSyncError
from cdc_sync.sync.copying import ChunkCopier, ChunkResult, CopyStoppedError, CopyTask, OnRetry

#: How long a worker that is told to stop may take to end its request in flight.
STOP_SECONDS: Final = 10.0
_KILL_AFTER_SECONDS: Final = STOP_SECONDS + 2.0
_PR_SET_PDEATHSIG: Final = 1


class WorkerLostError(Exception):
    """A worker has ended in the middle of its work; the message says how."""


@dataclass(frozen=True, slots=True)
class _Retried:
    error: CdcSyncError
    seconds: float


_Answer: TypeAlias = ChunkResult | BaseException | _Retried | None


class ProcessWorker:
    """The daemon's end: a process that copies one chunk at a time.

    Started by the constructor, in the thread that lives as long as the worker is to live: the
    kernel kills a worker when the thread that started it ends.
    """

    def __init__(self, on_retry: OnRetry) -> None:
        # spawn: forking a process that has gRPC threads and open connections is not safe.
        context = multiprocessing.get_context("spawn")
        self._on_retry = on_retry
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, os.getpid()), name="cdc_sync copy", daemon=True
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """Process id."""
        return self._process.pid

    async def copy(self, task: CopyTask) -> ChunkResult:
        """Have the chunk copied. Raises what :func:`copy_chunk` raises, and
        :class:`WorkerLostError`."""
        answer = await self._ask(task)
        if not isinstance(answer, ChunkResult):
            raise AssertionError(f"a copy worker answered with {type(answer).__name__}")
        return answer

    async def rest(self) -> None:
        """Have the snapshot let go of. Raises :class:`WorkerLostError`."""
        await self._ask(None)

    async def stop(self) -> None:
        """End the process, once its request in flight is answered; kill it if that takes longer
        than :data:`STOP_SECONDS`."""
        self._process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_readable(self._process.sentinel), _KILL_AFTER_SECONDS)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()

    async def _ask(self, message: CopyTask | None) -> _Answer:
        try:
            # A process that is starting does not read yet, and the pipe holds only so much.
            await asyncio.to_thread(self._pipe.send, message)
            while isinstance(answer := await self._receive(), _Retried):
                self._on_retry(answer.error, answer.seconds)
        except (EOFError, OSError) as error:
            raise WorkerLostError(await self._how_it_ended()) from error
        if isinstance(answer, CopyStoppedError):
            # By somebody else's SIGTERM.
            raise WorkerLostError(await self._how_it_ended())
        if isinstance(answer, BaseException):
            raise answer
        return answer

    async def _receive(self) -> _Answer:
        await _readable(self._pipe.fileno())
        answer: _Answer = self._pipe.recv()
        return answer

    async def _how_it_ended(self) -> str:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_readable(self._process.sentinel), STOP_SECONDS)
        code = self._process.exitcode
        if code is None:
            return f"worker process {self.pid} does not answer any more"
        if code < 0:
            return f"worker process {self.pid} was killed by {signal.Signals(-code).name}"
        return f"worker process {self.pid} ended with exit code {code}"


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


# -- the worker's end


def _serve(pipe: Connection, daemon_pid: int) -> None:
    # Ctrl-C goes to the whole process group; the daemon decides when workers stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker must not outlive a killed daemon: it would write rows of an old snapshot over those
    # of the next copy.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != daemon_pid:
        os._exit(1)
    # What was imported is not looked through again with every collection of garbage, which takes a
    # good part of the CPU time of a long chunk.
    gc.freeze()
    asyncio.new_event_loop().run_until_complete(_Server(pipe).run())
    # At once: a thread may still be connecting.
    os._exit(0)


class _Server:
    """Takes chunks from the pipe until it is told to stop, or the daemon has gone."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._copier = ChunkCopier()
        self._stop = asyncio.Event()
        self._wake = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_terminate)
        try:
            # The daemon may have gone.
            with contextlib.suppress(EOFError, OSError):
                while await self._message_waits():
                    task: CopyTask | None = self._pipe.recv()
                    self._pipe.send_bytes(await self._answer(task))
        finally:
            await self._copier.close()

    def _on_terminate(self) -> None:
        self._stop.set()
        self._wake.set()
        asyncio.get_running_loop().call_later(STOP_SECONDS, os._exit, 1)

    async def _message_waits(self) -> bool:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pipe.fileno(), self._wake.set)
        await self._wake.wait()
        loop.remove_reader(self._pipe.fileno())
        self._wake.clear()
        return not self._stop.is_set()

    async def _answer(self, task: CopyTask | None) -> bytes:
        if task is None:
            self._copier.rest()
            return pickle.dumps(None)
        try:
            return pickle.dumps(await self._copier.copy(task, self._stop, self._on_retry))
        except Exception as error:  # noqa: BLE001 - the daemon raises it
            return pickled_error(error)

    def _on_retry(self, error: CdcSyncError, seconds: float) -> None:
        self._pipe.send(_Retried(error, seconds))


def pickled_error(error: Exception) -> bytes:
    """An error that can be raised on the other side, as bytes."""
    if not isinstance(error, CdcSyncError):
        # A trace does not travel with an exception, a note does.
        error.add_note("In a copy worker:\n" + "".join(traceback.format_tb(error.__traceback__)))
    try:
        dumped = pickle.dumps(error)
        pickle.loads(dumped)
    except Exception:  # noqa: BLE001 - whatever its class may do
        return pickle.dumps(RuntimeError(f"a copy worker failed: {type(error).__name__}"))
    return dumped
