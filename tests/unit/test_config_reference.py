"""docs/configuration.md is what ``cdc-sync config reference`` prints, and has every setting."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cdc_sync.cli import main
from cdc_sync.cli.config_reference import reference
from cdc_sync.config import TableSettings
from cdc_sync.loading import FLAGS, TABLE_FLAGS, load_settings
from cdc_sync.settings_schema import SECTIONS
from tests.support.command_line import output

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
MODELS: dict[str, type[BaseModel]] = {**SECTIONS, "tables": TableSettings}
pytestmark = pytest.mark.usefixtures("clean_environment")


def cells() -> dict[str, list[str]]:
    """The cells of each setting's row, by its dotted key."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in reference().splitlines():
        if heading := re.fullmatch(r"## `\[+(\w+)\]+`", line):
            section = heading[1]
        elif row := re.match(r"\| `(\w+)` \|", line):
            assert f"{section}.{row[1]}" not in found
            found[f"{section}.{row[1]}"] = re.split(r"(?<!\\)\|", line)[1:-1]
    return found


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference(), (
        "The settings have changed: cdc-sync config reference > docs/configuration.md"
    )


def test_the_command_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "reference"]) == 0
    assert output(capsys) == (reference(), "")


def test_every_setting_has_one_row_of_five_cells() -> None:
    expected = [f"{name}.{key}" for name, model in MODELS.items() for key in model.model_fields]
    rows = cells()
    assert sorted(rows) == sorted(expected)
    assert {len(row) for row in rows.values()} == {5}
    assert all(cell.strip() for row in rows.values() for cell in row)


def test_the_flags_are_there() -> None:
    rows = cells()
    for flag, key in (*FLAGS.items(), *((f, f"tables.{k}") for f, k in TABLE_FLAGS.items())):
        assert f"`--{flag}`" in rows[key][3], flag


@pytest.mark.parametrize("files", [False, True])
def test_the_variables_set_what_they_stand_beside(files: bool, tmp_path: Path) -> None:
    environ = {"CDC_SYNC_TABLES": '[{"name": "items"}]'}
    variables = {}
    for key, row in cells().items():
        named = re.findall(r"`(CDC_SYNC_\w+)`", row[3])
        assert len(named) == (0 if key.startswith("tables.") else 2), key
        if named:
            section, name = key.split(".")
            value = _some_value(SECTIONS[section].model_fields[name])
            variables[key] = variable = named[files]
            environ[variable] = _in_a_file(tmp_path / key, value) if files else value
    loaded = load_settings(None, {}, environ)
    for key, variable in variables.items():
        origin = loaded.origin(key)
        assert origin.kind == ("secret file" if files else "environment"), key
        assert variable in origin.where


def _some_value(info: FieldInfo) -> str:
    """A value that a field takes, as a variable has it."""
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    value = info.examples[0] if default is None and info.examples else default
    assert value is not None
    return value if isinstance(value, str) else json.dumps(value)


def _in_a_file(path: Path, value: str) -> str:
    path.write_text(value + "\n")
    return str(path)
