"""Places in the program where a test has it die: between "read from Postgres" and "confirmed to
Postgres", and between the steps of a copy.

The program knows nothing of them. A failpoint names a function of it; :func:`arm` wraps that
function, in a process that runs a pipeline, so that the process ends there at the n-th pass, as
kill -9 would end it: nothing is flushed, closed or said.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from cdc_sync.sync import monitor

#: As after kill -9.
EXIT_CODE: Final = 137
_LOOK_SECONDS: Final = 1.0

SinkName = Literal["server", "edge"]
_WRITES: Final = ("Upsert", "Delete", "UpdateBatch", "SetPayload", "OverwritePayload")


def _any(arguments: tuple[Any, ...], result: object) -> bool:
    return True


def _something(arguments: tuple[Any, ...], result: object) -> bool:
    return bool(result)


def _a_write(arguments: tuple[Any, ...], result: object) -> bool:
    return arguments[1].name in _WRITES


@dataclass(frozen=True)
class Failpoint:
    """``function``: ``module:Class.function``; the process dies ``before`` or ``after`` it, in the
    latter case if the call ``counts``, by its arguments and result. ``needs``: what has to be done
    for the pipeline to come there (see ``crash_series.py``); ``passes``: how often it passes there
    for sure once that is done."""

    name: str
    function: str
    place: Literal["before", "after"]
    needs: str = ""
    sink: SinkName = "server"
    counts: Callable[[tuple[Any, ...], object], bool] = _any
    passes: int = 5


_APPLIER: Final = "cdc_sync.sync.applier:Applier"
_WRITER: Final = "cdc_sync.qdrant.writer:ServerWriter"
_STATE: Final = "cdc_sync.qdrant.server_state:ServerStateStore"
_SINK: Final = "cdc_sync.qdrant.server:ServerSink"
_CONNECTION: Final = "cdc_sync.postgres.replication:ReplicationConnection"
_GATHERER: Final = "cdc_sync.sync.gather:Gatherer"
_BACKFILL: Final = "cdc_sync.sync.backfill:Backfill"
_RESYNC: Final = "cdc_sync.sync.resync:Resync"
_READER: Final = "cdc_sync.sync.reading:RowReader"
_EDGE: Final = "cdc_sync.qdrant.edge_database:EdgeDatabase"
_FILES: Final = "cdc_sync.qdrant.file_state:FileStateStore"

_ALL: Final = (
    # The stream, in the order in which a change passes.
    Failpoint("frames read", f"{_CONNECTION}.read", "after", counts=_something),
    Failpoint("batch taken", f"{_GATHERER}.take", "after"),
    Failpoint("before apply", f"{_APPLIER}.apply", "before"),
    Failpoint("tables noted", f"{_RESYNC}.note", "after"),
    Failpoint("before a table", f"{_APPLIER}._apply_table", "before"),
    Failpoint("before requests", f"{_WRITER}.apply", "before"),
    Failpoint("answer not processed", "cdc_sync.qdrant.rpc:Rpc.call", "after", counts=_a_write),
    Failpoint("requests completed", f"{_WRITER}.apply", "after"),
    Failpoint("before rows are fetched", f"{_READER}.fetch", "before", "missing"),
    Failpoint("rows fetched", f"{_READER}.fetch", "after", "missing"),
    Failpoint("after a table", f"{_APPLIER}._apply_table", "after"),
    Failpoint("before a clear", f"{_WRITER}.clear", "before", "truncate"),
    Failpoint("after a clear", f"{_WRITER}.clear", "after", "truncate"),
    Failpoint("before rows are reread", f"{_READER}.reread", "before", "rows"),
    Failpoint("rows reread", f"{_READER}.reread", "after", "rows"),
    Failpoint("before a letter is parked", f"{_STATE}.park", "before", "poison"),
    Failpoint("letter parked", f"{_STATE}.park", "after", "poison"),
    Failpoint("before a letter is released", f"{_STATE}.release", "before", "poison"),
    Failpoint("letter released", f"{_STATE}.release", "after", "poison"),
    Failpoint("applied", f"{_APPLIER}.apply", "after"),
    Failpoint("before it is durable", f"{_SINK}.make_durable", "before"),
    Failpoint("durable", f"{_SINK}.make_durable", "after"),
    Failpoint("before the status", f"{_CONNECTION}.send_status", "before"),
    Failpoint("after the status", f"{_CONNECTION}.send_status", "after"),
    # A first copy.
    Failpoint("before the record", f"{_STATE}.save", "before", "copy", passes=2),
    Failpoint("record saved", f"{_STATE}.save", "after", "copy", passes=2),
    Failpoint("collection made", f"{_SINK}.ensure_collection", "after", "copy", passes=2),
    Failpoint("before the slot", f"{_CONNECTION}.create_slot", "before", "copy", passes=1),
    Failpoint("slot made", f"{_CONNECTION}.create_slot", "after", "copy", passes=1),
    Failpoint("copy begun", f"{_BACKFILL}.begin", "after", "copy", passes=2),
    Failpoint("chunk done", f"{_BACKFILL}._done", "before", "copy"),
    Failpoint("chunk counted", f"{_BACKFILL}._done", "after", "copy"),
    Failpoint("before the ledger", f"{_STATE}.save_ledger", "before", "copy", passes=4),
    Failpoint("ledger saved", f"{_STATE}.save_ledger", "after", "copy", passes=4),
    Failpoint("before a letter of the copy", f"{_STATE}.park", "before", "copy", passes=1),
    Failpoint("letter of the copy parked", f"{_STATE}.park", "after", "copy", passes=1),
    Failpoint("all chunks done", f"{_RESYNC}.complete", "before", "copy", passes=2),
    Failpoint("copy on record", f"{_STATE}.drop_ledger", "before", "copy", passes=2),
    Failpoint("ledger dropped", f"{_STATE}.drop_ledger", "after", "copy", passes=2),
    # A resync, which sweeps.
    Failpoint("points without a row found", f"{_BACKFILL}._remove", "before", "resync", passes=1),
    Failpoint("points without a row gone", f"{_BACKFILL}._remove", "after", "resync", passes=1),
    Failpoint("resync on record", f"{_RESYNC}.complete", "after", "resync", passes=1),
    # The embedded database.
    Failpoint("edge: batch applied", f"{_APPLIER}.apply", "after", sink="edge"),
    Failpoint("edge: step written", f"{_EDGE}.update", "after", sink="edge"),
    Failpoint("edge: before a flush", f"{_EDGE}.flush", "before", sink="edge"),
    Failpoint("edge: flushed", f"{_EDGE}.flush", "after", sink="edge"),
    Failpoint("edge: before a record", f"{_FILES}._write", "before", "resync", sink="edge"),
    Failpoint(
        "edge: record not renamed",
        "cdc_sync.qdrant.file_state:os.fsync",
        "after",
        "resync",
        sink="edge",
    ),
    Failpoint("edge: record written", f"{_FILES}._write", "after", "resync", sink="edge"),
)

FAILPOINTS: Final = {one.name: one for one in _ALL}


def resolve(failpoint: Failpoint) -> tuple[Any, str]:
    """What holds the function, and its name there. Raises AttributeError, ImportError."""
    module, _, path = failpoint.function.partition(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    getattr(owner, name)
    return owner, name


def arm_after(sabotage: Callable[[], None] | None, name: str, passes: int) -> None:
    """Arm a failpoint in a program that was changed before. A life that is to end soon need not
    look at the catalog as often as others of the tests."""
    monitor.INTERVAL_SECONDS = _LOOK_SECONDS
    if sabotage is not None:
        sabotage()
    arm(name, passes)


def arm(name: str, passes: int) -> None:
    """End this process at the failpoint, when it is passed for the ``passes``-th time."""
    failpoint = FAILPOINTS[name]
    owner, attribute = resolve(failpoint)
    function = getattr(owner, attribute)
    left = [passes]

    def passed() -> None:
        left[0] -= 1
        if left[0] <= 0:
            os._exit(EXIT_CODE)

    async def waited(*arguments: Any, **keywords: Any) -> Any:
        if failpoint.place == "before":
            passed()
        result = await function(*arguments, **keywords)
        if failpoint.place == "after" and failpoint.counts(arguments, result):
            passed()
        return result

    def called(*arguments: Any, **keywords: Any) -> Any:
        if failpoint.place == "before":
            passed()
        result = function(*arguments, **keywords)
        if failpoint.place == "after" and failpoint.counts(arguments, result):
            passed()
        return result

    wrapped = waited if inspect.iscoroutinefunction(function) else called
    setattr(owner, attribute, functools.wraps(function)(wrapped))
