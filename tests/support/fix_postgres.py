"""Fixtures that give tests real Postgres servers and databases.

Servers are started when the first test asks for them, once per pytest session and major version,
and stopped at its end.

Which to take:

- ``database18`` (or ``database18_factory`` for several databases): **most tests**. One database on
  Postgres 18.
- ``database``: the same on 16 and on 18 (ids ``pg16``, ``pg18``), for what may differ between
  versions.
- ``postgres18``, ``postgres16``, ``postgres``: the servers themselves.
- ``private_postgres``: a server that the test may stop, kill or configure.
- ``protocol_postgres``, ``protocol_database``: 14 to 18 for tests of the replication protocol; 14,
  15 and 17 have no pgvector.

A database comes from a template that has pgvector and, where the binaries have contrib (18),
hstore, ltree, citext, pg_trgm and btree_gist. It is dropped after the test together with its
replication slots; publications go with it. Roles belong to the server, not to the database:
:meth:`Database.create_cdc_role` makes them with names of their own and drops them again.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final, Protocol

import psycopg
import pytest
from psycopg import sql

from cdc_sync.demo.binaries import BinDir, describe_binaries, find_binaries
from cdc_sync.demo.embedded import PostgresServer
from tests.support.postgres_packages import (
    PROTOCOL_ONLY_MAJORS,
    PackageMissingError,
    protocol_binaries,
)
from tests.support.proxy import TcpProxy
from tests.support.proxy import proxy_to as proxy_to  # a fixture, registered by being here

Connection = psycopg.Connection[tuple[object, ...]]

MAJORS: Final = (16, 18)
PROTOCOL_MAJORS: Final = (14, 15, 16, 17, 18)
EXTENSIONS: Final = ("vector", "hstore", "ltree", "citext", "pg_trgm", "btree_gist")
_TEMPLATE: Final = "cdc_template"
_numbers = itertools.count(1)


@dataclass
class CdcRole:
    """A role with the least rights that the daemon needs, and the URI to connect as it."""

    name: str
    url: str


@dataclass
class Database:
    """A database of its own for one test."""

    url: str
    name: str
    server: PostgresServer
    major: int
    _roles: list[str] = field(default_factory=list)

    def connect(self, autocommit: bool = True) -> Connection:
        """Open a connection as the superuser; the caller closes it (use ``with``)."""
        return psycopg.connect(self.url, autocommit=autocommit)

    def execute(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[object, ...]]:
        """Run SQL in autocommit mode and return the rows of its (first) result, if it has one.

        Without parameters the text may hold several statements, and percent signs are themselves.
        """
        with self.connect() as connection:
            cursor = connection.execute(query, parameters or None)
            return cursor.fetchall() if cursor.description is not None else []

    def url_through(self, proxy: TcpProxy) -> str:
        """Return the URL that reaches this database through a proxy to its server."""
        return self.server.url(self.name, host=proxy.host, port=proxy.port)

    def create_cdc_role(self, tables: Sequence[str], *, bypass_rls: bool = False) -> CdcRole:
        """Create the role for the daemon; see :func:`create_cdc_role`."""
        return create_cdc_role(self, tables, bypass_rls=bypass_rls)

    def drop_later(self, name: str) -> None:
        """Drop a role that is about to be made, together with the database."""
        self._roles.append(name)


class DatabaseFactory(Protocol):
    """Makes databases that live until the end of the test."""

    def __call__(self, server: PostgresServer | None = None) -> Database: ...


class PrivatePostgres(Protocol):
    """Starts servers that live until the end of the test."""

    def __call__(
        self, settings: Mapping[str, str] | None = None, *, major: int = 18, start: bool = True
    ) -> PostgresServer: ...


class _Servers:
    """The servers of one pytest session, by major version."""

    def __init__(self) -> None:
        self._running: dict[int, PostgresServer] = {}

    def get(self, major: int, binaries: BinDir | None = None) -> PostgresServer:
        server = self._running.get(major)
        if server is None:
            server = PostgresServer(binaries or find_binaries(major))
            server.start()
            self._running[major] = server
        return server

    def close(self) -> None:
        for server in self._running.values():
            server.close()


def pytest_report_header() -> list[str]:
    """Show which servers the tests will use."""
    return ["postgres: " + (", ".join(describe_binaries()) or "none installed")]


@pytest.fixture(scope="session")
def postgres_servers() -> Iterator[_Servers]:
    """The registry behind the other fixtures."""
    servers = _Servers()
    try:
        yield servers
    finally:
        servers.close()


@pytest.fixture(scope="session")
def postgres16(postgres_servers: _Servers) -> PostgresServer:
    """Postgres 16 with pgvector, shared by the session: do not stop or configure it."""
    return postgres_servers.get(16)


@pytest.fixture(scope="session")
def postgres18(postgres_servers: _Servers) -> PostgresServer:
    """Postgres 18 with pgvector and contrib, shared by the session: do not stop or configure it."""
    return postgres_servers.get(18)


@pytest.fixture(scope="session", params=MAJORS, ids=[f"pg{major}" for major in MAJORS])
def postgres(request: pytest.FixtureRequest, postgres_servers: _Servers) -> PostgresServer:
    """Each major version with pgvector in turn."""
    return postgres_servers.get(int(request.param))


@pytest.fixture(
    scope="session", params=PROTOCOL_MAJORS, ids=[f"pg{major}" for major in PROTOCOL_MAJORS]
)
def protocol_postgres(request: pytest.FixtureRequest, postgres_servers: _Servers) -> PostgresServer:
    """Each supported major version in turn; pgvector only in 16 and 18."""
    major = int(request.param)
    if major not in PROTOCOL_ONLY_MAJORS:
        return postgres_servers.get(major)
    try:
        return postgres_servers.get(major, protocol_binaries(major))
    except PackageMissingError as exc:
        if exc.required:
            pytest.fail(str(exc))
        pytest.skip(str(exc))


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[Database]:
    """A fresh database, on 16 and on 18."""
    yield from _fresh(postgres)


@pytest.fixture
def database16(postgres16: PostgresServer) -> Iterator[Database]:
    """A fresh database on 16."""
    yield from _fresh(postgres16)


@pytest.fixture
def database18(postgres18: PostgresServer) -> Iterator[Database]:
    """A fresh database on 18: the one to take unless versions matter."""
    yield from _fresh(postgres18)


@pytest.fixture
def protocol_database(protocol_postgres: PostgresServer) -> Iterator[Database]:
    """A fresh database on each of 14 to 18; only 16 and 18 have pgvector."""
    yield from _fresh(protocol_postgres)


@pytest.fixture
def database18_factory(postgres18: PostgresServer) -> Iterator[DatabaseFactory]:
    """A factory of fresh databases, on the shared 18 or on a server given (a private one for
    example).
    """
    with ExitStack() as stack:

        def make(server: PostgresServer | None = None) -> Database:
            fresh = create_database(server or postgres18)
            stack.callback(drop_database, fresh)
            return fresh

        yield make


@pytest.fixture
def private_postgres() -> Iterator[PrivatePostgres]:
    """A factory of servers for tests that stop, kill or configure them; closed after the test."""
    with ExitStack() as stack:

        def make(
            settings: Mapping[str, str] | None = None, *, major: int = 18, start: bool = True
        ) -> PostgresServer:
            server = PostgresServer(find_binaries(major))
            stack.callback(server.close)
            server.initdb()
            if start:
                server.start(settings)
            return server

        yield make


@pytest.fixture
def private_database(
    private_postgres: PrivatePostgres, database18_factory: DatabaseFactory
) -> Database:
    """A fresh database on an 18 that nobody else uses: ``private_database.server``."""
    return database18_factory(private_postgres())


def create_database(server: PostgresServer, name: str | None = None) -> Database:
    """Create a database with the extensions of this module on any running server."""
    name = name or f"test_{next(_numbers)}_{secrets.token_hex(3)}"
    with psycopg.connect(server.url(), autocommit=True) as connection:
        _ensure_template(server, connection)
        # Copying through the WAL needs no checkpoint; 14 knows only the other way.
        strategy = " STRATEGY wal_log" if server.major >= 15 else ""
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE {_TEMPLATE}{strategy}')
    return Database(server.url(name), name, server, server.major)


def drop_database(database: Database) -> None:
    """Drop the database, its replication slots and the roles made for it; nothing when the server
    is down.
    """
    if not database.server.running:
        return
    with psycopg.connect(database.server.url(), autocommit=True) as connection:
        _drop_slots(connection, database.name)
        connection.execute(f'DROP DATABASE IF EXISTS "{database.name}" WITH (FORCE)')
        for role in database._roles:
            connection.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))


def create_cdc_role(
    database: Database, tables: Sequence[str], *, bypass_rls: bool = False
) -> CdcRole:
    """Create a login role with exactly the rights the daemon needs.

    LOGIN, REPLICATION, CONNECT on the database, USAGE on the tables' schemas and SELECT on the
    ``tables`` (names as in SQL, schema optional). PUBLIC loses CONNECT on the database, so that the
    grant is proved. The publication is the table owner's business.
    """
    name = f"cdc_{next(_numbers)}_{secrets.token_hex(3)}"
    password = secrets.token_urlsafe(12)
    role = sql.Identifier(name)
    with database.connect() as connection:
        connection.execute(
            sql.SQL("CREATE ROLE {} LOGIN REPLICATION PASSWORD {} CONNECTION LIMIT 8").format(
                role, password
            )
        )
        database._roles.append(name)
        for setting in ("idle_in_transaction_session_timeout", "statement_timeout"):
            connection.execute(
                sql.SQL("ALTER ROLE {} SET {} = 0").format(role, sql.Identifier(setting))
            )
        if bypass_rls:
            connection.execute(sql.SQL("ALTER ROLE {} BYPASSRLS").format(role))
        place = sql.Identifier(database.name)
        connection.execute(sql.SQL("REVOKE CONNECT ON DATABASE {} FROM PUBLIC").format(place))
        connection.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(place, role))
        for table in tables:
            found = connection.execute(
                "SELECT n.nspname, c.relname FROM pg_class c"
                " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = %s::regclass",
                (table,),
            ).fetchone()
            assert found is not None
            schema, relation = sql.Identifier(str(found[0])), sql.Identifier(str(found[1]))
            connection.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(schema, role))
            connection.execute(
                sql.SQL("GRANT SELECT ON {}.{} TO {}").format(schema, relation, role)
            )
    return CdcRole(name, database.server.url(database.name, name, password))


def _fresh(server: PostgresServer) -> Iterator[Database]:
    made = create_database(server)
    try:
        yield made
    finally:
        drop_database(made)


def _ensure_template(server: PostgresServer, connection: Connection) -> None:
    if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (_TEMPLATE,)).fetchone():
        return
    connection.execute(f"CREATE DATABASE {_TEMPLATE}")
    with psycopg.connect(server.url(_TEMPLATE), autocommit=True) as inside:
        for extension in EXTENSIONS:
            if server.binaries.has_extension(extension):
                inside.execute(f"CREATE EXTENSION {extension}")
    # Autovacuum in the template would make CREATE DATABASE wait.
    connection.execute(f"ALTER DATABASE {_TEMPLATE} ALLOW_CONNECTIONS false")


def _drop_slots(connection: Connection, database: str, timeout_seconds: float = 20.0) -> None:
    """Drop every slot of the database, ending the walsenders that hold them."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        slots = connection.execute(
            "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = %s",
            (database,),
        ).fetchall()
        if not slots:
            return
        for slot, pid in slots:
            if pid is not None:
                connection.execute("SELECT pg_terminate_backend(%s)", (pid,))
            try:
                connection.execute("SELECT pg_drop_replication_slot(%s)", (slot,))
            except (psycopg.errors.ObjectInUse, psycopg.errors.UndefinedObject):
                # The walsender still lets go of it, or it was temporary and went with its session.
                if time.monotonic() > deadline:
                    raise
        time.sleep(0.02)
