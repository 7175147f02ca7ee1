"""``dlq``: what an operator does with dead letters, beside a pipeline that may be running.

Reading them needs no pipeline. A retry is asked for as any rows are (:mod:`cdc_sync.sync.control`),
so that what it writes has its place in the stream; without a running pipeline it waits in the WAL.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError, ExitCode
from cdc_sync.mapping.plan import ColumnPlan
from cdc_sync.pgoutput.lsn import Lsn
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.control import emit_messages
from cdc_sync.postgres.identifiers import parse_name
from cdc_sync.postgres.key_texts import KeyTextError, parse_keys
from cdc_sync.postgres.refetch import TableRedefinedError
from cdc_sync.postgres.slot import SlotInfo
from cdc_sync.qdrant.open import open_sink, read_dead_letters
from cdc_sync.qdrant.sink import DeadLetter, PipelineState
from cdc_sync.sync.control import MAX_VALUE_CHARACTERS, PREFIX, Key, Request, request_content
from cdc_sync.sync.dead_letter_retries import readable_key
from cdc_sync.sync.planning import plan_pipeline
from cdc_sync.sync.resync_request import (
    Waiting,
    key_batches,
    read_json_key,
    read_key,
    recorded_names,
    recorded_pipeline,
    say_when_done,
    sink_unless_held,
    usable_slot,
)
from cdc_sync.sync.routing import PlannedTable

Say = Callable[[str], None]


def pending_letters(settings: Settings) -> list[DeadLetter]:
    """The pipeline's dead letters, by table and key. Errors as of
    :func:`~cdc_sync.qdrant.open.read_dead_letters`."""
    return asyncio.run(read_dead_letters(settings.qdrant, settings.pipeline.name))


def select_letters(
    letters: Sequence[DeadLetter], tables: Sequence[str], keys: Sequence[str]
) -> list[DeadLetter]:
    """Choose dead letters by ``tables``, named as in SQL, and by ``keys``: as in the list, or as on
    the command line of ``resync``. No tables: of all; no keys: all of them.

    Raises :class:`ConfigError` for a name that is none, and for a key of which there is no letter.
    """
    names = [_parts(table) for table in tables]
    chosen = [
        letter for letter in letters if not names or any(_is_of(letter, name) for name in names)
    ]
    if not keys:
        return chosen
    found = []
    for number, key in enumerate(keys, 1):
        matching = [letter for letter in chosen if _has_key(letter, key)]
        if not matching:
            raise ConfigError(
                f"there is no dead letter with key {number} of the {len(keys)} that are given",
                "cdc-sync dlq list shows what there is.",
            )
        found += [letter for letter in matching if letter not in found]
    return found


def _parts(table: str) -> tuple[str, ...]:
    try:
        parts = parse_name(table)
    except ValueError:
        parts = ()
    if not 1 <= len(parts) <= 2:
        raise ConfigError(f"{table} is no name of a table", "Write it as in SQL: schema.name.")
    return parts


def _is_of(letter: DeadLetter, parts: tuple[str, ...]) -> bool:
    name = ".".join(parts)
    return letter.table == name if len(parts) > 1 else letter.table.endswith(f".{name}")


def _has_key(letter: DeadLetter, text: str) -> bool:
    if letter.key == text:
        return True
    values = letter.key_values
    if values is None:
        return False
    for read in (read_key, read_json_key):
        with contextlib.suppress(ConfigError):
            if read(text, len(values)) == values:
                return True
    return False


def drop_letters(settings: Settings, letters: Sequence[DeadLetter], say: Say) -> int:
    """Forget dead letters; returns the exit code. Raises :class:`SinkError` where the pipeline has
    the embedded database open, besides what :func:`pending_letters` raises."""
    asyncio.run(_drop(settings, letters))
    say(f"{_counted(letters)} dropped")
    if letters:
        say(
            "their rows are in Qdrant as they were before, or not at all, until they change or are "
            "read again: cdc-sync resync"
        )
    return ExitCode.OK


async def _drop(settings: Settings, letters: Sequence[DeadLetter]) -> None:
    sink = await open_sink(settings.qdrant)
    try:
        await sink.state.release(
            settings.pipeline.name, [(letter.table, letter.key) for letter in letters]
        )
    finally:
        await sink.close()


def retry_letters(
    settings: Settings, letters: Sequence[DeadLetter], wait_seconds: float | None, say: Say
) -> int:
    """Have the rows of dead letters read again as they are now, and written; returns the exit code:
    DATA if some of them cannot be, TEMPORARY if the wait (None: none) was too short.

    Raises as :func:`~cdc_sync.sync.resync_request.request_resync`.
    """
    return asyncio.run(_retry(settings, letters, wait_seconds, say))


async def _retry(
    settings: Settings, letters: Sequence[DeadLetter], wait_seconds: float | None, say: Say
) -> int:
    sink = await sink_unless_held(settings)
    try:
        with connect(settings.source, application_name="cdc_sync dlq") as connection:
            slot = usable_slot(settings, connection)
            state = await recorded_pipeline(settings, sink)
            if sink is not None:
                # The pipeline may want to start while we wait.
                await sink.close()
                sink = None
            requests = _requests(connection, settings, letters, state, say)
            if not requests:
                return ExitCode.DATA if letters else ExitCode.OK
            lsn = emit_messages(connection, PREFIX, [request_content(r) for r in requests])
            _announce(settings, requests, slot, lsn, say)
            if wait_seconds is None:
                return ExitCode.OK
            waiting = Waiting(settings, connection, None, wait_seconds, say)
            code = await waiting.run(lsn, set())
        return code or await _report(settings, letters, say)
    finally:
        if sink is not None:
            await sink.close()


def _requests(
    connection: PgConnection,
    settings: Settings,
    letters: Sequence[DeadLetter],
    state: PipelineState | None,
    say: Say,
) -> list[Request]:
    """Requests for the rows of dead letters, and a word about those that cannot be read by key."""
    owned = state is None or state.owns_publication
    plan = plan_pipeline(connection, settings, owned=owned, state=state)
    names = recorded_names(state)
    planned = {names.get(table.plan.oid, table.name): table for table in plan.tables}
    requests = []
    for name, some in _by_table(letters).items():
        keys = _keys(connection, planned.get(name), some)
        if len(keys) < len(some):
            say(
                f"{len(some) - len(keys)} dead letters of {name} have no key by which their rows "
                "could be read. Once those are corrected: cdc-sync resync, with the table as a "
                "whole; or drop them."
            )
        requests += [Request(settings.pipeline.name, name, batch) for batch in key_batches(keys)]
    return requests


def _by_table(letters: Iterable[DeadLetter]) -> Mapping[str, list[DeadLetter]]:
    found: dict[str, list[DeadLetter]] = {}
    for letter in letters:
        found.setdefault(letter.table, []).append(letter)
    return found


def _keys(
    connection: PgConnection, planned: PlannedTable | None, letters: Iterable[DeadLetter]
) -> list[Key]:
    """The keys that are keys of the table now."""
    if planned is None:
        return []
    keys = [key for one in letters if (key := readable_key(one, planned.plan)) is not None]
    fitting = [key for key in keys if all(len(part) <= MAX_VALUE_CHARACTERS for part in key)]
    columns = [planned.plan.columns[position] for position in planned.plan.key]
    return list(_valid(connection, columns, fitting))


def _valid(
    connection: PgConnection, columns: Sequence[ColumnPlan], keys: Sequence[Key]
) -> Iterator[Key]:
    """Leave out what is no key any more, since its columns have other types."""
    if not keys:
        return
    try:
        parse_keys(connection, columns, keys)
    except (KeyTextError, TableRedefinedError):
        if len(keys) > 1:
            half = len(keys) // 2
            yield from _valid(connection, columns, keys[:half])
            yield from _valid(connection, columns, keys[half:])
    else:
        yield from keys


def _announce(
    settings: Settings, requests: Sequence[Request], slot: SlotInfo, lsn: Lsn, say: Say
) -> None:
    rows = sum(len(request.keys or ()) for request in requests)
    tables = ", ".join(dict.fromkeys(request.table for request in requests))
    say(f"asked pipeline {settings.pipeline.name} to read {rows} rows of {tables} again, at {lsn}")
    say_when_done(slot, say)


async def _report(settings: Settings, letters: Sequence[DeadLetter], say: Say) -> int:
    """Say which of the dead letters are left; returns the exit code."""
    wanted = {(letter.table, letter.key) for letter in letters}
    present = await read_dead_letters(settings.qdrant, settings.pipeline.name)
    left = [letter for letter in present if (letter.table, letter.key) in wanted]
    say(f"{_counted(letters, len(left))} released, {len(left)} left")
    return ExitCode.DATA if left else ExitCode.OK


def _counted(letters: Sequence[DeadLetter], left: int = 0) -> str:
    number = len(letters) - left
    return f"{number} dead letter{'' if number == 1 else 's'}"
