"""The dashboard and the alert rules as tests read them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
GRAFANA: Final = ROOT / "grafana"
ALERTS: Final = GRAFANA / "alerts.yml"

#: Metrics of Qdrant itself, which only its own endpoint has.
OF_QDRANT: Final = frozenset({"collection_points"})

Json = dict[str, Any]

#: What Grafana would put in for its variables, here for everything there is.
_VARIABLES: Final = {"$job": "cdc-sync", "$instance": ".*", "$table": ".*"}


def load_dashboard() -> Json:
    """The dashboard."""
    loaded: Json = json.loads((GRAFANA / "cdc-sync.json").read_text(encoding="utf-8"))
    return loaded


def panels(dashboard: Json) -> Iterator[Json]:
    """Every panel, those of collapsed rows too, without the rows."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


@dataclass(frozen=True, slots=True)
class Expression:
    """One query of a panel."""

    panel: str
    text: str

    def filled(self, rate_interval: str) -> str:
        """As Prometheus gets it."""
        text = self.text.replace("$__rate_interval", rate_interval)
        for name, value in _VARIABLES.items():
            text = text.replace(name, value)
        return text


def expressions(dashboard: Json) -> list[Expression]:
    """Every query of every panel."""
    return [
        Expression(panel["title"], target["expr"])
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def alert_rules() -> list[Json]:
    """Every rule."""
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


_UNITS: Final[Mapping[str, int]] = {"s": 1, "m": 60, "h": 3600}


def seconds(duration: str) -> int:
    """Seconds of a duration such as 15m; 0 for none."""
    return int(duration[:-1]) * _UNITS[duration[-1]] if duration else 0


def quicker(text: str, factor: int) -> str:
    """The rules with every duration divided: ``for`` and ranges alike."""

    def shorter(match: re.Match[str]) -> str:
        milliseconds = seconds(match[2]) * 1000 // factor
        return f"{match[1]}{milliseconds}ms{match[3]}"

    text = re.sub(r"(\[)(\d+[smh])(\])", shorter, text)
    return re.sub(r"(\bfor: )(\d+[smh])(\b)", shorter, text)
