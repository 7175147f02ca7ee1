"""A real Prometheus scrapes a real daemon: rules and panels are evaluated, and almost every panel
has something to show at once. The whole incident is a campaign (test_grafana_incident.py)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.operate.dashboard import OF_QDRANT, alert_rules, expressions, load_dashboard
from tests.operate.incident import Scene
from tests.support.fix_postgres import Database
from tests.support.qdrant_control import QdrantProcess

#: These need a copy that is watched, a slot with a limit, or something that goes wrong.
_LATER = {
    "Time until the slot is invalidated",
    "WAL of the slot",
    "Time left",
    "Age of the snapshot",
    "Duration of chunks",
    "Rows copied",
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_panels_show_a_loaded_daemon_and_nothing_fires(
    database18: Database, qdrant_private: QdrantProcess, tmp_path: Path
) -> None:
    began = time.time()
    with Scene.open(tmp_path, database18, qdrant_private) as scene:
        wanted = [
            expression
            for expression in expressions(load_dashboard())
            if not any(metric in expression.text for metric in OF_QDRANT)
        ]
        missing = {e.text: e for e in wanted}

        def all_shown() -> bool:
            for text, expression in list(missing.items()):
                series = scene.prometheus.query_range(
                    expression.filled("5s"), began, time.time(), 1.0
                )
                if any(value == value for one in series for _, value in one.points):
                    del missing[text]
            return {e.panel for e in missing.values()} <= _LATER

        scene.daemon.wait_state("streaming")
        scene.wait(all_shown, "data for every panel")
        assert scene.load.committed > 0
        # Every rule is understood, and takes the shape of what the daemon exposes.
        assert scene.prometheus.rule_errors() == {}
        for rule in alert_rules():
            scene.prometheus.query(rule["expr"])
        assert scene.prometheus.firing() <= {"CdcSyncDown"}  # Before the daemon answered.
