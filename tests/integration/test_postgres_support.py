"""The Postgres fixtures themselves."""

from __future__ import annotations

from tests.support.fix_postgres import Database


def test_database_has_pgvector(database: Database) -> None:
    assert database.execute("SELECT '[1,2]'::vector(2)::text") == [("[1,2]",)]


def test_protocol(protocol_database: Database) -> None:
    assert database_major(protocol_database) == protocol_database.major


def database_major(database: Database) -> int:
    ((number,),) = database.execute("SELECT current_setting('server_version_num')::int / 10000")
    assert isinstance(number, int)
    return number
