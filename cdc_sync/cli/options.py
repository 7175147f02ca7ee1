"""The options that every command with settings takes, and what becomes of them."""

from __future__ import annotations

import functools
import inspect
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cdc_sync.cli.app import invocation_of

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings

# (flag, placeholder, help, variable). Values stay text here: the settings say what is expected,
# in the same words whatever the source.
_FLAGS: Final = (
    ("pg.url", "URL", "Connection string of Postgres.", "SOURCE__URL"),
    ("pg.table", "TABLE", "Table to keep in step.", None),
    ("pg.key-column", "COLUMN", "Column used as point id. Default: the primary key.", None),
    ("pg.columns", "COLUMNS", "Columns to take, separated by commas. Default: all.", None),
    ("qdrant.url", "URL", "http(s)://host:6334 (gRPC), or edge:/path.", "QDRANT__URL"),
    ("qdrant.api-key", "KEY", "API key of Qdrant.", "QDRANT__API_KEY"),
    ("qdrant.collection", "NAME", "Collection. Default: the table's name.", None),
    (
        "qdrant.distance-metric",
        "COLUMN=METRIC",
        "cosine, euclid, dot or manhattan; repeatable, or separated by commas.",
        None,
    ),
    (
        "migration.num-workers",
        "N",
        "Worker processes of the copy. Default: as many as CPU cores.",
        "MIGRATION__NUM_WORKERS",
    ),
    ("pipeline.name", "NAME", "Name of the pipeline in its own records.", "PIPELINE__NAME"),
    ("http.host", "ADDRESS", "Address of the HTTP endpoint.", "HTTP__HOST"),
    ("http.port", "PORT", "Port of the HTTP endpoint; 0 picks a free one.", "HTTP__PORT"),
    ("log.level", "LEVEL", "debug, info, warning or error.", "LOG__LEVEL"),
    ("log.format", "FORMAT", "auto, console or json.", "LOG__FORMAT"),
)
_REPEATABLE: Final = "qdrant.distance-metric"


def _parameter_name(flag: str) -> str:
    return flag.replace(".", "_").replace("-", "_")


def _parameters() -> list[inspect.Parameter]:
    """The options as Typer reads them from a signature."""
    parameters = [
        _parameter(
            "config",
            Annotated[
                Path | None,
                typer.Option("--config", metavar="FILE", help="TOML file. [env: CDC_SYNC_CONFIG]"),
            ],
        )
    ]
    for flag, placeholder, text, variable in _FLAGS:
        shown = f"{text} [env: CDC_SYNC_{variable}]" if variable else text
        option = typer.Option(f"--{flag}", metavar=placeholder, help=shown)
        kind = list[str] | None if flag == _REPEATABLE else str | None
        parameters.append(_parameter(_parameter_name(flag), Annotated[kind, option]))
    return parameters


def _parameter(name: str, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def takes_settings(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command ``--config`` and the flags, and call it with the settings they make.

    The command's first parameter is the :class:`~cdc_sync.loading.LoadedSettings`; its others are
    its own options.
    """
    own = _own_parameters(command)
    shared = _parameters()

    @functools.wraps(command)
    def wrapper(context: typer.Context, **values: object) -> int:
        options = {option.name: values.pop(option.name) for option in shared}
        return command(_load(context, options), **values)

    context = inspect.Parameter(
        "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    keyword_only = [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in own]
    parameters = [context, *shared, *keyword_only]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {option.name: option.annotation for option in parameters}
    return wrapper


def _own_parameters(command: Callable[..., int]) -> list[inspect.Parameter]:
    """A command's parameters after the first, whose type is not imported before it is needed."""
    first, *others = inspect.signature(command).parameters.values()
    names = {**vars(inspect.getmodule(command)), "LoadedSettings": object}
    hints = typing.get_type_hints(command, globalns=names, include_extras=True)
    assert first.name in hints
    return [parameter.replace(annotation=hints[parameter.name]) for parameter in others]


def _load(context: typer.Context, options: Mapping[str, object]) -> LoadedSettings:
    from cdc_sync.loading import load_settings
    from cdc_sync.ops.redaction import add_secrets, secrets_of

    overrides: dict[str, object] = {
        flag: options[_parameter_name(flag)] or None for flag, *_ in _FLAGS
    }
    if overrides["log.level"] == "debug":
        invocation_of(context).debug = True
    _hint_at_secrets(overrides)
    config = options["config"]
    loaded = load_settings(config if isinstance(config, Path) else None, overrides, os.environ)
    add_secrets(secrets_of(loaded.settings))
    if loaded.settings.log.level == "debug":
        invocation_of(context).debug = True
    return loaded


def _hint_at_secrets(overrides: Mapping[str, object]) -> None:
    """Say on stderr when a secret is on the command line, where other users can see it."""
    from cdc_sync.ops.redaction import has_password

    shown = []
    if overrides["qdrant.api-key"]:
        shown.append(("--qdrant.api-key", "CDC_SYNC_QDRANT__API_KEY"))
    url = overrides["pg.url"]
    if isinstance(url, str) and has_password(url):
        shown.append(("the password in --pg.url", "CDC_SYNC_SOURCE__URL"))
    for what, variable in shown:
        typer.echo(
            f"hint: {what} shows in process lists; {variable} or {variable}_FILE does not.",
            err=True,
        )
