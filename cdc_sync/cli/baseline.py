"""``cdc-sync baseline``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.entries import hanging
from cdc_sync.cli.options import takes_settings
from cdc_sync.errors import ExitCode

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings
    from cdc_sync.verify.baseline_file import Baseline

_SAMPLED = 50
_WIDTH = 80
_CLEAR = "\r\x1b[K"

Sample = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        max=10_000,
        help="Queries by rows' own vectors, for each vector column. Default: 50, or none with "
        "--queries.",
    ),
]


@takes_settings
def baseline(
    loaded: LoadedSettings,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where it is written.")
    ] = Path("baseline.json"),
    queries: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Queries of your own: JSON, or an object a line."),
    ] = None,
    sample: Sample = None,
    k: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Results a query.")] = 10,
    include_self: Annotated[
        bool,
        typer.Option("--include-self", help="Leave a sampled row among its own results."),
    ] = False,
    values: Annotated[
        bool, typer.Option("--values", help="Write examples of payload values into the file.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Chooses the sampled rows.")] = 1,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.001, help="How long a query may take.")
    ] = 300.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there.")
    ] = False,
) -> int:
    """Record what tables and searches are like before a migration.

    Counts, vectors, indexes, payload types, and what pgvector answers to queries, exactly and
    through its index; `verify search` asks them again in Qdrant. Reads only.
    """
    from cdc_sync.verify.baseline import CaptureOptions, capture
    from cdc_sync.verify.baseline_file import check_absent, write_baseline
    from cdc_sync.verify.baseline_queries import read_queries

    if not overwrite:
        # Said before anything long is done.
        check_absent(output)
    given = tuple(read_queries(queries)) if queries is not None else ()
    options = CaptureOptions(
        given=given,
        sampled=sample if sample is not None else 0 if given else _SAMPLED,
        k=k,
        include_self=include_self,
        values=values,
        timeout_seconds=timeout,
        seed=seed,
    )
    with progress_line() as progress:
        taken = capture(loaded.settings, options, progress)
    write_baseline(taken, output, overwrite=overwrite)
    _show(taken, output)
    return ExitCode.OK


def _show(taken: Baseline, output: Path) -> None:
    from cdc_sync.ops.redaction import redact

    typer.echo(redact("\n".join(_lines(taken, output))))


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Show on stderr what is being done, in one line that is written over and taken away at the
    end; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    try:
        yield lambda text: typer.echo(f"{_CLEAR}{text[: _WIDTH - 1]}", nl=False, err=True)
    finally:
        typer.echo(_CLEAR, nl=False, err=True)


def _lines(taken: Baseline, output: Path) -> Iterator[str]:
    for table in taken.tables:
        leaves = f", {len(table.partitions)} partitions" if len(table.partitions) > 1 else ""
        yield f"{table.table}: {table.rows:,} rows{leaves}, {len(table.payload)} payload fields"
        for vector in table.vectors:
            dimension = f"{vector.dimension} dimensions, " if vector.dimension else ""
            kind = f"{vector.kind}, {dimension}{vector.metric} from {vector.metric_from}"
            yield from hanging(f"{vector.column}: {kind}", "  ", _WIDTH)
            for index in vector.indexes:
                settings = ", ".join(f"{name} = {value}" for name, value in index.options.items())
                state = "" if index.valid else ", not valid"
                more = f" ({settings})" if settings else ""
                yield from hanging(f"index {index.name}: {index.method}{more}{state}", "  ", _WIDTH)
    indexed = sum(query.index is not None for query in taken.queries)
    yield f"{len(taken.queries)} queries, {indexed} of them through an index too"
    for note in taken.notes:
        yield from hanging(f"note: {note}", "", _WIDTH)
    yield f"written to {output}; it holds keys of rows and query vectors"
