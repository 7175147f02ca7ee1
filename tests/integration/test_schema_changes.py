"""Changes of a table's definition: columns come, go and are renamed, types change, rows are
rewritten; with rows changed at the same time or not at all, while the pipeline runs, is down, or is
killed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import SecretStr

from cdc_sync.config import (
    MigrationSettings,
    PipelineSettings,
    QdrantSettings,
    Settings,
    SourceSettings,
    TableSettings,
)
from tests.support import breaks
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.oracle import compare
from tests.support.pipeline_process import Break, PipelineProcess, PipelineStatus
from tests.support.qdrant_control import QdrantTarget

DIM = 640
CREATE = f"""
CREATE TYPE mood AS ENUM ('glad', 'sad');
CREATE TABLE docs (id bigint PRIMARY KEY, note text, n int, label varchar(20), feeling mood,
                   emb vector({DIM}), side vector(4));
INSERT INTO docs SELECT i, 'note ' || i, i, 'label', 'glad',
  array_fill((i + 1)::float4 / 8, ARRAY[{DIM}])::vector, '[1,2,3,4]' FROM generate_series(1, 6) i;
"""


@dataclass
class Followed:
    """A table and the pipeline that follows it."""

    database: Database
    settings: Settings
    qdrant: QdrantTarget
    collection: str
    log_path: Path
    stack: ExitStack = field(default_factory=ExitStack)
    table: str = "docs"
    sabotage: Break | None = None
    columns: list[str] | None = None
    pipeline_: PipelineProcess | None = None

    @property
    def pipeline(self) -> PipelineProcess:
        assert self.pipeline_ is not None, "the pipeline is not running"
        return self.pipeline_

    def start(self, wait: bool = True) -> None:
        self.pipeline_ = PipelineProcess(self.settings, self.log_path, self.sabotage)
        self.stack.callback(self.pipeline_.close)
        if wait:
            self.pipeline.wait_streaming()

    def stop(self) -> None:
        end = self.pipeline.stop()
        assert end.exit_code == 0, end

    def execute(self, *statements: str) -> None:
        """In one transaction."""
        self.database.execute("BEGIN; " + "; ".join(statements) + "; COMMIT")

    def wait_confirmed(self) -> None:
        """Wait until everything written by now is confirmed, whatever is stale."""
        with self.database.connect() as connection:
            row = connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchone()
            assert row is not None
            lsn = int(str(row[0]))
            connection.execute("SELECT pg_logical_emit_message(false, 'tests', '')")
            self.pipeline.wait(lambda status: status.confirmed >= lsn, "the last position")

    def wait_for_log(self, event: str) -> None:
        self.pipeline.wait(lambda _: event in self.pipeline.log(100_000), event)

    def wait_stopped(self, *says: str) -> None:
        """Wait until the table is stopped, by an error with these patterns, and a remedy."""
        name = "public.docs"

        def stopped(status: PipelineStatus) -> bool:
            error, remedy = status.stopped.get(name, ("", ""))
            return bool(remedy) and all(re.search(one, error) for one in says)

        self.pipeline.wait(stopped, f"the stop: {says}")

    def points(self) -> dict[str, dict[str, object]]:
        """Payloads by point id."""
        found, _ = self.qdrant.client().scroll(self.collection, limit=1000)
        return {str(point.id): dict(point.payload or {}) for point in found}

    def assert_equal(self) -> None:
        """Compare once everything has settled."""
        with self.database.connect() as connection:
            self.pipeline.wait_settled(connection)
        differences = compare(
            self.database.url,
            self.table,
            qdrant_url=self.qdrant.url,
            collection=self.collection,
            columns=self.columns,
        )
        shown = "\n".join(str(one) for one in differences[:20])
        assert not differences, f"{shown}\n{self.pipeline.log()}"


Follow = Callable[..., Followed]


@pytest.fixture
def follow(database18: Database, qdrant: QdrantTarget, tmp_path: Path) -> Iterator[Follow]:
    """Create the table and start a pipeline on it (``start=False``: do not); ``collection=None``
    leaves the collection's name to the product."""
    with ExitStack() as stack:

        def make(*, start: bool = True, collection: str | None = "") -> Followed:
            database18.execute(CREATE)
            name = database18.name
            if collection == "":
                collection = qdrant.new_collection_name()
            settings = Settings(
                source=SourceSettings(url=SecretStr(database18.url), slot=name, publication=name),
                qdrant=QdrantSettings(url=qdrant.url),
                tables=[TableSettings(name="docs", collection=collection)],
                pipeline=PipelineSettings(name=name),
                migration=MigrationSettings(num_workers=1),
            )
            followed = Followed(
                database18, settings, qdrant, collection or "docs", tmp_path / "pipeline.log", stack
            )
            if start:
                followed.start()
            return followed

        yield make


CHANGES = {
    "add": "ALTER TABLE docs ADD COLUMN added int",
    "add with default": "ALTER TABLE docs ADD COLUMN added text DEFAULT 'given'",
    "add with volatile default": "ALTER TABLE docs ADD COLUMN added float8 DEFAULT random()",
    "drop": "ALTER TABLE docs DROP COLUMN label",
    "drop and add again": "ALTER TABLE docs DROP COLUMN label, ADD COLUMN label varchar(20)",
    "rename": "ALTER TABLE docs RENAME COLUMN label TO title",
    "int to bigint": "ALTER TABLE docs ALTER COLUMN n TYPE bigint USING n * 5000000000",
    "int to text": "ALTER TABLE docs ALTER COLUMN n TYPE text",
    "varchar to text": "ALTER TABLE docs ALTER COLUMN label TYPE text",
    "same type, other values": "ALTER TABLE docs ALTER COLUMN n TYPE int USING n * 2",
    "order": "ALTER TABLE docs DROP COLUMN note; ALTER TABLE docs ADD COLUMN note text DEFAULT 'x'",
    "enum value": "ALTER TYPE mood ADD VALUE 'calm'",
}
changes = pytest.mark.parametrize("change", [pytest.param(v, id=k) for k, v in CHANGES.items()])
ROWS = (
    "UPDATE docs SET feeling = 'sad' WHERE id = 1",
    "UPDATE docs SET id = 20 WHERE id = 2",
    "INSERT INTO docs (id, side) VALUES (30, '[4,3,2,1]')",
    "DELETE FROM docs WHERE id = 3",
)


@changes
@pytest.mark.requirement("R30", "R31")
def test_change_without_rows(follow: Follow, change: str) -> None:
    """DDL sends no message, so only the catalog can tell."""
    followed = follow()
    followed.execute(change)
    followed.assert_equal()


@changes
def test_change_between_rows_of_one_transaction(follow: Follow, change: str) -> None:
    followed = follow()
    followed.execute("UPDATE docs SET feeling = 'sad' WHERE id = 4", change, *ROWS)
    followed.assert_equal()


@changes
@pytest.mark.requirement("R30")
def test_change_while_the_pipeline_is_down(follow: Follow, change: str) -> None:
    """The vector of the row with another key is not in the message, and when it is asked for, the
    table has changed."""
    followed = follow()
    followed.stop()
    followed.execute(*ROWS[:2])
    followed.execute(change)
    followed.execute(*ROWS[2:])
    followed.start()
    followed.assert_equal()


@changes
@pytest.mark.requirement("R30", "R31")
def test_change_without_rows_while_the_pipeline_is_down(follow: Follow, change: str) -> None:
    followed = follow()
    followed.stop()
    followed.execute(change)
    followed.start()
    followed.assert_equal()


@pytest.mark.parametrize("change", ["add with default", "drop and add again", "rename"])
@pytest.mark.parametrize("rows", [False, True], ids=["without rows", "with rows"])
def test_killed_right_after_a_change(follow: Follow, change: str, rows: bool) -> None:
    followed = follow()
    followed.execute(CHANGES[change], *(ROWS if rows else ()))
    followed.pipeline.kill()
    followed.start()
    followed.assert_equal()


def test_killed_while_points_have_a_field_of_a_column_that_is_gone(follow: Follow) -> None:
    """Column list and catalog are as they were at the copy, so only the record tells."""
    followed = follow()
    faults = followed.qdrant.script
    followed.execute("ALTER TABLE docs ADD COLUMN passing int")
    followed.execute("UPDATE docs SET passing = 1 WHERE id = 1")
    with followed.database.connect() as connection:
        followed.pipeline.wait_settled(connection)
    followed.stop()
    # Now the table is on record with the column.
    followed.execute("UPDATE docs SET passing = 2 WHERE id = 1")
    followed.execute("ALTER TABLE docs DROP COLUMN passing, ADD COLUMN other int")
    followed.execute("UPDATE docs SET other = 2 WHERE id = 2")
    followed.execute("ALTER TABLE docs DROP COLUMN other")
    followed.start()
    followed.assert_equal()
    # And here it is not: the rows are written with the column, the table is not read again.
    followed.stop()
    followed.execute("ALTER TABLE docs ADD COLUMN other int")
    followed.execute("UPDATE docs SET other = 3 WHERE id = 3")
    followed.execute("ALTER TABLE docs DROP COLUMN other")
    followed.sabotage = breaks.stale_tables_are_left
    followed.start()
    followed.wait_confirmed()
    followed.pipeline.kill()
    followed.sabotage = None
    followed.start()
    followed.assert_equal()
    assert faults.violations() == []


@pytest.mark.requirement("R53")
@pytest.mark.parametrize("change", ["add with default", "rename", "drop", "int to bigint"])
def test_change_while_slot_creation_waits(follow: Follow, change: str) -> None:
    """Between plan and copy: the copy is made by another plan, and no row changes after."""
    followed = follow(start=False)
    with followed.database.connect(autocommit=False) as writer:
        writer.execute("CREATE TABLE elsewhere ()")
        followed.start(wait=False)
        followed.pipeline.wait(lambda status: status.state == "snapshotting", "the copy")
        time.sleep(0.3)
        followed.execute(CHANGES[change])
        writer.commit()
    followed.assert_equal()


def test_change_during_the_last_moments_of_a_resync(follow: Follow) -> None:
    """The table is no longer locked, and not yet on record: this change must not pass for done."""
    followed = follow()
    faults = followed.qdrant.script
    faults.slow("write", 0.5, times=3)
    followed.execute("ALTER TABLE docs ADD COLUMN one text DEFAULT 'one'")
    # The first write is that of the rows, the next that of the record.
    followed.wait_for_log("resync_started")
    followed.execute("ALTER TABLE docs ADD COLUMN two text DEFAULT 'two'")
    followed.assert_equal()


def test_a_rewrite_while_a_resync_is_prepared(follow: Follow) -> None:
    """The table is not what was planned when it is locked, so it is planned again."""
    followed = follow()
    with followed.database.connect(autocommit=False) as other:
        other.execute("CREATE TABLE unseen AS SELECT 1")
        followed.execute("ALTER TABLE docs ADD COLUMN one text DEFAULT 'one'")
        other.execute("LOCK TABLE docs IN ACCESS EXCLUSIVE MODE")
        time.sleep(1.5)
        other.execute("TRUNCATE docs")
        other.execute("INSERT INTO docs (id, side) VALUES (1, '[1,1,1,1]')")
        other.commit()
    followed.assert_equal()


@pytest.mark.campaign
def test_one_resync_is_enough_however_far_behind(follow: Follow) -> None:
    """Rows written by the old columns are still to come when the new ones are noticed."""
    followed = follow()
    followed.stop()
    for number in range(40):
        followed.execute(f"UPDATE docs SET n = {number}")
    followed.execute(CHANGES["add with default"])
    for number in range(40):
        followed.execute(f"UPDATE docs SET n = {number} + 100")
    followed.settings = followed.settings.model_copy(
        update={"pipeline": followed.settings.pipeline.model_copy(update={"batch_rows": 6})}
    )
    followed.start()
    followed.assert_equal()
    assert followed.pipeline.status().schema_changes["resynced"] == 1


def test_several_changes_with_rows_in_one_transaction(follow: Follow) -> None:
    followed = follow()
    statements = []
    for number, change in enumerate(("add", "rename", "int to bigint", "drop of the renamed")):
        statement = CHANGES.get(change, "ALTER TABLE docs DROP COLUMN title")
        statements += [
            statement,
            f"UPDATE docs SET feeling = 'sad', n = {number} WHERE id = {number + 1}",
            f"UPDATE docs SET id = id + 100 WHERE id = {number + 1}",
        ]
    followed.execute(*statements)
    followed.assert_equal()


def test_a_new_enum_value_is_written(follow: Follow) -> None:
    followed = follow()
    followed.execute("ALTER TYPE mood ADD VALUE 'calm' BEFORE 'sad'")
    followed.execute("UPDATE docs SET feeling = 'calm' WHERE id = 1")
    followed.assert_equal()
    assert set(followed.pipeline.status().schema_changes.values()) == {0.0}
    # One that is renamed may stand in rows that exist.
    followed.execute("ALTER TYPE mood RENAME VALUE 'calm' TO 'low'")
    followed.execute("UPDATE docs SET feeling = 'low' WHERE id = 2")
    followed.assert_equal()
    assert followed.pipeline.status().schema_changes["resynced"] == 1


def test_rolled_back_changes_leave_no_trace(follow: Follow) -> None:
    followed = follow()
    followed.execute(
        "SAVEPOINT s",
        *(CHANGES[one] for one in ("add", "drop", "int to text")),
        "UPDATE docs SET feeling = 'sad'",
        "ROLLBACK TO s",
        "UPDATE docs SET feeling = 'sad' WHERE id = 1",
    )
    followed.assert_equal()
    assert followed.pipeline.status().schema_changes["resynced"] == 0


@pytest.mark.requirement("R15")
def test_what_leaves_columns_and_rows_is_no_schema_change(follow: Follow) -> None:
    followed = follow()
    for change in (
        "CREATE INDEX ON docs (n)",
        "CREATE INDEX ON docs USING hnsw (side vector_cosine_ops)",
        "ALTER TABLE docs ALTER COLUMN n SET DEFAULT 5",
        "ALTER TABLE docs REPLICA IDENTITY FULL",
        "VACUUM FULL docs",
        "CLUSTER docs USING docs_pkey",
        "ALTER TABLE docs ADD CONSTRAINT positive CHECK (n > -5)",
        "TRUNCATE docs",
    ):
        followed.database.execute(change)
        followed.execute("INSERT INTO docs SELECT coalesce(max(id), 0) + 1 FROM docs")
        with followed.database.connect() as connection:
            followed.pipeline.wait_settled(connection)
    followed.execute(*ROWS)
    followed.assert_equal()
    assert set(followed.pipeline.status().schema_changes.values()) == {0.0}


@pytest.mark.requirement("R15")
def test_create_index_and_update_count_no_schema_change(
    database18: Database, sync_table: SyncTable
) -> None:
    """The same by the daemon's own metric."""
    database18.execute(CREATE)
    synced = sync_table(database18, "docs")
    synced.execute("CREATE INDEX ON docs (n)")
    synced.execute("UPDATE docs SET n = n + 1")
    synced.assert_equal()
    assert synced.daemon.metric("cdc_sync_received_messages_total", kind="relation") >= 1
    assert synced.daemon.metric("cdc_sync_schema_changes_total") == 0
    synced.execute("ALTER TABLE docs ADD COLUMN added int")
    synced.execute("UPDATE docs SET n = n + 1")
    synced.assert_equal()
    assert synced.daemon.metric("cdc_sync_schema_changes_total") > 0


def test_a_renamed_table_stays_in_its_collection(follow: Follow) -> None:
    followed = follow(collection=None)
    followed.execute("ALTER TABLE docs RENAME TO papers")
    followed.table = "papers"
    followed.execute("UPDATE papers SET feeling = 'sad' WHERE id = 1")
    followed.assert_equal()
    # A table that is read again keeps it as well.
    followed.execute("ALTER TABLE papers ADD COLUMN added text DEFAULT 'given'")
    followed.execute("UPDATE papers SET id = 50 WHERE id = 5")
    followed.assert_equal()
    assert not followed.qdrant.client().collection_exists("papers")
    # After a restart as well, under either name in the configuration.
    for name in ("docs", "papers"):
        followed.stop()
        tables = [followed.settings.tables[0].model_copy(update={"name": name})]
        followed.settings = followed.settings.model_copy(update={"tables": tables})
        followed.execute(f"UPDATE papers SET note = '{name}' WHERE id = 1")
        followed.start()
        followed.assert_equal()
    assert not followed.qdrant.client().collection_exists("papers")


def test_relations_that_are_not_configured_are_ignored(follow: Follow) -> None:
    followed = follow(start=False)
    name = followed.settings.source.publication
    followed.execute(
        "CREATE TABLE others (id int PRIMARY KEY, v vector(2), odd aclitem)",
        f"CREATE PUBLICATION {name} FOR TABLE docs, others",
    )
    followed.start()
    followed.execute("INSERT INTO others VALUES (1, '[1,2]', NULL)", *ROWS, "TRUNCATE others")
    followed.execute("ALTER TABLE others DROP COLUMN v", "INSERT INTO others VALUES (2, NULL)")
    followed.assert_equal()
    assert set(followed.pipeline.status().schema_changes.values()) == {0.0}


def test_a_vector_column_that_is_added_is_left_out(follow: Follow) -> None:
    """A collection gets its vectors when it is made. Everything else goes on, also after a
    restart."""
    followed = follow()
    followed.columns = ["id", "note", "n", "label", "feeling", "emb", "side"]
    followed.execute("ALTER TABLE docs ADD COLUMN third vector(3)", *ROWS)
    followed.assert_equal()
    followed.stop()
    followed.execute("UPDATE docs SET third = '[1,2,3]', n = 3 WHERE id = 1")
    followed.start()
    followed.assert_equal()


@pytest.mark.parametrize("change", ["rename", "drop", "int to bigint"])
def test_change_under_full_identity(follow: Follow, change: str) -> None:
    """The identity's columns change with the table's."""
    followed = follow()
    followed.execute("ALTER TABLE docs REPLICA IDENTITY FULL")
    followed.execute(*ROWS[:2])
    with followed.database.connect() as connection:
        followed.pipeline.wait_settled(connection)
    followed.execute(CHANGES[change])
    followed.assert_equal()
    followed.execute(*ROWS[2:])
    followed.assert_equal()


# -- what cannot be followed


REFUSED = {
    "dimension": (f"ALTER COLUMN emb TYPE vector({DIM + 1}) USING NULL", "emb", f"{DIM + 1} dim"),
    "kind": (f"ALTER COLUMN emb TYPE halfvec({DIM})", "emb", "halfvec"),
    "no vector": ("ALTER COLUMN side TYPE text", "side", "text"),
    "key": ("RENAME COLUMN id TO number", "id", "key"),
    "key type": ("ALTER COLUMN id TYPE text", "id", "key"),
    "renamed": ("RENAME COLUMN side TO flank", "side", "not in the plan"),
    "dropped": ("DROP COLUMN side", "side", "not in the plan"),
}
#: The rows can go on, the collection cannot become what the table is.
FOUND_AT_RESYNC = ("renamed", "dropped")


@pytest.mark.requirement("R32")
@pytest.mark.parametrize(
    ("change", "rows"),
    [
        *((change, False) for change in ("dimension", "no vector", "key", "key type")),
        *((change, True) for change in ("dimension", "kind", "key", "key type")),
        *((change, True) for change in ("renamed", "dropped")),
    ],
)
def test_what_the_collection_cannot_take_stops_the_table(
    follow: Follow, change: str, rows: bool
) -> None:
    """With an error that names table, column and remedy; no row is written that was made after."""
    sql, column, says = REFUSED[change]
    followed = follow()
    followed.execute("UPDATE docs SET note = 'last' WHERE id = 6")
    with followed.database.connect() as connection:
        followed.pipeline.wait_settled(connection)
    before = followed.points()
    statements = [f"ALTER TABLE docs {sql}"]
    if rows:
        statements = ["UPDATE docs SET note = 'early'", *statements, "UPDATE docs SET note = 'x'"]
    followed.execute(*statements)
    followed.wait_stopped(column, says)
    after = followed.points()
    assert after.keys() == before.keys()
    notes, old = ({point.get("note") for point in x.values()} for x in (after, before))
    if rows and change in FOUND_AT_RESYNC:
        assert notes == {"x"}
    else:
        # What came before the change in its transaction may be there.
        assert after == before or (rows and notes <= {"early", *old})
    # It starts so too, and nothing is written.
    followed.wait_confirmed()
    followed.stop()
    followed.start()
    followed.wait_stopped()
    followed.wait_confirmed()
    assert followed.points() == after


@pytest.mark.requirement("R32")
def test_another_dimension_stops_the_table_with_words_and_not_the_daemon(
    database18: Database, sync_table: SyncTable
) -> None:
    database18.execute(CREATE)
    synced = sync_table(database18, "docs")
    synced.execute(
        f"BEGIN; ALTER TABLE docs ALTER COLUMN emb TYPE vector({DIM + 1}) USING NULL;"
        " UPDATE docs SET note = 'x'; COMMIT"
    )
    daemon = synced.daemon
    deadline = time.monotonic() + 30
    while daemon.metric("cdc_sync_table_stopped", table="public.docs") != 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (stop,) = [one for one in daemon.events() if one.get("event") == "table_stopped"]
    assert (stop["table"], stop["kind"]) == ("public.docs", "mapping")
    assert "public.docs: column emb now has 641 dimensions" in stop["error"]
    assert "Name another `collection`" in stop["remedy"]
    (table,) = daemon.status()["tables"]
    assert (table["state"], table["error"]) == ("stopped", stop["error"])
    code, body = daemon.get("/readyz")
    assert (code, "public.docs" in body) == (503, True)
    assert daemon.get("/livez")[0] == 200
    # Its WAL does not pile up.
    daemon.wait_caught_up()
    synced.execute(
        f"ALTER TABLE docs ALTER COLUMN emb TYPE vector({DIM}) USING array_fill(1, ARRAY[{DIM}])"
    )
    while daemon.get("/readyz")[0] != 200:
        assert time.monotonic() < deadline + 30
        time.sleep(0.05)
    while daemon.status()["tables"][0]["state"] != "streaming":
        assert time.monotonic() < deadline + 30
        time.sleep(0.05)
    synced.assert_equal()
