"""Bar charts as SVG, written by hand: they are read in light and in dark surroundings, as images of
a page, so they bring their own colours for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from tests.bench.targets import Figure, number

_WIDTH: Final = 760
_LABELS: Final = 300
_VALUES: Final = 90
_BAR: Final = 18
_STEP: Final = 26
_TOP: Final = 46
_STYLE: Final = """
    text { font: 13px system-ui, sans-serif; fill: #24292f; }
    .title { font-weight: 600; font-size: 15px; }
    .ours { fill: #0a7d5a; } .other { fill: #8c959f; } .limit { fill: #b6bdc5; }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3; }
      .ours { fill: #2fbf8f; } .other { fill: #7d8590; } .limit { fill: #565e67; }
    }
"""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar; ``kind``: ours, other or limit, which gives its colour."""

    label: str
    value: float
    kind: str


def chart(title: str, unit: str, groups: Sequence[Sequence[Bar]]) -> str:
    """Horizontal bars in groups, each as long as its value beside the largest. Raises
    ``ValueError`` without a positive value."""
    most = max((bar.value for group in groups for bar in group), default=0.0)
    if most <= 0:
        raise ValueError(f"nothing to draw: {title}")
    room = _WIDTH - _LABELS - _VALUES
    parts: list[str] = []
    y = _TOP
    for group in groups:
        for bar in group:
            length = max(1.0, bar.value / most * room)
            middle = y + _BAR - 4
            parts += [
                (
                    f'  <text x="{_LABELS - 8}" y="{middle}" text-anchor="end">'
                    f"{escape(bar.label)}</text>"
                ),
                (
                    f'  <rect class="{bar.kind}" x="{_LABELS}" y="{y}" width="{length:.1f}" '
                    f'height="{_BAR}" rx="2"/>'
                ),
                f'  <text x="{_LABELS + length + 6:.1f}" y="{middle}">{number(bar.value)}</text>',
            ]
            y += _STEP
        y += _STEP // 2
    heading = escape(f"{title}, {unit}")
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" '
                f'viewBox="0 0 {_WIDTH} {y}" role="img" aria-label="{heading}">'
            ),
            f"  <style>{_STYLE}  </style>",
            f'  <text class="title" x="8" y="24">{heading}</text>',
            *parts,
            "</svg>\n",
        ]
    )


def charts(figures: Sequence[Figure]) -> dict[str, tuple[str, str]]:
    """Titles and charts of a run by file name, as far as it has their figures."""
    found = {figure.name: figure for figure in figures if figure.value is not None}
    drawn = {
        "bench-cpu.svg": ("CPU", "µs a row of 768 dimensions", _cpu(found)),
        "bench-limits.svg": ("Rate into a null sink", "of the limit", _limits(found)),
        "bench-sinks.svg": ("Rate into real sinks", "rows/s of 768 dimensions", _sinks(found)),
    }
    return {
        name: (f"{title}, {unit}", chart(title, unit, groups))
        for name, (title, unit, groups) in drawn.items()
        if any(groups)
    }


def _cpu(found: dict[str, Figure]) -> list[list[Bar]]:
    groups: list[list[Bar]] = []
    clients = [f for n in ("upsert", "upload_points") if (f := found.get(f"client.{n}"))]
    if clients:
        copy = [
            Bar(f"copy: psycopg + {f.name.partition('.')[2]}", f.facts["their_cpu_us"], "other")
            for f in clients
        ]
        groups.append([*copy, Bar("copy: cdc_sync", clients[0].facts["cpu_us"], "ours")])
    debezium = found.get("debezium.cpu")
    if debezium is not None:
        groups.append(
            [
                Bar("stream: Debezium engine", debezium.facts["their_cpu_us"], "other"),
                Bar("stream: cdc_sync", debezium.facts["cpu_us"], "ours"),
                Bar("stream: read and dropped", debezium.facts["drain_cpu_us"], "limit"),
            ]
        )
    return groups


def _limits(found: dict[str, Figure]) -> list[list[Bar]]:
    ratios = [f for n, f in found.items() if n.startswith("stream.") and "of the drain" in f.unit]
    copy = found.get("copy.768.ratio")
    bars = [Bar(_shortened(f.title), f.value.value, "ours") for f in ratios if f.value is not None]
    if copy is not None and copy.value is not None:
        bars.append(Bar("copy, 768-d", copy.value.value, "ours"))
    return [[*bars, Bar("the limit", 1.0, "limit")]] if bars else []


def _shortened(title: str) -> str:
    text = title.removesuffix(", null sink")
    return text if len(text) <= 40 else text.partition(":")[0]


def _sinks(found: dict[str, Figure]) -> list[list[Bar]]:
    groups: list[list[Bar]] = []
    for figure in found.values():
        if figure.unit == "of what is allowed":
            title = figure.title.removesuffix(", 768-d")
            groups.append(
                [
                    Bar(title, figure.facts["rows_per_second"], "ours"),
                    Bar("allowed by the model", figure.facts["allowed_rows_per_second"], "limit"),
                ]
            )
    return groups
