"""The role that ``cdc-sync check --sql`` makes: enough for everything, and for nothing else."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from pathlib import Path

import psycopg
import pytest

from cdc_sync.cli import main
from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.ops.redaction import forget_secrets
from cdc_sync.postgres.connect import connect
from tests.support.daemon import write_config
from tests.support.fix_postgres import Database
from tests.support.least_privilege import least_privileged
from tests.support.oracle import compare
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget
from tests.support.source_tables import source_settings

PERMISSION = 77
CANARY = "canary-that-must-not-leave"


class Command:
    """``cdc-sync check`` in this process."""

    def __init__(
        self, directory: Path, qdrant: QdrantTarget, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._directory = directory
        self._qdrant = qdrant
        self._capsys = capsys

    def __call__(self, url: str, table: Mapping[str, object], *arguments: str) -> tuple[int, str]:
        key = {} if self._qdrant.api_key is None else {"api_key": self._qdrant.api_key}
        config = write_config(
            self._directory / "check.toml",
            [table],
            source={"url": url},
            qdrant={"url": self._qdrant.url, **key},
        )
        code = main(["check", "--config", str(config), *arguments])
        forget_secrets()
        captured = self._capsys.readouterr()
        assert captured.err == ""
        return code, captured.out


@pytest.fixture
def check(tmp_path: Path, qdrant: QdrantTarget, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, qdrant, capsys)


def errors(output: str) -> list[dict[str, str]]:
    return [f for f in json.loads(output)["findings"] if f["severity"] == "error"]


@pytest.mark.requirement("R85", "R89")
async def test_everything_runs_as_this_role(
    protocol_database: Database, qdrant: QdrantTarget
) -> None:
    """On every version: copy, stream, second look, resync, truncation, and no DDL in all of it."""
    database = protocol_database
    by_list, partitions = "", ""
    if database.major >= 15:  # before, partitioned tables are not followed
        by_list = " PARTITION BY LIST (part)"
        partitions = "".join(
            f"CREATE TABLE app.docs{n} PARTITION OF app.docs FOR VALUES IN ({n});" for n in (1, 2)
        )
    database.execute(
        "CREATE SCHEMA app; CREATE SCHEMA audit; CREATE TABLE audit.ddl (tag text);"
        "CREATE TABLE app.docs (id int, part int, body text, note text, PRIMARY KEY (id, part))"
        f"{by_list}; ALTER TABLE app.docs ALTER body SET STORAGE EXTERNAL; {partitions}"
        "INSERT INTO app.docs SELECT n, 1 + n % 2, repeat('x', 9000), 'note'"
        "  FROM generate_series(1, 60) n"
    )
    entry = {"name": "app.docs", "collection": qdrant.new_collection_name()}
    role = least_privileged(database, [entry], publication="least")
    database.execute(
        "CREATE FUNCTION audit.note() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS"
        " 'BEGIN INSERT INTO audit.ddl VALUES (tg_tag); END';"
        "CREATE EVENT TRIGGER noting ON ddl_command_start EXECUTE FUNCTION audit.note()"
    )
    settings = pipeline_settings(database, qdrant, entry, pg_url=role.url)
    source = settings.source.model_copy(update={"publication": "least"})
    settings = settings.model_copy(update={"source": source})
    async with running(settings, database, qdrant) as life:
        await life.assert_equal()
        points = [point.id for point in qdrant.client().scroll(entry["collection"], limit=5)[0]]
        qdrant.client().delete(entry["collection"], points, wait=True)
        # Bodies are not sent, and some points are not there.
        database.execute("UPDATE app.docs SET note = 'changed'")
        database.execute("UPDATE app.docs SET part = 2 WHERE id = 2")
        database.execute("DELETE FROM app.docs WHERE id = 3")
        await life.assert_equal()
        left = [point.id for point in qdrant.client().scroll(entry["collection"], limit=5)[0]]
        qdrant.client().delete(entry["collection"], left, wait=True)
        request = {"pipeline": settings.pipeline.name, "table": "app.docs"}
        with psycopg.connect(role.url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_logical_emit_message(true, 'cdc_sync', %s)",
                (json.dumps({"resync": request}),),
            )
        await life.wait(
            lambda: qdrant.client().count(entry["collection"]).count == 59, "the second look"
        )
        await life.assert_equal()
        # It may wait for the lock of the second look, which ends meanwhile.
        await asyncio.to_thread(database.execute, "TRUNCATE app.docs")
        database.execute("INSERT INTO app.docs VALUES (1, 1, 'one', NULL)")
        await life.assert_equal()
        await life.stop()
    assert database.execute("SELECT DISTINCT tag FROM audit.ddl") == []


def test_the_script_is_printed(database18: Database, check: Command) -> None:
    database18.execute("CREATE SCHEMA app; CREATE TABLE app.docs (id int PRIMARY KEY, a text)")
    code, script = check(database18.url, {"name": "app.docs"}, "--sql")
    assert code == 0
    statements = [line for line in script.splitlines() if line and not line.startswith("--")]
    assert statements == [
        'CREATE ROLE "cdc_sync" LOGIN REPLICATION;',
        f'GRANT CONNECT ON DATABASE "{database18.name}" TO "cdc_sync";',
        'GRANT USAGE ON SCHEMA "app" TO "cdc_sync";',
        'GRANT SELECT ON "app"."docs" TO "cdc_sync";',
        (
            'CREATE PUBLICATION "cdc_sync" FOR TABLE ONLY "app"."docs"'
            " WITH (publish_via_partition_root = true);"
        ),
    ]
    assert not re.search("SUPERUSER|CREATEDB|CREATEROLE|BYPASSRLS|ALL ", "\n".join(statements))
    # For a name of one's own, without what is there already, for the connected role by default.
    _, named = check(database18.url, {"name": "app.docs"}, "--sql-role", 'o"dd')
    assert 'CREATE ROLE "o""dd" LOGIN REPLICATION;' in named
    role = least_privileged(database18, [{"name": "app.docs"}])
    _, own = check(role.url, {"name": "app.docs"}, "--sql")
    assert f'ALTER ROLE "{role.name}" LOGIN REPLICATION;' in own
    assert "CREATE PUBLICATION" not in own.replace("CREATE PUBLICATION takes", "")


@pytest.mark.requirement("R86")
async def test_row_level_security(
    database18: Database, qdrant: QdrantTarget, check: Command
) -> None:
    """Refused while it applies, by check and at the start; with the script's role nothing hides."""
    database18.execute(
        "CREATE TABLE docs (id int PRIMARY KEY, tenant text);"
        "INSERT INTO docs SELECT n, 'tenant ' || n % 3 FROM generate_series(1, 30) n"
    )
    entry = {"name": "docs", "collection": qdrant.new_collection_name()}
    role = least_privileged(database18, [entry])
    database18.execute(
        "ALTER TABLE docs ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY tenants ON docs USING (tenant = 'tenant 1')"
    )
    code, output = await asyncio.to_thread(check, role.url, entry, "--json")
    (error,) = errors(output)
    assert code == PERMISSION
    assert "row level security applies" in error["message"]
    assert f'ALTER ROLE "{role.name}" BYPASSRLS;' in error["remedy"]
    settings = pipeline_settings(database18, qdrant, entry, pg_url=role.url)
    source = settings.source.model_copy(update={"publication": "cdc_sync"})
    settings = settings.model_copy(update={"source": source})
    with pytest.raises(SourceError) as caught:
        async with running(settings, database18, qdrant):
            pass
    assert caught.value.kind is ErrorKind.SOURCE_PERMISSION
    assert not qdrant.client().collection_exists(entry["collection"])
    # Whoever asks all the same gets an error, never a part.
    with (
        connect(source_settings(role.url)) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute("SELECT * FROM public.docs")
    _, script = await asyncio.to_thread(check, role.url, entry, "--sql")
    assert '--   "public"."docs"' in script
    database18.execute(script)
    async with running(settings, database18, qdrant) as life:
        await life.assert_equal()
        assert qdrant.client().count(entry["collection"]).count == 30


@pytest.mark.requirement("R87")
@pytest.mark.parametrize("how", ["columns", "exclude"])
async def test_columns_that_are_not_taken_cannot_be_read(
    database18: Database, qdrant: QdrantTarget, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The grant is for columns, on which everything works; the others never leave the database."""
    database18.execute(
        "CREATE TABLE docs (id int PRIMARY KEY, body text, secret text, emb vector(640));"
        f"INSERT INTO docs SELECT n, 'body', '{CANARY}', array_fill(n / 7.0, '{{640}}')::vector"
        "  FROM generate_series(1, 50) n"
    )
    entry: dict[str, object] = {"name": "docs", "collection": qdrant.new_collection_name()}
    entry |= {"columns": ["id", "body", "emb"]} if how == "columns" else {"exclude": ["secret"]}
    options: dict[str, object] = {how: entry[how]}
    role = least_privileged(database18, [entry], publication="least")
    with psycopg.connect(role.url, autocommit=True) as connection:
        for denied in ("SELECT secret FROM docs", "SELECT * FROM docs", "BEGIN; LOCK docs"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(denied)
            connection.execute("ROLLBACK")
    settings = pipeline_settings(database18, qdrant, entry, pg_url=role.url)
    source = settings.source.model_copy(update={"publication": "least"})
    settings = settings.model_copy(update={"source": source})
    collection = str(entry["collection"])
    async with running(settings, database18, qdrant) as life:
        await life.assert_equal(**options)
        qdrant.client().delete(collection, [1, 2], wait=True)
        database18.execute(f"UPDATE docs SET body = 'x', secret = '{CANARY}2' WHERE id < 10")
        request = json.dumps(
            {"resync": {"pipeline": settings.pipeline.name, "table": "public.docs"}}
        )
        database18.execute("SELECT pg_logical_emit_message(true, 'cdc_sync', %s)", (request,))
        await life.assert_equal(**options)
    found, _ = qdrant.client().scroll(collection, limit=100, with_payload=True)
    assert len(found) == 50
    assert CANARY not in repr(found) + caplog.text
    assert all("secret" not in (record.payload or {}) for record in found)


def test_columns_that_cannot_be_read_are_named(
    database18: Database, qdrant: QdrantTarget, check: Command
) -> None:
    """With the GRANT that helps, and that is enough."""
    database18.execute(
        'CREATE TABLE docs (id int, "the text" text, more int, PRIMARY KEY (id))'
        " PARTITION BY RANGE (id); CREATE TABLE docs1 PARTITION OF docs DEFAULT"
    )
    narrow = {"name": "docs", "columns": ["id", "more"]}
    role = least_privileged(database18, [narrow])
    assert check(role.url, narrow, "--json")[0] == 0
    database18.execute(
        "DROP PUBLICATION cdc_sync; CREATE PUBLICATION cdc_sync FOR TABLE docs"
        " WITH (publish_via_partition_root = true)"
    )
    wide = {"name": "docs", "columns": ["id", "the text", "more"], "collection": "wide"}
    database18.execute("ALTER TABLE docs ADD COLUMN apart int")
    code, output = check(role.url, wide, "--json")
    assert code == PERMISSION
    (error,) = errors(output)
    assert error["message"].count('"the text" of public.docs') == 2
    assert '"more"' not in error["message"]
    assert f'GRANT SELECT ("the text") ON "public"."docs" TO "{role.name}";' in error["remedy"]
    assert f'GRANT SELECT ("the text") ON "public"."docs1" TO "{role.name}";' in error["remedy"]
    database18.execute(error["remedy"].partition("\n")[2])
    assert check(role.url, wide, "--json")[0] == 0
    # All columns: a grant for the table.
    whole = {"name": "docs", "collection": "whole"}
    (error,) = errors(check(role.url, whole, "--json")[1])
    assert '"apart" of public.docs' in error["message"]
    assert f'GRANT SELECT ON "public"."docs1" TO "{role.name}";' in error["remedy"]
    database18.execute(error["remedy"].partition("\n")[2])
    assert check(role.url, whole, "--json")[0] == 0
    assert not compare(
        database18.url,
        "docs",
        qdrant_url=qdrant.url,
        collection=_empty(qdrant),
        api_key=qdrant.api_key,
    )


def _empty(qdrant: QdrantTarget) -> str:
    name = qdrant.new_collection_name()
    qdrant.client().create_collection(name, vectors_config={})
    return name


def test_a_partition_without_its_grant(database18: Database, check: Command) -> None:
    database18.execute(
        "CREATE SCHEMA apart; CREATE TABLE docs (id int PRIMARY KEY) PARTITION BY RANGE (id);"
        "CREATE TABLE docs1 PARTITION OF docs FOR VALUES FROM (0) TO (10)"
    )
    entry = {"name": "docs"}
    role = least_privileged(database18, [entry])
    database18.execute("CREATE TABLE apart.docs2 PARTITION OF docs FOR VALUES FROM (10) TO (20)")
    (error,) = errors(check(role.url, entry, "--json")[1])
    assert "apart.docs2" in error["message"]
    assert "public.docs1" not in error["message"]
    _, script = check(role.url, entry, "--sql")
    assert "-- Partitions that come later need the same" in script
    database18.execute(error["remedy"].partition("\n")[2])
    assert check(role.url, entry, "--json")[0] == 0
