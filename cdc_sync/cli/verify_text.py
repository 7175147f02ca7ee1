"""The report of a verification for people."""

from __future__ import annotations

from cdc_sync.cli.entries import hanging
from cdc_sync.verify.kinds import MEANINGS
from cdc_sync.verify.report import Finding, Report, TableReport, ordered

_INDENT = "    "


def report_text(report: Report) -> str:
    """The whole of it: a part a table, and the outcome."""
    parts = [_table_text(table, report) for table in report.tables]
    return "\n\n".join([*parts, _outcome(report)])


def _table_text(table: TableReport, report: Report) -> str:
    lines = [f"{table.table} -> {table.collection}: {_counts(table)}"]
    if len(table.leaves) > 1:
        width = max(len(leaf.name) for leaf in table.leaves)
        lines += [
            f"  {leaf.name:<{width}}  {leaf.rows:>12,} rows"
            + (f", {leaf.missing:,} without a point" if leaf.missing else "")
            for leaf in table.leaves
        ]
    for finding in ordered(table.findings.values()):
        lines += _finding_text(finding)
    lines += _sample_text(table)
    if table.pending:
        lines.append(
            f"  {table.pending:,} rows were changed since the pipeline stopped; their changes "
            "wait in its slot"
        )
    if table.undecided:
        lines.append(f"  {table.undecided:,} points could not be judged")
    for note in table.notes:
        lines += hanging(f"note: {note}", "  ")
    return "\n".join(lines)


def _sample_text(table: TableReport) -> list[str]:
    """What a sample says of the whole."""
    lines = []
    rows, points = table.bound(), table.extra_bound()
    if rows is not None:
        lines.append(
            f"  {table.rows_different:,} of {table.compared:,} random rows differ: with 95 % "
            f"confidence at most {rows:.2%} of all do"
        )
    if points is not None:
        lines.append(
            f"  {table.extra:,} of {table.ids:,} random points have no row: with 95 % confidence "
            f"at most {points:.2%} of all have none"
        )
    return lines


def _counts(table: TableReport) -> str:
    compared = f"{table.rows:,} rows, {table.points:,} points"
    return f"{compared}; {table.compared:,} rows compared, {table.ids:,} ids looked up"


def _finding_text(finding: Finding) -> list[str]:
    meaning = MEANINGS[finding.kind]
    where = f" {finding.field}" if finding.field else ""
    lines = [f"  {meaning.title}{where}: {finding.count:,}"]
    lines += hanging(f"likely: {finding.cause}", _INDENT)
    lines += hanging(f"remedy: {meaning.remedy}", _INDENT)
    for example in finding.examples:
        shown = [f"point {example.id}"] if example.id is not None else []
        if example.key is not None and example.key != (str(example.id),):
            shown.append(f"key ({', '.join(example.key)})")
        label = " ".join(shown)
        text = ": ".join(part for part in (label, example.text) if part)
        if text:
            lines.append(f"{_INDENT}- {text}")
    return lines


def _outcome(report: Report) -> str:
    lines = [report.stream, *report.repaired]
    compared = sum(table.compared for table in report.tables)
    if report.seconds and compared:
        rate = compared / report.seconds
        lines.append(f"{compared:,} rows in {report.seconds:.1f} s, {rate:,.0f} a second")
    different = sum(table.different for table in report.tables)
    if not report.equal:
        lines.append(f"different: {different:,} points" if different else "different")
    elif any(table.undecided for table in report.tables):
        lines.append("not decided")
    else:
        lines.append("equal" if report.mode == "full" else f"equal ({report.mode})")
    return "\n".join(lines)
