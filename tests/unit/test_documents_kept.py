"""What docs/operations.md, guarantees.md and how-it-works.md name is there: modules, tests,
settings, metrics, alerts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cdc_sync.config import Settings
from cdc_sync.ops.metrics import Metrics
from cdc_sync.settings_schema import SECTIONS

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("operations", "guarantees", "how-it-works")
PACKAGES = {path.name for path in (ROOT / "cdc_sync").iterdir() if path.is_dir()}


def text_of(document: str) -> str:
    return (ROOT / "docs" / f"{document}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document: str) -> None:
    """Modules are named from their package on, or by their name alone; tests from within tests/."""
    named = re.findall(r"`([\w/]+\.py)`", text_of(document))
    assert named or document == "operations"
    modules = {path.name for path in (ROOT / "cdc_sync").rglob("*.py")}
    for name in named:
        assert _path(name).is_file() if "/" in name else name in modules, name


def _path(name: str) -> Path:
    top = name.partition("/")[0]
    if top in PACKAGES:
        return ROOT / "cdc_sync" / name
    return ROOT / name if top == "cdc_sync" else ROOT / "tests" / name


def test_every_guarantee_names_its_proof() -> None:
    table = text_of("guarantees").partition("## Guarantees")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 9, "one for each invariant of the design"
    for row in rows:
        assert re.search(r"`\w+/test_\w+\.py`", row), row


@pytest.mark.parametrize("document", DOCUMENTS)
def test_settings_metrics_and_alerts_exist(document: str) -> None:
    text = text_of(document)
    settings = {f"{name}.{key}" for name, model in SECTIONS.items() for key in model.model_fields}
    sections = "|".join(name for name in Settings.model_fields if name != "tables")
    for name in re.findall(rf"`((?:{sections})\.[a-z_]+)(?: = [^`]*)?`", text):
        assert name in settings, name
    alerts = (ROOT / "grafana" / "alerts.yml").read_text(encoding="utf-8")
    for name in re.findall(r"CdcSync[A-Z]\w+", text):
        assert f"alert: {name}\n" in alerts, name
    known = {metric.name for metric in Metrics().registry.collect()}
    for name in re.findall(r"`(cdc_sync_[a-z_]+)`", text):
        assert name.removesuffix("_total") in known, name
