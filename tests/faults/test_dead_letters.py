"""Rows that cannot be written, and what their operator does about them: ``cdc-sync dlq`` beside a
daemon that copies, streams, resyncs, has stopped at the limit, or is not there."""

from __future__ import annotations

import asyncio

import pytest
from qdrant_client import models

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ExitCode
from cdc_sync.mapping.ids import hashed_id
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import DeadLetter
from cdc_sync.sync import dead_letter_retries
from tests.support.daemon import Daemon
from tests.support.dlq_command import create_loose, dlq, keys, letters
from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import Faults, QdrantProcess
from tests.support.resync_command import resync

pytestmark = pytest.mark.timeout(120)

PENDING = "cdc_sync_dead_letters_pending"
#: Vectors that are TOASTed.
LONG = 640
RETRIES = "cdc_sync_dead_letter_retries_total"
TOTAL = "cdc_sync_dead_letters_total"


@pytest.fixture
def faults(qdrant_private: QdrantProcess) -> Faults:
    return qdrant_private.script


def sync_loose(
    database: Database,
    sync_table: SyncTable,
    *,
    qdrant: QdrantProcess | None = None,
    target: str = "server",
    dimensions: int = 3,
    **more: object,
) -> Synced:
    return sync_table(
        database,
        "loose",
        qdrant=qdrant,
        target=target,
        dimensions={"emb": dimensions},
        compare_options={"where": f"vector_dims(emb) = {dimensions}"},
        **more,
    )


def refuse(
    faults: Faults, database: Database, synced: Synced, id_: int, letters_after: int = 1
) -> None:
    """Have Qdrant refuse a row that is as good as any, with a vector that is TOASTed: nothing but
    such a change makes these requests."""
    faults.reject("UpdateBatch", "INVALID_ARGUMENT", "Wrong input: scripted")
    database.execute("UPDATE loose SET note = note || ' refused' WHERE id::text = %s", (str(id_),))
    synced.daemon.wait(lambda: synced.daemon.metric(PENDING) == letters_after, "a dead letter")


def put_letters(synced: Synced, *found: DeadLetter) -> None:
    """Put dead letters on record, with the daemon at rest."""

    async def park() -> None:
        sink = await open_sink(QdrantSettings.model_validate({"url": synced.qdrant_url}))
        await sink.state.park(found)
        await sink.close()

    asyncio.run(park())


def letter_of(daemon: Daemon, key: str, *values: str) -> DeadLetter:
    return DeadLetter(
        daemon.slot,
        "public.loose",
        key,
        "0/1",
        "2026-01-01T00:00:00+00:00",
        "scripted",
        kind="sink_refused",
        first_seen="2026-01-01T00:00:00+00:00",
        last_seen="2026-01-01T00:00:00+00:00",
        key_values=values or None,
    )


def id_of(key: str) -> str:
    """The point id of a text key."""
    return hashed_id(f'["{key}"]')


def event(daemon: Daemon, name: str) -> bool:
    return any(found["event"] == name for found in daemon.events())


# -- one among ten thousand


@pytest.mark.requirement("R17")
@pytest.mark.parametrize("target", ["server", "edge"])
def test_a_poison_row_among_ten_thousand(
    database18: Database, sync_table: SyncTable, target: str
) -> None:
    database18.execute("CREATE TABLE loose (id bigint PRIMARY KEY, weight float8, emb vector(3))")
    synced = sync_loose(database18, sync_table, target=target)
    daemon = synced.daemon
    with database18.connect(autocommit=False) as connection:
        connection.execute(
            "INSERT INTO loose SELECT i, i, ARRAY[i, 1, 2]::vector FROM generate_series(1, 5000) i"
        )
        connection.execute("ALTER TABLE loose ALTER emb TYPE vector")
        connection.execute("INSERT INTO loose VALUES (20001, 'NaN', '[1,2,3,4]')")
        connection.execute(
            "INSERT INTO loose SELECT i, i, ARRAY[i, 1, 2]::vector"
            " FROM generate_series(5001, 9999) i"
        )
        # JSON has no NaN: a null, which is counted.
        connection.execute("INSERT INTO loose VALUES (10000, 'NaN', '[1,2,3]')")
        connection.commit()
    daemon.wait_caught_up()
    # The column has another type now, so the table is read again.
    daemon.wait(lambda: event(daemon, "resync_completed"), "the resync")
    (letter,) = letters(daemon)
    assert letter["table"] == "public.loose"
    assert letter["key"] == ["20001"]
    assert letter["kind"] == "mapping"
    assert "4" in letter["reason"]
    assert daemon.metric("cdc_sync_values_nulled_total") >= 1
    database18.execute("UPDATE loose SET emb = '[1,2,3]' WHERE id = 20001")
    retried = dlq(daemon, "retry", "--all", "--wait")
    assert retried.returncode == 0, retried.stdout + retried.stderr
    assert dlq(daemon, "list").stdout == "no dead letters\n"
    assert daemon.metric(PENDING) == 0
    synced.assert_equal()


# -- what releases a letter by itself


def test_updates_deletes_new_keys_and_truncation_release(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess
) -> None:
    create_loose(database18, 20, key="text")
    synced = sync_loose(database18, sync_table, qdrant=qdrant_private)
    daemon = synced.daemon
    database18.execute("UPDATE loose SET emb = '[1]' WHERE id IN ('1', '2', '3', '4', '5')")
    daemon.wait(lambda: daemon.metric(PENDING) == 5, "five dead letters")
    assert set(keys(daemon)) == {"1", "2", "3", "4", "5"}
    assert daemon.metric(TOTAL, kind="mapping") == 5
    database18.execute("UPDATE loose SET emb = '[7,8,9]' WHERE id = '1'")
    database18.execute("DELETE FROM loose WHERE id = '2'")
    # One is as bad under its new key, one is put right by the same change.
    database18.execute("UPDATE loose SET id = 'moved' WHERE id = '3'")
    database18.execute("UPDATE loose SET id = 'mended', emb = '[3,2,1]' WHERE id = '4'")
    database18.execute("UPDATE loose SET note = 'as bad as before' WHERE id = '5'")
    daemon.wait_caught_up()
    # The points of the bad rows stay as they were, unless their keys have changed.
    assert {d.id for d in synced.differences()} == {id_of("5")}
    assert set(keys(daemon)) == {"5", "moved"}
    assert {letter["attempts"] for letter in letters(daemon)} == {1, 2}
    database18.execute("TRUNCATE loose")
    synced.assert_equal()
    assert letters(daemon) == []
    assert daemon.metric(PENDING) == 0


# -- in copies


def test_poison_in_a_first_copy_and_in_a_resync(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess
) -> None:
    create_loose(database18, 2000)
    database18.execute("UPDATE loose SET emb = '[1]' WHERE id IN (7, 1200)")
    database18.execute("UPDATE loose SET emb = '[3e38,3e38,3e38]' WHERE id = 1999")
    synced = sync_table(
        database18,
        "loose",
        qdrant=qdrant_private,
        dimensions={"emb": 3},
        migration={"chunk_rows": 100},
        compare_options={"where": "id NOT IN (7, 1200, 1999)"},
    )
    daemon = synced.daemon
    synced.assert_equal()
    found = letters(daemon)
    assert {letter["key"][0] for letter in found} == {"7", "1200", "1999"}
    assert {letter["kind"] for letter in found} == {"mapping"}
    assert {letter["lsn"] for letter in found} == {None}
    # Those of this life are not tried again at once.
    assert daemon.metric(RETRIES) == 0
    database18.execute("UPDATE loose SET emb = '[1,2,3,4]' WHERE id = 7")
    daemon.wait(lambda: {one["attempts"] for one in letters(daemon)} == {1, 2}, "another try")
    daemon.wait_caught_up()
    resync_all(synced)
    synced.assert_equal()
    assert set(keys(daemon)) == {"7", "1200", "1999"}
    assert daemon.metric(PENDING) == 3
    database18.execute("UPDATE loose SET emb = '[4,5,6]' WHERE id IN (7, 1200, 1999)")
    resync_all(synced)
    daemon.wait_caught_up()
    assert letters(daemon) == []


def resync_all(synced: Synced) -> None:
    done = resync(synced, "--table", "loose", "--wait", "--timeout", "30")
    assert done.returncode == 0, done.stdout + done.stderr


# -- retrying


@pytest.mark.parametrize("target", ["server", "edge"])
def test_a_retry_reads_the_row_as_it_is(
    database18: Database, sync_table: SyncTable, target: str
) -> None:
    """Nothing in the stream says that these rows are good or gone: only the retry finds it."""
    create_loose(database18, 30, key="text")
    synced = sync_loose(database18, sync_table, target=target)
    daemon = synced.daemon
    assert daemon.terminate() == 0
    database18.execute("UPDATE loose SET emb = '[1]' WHERE id = '8'")
    put_letters(
        synced,
        letter_of(daemon, "3b1cf9a1-0000-5000-8000-000000000000", "5"),
        letter_of(daemon, "(key cannot be mapped)"),
    )
    done = dlq(daemon, "retry", "--all")
    assert done.returncode == 0, done.stderr
    assert "1 dead letters of public.loose have no key" in done.stdout
    assert "the request waits in the WAL until cdc-sync run does" in done.stdout
    daemon.start()
    daemon.wait(lambda: "8" in listed(daemon), "the dead letter of row 8")
    done = dlq(daemon, "retry", "--wait", "8")
    assert done.returncode == ExitCode.DATA
    assert "0 dead letters released, 1 left" in done.stdout
    (letter,) = (one for one in letters(daemon) if one["key"] == ["8"])
    assert letter["attempts"] == 2
    shown = dlq(daemon, "show", "8").stdout
    assert "tries       2" in shown
    assert "yes, by its key" in shown
    assert "no: its key has no point id" in dlq(daemon, "show", "(key cannot be mapped)").stdout
    database18.execute("UPDATE loose SET emb = '[8,8,8]' WHERE id = '8'")
    dlq(daemon, "retry", "--wait", "8")
    assert "8" not in listed(daemon)
    synced.assert_equal()


def listed(daemon: Daemon) -> str:
    return dlq(daemon, "list").stdout


def test_rows_that_qdrant_refused_are_written_by_a_retry(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    create_loose(database18, 10, key="text", dimensions=LONG)
    synced = sync_loose(database18, sync_table, qdrant=qdrant_private, dimensions=LONG)
    daemon = synced.daemon
    refuse(faults, database18, synced, 4)
    (letter,) = letters(daemon)
    assert (letter["key"], letter["kind"]) == (["4"], "sink_refused")
    assert synced.differences() != []
    done = dlq(daemon, "retry", "--table", "public.loose", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("1 dead letter released, 0 left\n")
    assert daemon.metric(RETRIES, result="written") == 1
    assert daemon.metric(TOTAL) == 1
    synced.assert_equal()


def test_the_start_tries_what_an_earlier_life_has_left(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    create_loose(database18, 10, dimensions=LONG)
    synced = sync_loose(database18, sync_table, qdrant=qdrant_private, dimensions=LONG)
    daemon = synced.daemon
    database18.execute("INSERT INTO loose VALUES (99, 'poison', 1, '[1]')")
    daemon.wait(lambda: daemon.metric(PENDING) == 1, "a dead letter")
    refuse(faults, database18, synced, 4, letters_after=2)
    daemon.wait_caught_up()
    assert daemon.terminate() == 0
    gone = letter_of(daemon, "777", "777")
    old = DeadLetter(daemon.slot, "public.loose", "5", "0/1", "2026-01-01T00:00:00Z", "of 0.1")
    put_letters(synced, gone, old, letter_of(daemon, "1", "no number"))
    daemon.start()
    daemon.wait(lambda: daemon.metric(PENDING) == 2, "the dead letters that are put right")
    daemon.wait(lambda: daemon.metric(RETRIES) == 5, "every retry")
    assert {(one["point_id"], one["attempts"]) for one in letters(daemon)} == {("99", 2), ("1", 1)}
    results = ("written", "deleted", "refused", "unreadable")
    assert [daemon.metric(RETRIES, result=result) for result in results] == [2, 1, 1, 1]
    assert daemon.metric(TOTAL) == 0
    assert "no number" not in daemon.log()
    synced.assert_equal()


def test_they_are_tried_every_so_often(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, faults: Faults
) -> None:
    create_loose(database18, 10, dimensions=LONG)
    synced = sync_loose(
        database18,
        sync_table,
        qdrant=qdrant_private,
        dimensions=LONG,
        pipeline={"dead_letter_retry_seconds": 1},
    )
    daemon = synced.daemon
    database18.execute("INSERT INTO loose VALUES (99, 'poison', 1, '[1]')")
    daemon.wait(lambda: daemon.metric(RETRIES, result="refused") >= 2, "two retries", 60)
    refuse(faults, database18, synced, 4, letters_after=2)
    daemon.wait(lambda: daemon.metric(RETRIES, result="written") == 1, "a retry", 60)
    daemon.wait_caught_up()
    (letter,) = letters(daemon)
    assert letter["attempts"] >= 3
    assert letter["first_seen"] < letter["last_seen"]
    assert daemon.metric(TOTAL) == 2
    synced.assert_equal()


async def test_another_configuration_of_the_collection_has_them_tried(
    database18: Database,
    qdrant_private: QdrantProcess,
    faults: Faults,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dead_letter_retries, "SCAN_SECONDS", 0.05)
    monkeypatch.setattr(dead_letter_retries, "LOOK_SECONDS", 0.1)
    create_loose(database18, 10, dimensions=LONG)
    table = {"name": "loose", "dimensions": {"emb": LONG}}
    settings = pipeline_settings(database18, qdrant_private, table)
    async with running(settings, database18, qdrant_private) as life:
        faults.reject("UpdateBatch", "INVALID_ARGUMENT", "Wrong input: scripted")
        database18.execute("UPDATE loose SET note = 'refused' WHERE id = 4")
        labels = {"table": "public.loose"}
        await life.wait(lambda: life.metric("dead_letters_pending", **labels) == 1, "a dead letter")
        await asyncio.sleep(2)
        assert life.metric("dead_letter_retries_total", **labels, result="refused") == 0
        assert life.metric("dead_letters_pending", **labels) == 1
        qdrant_private.client().update_collection(
            str(settings.tables[0].collection),
            optimizers_config=models.OptimizersConfigDiff(indexing_threshold=12345),
        )
        await life.wait(lambda: life.metric("dead_letters_pending", **labels) == 0, "its release")
        assert life.metric("dead_letter_retries_total", **labels, result="written") == 1
        await life.assert_equal()


# -- the limit


@pytest.mark.parametrize("way", ["drop", "fix", "raise"])
def test_it_stops_at_the_limit_and_goes_on_once_that_is_mended(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess, way: str
) -> None:
    """Also where the corrections come in the stream after the place where it stopped."""
    create_loose(database18, 40)
    synced = sync_loose(
        database18,
        sync_table,
        qdrant=qdrant_private,
        pipeline={"dead_letter_limit": 3, "batch_rows": 2},
    )
    daemon = synced.daemon
    for id_ in range(101, 105):
        database18.execute("INSERT INTO loose VALUES (%s, 'poison', 1, '[1]')", (id_,))
    stopped_by_the_limit(daemon)
    assert set(keys(daemon)) == {"101", "102", "103", "104"}
    # As it is, it stops again, however often it is started.
    daemon.start(wait=False)
    stopped_by_the_limit(daemon)
    if way == "drop":
        assert dlq(daemon, "drop", "101", "102").stdout.startswith("2 dead letters dropped\n")
    elif way == "fix":
        database18.execute("UPDATE loose SET note = 'something else' WHERE id <= 40")
        database18.execute("UPDATE loose SET emb = '[1,1,1]' WHERE id > 100")
    else:
        text = daemon.config.read_text()
        daemon.config.write_text(text.replace("dead_letter_limit = 3", "dead_letter_limit = 4"))
    daemon.start()
    daemon.wait_caught_up()
    left = {"drop": {"103", "104"}, "fix": set[str]()}
    assert set(keys(daemon)) == left.get(way, {"101", "102", "103", "104"})
    synced.assert_equal()


def stopped_by_the_limit(daemon: Daemon) -> None:
    assert daemon.process is not None
    assert daemon.process.wait(30) == ExitCode.DATA
    log = daemon.log()
    assert "4 rows could not be written, the limit is 3" in log
    assert "pipeline.dead_letter_limit" in log


# -- the command


def test_dropping_under_a_running_pipeline(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess
) -> None:
    create_loose(database18, 10)
    synced = sync_loose(
        database18, sync_table, qdrant=qdrant_private, pipeline={"dead_letter_limit": 2}
    )
    daemon = synced.daemon
    database18.execute("UPDATE loose SET emb = '[1]' WHERE id IN (1, 2)")
    daemon.wait(lambda: daemon.metric(PENDING) == 2, "two dead letters")
    assert dlq(daemon, "drop", "--all").stdout.startswith("2 dead letters dropped\n")
    assert letters(daemon) == []
    # The limit counts what is there, not what was.
    database18.execute("UPDATE loose SET emb = '[1]' WHERE id IN (3, 4)")
    daemon.wait(lambda: daemon.metric(TOTAL) == 4, "two more")
    daemon.wait_caught_up()
    assert set(keys(daemon)) == {"3", "4"}
    assert daemon.metric(PENDING) == 2


def test_an_embedded_database_that_the_pipeline_holds(
    database18: Database, sync_table: SyncTable
) -> None:
    create_loose(database18, 10)
    synced = sync_loose(database18, sync_table, target="edge")
    daemon = synced.daemon
    database18.execute("UPDATE loose SET emb = '[1]' WHERE id = 1")
    daemon.wait(lambda: daemon.metric(PENDING) == 1, "a dead letter")
    assert keys(daemon) == ["1"]
    refused = dlq(daemon, "drop", "1")
    assert refused.returncode == ExitCode.UNAVAILABLE
    assert "in use by another process" in refused.stderr
    assert daemon.terminate() == 0
    assert dlq(daemon, "drop", "1").returncode == 0
    assert letters(daemon) == []


def test_what_the_command_refuses(
    database18: Database, sync_table: SyncTable, qdrant_private: QdrantProcess
) -> None:
    create_loose(database18, 10)
    synced = sync_loose(database18, sync_table, qdrant=qdrant_private)
    daemon = synced.daemon
    database18.execute("UPDATE loose SET emb = '[1]' WHERE id = 1")
    daemon.wait(lambda: daemon.metric(PENDING) == 1, "a dead letter")
    for command in ("retry", "drop"):
        assert dlq(daemon, command).returncode == ExitCode.USAGE
        assert dlq(daemon, command, "--all", "1").returncode == ExitCode.USAGE
        missing = dlq(daemon, command, "1", "a-secret-key")
        assert missing.returncode == ExitCode.CONFIG
        assert "key 2 of the 2" in missing.stderr
        assert "a-secret-key" not in missing.stderr
        assert dlq(daemon, command, "--table", "a.b.c").returncode == ExitCode.CONFIG
    assert dlq(daemon, "list", "--table", "other").stdout == "no dead letters\n"
    assert dlq(daemon, "retry", "--table", "other").stdout == "no dead letters\n"
    for table in ("loose", "public.loose", '"public"."loose"', "Loose"):
        assert "a copy" not in dlq(daemon, "list", "--table", table).stdout
        assert len(dlq(daemon, "list", "--table", table).stdout.splitlines()) == 3
    assert keys(daemon) == ["1"]
