"""A real pipeline in a process of its own: the benchmark's end; the other is
:mod:`tests.bench.pipeline_process`.

It is not a process of :mod:`multiprocessing`, which would have it, and its copy workers, import all
that the benchmark imports; their memory is measured.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Final, Self

from cdc_sync.config import Settings
from tests.bench.usage import Reading, Report

_ROOT: Final = Path(__file__).parents[2]
_PATIENCE_SECONDS: Final = 900.0


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
        self._log = log
        self._pipe, theirs = Pipe()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.bench.pipeline_process", str(theirs.fileno())],
                cwd=_ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        theirs.close()
        self._pipe.send((settings, null, others, os.getpid()))

    @property
    def pid(self) -> int:
        """Process id."""
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
        if self._process.wait(60) != 0:
            raise RuntimeError(f"a pipeline did not end well:\n{self.log_tail()}")

    def close(self) -> None:
        """End it, however it stands."""
        self._process.kill()
        self._process.wait()
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
