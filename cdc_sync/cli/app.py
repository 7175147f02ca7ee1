"""The Typer application. Its commands are registered by :mod:`cdc_sync.cli.entry`.

Help is plain text, and is given without rich and pydantic, which would take longer to import than
everything else together.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Annotated

import typer
from typer.core import TyperGroup

from cdc_sync.errors import ExitCode


@dataclass(slots=True)
class Invocation:
    """What the commands and the error handling of one run share: the command line, and whether
    traces are shown."""

    arguments: list[str] = field(default_factory=list)
    debug: bool = False


class Group(TyperGroup):
    """A group of commands; without a command it shows its help, as an error."""

    # Typer knows its own context type by a private name only.
    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the options before the command."""
        if not args:
            typer.echo(self.get_help(ctx))
            raise typer.Exit(ExitCode.USAGE)
        own = itertools.takewhile(lambda argument: argument.startswith("-"), args)
        # Typer imports pydantic to convert even the value of a --help that is not given.
        self.add_help_option = "--help" in own
        try:
            return super().parse_args(ctx, args)
        finally:
            self.add_help_option = True


class VerifyGroup(Group):
    """The commands of ``verify``, which can be left out: then it is about the data."""

    # As above.
    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the command line, with the command that is meant if none is given."""
        if not args or args[0] not in self.commands:
            args = ["data", *args]
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
dlq_app = typer.Typer(
    cls=Group, help="Show rows that could not be written, try them again.", rich_markup_mode=None
)
verify_app = typer.Typer(
    cls=VerifyGroup, help="Compare tables with their collections.", rich_markup_mode=None
)


@app.callback()
def root(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of errors.")] = False,
) -> None:
    """Keep the options of all commands."""
    invocation_of(context).debug = debug


def invocation_of(context: typer.Context) -> Invocation:
    """The run that a context belongs to."""
    invocation = context.find_root().obj
    if not isinstance(invocation, Invocation):
        raise TypeError("the application is started by cdc_sync.cli.main")
    return invocation
