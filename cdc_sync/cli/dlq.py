"""``cdc-sync dlq``: rows that could not be written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.options import takes_settings

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings
    from cdc_sync.qdrant.sink import DeadLetter

_WAIT_SECONDS = 60.0

Keys = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY", help="Key as in the list, or of several columns separated by commas."
    ),
]
Tables = Annotated[
    list[str] | None, typer.Option("--table", metavar="TABLE", help="Of this table; repeatable.")
]
Everything = Annotated[bool, typer.Option("--all", help="All of them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@takes_settings
def dlq_list(loaded: LoadedSettings, table: Tables = None, as_json: AsJson = False) -> int:
    """Print the rows that could not be written, with the reasons."""
    letters = _selected(loaded, table, None)
    if as_json:
        _print_json(letters)
        return 0
    limit = loaded.settings.pipeline.dead_letter_limit
    if not letters:
        typer.echo("no dead letters")
        return 0
    rows = [("TABLE", "KEY", "KIND", "TRIES", "LAST TRIED", "REASON")]
    rows += [
        (
            letter.table,
            _key(letter),
            letter.kind or "-",
            str(letter.attempts),
            letter.last_seen or letter.commit_time,
            letter.reason,
        )
        for letter in letters
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        fields = [text.ljust(width) for text, width in zip(row, widths, strict=False)]
        typer.echo("  ".join([*fields, row[5]]))
    typer.echo(f"{len(letters)} shown; the pipeline stops when there are more than {limit}")
    return 0


@takes_settings
def dlq_show(
    loaded: LoadedSettings,
    key: Annotated[str, typer.Argument(metavar="KEY", help="Key as in the list.")],
    table: Tables = None,
    as_json: AsJson = False,
) -> int:
    """Print all that is known of a row that could not be written."""
    letters = _selected(loaded, table, [key])
    if as_json:
        _print_json(letters)
        return 0
    for number, letter in enumerate(letters):
        if number:
            typer.echo("")
        for name, value in _fields(letter):
            typer.echo(f"{name:<12}{value}")
    return 0


@takes_settings
def dlq_retry(
    loaded: LoadedSettings,
    keys: Keys = None,
    table: Tables = None,
    everything: Everything = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is done.")] = False,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.0, help="How long --wait waits.")
    ] = _WAIT_SECONDS,
) -> int:
    """Have the pipeline read rows again as they are now, and write them.

    What can be written then, or is gone, is no dead letter any more. The request waits in the WAL
    if nothing streams.
    """
    _require_choice(keys, table, everything)
    from cdc_sync.sync.letter_requests import retry_letters

    letters = _selected(loaded, table, keys)
    if not letters:
        typer.echo("no dead letters")
        return 0
    return retry_letters(loaded.settings, letters, timeout if wait else None, typer.echo)


@takes_settings
def dlq_drop(
    loaded: LoadedSettings,
    keys: Keys = None,
    table: Tables = None,
    everything: Everything = False,
) -> int:
    """Forget rows that could not be written. Their points stay as they are."""
    _require_choice(keys, table, everything)
    from cdc_sync.sync.letter_requests import drop_letters

    letters = _selected(loaded, table, keys)
    return drop_letters(loaded.settings, letters, typer.echo)


def _require_choice(
    keys: Sequence[str] | None, table: Sequence[str] | None, everything: bool
) -> None:
    if everything and (keys or table):
        raise typer.BadParameter("--all goes with no --table and no keys.")
    if not (everything or keys or table):
        raise typer.BadParameter("Name keys or --table, or take --all.")


def _selected(
    loaded: LoadedSettings, table: Sequence[str] | None, keys: Sequence[str] | None
) -> list[DeadLetter]:
    from cdc_sync.sync.letter_requests import pending_letters, select_letters

    return select_letters(pending_letters(loaded.settings), table or (), keys or ())


def _key(letter: DeadLetter) -> str:
    """The key as commands take it, on one line."""
    values = letter.key_values
    if values is None:
        return letter.key
    text = values[0] if len(values) == 1 else json.dumps(values, ensure_ascii=False)
    return text if text.isprintable() and text.strip() == text and text else json.dumps(text)


def _fields(letter: DeadLetter) -> list[tuple[str, str]]:
    found = [
        ("table", letter.table),
        ("key", _key(letter)),
        ("point id", letter.key if not letter.key.startswith("(") else "none"),
        ("reason", letter.reason),
        ("kind", letter.kind or "not recorded"),
        ("tries", str(letter.attempts)),
        ("first tried", letter.first_seen or "not recorded"),
        ("last tried", letter.last_seen or "not recorded"),
    ]
    if letter.lsn == "0/0":
        found.append(("read by", "a copy"))
    else:
        found += [("lsn", letter.lsn), ("committed", letter.commit_time)]
    return [*found, ("retry", _outlook(letter))]


def _outlook(letter: DeadLetter) -> str:
    if letter.key_values is not None:
        return "yes, by its key"
    if letter.key.startswith("("):
        return (
            "no: its key has no point id, so it is not known which row it is. Correct it, then "
            "read the table again: cdc-sync resync"
        )
    return (
        "by its point id, where that is the key (a uuid or an integer); else read the table again: "
        "cdc-sync resync"
    )


def _print_json(letters: Sequence[DeadLetter]) -> None:
    found = [
        {
            "table": letter.table,
            "key": None if letter.key_values is None else list(letter.key_values),
            "point_id": None if letter.key.startswith("(") else letter.key,
            "reason": letter.reason,
            "kind": letter.kind or None,
            "attempts": letter.attempts,
            "first_seen": letter.first_seen or None,
            "last_seen": letter.last_seen or None,
            "lsn": None if letter.lsn == "0/0" else letter.lsn,
            "commit_time": letter.commit_time,
        }
        for letter in letters
    ]
    typer.echo(json.dumps({"dead_letters": found}, indent=2, ensure_ascii=False))
