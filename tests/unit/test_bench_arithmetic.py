"""The arithmetic of the benchmark: turns, ratios, verdicts, the model, the report, the charts."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.bench import report
from tests.bench.copy_figures import judge_two_workers
from tests.bench.model import RowCost, allowed, speed_up
from tests.bench.plots import Bar, chart, charts
from tests.bench.rounds import Median, quantile, ratio_of_best, ratios, take_turns
from tests.bench.targets import Figure, Target, Verdict, number
from tests.bench.usage import Cost, Meter, descendants, interpreter_step, memory_mb, tree_cpu


def figure(value: float | None, target: Target | None, **more: object) -> Figure:
    median = None if value is None else Median.of([value])
    return Figure("a.b", "a title", "x", median, target, **more)  # type: ignore[arg-type]


def test_ways_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []

    def way(name: str) -> int:
        order.append(name)
        return len(order)

    first, second = take_turns(
        2, lambda: way("a"), lambda: way("b"), warm_up=1, rest=lambda: order.append("-")
    )
    assert order == list("-b-a-a-b-b-a")
    assert (first, second) == ([6, 12], [8, 10])


def test_a_ratio_is_taken_round_by_round() -> None:
    """A machine that is ten times slower in one round changes no ratio."""
    limits, ours = [1.0, 10.0, 1.0], [2.0, 20.0, 2.5]
    assert ratios(limits, ours) == Median(0.5, 0.4, 0.5)
    assert ratio_of_best(limits, ours) == 0.5
    with pytest.raises(ValueError, match="no rounds"):
        Median.of([])
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("part", "expected"), [(0.0, 1.0), (0.5, 50.0), (0.99, 99.0), (1.0, 100.0)]
)
def test_quantiles_are_values_that_were_measured(part: float, expected: float) -> None:
    assert quantile([float(n) for n in range(100, 0, -1)], part) == expected
    assert quantile([7.0], part) == 7.0


@pytest.mark.parametrize(
    ("value", "target", "expected"),
    [
        (0.6, Target(">=", 0.6), Verdict.MET),
        (0.599, Target(">=", 0.6), Verdict.MISSED),
        (15.0, Target("<=", 15), Verdict.MET),
        (15.01, Target("<=", 15), Verdict.MISSED),
        (None, Target("<=", 15), Verdict.UNTESTED),
        (1.0, None, Verdict.NONE),
    ],
)
def test_verdicts(value: float | None, target: Target | None, expected: Verdict) -> None:
    assert figure(value, target).verdict is expected


def test_what_the_machine_does_not_allow_is_untested() -> None:
    assert figure(1.2, Target(">=", 1.6), untested=True).verdict is Verdict.UNTESTED


COST = RowCost(postgres=10, ours=25, send=5, sink=60, sink_limit=1e6)


@pytest.mark.parametrize(
    ("cost", "cores", "rate", "bound"),
    [
        (COST, 2, 20_000, "2 shared cores"),
        (dataclasses.replace(COST, sink_limit=12_000), 2, 12_000, "the sink limit"),
        (COST, 8, 1e6 / 30, "one thread of ours"),
        (dataclasses.replace(COST, postgres=40), 8, 25_000, "one backend of Postgres"),
        # An embedded sink works in our thread, and what it takes to send is part of that.
        (dataclasses.replace(COST, embedded=True), 8, 1e6 / 85, "one thread of ours"),
        (dataclasses.replace(COST, embedded=True), 1, 1e6 / 95, "1 shared cores"),
        # Nothing of ours runs until it is durable; a server does that beside us.
        (dataclasses.replace(COST, embedded=True, durable=15), 8, 1e4, "one thread of ours"),
        (dataclasses.replace(COST, durable=15), 8, 1e6 / 30, "one thread of ours"),
    ],
)
def test_the_least_bound_is_allowed(cost: RowCost, cores: int, rate: float, bound: str) -> None:
    found = allowed(cost, cores)
    assert found.rate == pytest.approx(rate)
    assert found.bound == bound


def test_costs_that_were_not_measured_are_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        allowed(dataclasses.replace(COST, postgres=0), 2)


@pytest.mark.parametrize(
    ("postgres", "ours", "cores", "expected"),
    [
        (10, 20, 4, 2.0),  # free cores
        (10, 20, 2, 4 / 3),  # 2 cores do 1/15 µs, one worker alone 1/20
        (20, 20, 2, 1.0),  # one worker and its backend fill both
        (10, 20, 1, 1.0),
    ],
)
def test_speed_up_of_two_workers(postgres: float, ours: float, cores: int, expected: float) -> None:
    assert speed_up(postgres, ours, 2, cores) == pytest.approx(expected)


def test_costs_a_row() -> None:
    cost = Cost(2.0, 0.5, others={"postgres": 0.25})
    assert cost.rate(10_000) == 5_000
    assert cost.per_row(10_000) == pytest.approx(50)
    assert cost.other_per_row("postgres", 10_000) == pytest.approx(25)
    assert cost.other_per_row("sink", 10_000) == 0


def test_cpu_of_children_counts_when_they_have_ended() -> None:
    meter = Meter(us=os.getpid(), nobody=None)
    began = meter.begin()
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    with subprocess.Popen([sys.executable, "-c", burn]) as child:
        assert child.pid in descendants(os.getpid())
        # For a moment after it has begun it has no memory of its own.
        while memory_mb(child.pid, "VmHWM") <= 1:
            assert child.poll() is None
        child.wait()
    cost = began.until(meter.end())
    assert cost.others["us"] >= 0.25
    assert "nobody" not in cost.others
    assert tree_cpu(child.pid) == 0
    assert memory_mb(child.pid) == 0


RUN = report.Run(
    [
        dataclasses.replace(figure(0.55, Target(">=", 0.6)), name="copy.768.ratio", relative=True),
        dataclasses.replace(figure(20, Target("<=", 22)), name="copy.768.cpu"),
        dataclasses.replace(figure(None, Target(">=", 10)), name="debezium.rate", relative=True),
        dataclasses.replace(figure(3, None), name="other"),
    ],
    {"python": "3.11"},
)


def test_missed_targets_are_never_hidden() -> None:
    summary = report.summary(RUN.figures)
    assert summary.startswith("1 targets met, 1 missed, 1 untested.")
    assert "- missed: a title: 0.55 (>= 0.6)" in summary
    assert "- untested: a title: (>= 10)" in summary
    table = report.table(RUN.figures)
    assert "| 0.55 x |  | >= 0.6 | **missed** |" in table
    assert "| not measured |  | >= 10 | untested |" in table
    short = report.short_table(RUN.figures)
    assert "| 0.55 x | >= 0.6 | missed |" in short
    assert short.count("\n") == 5, "what has no target is not in it"


def test_ratios_that_have_changed_are_marked() -> None:
    earlier = json.loads(RUN.to_json())
    assert "changed" not in report.changes(RUN.figures, {}, earlier)
    slower = dataclasses.replace(RUN.figures[0], value=Median.of([0.46]))
    assert "| 0.55 | 0.46 | -16.4% | changed |" in report.changes([slower], {}, earlier)
    faster = dataclasses.replace(RUN.figures[0], value=Median.of([0.61]))
    assert "| 0.55 | 0.61 | +10.9% | missed, now met |" in report.changes([faster], {}, earlier)
    absolute = dataclasses.replace(RUN.figures[1], value=Median.of([40.0]))
    assert report.changes([absolute], {}, earlier).count("\n") == 2
    with pytest.raises(ValueError, match="not a report"):
        report.changes([slower], {}, {})


def test_the_speed_of_the_interpreter_stands_beside_ratios_that_have_changed() -> None:
    assert 1 < interpreter_step(rounds=2, steps=5_000) < 100_000
    found = report.environment("quick", 2, "18", 0.1, 60, [50.0, 80.0, 60.0])
    earlier = json.loads(report.Run(RUN.figures, {**found, report.STEP: "45.0 ns"}).to_json())
    assert "ran at 0.75 of its speed" in report.changes(RUN.figures, found, earlier)
    assert "interpreter ran" not in report.changes(RUN.figures, found, json.loads(RUN.to_json()))


def test_only_what_stands_between_the_markers_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- run -->\nold\n<!-- /run -->\nafter\n", encoding="utf-8")
    report.put_between(path, "run", "new\n")
    report.put_between(path, "run", "newer\n")
    assert path.read_text(encoding="utf-8") == (
        "before\n<!-- run -->\nnewer\n<!-- /run -->\nafter\n"
    )
    for broken in ("", "<!-- run -->", "<!-- /run --><!-- run -->", 2 * path.read_text()):
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match=r"page\.md has no single pair"):
            report.put_between(path, "run", "lost\n")
        assert path.read_text(encoding="utf-8") == broken


@pytest.mark.parametrize(
    ("page", "marker"), [("docs/performance.md", "full-run"), ("README.md", "bench")]
)
def test_the_documents_have_their_markers(page: str, marker: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    assert text.count(f"<!-- {marker} -->") == text.count(f"<!-- /{marker} -->") == 1


def test_bars_are_as_long_as_their_values() -> None:
    drawing = chart(
        "CPU & more", "µs", [[Bar("theirs <1>", 100, "other")], [Bar("ours", 25, "ours")]]
    )
    root = ElementTree.fromstring(drawing)
    widths = {r.get("class"): float(r.get("width", "0")) for r in root.iter() if "rect" in r.tag}
    assert widths["ours"] == pytest.approx(widths["other"] / 4, rel=0.01)
    assert "prefers-color-scheme: dark" in drawing
    texts = [t.text for t in root.iter() if t.tag.endswith("text")]
    assert texts == ["CPU & more, µs", "theirs <1>", "100", "ours", "25"]
    with pytest.raises(ValueError, match="nothing to draw"):
        chart("empty", "µs", [[]])


def test_charts_of_what_was_measured() -> None:
    assert charts(RUN.figures).keys() == {"bench-limits.svg"}
    assert charts([]) == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (0.5556, "0.556"), (4.0, "4"), (0.0, "0"), (19.96, "20")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("one", "two", "cores", "expected"),
    [
        (3.0, 1.7, 4, Verdict.MET),
        (3.0, 2.0, 4, Verdict.MISSED),
        (3.0, 2.3, 2, Verdict.UNTESTED),  # the cores allow 4/3
        (3.0, 2.9, 2, Verdict.MISSED),  # much less than they allow
    ],
)
def test_two_workers_on_few_cores(one: float, two: float, cores: int, expected: Verdict) -> None:
    alone = Cost(one, 0.2, others={"postgres": 0.1})
    found = judge_two_workers(cores, 10_000, [alone], [Cost(two, 0.2)])
    assert found.verdict is expected
