"""What ``cdc-sync bench`` concludes from its figures, and the parts that it measures with."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_sync.mapping.table import Leaf, Table
from cdc_sync.pgoutput import encode
from cdc_sync.pgoutput.decode import Decoder
from cdc_sync.pgoutput.envelope import XLOG_HEADER_BYTES
from cdc_sync.pgoutput.messages import Insert, Message, Relation, RelationColumn, Update
from cdc_sync.postgres.measuring import PageRanges
from cdc_sync.rows import UNCHANGED, RawValue, TextValue
from cdc_sync.sync.bench_advice import (
    MAX_WORKERS,
    TableSize,
    copy_advice,
    copy_seconds,
    stream_advice,
)
from cdc_sync.sync.bench_figures import LABELS, Bounds, Clock, Figure, Measured
from tests.support import frames


def figure(measured: Measured, rate: float, cpu: float = 0.0) -> Figure:
    """So many rows a second, each in so many microseconds of CPU."""
    return Figure(measured, 1000, 1_000_000, 1000 / rate, cpu * 1e-3)


def figures(
    *, copy: tuple[float, float], limit: float, sink: float, **more: tuple[float, float]
) -> dict[Measured, Figure]:
    found = [
        figure(Measured.COPY, *copy),
        figure(Measured.COPY_LIMIT, limit),
        figure(Measured.SINK_LIMIT, sink),
        *(figure(Measured(name), *values) for name, values in more.items()),
    ]
    return {one.measured: one for one in found}


# -- the copy


def test_qdrant_is_the_slow_part() -> None:
    found = figures(copy=(5_000, 20), limit=50_000, sink=8_000)
    advice = copy_advice(found, workers=4, cpus=4)
    assert advice is not None
    assert (advice.bottleneck, advice.enough_workers) == ("qdrant", 2)
    assert advice.rows_per_second == advice.best_rows_per_second == pytest.approx(8_000)


def test_postgres_is_the_slow_part() -> None:
    # A table behind a slow network: Qdrant would take much more, and a CPU is hardly used.
    found = figures(copy=(950, 20), limit=1_000, sink=50_000)
    advice = copy_advice(found, workers=2, cpus=8)
    assert advice is not None
    assert advice.bottleneck == "postgres"
    assert advice.rows_per_second == pytest.approx(1_900)
    assert 51 <= advice.enough_workers <= 53


def test_our_own_cpu_is_the_slow_part() -> None:
    found = figures(copy=(30_000, 33), limit=60_000, sink=500_000)
    advice = copy_advice(found, workers=2, cpus=2)
    assert advice is not None
    assert advice.bottleneck == "cdc-sync"
    assert advice.rows_per_second == pytest.approx(60_000, rel=0.02)
    # A third worker has no CPU.
    assert advice.enough_workers <= 3


def test_answers_that_take_long_ask_for_more_workers() -> None:
    # Each limit is far away from what one worker does: it waits for answers.
    found = figures(copy=(1_000, 20), limit=50_000, sink=20_000)
    advice = copy_advice(found, workers=2, cpus=4)
    assert advice is not None
    assert advice.bottleneck == "waiting"
    assert advice.rows_per_second == pytest.approx(2_000)
    assert advice.enough_workers == 20
    assert advice.best_rows_per_second == pytest.approx(20_000)


def test_an_embedded_database_has_one_worker() -> None:
    found = figures(copy=(6_000, 160), limit=50_000, sink=50_000)
    advice = copy_advice(found, workers=8, cpus=8, several=False)
    assert advice is not None
    assert (advice.workers, advice.enough_workers) == (1, 1)
    assert advice.rows_per_second == pytest.approx(6_000)


def test_a_sink_that_took_more_with_us_than_alone_is_not_slower_than_that() -> None:
    found = figures(copy=(9_000, 20), limit=50_000, sink=7_000)
    advice = copy_advice(found, workers=1, cpus=2)
    assert advice is not None
    assert advice.rows_per_second == pytest.approx(9_000)


def test_without_cpu_time_or_an_end_there_is_advice_all_the_same() -> None:
    found = figures(copy=(100, 0), limit=1e6, sink=1e9)
    advice = copy_advice(found, workers=1, cpus=1)
    assert advice is not None
    assert 0.9 * MAX_WORKERS < advice.enough_workers <= MAX_WORKERS


@pytest.mark.parametrize("missing", [Measured.COPY, Measured.COPY_LIMIT, Measured.SINK_LIMIT])
def test_without_a_figure_nothing_is_concluded(missing: Measured) -> None:
    found = figures(copy=(5_000, 20), limit=50_000, sink=8_000)
    found[missing] = Figure(missing, 0, 0, 1.0, 0.0)
    assert copy_advice(found, workers=1, cpus=1) is None
    del found[missing]
    assert copy_advice(found, workers=1, cpus=1) is None


@given(
    copy=st.floats(1, 1e5),
    cpu=st.floats(0, 1e3),
    limit=st.floats(1, 1e6),
    sink=st.floats(1, 1e6),
    workers=st.integers(1, 128),
    cpus=st.integers(1, 128),
)
def test_no_rate_is_above_any_limit(
    copy: float, cpu: float, limit: float, sink: float, workers: int, cpus: int
) -> None:
    found = figures(copy=(copy, cpu), limit=limit, sink=sink)
    advice = copy_advice(found, workers=workers, cpus=cpus)
    assert advice is not None
    slack = 1 + 1e-9
    assert 0 < advice.rows_per_second <= workers * copy * slack
    assert advice.rows_per_second <= workers * limit * slack
    assert advice.rows_per_second <= max(sink, copy) * slack
    assert advice.rows_per_second * cpu * 1e-6 <= min(workers, cpus) * slack
    assert 1 <= advice.enough_workers <= MAX_WORKERS
    if workers <= MAX_WORKERS:
        assert advice.rows_per_second <= advice.best_rows_per_second * slack


# -- the stream


def test_the_stream_is_as_fast_as_what_was_measured() -> None:
    found = figures(copy=(1, 1), limit=1, sink=9_000, stream=(8_000, 25), updates=(2_000, 30))
    advice = stream_advice(found, wal_bytes_per_row=3_000)
    assert advice is not None
    assert advice.bottleneck == "qdrant"
    assert advice.updates_per_second == pytest.approx(2_000)
    assert advice.rows_per_second == pytest.approx(8_000)
    assert advice.wal_bytes_per_second == pytest.approx(24e6)


def test_the_stream_waits_for_our_cpu() -> None:
    found = figures(copy=(1, 1), limit=1, sink=90_000, stream=(20_000, 48))
    advice = stream_advice(found, wal_bytes_per_row=1)
    assert advice is not None
    assert (advice.bottleneck, advice.updates_per_second) == ("cdc-sync", None)


def test_the_stream_waits_for_postgres() -> None:
    found = figures(copy=(1, 1), limit=1, sink=9_000, stream=(8_000, 25), drain_limit=(3_000, 1))
    advice = stream_advice(found, wal_bytes_per_row=100)
    assert advice is not None
    assert advice.bottleneck == "postgres"
    assert advice.rows_per_second == pytest.approx(3_000)
    assert advice.wal_bytes_per_second == pytest.approx(300_000)


def test_the_wal_of_a_mixed_stream_goes_by_its_mix() -> None:
    found = figures(copy=(1, 1), limit=1, sink=9_000, stream=(8_000, 25), updates=(2_000, 30))
    half = stream_advice(found, wal_bytes_per_row=1_000, updates=0.5)
    only = stream_advice(found, wal_bytes_per_row=1_000, updates=1.0)
    assert half is not None
    assert only is not None
    assert half.wal_bytes_per_second == pytest.approx(3_200_000)
    assert only.wal_bytes_per_second == pytest.approx(2_000_000)


def test_without_a_stream_nothing_is_concluded() -> None:
    assert stream_advice({}, wal_bytes_per_row=1) is None


# -- the first copy


def test_larger_rows_take_longer_and_smaller_ones_no_less() -> None:
    sizes = [
        TableSize("a", 10_000, 30_000_000),
        TableSize("large", 1_000, 12_000_000),
        TableSize("small", 5_000, 100_000),
        TableSize("empty", 0, 8192),
    ]
    seconds = copy_seconds(sizes, "a", 1_000)
    assert seconds == {
        "a": pytest.approx(10),
        "large": pytest.approx(4),
        "small": pytest.approx(5),
        "empty": 0,
    }


def test_a_measured_table_that_was_thought_empty() -> None:
    assert copy_seconds([TableSize("a", 0, 0), TableSize("b", 10, 1)], "a", 10) == {"a": 0, "b": 1}


# -- figures


def test_a_figure_of_nothing_is_zero() -> None:
    nothing = Figure(Measured.COPY, 0, 0, 0.0, 0.0)
    assert (nothing.rows_per_second, nothing.bytes_per_second, nothing.cpu_per_row) == (0, 0, 0)
    assert set(LABELS) == set(Measured)


def test_a_clock_counts_what_runs_in_it() -> None:
    clock = Clock(Bounds(rows=10, seconds=3600))
    with clock:
        clock.count(9, 90)
        running = clock.left_seconds
        assert running < 3600
        assert not clock.over
    assert clock.seconds > 0
    clock.count(1, 10)
    assert clock.over
    found = clock.figure(Measured.COPY)
    assert (found.rows, found.bytes) == (10, 100)
    assert Clock(Bounds(10, 0.0)).over


# -- ranges


def table(*leaves: tuple[int, float]) -> Table:
    """A table with leaves of so many pages and (estimated) rows."""
    made = tuple(
        Leaf(oid, "public", f"part{oid}", oid, pages, rows)
        for oid, (pages, rows) in enumerate(leaves, 1)
    )
    return Table(
        oid=1,
        schema="public",
        name="t",
        partitioned=True,
        columns=(),
        primary_key=(),
        replica_identity="d",
        identity_columns=(),
        leaves=made,
        indexes=(),
    )


@given(
    leaves=st.lists(st.tuples(st.integers(0, 500), st.sampled_from([-1.0, 0.0, 10.0, 1e6]))),
    rows=st.integers(1, 2000),
)
def test_ranges_cover_every_block_once(leaves: list[tuple[int, float]], rows: int) -> None:
    ranges = list(PageRanges(table(*leaves), rows))
    for oid, (pages, _) in enumerate(leaves, 1):
        found = (one for one in ranges if one.leaf.oid == oid)
        own = [(one.start, one.end) for one in sorted(found, key=lambda one: one.start)]
        # Each begins where the one before has ended, and the last is open.
        assert [start for start, _ in own] == [0, *(end for _, end in own[:-1])]
        assert own[-1][1] is None
        assert own[-1][0] <= max(0, pages - 1)


def test_few_ranges_lie_spread_over_a_large_table() -> None:
    ranges = PageRanges(table((1_000_000, 1e8)), 1000)
    assert len(ranges) == 100_000
    starts = sorted(one.start for one in ranges[:10])
    gaps = [b - a for a, b in itertools.pairwise([0, *starts, 1_000_000])]
    assert max(gaps) < 300_000
    with pytest.raises(IndexError):
        ranges[100_000]


# -- the stream that is made

VALUES: list[RawValue] = [b"\0\0\0\7", None, TextValue(b"text"), UNCHANGED, b""]
RELATION = Relation(
    16_384,
    "public",
    "döcs",
    "d",
    (RelationColumn("id", 20, -1, True), RelationColumn("v", 70_000, 768, False)),
)


def test_messages_are_those_of_the_server() -> None:
    pairs: list[tuple[bytes, Message]] = [
        (encode.encode_relation(RELATION), RELATION),
        (encode.encode_insert(7, VALUES), Insert(7, list(VALUES), None)),
        (encode.encode_update(7, VALUES), Update(7, None, False, list(VALUES), None)),
    ]
    decoder = Decoder()
    for made, message in pairs:
        assert made == frames.encode(message)
        assert decoder.decode(made) == message
    begin, commit = encode.encode_begin(99, -5, 3), encode.encode_commit(99, 107, 6)
    for made in (begin, commit):
        assert frames.encode(decoder.decode(made)) == made
    wrapped = encode.frame(begin, 12)
    assert wrapped == frames.xlog_data(begin, 12)
    assert wrapped[XLOG_HEADER_BYTES:] == begin
