"""Publications: what is created, what is accepted, and what the refusals tell to run."""

from __future__ import annotations

import pytest

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.postgres.catalog import find_table, server_info
from cdc_sync.postgres.connect import PgConnection, connect
from cdc_sync.postgres.identifiers import quote_ident
from cdc_sync.postgres.publication import (
    Publication,
    Wanted,
    add_to_publication,
    check_publication,
    create_publication,
    create_publication_sql,
    publication_warnings,
    publish_anew,
    read_publication,
)
from tests.support.fix_postgres import Database
from tests.support.source_tables import find, source_settings


def connection(database: Database) -> PgConnection:
    return connect(source_settings(database.url))


def published(database: Database, name: str = "pub") -> Publication:
    with connection(database) as conn:
        publication = read_publication(conn, name)
    assert publication is not None
    return publication


def check(database: Database, *wanted: Wanted, name: str = "pub") -> None:
    with connection(database) as conn:
        check_publication(published(database, name), wanted, server_info(conn))


def refused(database: Database, *wanted: Wanted) -> SourceError:
    with pytest.raises(SourceError) as caught:
        check(database, *wanted)
    assert caught.value.kind is ErrorKind.PUBLICATION_UNUSABLE
    return caught.value


@pytest.mark.requirement("R88", "R52")
def test_created_as_wanted_on_every_version(protocol_database: Database) -> None:
    protocol_database.execute(
        """CREATE TABLE "T ""x" ("Id" int PRIMARY KEY, "a'b" text, secret text, "🐘" int);
        CREATE TABLE child (PRIMARY KEY ("Id")) INHERITS ("T ""x");
        CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
        CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10)"""
    )
    first, second = find(protocol_database, '"T ""x"'), find(protocol_database, "p")
    name = """Pub, '"X; -- 🐘"""
    wanted: list[Wanted] = [(first, ["a'b", "🐘"]), (second, None)]
    with connection(protocol_database) as conn:
        assert read_publication(conn, name) is None
        server = server_info(conn)
        create_publication(conn, name, wanted, server)
        # Another process made it meanwhile: no error.
        create_publication(conn, name, wanted, server)
        check_publication(published(protocol_database, name), wanted, server)
    publication = published(protocol_database, name)
    assert publication.via_root
    assert not publication.all_tables
    # What inherits sends its changes under its own name (R40).
    child = find(protocol_database, "child")
    assert publication.tables.keys() == {first.oid, second.oid, child.oid}
    columns = publication.tables[first.oid].columns
    if protocol_database.major >= 15:
        # The identity is always in it.
        assert columns == ("Id", "a'b", "🐘")
    else:
        assert columns == ("Id", "a'b", "secret", "🐘")
    assert publication.tables[second.oid].columns == ("id", "v")
    protocol_database.execute("""UPDATE "T ""x" SET secret = 'y'; UPDATE p SET v = 'y'""")


def test_column_list_only_for_a_subset(database: Database) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, a text, b text)")
    table = find(database, "t")
    assert create_publication_sql("p", [(table, None)]) == (
        'CREATE PUBLICATION "p" FOR TABLE ONLY "public"."t"'
        " WITH (publish_via_partition_root = true);"
    )
    assert "(" not in create_publication_sql("p", [(table, ["b", "a", "id"])]).split("WITH")[0]
    assert '("id", "b")' in create_publication_sql("p", [(table, ["b"])])
    assert '("id"' not in create_publication_sql("p", [(table, ["b"])], server_version=140001)


@pytest.mark.requirement("R37")
@pytest.mark.parametrize("operations", ["insert", "insert, update", "update, delete, truncate"])
def test_all_operations_must_be_published(database: Database, operations: str) -> None:
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY);"
        f"CREATE PUBLICATION pub FOR TABLE t WITH (publish = '{operations}')"
    )
    error = refused(database, (find(database, "t"), None))
    database.execute(error.remedy)
    check(database, (find(database, "t"), None))


@pytest.mark.requirement("R34")
def test_partitioned_tables_must_come_under_their_root(database: Database) -> None:
    database.execute(
        "CREATE TABLE p (id int PRIMARY KEY) PARTITION BY RANGE (id);"
        "CREATE TABLE p1 PARTITION OF p FOR VALUES FROM (0) TO (10);"
        "CREATE PUBLICATION pub FOR TABLE p"
    )
    wanted = (find(database, "p"), None)
    database.execute(refused(database, wanted).remedy)
    check(database, wanted)
    # Now a partition by itself is not what the stream names.
    assert "name that table instead" in refused(database, (find(database, "p1"), None)).remedy


@pytest.mark.requirement("R37")
def test_every_table_must_be_in_it(database: Database) -> None:
    database.execute(
        'CREATE TABLE "T" (id int PRIMARY KEY); CREATE TABLE u (id int PRIMARY KEY);'
        "CREATE PUBLICATION pub FOR TABLE u"
    )
    wanted = (find(database, '"T"'), None)
    error = refused(database, (find(database, "u"), None), wanted)
    assert "public.T" in error.message
    database.execute(error.remedy.split(" (for a partition")[0])
    check(database, wanted)


@pytest.mark.requirement("R37")
def test_columns_must_cover_the_plan(database: Database) -> None:
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, a text, b text);"
        "CREATE PUBLICATION pub FOR TABLE t (id, a)"
    )
    table = find(database, "t")
    check(database, (table, ["id", "a"]))
    error = refused(database, (table, ["a", "b"]))
    assert '"b" of public.t' in error.message
    database.execute(error.remedy)
    check(database, (table, ["a", "b"]))
    refused_all = published(database)
    assert refused_all.tables[table.oid].columns == ("id", "a", "b")


def test_identity_must_be_covered(database: Database) -> None:
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, a text);"
        "CREATE PUBLICATION pub FOR TABLE t (a) WITH (publish = 'insert, truncate')"
    )
    database.execute("ALTER PUBLICATION pub SET (publish = 'insert, update, delete, truncate')")
    error = refused(database, (find(database, "t"), ["a"]))
    assert '"id"' in error.message
    database.execute(error.remedy)
    check(database, (find(database, "t"), ["a"]))


@pytest.mark.requirement("R36")
def test_generated_columns(protocol_database: Database) -> None:
    database = protocol_database
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, g int GENERATED ALWAYS AS (id * 2) STORED);"
        "CREATE PUBLICATION pub FOR TABLE t"
    )
    table = find(database, "t")
    check(database, (table, None))
    check(database, (table, ["id"]))
    error = refused(database, (table, ["id", "g"]))
    if database.major < 18:
        assert "tables.columns" in error.remedy
        assert (
            "("
            not in create_publication_sql(
                "p", [(table, ["id", "g"])], server_version=database.major * 10000
            ).split("WITH")[0]
        )
        return
    database.execute(error.remedy)
    check(database, (table, ["id", "g"]))
    with connection(database) as conn:
        create_publication(conn, "own", [(table, ["g"])], server_info(conn))
    check(database, (table, ["g"]), name="own")


def test_virtual_columns_are_never_sent(database18: Database) -> None:
    database18.execute(
        "CREATE TABLE t (id int PRIMARY KEY, g int GENERATED ALWAYS AS (id * 2) VIRTUAL);"
        "CREATE PUBLICATION pub FOR TABLE t"
    )
    table = find(database18, "t")
    assert "tables.columns" in refused(database18, (table, ["g"])).remedy
    assert '"g"' not in create_publication_sql("p", [(table, ["id", "g"])])


def test_full_identity_with_a_generated_column_keeps_updates_working(database18: Database) -> None:
    database18.execute(
        "CREATE TABLE t (id int PRIMARY KEY, v text, g int GENERATED ALWAYS AS (id * 2) STORED);"
        "ALTER TABLE t REPLICA IDENTITY FULL; INSERT INTO t VALUES (1, 'x')"
    )
    with connection(database18) as conn:
        create_publication(conn, "own", [(find(database18, "t"), ["v"])], server_info(conn))
    database18.execute("UPDATE t SET v = 'y'")


@pytest.mark.requirement("R38", "R76")
def test_row_filters_are_read(database: Database) -> None:
    database.execute(
        """CREATE TABLE t (id int, "T ""x" text, PRIMARY KEY (id, "T ""x"));
        CREATE PUBLICATION pub FOR TABLE t WHERE (id > 5 AND "T ""x" = 'it''s')"""
    )
    table = find(database, "t")
    row_filter = published(database).tables[table.oid].row_filter
    assert row_filter == """((id > 5) AND ("T ""x" = 'it''s'::text))"""


@pytest.mark.requirement("R88")
def test_warnings(database: Database) -> None:
    database.execute(
        "CREATE TABLE t (id int PRIMARY KEY, a text, b text); CREATE TABLE u (id int);"
        "CREATE PUBLICATION everything FOR ALL TABLES; CREATE PUBLICATION two FOR TABLE t, u;"
        "CREATE PUBLICATION just FOR TABLE t (id, a);"
        "CREATE PUBLICATION in_schema FOR TABLES IN SCHEMA public"
    )
    table = find(database, "t")
    (all_tables,) = publication_warnings(published(database, "everything"), [(table, None)])
    assert "FOR ALL TABLES" in all_tables
    others, extra = publication_warnings(published(database, "two"), [(table, ["a"])])
    assert "1 more" in others
    assert '"b" of public.t' in extra
    assert publication_warnings(published(database, "just"), [(table, ["a"])]) == []
    assert (
        published(database, "in_schema").tables.keys() == published(database, "two").tables.keys()
    )


@pytest.mark.requirement("R89")
def test_without_the_privilege_the_sql_is_shown_and_works(database: Database) -> None:
    database.execute("CREATE TABLE t (id int PRIMARY KEY, a text)")
    role = database.create_cdc_role(["t"])
    with connect(source_settings(role.url)) as conn:
        table = find_table(conn, "t")
        with pytest.raises(SourceError) as caught:
            create_publication(conn, "pub", [(table, ["a"])], server_info(conn))
    assert caught.value.kind is ErrorKind.SOURCE_PERMISSION
    advice, sql = caught.value.remedy.split("\n")
    assert "owner" in advice
    assert quote_ident(database.name) in advice
    database.execute(sql)
    check(database, (table, ["a"]))


def change(conn: PgConnection, how: str, wanted: Wanted, row_filter: str | None = None) -> None:
    """Create ``pub`` with the table, or have it published by one that is there."""
    server = server_info(conn)
    filters = {} if row_filter is None else {wanted[0].oid: row_filter}
    match how:
        case "create":
            create_publication(conn, "pub", [wanted], server, filters)
        case "add":
            add_to_publication(conn, "pub", [wanted], server, filters)
        case "anew":
            publish_anew(conn, "pub", wanted, server, row_filter)


#: What is there before each way to change a publication.
BEFORE = {
    "create": "",
    "add": "CREATE PUBLICATION pub",
    "anew": "CREATE PUBLICATION pub FOR TABLE t",
}


@pytest.mark.parametrize("row_filter", ["absent > 1", "id + 1", "f(id) > 1"])
@pytest.mark.parametrize("how", BEFORE)
def test_what_the_server_refuses_names_the_publication_and_the_sql(
    database18: Database, how: str, row_filter: str
) -> None:
    """No such column, not a condition, and a function of a user: three SQLSTATEs."""
    database18.execute(
        "CREATE TABLE t (id int PRIMARY KEY, a text);"
        "CREATE FUNCTION f(int) RETURNS int IMMUTABLE LANGUAGE sql AS 'SELECT $1'"
    )
    database18.execute(BEFORE[how] or "SELECT")
    table = find(database18, "t")
    with connection(database18) as conn:
        conn.execute("SET search_path = public")
        before = read_publication(conn, "pub")
        with pytest.raises(SourceError) as caught:
            change(conn, how, (table, None), row_filter)
        assert read_publication(conn, "pub") == before
    assert caught.value.kind is ErrorKind.PUBLICATION_UNUSABLE
    verb = "create" if how == "create" else "alter"
    assert f"trying to {verb} publication pub" in caught.value.message
    assert f"({row_filter})" in caught.value.remedy


@pytest.mark.requirement("R89")
@pytest.mark.parametrize("how", ["add", "anew"])
def test_without_the_privilege_to_alter_the_sql_is_shown_and_works(
    database18: Database, how: str
) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY, a text)")
    database18.execute(BEFORE[how])
    role = database18.create_cdc_role(["t"])
    with connect(source_settings(role.url)) as conn:
        table = find_table(conn, "t")
        with pytest.raises(SourceError) as caught:
            change(conn, how, (table, ["a"]))
    assert caught.value.kind is ErrorKind.SOURCE_PERMISSION
    assert "may not alter publication pub" in caught.value.message
    database18.execute(caught.value.remedy.split("\n")[1])
    check(database18, (table, ["a"]))


def test_what_another_process_has_added_meanwhile_is_left_as_it_is(database18: Database) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY, a text)")
    database18.execute(BEFORE["add"])
    table = find(database18, "t")
    with connection(database18) as conn:
        change(conn, "add", (table, ["a"]))
        added = read_publication(conn, "pub")
        change(conn, "add", (table, None))
        assert read_publication(conn, "pub") == added


def test_a_publication_that_is_gone_cannot_be_added_to(database18: Database) -> None:
    database18.execute("CREATE TABLE t (id int PRIMARY KEY)")
    table = find(database18, "t")
    with connection(database18) as conn, pytest.raises(SourceError) as caught:
        change(conn, "add", (table, None))
    assert caught.value.kind is ErrorKind.PUBLICATION_UNUSABLE
    assert "does not exist" in caught.value.message
