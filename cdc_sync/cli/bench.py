"""``cdc-sync bench``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.check import exit_code
from cdc_sync.cli.entries import entry, finding_entry
from cdc_sync.cli.options import takes_settings
from cdc_sync.cli.run import ended_by_sigterm
from cdc_sync.errors import ExitCode

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings
    from cdc_sync.sync.bench import Benched

_BOTTLENECKS = {
    "postgres": "Postgres",
    "cdc-sync": "cdc-sync itself (its CPU)",
    "qdrant": "Qdrant",
    "waiting": "none of them: answers take long, more workers help",
}


@takes_settings
def bench(
    loaded: LoadedSettings,
    seconds: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0.01, max=3600.0, help="Time a figure may take."),
    ] = 10.0,
    rows: Annotated[
        int, typer.Option(metavar="N", min=1, max=10_000_000, help="Rows a figure may take.")
    ] = 20_000,
    table: Annotated[
        str | None,
        typer.Option(metavar="TABLE", help="The table to measure with. Default: the largest."),
    ] = None,
    temporary_slot: Annotated[
        bool,
        typer.Option(
            "--temporary-slot",
            help="Make a temporary replication slot, to measure what Postgres sends of changes.",
        ),
    ] = False,
    remove_leftovers: Annotated[
        bool,
        typer.Option(
            "--remove-leftovers",
            help="Remove scratch collections of runs that were killed, and end.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Measure where you have it: which part is slow, what to expect.

    Rows are read from a table and written to a scratch collection, which is removed again. Nothing
    is written to Postgres. Exit code 0 if everything could be measured.
    """
    from cdc_sync.sync.bench import TERMINATED, Asked, clean_up, run_bench
    from cdc_sync.sync.bench_figures import Bounds

    if remove_leftovers:
        names = clean_up(loaded.settings)
        typer.echo("\n".join(f"removed {name}" for name in names) or "nothing was left")
        return ExitCode.OK
    asked = Asked(Bounds(rows, seconds), table, temporary_slot)
    with ended_by_sigterm(TERMINATED):
        found = run_bench(loaded.settings, asked, _tell)
    code = exit_code(found.findings)
    typer.echo(_as_json(found, ok=code == ExitCode.OK) if as_json else _as_text(found))
    return code


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        typer.echo(f"{text} ...", err=True)


def _as_json(found: Benched, *, ok: bool) -> str:
    from cdc_sync.sync.bench import as_json

    return json.dumps({"ok": ok, **as_json(found)}, indent=2, ensure_ascii=False)


def _as_text(found: Benched) -> str:
    from cdc_sync.ops.redaction import redact

    return redact("\n".join(_lines(found)))


def _lines(found: Benched) -> Iterator[str]:
    if found.figures:
        cpus = f"{found.cpus} CPU{'s' if found.cpus != 1 else ''}"
        qdrant = f", Qdrant {found.qdrant_version}" if found.qdrant_version else ""
        yield from entry(
            "table",
            f"{found.table}, measured with up to {found.sample_rows:,} of its rows; {cpus}{qdrant}",
        )
        yield ""
        yield from _figures(found)
        yield ""
    yield from _copy(found)
    yield from _stream(found)
    if found.leftovers:
        names = ", ".join(found.leftovers)
        yield from entry(
            "leftovers",
            f"{names}: of runs that were killed, unless another one is under way. Remove them: "
            "cdc-sync bench --remove-leftovers",
        )
    for finding in found.findings:
        yield from finding_entry(finding)


def _figures(found: Benched) -> Iterator[str]:
    from cdc_sync.sync.bench_figures import LABELS

    width = max(map(len, LABELS.values()))
    yield f"{'':{width}}  {'rows/s':>11}  {'MB/s':>8}  {'CPU us/row':>10}"
    for figure in found.figures:
        yield (
            f"{LABELS[figure.measured]:<{width}}  {figure.rows_per_second:>11,.0f}  "
            f"{figure.bytes_per_second / 1e6:>8,.1f}  {figure.cpu_per_row * 1e6:>10,.1f}"
        )


def _copy(found: Benched) -> Iterator[str]:
    from cdc_sync.sync.progress import duration_text

    advice = found.copy
    if advice is None:
        return
    workers = f"{advice.workers} worker{'s' if advice.workers != 1 else ''}"
    yield from entry(
        "copy",
        f"about {advice.rows_per_second:,.0f} rows/s with {workers}; the slow part: "
        f"{_BOTTLENECKS[advice.bottleneck]}",
    )
    if advice.enough_workers > advice.workers:
        more = (
            f"up to {advice.enough_workers} workers help, for about "
            f"{advice.best_rows_per_second:,.0f} rows/s"
        )
    else:
        more = f"more than {advice.enough_workers} would not help"
    yield from entry("", more)
    tables = len(found.sizes)
    rows = sum(size.rows for size in found.sizes)
    yield from entry(
        "first copy",
        f"about {duration_text(sum(found.seconds.values()))} for about {rows:,} rows in "
        f"{tables} table{'s' if tables != 1 else ''} (estimates)",
    )


def _stream(found: Benched) -> Iterator[str]:
    from cdc_sync.sync.progress import size_text

    advice = found.stream
    if advice is None:
        return
    text = f"about {advice.rows_per_second:,.0f} new rows/s"
    if advice.updates_per_second is not None:
        text += f", or {advice.updates_per_second:,.0f} metadata updates/s"
    yield from entry("stream", f"{text}; the slow part: {_BOTTLENECKS[advice.bottleneck]}")
    text = f"about {size_text(round(advice.wal_bytes_per_second))}/s could be followed"
    text += f" (by {found.wal_from})"
    if found.wal_written_per_second is not None:
        text += f"; {size_text(round(found.wal_written_per_second))}/s were written meanwhile"
    yield from entry("wal", text)
