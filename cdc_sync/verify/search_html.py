"""The report of ``verify search`` as one page that needs nothing else: no scripts, no other files.

Its figures are the content of the JSON report; nothing of rows or vectors is in it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from typing import Final

from cdc_sync.verify.quality import Verdict
from cdc_sync.verify.quality_tiers import Criterion, Tiers
from cdc_sync.verify.search_report import ColumnReport, SearchReport

_TIERS: Final = {
    1: "Tier 1: spot check",
    2: "Tier 2: recall@10 over all queries",
    3: "Tier 3: labelled relevance",
}
#: Points of a scatter plot, at most: more only make the page larger.
_MOST_POINTS: Final = 2000
_BINS: Final = 10

_STYLE: Final = """
:root { color-scheme: light dark; --fg: #1b1f24; --dim: #59636e; --bg: #ffffff; --card: #f6f8fa;
  --line: #d1d9e0; --bar: #3b6ea8; --pass: #1a7f37; --investigate: #9a6700; --fail: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6edf3; --dim: #9198a1; --bg: #0d1117;
  --card: #161b22; --line: #3d444d; --bar: #79a8d9; --pass: #3fb950; --investigate: #d29922;
  --fail: #f85149; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; color: var(--fg); background: var(--bg);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.4rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 0 0 .25rem;
  overflow-wrap: anywhere; } h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
p { margin: .25rem 0; } .dim { color: var(--dim); font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  padding: 1rem; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
table { table-layout: fixed; } th:first-child { width: 34%; } th.number { width: 16%; }
th, td { text-align: left; padding: .3rem .5rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } th { font-weight: 600; color: var(--dim); font-size: .85rem; }
td.number, th.number { text-align: right; padding-right: 1rem; }
.mark { display: inline-block; font-weight: 600; white-space: nowrap; }
.pass { color: var(--pass); } .investigate { color: var(--investigate); } .fail {
  color: var(--fail); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  gap: 1rem; margin-top: 1rem; }
figure { margin: 0; } figcaption { font-size: .9rem; color: var(--dim); margin-bottom: .25rem; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--dim);
  font: 11px system-ui, sans-serif; } .axis { stroke: var(--line); } .bar { fill: var(--bar); }
.point { fill: var(--bar); fill-opacity: .55; } .ideal { stroke: var(--dim);
  stroke-dasharray: 4 4; fill: none; } .bound { stroke: var(--fail); stroke-dasharray: 3 3; }
ul { padding-left: 1.2rem; margin: .25rem 0; } .cause { border-left: 4px solid var(--investigate);
  padding-left: .75rem; margin: .5rem 0; }
@media (max-width: 34rem) { .wanted { display: none; } body { padding: .5rem; } }
"""

_MARKS: Final = {Verdict.PASS: "✓", Verdict.INVESTIGATE: "?", Verdict.FAIL: "✗"}


def as_html(report: SearchReport) -> str:
    """The report as a page of HTML."""
    body = "\n".join(part for column in report.columns for part in _column(column))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Search quality: {report.verdict.value}</title>\n<style>{_STYLE}</style>\n"
        f"</head>\n<body>\n<h1>Search quality: {_mark(report.verdict)}</h1>\n"
        f'<p class="dim">Baseline of {_text(report.baseline_taken)}, compared with its '
        f"{_text(report.against)} results. Qdrant {_text(report.qdrant)}.</p>\n"
        f"{body}\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _sentence(text: str) -> str:
    return _text(f"{text[:1].upper()}{text[1:]}.")


def _mark(verdict: Verdict) -> str:
    return f'<span class="mark {verdict.value}">{_MARKS[verdict]} {verdict.value}</span>'


def _column(column: ColumnReport) -> Iterator[str]:
    vector = f"vector {column.vector}" if column.vector else "the unnamed vector"
    metric = column.source_metric
    if column.metric != metric:
        metric = f"{metric} in the source, {column.metric or 'none'} in Qdrant"
    yield f"<section>\n<h2>{_text(column.name)} {_mark(column.verdict)}</h2>"
    yield (
        f'<p class="dim">Collection {_text(column.collection)}, {_text(vector)}. '
        f"{len(column.queries)} queries, {_text(metric)}, {column.rows:,} rows, "
        f"{column.points:,} points.</p>"
    )
    for cause in column.causes:
        yield (
            f'<div class="cause"><p><b>Likely cause: {_text(cause.name)}.</b> '
            f"{_sentence(cause.reason)}</p><p>{_text(cause.remedy)}</p></div>"
        )
    if column.tiers is not None:
        yield from _criteria(column.tiers)
        yield '<div class="plots">'
        yield _histogram([value for value in column.tiers.recalls if value is not None])
        yield _scatter(column.tiers.pairs)
        yield "</div>"
    if column.caveats:
        listed = "".join(f"<li>{_sentence(caveat)}</li>" for caveat in column.caveats)
        yield f"<h3>To read the figures by</h3><ul>{listed}</ul>"
    yield "</section>"


def _criteria(tiers: Tiers) -> Iterator[str]:
    for tier, title in _TIERS.items():
        rows = [one for one in tiers.criteria if one.tier == tier]
        if not rows:
            continue
        source = '<th class="number">pgvector</th>' if tier == 3 else ""
        yield (
            f'<h3>{title}</h3><table><tr><th>Measure</th><th class="number">Qdrant</th>{source}'
            '<th class="wanted">Wanted</th><th>Verdict</th></tr>'
        )
        for one in rows:
            yield _row(one)
        yield "</table>"
    others = [
        ("exact search in Qdrant finds {:.3f} in the mean", tiers.exact_recall),
        ("pgvector's index finds {:.3f} of its exact results", tiers.index_recall),
    ]
    parts = [text.format(found.mean) for text, found in others if found is not None]
    if tiers.recall is not None:
        parts.append(f"the standard deviation of recall@10 is {tiers.recall.std:.3f}")
    if parts:
        yield f'<p class="dim">{_sentence("; ".join(parts))}</p>'


def _row(one: Criterion) -> str:
    if one.value is None:
        value = "–"
    else:
        value = f"{one.value:.0f}" if one.wanted == "none" else f"{one.value:.3f}"
    note = f'<br><span class="dim">{_text(one.note)}</span>' if one.note else ""
    source = f'<td class="number">{one.source:.3f}</td>' if one.source is not None else ""
    return (
        f'<tr><td>{_text(one.name)}{note}</td><td class="number">{value}</td>{source}'
        f'<td class="wanted">{_wanted(one)}</td><td>{_mark(one.verdict)}</td></tr>'
    )


def _wanted(one: Criterion) -> str:
    return _text(one.wanted.replace(">=", "≥").replace("<=", "≤"))


# -- plots

_W: Final = 360
_H: Final = 240
_LEFT: Final = 44
_BOTTOM: Final = 34
_TOP: Final = 12
_RIGHT: Final = 12


def _histogram(recalls: Sequence[float]) -> str:
    counts = [0] * (_BINS + 1)
    for value in recalls:
        counts[min(_BINS, math.floor(value * _BINS + 1e-9))] += 1
    most = max(counts, default=0) or 1
    step = (_W - _LEFT - _RIGHT) / (_BINS + 1)
    parts = [_frame()]
    for place, count in enumerate(counts):
        height = (_H - _TOP - _BOTTOM) * count / most
        x, y = _LEFT + step * place, _H - _BOTTOM - height
        parts.append(
            f'<rect class="bar" x="{x + 2:.1f}" y="{y:.1f}" width="{step - 4:.1f}" '
            f'height="{height:.1f}"><title>{place / _BINS:.1f}: {count} queries</title></rect>'
        )
        label = f"{place / _BINS:.1f}" if place % 2 == 0 else ""
        parts.append(_label(x + step / 2, _H - _BOTTOM + 14, label))
    parts.append(_label(_LEFT - 6, _TOP + 8, str(most), "end"))
    parts.append(_label(_LEFT - 6, _H - _BOTTOM, "0", "end"))
    parts.append(_label((_LEFT + _W) / 2, _H - 4, "recall@10 of a query"))
    return _figure("Recall: number of queries", "Histogram of recall by query", parts)


def _scatter(pairs: Sequence[tuple[float, float]]) -> str:
    title = "Distances of common results: pgvector across, Qdrant up"
    every = max(1, math.ceil(len(pairs) / _MOST_POINTS))
    shown = [pair for pair in pairs[::every] if all(map(math.isfinite, pair))]
    if not shown:
        return _figure(title, "No common results", [_frame(), _label(_W / 2, _H / 2, "none")])
    values = [value for pair in shown for value in pair]
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or max(abs(high) * 0.05, 1e-6)
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return _LEFT + (_W - _LEFT - _RIGHT) * (value - low) / (high - low)

    def y(value: float) -> float:
        return _H - _BOTTOM - (_H - _TOP - _BOTTOM) * (value - low) / (high - low)

    ideal = (
        f'<line class="ideal" x1="{x(low):.1f}" y1="{y(low):.1f}" x2="{x(high):.1f}" '
        f'y2="{y(high):.1f}"/>'
    )
    parts = [_frame(), ideal]
    parts += [
        f'<circle class="point" cx="{x(one):.1f}" cy="{y(other):.1f}" r="2.2"/>'
        for one, other in shown
    ]
    for value in (low + margin, high - margin):
        parts.append(_label(x(value), _H - _BOTTOM + 14, f"{value:.3g}"))
        parts.append(_label(_LEFT - 4, y(value) + 4, f"{value:.3g}", "end"))
    parts.append(_label((_LEFT + _W) / 2, _H - 4, "distance in pgvector"))
    return _figure(title, "Scatter of distances; equal ones lie on the line", parts)


def _frame() -> str:
    return f'<path class="axis" fill="none" d="M{_LEFT} {_TOP}V{_H - _BOTTOM}H{_W - _RIGHT}"/>'


def _label(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'


def _figure(caption: str, description: str, parts: Sequence[str]) -> str:
    return (
        f"<figure><figcaption>{_text(caption)}</figcaption>"
        f'<svg viewBox="0 0 {_W} {_H}" role="img" aria-label="{_text(description)}">'
        f"{''.join(parts)}</svg></figure>"
    )
