"""Load protection: what is sent follows what Qdrant, and whoever stands before it, takes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
from qdrant_client import models

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ErrorKind, MappingError, SinkError
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.qdrant import rpc
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.pace import Cause
from cdc_sync.qdrant.sink import Applied, Changes, DeadLetter, Sink, TableWriter
from cdc_sync.rows import LARGE_ROW_BYTES, UNCHANGED, PointId, Row
from cdc_sync.sync.retry import retrying
from cdc_sync.sync.writing import writing
from tests.support.fix_postgres import Database
from tests.support.fix_qdrant import Faults, QdrantProcess, QdrantTarget
from tests.support.message_limits import message_limits
from tests.support.pipeline_task import Running, pipeline_settings, running, wal_position
from tests.support.sink_rows import item, items_plan

PLAN = items_plan("items")
POINTS = 200
CHANGES = Changes(upserts=[(n, item(n, "new", {"n": n})) for n in range(POINTS)])


_NO_LIMITS = {
    "upsert_max_batchsize": 10**9,
    "max_points_count": 10**9,
    "max_query_limit": 10**9,
    "read_rate_limit": 10**9,
    "write_rate_limit": 10**9,
    "search_allow_exact": True,
}


class Observer:
    """What a writer said of its pace."""

    def __init__(self) -> None:
        self.paces: list[tuple[int, Cause | None]] = []

    def started(self) -> None: ...

    def ended(self, method: str, code: str, seconds: float) -> None: ...

    def paced(self, collection: str, points: int, cause: Cause | None, *, slower: bool) -> None:
        self.paces.append((points, cause))


@pytest.fixture
def observer() -> Observer:
    return Observer()


@pytest.fixture
async def sinks() -> AsyncIterator[list[Sink]]:
    opened: list[Sink] = []
    yield opened
    for sink in opened:
        await sink.close()


async def writer_of(
    sinks: list[Sink], scripted: QdrantTarget, observer: Observer, **settings: object
) -> TableWriter:
    """A writer with small requests by itself; ``url`` may lead to a proxy."""
    sections = {"url": scripted.url, "request_points": 50, "timeout_seconds": 20.0, **settings}
    sink = await open_sink(QdrantSettings.model_validate(sections), observer)
    sinks.append(sink)
    await sink.ensure_collection(PLAN)
    scripted.script.clear_log()
    return sink.writer(PLAN)


def strict(scripted: QdrantTarget, collection: str = "items", **limits: object) -> None:
    """Put the collection into strict mode with these limits and no others (what is not named stays
    as it was, so every one is)."""
    config = models.StrictModeConfig.model_validate({"enabled": True, **_NO_LIMITS, **limits})
    scripted.client().update_collection(collection, strict_mode_config=config)


async def converge(writer: TableWriter, changes: Changes) -> Applied:
    """Write as the pipeline does, without waiting longer than the server asks."""
    attempt = writing(writer, changes)
    return await asyncio.wait_for(retrying(attempt, lambda error, seconds: None), 100)


def sizes(faults: Faults, operation: str = "Upsert") -> list[int]:
    return [int(e["points"]) for e in faults.log() if e["operation"] == operation]


def assert_content(scripted: QdrantTarget, expected: dict[PointId, object]) -> None:
    points, _ = scripted.client().scroll("items", limit=10_000, with_payload=True)
    assert {p.id: (p.payload or {})["doc"] for p in points} == expected
    assert scripted.violations() == []


def partials(count: int) -> Changes:
    return Changes(
        partials=[(n, item(n, "p", {"p": n}, (0.0, float(n)), UNCHANGED)) for n in range(count)]
    )


# -- strict mode


async def test_no_request_above_the_batch_size_of_strict_mode_after_the_first(
    scripted: QdrantTarget, sinks: list[Sink], observer: Observer, faults: Faults
) -> None:
    writer = await writer_of(sinks, scripted, observer)
    strict(scripted, upsert_max_batchsize=7)
    assert await writer.apply(CHANGES) == Applied()
    sent = sizes(faults)
    assert sum(1 for size in sent if size > 7) <= 4, "one refusal a lane, at most"
    assert len(sent) < 2 * POINTS / 7
    faults.clear_log()
    assert await writer.apply(partials(60)) == Applied()
    assert max(sizes(faults, "UpdateBatch")) <= 7
    assert_content(scripted, {n: {"p": n} if n < 60 else {"n": n} for n in range(POINTS)})
    assert ("batch_limit") in {cause for _, cause in observer.paces}


async def test_a_full_collection_waits_and_deletes_still_make_room(
    scripted: QdrantTarget, sinks: list[Sink], observer: Observer
) -> None:
    writer = await writer_of(sinks, scripted, observer, parallel_requests=1)
    await writer.apply(Changes(upserts=CHANGES.upserts[:20]))
    strict(scripted, max_points_count=20)
    new: list[tuple[PointId, Row]] = [(n, item(n, "new", {"n": n})) for n in (100, 101)]
    assert await writer.apply(Changes(upserts=new[:1], deletes=[0])) == Applied()
    with pytest.raises(SinkError, match="Max points count limit of 20") as caught:
        await writer.apply(Changes(upserts=new[1:]))
    assert caught.value.kind is ErrorKind.SINK_FULL
    assert "strict mode" in caught.value.remedy
    strict(scripted)
    assert await writer.apply(Changes(upserts=new[1:])) == Applied()
    assert_content(scripted, {n: {"n": n} for n in [*range(1, 20), 100, 101]})


async def test_a_batch_size_of_nothing_is_no_points_fault(
    scripted: QdrantTarget, sinks: list[Sink], observer: Observer
) -> None:
    writer = await writer_of(sinks, scripted, observer)
    strict(scripted, upsert_max_batchsize=0)
    with pytest.raises(SinkError) as caught:
        await writer.apply(CHANGES)
    assert caught.value.kind is ErrorKind.SINK_FULL


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("INVALID_ARGUMENT", "Bad request: Resident memory usage is at 91% of total memory"),
        ("RESOURCE_EXHAUSTED", "Insufficient storage: Disk usage is at 96% of total capacity"),
        ("INTERNAL", "Service internal error: No space left on device: WAL buffer size"),
    ],
)
async def test_a_full_node_is_no_points_fault(
    scripted: QdrantTarget,
    sinks: list[Sink],
    observer: Observer,
    faults: Faults,
    code: str,
    message: str,
) -> None:
    writer = await writer_of(sinks, scripted, observer)
    faults.reject("Upsert", code, message)
    with pytest.raises(SinkError) as caught:
        await writer.apply(Changes(upserts=CHANGES.upserts[:20]))
    assert caught.value.kind is ErrorKind.SINK_FULL
    assert observer.paces == [], "smaller requests would not help"


async def test_reads_keep_to_strict_mode_too(
    scripted: QdrantTarget, sinks: list[Sink], observer: Observer
) -> None:
    writer = await writer_of(sinks, scripted, observer)
    await writer.apply(CHANGES)
    strict(scripted, max_query_limit=30, search_allow_exact=False, read_rate_limit=6000)
    assert await writer.count() == POINTS
    pages = [page async for page in writer.scroll_ids(100)]
    assert [len(page) for page in pages] == [30] * 6 + [20]
    assert len(await writer.retrieve(range(POINTS))) == POINTS
    # More at once than the rate limiter ever lets through.
    strict(scripted, read_rate_limit=45)
    assert len(await writer.retrieve(range(40, 60))) == 20
    await writer.clear()
    assert scripted.client().count("items").count == 0


async def test_our_own_records_keep_to_strict_mode(
    qdrant_private: QdrantProcess, sinks: list[Sink], observer: Observer
) -> None:
    await writer_of(sinks, qdrant_private, observer)
    state = sinks[0].state
    letters = [
        DeadLetter("p", "public.items", str(n), "0/1", "2026-01-01T00:00:00", "wrong")
        for n in range(35)
    ]
    await state.park(letters[:1])
    strict(qdrant_private, "_cdc_sync", upsert_max_batchsize=10, max_query_limit=10)
    await state.park(letters)
    assert len(await state.dead_letters("p")) == 35
    await state.release("p", [(letter.table, letter.key) for letter in letters])
    assert await state.dead_letters("p") == []


# -- rates


@pytest.mark.campaign
async def test_partials_above_the_rate_get_through_piece_by_piece(
    scripted: QdrantTarget, sinks: list[Sink], observer: Observer
) -> None:
    """Each operation of a batch is charged, and those before the refused one again with the next
    try: a batch with more of them than the limiter holds would never end. (In short form, without
    waiting: tests/unit/test_sending.py.)"""
    writer = await writer_of(sinks, scripted, observer)
    await writer.apply(CHANGES)
    strict(scripted, write_rate_limit=140)
    # A request of 50 partials costs 50 payloads, 50 vectors and 50 of the barrier: more than ever
    # is there, while no single operation is.
    assert await converge(writer, partials(50)) == Applied()
    strict(scripted)
    assert_content(scripted, {n: {"p": n} if n < 50 else {"n": n} for n in range(POINTS)})
    assert min(points for points, _ in observer.paces) < 50
    assert observer.paces[0][1] == "rate_limit"


# -- deadlines


@pytest.mark.parametrize("how", ["DEADLINE_EXCEEDED", "wait_timeout", "RESOURCE_EXHAUSTED"])
async def test_less_is_sent_after_trouble_and_everything_again_later(
    scripted: QdrantTarget,
    sinks: list[Sink],
    observer: Observer,
    faults: Faults,
    how: str,
) -> None:
    writer = await writer_of(sinks, scripted, observer)
    for expected in (100, 50, 25, 12):
        if how == "wait_timeout":
            faults.wait_timeout("Upsert", times=4)
        else:
            faults.reject("Upsert", how, "scripted", times=4)
        with pytest.raises(SinkError):
            await writer.apply(CHANGES)
        assert observer.paces[-1][0] == expected, "one trouble of four requests counts once"
        faults.clear()
    faults.clear_log()
    await writer.apply(CHANGES)
    log = faults.log()
    assert max(sizes(faults)) < 50
    assert max(int(e["in_flight"]) for e in log) == 0, "one request at a time"
    for _ in range(200):
        await writer.apply(CHANGES)
        if observer.paces[-1][1] is None:
            break
    assert observer.paces[-1] == (200, None)
    faults.clear_log()
    await writer.apply(CHANGES)
    assert sizes(faults) == [50] * 4
    assert_content(scripted, {n: {"n": n} for n in range(POINTS)})


async def test_requests_that_are_swallowed_get_smaller(
    scripted: QdrantTarget, sinks: list[Sink], observer: Observer, faults: Faults
) -> None:
    """Four requests get no answer, then two, then one; applied or not, nobody says."""
    writer = await writer_of(sinks, scripted, observer, timeout_seconds=1.0)
    for applied in (True, False, True, True, False, True, False):
        faults.never_answer("Upsert", applied=applied)
    assert await converge(writer, CHANGES) == Applied()
    assert faults.queued() == 0
    assert_content(scripted, {n: {"n": n} for n in range(POINTS)})
    assert observer.paces[0] == (100, "deadline")
    assert min(points for points, _ in observer.paces) <= 25


# -- sizes


def wide(n: int, size: int) -> Row:
    return item(n, "x" * size, {"n": n})


async def test_a_proxy_that_takes_only_so_many_bytes(
    scripted: QdrantTarget, sinks: list[Sink], observer: Observer, faults: Faults
) -> None:
    limit = 1 << 20
    with message_limits(scripted.url, request_bytes=limit) as url:
        writer = await writer_of(sinks, scripted, observer, url=url, request_bytes=32 << 20)
        rows: list[tuple[PointId, Row]] = [(n, wide(n, 50_000)) for n in range(60)]
        rows.insert(30, (1000, wide(1000, 5 << 18)))
        applied = await writer.apply(Changes(upserts=rows, large=True))
        ((refused, reason),) = applied.refused
        assert refused == 1000
        assert str(limit) in reason
        assert f"The point has {5 << 18:d}"[:16] in reason
        assert "Received message larger than max" in reason
        assert "xxx" not in reason
        assert ("message_size") in {cause for _, cause in observer.paces}
        refusals = [e for e in faults.log() if e["outcome"] != "OK"]
        assert refusals == [], "the proxy refuses, the server sees nothing of it"
        faults.clear_log()
        again = await writer.apply(Changes(upserts=rows[:30]))
        assert again == Applied()
        # The limit is known now: 30 requests of one lane each would be more than needed.
        assert len(sizes(faults)) < 15
    assert_content(scripted, {n: {"n": n} for n in range(60)})


async def test_large_answers_are_read_in_pieces_and_large_points_by_themselves(
    scripted: QdrantTarget,
    sinks: list[Sink],
    observer: Observer,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc, "MAX_ANSWER_BYTES", 1 << 20)
    writer = await writer_of(sinks, scripted, observer)
    rows: list[tuple[PointId, Row]] = [(n, wide(n, 1 << 16)) for n in range(24)]
    await writer.apply(Changes(upserts=[*rows, (24, wide(24, (1 << 20) + 1000))]))
    found = {p.id: p for p in await writer.retrieve(range(25))}
    assert set(found) == set(range(25))
    assert len(str(found[24].payload["title"])) == (1 << 20) + 1000
    read = [e for e in faults.log() if e["operation"] == "Get"]
    assert 3 < len(read) < 25
    scrolled = [p.id async for page in writer.scroll_points(25, False) for p in page]
    assert scrolled == list(range(25))


async def test_a_stored_point_that_no_proxy_lets_through_is_written_anew(
    scripted: QdrantTarget, sinks: list[Sink], observer: Observer
) -> None:
    """An update that leaves a value unchanged needs the stored one; if that cannot be read, the row
    is taken from Postgres as if the point was missing."""
    direct = await writer_of(sinks, scripted, observer)
    large = [(1, wide(1, 2 << 20)), (2, wide(2, 100)), (3, wide(3, 2 << 20))]
    await direct.apply(Changes(upserts=list(large), large=True))
    with message_limits(scripted.url, answer_bytes=1 << 20) as url:
        writer = await writer_of(sinks, scripted, observer, url=url)
        changes = Changes(
            partials=[(n, item(n, UNCHANGED, {"p": n}, UNCHANGED, UNCHANGED)) for n in (1, 2, 3)]
        )
        applied = await writer.apply(changes)
    assert applied == Applied(missing=frozenset({1, 3}))
    assert_content(scripted, {1: {"n": 1}, 2: {"p": 2}, 3: {"n": 3}})


async def test_a_row_above_the_configured_size_is_never_encoded(
    scripted: QdrantTarget,
    sinks: list[Sink],
    observer: Observer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    writer = await writer_of(sinks, scripted, observer, max_row_bytes=8 << 20)
    encoded: set[PointId] = set()
    point, points = WireCodec.point, WireCodec.points

    def spy(codec: WireCodec, id_: PointId, row: Row) -> bytes:
        encoded.add(id_)
        return point(codec, id_, row)

    def spies(codec: WireCodec, rows: Sequence[tuple[PointId, Row]]) -> list[bytes | MappingError]:
        encoded.update(id_ for id_, _ in rows)
        return points(codec, rows)

    monkeypatch.setattr(WireCodec, "point", spy)
    monkeypatch.setattr(WireCodec, "points", spies)
    rows = [(1, wide(1, 100)), (2, wide(2, 9 << 20)), (3, wide(3, 7 << 20))]
    changes = Changes(
        upserts=list(rows),
        partials=[(4, item(4, "y" * (9 << 20), {}, UNCHANGED, UNCHANGED))],
        large=True,
    )
    applied = await writer.apply(changes)
    assert {id_ for id_, _ in applied.refused} == applied.unmappable == {2, 4}
    assert all("qdrant.max_row_bytes" in reason for _, reason in applied.refused)
    assert encoded == {1, 3}


async def test_the_loop_lives_while_a_large_row_is_encoded(
    scripted: QdrantTarget,
    sinks: list[Sink],
    observer: Observer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Postgres hangs up on a consumer that gives no sign of life meanwhile."""
    writer = await writer_of(sinks, scripted, observer)
    point = WireCodec.point
    begun, seen = threading.Event(), threading.Event()

    def slow(codec: WireCodec, id_: PointId, row: Row) -> bytes:
        begun.set()
        assert seen.wait(20), "the loop stands still"
        return point(codec, id_, row)

    async def look() -> None:
        await asyncio.to_thread(begun.wait, 20)
        seen.set()

    monkeypatch.setattr(WireCodec, "point", slow)
    looking = asyncio.create_task(look())
    large = [(n, wide(n, LARGE_ROW_BYTES + 1)) for n in range(3)]
    await writer.apply(Changes(upserts=list(large), large=True))
    await looking
    assert_content(scripted, {n: {"n": n} for n in range(3)})


async def test_a_large_request_may_take_longer(
    scripted: QdrantTarget,
    sinks: list[Sink],
    observer: Observer,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a row that a slow line does not take in time would be sent again for ever."""
    monkeypatch.setattr(rpc, "_DEADLINE_BYTES", 1024)
    writer = await writer_of(sinks, scripted, observer, timeout_seconds=1.0, request_bytes=1024)
    faults.slow("Upsert", 2.0)
    assert await writer.apply(Changes(upserts=[(1, wide(1, 60_000))])) == Applied()
    faults.slow("Upsert", 2.0)
    with pytest.raises(SinkError, match="DEADLINE_EXCEEDED"):
        await writer.apply(Changes(upserts=[(2, wide(2, 100))]))


# -- the pipeline


def create(database: Database, rows: int) -> None:
    database.execute("CREATE TABLE items (id bigint PRIMARY KEY, note text, emb vector(2))")
    database.execute(
        "INSERT INTO items SELECT i, 'n', '[1,2]' FROM generate_series(1, %s) i", (rows,)
    )


@pytest.mark.requirement("R1", "R2")
async def test_postgres_hears_from_us_while_qdrant_is_slow_and_while_it_is_tried_again(
    database18: Database, qdrant_private: QdrantProcess
) -> None:
    """Also when so much waits that nothing is read, and Postgres asks in vain."""
    faults = qdrant_private.script
    create(database18, 100)
    database18.execute(f'ALTER DATABASE "{database18.name}" SET wal_sender_timeout = 1000')
    settings = pipeline_settings(database18, qdrant_private, "items", pipeline={"batch_rows": 10})
    async with running(settings, database18, qdrant_private) as life:
        before = reconnects(life)
        faults.hold("Upsert")
        faults.reject("Upsert", "RESOURCE_EXHAUSTED", "Rate limiting exceeded", retry_after=2)
        database18.execute("UPDATE items SET note = 'slow'")
        await life.wait(lambda: faults.held() > 0, "a request in flight")
        await asyncio.sleep(2.5)
        faults.release()
        await life.assert_equal()
        assert life.metric("sink_retries_total", kind="sink_rate_limited") == 1
        assert reconnects(life) == before


def reconnects(life: Running) -> float:
    return sum(
        sample.value
        for family in life.pipeline.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "cdc_sync_source_reconnects_total"
    )


def slowdowns(life: Running) -> list[dict[str, Any]]:
    return cast("list[dict[str, Any]]", life.pipeline.board.snapshot()["slowed"])


async def test_a_full_collection_is_a_stall_that_says_what_to_do(
    database18: Database, qdrant_private: QdrantProcess
) -> None:
    create(database18, 10)
    settings = pipeline_settings(database18, qdrant_private, "items")
    collection = str(settings.tables[0].collection)
    async with running(settings, database18, qdrant_private) as life:
        strict(qdrant_private, collection, max_points_count=10)
        database18.execute("INSERT INTO items VALUES (11, 'too many', '[1,2]')")
        written = wal_position(database18)
        await life.wait(
            lambda: life.metric("sink_retries_total", kind="sink_full") > 1, "some retries"
        )
        sink = life.pipeline.board.snapshot()["sink"]
        assert isinstance(sink, dict)
        assert sink["up"] is False
        assert "Max points count limit of 10 reached" in sink["error"]
        assert "Raise the limit" in sink["error"]
        assert life.metric("dead_letters_pending", table="public.items") == 0
        assert life.confirmed() < written
        strict(qdrant_private, collection)
        await life.assert_equal()
        assert life.pipeline.board.snapshot()["sink"]["up"] is True  # type: ignore[index]


async def test_a_slowdown_is_seen_with_its_cause_and_passes(
    database18: Database, qdrant_private: QdrantProcess
) -> None:
    faults = qdrant_private.script
    create(database18, 300)
    settings = pipeline_settings(
        database18,
        qdrant_private,
        "items",
        target={"request_points": 16, "parallel_requests": 2},
    )
    collection = str(settings.tables[0].collection)
    async with running(settings, database18, qdrant_private) as life:
        assert slowdowns(life) == []
        faults.hold("Upsert", times=2)
        faults.reject("Upsert", "RESOURCE_EXHAUSTED", "Rate limiting exceeded", retry_after=1)
        database18.execute("UPDATE items SET note = 'limited'")
        await life.wait(lambda: faults.held() == 2, "two requests in flight")
        faults.release()
        await life.wait(
            lambda: life.metric("sink_slowdowns_total", cause="rate_limit") > 0, "a slowdown"
        )
        slowed = slowdowns(life)[0]
        assert slowed["collection"] == collection
        assert slowed["cause"] == "rate_limit"
        assert 0 < slowed["points"] < 32
        assert life.metric("sink_window_points", collection=collection) == slowed["points"]
        for turn in range(20):
            await life.caught_up()
            if not slowdowns(life):
                break
            database18.execute("UPDATE items SET note = %s", (str(turn),))
        await life.assert_equal()
        assert slowdowns(life) == []
        assert life.metric("sink_window_points", collection=collection) == 32
