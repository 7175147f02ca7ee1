"""A rebuild in a process of its own, as the command runs it, and places at which it, or the
pipeline, dies as by kill -9."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError
from cdc_sync.sync import monitor, retry
from cdc_sync.sync.rebuild_begin import Order
from cdc_sync.verify import rebuild as conducting
from tests.support.failpoints import EXIT_CODE, Failpoint, resolve
from tests.support.pipeline_process import Break

_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True)
class Death:
    """A place: ``module:Class.function``, ``before`` or ``after`` it, or after it has returned
    something true."""

    function: str
    place: Literal["before", "after", "true"]
    passes: int = 1

    def __str__(self) -> str:
        return f"{self.place} {self.function.rpartition(':')[2]}"

    def sabotage(self) -> Break:
        """The change to a program that makes it die here."""
        return functools.partial(_arm, self)


def _arm(death: Death) -> None:
    owner, name = resolve(Failpoint("", death.function, "after"))
    function = getattr(owner, name)
    left = [death.passes]

    def passed(place: str, result: object = None) -> None:
        if death.place == place or (death.place == "true" and place == "after" and result):
            left[0] -= 1
            if left[0] <= 0:
                os._exit(EXIT_CODE)

    async def waited(*arguments: Any, **keywords: Any) -> Any:
        passed("before")
        result = await function(*arguments, **keywords)
        passed("after", result)
        return result

    def called(*arguments: Any, **keywords: Any) -> Any:
        passed("before")
        result = function(*arguments, **keywords)
        passed("after", result)
        return result

    wrapped = waited if inspect.iscoroutinefunction(function) else called
    setattr(owner, name, functools.wraps(function)(wrapped))


class RebuildProcess:
    """One run of ``cdc-sync rebuild``."""

    def __init__(self, order: Order, log_path: Path, sabotage: Break | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        self.log_path = log_path
        self._end, theirs = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(
            target=_main, args=(order, str(log_path), theirs, sabotage), daemon=True
        )
        self._process.start()
        theirs.close()

    def kill(self) -> None:
        """kill -9, unless it has ended by itself: its process id may be another's by now."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def died(self) -> None:
        """Wait until it has died at its place."""
        self._process.join(_PATIENCE_SECONDS)
        assert self._process.exitcode == EXIT_CODE, (self._process.exitcode, self.log())

    def outcome(self) -> str:
        """Wait until it has ended by itself; returns the outcome, or what was wrong."""
        self._process.join(_PATIENCE_SECONDS)
        assert self._process.exitcode == 0, (self._process.exitcode, self.log())
        return str(self._end.recv())

    def close(self) -> None:
        self.kill()
        self._end.close()

    def log(self, characters: int = 6000) -> str:
        return self.log_path.read_text(errors="replace")[-characters:]


def _main(order: Order, log_path: str, end: Pipe, sabotage: Callable[[], None] | None) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    monitor.INTERVAL_SECONDS = 0.1
    retry.MAX_BACKOFF_SECONDS = 0.3
    conducting._RETRY_SECONDS = 0.2  # type: ignore[misc]
    if sabotage is not None:
        sabotage()

    def say(line: str) -> None:
        os.write(1, f"{line}\n".encode())

    try:
        end.send(conducting.rebuild(order, say).outcome.value)
    except CdcSyncError as error:
        end.send(f"{error.kind.value}: {error.message}")


def quick_settings(settings: Settings) -> Settings:
    """The settings with logs that a file can have."""
    log = settings.log.model_copy(update={"format": "json", "level": "debug"})
    return settings.model_copy(update={"log": log})
