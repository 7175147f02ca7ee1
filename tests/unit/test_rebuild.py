"""Rebuilds without servers: messages, records, names, and which settings are in force."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import cast

import pytest

from cdc_sync.config import Settings, TableSettings
from cdc_sync.errors import StateError
from cdc_sync.ops.metrics import Metrics
from cdc_sync.pgoutput import messages as m
from cdc_sync.postgres.slot import validate_slot_name
from cdc_sync.qdrant.records import pipeline_record, pipeline_state, rebuild_record, rebuild_state
from cdc_sync.qdrant.sink import PipelineState, RebuildState, Sink, TableRebuild, TableState
from cdc_sync.sync.control import (
    PREFIX,
    SWAP_BURST,
    ControlChannel,
    InvalidRequestError,
    RebuildMessage,
    SwapRequest,
    parse_message,
    rebuild_content,
)
from cdc_sync.sync.planning import in_force
from cdc_sync.sync.rebuild import worker_settings
from cdc_sync.sync.rebuild_slots import worker_names
from cdc_sync.sync.swaps import PipelineSwaps, rebuilt_tables
from cdc_sync.sync.table_records import TableRecords
from tests.unit.test_gather import planned_table

TOKEN = "0123456789abcdef" * 2
MESSAGE = RebuildMessage("default", "public.t", TOKEN)


def settings(*tables: dict[str, object], **sections: object) -> Settings:
    content = {"source": {"url": "postgresql://h/d"}, "tables": tables, **sections}
    return Settings.model_validate(content)


# -- messages


def test_a_message_survives_the_wal() -> None:
    assert parse_message(PREFIX, rebuild_content(MESSAGE)) == MESSAGE
    odd = dataclasses.replace(MESSAGE, table='public."ü"\u2028')
    assert parse_message(PREFIX, rebuild_content(odd)) == odd
    assert parse_message("other", rebuild_content(MESSAGE)) is None


@pytest.mark.requirement("R49")
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"pipeline": "default", "table": "public.t"},
        {"pipeline": "default", "table": "public.t", "token": TOKEN, "collection": "x"},
        {"pipeline": "default", "table": "public.t", "token": TOKEN.upper()},
        {"pipeline": "default", "table": "public.t", "token": TOKEN + "0"},
        {"pipeline": "default", "table": "public.t", "token": TOKEN + "\n"},
        {"pipeline": "default", "table": "public.t", "token": 1},
        {"pipeline": "default", "table": ["public.t"], "token": TOKEN},
        {"pipeline": "", "table": "public.t", "token": TOKEN},
        {"pipeline": "default", "table": "t" * 600, "token": TOKEN},
        [],
        "x",
        None,
    ],
)
def test_what_is_no_message_is_refused(body: object) -> None:
    with pytest.raises(InvalidRequestError):
        parse_message(PREFIX, json.dumps({"rebuild": body}).encode())
    with pytest.raises(InvalidRequestError):
        parse_message(PREFIX, json.dumps({"rebuild": body, "resync": {}}).encode())


def channel(follows: str | None = None, name: str = "default") -> tuple[ControlChannel, Metrics]:
    metrics = Metrics()
    planned = planned_table()
    return ControlChannel(name, lambda: [planned], metrics, lambda: 0.0, follows=follows), metrics


def logical(content: bytes, *, transactional: bool = True) -> m.LogicalMessage:
    return m.LogicalMessage(transactional, 0x1000, PREFIX, content)


def test_a_request_marks_a_place_and_asks_for_no_rows() -> None:
    request = channel()[0].accept(logical(rebuild_content(MESSAGE)))
    assert isinstance(request, SwapRequest)
    assert (request.token, request.keys, request.retry) == (TOKEN, (), True)


def test_a_rebuild_hears_the_requests_to_the_pipeline_it_follows() -> None:
    own = rebuild_content(dataclasses.replace(MESSAGE, pipeline="worker"))
    worker, _ = channel("default", "worker")
    assert isinstance(worker.accept(logical(rebuild_content(MESSAGE))), SwapRequest)
    assert worker.accept(logical(own)) is None
    other, _ = channel(None, "worker")
    assert other.accept(logical(rebuild_content(MESSAGE))) is None
    # What asks to read rows again is for the pipeline alone.
    rows = json.dumps({"resync": {"pipeline": "default", "table": "public.t"}}).encode()
    assert worker.accept(logical(rows)) is None


@pytest.mark.requirement("R49")
def test_requests_are_limited_and_must_stand_in_a_transaction(
    caplog: pytest.LogCaptureFixture,
) -> None:
    control, metrics = channel()
    content = rebuild_content(MESSAGE)
    with caplog.at_level(logging.DEBUG, "cdc_sync"):
        assert control.accept(logical(content, transactional=False)) is None
        granted = [control.accept(logical(content)) for _ in range(SWAP_BURST + 5)]
    assert sum(one is not None for one in granted) == SWAP_BURST
    value = metrics.registry.get_sample_value
    assert value("cdc_sync_control_requests_total", {"outcome": "limited"}) == 5
    assert value("cdc_sync_control_requests_total", {"outcome": "invalid"}) == 1
    assert all(TOKEN not in repr(vars(record)) for record in caplog.records)


class _Records:
    async def load(self) -> PipelineState | None:
        return PipelineState("default", "s", "p", "1", 1, 5, (TableState("public.t", "t", "f"),))


@pytest.mark.requirement("R49")
async def test_without_aliases_nothing_is_granted() -> None:
    metrics = Metrics()
    swaps = PipelineSwaps(
        settings({"name": "t"}),
        cast("Sink", object()),
        cast("TableRecords", _Records()),
        metrics,
        {"public.t": "t"},
    )
    await swaps.compare()
    await swaps.meet(SwapRequest(planned_table(), (), True, TOKEN), 5, settled=True)
    value = metrics.registry.get_sample_value
    assert value("cdc_sync_control_requests_total", {"outcome": "invalid"}) == 1


# -- records

REBUILD = RebuildState(
    pipeline="default",
    table="public.t",
    worker="w",
    slot="s",
    settings='{"name": "t"}',
    collection="new",
    old="old",
    alias="a",
    phase="ready",
    token=TOKEN,
    lsn=2**63 + 5,
    made_collection=True,
    widened=True,
)


def test_records_survive_json() -> None:
    record = json.loads(json.dumps(rebuild_record(REBUILD)))
    assert rebuild_state(record, "here") == REBUILD
    rebuild = TableRebuild(TOKEN, TOKEN, '{"name": "t"}', "old", "a")
    tables = (
        TableState("public.t", "new", "f", copied=True, rebuild=rebuild),
        TableState("public.u", "u", "f"),
    )
    state = PipelineState("default", "s", "p", "1", 1, 5, tables)
    assert pipeline_state(json.loads(json.dumps(pipeline_record(state))), "here") == state


@pytest.mark.parametrize("field", ["phase", "token", "settings", "lsn", "worker"])
def test_damaged_records_are_said_to_be(field: str) -> None:
    for value in (None, [], "nothing" if field == "phase" else {}):
        with pytest.raises(StateError, match=field):
            rebuild_state({**rebuild_record(REBUILD), field: value}, "here")


# -- names


@pytest.mark.parametrize("length", [1, 20, 63])
def test_names_fit_and_are_distinct(length: int) -> None:
    base = settings(
        {"name": "t"},
        source={"url": "postgresql://h/d", "slot": "s" * length},
        pipeline={"name": "N." + "n" * (length - 1)},
    )
    names = [worker_names(base, table) for table in ("public.t", "public.u", 'a."ü"')]
    assert len(set(names)) == 3
    for worker, slot in names:
        validate_slot_name(slot)
        rebuild = dataclasses.replace(REBUILD, worker=worker, slot=slot)
        worked = worker_settings(base, rebuild)
        assert Settings.model_validate(worked.model_dump()).pipeline.name == worker
        assert worked.source.slot == slot
        assert worked.source.publication == base.source.publication
    assert worker_names(base, "public.t") == names[0]


# -- settings in force


def state(*tables: TableState) -> PipelineState:
    return PipelineState("default", "s", "p", "1", 1, 5, tables)


def test_a_rebuilt_table_is_kept_by_the_settings_on_record() -> None:
    new = TableSettings(name="t", collection="new", exclude=["x"])
    rebuild = TableRebuild(TOKEN, TOKEN, new.model_dump_json(exclude_defaults=True), "old")
    record = TableState("public.t", "new", "f", copied=True, rebuild=rebuild)
    other = TableState("public.u", "u", "f", copied=True)
    before = settings({"name": "t", "collection": "old"}, {"name": "u", "collection": "u"})
    found = in_force(before, state(record, other))
    assert found.tables == [new, before.tables[1]]
    assert rebuilt_tables(before, state(record, other)) == {"public.t": "new"}
    # Once more makes no difference.
    assert in_force(found, state(record, other)) == found
    # The file was replaced, be it by one that says more.
    after = settings({"name": "public.t", "collection": "new"}, {"name": "u", "collection": "u"})
    assert in_force(after, state(record, other)) == after
    assert rebuilt_tables(after, state(record, other)) == {}


def test_without_a_rebuild_the_configuration_is_in_force() -> None:
    before = settings({"name": "t", "collection": "old"})
    refused = TableState("public.t", "old", "f", rebuild=TableRebuild(TOKEN))
    for known in (None, state(), state(refused)):
        assert in_force(before, known) is before
        assert rebuilt_tables(before, known) == {}


def test_settings_of_a_newer_version_are_not_guessed() -> None:
    rebuild = TableRebuild(TOKEN, TOKEN, '{"name": "t", "unheard_of": "secret"}', "old")
    record = TableState("public.t", "new", "f", rebuild=rebuild)
    with pytest.raises(StateError) as caught:
        in_force(settings({"name": "t"}), state(record))
    assert "secret" not in str(caught.value)
