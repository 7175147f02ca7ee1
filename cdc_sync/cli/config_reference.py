"""``cdc-sync config reference``: every setting as a page of Markdown, written from the settings
models. The page in the repository, docs/configuration.md, is its output."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

_INTRODUCTION = """\
# Configuration

<!-- Written by `cdc-sync config reference` from cdc_sync/config.py; do not edit. -->

Settings come from four places. Of a key that is set in several, the first in this order counts:

1. flags of the command line, such as `--pg.url`
2. environment variables, `CDC_SYNC_<SECTION>__<KEY>`
3. files that such a variable names with `_FILE` at its end, which is where secrets belong. A file
   holds the value alone, in UTF-8; one newline at its end does not count
4. the TOML file that `--config` or `CDC_SYNC_CONFIG` names

Every key but those of `[[tables]]` has both variables; an empty one counts as not set. What is no
setting (a mistyped key, another variable that begins with `CDC_SYNC_`) is an error. Settings are
read when the program starts, and only then, but secrets from files also when a server refuses them.

```bash
cdc-sync config init                         # a TOML file to start from
cdc-sync config show --config cdc-sync.toml  # every value in effect, and where it comes from
cdc-sync check --config cdc-sync.toml        # are Postgres and Qdrant what these settings need?
```

Below, a *number* may have a fraction, and a default of `-` is none: the key may be left out, and
its meaning says what happens then. A *secret* is never printed or logged.
"""

_TABLES = """\
One `[[tables]]` for each table. [How a row becomes a point](mapping.md) says what most of these
do. From the environment all tables come together, as a JSON array in `CDC_SYNC_TABLES`. The list
is taken whole from the first place that has one. Flags describe one table (that of `--pg.table`, or
the only one), and the command then runs for that table alone.
"""


def config_reference() -> int:
    """Print the reference of all settings, as Markdown."""
    typer.echo(reference(), nl=False)
    return 0


def reference() -> str:
    """The page: every setting with its values, default, variables, flag and description."""
    from cdc_sync.config import Settings, TableSettings
    from cdc_sync.loading import FLAGS, TABLE_FLAGS
    from cdc_sync.settings_schema import SECTIONS

    flags = {key: flag for flag, key in FLAGS.items()}
    table_flags = {f"tables.{key}": flag for flag, key in TABLE_FLAGS.items()}
    parts = [_INTRODUCTION]
    for section in Settings.model_fields:
        if section == "tables":
            rows = _rows(section, TableSettings, table_flags)
            parts.append("\n".join(["## `[[tables]]`", "", _TABLES, *rows]) + "\n")
        else:
            model = SECTIONS[section]
            rows = _rows(section, model, flags)
            parts.append("\n".join([f"## `[{section}]`", "", f"{model.__doc__}", "", *rows]) + "\n")
    return "\n".join(parts)


def _rows(section: str, model: type[BaseModel], flags: Mapping[str, str]) -> Iterator[str]:
    yield "| key | value | default | set by | meaning |"
    yield "|---|---|---|---|---|"
    for name, info in model.model_fields.items():
        set_by = "<br>".join(map(_code, _ways(section, name, flags))) or "file"
        cells = (f"`{name}`", _value(info), _default(info), set_by, _escaped(_meaning(info)))
        yield f"| {' | '.join(cells)} |"


def _ways(section: str, name: str, flags: Mapping[str, str]) -> Iterator[str]:
    """Variables and flag of a key, besides the TOML file."""
    from cdc_sync.loading import FILE_SUFFIX, variable_of

    if section != "tables":
        variable = variable_of(section, name)
        yield variable
        yield variable + FILE_SUFFIX
    if flag := flags.get(f"{section}.{name}"):
        yield f"--{flag}"


def _value(info: FieldInfo) -> str:
    from cdc_sync.settings_schema import field_text, is_secret

    text, matches, pattern = field_text(info).partition(" that matches ")
    text = _escaped(text.removeprefix("a ").removeprefix("an "))
    if matches:
        text += f"{matches}{_code(pattern)}"
    return text + (", *secret*" if is_secret(info) else "")


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "**required**"
    default = info.get_default(call_default_factory=True)
    if default is None:
        return "-"
    mebibytes, rest = divmod(default, 1 << 20) if type(default) is int else (0, 0)
    size = f" ({mebibytes} MiB)" if mebibytes and not rest else ""
    return _code(json.dumps(default, ensure_ascii=False)) + size


def _meaning(info: FieldInfo) -> str:
    text = str(info.description)
    if info.is_required() and info.examples:
        text += f" Such as `{info.examples[0]}`."
    return text


def _code(text: str) -> str:
    """A code span in a cell of a Markdown table."""
    return "`" + text.replace("|", "\\|") + "`"


def _escaped(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
