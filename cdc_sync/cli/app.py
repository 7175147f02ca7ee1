"""The Typer application. Its commands are registered by :mod:`cdc_sync.cli.entry`.

Help is plain text and is answered before options are converted: rich and pydantic would take
longer to import than everything else together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup

from cdc_sync.errors import ExitCode


@dataclass(slots=True)
class Invocation:
    """What the commands and the error handling of one run share."""

    debug: bool = False


def _help_is_asked(arguments: list[str], *, options_first: bool) -> bool:
    """Whether ``--help`` is among the options; those of a group end where the command begins."""
    for argument in arguments:
        if argument == "--" or (options_first and not argument.startswith("-")):
            return False
        if argument == "--help":
            return True
    return False


class Command(TyperCommand):
    """A command that shows its help without pydantic."""

    # Typer knows its own context type by a private name only.
    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Answer ``--help``, else parse."""
        if _help_is_asked(args, options_first=False):
            typer.echo(self.get_help(ctx))
            raise typer.Exit
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """A group of commands that shows its help without pydantic, also when no command is given."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Answer ``--help``, else parse."""
        if not args or _help_is_asked(args, options_first=True):
            typer.echo(self.get_help(ctx))
            raise typer.Exit(ExitCode.OK if args else ExitCode.USAGE)
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="cdc-sync",
    cls=Group,
    help="Keeps Qdrant collections in step with Postgres pgvector tables.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)

config_app = typer.Typer(cls=Group, help="Write and show the configuration.", rich_markup_mode=None)


@app.callback()
def root(
    context: typer.Context,
    # None and not False by default: a value would be converted, and so import pydantic.
    debug: Annotated[
        bool | None, typer.Option("--debug", help="Show the trace of errors.", show_default=False)
    ] = None,
) -> None:
    """Keep the options of all commands."""
    invocation_of(context).debug = bool(debug)


def invocation_of(context: typer.Context) -> Invocation:
    """The run that a context belongs to."""
    invocation = context.find_root().obj
    if not isinstance(invocation, Invocation):
        raise TypeError("the application is started by cdc_sync.cli.main")
    return invocation
