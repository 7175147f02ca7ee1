"""The exact set of ids of a sweep, and the buckets it is divided into."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_sync.rows import PointId
from cdc_sync.sync.orphans import BUCKET_IDS, KnownIds, bucket_of, buckets_for

_UUIDS = st.uuids().map(str) | st.sampled_from(
    # What a comparison that stops at a NUL, or ignores them at the end, would mix up.
    [str(uuid.UUID(int=n << shift)) for n in (0, 1, 255, 256) for shift in (0, 8, 64, 112)]
)
_IDS: st.SearchStrategy[PointId] = st.one_of(
    st.integers(0, 300), st.integers(0, 2**64 - 1), st.sampled_from([2**63, 2**64 - 1]), _UUIDS
)


@given(st.lists(_IDS), st.lists(_IDS), st.integers(1, 5))
def test_it_is_an_exact_set(added: list[PointId], asked: list[PointId], buckets: int) -> None:
    missing: list[PointId] = []
    for bucket in range(buckets):
        known = KnownIds(bucket, buckets)
        for id_ in added:
            known.add(id_)
        found = known.missing_from(asked)
        assert all(bucket_of(id_, buckets) == bucket for id_ in found)
        assert found == known.missing_from(asked)
        missing += found
    expected = [id_ for id_ in asked if id_ not in set(added)]
    assert sorted(map(repr, missing)) == sorted(map(repr, expected))


@given(st.lists(_IDS, min_size=1))
def test_ids_may_be_added_between_questions(ids: list[PointId]) -> None:
    known = KnownIds(0, 1)
    for position, id_ in enumerate(ids):
        absent = {other for other in ids if other not in ids[:position]}
        assert set(known.missing_from(ids)) == absent
        known.add(id_)
    assert known.missing_from(ids) == []
    assert len(known) == len(ids)


def test_a_number_and_a_uuid_of_the_same_bits_are_two_ids() -> None:
    known = KnownIds(0, 1)
    known.add(7)
    assert known.missing_from([7, str(uuid.UUID(int=7))]) == [str(uuid.UUID(int=7))]
    other = KnownIds(0, 1)
    other.add(str(uuid.UUID(int=7)))
    assert other.missing_from([7, str(uuid.UUID(int=7))]) == [7]


def test_buckets_are_even_and_fixed() -> None:
    for ids in (
        [*range(40_000)],
        [str(uuid.uuid5(uuid.NAMESPACE_URL, str(n))) for n in range(40_000)],
    ):
        counts = [0] * 4
        for id_ in ids:
            counts[bucket_of(id_, 4)] += 1
        assert min(counts) > 9_000
    # The same in every process: the parts of a sweep may be done by different ones.
    assert [bucket_of(id_, 97) for id_ in (0, 1, 2**64 - 1, str(uuid.UUID(int=1)))] == [
        93,
        84,
        24,
        25,
    ]


def test_how_many_buckets() -> None:
    assert [buckets_for(n) for n in (0, 1, BUCKET_IDS, BUCKET_IDS + 1)] == [1, 1, 1, 2]


@pytest.mark.parametrize(("bucket", "buckets"), [(-1, 1), (1, 1), (0, 0)])
def test_no_such_bucket(bucket: int, buckets: int) -> None:
    with pytest.raises(ValueError, match="no bucket"):
        KnownIds(bucket, buckets)


def test_memory_an_id() -> None:
    known = KnownIds(0, 1)
    for n in range(100_000):
        known.add(str(uuid.UUID(int=n * 2**60)))
        known.add(n)
    known.missing_from([1])
    held = known._uuids.__sizeof__() + known._numbers.__sizeof__()
    assert held < 30 * 100_000
