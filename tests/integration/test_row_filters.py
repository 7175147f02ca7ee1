"""`where`: one predicate in publication, copy and refetch; rows that cross it; and every refusal
before anything is created."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError, ConfigError, ErrorKind, SourceError
from cdc_sync.postgres.catalog import find_table, server_info
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.publication import create_publication, read_publication
from cdc_sync.postgres.row_filters import resolve_filter
from cdc_sync.sync.planning import PipelinePlan, plan_pipeline
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database, DatabaseFactory
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.source_tables import find, source_settings

DIM = 1536


def vector(seed: int) -> str:
    return "[" + ",".join(f"{(seed * 37 + i * 11) % 17 / 7 - 1:.4f}" for i in range(DIM)) + "]"


def create_docs(database: Database) -> None:
    """Rows of which the even ones are live; the identity has the columns that filters read."""
    database.execute(
        f"CREATE TABLE docs (id int PRIMARY KEY, live bool NOT NULL, note text, emb vector({DIM}));"
        "CREATE UNIQUE INDEX docs_identity ON docs (id, live);"
        "ALTER TABLE docs REPLICA IDENTITY USING INDEX docs_identity"
    )
    for i in range(8):
        database.execute(
            "INSERT INTO docs VALUES (%s, %s, %s, %s)", (i, i % 2 == 0, f"note {i}", vector(i))
        )


def settings_of(database: Database, table: Mapping[str, object], **pipeline: object) -> Settings:
    return Settings.model_validate(
        {
            "source": {"url": database.url, "slot": "s", "publication": "pub"},
            "tables": [dict(table)],
            "pipeline": pipeline,
        }
    )


def planned(database: Database, *, table: str = "docs", **options: object) -> PipelinePlan:
    settings = settings_of(database, {"name": table, **options})
    with connect(settings.source) as connection:
        return plan_pipeline(connection, settings)


def refused(database: Database, *, table: str = "docs", **options: object) -> CdcSyncError:
    with pytest.raises(CdcSyncError) as caught:
        planned(database, table=table, **options)
    assert database.execute("SELECT count(*) FROM pg_publication WHERE pubname <> 'pub'") == [(0,)]
    return caught.value


def create(database: Database, plan: PipelinePlan) -> None:
    with connect(source_settings(database.url)) as connection:
        create_publication(connection, "pub", plan.published_columns, plan.server, plan.row_filters)


@pytest.mark.requirement("R38", "R76", "R26")
@pytest.mark.parametrize("target", ["server", "edge"])
def test_rows_that_cross_the_filter(database: Database, sync_table: SyncTable, target: str) -> None:
    create_docs(database)
    synced = sync_table(
        database, "docs", target=target, where="live", compare_options={"where": "live"}
    )
    with database.connect(autocommit=False) as connection:
        connection.execute("UPDATE docs SET live = false WHERE id = 0")  # leaves
        connection.execute("UPDATE docs SET live = true WHERE id = 1")  # enters, vector not sent
        connection.execute("UPDATE docs SET note = 'out' WHERE id = 3")  # never seen
        connection.execute("UPDATE docs SET note = 'in' WHERE id = 4")
        connection.execute("INSERT INTO docs VALUES (20, true, 'new', NULL), (21, false, '', NULL)")
        connection.execute("UPDATE docs SET id = 30, live = true WHERE id = 5")  # enters, new key
        connection.execute("UPDATE docs SET id = 31, live = false WHERE id = 6")  # leaves, new key
        connection.commit()
        connection.execute("UPDATE docs SET live = NOT live WHERE id IN (2, 3)")
        connection.execute("UPDATE docs SET live = NOT live WHERE id IN (2, 3)")
        connection.execute("DELETE FROM docs WHERE id = 7")
        connection.commit()
    synced.assert_equal()


@pytest.mark.requirement("R38")
async def test_the_filter_is_that_of_the_publication(
    database: Database, qdrant: QdrantTarget
) -> None:
    """Copied, streamed, restarted: nothing outside the filter is ever there."""
    create_docs(database)
    where = "live -- not (id > 100)"
    settings = pipeline_settings(database, qdrant, {"name": "docs", "where": where})
    async with running(settings, database, qdrant) as life:
        name = settings.source.publication
        found = database.execute(
            "SELECT rowfilter FROM pg_publication_tables WHERE pubname = %s", (name,)
        )
        assert found == [("live",)]
        await life.assert_equal(where="live")
        await life.stop()
    database.execute("UPDATE docs SET live = NOT live")
    async with running(settings, database, qdrant) as life:
        await life.assert_equal(where="live")


@pytest.mark.requirement("R34", "R38")
async def test_a_partitioned_table(database: Database, qdrant: QdrantTarget) -> None:
    database.execute(
        "CREATE TABLE p (id int, kind int NOT NULL, note text, PRIMARY KEY (id, kind))"
        " PARTITION BY RANGE (id);"
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);"
        "CREATE TABLE p2 (note text, kind int NOT NULL, id int NOT NULL, PRIMARY KEY (id, kind));"
        "ALTER TABLE p ATTACH PARTITION p2 FOR VALUES FROM (10) TO (20);"
        "INSERT INTO p SELECT i, i % 3, 'n' FROM generate_series(0, 19) i"
    )
    settings = pipeline_settings(database, qdrant, {"name": "p", "where": "kind = 1"})
    async with running(settings, database, qdrant) as life:
        await life.assert_equal(where="kind = 1")
        database.execute("UPDATE p SET kind = kind + 1 WHERE id % 2 = 0")
        database.execute("UPDATE p SET id = id + 10 WHERE id = 1")
        database.execute("UPDATE p SET note = 'x'")
        await life.assert_equal(where="kind = 1")


# -- what is refused


@pytest.mark.parametrize(
    "where",
    [
        "true); DROP TABLE docs; --",
        "true); DROP TABLE docs; SELECT (true",
        "true) OR (true",
        "live AND live) OR (NOT live",
        "true AS bool) OR CAST(true",
        "true AS bool) --",
        "live;",
        "live /*",
        "'",
        "$x$",
        "true) GROUP BY (id",
        "true LIMIT 1",
        "1",
        "",
        " ",
        "--",
        "$1",
        "nothing_there = 1",
        "count(*) > 1",
        "SELECT true",
        "live\0",
    ],
)
def test_what_is_no_predicate_is_refused_safely(database18: Database, where: str) -> None:
    create_docs(database18)
    if where == "":
        where = "\n"
    error = refused(database18, where=where)
    assert isinstance(error, ConfigError)
    assert "`where`" in error.message
    assert database18.execute("SELECT count(*) FROM docs") == [(8,)]


@pytest.mark.parametrize(
    "where",
    [
        "note < now()::text",
        "random() < 0.5",
        "public.mine(id)",
        "mood = 'happy'",
        "id IN (SELECT 1)",
        "ctid > '(0,0)'",
        "docs IS NOT NULL",
        "note < current_user",
        "word = 'x'",
    ],
)
def test_what_no_publication_takes_is_refused(database18: Database, where: str) -> None:
    create_docs(database18)
    database18.execute(
        "CREATE TYPE mood AS ENUM ('happy', 'sad'); CREATE DOMAIN word AS text;"
        "ALTER TABLE docs ADD mood public.mood, ADD word word;"
        "ALTER TABLE docs REPLICA IDENTITY FULL;"
        "CREATE FUNCTION mine(int) RETURNS bool IMMUTABLE LANGUAGE sql RETURN $1 > 1"
    )
    error = refused(database18, where=where)
    assert isinstance(error, ConfigError)
    assert "publication" in error.message + error.remedy
    assert "public.docs" in error.message


@pytest.mark.requirement("R25", "R38")
def test_columns_outside_the_replica_identity(database: Database) -> None:
    """The server would make the publication, and then fail the application's updates."""
    database.execute("CREATE TABLE docs (id int PRIMARY KEY, live bool, org int NOT NULL, n int)")
    database.execute("INSERT INTO docs VALUES (1, true, 1)")
    error = refused(database, where="live AND org = 1 AND id > 0")
    assert isinstance(error, SourceError)
    assert error.kind is ErrorKind.TABLE_UNUSABLE
    assert '"live", "org"' in error.message
    by_index, _, full = error.remedy.partition("\nor")
    database.execute(by_index)
    create(database, planned(database, where="live AND org = 1 AND id > 0"))
    database.execute("UPDATE docs SET n = 2")
    # With an identity that has less again, the index that is there is named.
    database.execute("DROP PUBLICATION pub; ALTER TABLE docs REPLICA IDENTITY DEFAULT")
    error = refused(database, where="live AND org = 1 AND id > 0")
    assert error.remedy.startswith(
        'ALTER TABLE "public"."docs" REPLICA IDENTITY USING INDEX "docs_replica_identity";\nor'
    )
    database.execute(full.partition("\n")[2])
    create(database, planned(database, where="live AND org = 1 AND n > 0"))
    database.execute("UPDATE docs SET n = 3")


@pytest.mark.requirement("R25", "R38")
def test_a_partition_with_less_identity_than_its_table(database18: Database) -> None:
    database18.execute(
        "CREATE TABLE p (id int PRIMARY KEY, live bool) PARTITION BY RANGE (id);"
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);"
        "CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20);"
        "ALTER TABLE p REPLICA IDENTITY FULL; ALTER TABLE p1 REPLICA IDENTITY FULL;"
        "INSERT INTO p VALUES (11, true)"
    )
    error = refused(database18, table="p", where="live")
    assert error.kind is ErrorKind.TABLE_UNUSABLE
    assert error.remedy == 'ALTER TABLE "public"."p2" REPLICA IDENTITY FULL;'
    database18.execute(error.remedy)
    create(database18, planned(database18, table="p", where="live"))
    database18.execute("UPDATE p SET live = false")


@pytest.mark.requirement("R40", "R25")
def test_a_child_with_less_identity_than_its_table(database18: Database) -> None:
    """A partition made by hand is published with the filter of its parent."""
    database18.execute(
        "CREATE TABLE par (id int PRIMARY KEY, live bool);"
        "CREATE TABLE child (PRIMARY KEY (id)) INHERITS (par);"
        "ALTER TABLE par REPLICA IDENTITY FULL; INSERT INTO child VALUES (1, true)"
    )
    table = find(database18, "par")
    if not table.children:
        pytest.skip("children are not followed")
    error = refused(database18, table="par", where="live")
    assert error.kind is ErrorKind.TABLE_UNUSABLE
    assert error.remedy == 'ALTER TABLE "public"."child" REPLICA IDENTITY FULL;'
    database18.execute(error.remedy)
    create(database18, planned(database18, table="par", where="live"))
    assert planned(database18, table="par", where="live").tables[0].row_filter == "live"
    # A child is published without the filter.
    database18.execute("ALTER PUBLICATION pub SET TABLE ONLY par WHERE (live), child")
    error = refused(database18, table="par", where="live")
    assert error.kind is ErrorKind.PUBLICATION_UNUSABLE
    database18.execute(error.remedy)
    planned(database18, table="par", where="live")


def test_postgres_14_has_no_row_filters(protocol_database: Database) -> None:
    protocol_database.execute("CREATE TABLE docs (id int PRIMARY KEY, note text)")
    if protocol_database.major >= 15:
        assert planned(protocol_database, where="id > 5").tables[0].row_filter == "(id > 5)"
        return
    error = refused(protocol_database, where="id > 5")
    assert isinstance(error, ConfigError)
    assert "15" in error.message


async def test_nothing_is_created_when_the_filter_is_refused(
    database18: Database, qdrant: QdrantTarget
) -> None:
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, {"name": "docs", "where": "note <> 'x'"})
    with pytest.raises(SourceError, match="replica identity"):
        async with running(settings, database18, qdrant):
            pass
    assert database18.execute("SELECT count(*) FROM pg_publication") == [(0,)]
    assert database18.execute(
        "SELECT count(*) FROM pg_replication_slots WHERE database = %s", (database18.name,)
    ) == [(0,)]
    assert not qdrant.client().collection_exists(str(settings.tables[0].collection))


# -- publications that users make


@pytest.mark.parametrize(
    ("made", "configured"),
    [
        ("id > 5", "docs.id>5"),
        ("id IN (1, 2, 3)", "id = ANY (ARRAY[1,2,3])"),
        ("id BETWEEN 1 AND 5 AND live", "(id >= 1 AND id <= 5) AND live -- as before"),
        ('"live" IS NOT FALSE', "live is not false"),
        ("id::text LIKE '1%'".replace("id::text", "'a'::text"), "'a' LIKE '1%'"),
    ],
)
def test_an_equal_filter_is_accepted(database18: Database, made: str, configured: str) -> None:
    create_docs(database18)
    database18.execute(f"CREATE PUBLICATION pub FOR TABLE docs WHERE ({made})")
    plan = planned(database18, where=configured)
    assert plan.publication is not None
    oid = plan.tables[0].table.oid
    assert plan.tables[0].row_filter == plan.publication.tables[oid].row_filter


@pytest.mark.requirement("R37", "R38")
@pytest.mark.parametrize("made", [None, "id > 6", "id > 5 OR live", "live"])
def test_another_filter_is_refused_with_the_sql(database18: Database, made: str | None) -> None:
    create_docs(database18)
    database18.execute("ALTER TABLE docs REPLICA IDENTITY FULL")
    clause = f" WHERE ({made})" if made else ""
    database18.execute(f"CREATE PUBLICATION pub FOR TABLE docs{clause}")
    error = refused(database18, where="id > 5")
    assert isinstance(error, SourceError)
    assert error.kind is ErrorKind.PUBLICATION_UNUSABLE
    assert "public.docs" in error.message
    database18.execute(error.remedy)
    assert planned(database18, where="id > 5").tables[0].row_filter == "(id > 5)"


def test_a_filter_of_a_table_without_partitions_is_compared(database18: Database) -> None:
    """Nothing that the planner knows of the table may make two filters look alike."""
    database18.execute(
        "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id);"
        "CREATE TABLE docs (id int PRIMARY KEY CHECK (id < 0));"
        "CREATE PUBLICATION pub FOR TABLE p WHERE (id > 5), docs WHERE (id > 5)"
        " WITH (publish_via_partition_root = true)"
    )
    for table in ("p", "docs"):
        error = refused(database18, table=table, where="id > 6")
        assert error.kind is ErrorKind.PUBLICATION_UNUSABLE
        planned(database18, table=table, where="id > 5")


def test_a_publication_of_all_tables_cannot_filter(database18: Database) -> None:
    create_docs(database18)
    database18.execute("CREATE PUBLICATION pub FOR ALL TABLES")
    error = refused(database18, where="live")
    assert "ALL TABLES" in error.remedy


def test_remedies_keep_the_filter(database18: Database) -> None:
    """Of a publication without the table, and of one that lacks columns."""
    create_docs(database18)
    database18.execute(
        "CREATE TABLE other (id int PRIMARY KEY); CREATE PUBLICATION pub FOR TABLE other"
    )
    error = refused(database18, where="live -- only those")
    add, _, _ = error.remedy.partition(" (for a partition")
    database18.execute(add)
    assert planned(database18, where="live").tables[0].row_filter == "live"
    # Nobody configured this one; it is the publication's owner's.
    database18.execute("ALTER PUBLICATION pub SET TABLE docs (id, note) WHERE (id > 3)")
    error = refused(database18, columns=["id", "note"])
    database18.execute(error.remedy)
    assert planned(database18, columns=["id", "note"]).tables[0].row_filter == "(id > 3)"


@pytest.mark.requirement("R38")
def test_a_filter_nobody_configured_is_followed_with_a_warning(database18: Database) -> None:
    create_docs(database18)
    database18.execute("CREATE PUBLICATION pub FOR TABLE docs WHERE (id > 5)")
    plan = planned(database18)
    assert plan.tables[0].row_filter == "(id > 5)"
    assert any("id > 5" in warning for warning in plan.tables[0].warnings)


def test_the_sql_for_the_owner_has_the_filter(database18: Database, qdrant: QdrantTarget) -> None:
    """A role that may not create the publication gets the statement, filter and columns in it."""
    create_docs(database18)
    role = database18.create_cdc_role(["docs"])
    settings = pipeline_settings(
        database18,
        qdrant,
        {"name": "docs", "where": "live -- only those", "columns": ["id", "note"]},
        pg_url=role.url,
    )

    async def run() -> None:
        async with running(settings, database18, qdrant):
            pass

    with pytest.raises(SourceError) as caught:
        asyncio.run(run())
    assert caught.value.kind is ErrorKind.SOURCE_PERMISSION
    statement = caught.value.remedy.partition("run:\n")[2]
    assert "WHERE" in statement
    assert "emb" not in statement
    database18.execute(statement)
    with connect(settings.source) as connection:
        plan = plan_pipeline(connection, settings)
    assert plan.tables[0].row_filter == "live"


@pytest.mark.requirement("R37")
async def test_a_filter_that_is_altered_stops_the_table(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """It goes on by itself once the filter is as it was."""
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, {"name": "docs", "where": "id > 2"})
    async with running(settings, database18, qdrant) as life:
        await life.caught_up()
        name = settings.source.publication
        table = life.pipeline.board.table("public.docs")
        database18.execute(f'ALTER PUBLICATION "{name}" SET TABLE docs WHERE (id > 3)')
        await life.wait(lambda: table.state == "stopped", "the stop")
        assert "filters" in str(table.to_json()["error"])
        database18.execute("DELETE FROM docs WHERE id = 3")
        database18.execute(f'ALTER PUBLICATION "{name}" SET TABLE docs WHERE (id > 2)')
        await life.wait(lambda: table.state == "streaming", "the table")
        await life.assert_equal(where="id > 2")


async def test_another_where_is_another_configuration(
    database18: Database, qdrant: QdrantTarget
) -> None:
    """Rows of the old filter would stay behind."""
    create_docs(database18)
    settings = pipeline_settings(database18, qdrant, {"name": "docs"})
    async with running(settings, database18, qdrant) as life:
        await life.stop()
    name = settings.source.publication
    database18.execute(f'ALTER PUBLICATION "{name}" SET TABLE docs WHERE (id > 3)')
    narrowed = settings.model_copy(
        update={"tables": [settings.tables[0].model_copy(update={"where": "id > 3"})]}
    )
    with pytest.raises(ConfigError, match="configuration of table"):
        async with running(narrowed, database18, qdrant):
            pass


def test_a_lock_on_the_table_is_waited_for_shortly(
    database18_factory: DatabaseFactory,
) -> None:
    database = database18_factory()
    create_docs(database)
    with database.connect(autocommit=False) as blocker:
        blocker.execute("LOCK TABLE docs IN SHARE UPDATE EXCLUSIVE MODE")
        with connect(source_settings(database.url)) as connection:
            server = server_info(connection)
            table = find_table(connection, "docs")
            with pytest.raises(SourceError) as caught:
                resolve_filter(connection, table, ["id"], "live", None, None, server)
            assert caught.value.kind is ErrorKind.TABLE_LOCKED
            blocker.rollback()
            assert resolve_filter(connection, table, ["id"], "live", None, None, server) == "live"
            assert read_publication(connection, "pub") is None
