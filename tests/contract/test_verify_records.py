"""How far the continuous verification is, kept beside the data: on a server and in files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import StateError
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.records import table_verification, verification_record
from cdc_sync.qdrant.sink import Mismatches, TableVerification
from tests.support.qdrant_control import QdrantTarget
from tests.support.sinks import settings_of

_ONE = TableVerification(
    "p", "public.docs", 17, 2**32 - 1, 5, 9, Mismatches(1, 2, 3), Mismatches(4, 5, 6), 1_790_000_000
)


@pytest.fixture(params=["server", "files"])
def target(request: pytest.FixtureRequest, qdrant: QdrantTarget, tmp_path: Path) -> QdrantSettings:
    if request.param == "server":
        return settings_of(qdrant)
    return QdrantSettings.model_validate({"url": f"edge:{tmp_path}/edge"})


async def test_kept_by_table_and_forgotten_with_the_pipeline(target: QdrantSettings) -> None:
    other = dataclasses.replace(_ONE, table="public.a", block=6)
    sink = await open_sink(target)
    try:
        assert await sink.state.verifications("p") == []
        for one in (_ONE, other, dataclasses.replace(_ONE, pipeline="q")):
            await sink.state.save_verification(one)
        assert await sink.state.verifications("p") == [other, _ONE]
        further = dataclasses.replace(_ONE, leaf=18, block=0)
        await sink.state.save_verification(further)
        assert await sink.state.verifications("p") == [other, further]
        await sink.state.forget("p")
        assert await sink.state.verifications("p") == []
        assert await sink.state.verifications("q") == [dataclasses.replace(_ONE, pipeline="q")]
    finally:
        await sink.state.forget("q")
        await sink.close()


@pytest.mark.parametrize("name", sorted(verification_record(_ONE)))
def test_damaged_records_are_refused(name: str) -> None:
    record = verification_record(_ONE)
    assert table_verification(record, "here") == _ONE
    if name == "kind":
        return  # by which it was found
    with pytest.raises(StateError, match="here"):
        table_verification({**record, name: ["no"]}, "here")
    del record[name]
    with pytest.raises(StateError, match="here"):
        table_verification(record, "here")
