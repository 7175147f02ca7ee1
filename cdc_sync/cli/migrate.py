"""``cdc-sync migrate``: a copy that ends, with the flags of Qdrant's own migration tool."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.app import invocation_of
from cdc_sync.cli.official import note
from cdc_sync.cli.options import takes_settings
from cdc_sync.cli.run import Restart, ended_by_sigterm

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings
    from cdc_sync.sync.migrate import Migration, SlotAfter


def _print_version(context: typer.Context, value: bool) -> None:
    if value:
        from cdc_sync import __version__

        typer.echo(f"cdc-sync {__version__}")
        context.exit(0)


def _set_debug(context: typer.Context, value: bool) -> None:
    invocation = invocation_of(context)
    invocation.debug = invocation.debug or value


def _note_trace(context: typer.Context, value: bool) -> None:
    if value:
        _set_debug(context, value)
        note("--trace shows the trace of errors, as --debug; --log.level debug logs more.")


def _note_tls(value: bool) -> None:
    if value:
        note(
            "--skip-tls-verification has no effect: certificates are always verified. Trust your "
            "own authority with qdrant.ca_file (CDC_SYNC_QDRANT__CA_FILE) and source.ca_file "
            "(CDC_SYNC_SOURCE__CA_FILE)."
        )


def _note_offsets(value: str | None) -> None:
    if value is not None:
        note(
            "--migration.offsets-collection has no effect: progress is kept in the collection "
            "_cdc_sync."
        )


Source = Annotated[
    str | None, typer.Argument(metavar="pg", help="The kind of source; can be left out.")
]
DropSlot = Annotated[
    bool,
    typer.Option(
        "--migration.drop-slot",
        help="At the end remove the slot, the publication if it is ours, and our records. Changes "
        "are not followed any more then.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the trace of errors.", callback=_set_debug)
]
Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True),
]
OffsetsCollection = Annotated[
    str | None,
    typer.Option(
        "--migration.offsets-collection",
        metavar="NAME",
        help="Has no effect (of qdrant-migration).",
        callback=_note_offsets,
    ),
]
SkipTlsVerification = Annotated[
    bool,
    typer.Option(
        "--skip-tls-verification",
        help="Has no effect (of qdrant-migration).",
        callback=_note_tls,
    ),
]
Trace = Annotated[
    bool, typer.Option("--trace", help="As --debug (of qdrant-migration).", callback=_note_trace)
]


@takes_settings
def migrate(
    loaded: LoadedSettings,
    context: typer.Context,
    source: Source = None,
    restart: Restart = False,
    drop_slot: DropSlot = False,
    as_json: AsJson = False,
    offsets_collection: OffsetsCollection = None,
    skip_tls_verification: SkipTlsVerification = False,
    debug: Debug = False,
    trace: Trace = False,
    version: Version = False,
) -> int:
    """Copy the tables, catch up with their changes, and end.

    Takes the flags of qdrant-migration pg, with or without the word pg, or a TOML file. Stopped
    before its end it goes on where it was when it is run again. The slot stays, so that run can
    follow from there, unless it is dropped.
    """
    with ended_by_sigterm(128 + signal.SIGTERM):
        from cdc_sync.sync.migrate import migrate as start

        result = start(loaded.settings, restart=restart, remove=drop_slot)
    if result.summary is None or result.slot is None:
        typer.echo(
            "Stopped before the end. Run the same command again to go on from here; until then "
            f"the slot {loaded.settings.source.slot} makes Postgres keep WAL.",
            err=True,
        )
        return result.exit_code
    typer.echo(as_json_text(result) if as_json else as_text(result))
    if result.slot.kept:
        _warn(kept_text(result.slot, invocation_of(context).arguments))
    return result.exit_code


def as_json_text(result: Migration) -> str:
    """The summary for machines."""
    assert result.summary is not None
    assert result.slot is not None
    content = {
        "exit_code": int(result.exit_code),
        **result.summary.to_json(),
        "slot": result.slot.to_json(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def as_text(result: Migration) -> str:
    """The summary for people."""
    from cdc_sync.cli.summary_text import summary_text

    assert result.summary is not None
    assert result.slot is not None
    lines = [summary_text(result.summary)]
    if not result.slot.kept:
        removed = f"slot {result.slot.name}"
        if not result.slot.publication_kept:
            removed += f", publication {result.slot.publication}"
        lines.append(f"Removed: {removed}, and the records of this pipeline.")
    return "\n".join(lines)


def kept_text(slot: SlotAfter, arguments: list[str]) -> str:
    """What a slot that stays means, and what to do about it."""
    from cdc_sync.sync.progress import size_text

    held = "" if slot.retained_bytes is None else f" ({size_text(slot.retained_bytes)} now)"
    if slot.wal_limit_bytes is None:
        end = "until the disk of Postgres is full: max_slot_wal_keep_size sets no limit"
    else:
        end = (
            f"up to {size_text(slot.wal_limit_bytes)} (max_slot_wal_keep_size), past which the "
            "slot is lost"
        )
    danger = (
        f"WARNING: the replication slot {slot.name} stays. Postgres keeps all WAL from here on"
        f"{held}, {end}."
    )
    return "\n".join(
        [
            danger,
            "  Go on without a gap, now:",
            f"    {command('run', arguments)}",
            "  Or remove it, if nobody is to follow the changes:",
            f"    {command('migrate', [*arguments, '--migration.drop-slot'])}",
        ]
    )


#: Options of migrate that run does not have, or that must not be repeated.
_DROPPED = ("--migration.restart", "--json", "--skip-tls-verification", "--debug", "--trace", "-c")
_DROPPED_WITH_VALUE = ("--migration.offsets-collection",)


def command(name: str, arguments: list[str]) -> str:
    """The command line again for another command, without secrets."""
    from cdc_sync.ops.redaction import redact

    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, _ = argument.partition("=")
        if option in _DROPPED or (argument in ("migrate", "pg") and not _is_value(kept)):
            continue
        if option in _DROPPED_WITH_VALUE:
            if not equals:
                next(rest, None)
            continue
        kept.append(argument)
    return redact(shlex.join(["cdc-sync", name, *kept]))


def _is_value(before: list[str]) -> bool:
    """Whether what comes next belongs to an option."""
    if not before or not before[-1].startswith("-") or "=" in before[-1]:
        return False
    return not before[-1].startswith(
        ("--migration.create", "--no-", "--migration.adopt", "--adopt")
    )


def _warn(text: str) -> None:
    coloured = typer.style(text, fg=typer.colors.YELLOW, bold=True)
    typer.echo(coloured if sys.stderr.isatty() else text, err=True)
