"""The Typer application and its commands.

Help is plain text and is answered before options are converted: rich and pydantic would take
longer to import than everything else together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from typer.core import TyperCommand, TyperGroup


@dataclass(slots=True)
class Invocation:
    """What the commands and the error handling of one run share."""

    debug: bool = False


def _help_is_asked(arguments: list[str], *, whole: bool) -> bool:
    """Whether ``--help`` is among the options; of a group only those before the subcommand count."""
    for argument in arguments:
        if argument == "--" or (not whole and not argument.startswith("-")):
            return False
        if argument == "--help":
            return True
    return False


class Command(TyperCommand):
    """A command that shows its help without pydantic."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Answer ``--help``, else parse."""
        if _help_is_asked(args, whole=True):
            typer.echo(self.get_help(ctx))
            raise typer.Exit
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """A group of commands that shows its help without pydantic."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Answer ``--help``, else parse."""
        if not args or _help_is_asked(args, whole=False):
            typer.echo(self.get_help(ctx))
            raise typer.Exit(0 if args else 2)
        return super().parse_args(ctx, args)
