"""``cdc-sync config show``: every value in effect, and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.options import takes_settings

if TYPE_CHECKING:
    from pydantic import BaseModel

    from cdc_sync.loading import LoadedSettings

_VALUE_WIDTH = 48


@takes_settings
def config_show(
    loaded: LoadedSettings,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Print every setting in effect with its origin; secrets are masked."""
    values = list(_values(loaded))
    if as_json:
        entries = [
            {
                "key": key,
                "value": value,
                "origin": loaded.origin(key).kind,
                "where": loaded.origin(key).where or None,
            }
            for key, value in values
        ]
        typer.echo(json.dumps({"settings": entries}, indent=2, ensure_ascii=False))
        return 0
    shown = [(key, _text(value), str(loaded.origin(key))) for key, value in values]
    key_width = max(len(key) for key, _, _ in shown)
    value_width = min(_VALUE_WIDTH, max(len(value) for _, value, _ in shown))
    for key, value, origin in shown:
        typer.echo(f"{key:<{key_width}}  {value:<{value_width}}  {origin}")
    return 0


def _values(loaded: LoadedSettings) -> Iterator[tuple[str, object]]:
    from cdc_sync.config import Settings

    for section in Settings.model_fields:
        content = getattr(loaded.settings, section)
        if section == "tables":
            for index, table in enumerate(content):
                yield from _fields(f"tables[{index}]", table)
        else:
            yield from _fields(section, content)


def _fields(prefix: str, model: BaseModel) -> Iterator[tuple[str, object]]:
    from cdc_sync.ops.redaction import MASK, redact
    from cdc_sync.settings_schema import is_secret

    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if is_secret(info):
            value = None if value is None else MASK
        elif isinstance(value, str):
            value = redact(value)
        yield f"{prefix}.{name}", value


def _text(value: object) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
