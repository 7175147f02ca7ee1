"""``cdc-sync verify``: whatever is done to points is found and called by its name, on a pipeline
that is written all the time, and nothing else is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from cdc_sync.verify.data import Asked, Verified, verify_once
from cdc_sync.verify.report import Finding, Report
from cdc_sync.verify.table import How
from tests.support.command_line import Done, in_process
from tests.support.damages import NAMES, Damaged, constant_writes, create_docs, point_ids
from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget


def silent(table: str, done: int, expected: int, doing: str, different: int) -> None:
    """No progress is shown."""


async def verified(life: Running, how: How | None = None, **asked: object) -> Verified:
    question = Asked(how or How(examples=500), **asked)  # type: ignore[arg-type]
    return await verify_once(life.pipeline.settings, question, silent)


def found(report: Report) -> list[Finding]:
    return [finding for table in report.tables for finding in table.findings.values()]


def assert_named_rightly(report: Report, damaged: Damaged) -> None:
    """Every damage is found by its name, and nothing besides."""
    left = {(one.kind.value, one.field, one.cause): one for one in found(report)}
    for name, (kind, field, cause) in NAMES.items():
        ids = {str(id_) for id_ in damaged.done[name]}
        fitting = [
            key
            for key, one in left.items()
            if key[:2] == (kind, field)
            and cause in key[2]
            and (name == "partition" or {str(e.id) for e in one.examples} == ids)
        ]
        assert fitting, f"{name}: {_shown(left)}"
        del left[fitting[0]]
    assert [key[0] for key in left] == ["count"], _shown(left)


def _shown(left: Mapping[tuple[str, str, str], Finding]) -> str:
    return "\n".join(f"{key}: {one.count} {one.examples[:3]}" for key, one in left.items())


async def damage_and_verify(
    database: Database, qdrant: QdrantTarget, seed: int, rounds: int
) -> None:
    create_docs(database)
    settings = pipeline_settings(database, qdrant, "docs")
    async with running(settings, database, qdrant) as life:
        with constant_writes(database, seed) as transactions:
            await life.wait(lambda: transactions() > 20, "writing")
            for _ in range(rounds):
                report = (await verified(life)).report
                assert report.equal, found(report)
                assert report.exit_code == 0
            collection = settings.tables[0].collection
            assert collection is not None
            client = qdrant.client()
            ids = point_ids(client, collection)
            damaged = Damaged(client, collection, ids)
            await asyncio.to_thread(damaged.apply)
            for _ in range(rounds):
                report = (await verified(life)).report
                assert report.exit_code == 3
                assert_named_rightly(report, damaged)
                assert not any(table.undecided for table in report.tables)


@pytest.mark.parametrize("seed", [1, 2])
async def test_damages_are_found_under_constant_writes(
    database18: Database, qdrant: QdrantTarget, seed: int
) -> None:
    await damage_and_verify(database18, qdrant, seed, 1)


async def test_a_pipeline_that_stands_still_is_no_difference(
    database18: Database, qdrant: QdrantTarget
) -> None:
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        qdrant.script.reject("Upsert", "UNAVAILABLE", times=10_000)
        qdrant.script.reject("UpdateBatch", "UNAVAILABLE", times=10_000)
        database18.execute("UPDATE docs SET n = n + 1 WHERE region = 'west' AND id <= 5")
        report = (await verified(life, patience_seconds=1.0)).report
        assert report.equal
        assert report.tables[0].undecided == 5
        assert report.exit_code == 75
        qdrant.script.clear()
        # What fails for a moment is tried again.
        for operation in ("Get", "Count", "Scroll"):
            qdrant.script.reject(operation, "UNAVAILABLE", times=2)
        for how in (How(), How(sample=20, seed=1)):
            report = (await verified(life, how)).report
            assert report.exit_code == 0
            assert report.tables[0].undecided == 0


async def test_rows_changed_by_open_transactions_are_no_difference(
    database18: Database, qdrant: QdrantTarget
) -> None:
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs")
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        client, name = qdrant.client(), settings.tables[0].collection
        assert name is not None
        ids = point_ids(client, name)
        with database18.connect(autocommit=False) as connection:
            connection.execute("UPDATE docs SET n = 0 WHERE region = 'west' AND id = 5")
            # As if the commit had been streamed, which is visible later.
            client.set_payload(name, {"n": 0}, points=[ids["west", 5]], wait=True)
            report = (await verified(life)).report
            assert report.equal
            assert report.tables[0].undecided == 1
            connection.commit()
        await life.caught_up()
        assert (await verified(life)).report.exit_code == 0


# -- the command


def verify_command(synced: Synced, *arguments: str) -> Done:
    return in_process("verify", "--config", str(synced.daemon.config), *arguments)


def as_json(synced: Synced, *arguments: str) -> dict[str, Any]:
    done = verify_command(synced, "--json", *arguments)
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode, done.stderr
    return report


def test_repair_beside_a_running_pipeline(database18: Database, sync_table: SyncTable) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs")
    assert synced.qdrant is not None
    client = synced.qdrant.client()
    damaged = Damaged(client, synced.collection, point_ids(client, synced.collection))
    with constant_writes(database18, 3):
        damaged.apply()
        done = verify_command(synced, "--repair")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("equal\n")
    synced.assert_equal()


def test_repair_of_a_stopped_pipeline(database18: Database, sync_table: SyncTable) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs")
    assert synced.qdrant is not None
    synced.daemon.wait_caught_up()
    assert synced.daemon.terminate() == 0
    database18.execute("UPDATE docs SET n = n + 1 WHERE region = 'east' AND id <= 7")
    database18.execute("DELETE FROM docs WHERE region = 'east' AND id = 8")
    report = as_json(synced)
    assert report["equal"]
    assert report["tables"][0]["pending"] == 8
    client = synced.qdrant.client()
    damaged = Damaged(client, synced.collection, point_ids(client, synced.collection))
    damaged.apply()
    report = as_json(synced)
    assert report["exit_code"] == 3
    assert report["tables"][0]["pending"] == 8
    assert report["tables"][0]["extra"] == 2
    done = verify_command(synced, "--repair")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not synced.differences()


@pytest.mark.campaign
@pytest.mark.timeout(1800)
async def test_no_false_alarm_in_ten_runs(database18: Database, qdrant: QdrantTarget) -> None:
    await damage_and_verify(database18, qdrant, 11, 10)
