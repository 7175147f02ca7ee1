"""The WAL that the slot keeps while tables are copied: measured, bounded, and waited for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import pytest

from cdc_sync.config import Settings
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.snapshot import SnapshotHolder
from cdc_sync.postgres.watch import WalLimits, log_standby_snapshot, wal_limits
from cdc_sync.sync import retention
from cdc_sync.sync.backfill import Backfill
from cdc_sync.sync.routing import PlannedTable
from tests.support.fix_postgres import Database, DatabaseFactory, PrivatePostgres
from tests.support.ledger_log import Event, check_ledger, count, events_of
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.source_tables import source_settings
from tests.support.windows import EUCLID, ONE_CHUNK, Windows, create_paged, first_window

MB: Final = 1 << 20
SEGMENT: Final = 16 * MB
_RETAINED: Final = """
    SELECT pg_current_wal_insert_lsn() - '0/0', pg_current_wal_insert_lsn() - restart_lsn,
           wal_status
      FROM pg_replication_slots WHERE slot_name = %s
"""

pytestmark = pytest.mark.usefixtures("all_events")


class WalWriter:
    """A thread that writes so much WAL a second, changes a row of ``docs`` now and then, and looks
    at what the slot keeps.

    ``record_seconds``: how often it has the running transactions logged, as the server does it
    every 15 seconds by itself.
    """

    def __init__(
        self,
        database: Database,
        slot: str,
        *,
        bytes_per_second: int,
        record_seconds: float | None = None,
    ) -> None:
        #: What the slot kept, in bytes, look by look.
        self.retained: list[int] = []
        self.statuses: set[str] = set()
        self._database = database
        self._slot = slot
        self._rate = bytes_per_second
        self._record_seconds = record_seconds
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            with self._database.connect() as connection:
                started = recorded = time.monotonic()
                written = 0
                while not self._stopping.wait(0.02):
                    # A slow machine writes as much, in larger pieces.
                    missing = int((time.monotonic() - started) * self._rate) - written
                    if missing > 0:
                        size = min(missing, MB)
                        connection.execute(
                            "SELECT pg_logical_emit_message(false, 'tests', repeat('x', %s))",
                            (size,),
                        )
                        written += size
                    connection.execute("UPDATE docs SET n = n + 1 WHERE id = 1")
                    if self._record_seconds and time.monotonic() - recorded > self._record_seconds:
                        connection.execute("SELECT pg_log_standby_snapshot()")
                        recorded = time.monotonic()
                    row = connection.execute(_RETAINED, (self._slot,)).fetchone()
                    if row is not None:
                        self.statuses.add(str(row[2]))
                        if row[1] is not None:
                            self.retained.append(int(str(row[1])))
        except BaseException as error:  # noqa: BLE001 - raised by finish() in the test's thread
            self._error = error

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        self._stopping.set()
        self._thread.join(20)
        if self._error is not None:
            raise self._error


@contextmanager
def writing(writer: WalWriter) -> Iterator[WalWriter]:
    writer.start()
    try:
        yield writer
    finally:
        writer.finish()


@dataclass
class WindowLog:
    """What was written and kept when windows were opened and closed, in bytes."""

    written: list[int] = field(default_factory=list)
    retained: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, monkeypatch: pytest.MonkeyPatch, database: Database, slot: str) -> WindowLog:
        log, window = cls(), Backfill.window

        def look() -> tuple[int, int]:
            ((end, kept, _),) = database.execute(_RETAINED, (slot,))
            return int(str(end)), int(str(kept))

        async def measured(
            self: Backfill, tables: Sequence[PlannedTable], holder: SnapshotHolder
        ) -> list[PlannedTable]:
            before, kept = await asyncio.to_thread(look)
            try:
                return await window(self, tables, holder)
            finally:
                log.retained.append(kept)
                log.written.append((await asyncio.to_thread(look))[0] - before)

        monkeypatch.setattr(Backfill, "window", measured)
        return log


def docs(
    database: Database,
    qdrant: QdrantTarget,
    migration: Mapping[str, object],
    pg_url: str | None = None,
) -> Settings:
    return pipeline_settings(
        database, qdrant, {"name": "docs", **EUCLID}, migration=migration, pg_url=pg_url
    )


async def copied(life: Running, seconds: float = 100.0) -> None:
    """Until everything is copied."""
    life.patience_seconds = seconds
    await life.wait_streaming()


def waiting_for(life: Running) -> str | None:
    """What ``/status`` says why nothing of the table is copied."""
    tables = life.pipeline.board.snapshot()["tables"]
    assert isinstance(tables, list)
    return next((str(table["waiting"]) for table in tables if table["waiting"]), None)


def by_window(events: Sequence[Event]) -> list[int]:
    """Chunks copied in each window that is closed, the first copy's first."""
    chunks, current = [], 0
    for event in events:
        if event["event"] == "chunk_copied":
            current += 1
        elif event["event"] in ("first_window_closed", "window_closed"):
            chunks.append(current)
            current = 0
    return chunks


# -- what is kept, by the beginning of the slot


@pytest.mark.slow
@pytest.mark.requirement("R70", "R80")
@pytest.mark.parametrize(
    "hastened",
    [
        pytest.param(False, id="by_itself"),
        pytest.param(True, id="hastened", marks=pytest.mark.campaign),
    ],
)
async def test_the_slot_keeps_less_than_twice_what_a_window_writes(
    database18: Database,
    qdrant: QdrantTarget,
    monkeypatch: pytest.MonkeyPatch,
    hastened: bool,
) -> None:
    """By ``restart_lsn``, which is what counts for the server's disk. Windows of 4 seconds, where
    running transactions are logged every half, stand for windows of two minutes: the server does it
    every 15 seconds. It need not where the role may have it done."""
    create_paged(database18, 2_200)
    role = database18.create_cdc_role(["docs"])
    migration = {"window_seconds": 4.0, "chunk_rows": 100, "batch_delay": 1000}
    settings = docs(database18, qdrant, migration, role.url)
    slot = settings.source.slot
    database18.execute(f'CREATE PUBLICATION "{settings.source.publication}" FOR TABLE docs')
    if hastened:
        database18.execute(f"GRANT EXECUTE ON FUNCTION pg_log_standby_snapshot() TO {role.name}")
    windows = WindowLog.of(monkeypatch, database18, slot)
    writer = WalWriter(
        database18,
        slot,
        bytes_per_second=10 * MB,
        record_seconds=None if hastened else 0.5,
    )
    async with running(settings, database18, qdrant, wait=False) as life:
        with writing(writer):
            await copied(life)
        await life.assert_equal()
    most, window = max(writer.retained), max(windows.written)
    measured = f"{in_mb([most])} kept; written {in_mb(windows.written)}; kept before a window"
    measured += f" {in_mb(windows.retained)}"
    assert len(windows.written) >= 4
    assert window > 2 * SEGMENT, "less than Postgres keeps in any case"
    assert most < 2 * window, measured
    # One window for all of it would show.
    assert sum(windows.written) > 2.5 * window, measured


def in_mb(sizes: Sequence[int]) -> str:
    return ", ".join(f"{size / MB:.1f}" for size in sizes) + " MB"


# -- a budget


@pytest.mark.requirement("R80")
async def test_a_tiny_budget_ends_windows_early_and_the_copy_gets_on(
    database18: Database,
    qdrant: QdrantTarget,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    create_paged(database18, 1_500)
    budget = MB
    migration = {
        "window_seconds": 60.0, "chunk_rows": 100, "batch_delay": 700,
        "max_retained_wal_bytes": budget,
    }  # fmt: skip
    settings = docs(database18, qdrant, migration)
    windows = WindowLog.of(monkeypatch, database18, settings.source.slot)
    writer = WalWriter(database18, settings.source.slot, bytes_per_second=MB // 2)
    async with running(settings, database18, qdrant, wait=False) as life:
        with writing(writer):
            await life.wait(lambda: waiting_for(life) is not None, "the wait")
            reason = waiting_for(life)
            assert reason is not None
            assert "of WAL; the copy goes on once that is less than 524.3 kB" in reason
            await life.wait(lambda: waiting_for(life) is None, "the next window")
            await copied(life)
        await life.assert_equal()
    events = events_of(caplog.records)
    chunks = by_window(events)
    assert len(chunks) >= 3
    assert all(chunks), f"{chunks}: a window that got no further"
    assert sum(chunks) == -(-1_500 // 128)
    assert check_ledger(events).faults == []
    assert count(events, "window_ended_early") >= len(chunks) - 1
    # It may have been brought down before anybody looks.
    waits = count(events, "copy_waits_for_wal")
    assert 1 <= count(events, "copy_goes_on") <= waits <= len(chunks) - 1
    # The stream has brought it down before each but the first.
    assert max(windows.retained[1:]) < budget
    # Chunks in progress are finished, so a little more than the budget.
    assert max(writer.retained) < 3 * budget


@pytest.mark.requirement("R80")
async def test_a_budget_smaller_than_anything_still_copies_a_chunk_a_window(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """It is over the budget from the beginning, in every window."""
    create_paged(database18, 600)
    migration = {"window_seconds": 60.0, "chunk_rows": 100, "batch_delay": 1200}
    settings = docs(database18, qdrant, {**migration, "max_retained_wal_bytes": 20_000})
    writer = WalWriter(database18, settings.source.slot, bytes_per_second=40_000)
    async with running(settings, database18, qdrant, wait=False) as life:
        writer.start()
        await life.wait(lambda: "window_ended_early" in names(caplog), "the first window's end")
        await life.wait(lambda: "first_window_closed" in names(caplog), "it closed")
        # While so much is written there is no room for another.
        await asyncio.sleep(1)
        assert by_window(events_of(caplog.records)) == [1]
        writer.finish()
        await copied(life)
        await life.assert_equal()
    assert all(by_window(events_of(caplog.records)))


def names(caplog: pytest.LogCaptureFixture) -> set[object]:
    return {event["event"] for event in events_of(caplog.records)}


@pytest.mark.requirement("R80")
async def test_a_transaction_that_keeps_the_wal_is_named_and_the_stream_goes_on(
    database18: Database,
    qdrant: QdrantTarget,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(retention, "_STUCK_SECONDS", 0.5)
    create_paged(database18, 1_000)
    windows = Windows(monkeypatch)
    budget = {"max_retained_wal_bytes": 300_000}
    settings = docs(database18, qdrant, {**ONE_CHUNK, **budget})
    async with first_window(database18, qdrant, settings) as life:
        with database18.connect(autocommit=False) as other:
            other.execute("SET application_name = 'somebody'")
            other.execute("UPDATE docs SET note = 'open' WHERE id = 5")
            database18.execute(
                "SELECT pg_log_standby_snapshot();"
                "SELECT pg_logical_emit_message(false, 'tests', repeat('x', 300000))"
            )
            windows.limit = 1_000
            named = f"open transactions hold it: process {other.info.backend_pid} (somebody)"
            await life.wait(lambda: named in (waiting_for(life) or ""), "the reason")
            closed = windows.closed
            for n in range(5):
                database18.execute("UPDATE docs SET n = %s WHERE id = 6", (n,))
                await life.caught_up()
            assert windows.closed == closed
            assert life.metric("changes_total", table="public.docs", op="update") == 5
            assert life.metric("slot_retained_wal_bytes") > 300_000
            other.commit()
        await windows.finish(life)
        await life.assert_equal()
        assert waiting_for(life) is None
    # It is said when it begins, and with the reason; then once a minute.
    assert 2 <= count(events_of(caplog.records), "copy_waits_for_wal") <= 3


# -- max_slot_wal_keep_size


@pytest.fixture
def limited(private_postgres: PrivatePostgres, database18_factory: DatabaseFactory) -> Database:
    """On a server that takes a slot away at 64 MB, at each of its many checkpoints."""
    server = private_postgres(
        {
            "max_slot_wal_keep_size": "64MB",
            "max_wal_size": "64MB",
            "min_wal_size": "32MB",
            "checkpoint_timeout": "30s",
            "wal_keep_size": "0",
        }
    )
    return database18_factory(server)


@pytest.mark.slow
@pytest.mark.requirement("R80")
@pytest.mark.campaign
async def test_a_long_copy_under_writers_does_not_cost_the_slot(
    limited: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """One window for all of it would be long enough to lose it three times."""
    create_paged(limited, 1_500)
    settings = docs(
        limited, qdrant, {"window_seconds": 600.0, "chunk_rows": 100, "batch_delay": 1500}
    )
    writer = WalWriter(limited, settings.source.slot, bytes_per_second=8 * MB)
    async with running(settings, limited, qdrant, wait=False) as life:
        with writing(writer):
            await copied(life)
        await life.assert_equal()
    events = events_of(caplog.records)
    assert "lost" not in writer.statuses
    # A segment more than is counted against the slot may be there.
    assert max(writer.retained) < (64 + 16) * MB
    assert count(events, "window_ended_early") >= 2
    assert count(events, "copy_started") == 1
    assert check_ledger(events).faults == []
    assert all(by_window(events))


@pytest.mark.campaign
@pytest.mark.requirement("R80")
async def test_a_chunk_that_takes_too_long_is_given_up_and_made_smaller(
    limited: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """One chunk of the whole table, which takes longer than the slot lives."""
    create_paged(limited, 400)
    settings = docs(
        limited,
        qdrant,
        {"window_seconds": 600.0, "chunk_rows": 5_000, "batch_size": 10, "batch_delay": 250},
    )
    writer = WalWriter(limited, settings.source.slot, bytes_per_second=8 * MB)
    async with running(settings, limited, qdrant, wait=False) as life:
        with writing(writer):
            await copied(life)
        await life.assert_equal()
    events = events_of(caplog.records)
    assert "lost" not in writer.statuses
    assert count(events, "window_cut_short") >= 1
    assert count(events, "copy_started") == 1
    assert check_ledger(events).faults == []


# -- what is shown


@pytest.mark.requirement("R80")
async def test_age_and_wal_are_reported_while_a_window_is_open(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """In the first window too, while nothing streams; and not between windows."""
    create_paged(database18, 300)
    settings = docs(
        database18, qdrant, {"window_seconds": 30.0, "chunk_rows": 100, "batch_delay": 1500}
    )
    async with running(settings, database18, qdrant, wait=False) as life:
        began = time.time()
        await life.wait(lambda: life.metric("snapshot_taken_timestamp_seconds") > 0, "a window")
        assert life.state == "snapshotting"
        assert began - 30 < life.metric("snapshot_taken_timestamp_seconds") <= time.time()
        for _ in range(20):
            database18.execute("SELECT pg_current_xact_id()")
        database18.execute("SELECT pg_logical_emit_message(false, 'tests', repeat('x', 500000))")
        await life.wait(lambda: life.metric("snapshot_xmin_age_transactions") >= 20, "the age")
        await life.wait(lambda: life.metric("slot_retained_wal_bytes") >= 500_000, "the WAL")
        assert life.pipeline._streaming is None
        await copied(life)
        registry = life.pipeline.metrics.registry
        for name in ("taken_timestamp_seconds", "xmin_age_transactions"):
            assert registry.get_sample_value(f"cdc_sync_snapshot_{name}") is None


# -- what the server says


def test_what_a_slot_may_keep_goes_by_whole_segments(
    private_postgres: PrivatePostgres, database18_factory: DatabaseFactory
) -> None:
    """And what the server keeps for everybody counts."""
    database = database18_factory(private_postgres())
    cases = {
        ("64MB", "0"): 64 * MB,
        ("40MB", "0"): 32 * MB,
        ("3MB", "0"): SEGMENT,
        ("32MB", "160MB"): 160 * MB,
        ("0", "0"): SEGMENT,
        ("-1", "160MB"): None,
    }
    with connect(source_settings(database.url)) as connection:
        for (slot, everybody), expected in cases.items():
            database.execute(f"ALTER SYSTEM SET max_slot_wal_keep_size = '{slot}'")
            database.execute(f"ALTER SYSTEM SET wal_keep_size = '{everybody}'")
            database.execute("SELECT pg_reload_conf()")
            deadline = time.monotonic() + 10
            while wal_limits(connection) != WalLimits(SEGMENT, expected):
                assert time.monotonic() < deadline, (slot, wal_limits(connection))
                time.sleep(0.05)


def test_running_transactions_are_logged_where_the_role_may(protocol_database: Database) -> None:
    protocol_database.execute("CREATE TABLE docs (id int PRIMARY KEY)")
    role = protocol_database.create_cdc_role(["docs"])
    with connect(source_settings(role.url)) as connection:
        assert not log_standby_snapshot(connection)
        if protocol_database.major >= 16:
            protocol_database.execute(
                f"GRANT EXECUTE ON FUNCTION pg_log_standby_snapshot() TO {role.name}"
            )
            assert log_standby_snapshot(connection)
    with connect(source_settings(protocol_database.url)) as connection:
        assert log_standby_snapshot(connection) == (protocol_database.major >= 16)
