"""The address leads to a standby for a while, as a virtual address or a name does in the middle of
a failover: that is waited for, and nothing is read again."""

from __future__ import annotations

import asyncio

import pytest

from cdc_sync.sync import source_history
from cdc_sync.sync.check import run_checks
from tests.faults.test_failover import Pair, wait_standby
from tests.faults.test_failover import pair as pair  # a fixture, registered by being here
from tests.faults.test_slot_lost import change, fill, resynced, settled
from tests.integration.test_check import severities
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.proxy import TcpProxy
from tests.support.qdrant_control import QdrantTarget


@pytest.mark.requirement("R59", "R61")
async def test_a_standby_that_is_promoted_later(
    pair: Pair, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)
    fill(pair.database)
    with TcpProxy("127.0.0.1", pair.primary.port) as proxy:
        url = pair.database.url_through(proxy)
        settings = pipeline_settings(pair.database, qdrant, "docs", pg_url=url)
        async with running(settings, pair.database, qdrant) as life:
            await settled(life)
            await asyncio.to_thread(pair.wait_slot, life.slot)
            change(pair.database)
            await settled(life)
            await asyncio.to_thread(pair.wait_slot, life.slot)
            await asyncio.to_thread(wait_standby, pair)
            proxy.upstream = ("127.0.0.1", pair.standby.port)
            await asyncio.to_thread(pair.primary.stop, "immediate")
            proxy.cut()
            tried = life.metric("source_reconnects_total", reason="source_unavailable")

            def refused_often() -> bool:
                now = life.metric("source_reconnects_total", reason="source_unavailable")
                return now >= tried + 5

            await life.wait(refused_often, "tries at the standby")
            assert "is a standby" in str(life.pipeline.board.snapshot()["source"])
            found = await asyncio.to_thread(run_checks, settings)
            assert severities(found)["postgres-standby"] == "error"
            life.database = await asyncio.to_thread(pair.promoted)
            life.database.execute("DELETE FROM docs WHERE id > 290")
            await settled(life)
            await life.assert_equal()
            assert resynced(life, "docs") == 0
