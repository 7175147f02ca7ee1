"""``cdc-sync demo``: embedded Postgres and Qdrant, a real data set, the pipeline between."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import psycopg
from psycopg import Connection
from pydantic import SecretStr

from cdc_sync.config import (
    HttpSettings,
    MigrationSettings,
    PipelineSettings,
    QdrantSettings,
    Settings,
    SourceSettings,
    TableSettings,
)
from cdc_sync.demo.dataset import Dataset, load_dataset
from cdc_sync.demo.embedded import PostgresServer, find_binaries
from cdc_sync.demo.screen import Screen
from cdc_sync.demo.session import Session
from cdc_sync.demo.table import TABLE, create_indexes, create_table, load_rows
from cdc_sync.demo.verdict import Verdict
from cdc_sync.errors import ConfigError, ExitCode
from cdc_sync.postgres.connect import translate

#: How long the writer writes unless told otherwise.
WRITING_SECONDS: Final = 20.0
#: Exit code after Ctrl-C or SIGTERM, as of a program that the signal ended.
INTERRUPTED: Final = 128 + signal.SIGINT

_NAME: Final = "cdc_sync_demo"


def run_demo(
    *,
    keep: bool = False,
    rows: int | None = None,
    directory: Path | None = None,
    plain: bool = False,
    seconds: float = WRITING_SECONDS,
) -> int:
    """Run the demo and return its exit code.

    0 if at the end every row equals its point, 3 if not, 130 if interrupted. ``keep`` leaves
    Postgres and the pipeline running after the verdict, until Ctrl-C. ``rows`` (1 to 2000) takes
    only so many rows at first. ``directory``, which must be empty or absent, receives the data of
    both sides and stays; without it they go to a temporary directory. ``plain`` prints lines only.
    ``seconds`` is how long the writer writes.

    Raises ConfigError when the extra ``demo`` is not installed or an argument cannot work,
    otherwise what ended the pipeline. The servers are stopped in every case.
    """
    _check_extra()
    if seconds <= 0:
        raise ConfigError("The writer needs some time.", "Give a positive number of seconds.")
    dataset = load_dataset(rows)
    if (
        directory is not None
        and directory.exists()
        and (not directory.is_dir() or any(directory.iterdir()))
    ):
        raise ConfigError(
            f"{directory} is not an empty directory.",
            "Name an empty one, or one that does not exist yet.",
        )
    screen = Screen.open(plain)
    try:
        verdict = _run(screen, dataset, directory, seconds, keep)
    except KeyboardInterrupt:
        screen.note("Interrupted; the servers are stopped.")
        return INTERRUPTED
    except psycopg.Error as exc:
        raise translate(exc, "running the demo") from exc
    return int(ExitCode.OK if verdict.equal else ExitCode.DIFFERENCES)


def _run(
    screen: Screen, dataset: Dataset, directory: Path | None, seconds: float, keep: bool
) -> Verdict:
    screen.heading("Postgres with pgvector, and Qdrant, both embedded")
    with (
        PostgresServer(directory=directory) as server,
        psycopg.connect(server.url(), autocommit=True) as connection,
    ):
        screen.note(f"Postgres {server.binaries.version} listens on {server.host}:{server.port}")
        _fill(screen, connection, dataset)
        # Beside Postgres's data: whatever removes the one, also after a crash, removes the other.
        settings = demo_settings(server.url(), server.directory / "qdrant")

        def explain() -> None:
            screen.heading("Still running; type SQL and watch. Ctrl-C ends it")
            screen.note(f"psql '{server.url()}'")
            screen.note(f"UPDATE {TABLE} SET tags = tags || ARRAY['mine'] WHERE section = 'games';")

        async def stream() -> Verdict:
            with _terminable():
                return await Session(settings, connection, dataset, screen).run(
                    seconds, explain if keep else None
                )

        return asyncio.run(stream())


def demo_settings(url: str, qdrant_directory: Path) -> Settings:
    """The configuration of the demo's pipeline."""
    return Settings(
        source=SourceSettings(url=SecretStr(url), slot=_NAME, publication=_NAME),
        qdrant=QdrantSettings(url=f"edge:{qdrant_directory}"),
        tables=[TableSettings(name=TABLE)],
        pipeline=PipelineSettings(name="demo", status_interval_seconds=0.5),
        migration=MigrationSettings(num_workers=1),
        http=HttpSettings(enabled=False),
    )


def _fill(screen: Screen, connection: Connection, dataset: Dataset) -> None:
    """Create the table, load the first rows and index them."""
    version = create_table(connection)
    with screen.progress("loading rows into Postgres", dataset.first) as progress:
        for done in load_rows(connection, dataset):
            progress(done)
    indexes = list(create_indexes(connection))
    screen.note(f"pgvector {version}; indexes: {', '.join(indexes)}")


def _check_extra() -> None:
    find_binaries()
    if importlib.util.find_spec("qdrant_edge") is None:
        raise ConfigError(
            "The demo needs Qdrant Edge, which is not installed.",
            "Install it with: pip install 'cdc-sync[demo]'",
        )


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the running task as Ctrl-C does."""
    task = asyncio.current_task()
    if task is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    cancel: Callable[[], object] = task.cancel
    loop.add_signal_handler(signal.SIGTERM, cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
