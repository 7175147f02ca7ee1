"""The options that every command with settings takes, and what becomes of them."""

from __future__ import annotations

import functools
import inspect
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from typer.core import TyperCommand, TyperOption

from cdc_sync.cli.app import invocation_of

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings

# (flag, placeholder, help, variable). Values stay text here: the settings say what is expected,
# in the same words whatever the source.
_FLAGS: Final = (
    ("pg.url", "URL", "Connection string of Postgres.", "SOURCE__URL"),
    ("pg.table", "TABLE", "Table to keep in step: name, schema.name, or quoted as in SQL.", None),
    (
        "pg.key-column",
        "COLUMN",
        "Column used as point id; several separated by commas. Default: the primary key.",
        None,
    ),
    ("pg.columns", "COLUMNS", "Columns to take, separated by commas. Default: all.", None),
    ("pg.where", "PREDICATE", "Keep only rows for which this SQL predicate is true.", None),
    ("source.slot", "NAME", "Name of the replication slot.", "SOURCE__SLOT"),
    ("source.publication", "NAME", "Name of the publication.", "SOURCE__PUBLICATION"),
    ("qdrant.url", "URL", "http(s)://host:6334 (gRPC), or edge:/path.", "QDRANT__URL"),
    ("qdrant.api-key", "KEY", "API key of Qdrant.", "QDRANT__API_KEY"),
    ("qdrant.collection", "NAME", "Collection. Default: the table's name.", None),
    (
        "qdrant.distance-metric",
        "COLUMN=METRIC",
        "cosine, euclid, dot or manhattan; repeatable, or separated by ; or commas.",
        None,
    ),
    (
        "migration.num-workers",
        "N",
        "Worker processes of the copy. Default: as many as CPU cores.",
        "MIGRATION__NUM_WORKERS",
    ),
    (
        "migration.batch-size",
        "N",
        "Rows a worker reads and writes at once.",
        "MIGRATION__BATCH_SIZE",
    ),
    (
        "migration.batch-delay",
        "MS",
        "Milliseconds a worker rests after each batch.",
        "MIGRATION__BATCH_DELAY",
    ),
    (
        "migration.window",
        "SECONDS",
        "How long the copy may hold the stream before changes are applied again.",
        "MIGRATION__WINDOW_SECONDS",
    ),
    ("migration.executor", "NAME", "processes or ray.", "MIGRATION__EXECUTOR"),
    (
        "migration.ids",
        "SCHEME",
        "native, or qdrant-migration: the ids that tool computes.",
        None,
    ),
    ("pipeline.name", "NAME", "Name of the pipeline in its own records.", "PIPELINE__NAME"),
    ("http.host", "ADDRESS", "Address of the HTTP endpoint.", "HTTP__HOST"),
    ("http.port", "PORT", "Port of the HTTP endpoint; 0 picks a free one.", "HTTP__PORT"),
    ("log.level", "LEVEL", "debug, info, warning or error.", "LOG__LEVEL"),
    ("log.format", "FORMAT", "auto, console or json.", "LOG__FORMAT"),
)
# Flags that are true when they stand alone; --no-FLAG and --FLAG=false make them false.
_SWITCHES: Final = (
    (
        "migration.create-collection",
        "Create collections that do not exist. Default: yes.",
        "MIGRATION__CREATE_COLLECTION",
    ),
    (
        "migration.adopt",
        "Take over collections that hold points: verify and repair instead of copying.",
        "MIGRATION__ADOPT",
    ),
)
#: Other names of flags; the first two are those of Qdrant's migration tool.
_ALIASES: Final = {
    "migration.batch-size": "-b",
    "migration.create-collection": "-c",
    "migration.adopt": "--adopt",
}
_REPEATABLE: Final = ("pg.columns", "qdrant.distance-metric")

_TRUE: Final = ("true", "1", "yes")
_FALSE: Final = ("false", "0", "no")


class SwitchCommand(TyperCommand):
    """A command whose switches also take ``=true`` and ``=false``."""

    # Typer knows its own context type by a private name only.
    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the arguments, switches with a value written as those without."""
        switches = {
            name: option
            for option in self.params
            if isinstance(option, TyperOption) and option.is_flag
            for name in option.opts
        }
        end = args.index("--") if "--" in args else len(args)
        rewritten = [self._rewritten(ctx, argument, switches) for argument in args[:end]]
        return super().parse_args(ctx, [a for a in rewritten if a is not None] + args[end:])

    def _rewritten(
        self, ctx: typer.Context, argument: str, switches: Mapping[str, TyperOption]
    ) -> str | None:
        name, equals, value = argument.partition("=")
        if not equals or name not in switches:
            return argument
        if value.lower() in _TRUE:
            return name
        if value.lower() not in _FALSE:
            raise typer.BadParameter(f"{name}: expected true or false.", ctx=ctx)
        # A switch without an opposite is false unless it is given.
        return next(iter(switches[name].secondary_opts), None)


def _parameter_name(flag: str) -> str:
    return flag.replace(".", "_").replace("-", "_")


def _parameters() -> Iterator[inspect.Parameter]:
    """The options as Typer reads them from a signature."""
    yield _parameter(
        "config",
        Annotated[
            Path | None,
            typer.Option("--config", metavar="FILE", help="TOML file. [env: CDC_SYNC_CONFIG]"),
        ],
    )
    for flag, placeholder, text, variable in _FLAGS:
        names = [f"--{flag}", *_aliases(flag)]
        option = typer.Option(*names, metavar=placeholder, help=_help(text, variable))
        kind = list[str] | None if flag in _REPEATABLE else str | None
        yield _parameter(_parameter_name(flag), Annotated[kind, option])
    for flag, text, variable in _SWITCHES:
        names = [f"--{flag}/--no-{flag}", *_aliases(flag)]
        option = typer.Option(*names, help=_help(text, variable), show_default=False)
        yield _parameter(_parameter_name(flag), Annotated[bool | None, option])


def _help(text: str, variable: str | None) -> str:
    return f"{text} [env: CDC_SYNC_{variable}]" if variable else text


def _aliases(flag: str) -> list[str]:
    return [_ALIASES[flag]] if flag in _ALIASES else []


def _parameter(name: str, annotation: object) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def takes_settings(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command ``--config`` and the flags, and call it with the settings they make.

    The command's first parameter is the :class:`~cdc_sync.loading.LoadedSettings`; its others are
    its own options, or the :class:`typer.Context` if it is called ``context``. Register it with
    ``cls=SwitchCommand``.
    """
    own = _own_parameters(command)
    shared = list(_parameters())
    wants_context = any(option.name == "context" for option in own)

    @functools.wraps(command)
    def wrapper(context: typer.Context, **values: object) -> int:
        options = {option.name: values.pop(option.name) for option in shared}
        if wants_context:
            values["context"] = context
        return command(_load(context, options), **values)

    context = inspect.Parameter(
        "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    keyword_only = [
        option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for option in own
        if option.name != "context"
    ]
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
    overrides |= {flag: options[_parameter_name(flag)] for flag, *_ in _SWITCHES}
    if overrides["log.level"] == "debug":
        invocation_of(context).debug = True
    _hint_at_secrets(overrides)
    config = options["config"]
    loaded = load_settings(config if isinstance(config, Path) else None, overrides, os.environ)
    add_secrets([*secrets_of(loaded.settings), os.environ.get("PGPASSWORD", "")])
    if loaded.settings.log.level == "debug":
        invocation_of(context).debug = True
    return loaded


def _hint_at_secrets(overrides: Mapping[str, object]) -> None:
    """Say on stderr when a secret is on the command line, which :mod:`cdc_sync.cli.process_list`
    takes out of sight, but not before the program has started."""
    from cdc_sync.ops.redaction import has_password

    shown = []
    if overrides["qdrant.api-key"]:
        shown.append(("--qdrant.api-key", "CDC_SYNC_QDRANT__API_KEY"))
    url = overrides["pg.url"]
    if isinstance(url, str) and has_password(url):
        shown.append(("the password in --pg.url", "CDC_SYNC_SOURCE__URL"))
    for what, variable in shown:
        typer.echo(
            f"hint: {what} shows in process lists until it is hidden there, and in the shell's "
            f"history; {variable} or {variable}_FILE does not.",
            err=True,
        )
