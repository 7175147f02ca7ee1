"""``cdc-sync dlq`` run in the test's own process, and tables with rows that cannot be written."""

from __future__ import annotations

import json
from typing import Any

from tests.support.command_line import Done, in_process
from tests.support.daemon import Daemon
from tests.support.fix_postgres import Database


def dlq(daemon: Daemon, command: str, *arguments: str) -> Done:
    """Run ``cdc-sync dlq COMMAND`` with the daemon's configuration."""
    return in_process("dlq", command, "--config", str(daemon.config), *arguments)


def letters(daemon: Daemon) -> list[dict[str, Any]]:
    """The dead letters, as ``dlq list --json`` gives them."""
    done = dlq(daemon, "list", "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)["dead_letters"]
    return found


def keys(daemon: Daemon) -> list[str]:
    """The keys of the dead letters of a table with one key column."""
    return [letter["key"][0] for letter in letters(daemon)]


def create_loose(database: Database, rows: int, key: str = "bigint", dimensions: int = 3) -> None:
    """A table ``loose`` whose vector column takes any dimension (R17); rows ``1`` to ``rows`` have
    as many as the collection gets."""
    database.execute(
        f"CREATE TABLE loose (id {key} PRIMARY KEY, note text, weight float8, emb vector);"
        f"INSERT INTO loose SELECT i::text::{key}, 'note ' || i, i,"
        f" array_fill(i, ARRAY[{dimensions}])::vector FROM generate_series(1, {rows}) i"
    )
