"""Names are quoted wherever they stand in SQL: schemas, tables, partitions, columns, publications
and roles with quotes, spaces, SQL and more go all the way, through everything that reads or asks.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import cast

import psycopg
import pytest
from psycopg import sql

from cdc_sync.errors import CdcSyncError
from tests.support.fix_postgres import Database
from tests.support.least_privilege import least_privileged
from tests.support.oracle import assert_equal
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

NAMES = {
    "quotes": 'it\'s "quoted"',
    "sql": "x'; DROP TABLE canary; --",
    "quoted sql": 'x"; DROP TABLE canary; --',
    "percent": "100%s %(x)s %% %",
    "backslash": "back\\slash\\'n",
    "spaces": " around\tit ",
    "emoji": "🐘 Tïsch",
    "keyword": "select",
    "dots": "a.b..c",
    "dollars": "$$ $1 {0} ${x}",
    "comment": "/* -- x",
    "line break": "a\nb\r",
    "capitals": "CamelCase",
    "brackets": "a[0].b[]",
    "comma": "a,b;c",
    "control": "\x01\x7f",
}
LONGEST = 63
#: Unchanged vectors of this size are not sent, so an update reads the row again if its point is
#: missing.
DIM = 640


def odd(name: str, suffix: str) -> str:
    """The name with a suffix, of the 63 bytes that Postgres keeps at the most."""
    cut = name.encode()[: LONGEST - len(suffix)].decode(errors="ignore")
    return cut + suffix


def quoted(*names: str) -> str:
    return ".".join('"' + name.replace('"', '""') + '"' for name in names)


class Odd:
    """A partitioned table with a partition, everything of it named alike."""

    def __init__(self, database: Database, name: str) -> None:
        self.database = database
        self.schema, self.table = odd(name, "s"), odd(name, "t")
        self.key, self.text, self.vector = odd(name, "k"), odd(name, "p"), odd(name, "v")
        self.sql = quoted(self.schema, self.table)
        place = quoted(self.schema, odd(name, "1"))
        key, text = quoted(self.key), quoted(self.text)
        # Percent signs stay what they are: no parameters are given.
        database.execute(
            f"CREATE SCHEMA {quoted(self.schema)};"
            f"CREATE TABLE {self.sql} ({key} bigint PRIMARY KEY, {text} text,"
            f" {quoted(self.vector)} vector({DIM})) PARTITION BY RANGE ({key});"
            f"CREATE TABLE {place} PARTITION OF {self.sql} FOR VALUES FROM (0) TO (1000);"
            f"CREATE INDEX {quoted(odd(name, 'i'))} ON {self.sql} ({text})"
        )
        for number in range(1, 11):
            self.insert(number)

    def insert(self, number: int) -> None:
        listed = ", ".join(map(quoted, (self.key, self.text, self.vector)))
        values = ",".join(str((number * 7 + i) % 13 / 13) for i in range(DIM))
        self.database.execute(
            f"INSERT INTO {self.sql} ({listed}) VALUES ({number}, 'text {number}', '[{values}]')"
        )

    def update(self, assignment: str, number: int) -> None:
        self.database.execute(
            f"UPDATE {self.sql} SET {assignment} WHERE {quoted(self.key)} = {number}"
        )

    def entry(self, qdrant: QdrantTarget, name: str) -> dict[str, object]:
        """Its settings; the filter and the new name of a field are odd, too."""
        rename = {self.text: odd(name, "r")}
        if "/" in name:
            # Qdrant keeps a vector in a directory of its name.
            rename[self.vector] = odd(name, "v").replace("/", "|")
        return {
            "name": self.sql,
            "collection": qdrant.new_collection_name(),
            "columns": [self.key, self.text, self.vector],
            "where": f"{quoted(self.key)} < 900",
            "rename": rename,
        }


def ask(life: Running, table: Odd, *keys: int) -> None:
    """Ask for the table, or for rows of it, to be read again."""
    body: dict[str, object] = {
        "pipeline": life.pipeline.settings.pipeline.name,
        "table": f"{table.schema}.{table.table}",
    }
    if keys:
        body["keys"] = [[str(key)] for key in keys]
    text = json.dumps({"resync": body})
    table.database.execute("SELECT pg_logical_emit_message(true, 'cdc_sync', %s)", (text,))


async def equal(life: Running, entries: Sequence[Mapping[str, object]]) -> None:
    """Every table and its collection have the same content."""
    await life.caught_up()
    for entry in entries:
        await asyncio.to_thread(
            assert_equal,
            life.database.url,
            str(entry["name"]),
            qdrant_url=life.qdrant.url,
            collection=str(entry["collection"]),
            api_key=life.qdrant.api_key,
            rename=cast("Mapping[str, str]", entry["rename"]),
            where=str(entry["where"]),
        )


#: Role and publication have one name a run, tables and columns all of them.
@pytest.mark.timeout(300)
@pytest.mark.requirement("R5")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("Pub, '\"X\\; -- %s", id="everything"),
        pytest.param("ü" * 32, id="63 bytes", marks=pytest.mark.campaign),
    ],
)
async def test_names_of_every_kind(database18: Database, qdrant: QdrantTarget, name: str) -> None:
    database18.execute("CREATE TABLE canary (id int PRIMARY KEY)")
    names = [*NAMES.values(), "ü" * 32]
    tables = [Odd(database18, one) for one in names]
    entries = [table.entry(qdrant, one) for table, one in zip(tables, names, strict=True)]
    collections = [str(entry["collection"]) for entry in entries]
    publication = odd(name, "P")
    role = least_privileged(
        database18, entries, publication=publication, name=odd(name, database18.name[-7:])
    )
    settings = pipeline_settings(database18, qdrant, *entries, pg_url=role.url)
    settings = settings.model_copy(
        update={"source": settings.source.model_copy(update={"publication": publication})}
    )

    def counted(number: int) -> bool:
        return all(_points(qdrant, collection) == number for collection in collections)

    async with running(settings, database18, qdrant) as life:
        life.patience_seconds = 120
        await equal(life, entries)
        for table in tables:
            key, text = quoted(table.key), quoted(table.text)
            # Streamed, the key changed, out of the filter, gone.
            table.insert(11)
            table.update(f"{text} = 'changed'", 2)
            table.update(f"{key} = 200", 3)
            table.update(f"{key} = 950", 4)
            database18.execute(f"DELETE FROM {table.sql} WHERE {key} = 5")
        await equal(life, entries)
        for table, collection in zip(tables, collections, strict=True):
            qdrant.client().delete(collection, [6, 7, 8], wait=True)
            # The vector is not sent and the point is not there, so the row is read again.
            table.update(f"{quoted(table.text)} = 'read again'", 6)
            ask(life, table, 7, 8)
        await life.wait(lambda: counted(9), "the rows")
        await equal(life, entries)
        for table, collection in zip(tables, collections, strict=True):
            qdrant.client().delete(collection, [1, 2, 9], wait=True)
            ask(life, table)
        await life.wait(lambda: counted(9), "the tables")
        await equal(life, entries)
        for table in tables:
            # It may wait for a lock of the second look, which goes on meanwhile.
            await asyncio.to_thread(database18.execute, f"TRUNCATE {table.sql}")
            table.insert(77)
        await equal(life, entries)
        await life.stop()
    assert database18.execute("SELECT count(*) FROM canary") == [(0,)]
    # A second start compares all of it with what is there.
    async with running(settings, database18, qdrant) as life:
        tables[0].insert(78)
        await equal(life, entries)


def _points(qdrant: QdrantTarget, collection: str) -> int:
    return qdrant.client().count(collection, exact=True).count


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_role_that_is_told_what_it_lacks(database18: Database, name: str) -> None:
    """The SQL of remedies and scripts is quoted as well: it runs, and does what it says."""
    database18.execute("CREATE TABLE canary (id int PRIMARY KEY)")
    table = Odd(database18, name)
    entry: dict[str, object] = {"name": table.sql, "collection": "odd"}
    narrow = {**entry, "columns": [table.key, table.vector]}
    role = odd(name, database18.name[-7:])
    first = least_privileged(database18, [narrow], publication=odd(name, "P"), name=role)
    hidden = sql.SQL("SELECT {} FROM {}").format(
        sql.Identifier(table.text), sql.Identifier(table.schema, table.table)
    )
    with psycopg.connect(first.url, autocommit=True) as connection:
        read = sql.SQL("SELECT {}, ctid FROM {}").format(
            sql.Identifier(table.key), sql.Identifier(table.schema, odd(name, "1"))
        )
        assert len(connection.execute(read).fetchall()) == 10
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute(hidden)
        flags = connection.execute(
            "SELECT rolsuper, rolcreaterole, rolcreatedb, rolbypassrls, rolreplication"
            " FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
    assert flags == (False, False, False, False, True)
    assert database18.execute("SELECT count(*) FROM canary") == [(0,)]
    # A second run of the script, now for more, is no error.
    database18.execute(f"DROP PUBLICATION {quoted(odd(name, 'P'))}")
    again = least_privileged(database18, [entry], publication=odd(name, "P"), name=role)
    with psycopg.connect(again.url, autocommit=True) as connection:
        assert len(connection.execute(hidden).fetchall()) == 10


def test_names_that_are_no_names(database18: Database) -> None:
    database18.execute("CREATE TABLE docs (id int PRIMARY KEY)")
    for role in ("r" * 64, "ü" * 32):
        with pytest.raises(CdcSyncError, match="1 to 63 bytes"):
            least_privileged(database18, [{"name": "docs"}], name=role)
