"""The contract of a writer for the object that several columns make: it is written from whole rows
only."""

from __future__ import annotations

import dataclasses

import pytest

from cdc_sync.mapping.plan import ColumnPlan, Part
from cdc_sync.qdrant.sink import Applied, Sink, TableWriter
from cdc_sync.rows import UNCHANGED, RawValue, Row
from tests.support.sink_rows import INT8, JSONB, TEXT, column, dense, int8, jsonb, plan_of, vector
from tests.support.sinks import content, partials, ready, upserts

COLUMNS = (
    column("id", INT8),
    column("title", TEXT),
    ColumnPlan("meta", JSONB, part=Part.MEMBERS),
    ColumnPlan("owner", TEXT, part=Part.HIDDEN),
    dense("v", 2),
)


V = vector(1, 2)


def row(title: RawValue, meta: RawValue, v: RawValue = V, owner: RawValue = b"o") -> Row:
    return [int8(1), title, meta, owner, v]


@pytest.fixture(params=[None, "object"])
async def writer(request: pytest.FixtureRequest, sink: Sink, collection: str) -> TableWriter:
    plan = dataclasses.replace(plan_of(collection, COLUMNS), object_field=request.param)
    return await ready(sink, plan)


def expected(writer: TableWriter, title: str, members: dict[str, object]) -> dict[str, object]:
    field = writer.plan.object_field
    return {"id": 1, "title": title, **(members if field is None else {field: members})}


async def test_members_are_written_and_go_with_an_update(writer: TableWriter) -> None:
    members = {"a": [1, {"b": None}], "n": 2**60, "": "e", "x.y[]": 1, "ü\n": {}}
    assert await writer.apply(upserts((1, row(b"t", jsonb(members))))) == Applied()
    stored = (await content(writer))[1]
    assert stored.payload == expected(writer, "t", members)
    # Only the vector is not in the message: the payload is known, and replaced.
    update = row(b"u", jsonb({"n": 1}), UNCHANGED)
    assert await writer.apply(partials((1, update))) == Applied()
    stored = (await content(writer))[1]
    assert stored.payload == expected(writer, "u", {"n": 1})
    assert stored.vectors == {"v": [1.0, 2.0]}


async def test_an_update_without_the_object_asks_for_the_row(writer: TableWriter) -> None:
    await writer.apply(upserts((1, row(b"t", jsonb({"a": 1})))))
    before = await content(writer)
    for update in (row(b"u", UNCHANGED), row(b"u", UNCHANGED, UNCHANGED)):
        assert await writer.apply(partials((1, update))) == Applied(frozenset({1}))
    assert await content(writer) == before
    # What is not written need not be known.
    update = row(UNCHANGED, jsonb({"a": 2}), UNCHANGED, UNCHANGED)
    assert await writer.apply(partials((1, update))) == Applied()
    assert (await content(writer))[1].payload == expected(writer, "t", {"a": 2})
