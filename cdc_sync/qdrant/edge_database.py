"""The embedded database: Qdrant Edge shards in a directory, one a collection.

Layout under the path of ``qdrant.url = "edge:/path"``:

    lock                               locked (flock) by the process that has it open; its pid
    collections/<name>/                one Edge shard: edge_config.json, segments/, wal/
    collections/<name>.new/            left of an interrupted creation, removed by the next
    state/pipelines/<pipeline>.json    the pipeline's record
    state/marks/<pipeline>.json        how far the source was known to be
    state/dead_letters/<pipeline>.json its dead letters, a list

``<name>`` is the collection's name percent-encoded (everything but letters, digits, ``_``, ``-``
and ``~``; dots too). Nothing is created before the first write. Shards have their WAL on: what
``update`` returned from survives a kill, and what :meth:`EdgeDatabase.flush` returned from survives
a power loss.

All calls run in one thread of their own, since the engine serializes them anyway and holds the
interpreter lock while it updates; steps are kept small (:data:`STEP_POINTS`) so that the event loop
gets its turn.

**Optimizing**: Edge has no background optimizer, and ``optimize()`` holds the interpreter lock
until it is done (25 s for 20,000 vectors of 1,536 dimensions), during which no replication
connection is served, and Postgres drops one after a minute by default. So it never runs by itself:
without it, vectors are searched exactly and without HNSW, which is fine up to some hundred
thousand. :meth:`cdc_sync.qdrant.edge.EdgeSink.optimize` is there for programs that hold no such
connection.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, ParamSpec, TypeVar
from urllib.parse import quote

from cdc_sync.errors import ConfigError, ErrorKind, SinkError, StateError

if TYPE_CHECKING:
    import qdrant_edge as edge

#: Points an update, at most.
STEP_POINTS: Final = 256

P = ParamSpec("P")
T = TypeVar("T")


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its parents, durably."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


class EdgeDatabase:
    """An open directory of shards. Only :meth:`run`, :attr:`path` and :meth:`close` are for the
    event loop's thread.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._collections = path / "collections"
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="qdrant-edge")
        self._lock: IO[str] | None = None
        self._shards: dict[str, edge.EdgeShard] = {}
        self._dirty: set[str] = set()
        self._closed = False

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in the database's thread; when cancelled, await its end first."""
        future = self._thread.submit(function, *args, **kwargs)
        wrapped = asyncio.wrap_future(future)
        cancelled: asyncio.CancelledError | None = None
        while not wrapped.done():
            try:
                await asyncio.wait((wrapped,))
            except asyncio.CancelledError as exc:
                cancelled = exc
        if cancelled is not None:
            raise cancelled
        return wrapped.result()

    def open(self) -> None:
        """Take the lock if the database exists; else nothing is done yet. Raises ConfigError,
        :class:`SinkError`.
        """
        if self.path.exists():
            self.lock()

    def lock(self) -> None:
        """Create the database's directory if need be and take its lock, once."""
        if self._lock is not None:
            return
        try:
            make_directory(self.path)
            lock = (self.path / "lock").open("a+", encoding="ascii")
        except OSError as exc:
            raise ConfigError(
                f"The embedded database {self.path} cannot be opened: {exc.strerror}.",
                "Name a directory in qdrant.url that this user may create and write.",
            ) from exc
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            lock.seek(0)
            holder = lock.read(20).strip()
            lock.close()
            raise SinkError(
                ErrorKind.SINK_UNAVAILABLE,
                f"The embedded database {self.path} is in use by another process"
                f"{f' (pid {holder})' if holder.isdigit() else ''}.",
                "Stop the other process; an embedded database can be open in one process only.",
            ) from exc
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._lock = lock

    def directory(self, collection: str) -> Path:
        """The directory of a collection's shard."""
        return self._collections / quote(collection, safe="").replace(".", "%2E")

    def exists(self, collection: str) -> bool:
        """Whether the collection exists."""
        return collection in self._shards or self.directory(collection).is_dir()

    def shard(self, collection: str) -> edge.EdgeShard:
        """The collection's shard, loaded if it is not yet. Raises COLLECTION_MISSING,
        :class:`StateError`.
        """
        shard = self._shards.get(collection)
        if shard is not None:
            return shard
        directory = self.directory(collection)
        if not directory.is_dir():
            raise SinkError(
                ErrorKind.COLLECTION_MISSING,
                f"Collection {collection} does not exist in {self.path}.",
            )
        self.config(collection)
        # Here and in create() only: records alone need no engine, which takes 4 to 13 MB.
        import qdrant_edge as edge

        try:
            shard = edge.EdgeShard.load(str(directory))
        except Exception as exc:  # the engine raises nothing more precise
            if "WouldBlock" in str(exc):
                # Its WAL is locked, though not by us: somebody has loaded the shard by itself.
                raise SinkError(
                    ErrorKind.SINK_UNAVAILABLE,
                    f"Collection {collection} in {self.path} is open in another program.",
                    "Close the other program.",
                ) from exc
            raise _damaged(directory, str(exc)) from exc
        self._shards[collection] = shard
        return shard

    def config(self, collection: str) -> dict[str, object]:
        """The collection's ``edge_config.json``. Raises :class:`StateError`."""
        path = self.directory(collection) / "edge_config.json"
        try:
            config = json.loads(path.read_bytes())
        except (OSError, ValueError) as exc:
            raise _damaged(path, str(exc)) from exc
        if not isinstance(config, dict):
            raise _damaged(path, "it is not a JSON object")
        return config

    def create(
        self, collection: str, config: edge.EdgeConfig, operations: list[edge.UpdateOperation]
    ) -> None:
        """Create a collection with first operations, all or nothing: it is prepared beside its
        place and renamed.
        """
        self.lock()
        directory = self.directory(collection)
        prepared = directory.with_name(directory.name + ".new")
        make_directory(self._collections)
        if prepared.exists():
            shutil.rmtree(prepared)
        import qdrant_edge as edge

        try:
            shard = edge.EdgeShard.create(str(prepared), config)
            for operation in operations:
                shard.update(operation)
            shard.flush()
            shard.close()
        except Exception as exc:  # the engine raises nothing more precise
            raise SinkError(
                ErrorKind.SINK_REFUSED,
                f"Collection {collection} cannot be created: {first_line(exc)}.",
            ) from exc
        prepared.rename(directory)
        sync_directory(self._collections)

    def drop(self, collection: str) -> None:
        """Remove a collection, present or not. It is out of its place before anything of it is
        removed.
        """
        self.lock()
        shard = self._shards.pop(collection, None)
        if shard is not None:
            shard.close()
        self._dirty.discard(collection)
        directory = self.directory(collection)
        if not directory.is_dir():
            return
        removed = directory.with_name(directory.name + ".old")
        if removed.exists():
            shutil.rmtree(removed)
        directory.rename(removed)
        sync_directory(self._collections)
        shutil.rmtree(removed)

    def update(self, collection: str, operation: edge.UpdateOperation) -> None:
        """Apply an operation. Raises what the engine raises, besides what :meth:`shard` does."""
        shard = self.shard(collection)
        self._dirty.add(collection)
        shard.update(operation)

    def flush(self) -> None:
        """Make all that was applied survive a power loss."""
        for collection in sorted(self._dirty):
            try:
                self._shards[collection].flush()
            except Exception as exc:  # the engine raises nothing more precise
                raise SinkError(
                    ErrorKind.SINK_UNKNOWN,
                    f"Collection {collection} in {self.path} cannot be flushed: {first_line(exc)}.",
                    "See whether the disk is full or failing.",
                ) from exc
            self._dirty.discard(collection)

    def optimize(self) -> None:
        """Index and compact every collection that was loaded. Takes long and stops all Python
        threads meanwhile.
        """
        for collection, shard in self._shards.items():
            self._dirty.add(collection)
            shard.optimize()
        self.flush()

    def _close(self) -> None:
        try:
            self.flush()
        finally:
            for shard in self._shards.values():
                shard.close()
            self._shards.clear()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    async def close(self) -> None:
        """Flush, close all shards, release the lock. May be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            await self.run(self._close)
        finally:
            self._thread.shutdown(wait=False)


def first_line(exc: Exception) -> str:
    """The first line of an engine's error, which goes without a backtrace."""
    lines = str(exc).splitlines()
    return lines[0].rstrip(".") if lines else type(exc).__name__


def _damaged(path: Path, why: str) -> StateError:
    return StateError(
        f"{path} in the embedded database is damaged: {' '.join(why.split())[:200]}.",
        "Restore it from a backup, or remove the collection's directory and copy anew with "
        "--migration.restart.",
    )
