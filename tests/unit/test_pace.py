"""The pace at which points are sent: it follows the answers, and does not swing."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cdc_sync.config import QdrantSettings
from cdc_sync.qdrant import answers
from cdc_sync.qdrant.pace import Cause, Pace

SETTINGS = QdrantSettings(parallel_requests=4, request_points=256, request_bytes=4 << 20)
FULL = 1024


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Changes:
    """What was said to have changed."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Cause | None, bool]] = []

    def __call__(self, pace: Pace, slower: bool) -> None:
        self.seen.append((pace.window, pace.cause, slower))


def shrink(pace: Pace, cause: Cause = "deadline") -> None:
    """As much as may be is in flight, and comes to grief."""
    points = pace.window
    pace.shrink(cause, pace.sent(points))
    pace.ended(points)


def slow(pace: Pace, part: float) -> None:
    """A full window is completed after this part of the deadline."""
    points = pace.window
    pace.sent(points)
    pace.completed(SETTINGS.timeout_seconds * part)
    pace.ended(points)


def limits(pace: Pace) -> tuple[int, int, int]:
    return pace.requests, pace.points, pace.bytes


def test_it_begins_with_what_is_configured_and_says_nothing_while_all_goes_well() -> None:
    changes = Changes()
    pace = Pace(SETTINGS, changes)
    assert limits(pace) == (4, 256, 4 << 20)
    for _ in range(1000):
        pace.completed(0.1)
    assert limits(pace) == (4, 256, 4 << 20)
    assert changes.seen == []


def test_first_fewer_requests_then_smaller_ones_down_to_one_point() -> None:
    pace = Pace(SETTINGS)
    seen = []
    for _ in range(12):
        shrink(pace)
        seen.append((pace.requests, pace.points))
    assert seen[:4] == [(2, 256), (1, 256), (1, 128), (1, 64)]
    assert seen[9:] == [(1, 1)] * 3
    assert pace.bytes == (4 << 20) // 256
    assert pace.cause == "deadline"


def test_one_trouble_counts_once_however_many_requests_meet_it() -> None:
    pace = Pace(SETTINGS)
    epochs = [pace.sent(256) for _ in range(4)]
    for epoch in epochs:
        pace.shrink("rate_limit", epoch)
        pace.ended(256)
    assert pace.window == FULL // 2


def test_what_is_not_made_use_of_does_not_grow() -> None:
    pace = Pace(SETTINGS)
    for _ in range(3):
        shrink(pace)
    for _ in range(1000):
        pace.sent(10)
        pace.completed(0.01)
        pace.ended(10)
    assert pace.window == FULL // 8


def test_patience_with_a_single_point_that_comes_too_early_again_and_again() -> None:
    pace = Pace(SETTINGS)
    assert pace.patience == 1
    shrink(pace, "rate_limit")
    assert pace.patience == 1
    seen = []
    for _ in range(5):
        pace.shrink("rate_limit", pace.sent(1))
        pace.ended(1)
        seen.append(pace.patience)
    assert seen == [2, 4, 8, 8, 8]
    slow(pace, 0.0)
    assert pace.patience == 1


def test_it_is_what_was_in_flight_that_was_too_much() -> None:
    pace = Pace(SETTINGS)
    pace.shrink("rate_limit", pace.sent(50))
    assert limits(pace) == (1, 25, (4 << 20) * 25 // 256)


def test_it_grows_back_slowly_and_then_says_that_all_is_well() -> None:
    changes = Changes()
    pace = Pace(SETTINGS, changes)
    for _ in range(20):
        shrink(pace)
    changes.seen.clear()
    needed = 0
    while pace.cause is not None:
        before = pace.window
        slow(pace, 0.0)
        assert 0 <= pace.window - before <= FULL // 64
        needed += 1
    assert 100 < needed < 1000
    assert limits(pace) == (4, 256, 4 << 20)
    assert changes.seen[-1] == (FULL, None, False)
    assert not any(slower for _, _, slower in changes.seen)


def test_an_answer_that_nearly_came_too_late_is_a_warning() -> None:
    pace = Pace(SETTINGS)
    slow(pace, 0.6)
    assert pace.window == FULL // 2
    assert pace.cause == "slow"
    # In time, but no reason to send more.
    slow(pace, 0.4)
    assert pace.window == FULL // 2


@settings(max_examples=40, deadline=None)
@given(st.integers(1, FULL), st.sampled_from([1, 3, 50, 200]))
@example(434, 200)
@example(4, 3)
def test_it_settles_below_what_the_server_takes(capacity: int, points: int) -> None:
    """A server that takes so many points at once: after a while the window stays near it, few
    requests fail, and none would fail twice in a row for long."""
    pace = Pace(QdrantSettings(parallel_requests=4, request_points=points))
    full = 4 * points
    failures = 0
    for step in range(3000):
        if pace.window > capacity:
            shrink(pace)
            failures += step > 1500
        else:
            slow(pace, 0.0)
        if step > 1500:
            # All requests are of one size, so it goes by steps of as many points as requests.
            assert pace.window <= capacity + full // 256 + capacity // 8 + 4
            assert pace.window > min(capacity // 2, full) - 4
    assert failures <= 1500 / 6


@given(st.lists(st.sampled_from(["shrink", "grow", "points", "bytes", "slow", "time"])))
def test_it_never_leaves_its_bounds(steps: list[str]) -> None:
    clock = Clock()
    pace = Pace(SETTINGS, clock=clock)
    for step in steps:
        if step == "shrink":
            shrink(pace)
        elif step == "grow":
            slow(pace, 0.0)
        elif step == "points":
            pace.limit_points(100)
        elif step == "bytes":
            pace.limit_bytes(100_000)
        elif step == "slow":
            slow(pace, 0.9)
        else:
            clock.now += 400.0
        assert 1 <= pace.requests <= 4
        assert 1 <= pace.points <= 256
        assert 1 <= pace.bytes <= 4 << 20
        assert 1 <= pace.window <= FULL
        assert (pace.cause is None) == (limits(pace) == (4, 256, 4 << 20))


def test_a_limit_that_was_named_is_kept_to_and_tried_again_later() -> None:
    clock = Clock()
    pace = Pace(SETTINGS, clock=clock)
    pace.limit_points(100)
    pace.limit_points(120)
    pace.limit_bytes(1 << 20)
    assert pace.points == 100
    assert (1 << 19) < pace.bytes < (1 << 20)
    assert pace.requests == 4
    for _ in range(2000):
        slow(pace, 0.0)
    assert pace.points == 100
    assert pace.cause == "message_size"
    clock.now += 601
    pace.completed(0.01)  # Not even a full one.
    assert limits(pace) == (4, 256, 4 << 20)
    assert pace.cause is None


# -- texts


@pytest.mark.parametrize(
    "text",
    [
        "Bad request: Max points count limit of 5 reached!",
        "Bad request: Max vector storage size limit of 0.5MB reached!",
        "Bad request: Max payload storage size limit of 10MB reached!",
        "Bad request: Resident memory usage is at 91% of total memory, exceeding the limit of 90%",
        "Insufficient storage: Disk usage is at 96% of total capacity. It reached the limit of 95%",
        "Service internal error: No space left on device: WAL buffer size exceeds available space",
        'Bad request: Limit exceeded 1 > 0 for "upsert limit". Help: Reduce',
        "1 out of 2 shards failed to apply operation. First error: Max points count limit of 5",
    ],
)
def test_nothing_fits_in_any_more(text: str) -> None:
    assert answers.is_full(text)
    assert not answers.is_oversized(text)
    assert not answers.is_over_capacity(text)


@pytest.mark.parametrize(
    "text",
    [
        "Wrong input: Vector dimension error: expected dim: 3, got 2",
        'Bad request: Limit exceeded 256 > 100 for "upsert limit". Help: Reduce',
        "Bad request: Sparse vector 's' has a limit of 4 indices, but 5 were provided!",
        "Rate limiting exceeded: Write rate limit exceeded: Operation requires 5 tokens",
    ],
)
def test_what_is_not_full(text: str) -> None:
    assert not answers.is_full(text)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("SERVER: Received message larger than max (5242991 vs. 4194304)", 4194304),
        ("CLIENT: Received message larger than max (5242991 vs. 16777216)", 16777216),
        ("CLIENT: Sent message larger than max (5242991 vs. 4194304)", 4194304),
        ("grpc: received message larger than max (5242991 vs. 4194304)", 4194304),
        ("grpc: trying to send message larger than max (5242991 vs. 4194304)", 4194304),
        ("grpc: received message after decompression larger than max 4194304", None),
        ("Error, decoded message length too large: found 5 bytes, the limit is: 4 bytes", 4),
        ("gRPC message exceeds maximum size 4194304: 5242991", 4194304),
        ("Received message exceeds the maximum configured message size.", None),
        ("Received http2 header with status: 413", None),
        ("Payload Too Large", None),
    ],
)
def test_a_message_that_is_too_large(text: str, limit: int | None) -> None:
    assert answers.is_oversized(text)
    assert answers.message_limit(text) == limit


def test_strict_mode_names_its_limits() -> None:
    batch = 'Bad request: Limit exceeded 256 > 100 for "upsert limit". Help: Reduce the "upsert li'
    assert answers.batch_limit(batch) == 100
    assert answers.batch_limit(batch.replace("upsert", "update")) == 100
    assert answers.page_limit(batch) is None
    page = batch.replace("upsert limit", "limit")
    assert answers.page_limit(page) == 100
    assert answers.batch_limit(page) is None
    assert answers.exact_forbidden("Bad request: Exact search disabled!. Help: Set exact=false.")
