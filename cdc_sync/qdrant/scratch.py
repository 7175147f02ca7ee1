"""Collections for a moment, to measure what Qdrant takes: made, filled, and always removed.

On a server they lie beside the others, by a name of their own kind. An embedded database can be
open in one process only, so beside it, on the same disk, one is made for them alone. What a killed
process has left is found by its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ErrorKind, SinkError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant.open import edge_directory, open_sink
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import PreparedRequest, Sink, TableWriter
from cdc_sync.rows import PointId, Row

#: How the names of all of them begin; when they were made and a random part follow.
PREFIX: Final = "_cdc_sync_bench_"
_REMEDY: Final = "Remove it once Qdrant answers: cdc-sync bench --remove-leftovers"


@runtime_checkable
class PreparingWriter(TableWriter, Protocol):
    """A writer that can encode requests beforehand."""

    def prepare(self, rows: Sequence[tuple[PointId, Row]]) -> list[PreparedRequest]:
        """Encode rows of which points can be made; what is sent later is all of them."""
        ...


class Scratch:
    """A collection that is made as the table's own would be, and removed at the end."""

    def __init__(self, sink: Sink, plan: TablePlan, *, defer_hnsw: bool) -> None:
        self._sink = sink
        self._plan = plan
        self._defer_hnsw = defer_hnsw
        self._made = False

    @property
    def name(self) -> str:
        """The collection's name."""
        return self._plan.collection

    @property
    def version(self) -> str:
        """Server or engine version."""
        return self._sink.version

    async def fresh(self) -> PreparingWriter:
        """Make the collection, anew if it is there, and return a writer for it. Raises
        :class:`SinkError`."""
        if self._made:
            await self.remove()
        self._made = True
        await self._sink.ensure_collection(self._plan, defer_hnsw=self._defer_hnsw)
        return self.writer()

    def writer(self) -> PreparingWriter:
        """A writer for the collection as it is."""
        writer = self._sink.writer(self._plan)
        assert isinstance(writer, PreparingWriter)
        return writer

    async def remove(self) -> None:
        """Remove it, present or not. Raises :class:`SinkError`."""
        await self._sink.drop_collection(self._plan)


@contextlib.asynccontextmanager
async def scratch_collection(
    settings: QdrantSettings, plan: TablePlan, *, defer_hnsw: bool = False
) -> AsyncIterator[Scratch]:
    """A scratch collection for the plan; it is gone afterwards, also when cancelled.

    Raises as :func:`open_sink`, and :class:`SinkError` naming it where it could not be removed.
    """
    name = f"{PREFIX}{time.strftime('%Y%m%d%H%M%S', time.gmtime())}_{secrets.token_hex(4)}"
    directory = _scratch_directory(settings, name)
    if directory is not None:
        settings = settings.model_copy(update={"url": f"edge:{directory}"})
    try:
        sink = await open_sink(settings)
        try:
            scratch = Scratch(
                sink, dataclasses.replace(plan, collection=name), defer_hnsw=defer_hnsw
            )
            async with _removed(scratch):
                yield scratch
        finally:
            await sink.close()
    finally:
        if directory is not None and directory.exists():
            shutil.rmtree(directory)


@contextlib.asynccontextmanager
async def _removed(scratch: Scratch) -> AsyncIterator[None]:
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        try:
            await _to_the_end(scratch)
        except SinkError as error:
            because = f"{failure}; " if isinstance(failure, SinkError) else ""
            raise SinkError(
                error.kind,
                f"{because}the scratch collection {scratch.name} could not be removed: "
                f"{error.message}",
                _REMEDY,
            ) from error


async def _to_the_end(scratch: Scratch) -> None:
    """Remove it, however often somebody cancels meanwhile."""
    removing = asyncio.ensure_future(scratch.remove())
    cancelled: asyncio.CancelledError | None = None
    while not removing.done():
        try:
            await asyncio.wait({removing})
        except asyncio.CancelledError as error:
            cancelled = error
    removing.result()
    if cancelled is not None:
        raise cancelled


async def leftovers(settings: QdrantSettings) -> list[str]:
    """What killed processes have left: names of collections, or directories beside an embedded
    database. On a server another process may just be using one. Raises as :func:`open_sink`."""
    path = edge_directory(settings)
    if path is not None:
        return [str(directory) for directory in _left_directories(path)]
    sink = await open_sink(settings)
    try:
        assert isinstance(sink, ServerSink)
        return sorted(name for name in await sink.collections() if name.startswith(PREFIX))
    finally:
        await sink.close()


async def remove_leftovers(settings: QdrantSettings, names: Sequence[str]) -> None:
    """Remove what :func:`leftovers` returned. Raises as :func:`open_sink`, and
    :class:`SinkError`."""
    if edge_directory(settings) is not None:
        for name in names:
            try:
                shutil.rmtree(name)
            except OSError as error:
                raise SinkError(
                    ErrorKind.SINK_UNAVAILABLE,
                    f"{name} cannot be removed: {error.strerror}.",
                    "Remove it by hand.",
                ) from error
        return
    sink = await open_sink(settings)
    try:
        assert isinstance(sink, ServerSink)
        for name in names:
            await sink.drop(name)
    finally:
        await sink.close()


def _scratch_directory(settings: QdrantSettings, name: str) -> Path | None:
    path = edge_directory(settings)
    if path is None:
        return None
    # Within it if it exists, since it may be a mounted disk of its own.
    while not path.is_dir():
        path = path.parent
    return path / name


def _left_directories(path: Path) -> Iterator[Path]:
    while not path.is_dir():
        path = path.parent
    for place in (path, path.parent):
        for directory in sorted(place.glob(f"{PREFIX}*")):
            if directory.is_dir() and not _in_use(directory):
                yield directory


def _in_use(directory: Path) -> bool:
    lock = directory / "lock"
    if not lock.is_file():
        return False
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
