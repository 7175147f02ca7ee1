"""A server that fails in every way we know: what apply says, and that a resend converges."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ConfigError, ErrorKind, SinkError
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Applied, Changes, PipelineState, Sink, TableWriter
from cdc_sync.rows import UNCHANGED
from cdc_sync.sync.writing import writing
from tests.support.fix_qdrant import Faults, QdrantProcess, QdrantTarget
from tests.support.sink_rows import item, items_plan
from tests.support.sinks import content, ready, settings_of

POINTS = 200
#: Four lanes of one request each.
CHANGES = Changes(upserts=[(n, item(n, "new", {"n": n})) for n in range(POINTS)])


def lanes_of(scripted: QdrantTarget, **more: object) -> QdrantSettings:
    return settings_of(scripted, **{"request_points": 50, "timeout_seconds": 20.0, **more})


@pytest.fixture
async def sink(scripted: QdrantTarget) -> AsyncIterator[Sink]:
    opened = await open_sink(lanes_of(scripted))
    yield opened
    await opened.close()


@pytest.fixture
async def writer(sink: Sink) -> TableWriter:
    return await ready(sink, items_plan("items"))


@pytest.fixture
def faults(scripted: QdrantTarget, writer: TableWriter) -> Faults:
    scripted.script.clear_log()
    return scripted.script


async def fails(writer: TableWriter, changes: Changes, kind: ErrorKind) -> SinkError:
    with pytest.raises(SinkError) as caught:
        await writer.apply(changes)
    assert caught.value.kind is kind
    assert "items" in caught.value.message
    assert caught.value.remedy
    return caught.value


async def converges(writer: TableWriter, faults: Faults) -> None:
    """The same batch again does it, and no point was ever in two requests at once."""
    assert await writer.apply(CHANGES) == Applied()
    stored = await content(writer)
    assert set(stored) == set(range(POINTS))
    assert all(stored[n].payload["doc"] == {"n": n} for n in range(POINTS))
    assert faults.violations() == []


async def through(writer: TableWriter, changes: Changes) -> bool:
    """Whether the server took it; False if it was away."""
    try:
        assert await writer.apply(changes) == Applied()
    except SinkError as error:
        if error.kind is not ErrorKind.SINK_UNAVAILABLE:
            raise
        return False
    return True


async def until_held(faults: Faults, count: int) -> None:
    for _ in range(200):
        if faults.held() == count:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{faults.held()} requests are held, not {count}")


# -- codes


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("UNAVAILABLE", ErrorKind.SINK_UNAVAILABLE),
        ("INTERNAL", ErrorKind.SINK_UNKNOWN),
        ("DEADLINE_EXCEEDED", ErrorKind.SINK_UNKNOWN),
        ("CANCELLED", ErrorKind.SINK_UNKNOWN),
        ("UNKNOWN", ErrorKind.SINK_UNKNOWN),
        ("ABORTED", ErrorKind.SINK_UNKNOWN),
        ("DATA_LOSS", ErrorKind.SINK_UNKNOWN),
        ("RESOURCE_EXHAUSTED", ErrorKind.SINK_RATE_LIMITED),
        ("PERMISSION_DENIED", ErrorKind.SINK_AUTH),
        ("UNAUTHENTICATED", ErrorKind.SINK_AUTH),
    ],
)
async def test_code_of_one_of_the_parallel_requests(
    writer: TableWriter, faults: Faults, code: str, kind: ErrorKind
) -> None:
    faults.reject("Upsert", code)
    error = await fails(writer, CHANGES, kind)
    assert "Upsert" in error.message
    assert code in error.message
    assert error.retry_after_seconds is None
    await converges(writer, faults)


@pytest.mark.parametrize("operation", ["UpdateBatch", "SetPayload", "Get", "Delete"])
async def test_failure_of_every_kind_of_request(
    writer: TableWriter, faults: Faults, operation: str
) -> None:
    await writer.apply(CHANGES)
    changes = Changes(
        partials=[(n, item(n, "b", UNCHANGED, (0.0, float(n)), None)) for n in range(100)],
        deletes=list(range(150, POINTS)),
    )
    faults.reject(operation, "UNAVAILABLE")
    error = await fails(writer, changes, ErrorKind.SINK_UNAVAILABLE)
    assert operation in error.message
    assert await writer.apply(changes) == Applied()
    stored = await content(writer)
    assert set(stored) == set(range(150))
    assert all(stored[n].payload == {"id": n, "title": "b", "doc": {"n": n}} for n in range(100))
    assert all(stored[n].vectors == {"small": [0.0, float(n)]} for n in range(100))
    assert faults.violations() == []


async def test_rate_limit_says_how_long(writer: TableWriter, faults: Faults) -> None:
    faults.reject("Upsert", "RESOURCE_EXHAUSTED", "Rate limiting exceeded", retry_after=7)
    error = await fails(writer, CHANGES, ErrorKind.SINK_RATE_LIMITED)
    assert error.retry_after_seconds == 7
    await converges(writer, faults)


async def test_more_than_the_rate_limiter_ever_lets_through_is_split(
    writer: TableWriter, faults: Faults
) -> None:
    too_large = "request larger than rate limiter capacity, please try to split your request"
    faults.reject("Upsert", "RESOURCE_EXHAUSTED", too_large, times=3)
    faults.reject("UpdateBatch", "RESOURCE_EXHAUSTED", too_large)
    assert await writer.apply(CHANGES) == Applied()
    changes = Changes(partials=[(n, item(n, "b", None, (0.0, 0.0), None)) for n in range(20)])
    assert await writer.apply(changes) == Applied()
    assert (await content(writer))[19].vectors == {"small": [0.0, 0.0]}
    # A single point that is too large is not split for ever.
    faults.reject("Upsert", "RESOURCE_EXHAUSTED", too_large)
    error = await fails(writer, Changes(upserts=[(1, item(1))]), ErrorKind.SINK_RATE_LIMITED)
    assert error.retry_after_seconds is None


async def test_a_full_collection_is_no_points_fault(writer: TableWriter, faults: Faults) -> None:
    faults.reject("Upsert", "INVALID_ARGUMENT", "Bad request: Max points count limit of 5 reached!")
    changes = Changes(upserts=[(n, item(n)) for n in range(20)])
    error = await fails(writer, changes, ErrorKind.SINK_FULL)
    assert "Max points count" in error.message
    assert faults.operations().count("Upsert") == 1


async def test_refusal_of_partials(writer: TableWriter, faults: Faults) -> None:
    await writer.apply(CHANGES)
    # The batch, its first half, and the first point of that.
    faults.reject("UpdateBatch", "INVALID_ARGUMENT", 'Wrong input: "value" [1.5]', times=3)
    changes = Changes(partials=[(n, item(n, "b", None, (0.0, 0.0), None)) for n in range(4)])
    applied = await writer.apply(changes)
    assert applied == Applied(refused=((0, 'Wrong input: "..." [...]'),))
    stored = await content(writer)
    assert [stored[n].payload["title"] for n in range(5)] == ["new", "b", "b", "b", "new"]


# -- unknown outcomes


@pytest.mark.parametrize("operation", ["Upsert", "Delete", "UpdateBatch", "SetPayload"])
async def test_wait_timeout_is_not_completed(
    writer: TableWriter, faults: Faults, operation: str
) -> None:
    await writer.apply(CHANGES)
    changes = Changes(
        upserts=[(1000, item(1000))],
        deletes=[1],
        # One operation goes by itself, with wait=true; several with a barrier.
        partials=[
            (n, item(n, "b", None, UNCHANGED, UNCHANGED))
            for n in (range(2, 3) if operation == "UpdateBatch" else range(2, 30))
        ],
    )
    faults.wait_timeout(operation)
    error = await fails(writer, changes, ErrorKind.SINK_UNKNOWN)
    assert "WaitTimeout" in error.message
    assert operation in error.message
    assert await writer.apply(changes) == Applied()
    stored = await content(writer)
    assert 1 not in stored
    assert (stored[1000].payload["title"], stored[2].payload["title"]) == ("t", "b")


@pytest.mark.parametrize("applied", [True, False])
async def test_deadline(scripted: QdrantTarget, applied: bool) -> None:
    sink = await open_sink(lanes_of(scripted, timeout_seconds=0.7))
    try:
        await sink.ensure_collection(items_plan("items"))
        writer = sink.writer(items_plan("items"))
        scripted.script.never_answer("Upsert", applied=applied)
        started = time.monotonic()
        await fails(writer, CHANGES, ErrorKind.SINK_UNKNOWN)
        assert 0.6 < time.monotonic() - started < 5
        await converges(writer, scripted.script)
    finally:
        await sink.close()


async def test_applied_but_the_answer_was_lost(writer: TableWriter, faults: Faults) -> None:
    faults.fail_after_apply("Upsert", times=4)
    await fails(writer, CHANGES, ErrorKind.SINK_UNAVAILABLE)
    await converges(writer, faults)


async def test_missing_points_are_told_apart_from_lost_answers(
    writer: TableWriter, faults: Faults
) -> None:
    await writer.apply(Changes(upserts=[(n, item(n)) for n in range(0, 40, 2)]))
    changes = Changes(partials=[(n, item(n, "b", None, (0.0, 0.0), None)) for n in range(40)])
    # The first barrier would say NOT_FOUND; what was applied is not known then.
    faults.fail_after_apply("SetPayload", "UNAVAILABLE", times=3)
    await fails(writer, changes, ErrorKind.SINK_UNAVAILABLE)
    faults.clear()
    assert (await writer.apply(changes)).missing == frozenset(range(1, 40, 2))
    stored = await content(writer)
    assert set(stored) == set(range(0, 40, 2))
    assert {p.payload["title"] for p in stored.values()} == {"b"}


async def test_missing_points_are_told_of_by_the_next_try_too(scripted: QdrantTarget) -> None:
    """Their request was answered, and another of the batch fails: they are still to be written."""
    sink = await open_sink(lanes_of(scripted, request_points=20, parallel_requests=1))
    try:
        writer = await ready(sink, items_plan("items"))
        missing = frozenset(range(1, 20, 2))
        await writer.apply(Changes(upserts=[(n, item(n)) for n in range(40) if n not in missing]))
        changes = Changes(partials=[(n, item(n, "b", None, (0.0, 0.0), None)) for n in range(40)])
        # The first request is sent again without those that are missing; the second fails.
        scripted.script.slow("UpdateBatch", 0.0, times=2)
        scripted.script.reject("UpdateBatch", "UNAVAILABLE")
        attempt = writing(writer, changes)
        with pytest.raises(SinkError) as failed:
            await attempt()
        assert failed.value.completed == frozenset(range(0, 20, 2))
        assert (await attempt()).missing == missing
    finally:
        await sink.close()


async def test_barrier_waits_for_operations_that_are_applied_late(
    writer: TableWriter, faults: Faults
) -> None:
    await writer.apply(CHANGES)
    faults.lag(0.3)
    changes = Changes(partials=[(n, item(n, "b", None, (5.0, 5.0), None)) for n in range(10)])
    started = time.monotonic()
    await writer.apply(changes)
    assert time.monotonic() - started > 0.25
    stored = await content(writer)
    assert all(stored[n].vectors == {"small": [5.0, 5.0]} for n in range(10))
    assert all(stored[n].payload["title"] == "b" for n in range(10))


async def test_a_missing_point_among_operations_applied_late(
    writer: TableWriter, faults: Faults
) -> None:
    """What ``wait=false`` hides comes out at the barrier."""
    await writer.apply(Changes(upserts=[(n, item(n)) for n in range(9)]))
    faults.lag(0.01)
    changes = Changes(partials=[(n, item(n, "b", None, (5.0, 5.0), None)) for n in range(10)])
    assert (await writer.apply(changes)).missing == {9}
    stored = await content(writer)
    assert set(stored) == set(range(9))
    assert all(point.vectors == {"small": [5.0, 5.0]} for point in stored.values())


# -- nothing in flight


async def test_apply_waits_for_all_requests_when_one_fails(
    writer: TableWriter, faults: Faults
) -> None:
    faults.reject("Upsert", "UNAVAILABLE")
    faults.hold("Upsert", times=3)
    task = asyncio.create_task(writer.apply(CHANGES))
    await until_held(faults, 3)
    await asyncio.sleep(0.3)
    # One has failed, three are under way: apply must not have come back.
    assert not task.done()
    faults.release()
    with pytest.raises(SinkError):
        await task
    assert [entry["end"] is not None for entry in faults.log()] == [True] * 4
    await converges(writer, faults)


async def test_the_gravest_of_several_errors_is_raised(writer: TableWriter, faults: Faults) -> None:
    faults.reject("Upsert", "UNAVAILABLE", times=2)
    faults.reject("Upsert", "PERMISSION_DENIED")
    faults.reject("Upsert", "UNAVAILABLE")
    await fails(writer, CHANGES, ErrorKind.SINK_AUTH)


async def test_a_failed_lane_stops_the_others(writer: TableWriter, faults: Faults) -> None:
    faults.reject("Upsert", "UNAVAILABLE")
    faults.slow("Upsert", 0.1, times=100)
    changes = Changes(upserts=[(n, item(n)) for n in range(2000)])
    await fails(writer, changes, ErrorKind.SINK_UNAVAILABLE)
    # Of 40 requests only those that were under way already.
    assert faults.operations().count("Upsert") <= 8


async def test_at_most_the_configured_requests_are_in_flight(
    writer: TableWriter, faults: Faults
) -> None:
    faults.slow("Upsert", 0.05, times=100)
    changes = Changes(upserts=[(n, item(n)) for n in range(1000)])
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticker = asyncio.create_task(tick())
    await writer.apply(changes)
    ticker.cancel()
    flights = [entry["in_flight"] for entry in faults.log()]
    assert max(flights) == 3
    assert faults.violations() == []
    # The event loop went on meanwhile (five rounds of 50 ms).
    assert ticks >= 10


@pytest.mark.parametrize("impatient", [False, True])
async def test_cancelled_apply_leaves_nothing_in_flight(
    writer: TableWriter, faults: Faults, impatient: bool
) -> None:
    faults.hold("Upsert", times=4)
    changes = Changes(upserts=[(n, item(n)) for n in range(1000)])
    task = asyncio.create_task(writer.apply(changes))
    await until_held(faults, 4)
    for _ in range(3 if impatient else 1):
        task.cancel()
        await asyncio.sleep(0.1)
    assert not task.done()
    faults.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    log = faults.log()
    # What was under way was awaited, and nothing more was begun.
    assert [entry["outcome"] for entry in log] == ["OK (hold)"] * 4
    assert await writer.count() == 200
    await converges_after_cancel(writer, changes)


async def converges_after_cancel(writer: TableWriter, changes: Changes) -> None:
    assert await writer.apply(changes) == Applied()
    assert await writer.count() == 1000


async def test_a_cancelled_read_is_abandoned(writer: TableWriter, faults: Faults) -> None:
    faults.hold("Count")
    task = asyncio.create_task(writer.count())
    await until_held(faults, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 2)
    faults.release()


# -- servers that come, go and refuse


async def test_killed_while_writing_and_restarted(qdrant_private: QdrantProcess) -> None:
    sink = await open_sink(lanes_of(qdrant_private))
    await sink.ensure_collection(items_plan("items"))
    writer = sink.writer(items_plan("items"))
    await writer.apply(Changes(upserts=[(n, item(n, "old")) for n in range(50)]))
    qdrant_private.script.crash("Upsert", applied=False)
    await fails(writer, CHANGES, ErrorKind.SINK_UNAVAILABLE)
    await fails(writer, CHANGES, ErrorKind.SINK_UNAVAILABLE)
    qdrant_private.restart()
    started = time.monotonic()
    while not await through(writer, CHANGES):
        assert time.monotonic() - started < 5
    # gRPC's own reconnect backoff must not keep us away for long.
    assert time.monotonic() - started < 5
    assert set(await content(writer)) == set(range(POINTS))
    await sink.close()


async def test_collection_dropped_while_writing(
    scripted: QdrantTarget, writer: TableWriter
) -> None:
    scripted.client().delete_collection("items")
    await fails(writer, CHANGES, ErrorKind.COLLECTION_MISSING)


async def test_state_store_says_what_failed(sink: Sink, scripted: QdrantTarget) -> None:
    state = PipelineState("p", "s", "p", "1", 1, 0)
    await sink.state.save(state)
    for operation, kind in (
        ("reject", ErrorKind.SINK_UNAVAILABLE),
        ("wait", ErrorKind.SINK_UNKNOWN),
    ):
        if operation == "reject":
            scripted.script.reject("Upsert", "UNAVAILABLE")
        else:
            scripted.script.wait_timeout("Upsert")
        with pytest.raises(SinkError, match="_cdc_sync") as caught:
            await sink.state.save(state)
        assert caught.value.kind is kind
    scripted.script.reject("Get", "UNAVAILABLE")
    with pytest.raises(SinkError, match="_cdc_sync"):
        await sink.state.load("p")
    await sink.state.save(state)
    assert await sink.state.load("p") == state


async def test_nobody_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        settings = QdrantSettings.model_validate({"url": f"http://127.0.0.1:{port}"})
        with pytest.raises(SinkError) as caught:
            await asyncio.wait_for(open_sink(settings), 10)
    assert caught.value.kind is ErrorKind.SINK_UNAVAILABLE
    assert str(port) in caught.value.message


async def test_a_server_that_is_too_old(scripted: QdrantTarget) -> None:
    scripted.script.version("1.13.6")
    with pytest.raises(ConfigError, match=r"1\.13\.6"):
        await open_sink(lanes_of(scripted))
    for version in ("1.14.0", "v2.0.0-dev", "nightly"):
        scripted.script.version(version)
        sink = await open_sink(lanes_of(scripted))
        assert sink.version == version
        await sink.close()
    scripted.script.version("1.18.0")


@pytest.mark.parametrize("given", [None, "wrong-secret"])
async def test_api_key(tmp_path: Path, given: str | None) -> None:
    target = QdrantProcess(tmp_path / "qdrant", api_key="right-secret")
    try:
        right = await open_sink(lanes_of(target))
        await right.ensure_collection(items_plan("items"))
        await right.close()
        wrong = await open_sink(lanes_of(target, api_key=given))
        try:
            await fails(wrong.writer(items_plan("items")), CHANGES, ErrorKind.SINK_AUTH)
            with pytest.raises(SinkError) as caught:
                await wrong.inspect(items_plan("items"))
            assert caught.value.kind is ErrorKind.SINK_AUTH
            assert "secret" not in str(caught.value) + caught.value.remedy
        finally:
            await wrong.close()
    finally:
        target.close()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1"
        f" -addext subjectAltName=IP:127.0.0.1 -out {cert} -keyout {key}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return cert, key


async def test_tls(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    target = QdrantProcess(tmp_path / "qdrant", tls=certificate)
    try:
        assert target.url.startswith("https://")
        sink = await open_sink(lanes_of(target, ca_file=str(certificate[0])))
        await sink.ensure_collection(items_plan("items"))
        assert await sink.writer(items_plan("items")).apply(CHANGES) == Applied()
        await sink.close()
        # An authority that the system does not know is refused, never ignored.
        with pytest.raises(SinkError) as caught:
            await open_sink(lanes_of(target))
        assert caught.value.kind is ErrorKind.SINK_AUTH
        assert "ca_file" in caught.value.remedy
    finally:
        target.close()


async def test_random_faults_converge(writer: TableWriter, faults: Faults) -> None:
    """Batches over the same ids, each repeated until it is through: as if nothing had failed."""
    faults.random(0.3, 7, ("unavailable", "internal", "lost_response", "wait_timeout", "slow"))
    for turn in range(12):
        names = {n: f"{turn}-{uuid.uuid4().hex[:4]}" for n in range(40)}
        changes = Changes(
            upserts=[(n, item(n, names[n])) for n in range(20)],
            partials=[
                (n, item(n, names[n], None, (float(turn), 0.0), UNCHANGED)) for n in range(20, 35)
            ],
            deletes=list(range(35, 40)),
        )
        while True:
            try:
                applied = await writer.apply(changes)
            except SinkError:
                continue
            break
        assert applied.refused == ()
        if turn == 0:
            assert applied.missing == frozenset(range(20, 35))
            await upsert_until_through(writer, [*range(20, 40)])
            continue
        assert applied.missing == frozenset()
        faults.random(0.0, 0)
        stored = await content(writer)
        faults.random(0.3, 7 + turn, ("unavailable", "lost_response", "wait_timeout"))
        assert {n: stored[n].payload["title"] for n in range(35)} == {
            n: names[n] for n in range(35)
        }
        assert all(stored[n].vectors["small"] == [float(turn), 0.0] for n in range(20, 35))
        assert set(stored) == set(range(35))
    assert faults.violations() == []


async def upsert_until_through(writer: TableWriter, ids: list[int]) -> None:
    while True:
        try:
            await writer.apply(Changes(upserts=[(n, item(n)) for n in ids]))
        except SinkError:
            continue
        return
