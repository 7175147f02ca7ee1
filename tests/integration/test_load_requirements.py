"""What a long copy does to the source and to other tables, and what it does not: the age of its
snapshots, transactions that are streamed before they are visible, what it remembers of them,
comparisons under load (R70, R71, R74, R78, R82)."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Iterator
from typing import Final

import pytest
from qdrant_client import models as q

from cdc_sync.postgres.replication import ReplicationConnection
from cdc_sync.qdrant.sink import Changes, TableWriter
from cdc_sync.rows import PointId
from cdc_sync.sync import recent_transactions, repairing
from cdc_sync.sync.recent_transactions import RecentTransactions
from tests.integration.test_visibility import hanging
from tests.support.fix_postgres import Database
from tests.support.ledger_log import events_of, logged
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.resync_command import emit
from tests.support.row_writers import RowWriters
from tests.support.source_tables import source_settings
from tests.support.windows import (
    DIM,
    DONE,
    EUCLID,
    LEFT,
    ROWS,
    Windows,
    create_paged,
    docs_settings,
    first_window,
    is_copied,
    vector,
)

pytestmark = pytest.mark.usefixtures("all_events")

# -- R70: no snapshot is older than its window


class SnapshotWatch:
    """Writes steadily, and looks for how long our sessions hold back the removal of dead rows, in a
    thread: in seconds, and in transactions."""

    def __init__(self, database: Database) -> None:
        self.ages: list[tuple[float, int]] = []
        self._database = database
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        oldest = (
            "SELECT max(extract(epoch FROM clock_timestamp() - xact_start))::float8,"
            " max(age(backend_xmin)) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_xmin IS NOT NULL AND application_name LIKE 'cdc_sync%%'"
        )
        with self._database.connect() as connection:
            for number in itertools.count():
                if self._stopping.wait(0.005):
                    return
                connection.execute("UPDATE docs SET n = %s WHERE id = 1", (number,))
                row = connection.execute(oldest).fetchone()
                if row is not None and None not in row:
                    self.ages.append((float(str(row[0])), int(str(row[1]))))

    def finish(self) -> list[tuple[float, int]]:
        self._stopping.set()
        self._thread.join(10)
        return self.ages


@pytest.mark.requirement("R70")
async def test_no_snapshot_is_held_for_longer_than_a_window(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    create_paged(database18, 1_500)
    settings = pipeline_settings(
        database18,
        qdrant,
        {"name": "docs", **EUCLID},
        migration={"window_seconds": 0.5, "chunk_rows": 100, "batch_delay": 500},
    )
    started = time.monotonic()
    ((first_xid,),) = database18.execute("SELECT pg_current_xact_id()::text::int8")
    async with running(settings, database18, qdrant, wait=False) as life:
        watch = SnapshotWatch(database18)
        try:
            await life.wait_streaming()
        finally:
            ages = watch.finish()
        seconds = time.monotonic() - started
        ((last_xid,),) = database18.execute("SELECT pg_current_xact_id()::text::int8")
        await life.assert_equal()
    closed = [
        float(str(event["seconds"]))
        for event in events_of(caplog.records)
        if event["event"] == "window_closed"
    ]
    assert len(closed) >= 5
    # The first window is not logged so; to each belong taking the snapshot and letting go of it.
    longest = max(closed) + 1.0
    assert seconds > 2 * longest, f"{seconds} s in windows of {longest} s show nothing"
    assert max(age for age, _ in ages) < longest
    transactions = int(str(last_xid)) - int(str(first_xid))
    assert max(age for _, age in ages) < transactions / 2


# -- R71


@pytest.mark.requirement("R71")
async def test_a_truncate_that_is_not_visible_yet_is_not_undone_by_a_window(
    unseen: Database, qdrant: QdrantTarget, windows: Windows, caplog: pytest.LogCaptureFixture
) -> None:
    async with first_window(unseen, qdrant) as life:
        with hanging(unseen, "TRUNCATE docs") as commit:
            await life.wait(lambda: not is_copied(life, DONE), "the truncation")
            windows.limit = 1_000
            await life.wait(lambda: logged(caplog, "window_postponed") > 0, "a window")
            assert commit.waits
        await windows.finish(life)
        await life.assert_equal()


class LateStandby:
    """A synchronous standby, as far as the server can tell, that answers late: commits are streamed
    to others long before they are visible."""

    NAME: Final = "late_standby"

    def __init__(self, database: Database, delay_seconds: float) -> None:
        self._database = database
        self._delay_seconds = delay_seconds
        self._stopping = threading.Event()
        self._connection = ReplicationConnection.open(
            source_settings(database.url), application_name=self.NAME
        )
        self._connection.create_slot(self.NAME, lock_timeout_seconds=10)
        self._connection.close()
        self._connection = ReplicationConnection.open(
            source_settings(database.url), application_name=self.NAME
        )
        database.execute(f"CREATE PUBLICATION {self.NAME} FOR TABLE docs")
        self._connection.start(self.NAME, self.NAME)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        waiting: list[tuple[float, int]] = []
        while not self._stopping.is_set():
            self._connection.read()
            now = time.monotonic()
            received = int(self._connection.received_lsn)
            if not waiting or waiting[-1][1] < received:
                waiting.append((now + self._delay_seconds, received))
            due = [lsn for at, lsn in waiting if at <= now]
            if due:
                waiting = [one for one in waiting if one[0] > now]
                self._connection.send_status(due[-1], due[-1])
            time.sleep(0.005)

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(10)
        self._connection.close()
        self._database.execute(f"DROP PUBLICATION {self.NAME}")


@contextlib.contextmanager
def late_standby(database: Database, delay_seconds: float) -> Iterator[None]:
    def set_names(command: str, expected: str) -> None:
        with database.connect() as connection:
            connection.execute(command.encode())
            connection.execute("SELECT pg_reload_conf()")
            end = time.monotonic() + 10
            while connection.execute("SHOW synchronous_standby_names").fetchone() != (expected,):
                assert time.monotonic() < end
                time.sleep(0.01)

    standby = LateStandby(database, delay_seconds)
    try:
        name = LateStandby.NAME
        set_names(f"ALTER SYSTEM SET synchronous_standby_names = '{name}'", name)
        yield
    finally:
        set_names("ALTER SYSTEM RESET synchronous_standby_names", "")
        standby.close()


@pytest.mark.requirement("R71")
@pytest.mark.slow
@pytest.mark.campaign
async def test_windows_under_eight_writers_and_a_late_standby(
    unseen: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    settings = pipeline_settings(
        unseen,
        qdrant,
        {"name": "docs", **EUCLID},
        migration={"window_seconds": 0.01, "chunk_rows": 100, "batch_delay": 50},
    )
    # Longer than it takes to get a snapshot, so that there is always something invisible.
    with late_standby(unseen, 0.5), RowWriters(unseen, 8).writing():
        async with running(settings, unseen, qdrant, wait=False) as life:
            await life.wait(lambda: logged(caplog, "window_closed") >= 3, "windows")
            await life.stop()
    async with running(settings, unseen, qdrant) as life:
        await life.assert_equal()


# -- R74: what is known of applied transactions


@pytest.mark.requirement("R74", "R75")
@pytest.mark.parametrize("first", [1_000, (1 << 32) - 500_000, (3 << 32) - 1])
def test_a_million_transactions_are_not_kept_and_none_is_guessed_about(first: int) -> None:
    """None of them has been seen in a snapshot; one is still running."""
    last = first + 1_000_000
    for xid in (first, first + 500_000, last - 1):
        recent = RecentTransactions(first)
        most = 0
        for applied in range(first, last):
            recent.add(applied & 0xFFFFFFFF)
            most = max(most, len(recent))
        assert most <= recent_transactions._MOST_TRANSACTIONS
        # What is not known by id any more is waited for as a whole, the rest one by one.
        assert last - most <= recent.horizon <= last
        assert not recent.all_visible(xid, last, frozenset([xid])), xid
        assert recent.all_visible(last, last, frozenset())
        assert len(recent) == 0


@pytest.mark.requirement("R74")
def test_what_a_snapshot_has_shown_is_forgotten_although_an_older_one_runs() -> None:
    recent = RecentTransactions(100)
    for xid in (150, 160, 170, 200):
        recent.add(xid)
    recent.forget(100, 200, frozenset([100, 160]))
    # 160 is running, as far as anybody can see, and 200 is younger than the snapshot.
    assert recent.pending() == {160, 200}
    assert not recent.all_visible(160, 201, frozenset([160]))
    assert recent.pending() == {160}
    assert recent.all_visible(161, 201, frozenset())


@pytest.mark.requirement("R74")
async def test_transactions_are_forgotten_under_an_old_one(
    database18: Database, qdrant: QdrantTarget
) -> None:
    create_paged(database18, 10)
    settings = pipeline_settings(database18, qdrant, {"name": "docs", **EUCLID})
    with database18.connect(autocommit=False) as old:
        async with running(settings, database18, qdrant) as life:
            old.execute("UPDATE docs SET note = 'open' WHERE id = 1")
            with database18.connect() as connection:
                for n in range(300):
                    connection.execute("UPDATE docs SET n = %s WHERE id = 2", (n,))
            await life.caught_up()
            recent = life.pipeline._resync
            assert recent is not None
            await life.wait(lambda: len(recent.applied_lately()) == 0, "a look at the server")
            old.rollback()
            await life.assert_equal()


@pytest.mark.requirement("R74", "R71")
async def test_too_many_to_be_kept_are_waited_for(
    unseen: Database,
    qdrant: QdrantTarget,
    windows: Windows,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that is streamed and not visible is among them."""
    monkeypatch.setattr(recent_transactions, "_MOST_TRANSACTIONS", 0)
    async with first_window(unseen, qdrant) as life:
        seen = life.metric("received_messages_total", kind="commit")
        with hanging(unseen, f"UPDATE docs SET emb = {vector('0')} WHERE id = {LEFT}") as commit:
            await life.wait(
                lambda: life.metric("received_messages_total", kind="commit") > seen, "the commit"
            )
            await life.wait(lambda: not life.pipeline.positions.oldest_commit, "its application")
            closed, windows.limit = windows.closed, 1_000
            await life.wait(lambda: logged(caplog, "window_postponed") > 2, "a window")
            assert commit.waits
            assert windows.closed == closed
        await windows.finish(life)
        await life.assert_equal()


# -- R78: comparing under load


@pytest.mark.requirement("R78", "R72")
async def test_a_comparison_under_writers_finds_what_was_seeded_and_no_more(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rows that nobody changes meanwhile; the others have to be right in the end."""
    create_paged(database18, ROWS)
    settings = docs_settings(database18, qdrant)
    collection = str(settings.tables[0].collection)
    async with running(settings, database18, qdrant) as life:
        await life.stop()
    database18.execute("SELECT pg_drop_replication_slot(%s)", (settings.source.slot,))
    other_vectors, other_payloads, gone, extra = (
        (13, 501),
        (14, 502, 990),
        (15, 503),
        (4_004, 4_005),
    )
    client = qdrant.client()
    spoiled = [q.PointVectors(id=id_, vector={"emb": [0.5] * DIM}) for id_ in other_vectors]
    client.update_vectors(collection, spoiled, wait=True)
    client.set_payload(collection, {"note": "another"}, points=list(other_payloads), wait=True)
    client.delete(collection, list(gone), wait=True)
    strange = [q.PointStruct(id=id_, vector={"emb": [0.5] * DIM}, payload={}) for id_ in extra]
    client.upsert(collection, strange, wait=True)
    different: list[PointId] = []
    missing: list[PointId] = []
    compare = repairing._compare

    async def noting(writer: TableWriter, changes: Changes) -> object:
        findings = await compare(writer, changes)
        different.extend(findings.different)
        missing.extend(findings.missing)
        return findings

    monkeypatch.setattr(repairing, "_compare", noting)
    adopting = pipeline_settings(
        database18,
        qdrant,
        {"name": "docs", "collection": collection, **EUCLID},
        migration={"adopt": True, "window_seconds": 0.01, "chunk_rows": 100, "batch_delay": 100},
    )
    with RowWriters(database18, 3).writing():
        async with running(adopting, database18, qdrant) as life:
            assert life.metric("orphans_total", table="public.docs") >= len(extra)
            await life.stop()
    assert sorted(filter(quiet, different)) == sorted((*other_vectors, *other_payloads))
    assert sorted(filter(quiet, missing)) == sorted(gone)
    async with running(adopting, database18, qdrant) as life:
        await life.assert_equal()


def quiet(id_: PointId) -> bool:
    """Whether it is a row of none of three writers."""
    return isinstance(id_, int) and id_ % 8 >= 3


# -- R82: one table again, beside others


@pytest.mark.requirement("R82")
async def test_another_table_is_not_held_up_for_longer_than_a_window(
    database18: Database, qdrant: QdrantTarget, caplog: pytest.LogCaptureFixture
) -> None:
    """The slot and its stream stay what they are."""
    create_paged(database18, ROWS)
    create_paged(database18, 10, "notes")
    settings = pipeline_settings(
        database18,
        qdrant,
        {"name": "docs", **EUCLID},
        {"name": "notes", **EUCLID},
        migration={"window_seconds": 0.1, "chunk_rows": 100, "batch_delay": 200},
    )
    notes = str(settings.tables[1].collection)
    client = qdrant.client()

    async def follow(life: Running, number: int) -> float:
        """Seconds until a change is there."""
        database18.execute("UPDATE notes SET n = %s WHERE id = 5", (number,))
        started = time.monotonic()

        def is_there() -> bool:
            (point,) = client.retrieve(notes, [5])
            return (point.payload or {}).get("n") == number

        await life.wait(is_there, "the change")
        return time.monotonic() - started

    slot = "SELECT slot_name, active_pid FROM pg_replication_slots"
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        before = database18.execute(slot)
        at_rest = max([await follow(life, number) for number in range(5)])
        closed = logged(caplog, "window_closed")
        body = {"pipeline": settings.pipeline.name, "table": "public.docs"}
        emit(database18, json.dumps({"resync": body}))
        lags = []
        for number in itertools.count(100):
            lags.append(await follow(life, number))
            if logged(caplog, "resync_completed"):
                break
        assert database18.execute(slot) == before
        await life.assert_equal()
    events = [e for e in events_of(caplog.records) if e["event"] == "window_closed"]
    windows = [float(str(event["seconds"])) for event in events[closed:]]
    assert len(windows) >= 5
    assert len(lags) >= 5
    # Taking a snapshot comes to that.
    assert max(lags) < 2 * (at_rest + max(windows)) + 1.0, f"{lags} in windows of {windows}"
    assert sum(windows) > max(lags), f"{lags} in windows of {windows}"
