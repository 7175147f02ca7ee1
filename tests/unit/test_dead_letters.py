"""Dead letters: their records, the office that keeps them, and when they are tried again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from cdc_sync.errors import CdcSyncError, ErrorKind, SinkError, StateError
from cdc_sync.mapping.key_values import compile_key_values, key_values_of_id
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import ColumnPlan, IdScheme, TablePlan
from cdc_sync.mapping.table import PgType, Table, TypeKind
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.status import StatusBoard
from cdc_sync.qdrant.records import VERSION, dead_letter, dead_letter_record
from cdc_sync.qdrant.sink import Applied, DeadLetter
from cdc_sync.rows import UNCHANGED, RawValue, TextValue
from cdc_sync.sync.dead_letter_retries import (
    BATCH_KEYS,
    LOOK_SECONDS,
    SCAN_SECONDS,
    LetterRetries,
    readable_key,
)
from cdc_sync.sync.dead_letters import DeadLetterOffice, Refusal, refusals
from cdc_sync.sync.routing import PlannedTable

NOW = "2026-01-01T00:00:00+00:00"


def letter(key: str, *values: str, table: str = "public.t") -> DeadLetter:
    return DeadLetter(
        "p",
        table,
        key,
        "0/1",
        NOW,
        "why",
        kind="mapping",
        attempts=3,
        first_seen=NOW,
        last_seen=NOW,
        key_values=values or None,
    )


# -- records


@pytest.mark.parametrize("values", [(), ("7",), ("a", ""), ('"[', "\u00e9\n")])
def test_a_record_reads_as_it_was_written(values: tuple[str, ...]) -> None:
    one = letter("7", *values)
    assert dead_letter(dead_letter_record(one), "here") == one


def test_a_record_of_0_1_is_read() -> None:
    record: dict[str, object] = {
        "version": 1,
        "kind": "dead_letter",
        "pipeline": "p",
        "table": "public.t",
        "key": "7",
        "lsn": "0/1",
        "commit_time": NOW,
        "reason": "why",
    }
    assert dead_letter(record, "here") == DeadLetter("p", "public.t", "7", "0/1", NOW, "why")
    # Another program of this version reads what is written now.
    written = dead_letter_record(letter("7", "7"))
    assert record.items() <= written.items()
    assert written["version"] == VERSION == 1


@pytest.mark.parametrize(
    "broken",
    [
        {"attempts": "many"},
        {"attempts": None},
        {"key_values": "7"},
        {"key_values": [7]},
        {"error": None},
        {"last_seen": 1},
        {"reason": None},
        {"version": 2},
    ],
)
def test_a_damaged_record_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(StateError, match="here"):
        dead_letter(dead_letter_record(letter("7", "7")) | broken, "here")


# -- keys


def pg_type(name: str, schema: str = "pg_catalog", kind: TypeKind = TypeKind.BASE) -> PgType:
    return PgType(1, schema, name, kind)


def plan_of(*types: PgType, scheme: IdScheme = IdScheme.HASHED) -> TablePlan:
    columns = tuple(ColumnPlan(f"k{i}", type_, field=f"k{i}") for i, type_ in enumerate(types))
    return TablePlan(
        oid=1,
        schema="public",
        table="t",
        collection="c",
        columns=columns,
        key=tuple(range(len(types))),
        id_scheme=scheme,
    )


def test_key_values_are_texts_that_postgres_reads() -> None:
    plan = plan_of(pg_type("text"), pg_type("bytea"), pg_type("int4"), pg_type("bool"))
    values = compile_key_values(plan)
    row: list[RawValue] = [b'a"b', b"\x00\xff", b"\xff\xff\xff\xfb", TextValue(b"t")]
    assert values(row) == ('a"b', r"\x00ff", "-5", "true")
    for missing in (None, UNCHANGED, b"\xff"):
        assert values([missing, *row[1:]]) is None


def test_keys_that_cannot_be_read_back() -> None:
    # lc_monetary decides what the text means.
    assert compile_key_values(plan_of(pg_type("money")))([b"\0" * 8]) is None
    # An enumeration may have any name.
    own = plan_of(pg_type("bytea", "public", TypeKind.ENUM))
    assert compile_key_values(own)([b"label"]) == ("label",)
    assert compile_key_values(plan_of(pg_type("jsonb")))([b"\x01{}"]) is None


def test_ids_that_say_their_key() -> None:
    whole = plan_of(pg_type("int8"), scheme=IdScheme.INTEGER)
    uuids = plan_of(pg_type("uuid"), scheme=IdScheme.UUID)
    hashed = plan_of(pg_type("text"))
    id_ = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
    assert key_values_of_id(whole, "42") == ("42",)
    assert key_values_of_id(whole, id_) is None  # of a negative number
    assert key_values_of_id(uuids, id_) == (id_,)
    assert key_values_of_id(hashed, id_) is None
    assert readable_key(letter("42"), whole) == ("42",)
    assert readable_key(letter(id_, "x"), hashed) == ("x",)
    # The key has another number of columns than when the row was parked.
    assert readable_key(letter(id_, "x", "y"), hashed) is None
    assert readable_key(letter("(key cannot be mapped)"), whole) is None


def test_refusals_tell_who_refused_and_what_row() -> None:
    plan = plan_of(pg_type("text"))
    applied = Applied(refused=((1, "a"), (2, "b"), (3, "c")), unmappable=frozenset({1}))
    found = refusals(plan, applied, [(1, [b"x"]), (2, [b"y"]), (9, [b"z"])])
    assert found == [
        Refusal("1", "a", ErrorKind.MAPPING, ("x",)),
        Refusal("2", "b", ErrorKind.SINK_REFUSED, ("y",)),
        Refusal("3", "c", ErrorKind.SINK_REFUSED, None),
    ]


# -- the office


class Store:
    """The dead letters of a state store; ``away`` makes reading them fail."""

    def __init__(self) -> None:
        self.letters: dict[tuple[str, str], DeadLetter] = {}
        self.away = False

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        self.letters |= {(one.table, one.key): one for one in letters}

    async def dead_letters(self, pipeline: str) -> list[DeadLetter]:
        if self.away:
            raise SinkError(ErrorKind.SINK_UNAVAILABLE, "away")
        return list(self.letters.values())

    async def release(self, pipeline: str, letters: Sequence[tuple[str, str]]) -> None:
        for key in letters:
            self.letters.pop(key, None)


def office_of(store: Store, limit: int = 1000) -> tuple[DeadLetterOffice, Metrics]:
    metrics = Metrics()
    board = StatusBoard("p", slot="s", publication="p", metrics=metrics)
    return DeadLetterOffice(store, "p", limit, metrics, board), metrics  # type: ignore[arg-type]


def bad(*keys: str, reason: str = "why") -> list[Refusal]:
    return [Refusal(key, reason, ErrorKind.MAPPING, (key,)) for key in keys]


async def test_attempts_are_counted_until_the_row_is_written() -> None:
    store = Store()
    office, metrics = office_of(store)
    for reason in ("first", "second"):
        await office.park("public.t", bad("1", reason=reason), lsn=16, commit_time=0)
    one = store.letters["public.t", "1"]
    assert (one.attempts, one.reason, one.lsn, one.kind) == (2, "second", "0/10", "mapping")
    assert one.first_seen <= one.last_seen
    # A retry is another attempt, and no other row.
    await office.park("public.t", bad("1", "2"), lsn=16, commit_time=0, retried=True)
    assert store.letters["public.t", "1"].attempts == 3
    total = {"table": "public.t", "kind": "mapping"}
    assert metrics.registry.get_sample_value("cdc_sync_dead_letters_total", total) == 3
    await office.release("public.t", [1, 3])
    await office.park("public.t", bad("1"), lsn=16, commit_time=0)
    assert store.letters["public.t", "1"].attempts == 1


async def test_letters_of_0_1_are_counted_on() -> None:
    store = Store()
    await store.park([DeadLetter("p", "public.t", "1", "0/1", NOW, "why")])
    office, _ = office_of(store)
    await office.open()
    assert office.holds("public.t", 1)
    await office.park("public.t", bad("1"), lsn=1, commit_time=0)
    one = store.letters["public.t", "1"]
    assert one.attempts == 2
    assert one.first_seen


async def test_the_limit_counts_what_is_on_record() -> None:
    store = Store()
    office, _ = office_of(store, limit=2)
    await office.park("public.t", bad("1", "2"), lsn=1, commit_time=0)
    await office.check_limit()
    await office.park("public.t", bad("3"), lsn=1, commit_time=0)
    assert office.over_limit
    with pytest.raises(CdcSyncError, match="3 rows could not be written, the limit is 2") as error:
        await office.check_limit()
    assert error.value.kind is ErrorKind.DEAD_LETTER_LIMIT
    # Another process has dropped one.
    del store.letters["public.t", "1"]
    await office.check_limit()
    assert office.pending == 2


# -- when they are tried again


class Collections:
    """Says what configuration collections have."""

    def __init__(self) -> None:
        self.found = "a"

    async def configuration(self, plan: TablePlan) -> str:
        return self.found


class Bench:
    """Retries of one table, under a clock of their own."""

    def __init__(self, interval: float = 0.0) -> None:
        self.now = 1000.0
        self.store = Store()
        self.office, _ = office_of(self.store)
        self.sink = Collections()
        plan = plan_of(pg_type("int8"), scheme=IdScheme.INTEGER)
        table = Table(1, "public", "t", False, (), ("k0",), "d", ("k0",), (), ())
        self.planned = PlannedTable(table, plan, PlanOptions())
        self.stale: set[int] = set()
        self.retries = LetterRetries(
            self.office,
            self.sink,  # type: ignore[arg-type]
            lambda: [self.planned],
            lambda: self.stale,
            interval,
            lambda: self.now,
        )

    async def keys(self, seconds: float = SCAN_SECONDS) -> list[str]:
        """The keys that are to be read ``seconds`` later; they are read."""
        self.now += seconds
        found = []
        while (batch := await self.retries.next(16)) is not None:
            assert batch.end_lsn is None
            assert batch.last_lsn == 16
            (request,) = batch.rereads
            assert request.retry
            assert len(request.keys) <= BATCH_KEYS
            found += [key for (key,) in request.keys]
            self.retries.tried(request)
        return found


async def test_those_of_an_earlier_life_are_tried_at_once_and_once() -> None:
    bench = Bench()
    await bench.store.park([letter(str(i), str(i)) for i in range(250)])
    await bench.office.open()
    await bench.office.park("public.t", bad("999"), lsn=1, commit_time=0)
    assert sorted(await bench.keys(), key=int) == [str(i) for i in range(250)]
    assert await bench.keys(10 * 3600) == []


async def test_they_are_tried_after_the_interval() -> None:
    bench = Bench(interval=60)
    await bench.office.park("public.t", bad("1"), lsn=1, commit_time=0)
    assert await bench.keys() == []
    assert await bench.keys(30) == []
    assert await bench.keys(31) == ["1"]
    assert await bench.keys(30) == []
    assert await bench.keys(31) == ["1"]


async def test_what_was_not_tried_after_all_is_asked_for_again() -> None:
    bench = Bench(interval=3600)
    await bench.store.park([letter("1", "1")])
    await bench.office.open()
    bench.now += 1
    assert await bench.retries.next(1) is not None  # and the stream ends
    assert await bench.keys(200) == []
    assert await bench.keys(101) == ["1"]
    assert await bench.keys(3000) == []


async def test_other_columns_or_another_configuration_make_them_due() -> None:
    bench = Bench()
    await bench.office.park("public.t", bad("1"), lsn=1, commit_time=0)
    assert await bench.keys() == []
    plan = dataclasses.replace(bench.planned.plan, drop_nulls=True)
    bench.planned = dataclasses.replace(bench.planned, plan=plan)
    assert await bench.keys() == ["1"]
    assert await bench.keys() == []
    bench.sink.found = "b"
    assert await bench.keys() == []
    assert await bench.keys(LOOK_SECONDS) == ["1"]
    assert await bench.keys(LOOK_SECONDS) == []


async def test_a_table_that_is_read_as_a_whole_is_left_alone() -> None:
    bench = Bench()
    await bench.store.park([letter("1", "1")])
    await bench.office.open()
    bench.stale = {1}
    assert await bench.keys() == []
    # But for a last look before the pipeline stops.
    assert [request.keys for request in bench.retries.requests()] == [(("1",),)]
    bench.stale = set()
    assert await bench.keys() == ["1"]


async def test_letters_without_a_key_or_a_table_are_left_alone() -> None:
    bench = Bench()
    await bench.store.park(
        [letter("(key cannot be mapped)"), letter("2", "2", table="public.other")]
    )
    await bench.office.open()
    assert await bench.keys() == []


async def test_dropped_letters_are_not_tried_again() -> None:
    bench = Bench(interval=60)
    await bench.office.park("public.t", bad("1", "2"), lsn=1, commit_time=0)
    assert await bench.keys() == []
    del bench.store.letters["public.t", "1"]
    assert await bench.keys(61) == ["2"]


async def test_they_wait_while_qdrant_is_away() -> None:
    bench = Bench()
    await bench.store.park([letter("1", "1")])
    await bench.office.open()
    bench.store.away = True
    assert await bench.keys() == []
    bench.store.away = False
    assert await bench.keys(LOOK_SECONDS) == ["1"]
