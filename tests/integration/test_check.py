"""``check`` against real servers: each finding provoked where that is possible, and nothing
written."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr
from qdrant_client import models

from cdc_sync.config import Settings
from cdc_sync.demo.embedded import PostgresServer
from cdc_sync.errors import ErrorKind
from cdc_sync.postgres import server_facts, toast_facts
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.toast_facts import ToastFacts
from cdc_sync.sync import check_sink, doctor_server
from cdc_sync.sync.check import run_checks
from cdc_sync.sync.findings import Finding
from cdc_sync.sync.known_findings import KNOWN
from tests.support.fix_postgres import Database, PrivatePostgres, create_database
from tests.support.pipeline_task import pipeline_settings
from tests.support.pooler import Pooler
from tests.support.qdrant_control import QdrantTarget


def docs(database: Database, name: str = "docs", dimensions: int = 640, rows: int = 50) -> None:
    database.execute(
        f"CREATE TABLE {name} (id int PRIMARY KEY, note text, emb vector({dimensions}));"
        f"INSERT INTO {name} SELECT n, 'note ' || n,"
        f" ARRAY(SELECT random() + n * 0 FROM generate_series(1, {dimensions}))::vector"
        f" FROM generate_series(1, {rows}) n"
    )


def severities(findings: Iterable[Finding]) -> dict[str, str]:
    """The worst severity by id; everything has a known id."""
    order = ("ok", "advice", "warning", "error")
    worst: dict[str, str] = {}
    for one in findings:
        assert one.severity in KNOWN[one.id].severities, one
        assert one.side == KNOWN[one.id].side
        worst[one.id] = max(worst.get(one.id, "ok"), one.severity, key=order.index)
    return worst


def the(findings: Iterable[Finding], id_: str) -> Finding:
    (one,) = [one for one in findings if one.id == id_]
    return one


def at(settings: Settings, url: str) -> Settings:
    """The same pipeline by another URL."""
    source = settings.source.model_copy(update={"url": SecretStr(url)})
    return settings.model_copy(update={"source": source})


def pooled(settings: Settings, pooler: Pooler, database: Database) -> Settings:
    return at(settings, database.server.url(database.name, host="127.0.0.1", port=pooler.port))


def test_a_sound_setup_in_transactions_that_may_not_write(
    database18: Database, qdrant: QdrantTarget
) -> None:
    docs(database18)
    role = database18.create_cdc_role(["docs"])
    settings = pipeline_settings(database18, qdrant, "docs", pg_url=role.url)
    source = settings.source
    database18.execute(
        f'CREATE PUBLICATION "{source.publication}" FOR TABLE docs'
        " WITH (publish_via_partition_root = true);"
        f'ALTER ROLE "{role.name}" SET default_transaction_read_only = on'
    )
    before = {collection.name for collection in qdrant.client().get_collections().collections}
    found = run_checks(settings)
    assert not [one for one in found if one.severity == "error"]
    shown = severities(found)
    for id_ in (
        "postgres-connection",
        "postgres-version",
        "wal-level",
        "replication-connection",
        "replication-room",
        "publication",
        "slot",
        "clock",
        "toast",
        "qdrant-connection",
        "collection",
    ):
        assert shown[id_] == "ok", id_
    assert shown["slot-wal-limit"] == "warning"
    assert shown["standby-snapshot"] == "advice"
    assert not {"pooler", "session-settings", "role-timeouts", "postgres-facts"} & shown.keys()
    after = {collection.name for collection in qdrant.client().get_collections().collections}
    assert after == before
    slots = "SELECT slot_name FROM pg_replication_slots WHERE database = current_database()"
    assert database18.execute(slots) == []


# -- where vectors lie


def facts_of(database: Database, name: str) -> ToastFacts:
    settings = pipeline_source(database)
    with connect(settings.source) as connection:
        table = find_table(connection, name)
        names = [column.name for column in table.columns]
        return toast_facts.toast_facts(connection, table, names, ["emb"])


def pipeline_source(database: Database) -> Settings:
    return Settings.model_validate(
        {"source": {"url": database.url}, "tables": [{"name": "public.docs"}]}
    )


@pytest.mark.requirement("R19")
def test_where_vectors_lie(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the server from 17 on, before by the rule of the toaster, which is held to it."""
    docs(database, "public.far", 640, rows=20)
    docs(database, "public.near", 64, rows=20)
    docs(database, "public.mixed", 384, rows=20)
    database.execute(
        "UPDATE mixed SET note = (SELECT string_agg(md5(random()::text), '')"
        " FROM generate_series(1, 20)) WHERE id % 2 = 0"
    )
    database.execute("VACUUM FULL mixed")
    database.execute(
        "CREATE TABLE none (LIKE far INCLUDING ALL);"
        "CREATE TABLE plain (LIKE far INCLUDING ALL);"
        "ALTER TABLE plain ALTER emb SET STORAGE plain;"
        "INSERT INTO plain SELECT * FROM far; INSERT INTO far (id) VALUES (1000)"
    )
    places = {}
    for name in ("far", "near", "mixed", "none", "plain"):
        told = facts_of(database, f"public.{name}")
        with monkeypatch.context() as patch:
            patch.setattr(toast_facts, "_CHUNK_ID_SINCE", 10**9)
            assert facts_of(database, f"public.{name}") == told, name
        (place,) = told.columns
        places[name] = (place.rows, place.out_of_line)
    assert places == {
        "far": (20, 20),
        "near": (20, 0),
        "mixed": (20, 10),
        "none": (0, 0),
        "plain": (20, 0),
    }


def test_what_is_said_of_it(database18: Database, qdrant: QdrantTarget) -> None:
    docs(database18, "far", 640)
    docs(database18, "near", 3)
    docs(database18, "none", 640, rows=0)
    database18.execute(
        "ALTER TABLE near REPLICA IDENTITY FULL; ALTER TABLE near ALTER emb SET STORAGE extended"
    )
    found = run_checks(pipeline_settings(database18, qdrant, "far", "near", "none"))
    said = {one.subject: one.message for one in found if one.id == "toast"}
    assert "all vectors out of line" in said["public.far"]
    assert "metadata updates will be payload-only" in said["public.far"]
    assert "times the WAL" in said["public.far"]
    assert "all vectors in the row" in said["public.near"]
    assert "by their dimensions" in said["public.none"]
    full = the(found, "replica-identity")
    assert (full.severity, full.subject) == ("advice", "public.near")
    assert 'ALTER TABLE "public"."near" REPLICA IDENTITY DEFAULT;' in full.remedy
    storage = the(found, "vector-storage")
    database18.execute(storage.remedy.partition("\n")[2] + full.remedy.partition("\n")[2])
    again = severities(run_checks(pipeline_settings(database18, qdrant, "far", "near", "none")))
    assert not {"vector-storage", "replica-identity"} & again.keys()


def test_what_full_costs_is_about_what_is_said(database18: Database) -> None:
    docs(database18, "public.docs", 768, rows=400)
    said = facts_of(database18, "public.docs").full_identity_factor

    def wal_of_an_update() -> float:
        with database18.connect() as connection:
            # So that whole pages of this table are in the WAL already.
            connection.execute("UPDATE docs SET note = note || '.'")
            before = connection.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
            connection.execute("UPDATE docs SET note = note || '.'")
            after = connection.execute(
                "SELECT pg_current_wal_insert_lsn() - %s::pg_lsn", before
            ).fetchone()
        assert after is not None
        return float(str(after[0]))

    default = wal_of_an_update()
    database18.execute("ALTER TABLE docs REPLICA IDENTITY FULL")
    measured = wal_of_an_update() / default
    assert measured / 2.5 < said < measured * 2.5, (said, measured)


def test_partitions_and_columns_that_may_not_be_read(
    database18: Database, qdrant: QdrantTarget
) -> None:
    database18.execute(
        "CREATE TABLE docs (id int, secret text, emb vector(640), PRIMARY KEY (id))"
        " PARTITION BY RANGE (id);"
        "CREATE TABLE docs1 PARTITION OF docs FOR VALUES FROM (0) TO (10);"
        "CREATE TABLE docs2 PARTITION OF docs DEFAULT;"
        "INSERT INTO docs SELECT n, 'x', array_fill(n / 7.0, '{640}')::vector"
        "  FROM generate_series(1, 20) n"
    )
    role = database18.create_cdc_role([])
    for name in ("docs", "docs1", "docs2"):
        columns = "id, emb" if name == "docs" else "ctid, id, emb"
        database18.execute(f'GRANT SELECT ({columns}) ON {name} TO "{role.name}"')
    database18.execute(f'GRANT USAGE ON SCHEMA public TO "{role.name}"')
    entry = {"name": "docs", "columns": ["id", "emb"]}
    found = run_checks(pipeline_settings(database18, qdrant, entry, pg_url=role.url))
    assert "of 20 rows looked at" in the(found, "toast").message
    assert "postgres-facts" not in severities(found)


# -- the way


def test_a_pooler_that_refuses_replication(database18: Database, qdrant: QdrantTarget) -> None:
    docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs")
    with Pooler(database18.url) as pooler:
        found = run_checks(pooled(settings, pooler, database18))
    refused = the(found, "replication-connection")
    assert (refused.severity, refused.kind) == ("error", ErrorKind.CONFIG)
    assert "PgBouncer" in refused.remedy
    pooler_found = the(found, "pooler")
    assert pooler_found.severity == "warning"
    assert f"port {database18.server.port} " in pooler_found.remedy


def test_a_pooler_that_changes_sessions(database18: Database, qdrant: QdrantTarget) -> None:
    docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs")
    with Pooler(database18.url, sessions=2) as pooler:
        found = run_checks(pooled(settings, pooler, database18))
    changing = the(found, "pooler")
    assert (changing.severity, changing.kind) == ("error", ErrorKind.CONFIG)


def test_a_pooler_that_drops_settings(database18: Database, qdrant: QdrantTarget) -> None:
    docs(database18)
    role = database18.create_cdc_role(["docs"])
    settings = pipeline_settings(database18, qdrant, "docs", pg_url=role.url)
    database18.execute(
        f'CREATE PUBLICATION "{settings.source.publication}" FOR TABLE docs'
        " WITH (publish_via_partition_root = true);"
        f"ALTER ROLE \"{role.name}\" SET statement_timeout = '5s'"
    )
    assert the(run_checks(settings), "role-timeouts").severity == "advice"
    port = database18.server.port
    with Pooler(role.url, keeps_options=False, replication=port) as pooler:
        parts = role.url.replace(f":{port}/", f":{pooler.port}/")
        found = run_checks(at(settings, parts))
        lost = the(found, "session-settings")
        assert "row_security" in lost.message
        assert "role-timeouts" not in severities(found)
        assert the(found, "replication-connection").severity == "ok"


def test_replication_that_leads_elsewhere(
    database18: Database, postgres16: PostgresServer, qdrant: QdrantTarget
) -> None:
    """A load balancer, or a host of several: what is copied would not be what is followed."""
    docs(database18)
    role = database18.create_cdc_role(["docs"])
    name, place = sql.Identifier(role.name), sql.Identifier(database18.name)
    password = urlsplit(role.url).password
    with psycopg.connect(postgres16.url(), autocommit=True) as other:
        other.execute(sql.SQL("CREATE DATABASE {}").format(place))
        create = sql.SQL("CREATE ROLE {} LOGIN REPLICATION PASSWORD {}")
        other.execute(create.format(name, password))
        try:
            with Pooler(role.url, replication=postgres16.port) as pooler:
                url = role.url.replace(f":{database18.server.port}/", f":{pooler.port}/")
                settings = pipeline_settings(database18, qdrant, "docs", pg_url=url)
                found = run_checks(settings)
        finally:
            other.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(place))
            other.execute(sql.SQL("DROP ROLE {}").format(name))
    error = the(found, "replication-connection")
    assert error.kind is ErrorKind.SOURCE_CHANGED, error


def test_a_clock_that_is_wrong(
    database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs(database18)
    slow = SimpleNamespace(time=lambda: time.time() - 100, monotonic=time.monotonic)
    monkeypatch.setattr(server_facts, "time", slow)
    found = the(run_checks(pipeline_settings(database18, qdrant, "docs")), "clock")
    assert found.severity == "warning"
    assert "ahead of this host's" in found.message


# -- the server


@pytest.mark.requirement("R80", "R61")
def test_a_server_with_settings_that_hurt(
    private_postgres: PrivatePostgres, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it on one server: limits, timeouts, standbys, transactions, other slots."""
    server = private_postgres(
        {
            "max_slot_wal_keep_size": "64MB",
            "idle_replication_slot_timeout": "3600",
            "wal_sender_timeout": "5s",
            "max_prepared_transactions": "2",
        }
    )
    database = create_database(server)
    docs(database)
    role = database.create_cdc_role(["docs"])
    database.execute(f'ALTER ROLE "{role.name}" CONNECTION LIMIT 3')
    settings = pipeline_settings(database, qdrant, "docs", pg_url=role.url)
    database.execute(
        f'CREATE PUBLICATION "{settings.source.publication}" FOR ALL TABLES;'
        "SELECT pg_create_physical_replication_slot('standby1')"
    )
    with database.connect(autocommit=False) as prepared:
        prepared.execute("CREATE TABLE later (id int)")
        prepared.execute("PREPARE TRANSACTION 'to be forgotten'")
    found = run_checks(settings)
    assert not [one for one in found if one.severity == "error"]
    shown = severities(found)
    assert {id_: shown.get(id_) for id_ in shown if shown[id_] == "warning"}.keys() >= {
        "slot-wal-limit",
        "slot-idle-timeout",
        "wal-sender-timeout",
        "connection-room",
        "publication",
        "open-transactions",
    }
    assert "to be forgotten" in the(found, "open-transactions").message
    assert shown["failover"] == "advice"
    assert "synchronized_standby_slots = 'standby1'" in the(found, "failover").remedy
    # The remedies are right: what they say is said no more.
    database.execute("ROLLBACK PREPARED 'to be forgotten'")
    for id_ in ("wal-sender-timeout", "standby-snapshot"):
        database.execute(the(found, id_).remedy)
    for id_ in ("slot-idle-timeout", "slot-wal-limit", "failover"):
        remedy = the(found, id_).remedy
        for statement in remedy.split("\n"):
            if statement.startswith(("ALTER SYSTEM", "SELECT")):
                database.execute(statement)
    database.execute(the(found, "connection-room").remedy.splitlines()[-1])
    database.execute(
        f"SELECT pg_create_logical_replication_slot('{settings.source.slot}', 'pgoutput')"
    )
    found = run_checks(settings)
    shown = severities(found)
    assert the(found, "failover").severity == "warning"
    assert "ALTER_REPLICATION_SLOT" in the(found, "failover").remedy
    for id_ in ("wal-sender-timeout", "standby-snapshot", "slot-idle-timeout", "connection-room"):
        assert shown.get(id_, "ok") == "ok", id_
    assert shown["slot-wal-limit"] == "ok"
    assert "open-transactions" not in shown
    _transactions_with_a_slot_and_without(database, settings, monkeypatch)


def _transactions_with_a_slot_and_without(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A role without pg_monitor sees no age, so only that it lasts."""
    with database.connect(autocommit=False) as writer:
        writer.execute("UPDATE docs SET note = 'x' WHERE id = 1")
        assert the(run_checks(settings), "open-transactions").severity == "advice"
        as_owner = at(settings, database.url)
        assert "open-transactions" not in severities(run_checks(as_owner))
        monkeypatch.setattr(doctor_server, "_VERY_OLD_SECONDS", 0.0)
        assert the(run_checks(as_owner), "open-transactions").severity == "warning"


def test_a_slot_that_is_another(database18: Database, qdrant: QdrantTarget) -> None:
    docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs")
    slot = settings.source.slot
    database18.execute(
        f"SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput', false, true)"
    )
    found = the(run_checks(settings), "slot")
    assert found.severity == "error"
    database18.execute(found.remedy.splitlines()[-1])
    assert the(run_checks(settings), "slot").severity == "ok"


def test_a_table_that_somebody_has_locked(database18: Database, qdrant: QdrantTarget) -> None:
    """The check ends, and says so."""
    docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs")
    with database18.connect(autocommit=False) as other:
        other.execute("LOCK TABLE docs IN ACCESS EXCLUSIVE MODE")
        shown = severities(run_checks(settings))
    assert shown.get("tables", shown.get("postgres-facts")) in ("error", "advice")


# -- Qdrant


def test_collections_that_will_cost_something(database18: Database, qdrant: QdrantTarget) -> None:
    docs(database18)
    settings = pipeline_settings(database18, qdrant, "docs")
    qdrant.client().create_collection(
        str(settings.tables[0].collection),
        vectors_config={"emb": models.VectorParams(size=640, distance=models.Distance.COSINE)},
        optimizers_config=models.OptimizersConfigDiff(indexing_threshold=0),
        strict_mode_config=models.StrictModeConfig(
            enabled=True, upsert_max_batchsize=10, max_points_count=20
        ),
    )
    database18.execute("ANALYZE docs")
    found = run_checks(settings)
    assert not [one for one in found if one.severity == "error"]
    shown = severities(found)
    assert shown["collection-index"] == "warning"
    limits = [one.message for one in found if one.id == "strict-mode"]
    assert len(limits) == 2, limits
    assert "upsert_max_batchsize is 10" in limits[0]
    assert "max_points_count is 20" in limits[1]


def test_two_collections_that_do_not_fit_are_both_named(
    database18: Database, qdrant: QdrantTarget
) -> None:
    docs(database18, "one")
    docs(database18, "two")
    settings = pipeline_settings(database18, qdrant, "one", "two")
    for entry in settings.tables:
        qdrant.client().create_collection(
            str(entry.collection),
            vectors_config={"emb": models.VectorParams(size=3, distance=models.Distance.COSINE)},
        )
    errors = [one for one in run_checks(settings) if one.severity == "error"]
    assert [one.id for one in errors] == ["collection", "collection"]
    assert all(one.kind is ErrorKind.COLLECTION_MISMATCH for one in errors)


def test_an_embedded_database_and_its_disk(
    database18: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("qdrant_edge")
    docs(database18)
    directory = tmp_path / "not" / "yet"
    settings = Settings.model_validate(
        {
            "source": {"url": database18.url, "publication": "p", "slot": "edge_disk"},
            "qdrant": {"url": f"edge:{directory}"},
            "tables": [{"name": "docs"}],
        }
    )
    assert the(run_checks(settings), "edge-disk").severity == "ok"
    full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=0))
    monkeypatch.setattr(check_sink, "shutil", full)
    assert the(run_checks(settings), "edge-disk").severity == "warning"
    assert not directory.parent.exists(), "nothing was made"
