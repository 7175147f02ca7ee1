"""What metrics and board of a running pipeline say: the lag while the connection to the slot is
away, and the chunks of a copy."""

from __future__ import annotations

import pytest

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.sync import stream, streaming
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget


async def test_the_lag_grows_while_the_connection_is_away_and_is_0_when_caught_up(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_ON_ITS_WAY_SECONDS", 0.5)
    database18.execute("CREATE TABLE items (id bigint PRIMARY KEY, v vector(3))")
    database18.execute("INSERT INTO items VALUES (1, '[1,2,3]')")
    settings = pipeline_settings(database18, qdrant, "items")
    async with running(settings, database18, qdrant) as life:
        life.patience_seconds = 90
        await life.caught_up()
        await life.wait(lambda: _lag(life) == 0, "no lag")
        await life.wait(lambda: life.metric("slot_active") == 1, "an active slot, seen")
        slot = life.pipeline.board.snapshot()["slot"]
        assert isinstance(slot, dict)
        assert (slot["active"], slot["wal_status"]) == (True, "reserved")

        with monkeypatch.context() as broken:
            broken.setattr(streaming, "start_stream", _refuse)
            database18.execute(
                "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
                " WHERE slot_name = %s",
                (life.slot,),
            )
            await life.wait(lambda: life.metric("source_up") == 0, "the connection's end")
            database18.execute("INSERT INTO items VALUES (2, '[3,2,1]')")
            # The stream has not received it, so only the server's position tells.
            await life.wait(lambda: (_lag(life) or 0) > 1.5, "a lag that grows")
            await life.wait(lambda: life.metric("lag_bytes", stage="receive") > 0, "its bytes")
            await life.wait(lambda: life.metric("slot_active") == 0, "a slot without a consumer")
        await life.wait(lambda: _lag(life) == 0, "no lag again")
        await life.assert_equal()
        assert life.metric("slot_retained_wal_bytes") > 0
        assert life.metric("slot_spilled_bytes_total") == 0


def _refuse(*_: object, **__: object) -> None:
    raise SourceError(ErrorKind.SOURCE_UNAVAILABLE, "the connection is refused")


def _lag(life: Running) -> float | None:
    lag = life.pipeline.board.snapshot()["lag"]
    assert isinstance(lag, dict)
    seconds = lag["seconds"]
    assert life.pipeline.metrics.registry.get_sample_value("cdc_sync_lag_seconds") is not None
    assert seconds is None or isinstance(seconds, float | int)
    return seconds


async def test_the_chunks_of_a_copy_are_pending_then_running_then_done(
    database18: Database, qdrant: QdrantTarget
) -> None:
    database18.execute("CREATE TABLE docs (id bigint PRIMARY KEY, text text, v vector(3))")
    database18.execute(
        "INSERT INTO docs SELECT n, repeat('x', 1500), '[1,2,3]' FROM generate_series(1, 300) n"
    )
    database18.execute("ANALYZE docs")
    settings = pipeline_settings(
        database18, qdrant, "docs", migration={"chunk_rows": 100, "batch_delay": 300}
    )

    async with running(settings, database18, qdrant, wait=False) as life:
        life.patience_seconds = 90

        def chunks() -> list[float]:
            states = ("pending", "running", "done")
            return [life.metric("snapshot_chunks", table="public.docs", state=s) for s in states]

        await life.wait(lambda: chunks()[1] == 1, "a chunk in progress")
        total = sum(chunks())
        assert total >= 3
        await life.wait(lambda: chunks()[2] >= 1, "a chunk that is done")
        assert sum(chunks()) == total
        await life.wait_streaming()
        assert chunks() == [0, 0, total]
        assert life.metric("snapshot_rows_total", table="public.docs") == 300
        summary = life.pipeline.board.snapshot()["summary"]
        assert isinstance(summary, dict)
        assert summary["severity"] in ("ok", "busy")
