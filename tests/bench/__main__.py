"""``make bench``: every figure of speed, memory and latency beside its limit or rival, measured in
one run, with its target and a verdict.

Targets that are missed are printed as such. Absolute rates mean little on a shared machine; ratios,
taken round by round, and CPU a row are what to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from cdc_sync.sync.executors import available_cpus
from tests.bench import plots, report
from tests.bench.copy_figures import copy_figures
from tests.bench.debezium_figures import debezium_figures
from tests.bench.growth_figures import growth_figures
from tests.bench.latency_figures import latency_figures
from tests.bench.memory_figures import idle_figures, memory_figures
from tests.bench.rivals_client import client_figures
from tests.bench.setting import DEFAULT, FULL, QUICK, Scale, Setting, setting
from tests.bench.sink_figures import sink_figures
from tests.bench.stream_figures import stream_figures
from tests.bench.targets import Figure
from tests.bench.usage import interpreter_step

BENCHES: Final[dict[str, Callable[[Setting], Iterator[Figure]]]] = {
    "stream": stream_figures,
    "copy": copy_figures,
    "sinks": sink_figures,
    "latency": latency_figures,
    "memory": memory_figures,
    "idle": idle_figures,
    "growth": growth_figures,
    "client": client_figures,
    "debezium": debezium_figures,
}

_ROOT: Final = Path(__file__).parents[2]


def run(scale: Scale, names: Sequence[str], cores: int | None = None) -> report.Run:
    """Measure; ``names`` of :data:`BENCHES`."""
    cores = available_cpus() if cores is None else cores
    load, began = os.getloadavg()[0], time.monotonic()
    figures: list[Figure] = []
    steps = [interpreter_step()]
    with setting(scale, cores) as bench:
        for name in names:
            figures += BENCHES[name](bench)
            steps.append(interpreter_step())
        version = bench.source.scalar("SHOW server_version")
    seconds = time.monotonic() - began
    found = report.environment(scale.name, cores, version, load, seconds, steps)
    return report.Run(figures, found)


def write_documents(done: report.Run, root: Path = _ROOT) -> None:
    """Put a run into README.md and docs/."""
    surroundings = report.surroundings(done.environment)
    full = f"{report.table(done.figures)}\n{report.summary(done.figures)}\n{surroundings}"
    report.put_between(root / "docs" / "performance.md", "full-run", full)
    (root / "docs" / "performance.json").write_text(done.to_json(), encoding="utf-8")
    images = ""
    for name, (title, drawing) in plots.charts(done.figures).items():
        (root / "docs" / "images" / name).write_text(drawing, encoding="utf-8")
        images += f"![{title}](docs/images/{name})\n\n"
    short = f"{images}{report.short_table(done.figures)}\n{surroundings}"
    report.put_between(root / "README.md", "bench", short)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", action="store_true", help="fewer rows and rounds: 2 minutes")
    scale.add_argument("--full", action="store_true", help="10 M rows a transaction, 2 M a table")
    parser.add_argument(
        "--only", action="append", choices=list(BENCHES), help="may be given several times"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--against", type=Path, help="compare ratios with this JSON report")
    parser.add_argument(
        "--write", action="store_true", help="put the run into README.md and docs/ (all figures)"
    )
    options = parser.parse_args(arguments)
    if options.write and options.only:
        parser.error("--write takes all figures, not --only some")
    chosen = QUICK if options.quick else FULL if options.full else DEFAULT
    done = run(chosen, options.only or list(BENCHES))
    sys.stdout.write(
        f"{report.table(done.figures)}\n{report.summary(done.figures)}\n"
        f"{report.surroundings(done.environment)}"
    )
    if options.against:
        earlier = json.loads(options.against.read_text())
        sys.stdout.write("\n" + report.changes(done.figures, done.environment, earlier))
    if options.json:
        options.json.write_text(done.to_json(), encoding="utf-8")
    if options.write:
        write_documents(done)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
