"""A password that was given by value is changed under a pipeline that runs: it ends, and goes on
with the new one as if nothing had been."""

from __future__ import annotations

import pytest

from cdc_sync.errors import CdcSyncError, ErrorKind
from cdc_sync.sync import source_history
from tests.faults.test_slot_lost import change, fill, settled
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget


async def test_nothing_is_read_again(
    database18: Database,
    qdrant: QdrantTarget,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)
    caplog.set_level("INFO")
    fill(database18)
    role = database18.create_cdc_role(["docs"])
    settings = pipeline_settings(database18, qdrant, "docs", pg_url=role.url)
    database18.execute(
        f'CREATE PUBLICATION "{settings.source.publication}" FOR TABLE docs'
        " WITH (publish_via_partition_root = true)"
    )
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        change(database18)
        await settled(life)
        caplog.clear()
        database18.execute(f"ALTER ROLE \"{role.name}\" PASSWORD 'another'")
        # The watch over the source is the first to connect again.
        database18.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE usename = %s AND application_name = 'cdc_sync watch'",
            (role.name,),
        )
        with pytest.raises(CdcSyncError) as caught:
            await life.task
        assert caught.value.kind is ErrorKind.SOURCE_AUTH
        assert "CDC_SYNC_SOURCE__PASSWORD_FILE" in caught.value.remedy
    password = role.url.split("@")[0].rpartition(":")[2]
    url = role.url.replace(f":{password}@", ":another@")
    source = pipeline_settings(database18, qdrant, "docs", pg_url=url).source
    source = settings.source.model_copy(update={"url": source.url})
    settings = settings.model_copy(update={"source": source})
    async with running(settings, database18, qdrant) as life:
        await settled(life)
        await life.assert_equal()
    assert not {"resync_wanted", "resync_completed", "table_copied"} & set(caplog.messages)
