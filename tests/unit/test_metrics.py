"""Metrics: the page and the registry agree, and what is exposed is what was set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cdc_sync.errors import ErrorKind, policy
from cdc_sync.ops.metrics import Metrics, State
from cdc_sync.ops.status import StatusBoard

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
_ROW = re.compile(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|([^|]*)\|([^|]*)\|$", re.MULTILINE)

Sample = tuple[str, tuple[tuple[str, str], ...]]


def samples(metrics: Metrics) -> dict[Sample, float]:
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return samples(metrics).get((f"cdc_sync_{name}", tuple(sorted(labels.items()))))


def test_the_page_and_the_registry_agree() -> None:
    documented = {
        (match[1], match[2], tuple(re.findall(r"\w+", match[3])))
        for match in _ROW.finditer(PAGE.read_text())
    }
    specified = {(spec.name, spec.type, spec.labels) for spec in Metrics().specs}
    assert documented == specified


def test_every_metric_of_the_page_has_a_meaning_and_no_row_is_lost() -> None:
    text = PAGE.read_text()
    rows = list(_ROW.finditer(text))
    assert len(rows) == len(re.findall(r"^\| `cdc_sync_", text, re.MULTILINE))
    for match in rows:
        assert match[4].strip(), f"{match[1]} has no meaning"
        assert match[5].strip(), f"nobody is told what to do about {match[1]}"


def test_documents_name_no_metric_that_is_not_there() -> None:
    known = {spec.name for spec in Metrics().specs}
    known |= {
        f"{spec.name}_{part}"
        for spec in Metrics().specs
        if spec.type == "histogram"
        for part in ("bucket", "count", "sum")
    }
    for page in [PAGE.parents[1] / "README.md", *PAGE.parent.glob("*.md")]:
        named = set(re.findall(r"\bcdc_sync_[a-z_]+", page.read_text(encoding="utf-8")))
        assert named <= known, page.name


def test_the_registry_holds_what_the_specifications_say() -> None:
    metrics = Metrics()
    metrics.add_table("public.items")
    metrics.add_task("stream")
    metrics.set_pipeline(slot="s", publication="p", database="d", protocol=1)
    specified = {spec.name.removesuffix("_total"): spec for spec in metrics.specs}
    assert len(specified) == len(metrics.specs)
    for family in metrics.registry.collect():
        if not family.name.startswith("cdc_sync_"):
            continue
        spec = specified.pop(family.name)
        assert family.type == spec.type
        assert family.documentation == spec.help
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(spec.labels), sample
    assert specified == {}


def test_names_follow_the_conventions() -> None:
    for spec in Metrics().specs:
        assert spec.name.startswith("cdc_sync_")
        assert spec.name.endswith("_total") is (spec.type == "counter")
        assert not re.search(r"_(ms|milliseconds|kb|mb|percent)(_|$)", spec.name)
        assert spec.help.endswith(".")


def test_the_process_is_measured_too_and_creation_times_are_not() -> None:
    names = {name for name, _ in samples(Metrics())}
    assert "process_resident_memory_bytes" in names
    assert "python_gc_collections_total" in names
    assert not [name for name in names if name.endswith("_created")]


def test_two_pipelines_in_a_process_do_not_meet() -> None:
    first, second = Metrics(), Metrics()
    first.transactions.inc(3)
    assert value(first, "transactions_total") == 3
    assert value(second, "transactions_total") == 0


def test_a_table_begins_with_zeros_for_every_label() -> None:
    metrics = Metrics()
    table = metrics.add_table("public.items")
    assert value(metrics, "changes_total", table="public.items", op="truncate") == 0
    assert value(metrics, "unchanged_toast_total", table="public.items", resolution="failed") == 0
    assert value(metrics, "snapshot_chunks", table="public.items", state="pending") == 0
    assert value(metrics, "dead_letters_total", table="public.items", kind="mapping") == 0
    assert metrics.add_table("public.items") is table
    table.changes["delete"].inc(2)
    assert value(metrics, "changes_total", table="public.items", op="delete") == 2


@pytest.mark.parametrize("state", get_args(State))
def test_exactly_one_state_is_on(state: State) -> None:
    metrics = Metrics()
    metrics.set_state("starting")
    metrics.set_state(state)
    on = [
        dict(labels)["state"]
        for (name, labels), number in samples(metrics).items()
        if name == "cdc_sync_state" and number
    ]
    assert on == [state]


def test_the_wal_status_can_be_unknown() -> None:
    metrics = Metrics()
    metrics.set_wal_status("lost")
    assert value(metrics, "slot_wal_status", status="lost") == 1
    metrics.set_wal_status(None)
    assert value(metrics, "slot_wal_status", status="lost") == 0


def test_an_optional_gauge_has_no_sample_until_it_is_known() -> None:
    metrics = Metrics()
    assert value(metrics, "slot_safe_wal_bytes") is None
    metrics.slot_safe_wal_bytes.set(0)
    assert value(metrics, "slot_safe_wal_bytes") == 0
    metrics.slot_safe_wal_bytes.set(None)
    assert value(metrics, "slot_safe_wal_bytes") is None


def test_a_counter_of_the_servers_is_shown_as_it_was_read() -> None:
    metrics = Metrics()
    assert value(metrics, "slot_spilled_bytes_total") is None
    metrics.slot_spilled_bytes.set(70)
    assert value(metrics, "slot_spilled_bytes_total") == 70
    metrics.slot_spilled_bytes.set(5)  # its statistics were reset
    assert value(metrics, "slot_spilled_bytes_total") == 5
    metrics.slot_spilled_bytes.set(None)
    assert value(metrics, "slot_spilled_bytes_total") is None


def test_the_lag_is_no_fact_before_it_is_known() -> None:
    metrics = Metrics()
    board = StatusBoard("default", metrics=metrics)
    assert value(metrics, "lag_seconds") is None
    board.set_lag(lag_bytes=0, seconds=0.0)
    assert value(metrics, "lag_seconds") == 0
    board.set_lag(lag_bytes=None, seconds=None)
    assert value(metrics, "lag_seconds") is None


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_error_kind_is_counted_under_its_policy(kind: ErrorKind) -> None:
    metrics = Metrics()
    metrics.count_error(kind)
    counted = [
        dict(labels)
        for (name, labels), number in samples(metrics).items()
        if name == "cdc_sync_errors_total" and number == 1
    ]
    assert [(entry["kind"], entry["retry"]) for entry in counted] == [
        (kind.value, policy(kind).retry.value)
    ]


def test_what_is_retried_has_a_counter() -> None:
    metrics = Metrics()
    assert ErrorKind.SOURCE_UNAVAILABLE in metrics.source_reconnects
    assert ErrorKind.SLOT_ACTIVE in metrics.source_reconnects
    assert ErrorKind.SINK_UNKNOWN in metrics.sink_retries
    assert ErrorKind.SINK_REFUSED not in metrics.sink_retries


def test_a_pipeline_that_is_described_anew_has_one_description() -> None:
    metrics = Metrics()
    metrics.set_pipeline(slot="a", publication="p", database="d", protocol=1)
    metrics.set_pipeline(slot="b", publication="p", database="d", protocol=2)
    info = [labels for name, labels in samples(metrics) if name == "cdc_sync_pipeline_info"]
    assert [dict(labels)["slot"] for labels in info] == ["b"]
