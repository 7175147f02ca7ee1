"""A table with every kind of value, a writer that never rests, and damages done to its points
behind the pipeline's back: each by name, with what a verification has to call it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import psycopg
from qdrant_client import QdrantClient
from qdrant_client import models as q

from tests.support.fix_postgres import Database

#: Rows that nobody writes any more, a partition.
STILL_ROWS: Final = 60
REGIONS: Final = ("east", "north", "west")
#: Rows that are written all the time, a partition.
_BUSY_ROWS: Final = 40
_FIRST_BUSY: Final = 1_000

TABLE: Final = """
CREATE TABLE docs (
    region text, id bigint, title text, note text, n int, price float8, flag bool, tags text[],
    meta jsonb, at timestamptz, emb vector(8), PRIMARY KEY (region, id)
) PARTITION BY LIST (region);
CREATE TABLE docs_east PARTITION OF docs FOR VALUES IN ('east');
CREATE TABLE docs_north PARTITION OF docs FOR VALUES IN ('north');
CREATE TABLE docs_west PARTITION OF docs FOR VALUES IN ('west');
"""
_ROW: Final = """
INSERT INTO docs
SELECT region, i, 'Café crème number ' || i, CASE WHEN i %% 3 = 0 THEN NULL ELSE 'note ' || i END,
       i, i + 0.5, i %% 2 = 0, ARRAY['tag' || i, 'other'], jsonb_build_object('a', i, 'b', 'x'),
       timestamptz '2026-01-15 12:30:00+00' + i * interval '1 minute',
       ARRAY(SELECT round((random() * 2 - 1)::numeric, 6)::float4
               FROM generate_series(1, 8 + 0 * i))::vector
  FROM unnest(%s::text[]) region, generate_series(%s::int, %s::int) i
    ON CONFLICT DO NOTHING
"""


def create_docs(database: Database) -> None:
    database.execute(TABLE)
    regions = list(REGIONS)
    database.execute(_ROW, (regions, 1, STILL_ROWS))
    database.execute(_ROW, (regions, _FIRST_BUSY, _FIRST_BUSY + _BUSY_ROWS - 1))


@contextmanager
def constant_writes(database: Database, seed: int) -> Iterator[Callable[[], int]]:
    """Write rows from a thread until the end: updates, deletes and inserts of the same few keys.
    Yields what counts the transactions so far."""
    stopping, count = threading.Event(), 0
    failure: list[psycopg.Error] = []

    def write() -> None:
        nonlocal count
        generator = random.Random(seed)
        try:
            with database.connect() as connection:
                while not stopping.is_set():
                    key = (
                        generator.choice(REGIONS),
                        _FIRST_BUSY + generator.randrange(_BUSY_ROWS),
                    )
                    kind = generator.randrange(10)
                    if kind < 6:
                        connection.execute(
                            "UPDATE docs SET n = n + 1, flag = NOT flag"
                            " WHERE region = %s AND id = %s",
                            key,
                        )
                    elif kind < 8:
                        connection.execute("DELETE FROM docs WHERE region = %s AND id = %s", key)
                    else:
                        connection.execute(_ROW, ([key[0]], key[1], key[1]))
                    count += 1
                    stopping.wait(0.002)
        except psycopg.Error as error:
            failure.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield lambda: count
    finally:
        stopping.set()
        thread.join()
    if failure:
        raise failure[0]


@dataclass
class Damaged:
    """A collection whose points are damaged. ``done``: ids by what was done to them."""

    client: QdrantClient
    collection: str
    ids: Mapping[tuple[str, int], str]
    done: dict[str, set[str]] = field(default_factory=dict)

    def apply(self) -> None:
        """Do all of it, one row each."""
        for number, (name, change) in enumerate(_CHANGES.items(), 1):
            id_ = self._note(name, "west", number)
            change(self, id_)
        rows = len(_CHANGES)
        self._delete(self._note("deleted", "west", rows + 1))
        self._add()
        self._shift(self._note("component", "west", rows + 2))
        self._swap(self._note("swapped", "west", rows + 3), self._note("swapped", "west", rows + 4))
        self._delete(*(self._note("partition", "north", i) for i in range(1, STILL_ROWS + 1)))
        self._delete(
            *(id_ for (region, i), id_ in self.ids.items() if region == "north" and i >= 1_000)
        )

    def _note(self, name: str, region: str, id_: int) -> str:
        point = self.ids[region, id_]
        self.done.setdefault(name, set()).add(point)
        return point

    def _record(self, id_: str) -> q.Record:
        (record,) = self.client.retrieve(self.collection, [id_], with_vectors=True)
        return record

    def put(self, id_: str, payload: dict[str, Any], vectors: Any) -> None:
        point = q.PointStruct(id=id_, payload=payload, vector=vectors)
        self.client.upsert(self.collection, [point], wait=True)

    def payload(self, id_: str, change: Callable[[dict[str, Any]], object]) -> None:
        record = self._record(id_)
        payload = dict(record.payload or {})
        change(payload)
        self.put(id_, payload, record.vector)

    def _delete(self, *ids: str) -> None:
        self.client.delete(self.collection, list(ids), wait=True)

    def _add(self) -> None:
        added = {
            "00000000-0000-4000-8000-00000000000a": {"region": "nowhere", "id": 5},
            "00000000-0000-4000-8000-00000000000b": {},
        }
        for id_, payload in added.items():
            self.done.setdefault("added", set()).add(id_)
            self.put(id_, payload, {"emb": [1.0] * 8})

    def _shift(self, id_: str) -> None:
        record = self._record(id_)
        assert isinstance(record.vector, dict)
        vector = [float(component) for component in record.vector["emb"]]  # type: ignore[arg-type]
        vector[3] += 1e-3
        self.put(id_, dict(record.payload or {}), {"emb": vector})

    def _swap(self, one: str, other: str) -> None:
        first, second = self._record(one), self._record(other)
        self.put(one, dict(first.payload or {}), second.vector)
        self.put(other, dict(second.payload or {}), first.vector)


def _set(name: str, change: Callable[[Any], object]) -> Callable[[Damaged, str], None]:
    def damage(damaged: Damaged, id_: str) -> None:
        damaged.payload(id_, lambda p: p.__setitem__(name, change(p[name])))

    return damage


def _drop(name: str) -> Callable[[Damaged, str], None]:
    return lambda damaged, id_: damaged.payload(id_, lambda p: p.pop(name))


def _flatten(damaged: Damaged, id_: str) -> None:
    def change(payload: dict[str, Any]) -> None:
        for name, value in payload.pop("meta").items():
            payload[f"meta.{name}"] = value

    damaged.payload(id_, change)


_CHANGES: Final[Mapping[str, Callable[[Damaged, str], None]]] = {
    "key dropped": _drop("title"),
    "integer to float": _set("n", float),
    "null to absent": _drop("note"),  # the third row, whose note is NULL
    "truncated": _set("title", lambda text: text[:6]),
    "mojibake": _set("title", lambda text: text.encode().decode("latin-1")),
    "zone": _set("at", lambda text: text.replace("T12:", "T14:").replace("T13:", "T15:")),
    "bool to string": _set("flag", str),
    "array to single": _set("tags", lambda tags: tags[0]),
    "flattened": _flatten,
    "value": _set("n", lambda n: n + 1),
    "unexpected": lambda damaged, id_: damaged.payload(id_, lambda p: p.update(more=1)),
}

#: What each damage has to be called: the kind, the field, and a part of the cause.
NAMES: Final[Mapping[str, tuple[str, str, str]]] = {
    "key dropped": ("field_missing", "title", ""),
    "integer to float": ("field_type", "n", "an integer was stored as a float"),
    "null to absent": ("null_absent", "note", "NULLs were lost"),
    "truncated": ("value", "title", "truncated"),
    "mojibake": ("value", "title", "mojibake"),
    "zone": ("value", "at", "off by +02:00: a time zone"),
    "bool to string": ("field_type", "flag", "a bool was stored as text"),
    "array to single": ("field_type", "tags", "an array was stored as a single value"),
    "flattened": ("field_type", "meta", "nested to flattened"),
    "value": ("value", "n", ""),
    "unexpected": ("field_unexpected", "more", ""),
    "deleted": ("missing", "", ""),
    "added": ("extra", "", ""),
    "component": ("vector", "emb", ""),
    "swapped": ("vectors_swapped", "emb", "paired wrongly"),
    "partition": ("partition_missing", "public.docs_north", ""),
}


def point_ids(client: QdrantClient, collection: str) -> dict[tuple[str, int], str]:
    """Ids of the points by region and id."""
    records, _ = client.scroll(collection, limit=10_000, with_payload=["region", "id"])
    return {
        (record.payload["region"], record.payload["id"]): str(record.id)
        for record in records
        if record.payload
    }
