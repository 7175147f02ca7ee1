"""The vector survives: updates that do not carry it, under every replica identity (invariants 4 and
5)."""

from __future__ import annotations

import pytest

from tests.support.fix_pipeline import Synced, SyncTable
from tests.support.fix_postgres import Database
from tests.support.qdrant_control import QdrantTarget

DIM = 1536
IDENTITIES = ["DEFAULT", "FULL", "USING INDEX docs_pkey"]


def vector(seed: float, dim: int = DIM) -> str:
    return "[" + ",".join(f"{(seed * 0.37 + i * 0.11) % 1.7 - 0.5:.4f}" for i in range(dim)) + "]"


def create_docs(database: Database, identity: str = "DEFAULT", rows: int = 6) -> None:
    database.execute(
        f"CREATE TABLE docs (id bigint PRIMARY KEY, note text, body text, emb vector({DIM}), other "
        "vector(4))"
    )
    for i in range(rows):
        database.execute(
            "INSERT INTO docs VALUES (%s, %s, %s, %s, %s)",
            (i, f"note {i}", f"body {i} " * 2000, vector(i), vector(i, 4)),
        )
    database.execute(f"ALTER TABLE docs REPLICA IDENTITY {identity}")


def remove_points(synced: Synced, *ids: int) -> None:
    """Take points away behind the daemon's back."""
    assert synced.qdrant is not None
    client = synced.qdrant.client()
    client.delete(synced.collection, points_selector=list(ids), wait=True)


@pytest.mark.requirement("R19", "R20")
@pytest.mark.parametrize("target", ["server", "edge"])
@pytest.mark.parametrize("identity", IDENTITIES)
def test_a_metadata_only_update_keeps_the_vector(
    database18: Database, sync_table: SyncTable, identity: str, target: str
) -> None:
    create_docs(database18, identity)
    synced = sync_table(database18, "docs", target=target)
    database18.execute("UPDATE docs SET note = 'changed' WHERE id = 1")
    database18.execute("UPDATE docs SET other = %s WHERE id = 2", (vector(50, 4),))
    database18.execute("UPDATE docs SET other = NULL, note = NULL WHERE id = 3")
    database18.execute("UPDATE docs SET emb = emb WHERE id = 4")
    database18.execute("UPDATE docs SET emb = NULL WHERE id = 5")
    synced.assert_equal()


@pytest.mark.requirement("R21")
@pytest.mark.parametrize("target", ["server", "edge"])
@pytest.mark.parametrize("identity", IDENTITIES)
def test_a_key_change_moves_the_point_with_its_vector(
    database18: Database, sync_table: SyncTable, identity: str, target: str
) -> None:
    create_docs(database18, identity)
    synced = sync_table(database18, "docs", target=target)
    database18.execute("UPDATE docs SET id = 100, note = 'moved' WHERE id = 1")
    with database18.connect(autocommit=False) as connection:
        connection.execute("UPDATE docs SET id = 200 WHERE id = 2")
        connection.execute("UPDATE docs SET id = 2 WHERE id = 3")
        connection.execute("UPDATE docs SET id = 3, note = 'swapped' WHERE id = 200")
        connection.commit()
    synced.assert_equal()


@pytest.mark.requirement("R23", "R84")
@pytest.mark.parametrize("identity", IDENTITIES)
def test_both_when_the_point_is_missing_in_qdrant(
    database18: Database, sync_table: SyncTable, qdrant: QdrantTarget, identity: str
) -> None:
    create_docs(database18, identity)
    synced = sync_table(database18, "docs", qdrant=qdrant)
    remove_points(synced, 1, 2)
    database18.execute("UPDATE docs SET note = 'changed' WHERE id = 1")
    database18.execute("UPDATE docs SET id = 100 WHERE id = 2")
    synced.assert_equal()


@pytest.mark.requirement("R22")
def test_identity_nothing_is_refused_before_the_start(
    database18: Database, sync_table: SyncTable
) -> None:
    create_docs(database18, "NOTHING")
    synced = sync_table(database18, "docs", start=False, superuser=True)
    synced.daemon.start(wait=False)
    assert synced.daemon.process is not None
    assert synced.daemon.process.wait(90) == 78
    assert "REPLICA IDENTITY DEFAULT" in synced.daemon.log()
    assert database18.execute(
        "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
    ) == [(0,)]
    assert database18.execute("SELECT count(*) FROM pg_publication") == [(0,)]


@pytest.mark.requirement("R22")
def test_identity_nothing_while_running_stops_the_table_with_the_remedy(
    database18: Database, sync_table: SyncTable
) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs")
    database18.execute("ALTER TABLE docs REPLICA IDENTITY NOTHING")
    database18.execute("INSERT INTO docs (id, note) VALUES (99, 'new')")
    synced.daemon.wait(lambda: "table_stopped" in synced.daemon.log(), "the table to stop", 30)
    assert "REPLICA IDENTITY DEFAULT" in synced.daemon.status()["tables"][0]["remedy"]
    database18.execute("ALTER TABLE docs REPLICA IDENTITY DEFAULT")
    database18.execute("UPDATE docs SET note = 'again' WHERE id = 99")
    synced.daemon.wait(lambda: "resync_completed" in synced.daemon.log(), "the copy", 40)
    synced.assert_equal()


@pytest.mark.requirement("R22")
def test_an_index_identity_that_does_not_cover_the_key_is_refused(
    database18: Database, sync_table: SyncTable
) -> None:
    create_docs(database18)
    database18.execute("ALTER TABLE docs ADD code int NOT NULL GENERATED ALWAYS AS IDENTITY")
    database18.execute("CREATE UNIQUE INDEX docs_code ON docs (code)")
    database18.execute("ALTER TABLE docs REPLICA IDENTITY USING INDEX docs_code")
    synced = sync_table(database18, "docs", start=False, superuser=True)
    synced.daemon.start(wait=False)
    assert synced.daemon.process is not None
    assert synced.daemon.process.wait(90) == 78


@pytest.mark.requirement("R24")
def test_a_toasted_key(database18: Database, sync_table: SyncTable) -> None:
    database18.execute(f"CREATE TABLE docs (id text PRIMARY KEY, note text, emb vector({DIM}))")
    database18.execute("ALTER TABLE docs ALTER id SET STORAGE EXTERNAL")
    long_key = "".join(chr(97 + i * 7 % 26) for i in range(2500))
    database18.execute("INSERT INTO docs VALUES (%s, 'a', %s)", (long_key, vector(1)))
    synced = sync_table(database18, "docs")
    database18.execute("UPDATE docs SET note = 'b'")
    synced.assert_equal()


@pytest.mark.requirement("R23", "R26")
def test_an_update_that_crosses_into_a_row_filter(
    database18: Database, sync_table: SyncTable, qdrant: QdrantTarget
) -> None:
    """With a row filter an UPDATE can arrive as an INSERT without its TOASTed values."""
    create_docs(database18, "FULL")
    database18.execute("ALTER TABLE docs REPLICA IDENTITY DEFAULT")
    synced = sync_table(database18, "docs", qdrant=qdrant, start=False, superuser=True)
    database18.execute(f'CREATE PUBLICATION "{synced.daemon.slot}" FOR TABLE docs WHERE (id >= 3)')
    synced.daemon.start()
    database18.execute("UPDATE docs SET id = 10, note = 'in' WHERE id = 1")
    database18.execute("UPDATE docs SET id = 0 WHERE id = 4 AND false")
    database18.execute("UPDATE docs SET id = -4 WHERE id = 4")
    synced.daemon.wait_caught_up()
    database18.execute("CREATE TABLE filtered AS SELECT * FROM docs WHERE id >= 3")
    database18.execute("ALTER TABLE filtered ADD PRIMARY KEY (id)")
    from tests.support.oracle import compare

    assert not compare(
        database18.url,
        "filtered",
        qdrant_url=qdrant.url,
        collection=synced.collection,
        api_key=qdrant.api_key,
    )
