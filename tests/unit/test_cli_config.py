"""``cdc-sync config``: the file it writes, and the settings it shows."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel

from cdc_sync.cli import main
from cdc_sync.cli.config_init import settings_toml
from cdc_sync.config import Settings, TableSettings
from cdc_sync.errors import ExitCode
from cdc_sync.loading import load_settings
from cdc_sync.settings_schema import SECTIONS
from tests.support.command_line import API_KEY, SECRET, URL, output

MODELS: tuple[type[BaseModel], ...] = (*SECTIONS.values(), TableSettings)
pytestmark = pytest.mark.usefixtures("clean_environment")


# -- config init


def _uncommented(text: str) -> str:
    return re.sub(r"^#(?=\w+ = )", "", text, flags=re.MULTILINE)


def test_the_generated_file_loads_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(settings_toml())
    settings = load_settings(path, {}, {}).settings
    assert settings.http == Settings.model_fields["http"].get_default(call_default_factory=True)
    assert len(settings.tables) == 1


def test_the_generated_file_loads_when_all_is_uncommented(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(_uncommented(settings_toml()))
    loaded = load_settings(path, {}, {})
    document = tomllib.loads(path.read_text())
    for section, model in SECTIONS.items():
        assert list(document[section]) == list(model.model_fields)
        for name, info in model.model_fields.items():
            default = info.get_default(call_default_factory=True)
            if not info.is_required() and default is not None:
                assert document[section][name] == default
    assert list(document["tables"][0]) == list(TableSettings.model_fields)
    assert {origin.kind for origin in loaded.origins.values()} == {"file"}


def test_every_key_of_the_generated_file_is_described() -> None:
    text = re.sub(r"\n# ", " ", settings_toml())
    for model in MODELS:
        for info in model.model_fields.values():
            assert info.description is not None
            assert info.description in text


def test_init_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    assert main(["config", "init", "--output", str(path)]) == 0
    assert path.read_text() == settings_toml()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("mine")
    assert main(["config", "init", "--output", str(path)]) == ExitCode.CONFIG
    assert path.read_text() == "mine"
    assert "not overwritten" in output(capsys)[1]
    assert main(["config", "init", "--output", str(tmp_path / "a" / "b")]) == ExitCode.CONFIG


def test_init_prints_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "init"]) == 0
    assert output(capsys) == (settings_toml(), "")


# -- config show


def _shown(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    assert main(["config", "show", *arguments, "--json"]) == 0
    entries = json.loads(output(capsys)[0])["settings"]
    return {entry["key"]: entry for entry in entries}


def test_show_has_every_setting_with_its_origin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[pipeline]\nbatch_rows = 9\n[[tables]]\nname = 'a'\n")
    key = tmp_path / "key"
    key.write_text(API_KEY)
    monkeypatch.setenv("CDC_SYNC_QDRANT__API_KEY_FILE", str(key))
    monkeypatch.setenv("CDC_SYNC_SOURCE__URL", URL)
    shown = _shown(["--config", str(config), "--http.port", "0"], capsys)
    assert {name.partition(".")[0] for name in shown} == {*SECTIONS, "tables[0]"}
    assert len(shown) == sum(len(model.model_fields) for model in MODELS)
    origins = {
        "source.url": ("***", "environment", "CDC_SYNC_SOURCE__URL"),
        "qdrant.api_key": ("***", "secret file", f"{key} (CDC_SYNC_QDRANT__API_KEY_FILE)"),
        "pipeline.batch_rows": (9, "file", str(config)),
        "http.port": (0, "flag", "--http.port"),
        "http.host": ("127.0.0.1", "default", None),
        "tables[0].name": ("a", "file", str(config)),
    }
    for name, (value, origin, where) in origins.items():
        assert shown[name] == {"key": name, "value": value, "origin": origin, "where": where}


def test_show_for_people_masks_secrets_too(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--pg.url", URL, "--pg.table", "t", "--qdrant.api-key", API_KEY]
    other = ["--qdrant.url", f"https://u:{SECRET}@q:6334"]
    assert main(["config", "show", *arguments, *other]) == 0
    lines = dict(line.split(maxsplit=1) for line in output(capsys)[0].splitlines())
    assert lines["source.url"].split() == ["***", "flag", "--pg.url"]
    assert lines["qdrant.api_key"].split() == ["***", "flag", "--qdrant.api-key"]
    assert lines["qdrant.url"].startswith("https://u:***@q:6334 ")
    assert lines["qdrant.ca_file"].split() == ["-", "default"]
