"""The alert rules: what they name exists, promtool takes them, and each has its runbook."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.operate.dashboard import ALERTS, GRAFANA, ROOT, alert_rules, quicker, seconds
from tests.operate.prometheus import promtool
from tests.operate.promql import Exposed

RUNBOOKS = ROOT / "docs" / "alerts.md"


def _anchors(text: str) -> set[str]:
    """Anchors of headings, as GitHub and most renderers make them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_promtool_takes_them() -> None:
    assert "SUCCESS" in promtool("check", "rules", "--lint=all", str(ALERTS), directory=GRAFANA)
    assert "SUCCESS" in promtool("check", "config", "prometheus.yml", directory=GRAFANA)


def test_each_fires_when_it_should_and_not_before() -> None:
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml", directory=GRAFANA)


def test_every_alert_has_a_unit_test_in_which_it_fires() -> None:
    text = (GRAFANA / "alerts_test.yml").read_text(encoding="utf-8")
    fires = set(re.findall(r'labels: ALERTS\{alertname="(\w+)"', text)) | {
        case["alertname"]
        for test in yaml.safe_load(text)["tests"]
        for case in test.get("alert_rule_test", [])
        if case["exp_alerts"]
    }
    assert fires == {rule["alert"] for rule in alert_rules()}


def test_expressions_name_what_is_exposed() -> None:
    exposed = Exposed.by_daemon()
    wrong = {
        rule["alert"]: complaints
        for rule in alert_rules()
        if (complaints := exposed.complaints(rule["expr"]))
    }
    assert wrong == {}


@pytest.mark.parametrize("rule", alert_rules(), ids=lambda rule: str(rule["alert"]))
def test_each_has_severity_words_and_a_runbook(rule: dict[str, dict[str, str]]) -> None:
    assert rule["labels"]["severity"] in ("page", "warning")
    annotations = rule["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert not annotations["summary"].endswith(".")
    assert annotations["description"].endswith(".")
    page, _, anchor = annotations["runbook_url"].partition("#")
    assert page == "docs/alerts.md"
    assert anchor == str(rule["alert"]).lower()
    assert anchor in _anchors(RUNBOOKS.read_text(encoding="utf-8"))


def test_the_address_of_the_runbooks_is_put_in_as_the_page_says(tmp_path: Path) -> None:
    (command,) = re.findall(r"```bash\n(sed .+)\n```", RUNBOOKS.read_text(encoding="utf-8"))
    (tmp_path / "grafana").mkdir()
    copy = tmp_path / "grafana" / ALERTS.name
    copy.write_bytes(ALERTS.read_bytes())
    subprocess.run(shlex.split(command), cwd=tmp_path, check=True)
    (group,) = yaml.safe_load(copy.read_text(encoding="utf-8"))["groups"]
    urls = {rule["annotations"]["runbook_url"] for rule in group["rules"]}
    assert len(urls) == len(alert_rules())
    assert all(url.startswith("https://wiki.example.com/cdc-sync/alerts.md#") for url in urls)


def test_no_runbook_is_left_over() -> None:
    text = RUNBOOKS.read_text(encoding="utf-8")
    described = set(re.findall(r"^### (CdcSync\w+)$", text, re.MULTILINE))
    assert described == {rule["alert"] for rule in alert_rules()}
    for name, severity in re.findall(r"^### (CdcSync\w+)\n\n_(page|warning)", text, re.MULTILINE):
        (rule,) = [rule for rule in alert_rules() if rule["alert"] == name]
        assert rule["labels"]["severity"] == severity, name


def test_the_rules_of_the_operator_are_the_same() -> None:
    """Kubernetes has them as a PrometheusRule."""
    manifest = ROOT / "docker" / "kubernetes" / "monitoring" / "prometheusrule.yaml"
    rule = yaml.safe_load(manifest.read_text(encoding="utf-8"))
    assert rule["kind"] == "PrometheusRule"
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text(encoding="utf-8"))


def test_quicker_divides_every_duration(tmp_path: Path) -> None:
    text = ALERTS.read_text(encoding="utf-8")
    fast = tmp_path / "alerts.yml"
    fast.write_text(quicker(text, 30), encoding="utf-8")
    assert "SUCCESS" in promtool("check", "rules", "alerts.yml", directory=tmp_path)
    slow_rules, fast_rules = alert_rules(), yaml.safe_load(fast.read_text())["groups"][0]["rules"]
    for slow, quick in zip(slow_rules, fast_rules, strict=True):
        wanted = seconds(slow.get("for", ""))
        assert quick.get("for", "0ms") == f"{wanted * 1000 // 30}ms"
        assert not re.search(r"\[\d+[smh]\]", quick["expr"])
