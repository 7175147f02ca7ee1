"""``cdc-sync rebuild``."""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.options import takes_settings
from cdc_sync.cli.run import ended_by_sigterm
from cdc_sync.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from cdc_sync.config import Settings
    from cdc_sync.loading import LoadedSettings
    from cdc_sync.qdrant.server import ServerSink
    from cdc_sync.qdrant.sink import RebuildState
    from cdc_sync.sync.rebuild_end import Progress
    from cdc_sync.verify.rebuild import Rebuilt

_INDEX_SECONDS = 600.0


@takes_settings
def rebuild(
    loaded: LoadedSettings,
    table: Annotated[
        str, typer.Option(metavar="TABLE", help="The table, whose collection is made anew.")
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="TOML file of afterwards, with another collection for the table."
        ),
    ] = None,
    alias: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Alias by which the collection is read; made if there is none."
        ),
    ] = None,
    no_swap: Annotated[
        bool,
        typer.Option("--no-swap", help="Fill and verify only; run again without it to go over."),
    ] = False,
    index_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0.0, help="How long Qdrant may build its index before the swap."
        ),
    ] = _INDEX_SECONDS,
    show: Annotated[
        bool, typer.Option("--status", help="Say how far the rebuild is, and end.")
    ] = False,
    abort: Annotated[
        bool, typer.Option("--abort", help="Remove the rebuild and all it has made.")
    ] = False,
    drop_old: Annotated[
        str | None,
        typer.Option(
            "--drop-old", metavar="COLLECTION", help="Drop the collection that was replaced."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before dropping.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> int:
    """Fill a new collection beside the one in use, and go over to it.

    The running pipeline goes on meanwhile; at one position of the stream it and the readers of the
    alias go over. Stopped before its end, it goes on when it is run again.
    """
    if sum((show, abort, drop_old is not None)) > 1:
        raise typer.BadParameter("--status, --abort and --drop-old exclude each other.")
    if show:
        return _with_sink(loaded.settings, _status(loaded.settings, table, as_json))
    if abort:
        return _with_sink(loaded.settings, _abort(loaded.settings, table))
    if drop_old is not None:
        return _with_sink(loaded.settings, _drop(loaded.settings, table, drop_old, yes))
    if to is None or alias is None:
        raise typer.BadParameter("--to and --alias are needed.")
    how = _How(not no_swap, index_timeout, as_json)
    return _rebuild(loaded, table, to, alias, how)


@dataclass(frozen=True, slots=True)
class _How:
    swap: bool
    index_seconds: float
    as_json: bool


def _rebuild(loaded: LoadedSettings, table: str, to: Path, alias: str, how: _How) -> int:
    with ended_by_sigterm(128 + signal.SIGTERM):
        from cdc_sync.sync.rebuild_begin import Order
        from cdc_sync.verify.rebuild import rebuild as start

        order = Order(loaded.settings, _wanted(loaded, to), table, alias)

        def say(line: str) -> None:
            typer.echo(line, err=how.as_json)

        http = loaded.origin("http.port").kind == "flag"
        rebuilt = start(order, say, swap=how.swap, index_seconds=how.index_seconds, http=http)
    typer.echo(_as_json(rebuilt) if how.as_json else _as_text(rebuilt))
    return _exit_code(rebuilt)


def _wanted(loaded: LoadedSettings, to: Path) -> Settings:
    """The settings of afterwards: from the file, and what else was given on the command line."""
    import os

    from cdc_sync.loading import FLAGS, load_settings

    given = loaded.settings
    overrides: dict[str, object] = {}
    for flag, key in FLAGS.items():
        if loaded.origin(key).kind == "flag":
            section, _, name = key.partition(".")
            value = getattr(getattr(given, section), name)
            secret = getattr(value, "get_secret_value", None)
            overrides[flag] = secret() if secret is not None else value
    return load_settings(to, overrides, os.environ).settings


def _exit_code(rebuilt: Rebuilt) -> int:
    from cdc_sync.verify.rebuild import Outcome

    codes = {
        Outcome.TAKEN: int(ExitCode.OK),
        Outcome.UNREAD: int(ExitCode.TEMPORARY),
        Outcome.FILLED: int(ExitCode.OK),
        Outcome.DIFFERENT: int(ExitCode.DIFFERENCES),
        Outcome.ABORTED: int(ExitCode.TEMPORARY),
        Outcome.STOPPED: 128 + signal.SIGTERM,
    }
    return codes[rebuilt.outcome]


def _as_json(rebuilt: Rebuilt) -> str:
    record = rebuilt.rebuild
    content = {
        "outcome": rebuilt.outcome.value,
        "exit_code": _exit_code(rebuilt),
        "table": record.table,
        "collection": record.collection,
        "replaces": record.old,
        "alias": record.alias,
        "slot": record.slot,
        "verification": None if rebuilt.report is None else rebuilt.report.to_json(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def _as_text(rebuilt: Rebuilt) -> str:
    from cdc_sync.cli.verify_text import report_text
    from cdc_sync.verify.rebuild import Outcome

    record = rebuilt.rebuild
    waits = (
        "Run the same command again to go on, or remove it with --abort; until then the slot "
        f"{record.slot} makes Postgres keep WAL."
    )
    match rebuilt.outcome:
        case Outcome.TAKEN:
            return (
                f"{record.table} is kept in {record.collection} now, and {record.alias} stands for "
                "it. Replace the configuration file of the pipeline by the new one.\n"
                f"{record.old} is kept as it was; once nobody needs it: cdc-sync rebuild --table "
                f"{record.table} --drop-old {record.old}"
            )
        case Outcome.UNREAD:
            return (
                f"{record.table} is kept in {record.collection} now, but {record.alias} does not "
                "stand for it yet: the log of the pipeline says why. Run the same command again "
                "once it does."
            )
        case Outcome.FILLED:
            return f"{record.collection} is filled and equal to {record.table}. {waits}"
        case Outcome.DIFFERENT:
            text = report_text(rebuilt.report) + "\n" if rebuilt.report is not None else ""
            return f"{text}{record.collection} is not equal to {record.table}: no swap. {waits}"
        case Outcome.ABORTED:
            return "The rebuild was removed by cdc-sync rebuild --abort."
        case Outcome.STOPPED:
            return f"Stopped before the end. {waits}"


# -- what does not rebuild

Work = Callable[["ServerSink"], Awaitable[int]]


def _with_sink(settings: Settings, work: Work) -> int:
    # Not above: help is given without it.
    import asyncio

    async def run() -> int:
        from cdc_sync.qdrant.open import open_sink
        from cdc_sync.sync.rebuild import as_server

        sink = await open_sink(settings.qdrant)
        try:
            return await work(as_server(sink))
        finally:
            await sink.close()

    return asyncio.run(run())


async def _found(settings: Settings, sink: ServerSink, table: str) -> RebuildState:
    from cdc_sync.sync.rebuild_end import find_rebuild

    rebuild = await find_rebuild(settings, sink, table)
    if rebuild is None:
        raise ConfigError(
            f"no rebuild of {table} by pipeline {settings.pipeline.name!r} is under way",
            "Nothing is left of one that has ended or was removed.",
        )
    return rebuild


def _status(settings: Settings, table: str, as_json: bool) -> Work:
    async def work(sink: ServerSink) -> int:
        from cdc_sync.sync.rebuild_end import progress

        found = await progress(settings, sink, await _found(settings, sink, table))
        if as_json:
            typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
        else:
            typer.echo(_status_text(found))
        return ExitCode.OK

    return work


def _status_text(found: Progress) -> str:
    from cdc_sync.sync.progress import size_text

    record = found.rebuild
    held = "" if found.retained_bytes is None else size_text(found.retained_bytes)
    rows = "" if found.rows is None else f", {found.rows:,} rows so far"
    lines = [
        f"{record.table}: {record.phase}, {'copied' if found.copied else 'not copied yet'}{rows}",
        f"into {record.collection}, in place of {record.old}, which {record.alias} stands for",
        f"slot {record.slot}: {'in use' if found.active else 'nobody streams'}"
        + (f", keeps {held} of WAL" if held else ""),
    ]
    if not found.daemon:
        lines.append("nothing streams from the pipeline's own slot: it cannot go over now")
    return "\n".join(lines)


def _abort(settings: Settings, table: str) -> Work:
    async def work(sink: ServerSink) -> int:
        from cdc_sync.sync.rebuild_end import abort

        await abort(settings, sink, await _found(settings, sink, table), typer.echo)
        return ExitCode.OK

    return work


def _drop(settings: Settings, table: str, collection: str, yes: bool) -> Work:
    async def work(sink: ServerSink) -> int:
        from cdc_sync.sync.rebuild_end import check_droppable

        await check_droppable(settings, sink, table, collection)
        if not yes:
            typer.confirm(f"Drop collection {collection} with all its points?", abort=True)
        await sink.drop(collection)
        typer.echo(f"collection {collection}: dropped")
        return ExitCode.OK

    return work
