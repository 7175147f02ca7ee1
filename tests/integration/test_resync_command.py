"""``cdc-sync resync`` and the control channel behind it: points are put right, under a running
stream, and whoever else writes into the channel does no harm."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg
import pytest

from cdc_sync.errors import ExitCode
from cdc_sync.mapping.ids import compile_point_id, id_scheme
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import connect
from cdc_sync.postgres.key_texts import KeyTextError, parse_keys
from cdc_sync.postgres.refetch import TableRedefinedError, fetch_rows
from cdc_sync.sync.resync_request import read_key
from tests.support.command_line import Done
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.resync_command import (
    SECRET,
    create_docs,
    different,
    outcome,
    points,
    put,
    remove,
    request,
    resync,
    resynced,
)
from tests.support.source_tables import raw_plan, source_settings

# -- what it puts right


def test_rows_by_key_are_made_as_they_are_and_others_are_left(
    database: Database, sync_table: SyncTable
) -> None:
    create_docs(database)
    synced = sync_table(database, "docs")
    for id_ in (3, 7, 8, 700, 701):
        put(synced, id_)
    remove(synced, 5, 6)
    out = resynced(synced, "--keys", "3", "5", "007", " 700 ", "3", "99")
    assert "5 rows of public.docs" in out
    assert different(synced) == {6, 8, 701}
    assert outcome(synced, "rows") == 1
    name = "cdc_sync_rows_reread_total"
    assert synced.daemon.metric(name, table="public.docs", result="written") == 3
    assert synced.daemon.metric(name, table="public.docs", result="deleted") == 2
    resynced(synced, "--table", 'public."docs"', "--keys", "6", "--keys", "8", "701")
    synced.assert_equal()


def test_rows_by_predicate(database18: Database, sync_table: SyncTable) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs")
    for id_ in range(1, 31):
        put(synced, id_)
    # A percent sign, a comment at the end, and the table's own name in it.
    out = resynced(synced, "--where", "docs.n % 2 = 0 AND note LIKE 'note%' -- the even ones")
    assert "15 rows of public.docs" in out
    assert different(synced) == set(range(1, 31, 2))
    out = resync(synced, "--where", "n > 1000").stdout
    assert out == "no row matches: nothing to ask for\n"


@pytest.mark.parametrize("everything", [False, True])
def test_a_table_as_a_whole(database18: Database, sync_table: SyncTable, everything: bool) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs")
    for id_ in (1, 2, 500):
        put(synced, id_)
    remove(synced, 9)
    out = resynced(synced, *(["--all"] if everything else []))
    assert "public.docs as a whole" in out
    synced.assert_equal()
    assert outcome(synced, "table") == 1
    assert "resync_completed" in [event["event"] for event in synced.daemon.events()]


def test_what_is_asked_for_while_nothing_streams_waits_in_the_wal(
    database18: Database, sync_table: SyncTable
) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs")
    put(synced, 1)
    assert synced.daemon.terminate() == 0
    done = resync(synced, "--keys", "1")
    assert done.returncode == 0
    assert "the request waits in the WAL" in done.stdout
    late = resync(synced, "--keys", "2", "--wait", "--timeout", "0.5")
    assert late.returncode == ExitCode.TEMPORARY
    assert "was not read within 0.5 s" in late.stdout
    synced.daemon.start()
    synced.assert_equal()
    assert outcome(synced, "rows") == 2


def test_an_embedded_database_that_is_in_use(database18: Database, sync_table: SyncTable) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs", target="edge")
    out = resync(synced, "--keys", "1", "2", "--wait").stdout
    assert out.endswith("done\n")
    assert resync(synced, "--wait").returncode == 0
    assert (outcome(synced, "rows"), outcome(synced, "table")) == (1, 1)
    assert synced.daemon.terminate() == 0
    # The database is not held while it waits, or the pipeline could not start.
    thread = threading.Thread(target=lambda: done.append(resync(synced, "--keys", "1", "--wait")))
    done: list[Done] = []
    thread.start()
    time.sleep(1.0)
    synced.daemon.start()
    thread.join(30)
    assert done[0].stdout.endswith("done\n")
    synced.assert_equal()


# -- kinds of keys


@dataclass(frozen=True)
class KeyCase:
    """Key columns, the key of a row in SQL, and a text for the same key."""

    columns: str
    value: str
    key: str


KEYS: Final = {
    "bigint": KeyCase("k bigint", "9223372036854775807", "+09223372036854775807"),
    "negative": KeyCase("k int", "-5", "-05"),
    "uuid": KeyCase(
        "k uuid",
        "'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11'",
        "{A0EEBC99-9C0B4EF8-BB6D6BB9BD380A11}",
    ),
    "odd text": KeyCase(
        "k text", """E'a,b "c" [d]\\\\ ''e'' \u00e9 %s'""", """a,b "c" [d]\\ 'e' \u00e9 %s"""
    ),
    "empty text": KeyCase("k text", "''", ""),
    "char(5)": KeyCase("k char(5)", "'ab'", "ab"),
    "varchar in a domain": KeyCase("k code", "'x-1'", "x-1"),
    "enumeration": KeyCase("k colour", "'deep red'", "deep red"),
    "citext": KeyCase("k citext", "'Acme'", "Acme"),
    "numeric": KeyCase("k numeric", "1.50", "15e-1"),
    "float8": KeyCase("k float8", "0.1", "1e-1"),
    "timestamptz": KeyCase("k timestamptz", "'2024-02-29 12:00+02'", "2024-02-29T10:00:00Z"),
    "bytea": KeyCase("k bytea", r"'\x00ff'", r"\000\377"),
    "composite": KeyCase("a text, b int", "'x', 7", "x,007"),
    "composite in JSON": KeyCase("a text, b int", "E'x,y\\n', 7", '["x,y\\n", 7]'),
}
#: Any text is a key of these.
TEXTS: Final = {"odd text", "empty text", "char(5)", "varchar in a domain", "citext", "bytea"}
TYPES: Final = (
    "CREATE DOMAIN code AS varchar(8) CHECK (VALUE LIKE 'x%');"
    "CREATE TYPE colour AS ENUM ('deep red', 'blue');"
)


@pytest.mark.parametrize("name", KEYS)
def test_a_key_means_its_row_however_it_is_written(name: str, database18: Database) -> None:
    case = KEYS[name]
    names = ", ".join(column.split()[0] for column in case.columns.split(", "))
    database18.execute(
        f"{TYPES} CREATE TABLE docs ({case.columns}, PRIMARY KEY ({names}));"
        f"INSERT INTO docs VALUES ({case.value})"
    )
    with connect(source_settings(database18.url)) as connection:
        plan = raw_plan(find_table(connection, "docs"))
        scheme = id_scheme([column.type for column in plan.columns], None)
        point_id = compile_point_id(dataclasses.replace(plan, id_scheme=scheme))
        key = read_key(case.key, len(plan.key))
        (parsed,) = parse_keys(connection, plan.columns, [key, key])
        (row,) = fetch_rows(connection, plan, [parsed], [])
        # The id of a key whose row is gone is that which the row had.
        assert point_id(list(parsed)) == point_id(row)
        if name not in TEXTS:
            with pytest.raises(KeyTextError) as caught:
                parse_keys(connection, plan.columns, [key, (SECRET,) * len(key)])
            assert SECRET not in repr(caught.value)
            assert caught.value.__cause__ is None
        assert connection.info.transaction_status.name == "IDLE"


def test_keys_of_a_type_that_is_gone(database18: Database) -> None:
    database18.execute(f"{TYPES} CREATE TABLE docs (k colour PRIMARY KEY)")
    with connect(source_settings(database18.url)) as connection:
        plan = raw_plan(find_table(connection, "docs"))
        database18.execute("DROP TABLE docs; DROP TYPE colour")
        with pytest.raises(TableRedefinedError):
            parse_keys(connection, plan.columns, [("blue",)])


@pytest.mark.parametrize("key", ['["a,b \\"c\\" \u00e9\\n%s", 7]', "plain,007"])
def test_a_composite_key(key: str, database18: Database, sync_table: SyncTable) -> None:
    database18.execute(
        "CREATE TABLE docs (a text, b int, emb vector(3), PRIMARY KEY (b, a));"
        "ALTER TABLE docs DROP CONSTRAINT docs_pkey, ADD PRIMARY KEY (a, b);"
        "INSERT INTO docs VALUES (E'a,b \"c\" \u00e9\\n%s', 7, '[1,2,3]'), ('plain', 7, NULL)"
    )
    synced = sync_table(database18, "docs")
    text, number = read_key(key, 2)
    (id_,) = (str(i) for i, record in points(synced).items() if (record.payload or {})["a"] == text)
    record = points(synced)[id_]
    remove(synced, id_)
    resynced(synced, "--keys", key)
    synced.assert_equal()
    # A point whose row is gone.
    database18.execute("DELETE FROM docs WHERE (a, b) = (%s, %s)", (text, int(number)))
    synced.assert_equal()
    put(synced, id_, record)
    resynced(synced, "--keys", key)
    assert len(points(synced)) == 1
    synced.assert_equal()


def test_keys_from_files(database18: Database, sync_table: SyncTable, tmp_path: Path) -> None:
    database18.execute(
        "CREATE TABLE docs (k text PRIMARY KEY, emb vector(3));"
        "INSERT INTO docs VALUES (E'two\\nlines', '[1,2,3]'), ('plain', '[1,2,3]'), ('', NULL),"
        " ('[1]', NULL)"
    )
    synced = sync_table(database18, "docs")
    ids = [i if isinstance(i, int) else str(i) for i in points(synced)]
    as_json, plain = tmp_path / "keys.jsonl", tmp_path / "keys.txt"
    as_json.write_text('"two\\nlines"\n\n["plain"]\n""\n["[1]"]\n', encoding="utf-8")
    remove(synced, *ids)
    assert "4 rows" in resynced(synced, "--keys-file", str(as_json))
    synced.assert_equal()
    plain.write_bytes(b"plain\r\n\r\n[1]\n")
    remove(synced, *ids)
    assert "3 rows" in resynced(synced, "--keys-file", str(plain))
    assert len(points(synced)) == 3
    command = [sys.executable, "-m", "cdc_sync", "resync", "--config", str(synced.daemon.config)]
    done = subprocess.run(
        [*command, "--keys-file", "-", "--wait"],
        input="plain\n", capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("asked pipeline")
    assert "1 rows of public.docs" in done.stdout
    assert done.stdout.endswith("done\n")
    assert done.stderr == ""


def test_many_keys_are_many_messages(database18: Database, sync_table: SyncTable) -> None:
    create_docs(database18, rows=1)
    database18.execute(
        "INSERT INTO docs SELECT i, 'note', i, '[1,2,3]' FROM generate_series(2, 2600) i"
    )
    synced = sync_table(database18, "docs")
    remove(synced, *range(1, 2601, 3))
    resynced(synced, "--where", "true")
    assert outcome(synced, "rows") == 6
    synced.assert_equal()


# -- what it refuses


REFUSED: Final[tuple[tuple[list[str], ExitCode, str], ...]] = (
    (["--table", "nowhere"], ExitCode.CONFIG, "there is no table nowhere"),
    (["--table", "other"], ExitCode.CONFIG, "table other does not belong to pipeline"),
    (["--table", "docs", "--table", "other"], ExitCode.CONFIG, "table other does not belong"),
    (["--table", "docs;"], ExitCode.CONFIG, "is not a table's name"),
    (["--keys", "1", SECRET, "2"], ExitCode.CONFIG, "key 2 of 3 is no key of public.docs"),
    (["--keys", "1", "9" * 30], ExitCode.CONFIG, "key 2 of 2 is no key of public.docs"),
    (["--where", "colour = 'red'"], ExitCode.CONFIG, 'column "colour" does not exist'),
    (["--where", "note = n"], ExitCode.CONFIG, "evaluating the predicate"),
    (["--where", f"n = '{SECRET}'"], ExitCode.CONFIG, "evaluating the predicate"),
    (["--where", "true); DROP TABLE other; --"], ExitCode.CONFIG, "evaluating the predicate"),
    (["--where", "nextval('numbers') > 0"], ExitCode.CONFIG, "read-only transaction"),
    (["--pipeline.name", "another"], ExitCode.DATA, "no record of a pipeline 'another'"),
    (["--source.slot", "another"], ExitCode.DATA, "there is no slot another"),
    (["1", "2"], ExitCode.USAGE, "unexpected argument: 1"),
    (["--keys", "1", "--where", "true"], ExitCode.USAGE, "exclude each other"),
    (["--all", "--table", "docs"], ExitCode.USAGE, "--all goes with no"),
    (["--where", " "], ExitCode.USAGE, "--where is empty"),
    (["--keys-file", "/nowhere/keys"], ExitCode.USAGE, "cannot be read"),
    (["--keys-file", "/dev/null"], ExitCode.USAGE, "holds no key"),
)


def test_what_cannot_be_asked_for(database18: Database, sync_table: SyncTable) -> None:
    create_docs(database18)
    database18.execute("CREATE TABLE other (id int PRIMARY KEY, emb vector(3))")
    database18.execute("CREATE SEQUENCE numbers")
    # Who may do everything is refused for what is asked for, not for the lack of rights.
    synced = sync_table(database18, "docs", superuser=True)
    wrong = []
    for arguments, code, said in REFUSED:
        done = resync(synced, *arguments)
        if said not in done.stderr or done.returncode != code or done.stdout:
            wrong.append((arguments, done))
        assert SECRET not in done.stdout + done.stderr
    assert not wrong
    synced.daemon.wait_caught_up()
    assert "resync_requested" not in synced.daemon.log()


# -- whoever writes into the channel


def garbage(slot: str) -> list[str]:
    fields = {"pipeline": slot, "table": "public.docs"}
    return [
        "", "{", "null", "[" * 5000, SECRET, json.dumps({"resync": "all"}),
        json.dumps({"drop": fields}),
        json.dumps({"resync": {**fields, "where": "true"}}),
        json.dumps({"resync": {**fields, "keys": []}}),
        json.dumps({"resync": {**fields, "keys": [[str(i)] for i in range(501)]}}),
        json.dumps({"resync": {**fields, "keys": [["1", "2"]]}}),
        json.dumps({"resync": {**fields, "keys": [[1]]}}),
        json.dumps({"resync": {**fields, "keys": [["\0"]]}}),
        json.dumps({"resync": {**fields, "keys": [["x" * 10_000]]}}),
        "x" * (3 << 20),
    ]  # fmt: skip


@pytest.mark.requirement("R49")
def test_a_role_without_rights_can_do_no_harm(database: Database, sync_table: SyncTable) -> None:
    create_docs(database)
    database.execute("CREATE TABLE secrets (id bigint PRIMARY KEY, emb vector(3))")
    synced = sync_table(database, "docs")
    put(synced, 3)
    before = points(synced)
    stranger = f"stranger_{database.name}"
    database.execute(f"CREATE ROLE {stranger}")
    try:
        with database.connect() as connection:
            connection.execute(f"SET ROLE {stranger}".encode())
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute("SELECT FROM docs")
            for text in garbage(synced.daemon.slot):
                connection.execute("SELECT pg_logical_emit_message(true, 'cdc_sync', %s)", (text,))
            for table in ("public.secrets", "pg_catalog.pg_authid", f"public.{SECRET}", "docs"):
                connection.execute(
                    "SELECT pg_logical_emit_message(true, 'cdc_sync', %s)",
                    (request(synced, table=table),),
                )
            # Neither transactional, nor ours, nor of this pipeline.
            connection.execute(
                "SELECT pg_logical_emit_message(false, 'cdc_sync', %s)", (request(synced),)
            )
            connection.execute(
                "SELECT pg_logical_emit_message(true, 'CDC_SYNC', %s)", (request(synced),)
            )
            connection.execute(
                "SELECT pg_logical_emit_message(true, 'cdc_sync', %s)",
                (request(synced).replace(synced.daemon.slot, "another"),),
            )
            # A request like any other, whose keys are none.
            for key in ("1); DROP TABLE docs; --", "", SECRET, "1e400", "9" * 100):
                connection.execute(
                    "SELECT pg_logical_emit_message(true, 'cdc_sync', %s)",
                    (request(synced, "1", key),),
                )
        synced.daemon.wait_caught_up()
        assert outcome(synced, "invalid") == len(garbage(synced.daemon.slot)) + 1
        assert outcome(synced, "unknown_table") == 4
        assert outcome(synced, "unreadable") == 5
        assert outcome(synced, "table") == outcome(synced, "limited") == 0
        assert points(synced) == before
        assert SECRET not in synced.daemon.log()
        assert different(synced) == {3}
    finally:
        database.execute(f"DROP ROLE {stranger}")


@pytest.mark.requirement("R49")
def test_a_flood_of_requests_is_limited_and_the_stream_goes_on(
    database18: Database, sync_table: SyncTable
) -> None:
    create_docs(database18)
    synced = sync_table(database18, "docs")
    with database18.connect() as connection, connection.pipeline():
        for _ in range(300):
            connection.execute(
                "SELECT pg_logical_emit_message(true, 'cdc_sync', %s)", (request(synced),)
            )
    database18.execute("UPDATE docs SET note = 'later'")
    synced.assert_equal()
    assert outcome(synced, "table") == 5
    assert outcome(synced, "limited") == 295
