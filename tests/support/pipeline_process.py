"""A pipeline in a process of its own, forked from one that has imported everything: it starts in
milliseconds, and kill -9 at any moment is a real one.

What the pipeline polls, it polls quickly here, so that tests need not wait.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path

import psycopg

from cdc_sync.config import LogSettings, Settings
from cdc_sync.errors import CdcSyncError
from cdc_sync.ops.logging import configure_logging
from cdc_sync.postgres.watch import SourcePosition
from cdc_sync.sync import monitor, retry
from cdc_sync.sync.pipeline import Pipeline
from cdc_sync.sync.resync import Resync

#: What a life needs, and what is done to it, imported before the first is forked.
_PRELOAD = (
    "tests.support.pipeline_process",
    "tests.support.failpoints",
    "tests.support.breaks",
    "cdc_sync.qdrant.edge",
    "grpc._channel",
    "grpc.experimental",
)
_LOOK_SECONDS = 0.1
_LONGEST_BACKOFF_SECONDS = 0.3

#: How long to wait for what a loaded machine may take long for.
_PATIENCE_SECONDS = 120.0

#: A change to the program, made in the new process before anything runs; a function of a module.
Break = Callable[[], None]


@dataclass(frozen=True)
class PipelineStatus:
    """``looks``: how often the monitor has compared the tables with the catalog and found nothing
    to do. ``stopped``: error and remedy of tables that are stopped, by name."""

    state: str
    applied: int
    confirmed: int
    stale: frozenset[int]
    looks: int
    schema_changes: dict[str, float]
    stopped: dict[str, tuple[str, str]]

    def settled(self, lsn: int, looks: int) -> bool:
        """Whether everything before the position is confirmed, the catalog was found unchanged so
        often, and no table waits to be read or its points to be looked through again."""
        return self.confirmed >= lsn and self.looks >= looks and not self.stale


@dataclass(frozen=True)
class PipelineEnd:
    """How it ended: ``kind`` and ``message`` are empty when it was stopped in good order."""

    kind: str = ""
    message: str = ""
    remedy: str = ""
    exit_code: int = 0


class PipelineProcess:
    """One life of a pipeline."""

    def __init__(self, settings: Settings, log_path: Path, sabotage: Break | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOAD))
        self.log_path = log_path
        self._commands, theirs = context.Pipe()
        self._end, their_end = context.Pipe(duplex=False)
        self._ended: PipelineEnd | None = None
        self._process: BaseProcess = context.Process(
            target=_main, args=(settings, str(log_path), theirs, their_end, sabotage), daemon=True
        )
        self._process.start()
        theirs.close()
        their_end.close()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        """kill -9, unless it has ended by itself: its process id may be another's by now."""
        if self._process.is_alive():
            self._process.kill()
        self._reap()

    def stop(self, timeout: float = _PATIENCE_SECONDS) -> PipelineEnd:
        """Stop in good order, as SIGTERM does."""
        try:
            self._commands.send("stop")
        except OSError:
            pass  # It has ended by itself, and says why.
        return self.wait_end(timeout)

    def wait_end(self, timeout: float = _PATIENCE_SECONDS) -> PipelineEnd:
        """Wait until it ends by itself, and return how."""
        if self._ended is None:
            self._process.join(timeout)
            if self._process.is_alive():
                raise AssertionError(f"the pipeline did not end within {timeout} s\n{self.log()}")
            try:
                self._ended = self._end.recv() if self._end.poll() else None
            except EOFError:
                pass
            if self._ended is None:
                raise AssertionError(f"the pipeline died without a word\n{self.log()}")
            self._reap()
        return self._ended

    def exit_code(self, timeout: float) -> int | None:
        """Wait until it ends, and return with what; None if it still runs then."""
        self._process.join(timeout)
        return self._process.exitcode

    def close(self) -> None:
        self.kill()

    def _reap(self) -> None:
        self._process.join()
        self._commands.close()
        self._end.close()

    def status(self) -> PipelineStatus:
        """Ask it. Fails when it has ended, with the reason."""
        try:
            self._commands.send("status")
            if not self._commands.poll(_PATIENCE_SECONDS):
                raise AssertionError(f"the pipeline does not answer\n{self.log()}")
            status = self._commands.recv()
        except (EOFError, OSError):
            end = self.wait_end()
            raise AssertionError(
                f"the pipeline ended: {end.kind}: {end.message}\n{self.log()}"
            ) from None
        assert isinstance(status, PipelineStatus)
        return status

    def wait(
        self,
        condition: Callable[[PipelineStatus], bool],
        what: str,
        timeout: float = _PATIENCE_SECONDS,
    ) -> PipelineStatus:
        deadline = time.monotonic() + timeout
        while True:
            status = self.status()
            if condition(status):
                return status
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{what} did not come within {timeout} s: {status}\n{self.log()}"
                )
            time.sleep(0.02)

    def wait_streaming(self) -> None:
        self.wait(lambda status: status.state == "streaming", "streaming")

    def wait_settled(
        self,
        connection: psycopg.Connection[tuple[object, ...]],
        timeout: float = _PATIENCE_SECONDS,
    ) -> None:
        """Wait until everything committed by now is there, and so is every change of a table.

        The connection is in autocommit mode.
        """
        row = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()
        assert row is not None
        lsn = int(str(row[0]))
        # A look may be under way already, so it is the one after the next that tells.
        looks = self.status().looks + 2

        def settled(status: PipelineStatus) -> bool:
            # Something in the WAL, so that the server has a position to report.
            connection.execute("SELECT pg_logical_emit_message(false, 'tests', '')")
            return status.settled(lsn, looks)

        self.wait(settled, "the last position", timeout)

    def log(self, characters: int = 6000) -> str:
        return self.log_path.read_text(errors="replace")[-characters:]


# -- the other process


def _main(
    settings: Settings, log_path: str, commands: Pipe, end: Pipe, sabotage: Break | None
) -> None:
    # What was imported is not looked through again by every life.
    gc.freeze()
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    configure_logging(LogSettings(level="debug", format="json"))
    monitor.INTERVAL_SECONDS = _LOOK_SECONDS
    retry.MAX_BACKOFF_SECONDS = _LONGEST_BACKOFF_SECONDS
    if sabotage is not None:
        sabotage()
    try:
        asyncio.run(_run(settings, commands))
    except CdcSyncError as error:
        kind, code = error.kind.value, int(error.policy.exit_code)
        end.send(PipelineEnd(kind, error.message, error.remedy, code))
    except BaseException as error:
        end.send(PipelineEnd("bug", f"{type(error).__name__}: {error}", exit_code=1))
        raise
    else:
        end.send(PipelineEnd())


async def _run(settings: Settings, commands: Pipe) -> None:
    pipeline = Pipeline(settings)
    looks = _count_looks()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        while True:
            try:
                command = commands.recv()
            except (EOFError, OSError):
                os._exit(1)  # The test is gone.
            if command == "stop":
                loop.call_soon_threadsafe(stop.set)
            else:
                commands.send(_status(pipeline, looks[0]))

    threading.Thread(target=listen, daemon=True).start()
    await pipeline.run(stop)


def _count_looks() -> list[int]:
    looks = [0]
    observe = Resync.observe

    def counted(self: Resync, position: SourcePosition, definitions: dict[int, str]) -> None:
        observe(self, position, definitions)
        looks[0] += not self._relations.stale

    Resync.observe = counted  # type: ignore[method-assign]
    return looks


def _status(pipeline: Pipeline, looks: int) -> PipelineStatus:
    relations = pipeline._relations
    changes: dict[str, float] = {}
    if relations is not None:
        for planned in relations.tables:
            for action, counter in pipeline.metrics.add_table(planned.name).schema_changes.items():
                changes[action] = changes.get(action, 0.0) + counter._value.get()
    return PipelineStatus(
        state=str(pipeline.board.snapshot()["state"]),
        applied=pipeline.positions.applied,
        confirmed=pipeline.positions.confirmed,
        stale=frozenset() if relations is None else frozenset(relations.wanted),
        looks=looks,
        schema_changes=changes,
        stopped=_stopped(pipeline),
    )


def _stopped(pipeline: Pipeline) -> dict[str, tuple[str, str]]:
    tables = pipeline.board.snapshot()["tables"]
    assert isinstance(tables, list)
    return {
        table["name"]: (table["error"], table["remedy"])
        for table in tables
        if table["state"] == "stopped"
    }
