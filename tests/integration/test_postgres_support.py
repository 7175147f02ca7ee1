"""The servers that tests and demo run on, the fixtures over them, and the workload."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from cdc_sync.demo.binaries import Account, find_binaries
from cdc_sync.demo.embedded import PostgresServer
from cdc_sync.demo.leftovers import DIRECTORY_PREFIX
from cdc_sync.errors import ConfigError, SourceError
from tests.support.fix_postgres import (
    Database,
    DatabaseFactory,
    PrivatePostgres,
    create_database,
    drop_database,
)
from tests.support.proxy import ProxyTo
from tests.support.workload import (
    EverythingTable,
    KeyKind,
    Writer,
    create_everything_table,
    load,
    run_writers,
)

KEY_KINDS: tuple[KeyKind, ...] = ("bigint", "uuid", "text", "composite")


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def setting(server: PostgresServer, name: str) -> str:
    with psycopg.connect(server.url()) as connection:
        row = connection.execute("SELECT current_setting(%s)", (name,)).fetchone()
    assert row is not None
    return str(row[0])


def digest(database: Database, table: EverythingTable) -> object:
    """Return a hash over all rows and columns, in key order."""
    keys = ", ".join(table.key_columns)
    return database.execute(
        f"SELECT count(*), md5(string_agg(md5(t::text), '' ORDER BY {keys})) FROM {table.name} t"
    )


# -- the server


def test_data_survive_stop_kill_and_restart_on_the_same_port(
    private_postgres: PrivatePostgres,
) -> None:
    server = private_postgres()
    port = server.port
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("CREATE TABLE t (a int)")
    for number, end in enumerate(
        (server.stop, lambda: server.stop("immediate"), server.kill), start=1
    ):
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("INSERT INTO t VALUES (%s)", (number,))
        pid = server.pid
        end()
        assert not server.running
        assert server.pid is None
        assert not Path(f"/proc/{pid}").exists()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(server.url(), connect_timeout=2)
        server.start()
        assert server.port == port
        with psycopg.connect(server.url()) as connection:
            assert connection.execute("SELECT max(a) FROM t").fetchone() == (number,)


def test_kill_leaves_no_process(private_postgres: PrivatePostgres) -> None:
    server = private_postgres()
    connections = [psycopg.connect(server.url()) for _ in range(3)]
    before = _processes_in(server.data_directory)
    assert len(before) >= 8
    server.kill()
    assert _processes_in(server.data_directory) == []
    for connection in connections:
        connection.close()


def _processes_in(directory: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if Path(os.readlink(entry / "cwd")) == directory:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_settings_are_defaults_arguments_and_alter_system(
    private_postgres: PrivatePostgres,
) -> None:
    server = private_postgres({"application_name": "it's \\ quoted", "max_wal_senders": "3"})
    assert setting(server, "wal_level") == "logical"
    assert setting(server, "fsync") == "off"
    assert setting(server, "application_name") == "it's \\ quoted"
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET work_mem = '5MB'")
    server.restart(settings={"fsync": "on"})
    assert setting(server, "fsync") == "on"
    assert setting(server, "max_wal_senders") == "3"
    assert setting(server, "work_mem") == "5MB"


def test_failure_to_start_shows_the_log(private_postgres: PrivatePostgres) -> None:
    server = private_postgres(start=False)
    with pytest.raises(SourceError, match="did not start") as caught:
        server.start({"shared_buffers": "nonsense"})
    assert "shared_buffers" in caught.value.message
    assert not server.running
    server.start({"shared_buffers": "32MB"})
    assert setting(server, "shared_buffers") == "32MB"


def test_smart_stop_waits_for_clients_and_says_so(private_postgres: PrivatePostgres) -> None:
    server = private_postgres()
    with psycopg.connect(server.url()) as connection:
        with pytest.raises(SourceError, match="did not stop"):
            server.stop("smart", timeout_seconds=0.5)
        assert connection.execute("SELECT 1").fetchone() == (1,)
    server.stop("smart")


def test_wrong_password_is_refused_and_socket_is_private(postgres18: PostgresServer) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(postgres18.url(password="wrong"))
    directory = postgres18.socket_directory
    assert directory.stat().st_mode & 0o077 == 0
    socket = directory / f".s.PGSQL.{postgres18.port}"
    assert socket.stat().st_mode & 0o077 == 0
    address = conninfo.make_conninfo(
        host=str(directory), port=postgres18.port, user="postgres", dbname="postgres"
    )
    with psycopg.connect(address) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_given_directory_is_used_again_and_never_removed() -> None:
    # The name is too long for the path of a Unix socket.
    base = Account.for_server().temporary_root() / f"cdc-test-{os.getpid()}-{'x' * 100}"
    try:
        with PostgresServer(directory=base) as server:
            password = server.url()
            assert len(str(server.socket_directory)) < 60
            with psycopg.connect(server.url(), autocommit=True) as connection:
                connection.execute("CREATE TABLE kept ()")
            with pytest.raises(ConfigError, match="already has a server"):
                PostgresServer(directory=base)
        assert not server.socket_directory.exists()
        with PostgresServer(directory=base, port=server.port) as again:
            assert again.url() == password
            with psycopg.connect(again.url()) as connection:
                connection.execute("SELECT FROM kept")
        with (
            pytest.raises(ConfigError, match="holds data of Postgres 18"),
            PostgresServer(find_binaries(16), directory=base),
        ):
            pass
    finally:
        subprocess.run(["rm", "-rf", str(base)], check=True)


# -- owners that die

_OWNER = """
import sys, time
from cdc_sync.demo.embedded import PostgresServer
server = PostgresServer()
server.start()
print(server.directory, server.pid, server._watchdog.pid, server.url(), flush=True)
"""


def _owner(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _OWNER + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _report(owner: subprocess.Popen[str]) -> tuple[Path, int, int, str]:
    assert owner.stdout is not None
    directory, pid, watchdog, url = owner.stdout.readline().split()
    return Path(directory), int(pid), int(watchdog), url


def test_server_goes_with_a_killed_owner() -> None:
    with _owner("time.sleep(100)") as owner:
        directory, _, _, url = _report(owner)
        with psycopg.connect(url):
            owner.kill()
            eventually(lambda: not directory.exists())
    assert _processes_in(directory / "data") == []


def test_server_goes_with_an_owner_that_exits_without_closing_it() -> None:
    with _owner("") as owner:
        directory, *_ = _report(owner)
        assert owner.wait(30) == 0
    assert not directory.exists()


def test_next_start_removes_what_a_killed_owner_and_watchdog_left() -> None:
    with _owner("time.sleep(100)") as owner:
        directory, postmaster, watchdog, _ = _report(owner)
        os.kill(watchdog, signal.SIGKILL)
        owner.kill()
    assert directory.exists()
    assert postmaster in _processes_in(directory / "data")
    PostgresServer().close()
    assert not directory.exists()
    assert _processes_in(directory / "data") == []


def test_interrupt_of_the_owner_does_not_reach_the_server() -> None:
    code = """
        try:
            print("waiting", flush=True)
            time.sleep(100)
        except KeyboardInterrupt:
            print("interrupted", server.running, flush=True)
            time.sleep(100)
    """
    with _owner(code) as owner:
        *_, url = _report(owner)
        assert owner.stdout is not None
        assert owner.stdout.readline() == "waiting\n"
        os.killpg(owner.pid, signal.SIGINT)
        assert owner.stdout.readline() == "interrupted True\n"
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        owner.kill()


def test_forked_child_does_not_stop_the_server() -> None:
    # A process of its own that forks, so that this one's threads are not forked.
    code = """
        import os
        if os.fork() == 0:
            server.close()
            os._exit(0)
        os.wait()
        print(server.running, flush=True)
    """
    with _owner(code) as owner:
        _report(owner)
        assert owner.stdout is not None
        assert owner.stdout.readline() == "True\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="this is the ordinary user already")
def test_ordinary_user() -> None:
    entry = pwd.getpwnam("nobody")
    # The interpreter may be out of that user's reach, so the process changes after its imports.
    code = f"""
        import os, psycopg
        from cdc_sync.demo import binaries
        os.setgroups([]); os.setgid({entry.pw_gid}); os.setuid({entry.pw_uid})
        with PostgresServer() as other:
            with psycopg.connect(other.url()) as connection:
                print(connection.execute("SELECT current_setting('port')").fetchone()[0])
            assert other.directory.stat().st_uid == {entry.pw_uid}
        print(other.directory.exists())
    """
    # The imports alone, without a server of root's.
    prologue = _OWNER.partition("server = ")[0]
    done = subprocess.run(
        [sys.executable, "-c", prologue + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    port, exists = done.stdout.split()
    assert port.isdigit()
    assert exists == "False"


def test_close_after_kill_removes_the_directory(private_postgres: PrivatePostgres) -> None:
    server = private_postgres()
    assert server.directory.name.startswith(DIRECTORY_PREFIX)
    server.kill()
    server.close()
    assert not server.directory.exists()


# -- the fixtures


def test_database_has_its_extensions(database: Database) -> None:
    assert database.execute("SELECT '[1,2]'::vector(2)::text") == [("[1,2]",)]
    names = {name for (name,) in database.execute("SELECT extname FROM pg_extension")}
    assert "vector" in names
    assert ("hstore" in names) == (database.major == 18)
    assert database.execute("SELECT current_setting('server_version_num')::int / 10000") == [
        (database.major,)
    ]


def test_databases_are_separate(database18_factory: DatabaseFactory) -> None:
    first, second = database18_factory(), database18_factory()
    first.execute("CREATE TABLE t (); CREATE PUBLICATION p FOR TABLE t")
    assert second.execute("SELECT to_regclass('t')") == [(None,)]
    assert second.execute("SELECT * FROM pg_publication") == []


def test_database_goes_with_its_slots_and_roles(postgres18: PostgresServer) -> None:
    made = create_database(postgres18)
    made.execute("CREATE TABLE t (a int PRIMARY KEY)")
    role = made.create_cdc_role(["t"])
    made.execute("SELECT pg_create_logical_replication_slot('gone_idle', 'pgoutput')")
    made.execute("SELECT pg_create_logical_replication_slot('gone_active', 'test_decoding')")
    stream = psycopg.pq.PGconn.connect(
        conninfo.make_conninfo(made.url, replication="database").encode()
    )
    assert stream.exec_(b"START_REPLICATION SLOT gone_active LOGICAL 0/0").status == (
        psycopg.pq.ExecStatus.COPY_BOTH
    )
    drop_database(made)
    with psycopg.connect(postgres18.url()) as connection:
        for query in (
            "SELECT slot_name FROM pg_replication_slots WHERE slot_name LIKE 'gone%'",
            f"SELECT datname FROM pg_database WHERE datname = '{made.name}'",
            f"SELECT rolname FROM pg_roles WHERE rolname = '{role.name}'",
        ):
            assert connection.execute(query).fetchall() == []
    stream.finish()


def test_protocol_servers(protocol_database: Database) -> None:
    major = protocol_database.major
    assert setting(protocol_database.server, "server_version").startswith(f"{major}.")
    assert setting(protocol_database.server, "wal_level") == "logical"
    names = {name for (name,) in protocol_database.execute("SELECT extname FROM pg_extension")}
    assert ("vector" in names) == (major in (16, 18))
    assert ("hstore" in names) == (major != 16)


def test_cdc_role_has_its_grants_and_no_more(database: Database) -> None:
    database.execute(
        "CREATE SCHEMA app; CREATE TABLE app.docs (id int PRIMARY KEY);"
        " CREATE TABLE app.other (id int PRIMARY KEY)"
    )
    role = database.create_cdc_role(["app.docs"])
    with psycopg.connect(role.url, autocommit=True) as connection:
        assert connection.execute("SELECT ctid, * FROM app.docs").fetchall() == []
        connection.execute("SELECT pg_create_logical_replication_slot('least', 'pgoutput')")
        for denied in (
            "SELECT * FROM app.other",
            "INSERT INTO app.docs VALUES (1)",
            "CREATE TABLE app.mine ()",
            "CREATE SCHEMA mine",
            "CREATE PUBLICATION p FOR TABLE app.docs",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(denied)
        flags = connection.execute(
            "SELECT rolsuper, rolcreaterole, rolcreatedb, rolbypassrls, rolreplication"
            " FROM pg_roles WHERE rolname = current_user"
        ).fetchone()
        assert flags == (False, False, False, False, True)


def test_proxy_between_client_and_server(database18: Database, proxy_to: ProxyTo) -> None:
    proxy = proxy_to(database18.server.host, database18.server.port)
    with psycopg.connect(database18.url_through(proxy), autocommit=True) as connection:
        assert connection.execute("SELECT current_database()").fetchone() == (database18.name,)
        proxy.cut()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")


# -- the workload


def test_load_is_deterministic_and_varied(database: Database) -> None:
    with database.connect() as connection:
        tables = [create_everything_table(connection, f"t{n}", dim=32) for n in range(3)]
        for table, seed in zip(tables, (1, 1, 2), strict=True):
            load(connection, table, 2500, seed)
    first, second, other = (digest(database, table) for table in tables)
    assert first == second
    assert first != other
    # Every column has NULLs and more than one value, but the key, the vector and the computed ones.
    names = [name for name, _ in tables[0].payload] + ["second", "half", "sparse", "multi"]
    queries = [
        f"SELECT '{name}', count(*) - count({name}), count(DISTINCT {name}::text) FROM t0"
        for name in names
    ]
    never_null = {"revision", "big", "title", "score", "amount", "guid"}
    for name, nulls, values in database.execute(" UNION ALL ".join(queries)):
        assert (nulls == 0) == (name in never_null), name
        assert isinstance(values, int), name
        assert values >= 1, name
    assert database.execute("SELECT max(length(body)) > 3000 FROM t0") == [(True,)]


def test_every_type_of_the_mapping_is_there(database18: Database) -> None:
    with database18.connect() as connection:
        create_everything_table(connection, dim=8)
    rows = database18.execute(
        "SELECT format_type(atttypid, NULL) FROM pg_attribute"
        " WHERE attrelid = 'everything'::regclass AND attnum > 0"
    )
    present = {str(name).replace("character varying", "varchar") for (name,) in rows}
    wanted = [
        "boolean",
        "smallint",
        "integer",
        "bigint",
        "oid",
        "xid",
        "cid",
        "xid8",
        "regclass",
        "regtype",
        "real",
        "numeric",
        "text",
        "varchar",
        "character",
        "name",
        '"char"',
        "jsonpath",
        "uuid",
        "date",
        "interval",
        "money",
        "inet",
        "cidr",
        "macaddr",
        "macaddr8",
        "bit",
        "bytea",
        "json",
        "jsonb",
        "tsvector",
        "pg_lsn",
        "tid",
        "citext",
        "ltree",
        "lquery",
        "ltxtquery",
        "hstore",
        "point",
        "line",
        "lseg",
        "box",
        "path",
        "polygon",
        "circle",
        "vector",
        "halfvec",
        "sparsevec",
        "int4range",
        "int8range",
        "numrange",
        "tsrange",
        "tstzrange",
        "daterange",
        "int4multirange",
        "tstzmultirange",
        "nummultirange",
        "datemultirange",
    ]
    assert set(wanted) <= present


def test_values_are_the_same_in_all_versions(
    postgres16: PostgresServer, database18: Database, database18_factory: DatabaseFactory
) -> None:
    digests = []
    for database in (database18, database18_factory(postgres16)):
        with database.connect() as connection:
            table = create_everything_table(connection, dim=16, contrib=False)
            load(connection, table, 500, seed=3)
        digests.append(digest(database, table))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("key", KEY_KINDS)
def test_writers_change_every_way(database: Database, key: KeyKind) -> None:
    with database.connect() as connection:
        table = create_everything_table(connection, dim=600, key=key)
        load(connection, table, 100, seed=1)
    before = digest(database, table)
    stats = run_writers(database.url, table, 3, transactions=40, key_space=200)
    assert stats.committed + stats.rolled_back == 120
    assert stats.committed > 80
    assert stats.rolled_back > 0
    assert len(stats.operations) == 11
    assert digest(database, table) != before


def test_one_writer_is_deterministic(database18: Database) -> None:
    outcomes = []
    with database18.connect() as connection:
        for name in ("one", "two"):
            table = create_everything_table(connection, name, dim=16)
            load(connection, table, 50, seed=1)
            stats = run_writers(database18.url, table, 1, transactions=60, seed=5, key_space=100)
            outcomes.append((digest(database18, table), stats.operations))
    assert outcomes[0] == outcomes[1]


def test_writer_lives_through_a_crash_of_the_server(
    private_postgres: PrivatePostgres, database18_factory: DatabaseFactory
) -> None:
    server = private_postgres()
    database = database18_factory(server)
    with database.connect() as connection:
        table = create_everything_table(connection, dim=16)
        load(connection, table, 50)
    writer = Writer(database.url, table, key_space=100, reconnect=True)
    writer.start()
    eventually(lambda: writer.stats.committed > 10)
    server.kill()
    server.start()
    committed = writer.stats.committed
    eventually(lambda: writer.stats.committed > committed + 10)
    stats = writer.finish()
    assert stats.reconnected >= 1


def test_error_of_a_writer_reaches_the_test(database18: Database) -> None:
    with database18.connect() as connection:
        table = create_everything_table(connection, dim=16)
        connection.execute("DROP TABLE everything")
    with pytest.raises(psycopg.errors.UndefinedTable):
        run_writers(database18.url, table, 1, transactions=5)
