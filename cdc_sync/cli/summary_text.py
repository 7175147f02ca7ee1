"""The summary of a copy, written for people."""

from __future__ import annotations

from cdc_sync.ops.redaction import redact
from cdc_sync.sync.progress import duration_text, size_text
from cdc_sync.sync.summary import CopySummary, TableSummary

_HEADERS = (
    "table", "collection", "copied", "bytes", "time", "rate", "retries", "dead letters",
    "rows in Postgres", "points in Qdrant", "",
)  # fmt: skip
_LEFT = (0, 1, 10)


def summary_text(summary: CopySummary) -> str:
    """A row a table and one for all, then every table's meaning that is not plain agreement, and
    the counts of partitions."""
    rows = [_HEADERS, *map(_row, summary.tables)]
    if len(summary.tables) > 1:
        rows.append(_total(summary))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADERS))]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if column in _LEFT else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    for table in summary.tables:
        counts = table.counts
        if counts.agree is not True:
            lines.append(f"{table.table}: {counts.meaning}.")
        if counts.leaves:
            parts = ", ".join(f"{leaf.name} {leaf.rows:,}" for leaf in counts.leaves)
            lines.append(f"{table.table}, rows by partition: {parts}")
    return redact("\n".join(lines))


def _row(table: TableSummary) -> tuple[str, ...]:
    return (
        table.table,
        table.collection,
        f"{table.rows:,}",
        size_text(table.bytes),
        _time(table.seconds),
        _rate(table.rows_per_second),
        f"{table.retries:,}",
        f"{table.dead_letters:,}",
        f"{table.counts.source_rows:,}",
        f"{table.counts.points:,}",
        _verdict(table.counts.agree),
    )


def _total(summary: CopySummary) -> tuple[str, ...]:
    tables = summary.tables
    here = sum(table.rows_here for table in tables)
    return (
        "all",
        "",
        f"{sum(table.rows for table in tables):,}",
        size_text(sum(table.bytes for table in tables)),
        _time(summary.seconds),
        _rate(here / summary.seconds if summary.seconds and here else None),
        f"{summary.retries:,}",
        f"{sum(table.dead_letters for table in tables):,}",
        f"{sum(table.counts.source_rows for table in tables):,}",
        f"{sum(table.counts.points for table in tables):,}",
        _verdict(summary.agree),
    )


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 60 else duration_text(seconds)


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.0f} rows/s"


def _verdict(agree: bool | None) -> str:
    return {True: "equal", False: "DIFFERENT", None: "being written"}[agree]
