"""The scripted failures of the Qdrant test server do what the tests of the project assume."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client import grpc as q
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse

from tests.support.fix_qdrant import Faults, QdrantProcess
from tests.support.qdrant_cases import create_plain, ids_of, payload_of, point, refused


@pytest.fixture
def faults(qdrant_private: QdrantProcess) -> Faults:
    return qdrant_private.script


@pytest.fixture
def plain(qdrant_private: QdrantProcess) -> str:
    return create_plain(qdrant_private)


@pytest.fixture
def subject(qdrant_private: QdrantProcess, plain: str) -> QdrantClient:
    """A client that meets the faults; the collection exists by then."""
    return qdrant_private.new_client()


@pytest.fixture
def observer(qdrant_private: QdrantProcess, plain: str) -> QdrantClient:
    return qdrant_private.client()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def _until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)


# Single faults


@pytest.mark.parametrize(
    "code", ["UNAVAILABLE", "INTERNAL", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT", "ABORTED"]
)
def test_reject_does_not_apply_and_is_used_up(
    faults: Faults, subject: QdrantClient, observer: QdrantClient, plain: str, code: str
) -> None:
    faults.reject("Upsert", code, "scripted text")
    assert refused(lambda: subject.upsert(plain, [point(1)])) == (
        grpc.StatusCode[code],
        "scripted text",
    )
    assert ids_of(observer, plain) == []
    subject.upsert(plain, [point(2)])
    assert ids_of(observer, plain) == [2]


def test_reject_with_retry_after_in_the_trailers(
    faults: Faults, subject: QdrantClient, plain: str
) -> None:
    faults.reject("Upsert", "RESOURCE_EXHAUSTED", retry_after=7)
    with pytest.raises(ResourceExhaustedResponse) as caught:
        subject.upsert(plain, [point(1)])
    assert caught.value.retry_after_s == 7


@pytest.mark.parametrize("wait", [True, False])
def test_fail_after_apply_has_applied(
    faults: Faults, subject: QdrantClient, observer: QdrantClient, plain: str, wait: bool
) -> None:
    faults.fail_after_apply("Upsert")
    code, _ = refused(lambda: subject.upsert(plain, [point(1)], wait=wait))
    assert code is grpc.StatusCode.UNAVAILABLE
    _until(lambda: ids_of(observer, plain) == [1])


@pytest.mark.parametrize("applied", [True, False])
def test_never_answered_runs_into_the_deadline(
    faults: Faults, subject: QdrantClient, observer: QdrantClient, plain: str, applied: bool
) -> None:
    faults.never_answer("Upsert", applied=applied)
    message = q.PointStruct(id=q.PointId(num=1), vectors=q.Vectors(vector=q.Vector(data=[1.0] * 4)))
    request = q.UpsertPoints(collection_name=plain, wait=True, points=[message])
    code, _ = refused(lambda: subject.grpc_points.Upsert(request, timeout=0.5))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ids_of(observer, plain) == ([1] if applied else [])


def test_wait_timeout_is_not_an_error_and_is_applied_later(
    faults: Faults, subject: QdrantClient, observer: QdrantClient, plain: str
) -> None:
    faults.wait_timeout("Upsert")
    faults.wait_timeout("UpdateBatch")
    result = subject.upsert(plain, [point(1)])
    assert result.status is models.UpdateStatus.WAIT_TIMEOUT
    operation = models.UpsertOperation(upsert=models.PointsList(points=[point(2)]))
    results = subject.batch_update_points(plain, [operation, operation])
    assert [result.status for result in results] == [models.UpdateStatus.WAIT_TIMEOUT] * 2
    _until(lambda: ids_of(observer, plain) == [1, 2])


def test_timeout_of_a_request_gives_wait_timeout(
    faults: Faults, subject: QdrantClient, observer: QdrantClient, plain: str
) -> None:
    faults.lag(1.5)
    subject.upsert(plain, [point(1)], wait=False)
    result = subject.upsert(plain, [point(2)], wait=True, timeout=1)
    assert result.status is models.UpdateStatus.WAIT_TIMEOUT
    assert ids_of(observer, plain) == []
    _until(lambda: ids_of(observer, plain) == [1, 2])


def test_slow_takes_its_time(
    faults: Faults, subject: QdrantClient, observer: QdrantClient, plain: str
) -> None:
    faults.slow("Upsert", 0.4)
    started = time.monotonic()
    subject.upsert(plain, [point(1)])
    assert time.monotonic() - started >= 0.4
    assert ids_of(observer, plain) == [1]


def test_hold_waits_unapplied_until_released(
    faults: Faults,
    subject: QdrantClient,
    observer: QdrantClient,
    plain: str,
    pool: ThreadPoolExecutor,
) -> None:
    faults.hold("Upsert")
    held = pool.submit(subject.upsert, plain, [point(1)])
    _until(lambda: faults.held() == 1)
    subject.upsert(plain, [point(2)])
    assert not held.done()
    assert ids_of(observer, plain) == [2]
    faults.release()
    assert held.result(timeout=10).status is models.UpdateStatus.COMPLETED
    assert ids_of(observer, plain) == [1, 2]


def test_held_request_is_applied_even_when_its_client_is_gone(
    faults: Faults, subject: QdrantClient, observer: QdrantClient, plain: str
) -> None:
    faults.hold("Delete")
    subject.upsert(plain, [point(1)])
    selector = q.PointsSelector(points=q.PointsIdsList(ids=[q.PointId(num=1)]))
    request = q.DeletePoints(collection_name=plain, wait=True, points=selector)
    code, _ = refused(lambda: subject.grpc_points.Delete(request, timeout=0.3))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ids_of(observer, plain) == [1]
    faults.release()
    _until(lambda: ids_of(observer, plain) == [])


@pytest.mark.parametrize("applied", [True, False])
def test_crash_ends_the_process_and_restart_has_what_was_applied(
    qdrant_private: QdrantProcess,
    faults: Faults,
    subject: QdrantClient,
    plain: str,
    applied: bool,
) -> None:
    subject.upsert(plain, [point(1)])
    faults.crash("Upsert", applied=applied)
    code, _ = refused(lambda: subject.upsert(plain, [point(2)]))
    assert code is grpc.StatusCode.UNAVAILABLE
    qdrant_private.wait_dead()
    qdrant_private.restart()
    assert ids_of(qdrant_private.client(), plain) == ([1, 2] if applied else [1])


def test_down_refuses_everything_but_the_observer(
    faults: Faults, subject: QdrantClient, observer: QdrantClient, plain: str
) -> None:
    faults.down()
    for call in (subject.info, subject.get_collections, lambda: subject.count(plain)):
        assert refused(call)[0] is grpc.StatusCode.UNAVAILABLE
    assert observer.count(plain).count == 0
    faults.down(False)
    assert subject.count(plain).count == 0


def test_faults_are_first_in_first_out_and_the_exact_name_goes_first(
    faults: Faults, subject: QdrantClient, plain: str
) -> None:
    faults.reject("*", "ABORTED")
    faults.reject("write", "DATA_LOSS")
    faults.reject("Upsert", "INTERNAL")
    faults.reject("Upsert", "UNAVAILABLE", times=2)
    assert faults.queued() == 5
    codes = [refused(lambda: subject.upsert(plain, [point(1)]))[0].name for _ in range(5)]
    assert codes == ["INTERNAL", "UNAVAILABLE", "UNAVAILABLE", "DATA_LOSS", "ABORTED"]
    subject.upsert(plain, [point(1)])
    assert faults.queued() == 0


def test_write_faults_spare_reads_and_collections(
    faults: Faults, subject: QdrantClient, plain: str
) -> None:
    faults.reject("write", "INTERNAL")
    faults.reject("Collections.Create", "ABORTED")
    assert subject.count(plain).count == 0
    assert subject.get_collection(plain).points_count == 0
    name = plain + "_2"
    params = models.VectorParams(size=1, distance=models.Distance.DOT)
    code, _ = refused(lambda: subject.create_collection(name, vectors_config=params))
    assert code is grpc.StatusCode.ABORTED
    assert refused(lambda: subject.delete(plain, [1]))[0] is grpc.StatusCode.INTERNAL


def test_misspelt_fault_fails_in_the_test(faults: Faults) -> None:
    with pytest.raises(ValueError, match="explode"):
        faults.add("Upsert", "explode")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="UNAVAILIBLE"):
        faults.reject("Upsert", "UNAVAILIBLE")


# Rate limit and chance


def test_rate_limit_tells_when_to_come_again(
    faults: Faults, subject: QdrantClient, observer: QdrantClient, plain: str
) -> None:
    faults.rate_limit(60)
    subject.upsert(plain, [point(n) for n in range(58)])
    with pytest.raises(ResourceExhaustedResponse) as caught:
        subject.upsert(plain, [point(n) for n in range(100, 104)])
    assert 1 <= caught.value.retry_after_s <= 2
    time.sleep(caught.value.retry_after_s)
    subject.upsert(plain, [point(n) for n in range(100, 104)])
    assert observer.count(plain).count == 62


def test_request_over_the_whole_limit_has_no_retry_after(
    faults: Faults, subject: QdrantClient, plain: str
) -> None:
    faults.rate_limit(10)
    code, text = refused(lambda: subject.upsert(plain, [point(n) for n in range(11)]))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than rate limiter capacity" in text


def test_random_faults_are_repeatable_and_never_lose_a_completed_write(
    faults: Faults, subject: QdrantClient, observer: QdrantClient, plain: str
) -> None:
    def run() -> list[str]:
        outcomes = []
        faults.random(0.5, seed=7)
        for number in range(40):
            try:
                result = subject.upsert(plain, [point(number)])
                outcomes.append(result.status.value)
            except ResourceExhaustedResponse:
                outcomes.append("limited")
            except grpc.RpcError as error:
                outcomes.append(error.code().name)
        faults.random(0, seed=0)
        return outcomes

    first = run()
    assert {"completed", "UNAVAILABLE", "INTERNAL", "limited", "wait_timeout"} <= set(first)
    assert run() == first
    completed = [number for number, outcome in enumerate(first) if outcome == "completed"]
    assert set(completed) <= set(ids_of(observer, plain))


# The log and its violations


def test_log_tells_operations_points_times_and_outcomes(
    faults: Faults, subject: QdrantClient, observer: QdrantClient, plain: str
) -> None:
    faults.clear_log()
    faults.reject("Delete", "INTERNAL")
    subject.upsert(plain, [point(1), point(2)])
    refused(lambda: subject.delete(plain, [1]))
    subject.count(plain)
    observer.count(plain)
    entries = faults.log()
    assert [(e["operation"], e["points"], e["outcome"]) for e in entries] == [
        ("Upsert", 2, "OK"),
        ("Delete", 1, "INTERNAL"),
        ("Count", None, "OK"),
    ]
    assert all(entry["collection"] == plain for entry in entries)
    assert all(entry["start"] <= entry["end"] for entry in entries)


def _overlap(
    faults: Faults,
    pool: ThreadPoolExecutor,
    first: Callable[[], Any],
    second: Callable[[], Any],
) -> list[dict[str, Any]]:
    """Violations after two writes were in flight together."""
    faults.hold("write", times=2)
    calls: list[Future[Any]] = []
    for number, call in enumerate((first, second)):
        calls.append(pool.submit(call))
        _until(lambda count=number + 1: faults.held() == count)  # type: ignore[misc]
    faults.release()
    for submitted in calls:
        submitted.result(timeout=10)
    return faults.violations()


def test_two_writes_of_one_point_in_flight_are_a_violation(
    qdrant_private: QdrantProcess,
    faults: Faults,
    subject: QdrantClient,
    plain: str,
    pool: ThreadPoolExecutor,
) -> None:
    found = _overlap(
        faults,
        pool,
        lambda: subject.upsert(plain, [point(1), point(2)]),
        lambda: subject.delete(plain, [2, 3]),
    )
    assert found == [
        {"collection": plain, "point": 2, "operation": "Delete", "other_operation": "Upsert"}
    ]
    assert qdrant_private.violations() == found
    faults.clear_log()
    assert qdrant_private.violations() == []


def test_violations_are_seen_through_aliases_batches_and_clearing_all(
    faults: Faults, subject: QdrantClient, plain: str, pool: ThreadPoolExecutor
) -> None:
    alias = plain + "_alias"
    create = models.CreateAlias(collection_name=plain, alias_name=alias)
    subject.update_collection_aliases([models.CreateAliasOperation(create_alias=create)])
    operation = models.UpsertOperation(upsert=models.PointsList(points=[point(5)]))
    found = _overlap(
        faults,
        pool,
        lambda: subject.batch_update_points(alias, [operation]),
        lambda: subject.upsert(plain, [point(5)]),
    )
    assert [(entry["collection"], entry["point"]) for entry in found] == [(plain, 5)]
    faults.clear_log()
    found = _overlap(
        faults,
        pool,
        lambda: subject.delete(plain, models.Filter()),
        lambda: subject.upsert(plain, [point(6)]),
    )
    assert [entry["point"] for entry in found] == ["*"]


def test_disjoint_and_consecutive_writes_are_no_violation(
    faults: Faults, subject: QdrantClient, plain: str, pool: ThreadPoolExecutor
) -> None:
    for number in range(50):
        subject.upsert(plain, [point(1, {"n": number})])
    found = _overlap(
        faults,
        pool,
        lambda: subject.upsert(plain, [point(1)]),
        lambda: subject.upsert(plain, [point(2)]),
    )
    assert found == []
    assert max(entry["in_flight"] for entry in faults.log()) == 1


def test_repetition_after_a_deadline_is_no_violation(
    faults: Faults, subject: QdrantClient, plain: str
) -> None:
    faults.never_answer("Delete", applied=False)
    selector = q.PointsSelector(points=q.PointsIdsList(ids=[q.PointId(num=1)]))
    request = q.DeletePoints(collection_name=plain, wait=True, points=selector)
    refused(lambda: subject.grpc_points.Delete(request, timeout=0.3))
    _until(lambda: bool(faults.log()[-1]["end"]))
    subject.grpc_points.Delete(request, timeout=10)
    assert faults.violations() == []


# Writes that are not waited for


def test_unwaited_writes_are_applied_late_in_order_and_waited_ones_are_a_barrier(
    faults: Faults, subject: QdrantClient, observer: QdrantClient, plain: str
) -> None:
    faults.lag(3)
    for number in range(3):
        subject.upsert(plain, [point(1, {"n": number})], wait=False)
    assert ids_of(observer, plain) == []
    faults.lag(0)
    subject.set_payload(plain, {"last": True}, points=[1], wait=True)
    assert payload_of(observer, plain, 1) == {"n": 2, "last": True}


def test_swallowed_errors_are_in_the_server_log(
    qdrant_private: QdrantProcess, subject: QdrantClient, plain: str
) -> None:
    subject.set_payload(plain, {"a": 1}, points=[12345], wait=False)
    _until(lambda: "No point with id 12345 found" in qdrant_private.server_log())


def test_version_can_be_changed(faults: Faults, subject: QdrantClient) -> None:
    faults.version("1.13.6")
    assert subject.info().version == "1.13.6"


def test_clear_lets_go_of_everything(
    faults: Faults,
    subject: QdrantClient,
    observer: QdrantClient,
    plain: str,
    pool: ThreadPoolExecutor,
) -> None:
    faults.hold("Upsert")
    held = pool.submit(subject.upsert, plain, [point(1)])
    _until(lambda: faults.held() == 1)
    faults.reject("*", "INTERNAL", times=10)
    faults.rate_limit(1)
    faults.random(1.0, seed=1)
    faults.down()
    faults.clear()
    held.result(timeout=10)
    for number in range(5):
        subject.upsert(plain, [point(number), point(number + 10)])
    assert observer.count(plain).count == 10
    assert threading.active_count() < 50
