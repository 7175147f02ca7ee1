"""``cdc-sync config init``: a commented TOML file, written from the settings models."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

_HEADER = """\
# Settings of cdc-sync.
#
# A key that is commented out shows its default, or an example where it has none.
# Every key but those of [[tables]] is also an environment variable,
# CDC_SYNC_<SECTION>__<KEY>, and with _FILE at the end names a file with the value,
# which is where secrets belong: CDC_SYNC_SOURCE__URL_FILE=/run/secrets/postgres-url
"""


def config_init(
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write here instead of to standard output."),
    ] = None,
) -> int:
    """Print a commented TOML file with every setting. Never overwrites a file."""
    text = settings_toml()
    if output is None:
        typer.echo(text, nl=False)
        return 0
    _write_new(output, text)
    typer.echo(
        f"Wrote {output}; set url and tables, then: cdc-sync check --config {output}", err=True
    )
    return 0


def settings_toml() -> str:
    """Every setting as TOML: those without a default as examples, the others commented out."""
    from cdc_sync.config import Settings, TableSettings
    from cdc_sync.settings_schema import SECTIONS

    parts = [_HEADER]
    for section in Settings.model_fields:
        if section == "tables":
            lines = ["# One [[tables]] for each table.", "[[tables]]", *_keys(TableSettings)]
        else:
            model = SECTIONS[section]
            lines = [f"# {model.__doc__}", f"[{section}]", *_keys(model)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _keys(model: type[BaseModel]) -> Iterator[str]:
    from cdc_sync.settings_schema import field_text, is_secret

    for name, info in model.model_fields.items():
        kind = field_text(info) + (", secret" if is_secret(info) else "")
        kind = kind[0].upper() + kind[1:]
        yield ""
        yield from textwrap.wrap(
            f"{info.description} {kind}.", 96, initial_indent="# ", subsequent_indent="# "
        )
        comment = "" if info.is_required() else "#"
        yield f"{comment}{name} = {_toml(_shown_value(info))}"


def _shown_value(info: FieldInfo) -> object:
    """The default, or the example where there is none or an empty one."""
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    if default in (None, {}, []) and info.examples:
        return info.examples[0]
    return default


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        items = ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items())
        return f"{{ {items} }}" if items else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    # Strings, numbers and booleans are written alike in JSON and TOML.
    return json.dumps(value, ensure_ascii=False)


def _write_new(path: Path, text: str) -> None:
    try:
        # Readable by the owner only: a connection string may be written into it.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"{path} exists and is not overwritten.", "Name another file, or remove this one."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror}.",
            "Name a file in a directory you may write to.",
        ) from error
