"""``cdc-sync resync``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.options import takes_settings

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings

_WAIT_SECONDS = 300.0


@takes_settings
def resync(
    loaded: LoadedSettings,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="More keys, after --keys.")
    ] = None,
    table: Annotated[
        list[str] | None,
        typer.Option(metavar="TABLE", help="Table to read again; repeatable. Default: the only."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All tables of the pipeline.")] = False,
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help="Only rows for which this is true, in your own rights."),
    ] = None,
    keys: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Only rows with these keys, present or deleted. Several columns: a JSON array, "
            "or values separated by commas.",
        ),
    ] = None,
    keys_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keys, one a line; as JSON if its name ends in .jsonl; - is stdin."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is done.")] = False,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.0, help="How long --wait waits.")
    ] = _WAIT_SECONDS,
) -> int:
    """Have a running pipeline read tables or rows again.

    Points are made as the rows are now, and those of rows that are not there are removed. The
    request waits in the WAL if nothing streams.
    """
    if more and not keys:
        raise typer.BadParameter(f"unexpected argument: {more[0]}; tables go with --table.")
    selections = [where is not None, bool(keys), keys_file is not None]
    if sum(selections) > 1:
        raise typer.BadParameter("--where, --keys and --keys-file exclude each other.")
    if everything and (table or any(selections)):
        raise typer.BadParameter("--all goes with no --table, --where or keys.")
    if where is not None and not where.strip():
        raise typer.BadParameter("--where is empty.")
    from cdc_sync.sync.resync_request import Asked, request_resync

    as_json = keys_file is not None and keys_file.suffix == ".jsonl"
    given = _lines(keys_file, skip_blank=as_json) if keys_file else [*(keys or ()), *(more or ())]
    asked = Asked(
        tables=tuple(table or ()),
        all_tables=everything,
        where=where,
        keys=tuple(given) if given and not as_json else None,
        json_keys=tuple(given) if given and as_json else None,
        wait_seconds=timeout if wait else None,
    )
    return request_resync(loaded.settings, asked, typer.echo)


def _lines(path: Path, *, skip_blank: bool) -> list[str]:
    """The keys of a file. A line that is blank is a key too, unless it is the last or JSON."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise typer.BadParameter(f"--keys-file {path} cannot be read: {reason}.") from error
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if lines[-1] == "":
        lines.pop()
    if skip_blank:
        lines = [line for line in lines if line.strip()]
    if not lines:
        raise typer.BadParameter(f"--keys-file {path} holds no key.")
    return lines
