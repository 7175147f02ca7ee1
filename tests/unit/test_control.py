"""The control channel: what a message may ask for, and how the stream takes it."""

from __future__ import annotations

import dataclasses
import json
import logging
import struct
import sys

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError
from cdc_sync.ops.metrics import Metrics
from cdc_sync.pgoutput import messages as m
from cdc_sync.sync.control import (
    KEY_BURST,
    MAX_CONTENT_BYTES,
    MAX_KEY_COLUMNS,
    MAX_KEYS,
    MAX_VALUE_CHARACTERS,
    PREFIX,
    TABLE_BURST,
    ControlChannel,
    InvalidRequestError,
    Request,
    ResyncRows,
    ResyncTable,
    TokenBucket,
    parse_message,
    request_content,
)
from cdc_sync.sync.gather import Batch, Gatherer
from cdc_sync.sync.relations import Relations
from cdc_sync.sync.resync_request import read_json_key, read_key
from tests.support import frames
from tests.unit.test_gather import OID, RELATION, planned_table, route, row

SECRET = "a-key-nobody-may-see"


def content(**body: object) -> bytes:
    fields = {"pipeline": "default", "table": "public.t", **body}
    return json.dumps({"resync": fields}).encode()


def message(data: bytes, *, prefix: str = PREFIX, transactional: bool = True) -> m.LogicalMessage:
    return m.LogicalMessage(transactional, 0x1000, prefix, data)


# -- what is a request


def test_a_table_and_rows_can_be_asked_for() -> None:
    assert parse_message(PREFIX, content()) == Request("default", "public.t")
    assert parse_message(PREFIX, content(keys=[["1"], ["2"]])) == Request(
        "default", "public.t", (("1",), ("2",))
    )


@pytest.mark.parametrize("prefix", ["", "CDC_SYNC", "cdc_sync ", "cdc_sync2", "tests", "\u00e9"])
def test_messages_with_another_prefix_are_not_looked_at(prefix: str) -> None:
    assert parse_message(prefix, b"\xff not JSON") is None


DEEP = b"[" * 100_000
INVALID = {
    "nothing": b"",
    "no JSON": b"resync everything",
    "not UTF-8": b'{"resync": {"pipeline": "\xff\xfe"}}',
    "half a document": b'{"resync": {',
    "two documents": content() + content(),
    "deep nesting": DEEP,
    "deep nesting in keys": b'{"resync":{"pipeline":"default","table":"public.t","keys":' + DEEP,
    "a number without end": b"9" * 100_000,
    "too long": content(table="x" * MAX_CONTENT_BYTES),
    "a list": b"[]",
    "a string": b'"resync"',
    "null": b"null",
    "an empty object": b"{}",
    "another request": b'{"drop": {"pipeline": "default", "table": "public.t"}}',
    "a second request": b'{"resync": {"pipeline": "default", "table": "public.t"}, "drop": 1}',
    "a list of requests": b'{"resync": [{"pipeline": "default", "table": "public.t"}]}',
    "a field that is not known": content(where="true"),
    "no table": b'{"resync": {"pipeline": "default"}}',
    "no pipeline": b'{"resync": {"table": "public.t"}}',
    "a table that is a number": content(table=1),
    "a table that is null": content(table=None),
    "an empty table": content(table=""),
    "a long table": content(table="x" * 513),
    "a pipeline that is a list": content(pipeline=["default"]),
    "keys that are null": content(keys=None),
    "keys that are a string": content(keys="1"),
    "keys that are an object": content(keys={"0": ["1"]}),
    "no keys": content(keys=[]),
    "too many keys": content(keys=[[str(i)] for i in range(MAX_KEYS + 1)]),
    "a key that is a string": content(keys=["1"]),
    "a key that is empty": content(keys=[[]]),
    "a key that is too wide": content(keys=[["1"] * (MAX_KEY_COLUMNS + 1)]),
    "keys of two widths": content(keys=[["1"], ["1", "2"]]),
    "a number in a key": content(keys=[[1]]),
    "null in a key": content(keys=[[None]]),
    "true in a key": content(keys=[[True]]),
    "a list in a key": content(keys=[[["1"]]]),
    "NUL in a key": content(keys=[["a\0b"]]),
    "half a surrogate pair": b'{"resync":{"pipeline":"default","table":"public.t",'
    b'"keys":[["\\ud800"]]}}',
    "a long value": content(keys=[["x" * (MAX_VALUE_CHARACTERS + 1)]]),
}


@pytest.mark.requirement("R49")
@pytest.mark.parametrize("name", INVALID)
def test_what_is_no_request_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_message(PREFIX, INVALID[name])
    assert caught.value.__cause__ is None
    assert SECRET not in str(caught.value)


def test_the_limits_themselves_are_allowed() -> None:
    keys = [[str(i)] for i in range(MAX_KEYS)]
    request = parse_message(PREFIX, content(keys=keys))
    assert isinstance(request, Request)
    assert request.keys is not None
    assert len(request.keys) == MAX_KEYS
    wide = parse_message(PREFIX, content(keys=[["x" * MAX_VALUE_CHARACTERS] * MAX_KEY_COLUMNS]))
    assert isinstance(wide, Request)
    assert wide.keys is not None
    assert len(wide.keys[0]) == MAX_KEY_COLUMNS


def test_a_key_that_is_named_twice_counts_once() -> None:
    request = parse_message(PREFIX, content(keys=[["1"], ["2"], ["1"]]))
    assert isinstance(request, Request)
    assert request.keys == (("1",), ("2",))


def test_sql_in_a_key_is_a_text_like_any_other() -> None:
    text = "1'); DROP TABLE docs; --"
    request = parse_message(PREFIX, content(keys=[[text]]))
    assert isinstance(request, Request)
    assert request.keys == ((text,),)


_TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@given(
    _TEXTS.filter(bool),
    st.none()
    | st.integers(1, 3).flatmap(
        lambda width: st.lists(
            st.tuples(*[_TEXTS] * width), min_size=1, max_size=20, unique=True
        ).map(tuple)
    ),
)
def test_a_request_survives_its_message(
    table: str, keys: tuple[tuple[str, ...], ...] | None
) -> None:
    request = Request("default", table, keys)
    data = request_content(request)
    assert data.isascii()
    assert parse_message(PREFIX, data) == request


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["resync", "pipeline", "table", "keys"]) | st.text(), inner
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
    | st.binary()
)
def test_any_content_is_a_request_or_refused(data: bytes) -> None:
    try:
        request = parse_message(PREFIX, data)
    except InvalidRequestError:
        return
    assert isinstance(request, Request)
    assert {"pipeline", "table"} <= orjson.loads(data)["resync"].keys()


# -- what is granted


class Channel:
    """A channel to the pipeline `default` with the table public.t, and a clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.metrics = Metrics()
        self.planned = planned_table()
        self.channel = ControlChannel(
            "default", lambda: [self.planned], self.metrics, lambda: self.now
        )

    def accept(self, data: bytes, *, transactional: bool = True) -> ResyncRows | ResyncTable | None:
        return self.channel.accept(message(data, transactional=transactional))

    def counts(self) -> dict[str, float]:
        found = {}
        for metric in self.metrics.registry.collect():
            if metric.name == "cdc_sync_control_requests":
                found = {s.labels["outcome"]: s.value for s in metric.samples if s.value}
        return found


def test_requests_are_granted_with_the_plan_in_force() -> None:
    channel = Channel()
    assert channel.accept(content()) == ResyncTable(channel.planned)
    assert channel.accept(content(keys=[["1"]])) == ResyncRows(channel.planned, (("1",),))
    assert channel.counts() == {"table": 1, "rows": 1}
    assert ResyncTable(channel.planned).oid == ResyncRows(channel.planned, (("1",),)).oid == OID


def test_requests_to_another_pipeline_are_not_ours_to_count() -> None:
    channel = Channel()
    assert channel.accept(content(pipeline="other", table="public.unknown")) is None
    assert channel.counts() == {}


@pytest.mark.requirement("R49")
@pytest.mark.parametrize(
    ("data", "outcome"),
    [
        (b"\xff" + SECRET.encode(), "invalid"),
        (content(table=f"public.{SECRET}"), "unknown_table"),
        (content(table="T"), "unknown_table"),
        (content(table="pg_catalog.pg_authid"), "unknown_table"),
        (content(table='public.t"; DROP TABLE t; --'), "unknown_table"),
        (content(keys=[[SECRET, "2"]]), "invalid"),
    ],
)
def test_a_refusal_is_counted_and_says_nothing_of_the_message(
    data: bytes, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    channel = Channel()
    with caplog.at_level(logging.DEBUG, "cdc_sync"):
        assert channel.accept(data) is None
    assert channel.counts() == {outcome: 1}
    (record,) = caplog.records
    assert record.getMessage() == "request_refused"
    assert SECRET not in repr(vars(record))


def test_keys_never_reach_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "cdc_sync"):
        assert Channel().accept(content(keys=[[SECRET]])) is not None
    assert caplog.records
    assert all(SECRET not in repr(vars(record)) for record in caplog.records)


def test_a_message_that_stands_without_its_transaction_is_refused() -> None:
    channel = Channel()
    assert channel.accept(content(), transactional=False) is None
    assert channel.counts() == {"invalid": 1}


def test_whole_tables_are_limited() -> None:
    channel = Channel()
    for _ in range(TABLE_BURST):
        assert channel.accept(content()) is not None
    assert channel.accept(content()) is None
    assert channel.counts() == {"table": TABLE_BURST, "limited": 1}
    channel.now += 299
    assert channel.accept(content()) is None
    channel.now += 2
    assert channel.accept(content()) is not None
    channel.now += 1e9
    assert [channel.accept(content()) is None for _ in range(TABLE_BURST + 1)].count(True) == 1


def test_more_rows_than_the_limit_become_the_table_as_a_whole() -> None:
    channel = Channel()
    data = content(keys=[[str(i)] for i in range(MAX_KEYS)])
    for _ in range(KEY_BURST // MAX_KEYS):
        assert isinstance(channel.accept(data), ResyncRows)
    # Nothing that was asked for is lost, until whole tables are limited too.
    for _ in range(TABLE_BURST):
        assert isinstance(channel.accept(data), ResyncTable)
    assert channel.accept(data) is None
    channel.now += 0.5
    assert isinstance(channel.accept(data), ResyncRows)


def test_many_small_requests_are_limited_too() -> None:
    channel = Channel()
    granted = [channel.accept(content(keys=[[str(i)]])) for i in range(2000)]
    rows = sum(isinstance(request, ResyncRows) for request in granted)
    assert 100 <= rows <= 1000
    assert granted[-1] is None


def test_a_bucket_never_holds_more_than_its_burst_and_no_request_is_for_nothing() -> None:
    now = 0.0
    bucket = TokenBucket(10, 1, lambda: now)
    assert not bucket.take(11)
    assert bucket.take(10)
    assert not bucket.take(1)
    now = 5.0
    assert bucket.take(5)
    now = 1000.0
    assert not bucket.take(10.5)


# -- in the stream


class Stream:
    """Feeds a gatherer that listens to a channel."""

    def __init__(self, applied: int = 0) -> None:
        self.channel = Channel()
        self.gatherer = Gatherer(
            route,
            batch_rows=1000,
            batch_bytes=1 << 20,
            applied=applied,
            on_message=self.channel.channel.accept,
        )

    def send(self, *sent: m.Message) -> None:
        for one in sent:
            self.gatherer.feed(b"w" + struct.pack(">QQq", 1, 1, 0) + frames.encode(one))

    def transaction(self, commit_lsn: int, *changes: m.Message, xid: int = 7) -> None:
        self.send(m.Begin(commit_lsn, 0, xid), *changes, m.Commit(0, commit_lsn, commit_lsn + 8, 0))

    def batches(self) -> list[Batch]:
        found = []
        while self.gatherer.ready:
            found.append(self.gatherer.take())
        return found


def test_a_request_is_a_barrier_between_the_changes_around_it() -> None:
    stream = Stream()
    stream.transaction(
        100,
        RELATION,
        m.Insert(OID, row(1)),
        message(content(keys=[["1"]])),
        m.Insert(OID, row(2)),
        xid=42,
    )
    before, asked, after = stream.batches()
    assert list(before.tables[OID].pending) == [1]
    assert asked.rereads == (ResyncRows(stream.channel.planned, (("1",),)),)
    assert not asked.tables
    assert not asked.empty
    assert asked.xids == [42]
    assert list(after.tables[OID].pending) == [2]
    # Nothing is confirmed before the request has been answered.
    assert (before.end_lsn, asked.end_lsn, after.end_lsn) == (None, None, 108)


def test_a_request_for_a_table_is_a_barrier_too_even_before_its_first_change() -> None:
    stream = Stream()
    stream.transaction(100, message(content()))
    *_, asked, after = stream.batches()
    assert asked.resync_tables == (stream.channel.planned,)
    assert not asked.empty
    assert asked.end_lsn is None
    assert after.end_lsn == 108


@pytest.mark.requirement("R44", "R49")
def test_requests_of_transactions_applied_before_are_not_heard_again() -> None:
    stream = Stream(applied=101)
    stream.transaction(100, message(content(keys=[["1"]])))
    stream.transaction(101, message(content(keys=[["2"]])))
    assert [batch.rereads[0].keys for batch in stream.batches() if batch.rereads] == [(("2",),)]
    assert stream.channel.counts() == {"rows": 1}


def test_refused_and_foreign_messages_leave_the_batch_as_it_is() -> None:
    stream = Stream()
    stream.transaction(
        100,
        RELATION,
        m.Insert(OID, row(1)),
        message(b"{}"),
        message(content(), prefix="other"),
        message(content(), transactional=False),
        m.Insert(OID, row(2)),
    )
    stream.send(message(content(), transactional=False))
    (batch,) = stream.batches()
    assert list(batch.tables[OID].pending) == [1, 2]
    assert batch.end_lsn == 108


def test_rows_read_by_columns_that_are_not_the_tables_any_more_make_it_stale() -> None:
    metrics = Metrics()
    planned = planned_table()
    settings = Settings.model_validate(
        {"source": {"url": "postgresql://db.invalid/app"}, "tables": [{"name": "t"}]}
    )
    relations = Relations([planned], settings, metrics)
    assert relations.note(Batch(rereads=(ResyncRows(planned, (("1",),)),))) == []
    before = dataclasses.replace(
        planned, plan=dataclasses.replace(planned.plan, columns=planned.plan.columns[:2])
    )
    assert relations.note(Batch(rereads=(ResyncRows(before, (("1",),)),))) == [before]
    assert relations.stale == {OID}


# -- keys on the command line


def test_the_key_of_one_column_is_taken_as_it_stands() -> None:
    for text in ("007", "a,b", '["a"]', "", " x ", "-5", "\u00e9"):
        assert read_key(text, 1) == (text,)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("acme,42", ("acme", "42")),
        ("a, b", ("a", " b")),
        ('["a,b", 42]', ("a,b", "42")),
        (' ["a", 9223372036854775808]', ("a", "9223372036854775808")),
        ('["a", 1.10]', ("a", "1.10")),
        ('["a", true]', ("a", "true")),
        ('["a", NaN]', ("a", "NaN")),
        (",", ("", "")),
    ],
)
def test_a_key_of_two_columns(text: str, key: tuple[str, ...]) -> None:
    assert read_key(text, 2) == key


@pytest.mark.parametrize(
    "text",
    [
        SECRET, f"{SECRET},b,c", f'["{SECRET}"]', f'["{SECRET}", null]', f'["{SECRET}", ["b"]]',
        f'["{SECRET}", "b"', "[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_key_of_two_columns_is_refused_without_saying_it(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_key(text, 2)
    assert SECRET not in caught.value.message + caught.value.remedy
    assert caught.value.__cause__ is None


def test_a_json_key_of_one_column_needs_no_array() -> None:
    assert read_json_key('"a\\nb"', 1) == read_json_key('["a\\nb"]', 1) == ("a\nb",)
    assert read_json_key("7", 1) == ("7",)
    with pytest.raises(ConfigError):
        read_json_key('{"a": 1}', 1)


def test_huge_numbers_are_no_problem() -> None:
    digits = "9" * (sys.get_int_max_str_digits() + 1)
    assert read_json_key(digits, 1) == (digits,)
