"""``resync``: asks a running pipeline to read tables or rows again.

What to read is worked out here, with the operator's own rights: the predicate is evaluated and keys
are checked before anything is asked for. The request itself is a message in the WAL
(:mod:`cdc_sync.sync.control`), so it is not lost if nothing streams at the moment.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError, ErrorKind, ExitCode, SinkError, SourceError, StateError
from cdc_sync.mapping.table import Column
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.control import emit_messages, matching_keys
from cdc_sync.postgres.key_texts import KeyTextError, parse_keys
from cdc_sync.postgres.slot import SlotInfo, read_slot
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import PipelineState, Sink
from cdc_sync.sync.control import (
    KEY_BURST,
    MAX_CONTENT_BYTES,
    MAX_KEYS,
    MAX_VALUE_CHARACTERS,
    PREFIX,
    Key,
    Request,
    request_content,
)
from cdc_sync.sync.planning import is_named, plan_pipeline
from cdc_sync.sync.routing import PlannedTable

_POLL_SECONDS: Final = 0.25
#: Bytes of keys a message; escaped as JSON they take six times as many at the most.
_MESSAGE_BYTES: Final = MAX_CONTENT_BYTES // 8


@dataclass(frozen=True, slots=True)
class Asked:
    """What the operator asked for.

    ``tables`` are names as in SQL; none of them means the only table there is, or with
    ``all_tables`` every one. At most one of ``where``, ``keys`` and ``json_keys`` (each a JSON
    value) is given, else the tables are read as a whole. ``wait_seconds``: how long to wait until
    it is done; None: not at all.
    """

    tables: tuple[str, ...] = ()
    all_tables: bool = False
    where: str | None = None
    keys: tuple[str, ...] | None = None
    json_keys: tuple[str, ...] | None = None
    wait_seconds: float | None = None

    @property
    def whole(self) -> bool:
        """Whether tables are read as a whole."""
        return self.where is None and self.keys is None and self.json_keys is None


def request_resync(settings: Settings, asked: Asked, say: Callable[[str], None]) -> int:
    """Ask for it, and say so line by line; returns the exit code.

    Raises :class:`ConfigError` for tables that are not the pipeline's and keys that are none,
    :class:`SourceError` and :class:`SinkError` when either side is away or knows no such pipeline.
    Nothing has been asked for then.
    """
    return asyncio.run(_request(settings, asked, say))


async def _request(settings: Settings, asked: Asked, say: Callable[[str], None]) -> int:
    sink = await sink_unless_held(settings)
    try:
        with connect(settings.source, application_name="cdc_sync resync") as connection:
            slot = usable_slot(settings, connection)
            state = await recorded_pipeline(settings, sink)
            if sink is not None and not sink.multi_process:
                # The pipeline may want to start while we wait.
                await sink.close()
                sink = None
            names = recorded_names(state)
            tables = _chosen(connection, settings, asked, state)
            requests = _requests(connection, settings, asked, tables, names, say)
            if not requests:
                return ExitCode.OK
            lsn = emit_messages(connection, PREFIX, [request_content(r) for r in requests])
            _announce(settings, asked, requests, slot, lsn, say)
            if asked.wait_seconds is None:
                return ExitCode.OK
            waiting = Waiting(settings, connection, sink, asked.wait_seconds, say)
            whole = {r.table for r in requests} if asked.whole else set[str]()
            return await waiting.run(lsn, whole)
    finally:
        if sink is not None:
            await sink.close()


async def sink_unless_held(settings: Settings) -> Sink | None:
    """The sink; None for an embedded database that the running pipeline holds."""
    try:
        return await open_sink(settings.qdrant)
    except SinkError:
        if not settings.qdrant.url.startswith("edge:"):
            raise
        return None


def usable_slot(settings: Settings, connection: PgConnection) -> SlotInfo:
    """The pipeline's slot. Raises :class:`SourceError` SLOT_LOST where nothing will ever read a
    request."""
    name = settings.source.slot
    slot = read_slot(connection, name)
    if slot is None:
        raise SourceError(
            ErrorKind.SLOT_LOST,
            f"there is no slot {name}: nothing would ever read the request",
            "Name the pipeline's own configuration with --config, or start it: cdc-sync run.",
        )
    if slot.lost:
        raise SourceError(
            ErrorKind.SLOT_LOST, f"slot {name} has lost changes, so nothing can stream from it"
        )
    return slot


async def recorded_pipeline(settings: Settings, sink: Sink | None) -> PipelineState | None:
    """The pipeline's record; None if it cannot be read now. Raises :class:`StateError` if there is
    none, :class:`ConfigError` if it is of another slot."""
    if sink is None:
        return None
    pipeline = settings.pipeline.name
    state = await sink.state.load(pipeline)
    if state is None:
        raise StateError(
            f"there is no record of a pipeline {pipeline!r} in {settings.qdrant.url}",
            "Name the pipeline's own configuration with --config, or start it: cdc-sync run.",
        )
    if state.slot != settings.source.slot:
        raise ConfigError(
            f"pipeline {pipeline!r} streams from slot {state.slot}, not from "
            f"{settings.source.slot}",
            "Name the pipeline's own configuration with --config.",
        )
    return state


def recorded_names(state: PipelineState | None) -> dict[int, str]:
    """The names of tables on record: one that was renamed keeps its name there."""
    return {table.oid: table.table for table in state.tables} if state is not None else {}


def _chosen(
    connection: PgConnection,
    settings: Settings,
    asked: Asked,
    state: PipelineState | None,
) -> list[PlannedTable]:
    """The tables that were asked for, each once."""
    # A publication of ours may still lack tables; those are told apart below.
    owned = state is None or state.owns_publication
    plan = plan_pipeline(connection, settings, owned=owned, state=state)
    planned = {table.plan.oid: table for table in plan.tables}
    listed = ", ".join(sorted(table.name for table in planned.values()))
    if asked.all_tables:
        oids = list(planned)
    elif asked.tables:
        oids = []
        for name in asked.tables:
            for stopped in plan.stopped:
                if is_named(name, stopped.name):
                    raise stopped.error
            oid = find_table(connection, name).oid
            if oid not in planned:
                raise ConfigError(
                    f"table {name} does not belong to pipeline {settings.pipeline.name!r}",
                    f"Its tables are: {listed}.",
                )
            oids.append(oid)
    elif len(planned) == 1:
        oids = list(planned)
    else:
        raise ConfigError(
            f"the pipeline has {len(planned)} tables: {listed}",
            "Name some with --table, or take --all.",
        )
    chosen = [planned[oid] for oid in dict.fromkeys(oids)]
    known = None if state is None else {*recorded_names(state), *(t.table for t in state.tables)}
    for table in chosen:
        if known is not None and table.plan.oid not in known and table.name not in known:
            raise ConfigError(
                f"pipeline {settings.pipeline.name!r} has not taken up table {table.name} yet",
                "Restart the pipeline with this configuration; it copies the table then.",
            )
    if not asked.whole and len(chosen) != 1:
        raise ConfigError("rows are of one table", "Name it with --table.")
    return chosen


def _requests(
    connection: PgConnection,
    settings: Settings,
    asked: Asked,
    tables: Sequence[PlannedTable],
    names: Mapping[int, str],
    say: Callable[[str], None],
) -> list[Request]:
    pipeline = settings.pipeline.name
    if asked.whole:
        return [Request(pipeline, names.get(t.plan.oid, t.name)) for t in tables]
    (table,) = tables
    keys = list(itertools.islice(_keys(connection, asked, table), KEY_BURST + 1))
    if not keys:
        say("no row matches: nothing to ask for")
        return []
    if len(keys) > KEY_BURST:
        raise ConfigError(
            f"more than {KEY_BURST} rows of {table.name} are selected",
            "Ask for fewer of them, or for the table as a whole: leave the selection out.",
        )
    if asked.where is None:
        _check_keys(connection, table, keys)
    name = names.get(table.plan.oid, table.name)
    return [Request(pipeline, name, batch) for batch in key_batches(keys)]


def _keys(connection: PgConnection, asked: Asked, table: PlannedTable) -> Iterator[Key]:
    """The selected keys, each text once."""
    columns = {column.name: column for column in table.table.columns}
    key: list[Column] = [columns[table.plan.columns[i].name] for i in table.plan.key]
    if asked.where is not None:
        yield from matching_keys(connection, table.table, key, asked.where)
        return
    found: Iterable[Key]
    if asked.json_keys is not None:
        found = (read_json_key(text, len(key)) for text in asked.json_keys)
    else:
        found = (read_key(text, len(key)) for text in asked.keys or ())
    yield from dict.fromkeys(found)


def read_key(text: str, columns: int) -> Key:
    """Read a key as it is written on a command line: of one column it is the value as it stands, of
    several a JSON array, or values separated by commas. Raises :class:`ConfigError`."""
    if columns == 1:
        return (text,)
    if text.lstrip().startswith("["):
        return read_json_key(text, columns)
    parts = text.split(",")
    if len(parts) != columns:
        raise ConfigError(
            f"a key has {columns} values, separated by commas; one that is given has {len(parts)}",
            "Write a key whose values hold commas as a JSON array.",
        )
    return tuple(parts)


def read_json_key(text: str, columns: int) -> Key:
    """Read a key from JSON: an array with a value for each column, or the value of the only column.

    Numbers are taken as they are written. Raises :class:`ConfigError`.
    """
    try:
        value = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        # Not chained: the error quotes the key.
        raise ConfigError(
            "a key is not JSON", 'Write an array: ["acme", 42]; quote it for the shell.'
        ) from None
    parts = value if isinstance(value, list) else [value]
    texts = [str(part).lower() if isinstance(part, bool) else part for part in parts]
    if len(texts) != columns or not all(isinstance(part, str) for part in texts):
        raise ConfigError(
            f"a key in JSON is an array of {columns} strings, numbers or booleans",
            "The values stand in the order of the key's columns.",
        )
    return tuple(texts)


def _check_keys(connection: PgConnection, table: PlannedTable, keys: Sequence[Key]) -> None:
    """Make sure that every key is one. Raises :class:`ConfigError`."""
    columns = [table.plan.columns[i] for i in table.plan.key]
    for start in range(0, len(keys), MAX_KEYS):
        batch = keys[start : start + MAX_KEYS]
        try:
            _check_texts(batch)
            parse_keys(connection, columns, batch)
        except KeyTextError:
            number = start + 1 + _first_bad(connection, table, batch)
            types = ", ".join(f"{c.name} {c.type.base.name}" for c in columns)
            raise ConfigError(
                f"key {number} of {len(keys)} is no key of {table.name} ({types})",
                "Write values as Postgres shows them as text.",
            ) from None


def _check_texts(keys: Sequence[Key]) -> None:
    for key in keys:
        if any("\0" in part or len(part) > MAX_VALUE_CHARACTERS for part in key):
            raise KeyTextError("a text holds NUL or is too long")


def _first_bad(connection: PgConnection, table: PlannedTable, keys: Sequence[Key]) -> int:
    columns = [table.plan.columns[i] for i in table.plan.key]
    for number, key in enumerate(keys):
        try:
            _check_texts([key])
            parse_keys(connection, columns, [key])
        except KeyTextError:
            return number
    return 0


def key_batches(keys: Sequence[Key]) -> Iterator[tuple[Key, ...]]:
    """Divide keys into messages."""
    batch: list[Key] = []
    size = 0
    for key in keys:
        more = sum(len(part.encode("utf-8", "surrogatepass")) + 4 for part in key)
        if batch and (len(batch) == MAX_KEYS or size + more > _MESSAGE_BYTES):
            yield tuple(batch)
            batch, size = [], 0
        batch.append(key)
        size += more
    if batch:
        yield tuple(batch)


def say_when_done(slot: SlotInfo, say: Callable[[str], None]) -> None:
    """Say when a request that is in the WAL by now will be done."""
    if slot.active:
        say(f"it is done once slot {slot.name} has confirmed that position")
    else:
        say(
            f"nothing streams from slot {slot.name} at the moment: the request waits in the WAL "
            "until cdc-sync run does"
        )


def _announce(
    settings: Settings,
    asked: Asked,
    requests: Sequence[Request],
    slot: SlotInfo,
    lsn: Lsn,
    say: Callable[[str], None],
) -> None:
    tables = ", ".join(dict.fromkeys(request.table for request in requests))
    rows = sum(len(request.keys or ()) for request in requests)
    what = f"{tables} as a whole" if asked.whole else f"{rows} rows of {tables}"
    say(f"asked pipeline {settings.pipeline.name} to read {what} again, at {lsn}")
    say_when_done(slot, say)
    event = "resync_completed" if asked.whole else "rows_reread"
    say(
        f"to watch: events resync_requested, {event} and request_refused in its log; "
        "metric cdc_sync_control_requests_total"
    )


@dataclass(slots=True)
class Waiting:
    """Waits until a pipeline has done what it was asked for, for so many ``seconds``. Without a
    ``sink`` it cannot see how far a copy is."""

    settings: Settings
    connection: PgConnection
    sink: Sink | None
    seconds: float
    say: Callable[[str], None]

    async def run(self, lsn: Lsn, whole: set[str]) -> int:
        """Wait until the pipeline has confirmed the position and has the tables copied; returns the
        exit code."""
        deadline = time.monotonic() + self.seconds
        while not self._confirmed(lsn):
            if time.monotonic() > deadline:
                return self._give_up("the request was not read")
            await asyncio.sleep(_POLL_SECONDS)
        if whole and self.sink is None:
            self.say("read; how far the copy is cannot be seen while the database is in use")
            return ExitCode.OK
        while whole and not await self._copied(whole):
            if time.monotonic() > deadline:
                return self._give_up("the copy was not completed")
            await asyncio.sleep(_POLL_SECONDS)
        self.say("done")
        return ExitCode.OK

    def _confirmed(self, lsn: Lsn) -> bool:
        slot = usable_slot(self.settings, self.connection)
        return slot.confirmed_flush_lsn is not None and slot.confirmed_flush_lsn >= lsn

    async def _copied(self, tables: set[str]) -> bool:
        assert self.sink is not None
        pipeline = self.settings.pipeline.name
        state = await self.sink.state.load(pipeline)
        if state is None:
            return False
        under_way = {ledger.table for ledger in await self.sink.state.ledgers(pipeline)}
        return not under_way & tables and not _unfinished(state) & tables

    def _give_up(self, what: str) -> int:
        self.say(f"{what} within {self.seconds:g} s; it still will be")
        return ExitCode.TEMPORARY


def _unfinished(state: PipelineState) -> set[str]:
    """The tables that are to be copied."""
    return {
        table.table
        for table in state.tables
        if not table.copied or table.plan_fingerprint.partition(":")[2].startswith("stale:")
    }
