"""What a user would write instead of a copy: psycopg, and qdrant-client's own calls.

Rows come from a server-side cursor as psycopg returns them, vectors as texts that are JSON arrays
(pgvector's own loader for psycopg takes as long), and go by gRPC in batches of the size that our
requests have. A third way is for who has measured where the time goes: values in binary, and
vectors as arrays of floats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Final

import psycopg
from psycopg.rows import TupleRow
from qdrant_client import QdrantClient
from qdrant_client.models import PointStruct

from cdc_sync.sync.routing import PlannedTable
from tests.bench.copy_figures import loaded
from tests.bench.pipeline import life, settings_for
from tests.bench.rounds import Median, ratios, take_turns
from tests.bench.setting import Setting
from tests.bench.sinks import ProcessBench
from tests.bench.targets import Figure, Target
from tests.bench.usage import Cost

_TABLE: Final = "documents"
_BATCH: Final = 256
_TARGET: Final = Target(">=", 5)
_COLUMNS: Final = "id, title, lang, views, score, active, created, tags, meta"
_QUERY: Final = f"SELECT {_COLUMNS}, embedding FROM {_TABLE}"
_TUNED_QUERY: Final = f"SELECT {_COLUMNS}, embedding::real[] FROM {_TABLE}"


def points(url: str, *, tuned: bool = False) -> Iterator[PointStruct]:
    """The table's rows as points."""
    with (
        psycopg.connect(url) as connection,
        connection.cursor(name="documents", binary=tuned) as cursor,
    ):
        cursor.itersize = 1000
        cursor.execute(_TUNED_QUERY if tuned else _QUERY)
        for row in cursor:
            embedding = row[9] if tuned else json.loads(row[9])
            yield PointStruct(id=row[0], vector={"embedding": embedding}, payload=_payload(row))


def _payload(row: TupleRow) -> dict[str, object]:
    _, title, lang, views, score, active, created, tags, meta, _ = row
    return {
        "title": title,
        "lang": lang,
        "views": views,
        "score": score,
        "active": active,
        "created": created.isoformat(),
        "tags": tags,
        "meta": meta,
    }


def copy_by_upsert(url: str, client: QdrantClient, collection: str, tuned: bool = False) -> None:
    """Copy the table by ``upsert``, batch by batch."""
    rows = points(url, tuned=tuned)
    while batch := list(islice(rows, _BATCH)):
        client.upsert(collection, points=batch, wait=True)


def copy_by_upload(url: str, client: QdrantClient, collection: str) -> None:
    """Copy the table by ``upload_points``."""
    client.upload_points(collection, points=points(url), batch_size=_BATCH, wait=True)


def client_figures(bench: Setting) -> Iterator[Figure]:
    """CPU a row of all three beside ours, into the test server."""
    bench.say("rival: psycopg and qdrant-client")
    rows, source = bench.scale.client_rows, bench.source
    ways: dict[str, Callable[[str, QdrantClient, str], None]] = {
        "upsert": copy_by_upsert,
        "upload_points": copy_by_upload,
        "upsert, tuned": partial(copy_by_upsert, tuned=True),
    }
    sink = ProcessBench(bench.scratch)
    try:
        with loaded(bench, _TABLE, 768, rows):
            planned = source.plan(_TABLE)
            *rivals, ours = take_turns(
                bench.scale.sink_rounds,
                *(partial(_theirs, bench, sink, planned, way) for way in ways.values()),
                partial(_ours, bench, sink, rows),
            )
    finally:
        sink.close()
    for name, rival in zip(ways, rivals, strict=True):
        yield _figure(name, rows, rival, ours)


def _figure(name: str, rows: int, rival: list[Cost], ours: list[Cost]) -> Figure:
    theirs = [c.per_row(rows) for c in rival]
    own = [c.per_row(rows) for c in ours]
    facts = {
        "rows": rows,
        "their_cpu_us": Median.of(theirs).value,
        "cpu_us": Median.of(own).value,
        "their_rows_per_second": Median.of([c.rate(rows) for c in rival]).value,
        "rows_per_second": Median.of([c.rate(rows) for c in ours]).value,
    }
    return Figure(
        f"client.{name.replace(', ', '-')}",
        f"CPU a row of psycopg + client.{name} beside ours, 768-d",
        "x",
        ratios(theirs, own),
        None if "tuned" in name else _TARGET,
        note=f"{facts['their_cpu_us']:.0f} and {facts['cpu_us']:.0f} µs; "
        f"{facts['their_rows_per_second']:,.0f} and {facts['rows_per_second']:,.0f} rows/s",
        relative=True,
        facts=facts,
    )


def _theirs(
    bench: Setting,
    sink: ProcessBench,
    planned: PlannedTable,
    way: Callable[[str, QdrantClient, str], None],
) -> Cost:
    collection, meter = sink.make(planned), bench.meter
    began = meter.begin()
    way(bench.source.url, sink.client, collection)
    return _finished(sink, collection, bench.scale.client_rows, began.until(meter.end()))


def _finished(sink: ProcessBench, collection: str, rows: int, cost: Cost) -> Cost:
    """The cost, once it is certain that every row is there."""
    found = sink.client.count(collection, exact=True).count
    sink.drop(collection)
    if found != rows:
        raise RuntimeError(f"the rival wrote {found} of {rows} rows")
    return cost


def _ours(bench: Setting, sink: ProcessBench, rows: int) -> Cost:
    source, name, collection = bench.source, bench.name(), sink.collection()
    settings = settings_for(source.url, name, {_TABLE: collection}, qdrant=sink.settings())
    try:
        with life(settings, bench.scratch.new(), postgres=source.pid, sink=sink.pid) as running:
            running.wait_copied()
            report = running.report()
    finally:
        source.drop_slot(name)
        source.execute(f"DROP PUBLICATION IF EXISTS {name}")
    if report.copy is None:
        raise RuntimeError("nothing was copied")
    return _finished(sink, collection, rows, report.copy)
