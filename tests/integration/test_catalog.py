"""The catalog: names, tables, types, connections and what they refuse."""

from __future__ import annotations

import threading

import psycopg
import pytest

from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.mapping.table import Column, Table, TypeKind
from cdc_sync.mapping.values import needs_text
from cdc_sync.postgres.catalog import TypeResolver, find_table, read_table, server_info
from cdc_sync.postgres.connect import PgConnection, connect, translate
from cdc_sync.postgres.identifiers import parse_name, qualified, quote_ident, quote_literal
from cdc_sync.postgres.pg_types import sends_binary
from cdc_sync.postgres.preflight import (
    check_identity,
)
from tests.support.fix_postgres import Database, PrivatePostgres
from tests.support.source_tables import find, source_settings

HOSTILE = ('a"b', "t; DROP TABLE x --", "🐘 née", "SELECT", "%s{}\\", "'")


def connection(database: Database) -> PgConnection:
    return connect(source_settings(database.url))


def column(table: Table, name: str) -> Column:
    (found,) = [column for column in table.columns if column.name == name]
    return found


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("docs", ("docs",)),
        ("Docs", ("docs",)),
        ('"Docs"', ("Docs",)),
        ('app . "Odd ""name"""', ("app", 'Odd "name"')),
        ('db."a.b"."c d"', ("db", "a.b", "c d")),
        ("ÄÖ", ("ÄÖ",)),
        ("_a$1", ("_a$1",)),
        ("x" * 70, ("x" * 63,)),
        ('"' + "é" * 40 + '"', ("é" * 31,)),
    ],
)
def test_names_are_read_as_in_sql(text: str, parts: tuple[str, ...]) -> None:
    assert parse_name(text) == parts


@pytest.mark.parametrize(
    "text",
    ["", " ", "a b", "1a", 'a"b', '""', "a.", ".a", "a..b", "a.b.c.d", '"a', "a;b", "a\0", '"\0"'],
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a name"):
        parse_name(text)


def test_quoting_is_undone_by_the_server(database18: Database) -> None:
    with connection(database18) as conn:
        for name in HOSTILE:
            query = f"SELECT {quote_literal(name)} AS {quote_ident(name)}"
            cursor = conn.execute(query.encode())
            assert cursor.fetchone() == (name,)
            assert cursor.description is not None
            assert cursor.description[0].name == name
            assert parse_name(qualified(name, name)) == (name, name)
    with pytest.raises(ValueError, match="NUL"):
        quote_ident("a\0b")
    with pytest.raises(ValueError, match="empty"):
        quote_ident("")


@pytest.mark.parametrize("name", HOSTILE)
def test_tables_with_hostile_names(database18: Database, name: str) -> None:
    quoted = quote_ident(name)
    with database18.connect() as conn:
        conn.execute(
            f"CREATE SCHEMA {quoted}; CREATE TABLE {quoted}.{quoted} ({quoted} int)".encode()
        )
    table = find(database18, f"{quoted}.{quoted}")
    assert (table.schema, table.name, table.columns[0].name) == (name, name, name)
    assert table.leaves[0].oid == table.oid


def test_names_go_along_the_roles_search_path(database18: Database) -> None:
    database18.execute(
        "CREATE SCHEMA one; CREATE SCHEMA two; CREATE TABLE two.t (id int);"
        "CREATE TABLE t (id int);"
        "CREATE TABLE one.u (id int)"
    )
    assert find(database18, "t").schema == "public"
    database18.execute(
        f"ALTER DATABASE {database18.name} SET search_path = 'nosuch', one, two, public"
    )
    assert find(database18, "t").schema == "two"
    assert find(database18, "U").schema == "one"
    assert find(database18, "public.t").schema == "public"
    assert find(database18, f"{database18.name}.one.u").schema == "one"
    with pytest.raises(ConfigError, match="another database"):
        find(database18, "other.one.u")


def test_objects_of_others_do_not_shadow_the_catalog(database18: Database) -> None:
    """A schema before pg_catalog in the path must not lend us its functions and operators."""
    database18.execute(
        "CREATE SCHEMA evil; CREATE TABLE public.t (id int PRIMARY KEY);"
        "CREATE FUNCTION evil.pg_relation_filenode(oid) RETURNS oid LANGUAGE sql"
        " AS 'SELECT 1::oid'; CREATE FUNCTION evil.current_database() RETURNS name LANGUAGE sql"
        " AS $$SELECT 'evil'::name$$;"
        "CREATE TABLE evil.pg_class (oid oid);"
        f"ALTER DATABASE {database18.name} SET search_path = evil, pg_catalog, public"
    )
    with connection(database18) as conn:
        assert server_info(conn).database == database18.name
        assert find_table(conn, "t").leaves[0].relfilenode > 1
        assert conn.execute("SHOW search_path").fetchone() == ("",)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dosc", "public.docs"),
        ("app.docs", "public.docs"),
        ("Camelcase", 'public."CamelCase"'),
        ("public.camelcase", 'public."CamelCase"'),
        ("wholly_other", "Searched in public"),
    ],
)
def test_missing_tables_come_with_a_hint(database18: Database, name: str, hint: str) -> None:
    database18.execute('CREATE TABLE docs (id int); CREATE TABLE "CamelCase" (id int)')
    with pytest.raises(SourceError, match="there is no table") as caught:
        find(database18, name)
    assert caught.value.kind is ErrorKind.TABLE_UNUSABLE
    assert hint in caught.value.remedy


@pytest.mark.parametrize(
    ("ddl", "reason"),
    [
        ("CREATE VIEW x AS SELECT 1", "is a view"),
        ("CREATE MATERIALIZED VIEW x AS SELECT 1", "materialized view"),
        ("CREATE UNLOGGED TABLE x (id int)", "unlogged"),
        ("CREATE SEQUENCE x", "sequence"),
        ("CREATE TYPE x AS (a int)", "composite type"),
        (
            (
                "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w;"
                "CREATE FOREIGN TABLE x (id int) SERVER s"
            ),
            "foreign table",
        ),
    ],
)
def test_what_is_not_replicated_is_refused(database18: Database, ddl: str, reason: str) -> None:
    database18.execute(ddl)
    with pytest.raises(SourceError, match=reason) as caught:
        find(database18, "x")
    assert caught.value.kind is ErrorKind.TABLE_UNUSABLE


def test_system_tables_are_refused(database18: Database) -> None:
    with pytest.raises(SourceError, match="system table"):
        find(database18, "pg_catalog.pg_class")


# -- tables ----------------------------------------------------------------------------------------


def test_a_table_in_full(database: Database) -> None:
    database.execute(
        "CREATE TABLE t (gone int, b text, a int NOT NULL, e vector(3), h halfvec(4), s sparsevec,"
        " g int GENERATED ALWAYS AS (a * 2) STORED, PRIMARY KEY (a, b));"
        "ALTER TABLE t DROP gone;"
        "CREATE INDEX hnsw ON t USING hnsw (e vector_cosine_ops)"
        " WITH (m = 8, ef_construction = 40);"
        "CREATE INDEX multi ON t (b DESC, lower(b)) INCLUDE (a) WHERE a > 4;"
        "INSERT INTO t SELECT repeat('x', 100), i FROM generate_series(1, 1000) i; ANALYZE t"
        if database.major >= 18
        # pgvector 0.6 of the 16 server has vector only.
        else "CREATE TABLE t (gone int, b text, a int NOT NULL, e vector(3),"
        " g int GENERATED ALWAYS AS (a * 2) STORED, PRIMARY KEY (a, b));"
        "ALTER TABLE t DROP gone;"
        "CREATE INDEX hnsw ON t USING hnsw (e vector_cosine_ops)"
        " WITH (m = 8, ef_construction = 40);"
        "CREATE INDEX multi ON t (b DESC, lower(b)) INCLUDE (a) WHERE a > 4;"
        "INSERT INTO t SELECT repeat('x', 100), i FROM generate_series(1, 1000) i; ANALYZE t"
    )
    table = find(database, "t")
    assert table.primary_key == ("a", "b")
    assert table.identity_columns == ("a", "b")
    assert (table.replica_identity, table.partitioned, table.row_security) == ("d", False, False)
    assert table.columns[0].name == "b"
    assert table.columns[0].attnum == 2
    assert column(table, "a").not_null
    assert column(table, "g").generated == "s"
    vector = column(table, "e").type
    assert (vector.name, vector.typmod, vector.is_pgvector) == ("vector", 3, True)
    hnsw, multi, primary = table.indexes
    assert (hnsw.method, hnsw.options) == ("hnsw", {"m": "8", "ef_construction": "40"})
    assert [(c.column, c.opclass) for c in hnsw.columns] == [("e", "vector_cosine_ops")]
    assert [c.column for c in multi.columns] == ["b", None]
    assert multi.columns[1].expression == "lower(b)"
    assert multi.predicate == "(a > 4)"
    assert primary.primary
    assert primary.unique
    assert table.leaves[0].pages > 10
    assert table.leaves[0].estimated_rows == 1000


def test_partitions(database: Database) -> None:
    database.execute(
        "CREATE TABLE p (id int, e vector(2), PRIMARY KEY (id)) PARTITION BY RANGE (id);"
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);"
        "CREATE TABLE p2 PARTITION OF p FOR VALUES FROM (10) TO (20) PARTITION BY RANGE (id);"
        "CREATE TABLE p2a PARTITION OF p2 FOR VALUES FROM (10) TO (15);"
        "CREATE TABLE p2b PARTITION OF p2 FOR VALUES FROM (15) TO (20);"
        "CREATE INDEX ON p1 USING hnsw (e vector_ip_ops);"
        "CREATE INDEX ON p2a USING hnsw (e vector_ip_ops)"
    )
    table = find(database, "p")
    assert table.partitioned
    assert [leaf.name for leaf in table.leaves] == ["p1", "p2a", "p2b"]
    assert all(leaf.relfilenode for leaf in table.leaves)
    # The leaves' own indexes count once; those that belong to the root's index do not count again.
    assert [(i.method, i.columns[0].opclass) for i in table.indexes] == [
        ("btree", "int4_ops"),
        ("hnsw", "vector_ip_ops"),
    ]
    assert find(database, "p1").partitioned is False
    database.execute("CREATE TABLE empty (id int) PARTITION BY RANGE (id)")
    assert find(database, "empty").leaves == ()


def test_a_leaf_whose_changes_are_not_logged(database18: Database) -> None:
    database18.execute(
        "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w;"
        "CREATE TABLE p (id int) PARTITION BY RANGE (id);"
        "CREATE FOREIGN TABLE far PARTITION OF p FOR VALUES FROM (0) TO (10) SERVER s"
    )
    with pytest.raises(SourceError, match=r"far.* is a foreign table"):
        find(database18, "p")


@pytest.mark.requirement("R22", "R25", "R28")
@pytest.mark.parametrize(
    ("ddl", "identity", "columns", "problem"),
    [
        ("PRIMARY KEY (a)", "d", ("a",), None),
        ("PRIMARY KEY (a) DEFERRABLE", "d", (), "deferrable"),
        ("UNIQUE (a)", "d", (), "no primary key"),
        ("PRIMARY KEY (a)); ALTER TABLE t REPLICA IDENTITY FULL; SELECT (1", "f", ("a", "b"), None),
        (
            (
                "PRIMARY KEY (a), UNIQUE (b));"
                " ALTER TABLE t REPLICA IDENTITY USING INDEX t_b_key; SELECT (1"
            ),
            "i",
            ("b",),
            None,
        ),
        ("PRIMARY KEY (a)); ALTER TABLE t REPLICA IDENTITY NOTHING; SELECT (1", "n", (), "NOTHING"),
        (
            (
                "PRIMARY KEY (a), UNIQUE (b)); ALTER TABLE t REPLICA IDENTITY USING INDEX t_b_key;"
                " ALTER TABLE t DROP CONSTRAINT t_b_key; SELECT (1"
            ),
            "i",
            (),
            "gone or invalid",
        ),
    ],
)
def test_replica_identities(
    database: Database, ddl: str, identity: str, columns: tuple[str, ...], problem: str | None
) -> None:
    database.execute(f"CREATE TABLE t (a int NOT NULL, b int NOT NULL, {ddl})")
    table = find(database, "t")
    assert table.replica_identity == identity
    assert table.identity_columns == columns
    assert table.deferrable_key == ("DEFERRABLE" in ddl)
    if problem is None:
        check_identity(table)
        return
    with pytest.raises(SourceError, match=problem) as caught:
        check_identity(table)
    assert caught.value.kind is ErrorKind.TABLE_UNUSABLE
    assert 'ALTER TABLE "public"."t"' in caught.value.remedy


# -- types -----------------------------------------------------------------------------------------


@pytest.mark.requirement("R12", "R13")
def test_types_are_resolved_to_the_bottom(database18: Database) -> None:
    database18.execute(
        """
        CREATE SCHEMA extensions; ALTER EXTENSION vector SET SCHEMA extensions;
        CREATE DOMAIN emb AS extensions.vector(5); CREATE DOMAIN emb2 AS emb;
        CREATE TYPE mood AS ENUM ('a', 'b');
        CREATE TYPE inner_pair AS (x int, y mood[]);
        CREATE TYPE pair AS (gone int, p inner_pair, acl aclitem);
        ALTER TYPE pair DROP ATTRIBUTE gone;
        CREATE TYPE float_range AS RANGE (subtype = float8);
        CREATE TABLE t (e emb2, m mood, p pair, ps pair[], r float_range, mr float_multirange,
          va extensions.vector(4)[], iv int2vector, n name, pt point, cash money, v varchar(7)[],
          acl aclitem, acls aclitem[],
          b bit(8), j jsonb, q "char")
        """
    )
    table = find(database18, "t")
    kinds = {c.name: c.type.kind for c in table.columns}
    assert kinds["e"] is TypeKind.DOMAIN
    emb = column(table, "e").type
    assert (emb.typmod, emb.element and emb.element.typmod, emb.base.typmod) == (-1, 5, 5)
    assert emb.base.is_pgvector
    assert emb.base.schema == "extensions"
    assert kinds["m"] is TypeKind.ENUM
    pair = column(table, "p").type
    assert [name for name, _ in pair.fields] == ["p", "acl"]
    inner = pair.fields[0][1]
    moods = inner.fields[1][1]
    assert moods.kind is TypeKind.ARRAY
    assert moods.element is not None
    assert moods.element.kind is TypeKind.ENUM
    for name in ("r", "mr"):
        element = column(table, name).type.element
        assert element is not None
        assert element.name == "float8"
    assert kinds["mr"] is TypeKind.MULTIRANGE
    vectors = column(table, "va").type
    assert (vectors.typmod, vectors.element and vectors.element.typmod) == (4, 4)
    assert vectors.extension is None
    assert kinds["iv"] is TypeKind.ARRAY
    assert {kinds[name] for name in ("n", "pt", "cash", "b", "j", "q", "acl")} == {TypeKind.BASE}
    assert column(table, "cash").type.typmod == 2
    text = {c.name for c in table.columns if not sends_binary(c.type)}
    assert text == {"acl", "acls", "p", "ps"}
    assert {c.name for c in table.columns if needs_text(c.type)} == {"acls", "p", "ps"}


@pytest.mark.requirement("R13")
def test_types_change_when_their_extension_is_made_anew(database: Database) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, e vector(3))")
    with connection(database) as conn:
        types = TypeResolver(conn)
        old = column(read_table(conn, find_table(conn, "t").oid, types), "e").type
        database.execute(
            "DROP EXTENSION vector CASCADE; CREATE SCHEMA x; CREATE EXTENSION vector SCHEMA x;"
            "ALTER TABLE t ADD e x.vector(4)"
        )
        new = column(read_table(conn, find_table(conn, "t").oid, types), "e").type
        assert new.oid != old.oid
        assert (new.schema, new.typmod, new.is_pgvector) == ("x", 4, True)
        assert types.resolve(old.oid, 3) == old
        types.forget(old.oid)
        with pytest.raises(SourceError, match=f"OID {old.oid}"):
            types.resolve(old.oid)


def test_forgetting_a_type_forgets_what_contains_it(database18: Database) -> None:
    database18.execute("CREATE TYPE mood AS ENUM ('a'); CREATE TYPE pair AS (m mood[])")
    with connection(database18) as conn:
        types = TypeResolver(conn)
        oids = {
            name: int(oid)
            for name, oid in conn.execute(
                "SELECT typname::text, oid::int8 FROM pg_type"
                " WHERE typname IN ('mood', 'pair', 'text')"
            ).fetchall()
        }
        before = types.resolve(oids["pair"])
        database18.execute("ALTER TYPE pair RENAME ATTRIBUTE m TO n")
        assert types.resolve(oids["pair"]) == before
        types.forget(oids["text"])
        assert types.resolve(oids["pair"]) == before
        types.forget(oids["mood"])
        assert types.resolve(oids["pair"]).fields[0][0] == "n"


# -- connections -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "host=localhost pass'word",
        "postgresql://u:p%zz@h/d",
        "hunter2",
        "postgresql://u:hunter2@more@localhost/d",
        "postgresql://u:hunter2@host:port/d",
        "nonsense=hunter2 host=localhost",
    ],
)
def test_malformed_urls_are_not_repeated(url: str) -> None:
    with pytest.raises((ConfigError, SourceError)) as caught:
        connect(source_settings(url))
    for secret in ("hunter2", "word", "p%zz", "more@"):
        assert secret not in caught.value.message + caught.value.remedy.replace("password", "")
    assert caught.value.__cause__ is None


def test_refused_connections(database18: Database, private_postgres: PrivatePostgres) -> None:
    role = database18.create_cdc_role([])
    url = psycopg.conninfo.conninfo_to_dict(role.url)
    secret = str(url["password"])

    def attempt(replication: bool = False, **changes: str | int) -> SourceError:
        dsn = psycopg.conninfo.make_conninfo(role.url, **changes)
        with pytest.raises(SourceError) as caught:
            connect(source_settings(dsn, connect_timeout_seconds=2), replication=replication)
        assert secret not in caught.value.message
        assert "hunter2" not in caught.value.message
        return caught.value

    assert attempt(password="hunter2").kind is ErrorKind.SOURCE_AUTH
    assert attempt(user="nobody_at_all", password="hunter2").kind is ErrorKind.SOURCE_AUTH
    assert attempt(port=1, host="127.0.0.1").kind is ErrorKind.SOURCE_UNAVAILABLE
    assert attempt(host="nosuch.invalid").kind is ErrorKind.SOURCE_UNAVAILABLE
    assert attempt(options="-c nonsense_setting=1").kind is ErrorKind.CONFIG
    database18.execute(f"ALTER ROLE {role.name} NOREPLICATION")
    assert attempt(replication=True).kind is ErrorKind.SOURCE_PERMISSION
    database18.execute(f"REVOKE CONNECT ON DATABASE {database18.name} FROM {role.name}")
    assert attempt().kind is ErrorKind.SOURCE_PERMISSION
    database18.execute(f"ALTER ROLE {role.name} NOLOGIN")
    assert attempt().kind is ErrorKind.SOURCE_AUTH
    missing = psycopg.conninfo.make_conninfo(database18.url, dbname="nosuch")
    with pytest.raises(SourceError, match="does not exist") as caught:
        connect(source_settings(missing))
    assert caught.value.kind is ErrorKind.CONFIG

    settings = {"max_connections": "5", "superuser_reserved_connections": "0"}
    full = source_settings(private_postgres({**settings, "max_wal_senders": "1"}).url())
    held = [connect(full) for _ in range(5)]
    with pytest.raises(SourceError, match=r"too many|remaining connection") as caught:
        connect(full)
    assert caught.value.kind is ErrorKind.SOURCE_UNAVAILABLE
    for conn in held:
        conn.close()


@pytest.mark.requirement("R66")
@pytest.mark.parametrize(
    "refusal",
    [
        "unsupported startup parameter: replication",
        "unsupported startup parameter in options: datestyle",
        "Tenant or user not found",
        "no such database: app",
    ],
)
def test_poolers_are_recognised(refusal: str) -> None:
    import socket
    import struct

    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            client, _ = listener.accept()
            with client:
                (length,) = struct.unpack(">i", client.recv(4))
                request = client.recv(length - 4)
                if request[:4] != struct.pack(">i", 3 << 16):
                    client.sendall(b"N" if request[:4] == struct.pack(">i", 80877103) else b"")
                    continue
                fields = f"SFATAL\0VFATAL\0C08P01\0M{refusal}\0\0".encode()
                client.sendall(b"E" + struct.pack(">i", len(fields) + 4) + fields)
                if refusal:
                    break

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    url = f"host=127.0.0.1 port={port} user=u dbname=app sslmode=disable gssencmode=disable"
    with pytest.raises(SourceError) as caught:
        connect(source_settings(url), replication=True)
    thread.join(5)
    listener.close()
    assert caught.value.kind is ErrorKind.CONFIG
    assert "pooler" in caught.value.remedy


def test_errors_of_data_do_not_quote_it(database18: Database) -> None:
    with connection(database18) as conn, pytest.raises(psycopg.Error) as caught:
        conn.execute("SELECT 's3cret'::int")
    error = translate(caught.value, "looking")
    assert "s3cret" not in error.message
    assert "22P02" in error.message
