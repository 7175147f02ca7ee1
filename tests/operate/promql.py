"""Reads PromQL as far as tests need: which metrics, labels and label values an expression names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cdc_sync.ops.attention import RebuildSlot
from cdc_sync.ops.metrics import Metrics, MirroredCounter, OptionalGauge

_KEYWORDS: Final = frozenset({"and", "or", "unless", "bool", "offset"})
_GROUPING: Final = re.compile(
    r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", re.IGNORECASE
)
_SELECTOR: Final = re.compile(r"\b([a-zA-Z_:][\w:]*)\b\s*(\{[^}]*\})?(?!\s*\()")
_MATCHER: Final = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
_RANGE: Final = re.compile(r"\[[^\]]*\]")
_SUFFIXES: Final = ("_bucket", "_count", "_sum")

#: Labels that Prometheus itself puts on every series.
TARGET_LABELS: Final = frozenset({"job", "instance"})


@dataclass(frozen=True, slots=True)
class Matcher:
    """One ``label="value"`` of a selector."""

    label: str
    operator: str
    value: str

    def values(self) -> list[str]:
        """The values it names literally."""
        if "$" in self.value:
            return []
        return self.value.split("|") if self.operator in ("=~", "!~") else [self.value]


@dataclass(frozen=True, slots=True)
class Selector:
    """One metric with its matchers."""

    metric: str
    matchers: tuple[Matcher, ...]


def selectors(expression: str) -> Iterator[Selector]:
    """Every selector of an expression."""
    bare = _RANGE.sub("", _GROUPING.sub("", expression))
    for match in _SELECTOR.finditer(_hide_label_text(bare)):
        name = match[1]
        if name.lower() in _KEYWORDS:
            continue
        # Hiding keeps every position.
        braces = bare[match.start(2) : match.end(2)] if match[2] else ""
        yield Selector(name, tuple(Matcher(*found) for found in _MATCHER.findall(braces)))


def grouping_labels(expression: str) -> set[str]:
    """Labels of ``by (...)``, ``on (...)`` and the like."""
    return {
        label.strip()
        for match in _GROUPING.finditer(expression)
        for label in match[1].split(",")
        if label.strip()
    }


def _hide_label_text(expression: str) -> str:
    """Blank what stands between braces, so that labels are not taken for metrics."""
    return re.sub(r"\{[^}]*\}", lambda m: "{" + " " * (len(m[0]) - 2) + "}", expression)


@dataclass(frozen=True, slots=True)
class Exposed:
    """What a daemon exposes: the label values of each sample name."""

    labels: Mapping[str, Mapping[str, frozenset[str]]]

    @classmethod
    def of(cls, text: str) -> Exposed:
        """Read an exposition."""
        found: dict[str, dict[str, set[str]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = found.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    labels.setdefault(label, set()).add(value)
        return cls(
            {
                name: {label: frozenset(values) for label, values in labels.items()}
                for name, labels in found.items()
            }
        )

    @classmethod
    def by_daemon(cls) -> Exposed:
        """What a daemon with one table exposes once everything about it is known."""
        metrics = Metrics()
        metrics.add_table("public.items")
        metrics.add_task("reader")
        # What exists only after it has happened.
        metrics.sink_window_points.labels("items").set(1)
        metrics.verify_mismatches.labels("public.items", "missing").set(0)
        metrics.verify_last_success_timestamp_seconds.labels("public.items").set(1)
        metrics.set_rebuild_slots([RebuildSlot("s_rebuild_01234567", "public.items", False, 1)])
        metrics.set_pipeline(slot="s", publication="p", database="d", protocol=1)
        for value in vars(metrics).values():
            if isinstance(value, OptionalGauge | MirroredCounter):
                value.set(1)
        return cls.of(generate_latest(metrics.registry).decode())

    def complaints(self, expression: str) -> list[str]:
        """What an expression names that is not there."""
        wrong = []
        known = set(TARGET_LABELS)
        for selector in selectors(expression):
            if selector.metric == "up":
                continue
            labels = self.labels.get(selector.metric)
            if labels is None:
                wrong.append(f"no metric {selector.metric}")
                continue
            known |= set(labels)
            for matcher in selector.matchers:
                if matcher.label in TARGET_LABELS:
                    continue
                if matcher.label not in labels:
                    wrong.append(f"{selector.metric} has no label {matcher.label}")
                    continue
                wrong += [
                    f"{selector.metric} never has {matcher.label}={value}"
                    for value in matcher.values()
                    if value not in labels[matcher.label]
                ]
        wrong += [f"nothing has the label {x}" for x in grouping_labels(expression) - known]
        return wrong


def base_name(sample: str) -> str:
    """The metric that a sample of a histogram belongs to."""
    for suffix in _SUFFIXES:
        if sample.endswith(suffix):
            return sample.removesuffix(suffix)
    return sample
