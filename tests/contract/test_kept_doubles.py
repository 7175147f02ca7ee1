"""Doubles of payloads that are read and written again, as updates do that do not send them."""

from __future__ import annotations

import math
import random
import struct
from typing import Final

from cdc_sync.mapping.comparison import same_json
from cdc_sync.mapping.stored_doubles import may_be_written_back, read_back
from cdc_sync.qdrant.sink import Applied, TableWriter
from cdc_sync.rows import UNCHANGED
from tests.support.sink_rows import item
from tests.support.sinks import content, partials, upserts

_EXTREMES: Final = (0.0, -0.0, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 1e16, 1e22)


def _doubles(number: int) -> list[float]:
    """Of any bits, and of any magnitude that is met in practice."""
    generator = random.Random(7)
    any_bits = (struct.unpack("<d", generator.randbytes(8))[0] for _ in range(number))
    found = [value for value in any_bits if math.isfinite(value)]
    found += [generator.uniform(-10, 10) * 10.0 ** generator.randint(-40, 40) for _ in found]
    return [*_EXTREMES, *found]


#: Some that go a step further each time that they are written, by any reading of the source.
_WANDERING: Final = [value for value in _doubles(4_000) if not may_be_written_back(value)]


async def test_they_are_read_as_it_is_said(writer: TableWriter) -> None:
    doubles = _doubles(4_000)
    await writer.apply(upserts((1, item(1, "a", {"list": doubles}))))
    (point,) = (await content(writer)).values()
    assert point.payload["doc"] == {"list": [read_back(value) for value in doubles]}


async def test_what_would_wander_is_not_kept(writer: TableWriter) -> None:
    """Rows are read again for it; all others keep what they have."""
    assert len(_WANDERING) > 100
    wandering = next(v for v in _WANDERING if not may_be_written_back(read_back(v)))
    still = [0.1, 1e-3, -2.5e10, 1.5e-9, 3e40]
    nested = {"a": [{"b": [1, None, "x", wandering]}]}
    points = {1: {"list": still}, 2: nested, 3: wandering, 4: {"n": 1}, 5: [True, "1e-20"]}
    await writer.apply(upserts(*((n, item(n, "a", doc)) for n, doc in points.items())))
    before = await content(writer)
    unknown = [(n, item(n, "b", UNCHANGED, UNCHANGED, UNCHANGED)) for n in points]
    assert await writer.apply(partials(*unknown)) == Applied(frozenset({2, 3}))
    after = await content(writer)
    for n in (1, 4, 5):
        assert after[n].payload == {**before[n].payload, "title": "b"}
    # What the update sends is not kept, and so needs no such care.
    known = [(n, item(n, "c", doc, UNCHANGED, UNCHANGED)) for n, doc in points.items()]
    assert await writer.apply(partials(*known)) == Applied()


def test_what_wandered_in_qdrant_is_no_difference() -> None:
    """It moves points between its segments, and writes them anew then."""
    for value in [*_WANDERING[:300], 0.1, -1e-9]:
        stored = value
        for _ in range(50):
            stored = read_back(stored)
        assert same_json([value], [stored])
    for value in (0.1, 123.456, -1e-3, 1e300, *_WANDERING[:50]):
        for steps in (10, 1_000):
            other = value + steps * math.ulp(value) * (1 if value > read_back(value) else -1)
            assert not same_json(value, other)
    assert not same_json(1e-20, -1e-20)
    assert not same_json(1e-20, 0.0)
