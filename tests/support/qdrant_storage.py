"""Collections of the Qdrant test server: one embedded shard each, an ordered queue of writes,
metadata on disk.

A write is journaled (when it is not waited for) and queued in the order of arrival; one thread a
collection applies the queue. The engine keeps a WAL, so whatever was applied survives kill -9; what
was acknowledged but not yet applied is in the journal and is applied when the collection is loaded
again.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import qdrant_edge as edge
from qdrant_client import grpc as q

from tests.support.qdrant_edits import Edit, parsed
from tests.support.qdrant_schema import collection_config, engine_config, update_config
from tests.support.qdrant_status import (
    RefusalError,
    already_exists,
    collection_missing,
    from_engine,
    internal,
    not_found,
    wrong_input,
)

_log = logging.getLogger("qdrant_server")
_IDLE_SECONDS = 5.0
"""A collection that has been idle so long is flushed: a server's ``flush_interval_sec``."""
_FLUSH_EVERY = 200
"""Operations between two flushes under load."""


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Journal:
    """Writes acknowledged but not yet applied. A header holds the offset of the first of them."""

    _HEADER = struct.Struct("<Q")
    _LENGTH = struct.Struct("<I")

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._end = max(os.fstat(self._file).st_size, self._HEADER.size)
        head = os.pread(self._file, self._HEADER.size, 0)
        start = self._HEADER.unpack(head)[0] if len(head) == self._HEADER.size else 0
        self._start = min(max(start, self._HEADER.size), self._end)
        self._lock = threading.Lock()

    def append(self, record: bytes) -> None:
        with self._lock:
            os.pwrite(self._file, self._LENGTH.pack(len(record)) + record, self._end)
            self._end += self._LENGTH.size + len(record)

    def applied(self) -> None:
        """Take the oldest record off."""
        with self._lock:
            (length,) = self._LENGTH.unpack(os.pread(self._file, self._LENGTH.size, self._start))
            self._start += self._LENGTH.size + length
            if self._start == self._end:
                os.ftruncate(self._file, self._HEADER.size)
                self._start = self._end = self._HEADER.size
            os.pwrite(self._file, self._HEADER.pack(self._start), 0)

    def pending(self) -> Iterator[bytes]:
        """The records not yet applied, oldest first; each is taken off once the next one is asked
        for.
        """
        while self._start + self._LENGTH.size <= self._end:
            (length,) = self._LENGTH.unpack(os.pread(self._file, self._LENGTH.size, self._start))
            if self._start + self._LENGTH.size + length > self._end:
                break  # a torn tail: its write was never acknowledged
            yield os.pread(self._file, length, self._start + self._LENGTH.size)
            self.applied()
        os.ftruncate(self._file, self._HEADER.size)
        self._start = self._end = self._HEADER.size
        os.pwrite(self._file, self._HEADER.pack(self._start), 0)

    def close(self) -> None:
        os.close(self._file)


@dataclass(slots=True)
class _Job:
    edit: Edit
    journaled: bool
    arrived: float = field(default_factory=time.monotonic)
    done: Future[None] = field(default_factory=Future)


class Collection:
    """A collection with its shard. Writes go through :meth:`submit`, reads use :attr:`shard`
    directly.
    """

    def __init__(
        self, directory: Path, name: str, info: q.CollectionInfo, shard: edge.EdgeShard
    ) -> None:
        self.name = name
        self.shard = shard
        self.lag = 0.0
        self._directory = directory
        self._info = info
        self._journal = Journal(directory / "journal")
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._order = threading.Lock()
        self._closing = threading.Event()
        self._operations = 0
        self._unflushed = 0
        self._replay()
        self._worker = threading.Thread(target=self._work, name=f"apply {name}", daemon=True)
        self._worker.start()

    @classmethod
    def create(cls, directory: Path, name: str, config: q.CollectionConfig) -> Collection:
        directory.mkdir()
        shard = edge.EdgeShard.create(str(directory / "shard"), engine_config(config))
        collection = cls(directory, name, q.CollectionInfo(config=config), shard)
        collection._save()
        return collection

    @classmethod
    def load(cls, directory: Path) -> Collection:
        name, _, info = (directory / "collection").read_bytes().partition(b"\n")
        shard = edge.EdgeShard.load(str(directory / "shard"))
        return cls(directory, json.loads(name), q.CollectionInfo.FromString(info), shard)

    def _save(self) -> None:
        content = json.dumps(self.name).encode() + b"\n" + self._info.SerializeToString()
        _write_atomically(self._directory / "collection", content)

    @property
    def config(self) -> q.CollectionConfig:
        return self._info.config

    def change(self, request: q.UpdateCollection) -> None:
        with self._order:
            self._info.config.CopyFrom(update_config(self._info.config, request))
            self._save()

    def describe(self) -> q.CollectionInfo:
        """What `Collections.Get` answers."""
        state = self.shard.info()
        info = q.CollectionInfo()
        info.CopyFrom(self._info)
        info.status = q.Green
        info.optimizer_status.ok = True
        info.segments_count = state.segments_count
        info.points_count = state.points_count
        info.indexed_vectors_count = state.indexed_vectors_count
        info.update_queue.length = self._jobs.qsize()
        for name, index in state.payload_schema.items():
            if name in info.payload_schema:
                info.payload_schema[name].points = index.points
        return info

    def submit(self, edit: Edit, record: bytes | None = None) -> tuple[int, Future[None]]:
        """Queue a write; with ``record`` it is journaled first. Returns its number and what tells
        when it is applied.
        """
        job = _Job(edit, record is not None)
        with self._order:
            if self._closing.is_set():
                raise collection_missing(self.name)
            if record is not None:
                self._journal.append(record)
            number = self._operations
            self._operations += 1
            self._jobs.put(job)
        return number, job.done

    def _replay(self) -> None:
        for record in self._journal.pending():
            try:
                self._apply(parsed(record))
            except RefusalError as refusal:
                _log.warning("%s: journaled update declined: %s", self.name, refusal.message)

    def _apply(self, edit: Edit) -> None:
        try:
            self.shard.update(edit.operation)
        except Exception as error:  # the engine has no exception class of its own
            raise from_engine(error) from error
        if edit.index is not None:
            name, info = edit.index
            self._info.payload_schema[name].CopyFrom(info)
            self._save()
        if edit.drops_index is not None:
            self._info.payload_schema.pop(edit.drops_index, None)
            self._save()

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                self._flush()
                continue
            if job is None:
                return
            if job.journaled and self.lag:
                # Counted from its arrival, so that a burst of writes is not slowed down one by one.
                self._closing.wait(max(0.0, job.arrived + self.lag - time.monotonic()))
            self._finish(job)
            self._unflushed += 1
            if self._unflushed >= _FLUSH_EVERY:
                self._flush()

    def _finish(self, job: _Job) -> None:
        refusal: RefusalError | None = None
        try:
            self._apply(job.edit)
        except RefusalError as error:
            refusal = error
        # A panic of the engine is a BaseException, and must not end the worker.
        except BaseException as error:  # noqa: BLE001
            refusal = internal(f"panic: {error}")
        if job.journaled:
            self._journal.applied()
        if refusal is None:
            job.done.set_result(None)
            return
        if job.journaled:
            _log.warning("%s: update operation declined: %s", self.name, refusal.message)
        job.done.set_exception(refusal)

    def _flush(self) -> None:
        if self._unflushed:
            self.shard.flush()
            self._unflushed = 0

    def close(self) -> None:
        """Apply what is queued, stop the worker, close the shard."""
        with self._order:
            if self._closing.is_set():
                return
            self._closing.set()
            self._jobs.put(None)
        self._worker.join()
        self.shard.close()
        self._journal.close()

    def drop(self) -> None:
        """Close and remove from disk. The metadata file goes first: without it the rest is garbage
        at the next start.
        """
        (self._directory / "collection").unlink()
        self.close()
        shutil.rmtree(self._directory)


class Registry:
    """All collections under a directory, and the aliases."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._lag = 0.002
        self._collections: dict[str, Collection] = {}
        self._aliases: dict[str, str] = {}
        for directory in sorted(root.iterdir()):
            if (directory / "collection").exists():
                self._add(Collection.load(directory))
            elif directory.is_dir():
                shutil.rmtree(directory)
        aliases = root / "aliases.json"
        if aliases.exists():
            self._aliases = json.loads(aliases.read_bytes())

    def _add(self, collection: Collection) -> None:
        collection.lag = self._lag
        self._collections[collection.name] = collection

    def _save_aliases(self) -> None:
        _write_atomically(self._root / "aliases.json", json.dumps(self._aliases).encode())

    def set_lag(self, seconds: float) -> None:
        """Delay between the acknowledgement of a `wait=false` write and its application."""
        with self._lock:
            self._lag = seconds
            for collection in self._collections.values():
                collection.lag = seconds

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._collections)

    def resolve(self, name: str) -> str:
        """The name of the collection an alias stands for; any other name as it is."""
        with self._lock:
            return self._aliases.get(name, name)

    def exists(self, name: str) -> bool:
        """Whether a collection or alias has the name."""
        with self._lock:
            return self.resolve(name) in self._collections

    def get(self, name: str) -> Collection:
        """The collection of this name or alias."""
        with self._lock:
            collection = self._collections.get(self.resolve(name))
        if collection is None:
            raise collection_missing(name)
        return collection

    def create(self, request: q.CreateCollection) -> None:
        name = request.collection_name
        config = collection_config(request)
        with self._lock:
            if name in self._collections:
                raise already_exists(name)
            if name in self._aliases:
                raise wrong_input(
                    f"Can't create collection with name {name}. "
                    "Alias with the same name already exists"
                )
            self._add(Collection.create(self._root / uuid.uuid4().hex, name, config))

    def delete(self, name: str) -> bool:
        """Remove the collection and its aliases; False when there is none of this name. Aliases are
        not resolved.
        """
        with self._lock:
            collection = self._collections.pop(name, None)
            pointing = [alias for alias, target in self._aliases.items() if target == name]
            for alias in pointing:
                del self._aliases[alias]
            if pointing:
                self._save_aliases()
        if collection is None:
            return False
        collection.drop()
        return True

    def change_aliases(self, actions: list[q.AliasOperations]) -> None:
        """Apply the actions in order, all seen at once by readers; the first bad one stops (earlier
        ones stay).
        """
        with self._lock:
            try:
                for action in actions:
                    self._change_alias(action)
            finally:
                self._save_aliases()

    def _change_alias(self, action: q.AliasOperations) -> None:
        kind = action.WhichOneof("action")
        if kind == "create_alias":
            create = action.create_alias
            if create.collection_name not in self._collections:
                raise collection_missing(create.collection_name)
            if create.alias_name in self._collections:
                raise already_exists(create.alias_name)
            self._aliases[create.alias_name] = create.collection_name
        elif kind == "delete_alias":
            self._aliases.pop(action.delete_alias.alias_name, None)
        elif kind == "rename_alias":
            rename = action.rename_alias
            if rename.old_alias_name not in self._aliases:
                raise not_found(f"Alias {rename.old_alias_name} does not exists!")
            self._aliases[rename.new_alias_name] = self._aliases.pop(rename.old_alias_name)

    def aliases(self, collection: str | None = None) -> list[tuple[str, str]]:
        """(alias, collection) pairs, of one collection or of all."""
        with self._lock:
            pairs = sorted(self._aliases.items())
        return [pair for pair in pairs if collection in (None, pair[1])]

    def close(self) -> None:
        with self._lock:
            for collection in self._collections.values():
                collection.close()
