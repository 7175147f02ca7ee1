"""The report: as a table, as JSON, and what of it goes into the documents."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench.targets import Figure, Verdict, number

#: How long the interpreter takes for a step of a loop: its speed on this machine in that run.
STEP: Final = "interpreter step"

#: What part of a ratio may change from one day to another.
STABLE: Final = 0.15

#: The figures that the README shows.
SHORT: Final = (
    "stream.inserts-768.ratio",
    "stream.inserts-768.cpu",
    "stream.updates.cpu",
    "copy.768.ratio",
    "copy.768.cpu",
    "copy.test-server.ratio",
    "stream.test-server.ratio",
    "latency.p50",
    "latency.p99",
    "memory.streaming",
    "idle.cpu",
    "client.upsert",
    "debezium.rate",
    "debezium.cpu",
    "debezium.memory",
)


@dataclass(frozen=True, slots=True)
class Run:
    """A run: its figures, and where it was made."""

    figures: Sequence[Figure]
    environment: Mapping[str, str]

    def to_json(self) -> str:
        """The JSON report."""
        content = {
            "format": 1,
            "environment": dict(self.environment),
            "figures": [figure.to_json() for figure in self.figures],
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def environment(
    scale: str, cores: int, postgres: str, load: float, seconds: float, steps: Sequence[float]
) -> dict[str, str]:
    """Where and how a run was made; ``load``: the load average before it; ``steps``: what
    :func:`tests.bench.usage.interpreter_step` gave between the figures."""
    return {
        "scale": scale,
        "python": platform.python_version(),
        STEP: f"{statistics.median(steps):.1f} ns",
        "postgres": postgres,
        "cpu": _cpu(),
        "cores": f"{cores}, shared by Postgres, cdc_sync and the sink",
        "load before": f"{load:.2f}",
        "load after": f"{os.getloadavg()[0]:.2f}",
        "minutes": f"{seconds / 60:.1f}",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(figures: Sequence[Figure]) -> str:
    """All figures as a Markdown table."""
    lines = [
        "| figure | measured | rounds | target | verdict | |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_line(figure) for figure in figures]
    return "\n".join(lines) + "\n"


def _line(figure: Figure) -> str:
    value = figure.value
    measured, rounds = "not measured", ""
    if value is not None:
        measured = f"{number(value.value)} {figure.unit}"
        if value.least != value.most:
            rounds = f"{number(value.least)} to {number(value.most)}"
    verdict = f"**{figure.verdict}**" if figure.verdict is Verdict.MISSED else str(figure.verdict)
    target = "" if figure.target is None else str(figure.target)
    return f"| {figure.title} | {measured} | {rounds} | {target} | {verdict} | {figure.note} |"


def short_table(figures: Sequence[Figure]) -> str:
    """The figures of the README, without rounds."""
    shown = {figure.name: figure for figure in figures}
    lines = ["| figure | measured | target | verdict |", "|---|---|---|---|"]
    for name in SHORT:
        figure = shown.get(name)
        if figure is None or figure.target is None:
            continue
        measured = "not measured"
        if figure.value is not None:
            measured = f"{number(figure.value.value)} {figure.unit}"
        lines.append(f"| {figure.title} | {measured} | {figure.target} | {figure.verdict} |")
    return "\n".join(lines) + "\n"


def summary(figures: Sequence[Figure]) -> str:
    """How many targets are met, and those that are not."""
    counted = {verdict: [f for f in figures if f.verdict is verdict] for verdict in Verdict}
    lines = [
        (
            f"{len(counted[Verdict.MET])} targets met, {len(counted[Verdict.MISSED])} missed, "
            f"{len(counted[Verdict.UNTESTED])} untested."
        )
    ]
    for verdict in (Verdict.MISSED, Verdict.UNTESTED):
        for figure in counted[verdict]:
            measured = "" if figure.value is None else f" {number(figure.value.value)}"
            lines.append(f"- {verdict}: {figure.title}:{measured} ({figure.target})")
    return "\n".join(lines) + "\n"


def surroundings(found: Mapping[str, str]) -> str:
    """The environment in a line."""
    return "; ".join(f"{name} {value}" for name, value in found.items()) + ".\n"


def changes(
    figures: Sequence[Figure], found: Mapping[str, str], earlier: Mapping[str, object]
) -> str:
    """Every ratio beside that of an earlier report; those that have changed by more than
    :data:`STABLE`, or have another verdict, are marked.

    Before them stands how fast the interpreter was in this run (``found``: its environment) beside
    the earlier one: the limits of copy and stream are the kernel's work for the most part, and ours
    the interpreter's.
    """
    known = _by_name(earlier)
    lines = [*_speeds(found, earlier), "| ratio | then | now | change | |", "|---|---|---|---|---|"]
    for figure in figures:
        before = known.get(figure.name)
        if not figure.relative or figure.value is None or before is None:
            continue
        then, verdict = before
        change = figure.value.value / then - 1
        mark = "changed" if abs(change) > STABLE else ""
        if verdict != str(figure.verdict):
            mark = f"{verdict or 'none'}, now {figure.verdict or 'none'}"
        lines.append(
            f"| {figure.title} | {number(then)} | {number(figure.value.value)} | "
            f"{change:+.1%} | {mark} |"
        )
    return "\n".join(lines) + "\n"


def _speeds(found: Mapping[str, str], earlier: Mapping[str, object]) -> list[str]:
    environment = earlier.get("environment")
    then = environment.get(STEP) if isinstance(environment, dict) else None
    now = found.get(STEP)
    if then is None or now is None:
        return []
    speed = float(str(then).split()[0]) / float(now.split()[0])
    return [f"The interpreter ran at {speed:.2f} of its speed in the earlier run.", ""]


def _by_name(report: Mapping[str, object]) -> dict[str, tuple[float, str]]:
    figures = report.get("figures")
    if not isinstance(figures, list):
        raise ValueError("not a report of this benchmark: it has no figures")
    return {
        str(one["name"]): (float(one["value"]), str(one["verdict"]))
        for one in figures
        if one["value"]
    }


def put_between(path: Path, marker: str, text: str) -> None:
    """Replace what stands in a file between ``<!-- marker -->`` and ``<!-- /marker -->``.

    Raises ``ValueError`` if the file has not both, once each, in this order.
    """
    content = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, found, rest = content.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end) or begin in rest or end in after:
        raise ValueError(f"{path.name} has no single pair of {begin} and {end}")
    path.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")
