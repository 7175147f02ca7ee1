"""The dashboard: what it names exists, and it is laid out as a person would want it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import yaml

from cdc_sync.ops.metrics import Metrics
from tests.operate.dashboard import (
    GRAFANA,
    OF_QDRANT,
    Json,
    alert_rules,
    expressions,
    load_dashboard,
    panels,
)
from tests.operate.promql import Exposed, Matcher, Selector, base_name, selectors


@pytest.fixture(scope="module")
def exposed() -> Exposed:
    return Exposed.by_daemon()


@pytest.fixture(scope="module")
def dashboard() -> Json:
    return load_dashboard()


def test_selectors_are_read_as_prometheus_reads_them() -> None:
    found = list(
        selectors(
            'sum by (le) (rate(a_bucket{x="1,{2", y=~"a|b"}[5m])) / -(b > 1e9) unless on (job) c'
        )
    )
    assert [selector.metric for selector in found] == ["a_bucket", "b", "c"]
    assert found[0] == Selector("a_bucket", (Matcher("x", "=", "1,{2"), Matcher("y", "=~", "a|b")))


def test_what_is_not_there_is_noticed(exposed: Exposed) -> None:
    for expression, complaint in {
        "cdc_sync_nothing": "no metric",
        'cdc_sync_state{table="x"}': "no label",
        'cdc_sync_state{state=~"streaming|dreaming"}': "never has state=dreaming",
        "sum by (tabel) (cdc_sync_changes_total)": "nothing has the label tabel",
    }.items():
        assert any(complaint in x for x in exposed.complaints(expression)), expression


def test_every_expression_names_what_is_exposed(dashboard: Json, exposed: Exposed) -> None:
    wrong = {
        expression.panel: complaints
        for expression in expressions(dashboard)
        if not {s.metric for s in selectors(expression.text)} <= OF_QDRANT
        and (complaints := exposed.complaints(expression.text))
    }
    assert wrong == {}


def test_annotations_and_variables_name_what_is_exposed(dashboard: Json, exposed: Exposed) -> None:
    ours = [x["expr"] for x in dashboard["annotations"]["list"] if "expr" in x]
    assert len(ours) == 2
    for query in [v["query"]["query"] for v in _query_variables(dashboard)]:
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert match is not None, query
        ours.append(f"sum by ({match[2]}) ({match[1]})")
    assert {x: exposed.complaints(x) for x in ours if exposed.complaints(x)} == {}


def test_every_expression_keeps_to_the_chosen_job_and_instance(dashboard: Json) -> None:
    for expression in expressions(dashboard):
        for selector in selectors(expression.text):
            if selector.metric in OF_QDRANT:
                continue
            matchers = {(m.label, m.operator, m.value) for m in selector.matchers}
            chosen = {("job", "=", "$job"), ("instance", "=~", "$instance")}
            assert chosen <= matchers, expression
            if "table" in {m.label for m in selector.matchers}:
                assert ("table", "=~", "$table") in matchers, expression


def test_ranges_follow_the_resolution(dashboard: Json) -> None:
    # Half an hour and five minutes are what the two estimates of time are made from.
    ranges = {
        found
        for expression in expressions(dashboard)
        for found in re.findall(r"\[([^\]]+)\]", expression.text)
    }
    assert ranges == {"$__rate_interval", "30m", "5m"}


def test_almost_every_metric_is_on_it(dashboard: Json) -> None:
    """What is left out is left out on purpose."""
    shown = {base_name(s.metric) for e in expressions(dashboard) for s in selectors(e.text)}
    left_out = {spec.name.removeprefix("cdc_sync_") for spec in Metrics().specs} - {
        name.removeprefix("cdc_sync_") for name in shown
    }
    assert left_out <= {
        "pipeline_info",
        "received_messages_total",
        "values_nulled_total",
        "control_requests_total",
        "orphans_total",
        "rows_reread_total",
        "dead_letter_retries_total",
        "dead_letter_failures_total",
        "batch_bytes",
        "snapshot_bytes_total",
        "snapshot_xmin_age_transactions",
        "checkpoint_writes_total",
        "status_updates_total",
        "sink_window_points",
        "slot_spilled_transactions_total",
        "rebuild_slot_active",
        "sweep_parts_total",
        "table_stopped",
    }, "a metric that is new: put it on the dashboard, or here"


def test_ids_are_unique_and_nothing_is_tied_to_one_installation(dashboard: Json) -> None:
    everything = [*dashboard["panels"], *panels(dashboard)]
    ids = {id(x): x["id"] for x in everything}
    assert len(set(ids.values())) == len(ids)
    assert dashboard["uid"] == "cdc-sync"
    assert dashboard["id"] is None
    for panel in panels(dashboard):
        for holder in (panel, *panel["targets"]):
            assert holder["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [v["name"] for v in dashboard["templating"]["list"]] == [
        "datasource",
        "job",
        "instance",
        "table",
    ]


def test_panels_say_what_they_are(dashboard: Json) -> None:
    for panel in panels(dashboard):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert len({t["refId"] for t in panel["targets"]}) == len(panel["targets"])
    titles = [panel["title"] for panel in panels(dashboard)]
    assert len(set(titles)) == len(titles)


def test_panels_do_not_overlap(dashboard: Json) -> None:
    for row in (dashboard["panels"], *_collapsed(dashboard)):
        taken: set[tuple[int, int]] = set()
        for panel in row:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            cells = set(
                itertools.product(
                    range(place["x"], place["x"] + place["w"]),
                    range(place["y"], place["y"] + place["h"]),
                )
            )
            assert not cells & taken, panel["title"]
            taken |= cells


def test_rows_are_in_the_order_of_questions(dashboard: Json) -> None:
    rows = [p for p in dashboard["panels"] if p["type"] == "row"]
    assert [r["title"] for r in rows] == [
        "Overview",
        "Lag",
        "Source and slot",
        "Throughput",
        "Where time goes",
        "Qdrant",
        "Snapshot",
        "Correctness",
        "Process",
    ]
    assert {r["title"] for r in rows if r["collapsed"]} == {"Snapshot", "Process"}


def test_alerts_that_panels_mention_exist_and_have_the_same_thresholds(dashboard: Json) -> None:
    rules = {rule["alert"]: rule["expr"] for rule in alert_rules()}
    by_title = {panel["title"]: panel for panel in panels(dashboard)}
    for panel in by_title.values():
        for name in re.findall(r"CdcSync\w+", panel["description"]):
            assert name in rules, panel["title"]
    for title, value, names in (
        ("Lag in seconds", 60, ["CdcSyncLagHigh"]),
        ("Lag in seconds", 900, ["CdcSyncLagVeryHigh"]),
        ("WAL of the slot", 10e9, ["CdcSyncRetainedWalGrowing"]),
        ("Failed requests", 0.05, ["CdcSyncSinkErrors"]),
        ("Loops", 60, ["CdcSyncLoopStuck"]),
        ("Age of the last confirmation", 300, ["CdcSyncCheckpointStale"]),
    ):
        steps = by_title[title]["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert value in [step["value"] for step in steps], title
        for name in names:
            limits = [float(x) for x in re.findall(r"> ([\d.e]+)", rules[name])]
            assert value in limits, name


def test_provisioning_and_dashboard_fit_each_other(dashboard: Json) -> None:
    folder = GRAFANA / "provisioning"
    (source,) = _yaml(folder / "datasources" / "prometheus.yml")["datasources"]
    assert source["type"] == "prometheus"
    assert source["isDefault"] is True
    (provider,) = _yaml(folder / "dashboards" / "cdc-sync.yml")["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    config = _yaml(GRAFANA / "prometheus.yml")
    assert config["rule_files"] == ["alerts.yml"]
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    assert config["scrape_configs"][0]["job_name"] == "cdc-sync"


def _query_variables(dashboard: Json) -> list[Json]:
    return [v for v in dashboard["templating"]["list"] if v["type"] == "query"]


def _collapsed(dashboard: Json) -> list[list[Json]]:
    return [p["panels"] for p in dashboard["panels"] if p["type"] == "row" and p["collapsed"]]


def _yaml(path: Path) -> Json:
    loaded: Json = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded
