"""The tables that administrators work on in a campaign, and what puts everything back that a
pipeline cannot live with: a partitioned table, one in two levels, one with types of its own, one
with a row filter, and one that joins later."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import psycopg

from tests.support.fix_postgres import Connection, Database

#: Wide enough that the vector is TOASTed, so that updates come without it.
_DIM: Final = 640
ROWS: Final = 150
_DAYS: Final = 10
_LOCKS: Final = "SET lock_timeout = '1500ms'; SET deadlock_timeout = '50ms'"
_PATIENCE_SECONDS: Final = 60.0

PAPERS: Final = "papers"
DAYS: Final = "days"
REGIONS: Final = "regions"
SHOWN: Final = "shown"
JOINER: Final = "joiner"
OWN_TABLES: Final = (PAPERS, DAYS, REGIONS, SHOWN)
AWAY: Final = "_away"

#: Columns by table, with what they are made with if they are missing.
COLUMNS: Final[Mapping[str, Mapping[str, str]]] = {
    PAPERS: {
        "note": "text",
        "n": "bigint",
        "grade": "grade",
        "author": "person",
        "hint": "vector",
        "emb": f"vector({_DIM})",
    },
    DAYS: {"note": "text", "n": "bigint", "emb": f"vector({_DIM})"},
    REGIONS: {"note": "text", "n": "bigint", "emb": f"vector({_DIM})"},
    SHOWN: {"note": "text", "n": "bigint", "emb": f"vector({_DIM})"},
    JOINER: {"note": "text", "n": "bigint", "emb": f"vector({_DIM})"},
}

SETTINGS: Final[Mapping[str, Mapping[str, object]]] = {
    PAPERS: {"name": PAPERS, "collection": PAPERS, "dimensions": {"hint": 4}},
    DAYS: {"name": DAYS, "collection": DAYS},
    REGIONS: {"name": REGIONS, "collection": REGIONS},
    SHOWN: {"name": SHOWN, "collection": SHOWN, "where": "visible"},
    JOINER: {"name": JOINER, "collection": JOINER},
}


@dataclass(frozen=True)
class Place:
    """Where a partition can be: the table that it hangs on, and its bound."""

    root: str
    parent: str
    region: str
    low: int

    @property
    def bound(self) -> str:
        """As the catalog shows it."""
        return f"FOR VALUES FROM ({self.low}) TO ({self.low + _DAYS})"

    @property
    def prefix(self) -> str:
        """What the names of tables begin with that fit there."""
        return f"{self.parent}_{self.low}_"

    def rows(self, table: str, count: int, number: int) -> str:
        """SQL that inserts rows which belong there."""
        region = f"'{self.region}', " if self.region else ""
        return (
            f"INSERT INTO {table} ({key(self.root)}, note, n, emb)"
            f" SELECT g, {region}{self.low} + g % {_DAYS}, 'placed', {number},"
            f" {vector('g')} FROM generate_series(1, {count}) g ON CONFLICT DO NOTHING"
        )


PLACES: Final = (
    *(Place(DAYS, DAYS, "", low) for low in range(0, 5 * _DAYS, _DAYS)),
    *(Place(REGIONS, f"{REGIONS}_{r}", r, low) for r in "xy" for low in (0, _DAYS)),
)


def key(table: str) -> str:
    """The key's columns."""
    return {DAYS: "id, day", REGIONS: "id, region, day"}.get(table, "id")


def vector(first: str, dim: int = _DIM) -> str:
    """SQL of a vector that begins with a number."""
    return f"('[' || ({first}) || repeat(',1', {dim - 1}) || ']')::vector"


def create_table(table: str) -> str:
    """SQL that makes a table as it is at the beginning."""
    columns = ", ".join(f"{name} {type_}" for name, type_ in COLUMNS[table].items())
    if table == DAYS:
        return (
            f"CREATE TABLE {DAYS} (id bigint, day int, {columns}, PRIMARY KEY (id, day))"
            " PARTITION BY RANGE (day)"
        )
    if table == REGIONS:
        return (
            f"CREATE TABLE {REGIONS} (id bigint, region text, day int, {columns},"
            " PRIMARY KEY (id, region, day)) PARTITION BY LIST (region)"
        )
    visible = ", visible boolean NOT NULL DEFAULT true" if table == SHOWN else ""
    id_ = "int" if table == PAPERS else "bigint"
    return f"CREATE TABLE {table} (id {id_} PRIMARY KEY, {columns}{visible})"


def fill(table: str, first: int, last: int, number: int) -> str:
    """SQL that inserts rows with these ids where there are none."""
    more, values = "", ""
    if table == DAYS:
        more, values = "day, ", f"g % {3 * _DAYS}, "
    elif table == REGIONS:
        more, values = "region, day, ", f"CASE g % 2 WHEN 0 THEN 'x' ELSE 'y' END, g % {2 * _DAYS},"
    elif table == SHOWN:
        more, values = "visible, ", "g % 3 <> 0, "
    elif table == PAPERS:
        more, values = (
            "grade, author, ",
            (
                "(enum_range(NULL::grade))[1 + g % 2],"
                ' jsonb_populate_record(NULL::person, \'{"name": "n", "age": 3}\'), '
            ),
        )
    return (
        f"INSERT INTO {table} (id, {more}note, n, emb) SELECT g, {values}'loaded', {number},"
        f" {vector('g % 97')} FROM generate_series({first}, {last}) g ON CONFLICT DO NOTHING"
    )


class Hand:
    """Runs statements over one connection and remembers them."""

    def __init__(self, connection: Connection, numbers: Iterator[int]) -> None:
        self.connection = connection
        self._numbers = numbers
        self.statements: list[str] = []

    def number(self) -> int:
        """One that nothing else has."""
        return next(self._numbers)

    def run(self, statement: str) -> None:
        """Run one."""
        self.connection.execute(statement.encode())
        self.statements.append(statement if len(statement) < 130 else f"{statement[:110]} ...")

    def rows(self, query: str, *parameters: object) -> list[tuple[object, ...]]:
        """The rows of a query."""
        return self.connection.execute(query.encode(), parameters or None).fetchall()

    def names(self, query: str, *parameters: object) -> list[str]:
        """The first column of a query."""
        return [str(row[0]) for row in self.rows(query, *parameters)]

    def exists(self, table: str) -> bool:
        """Whether there is a table of that name."""
        return self.rows("SELECT to_regclass(%s) IS NOT NULL", table) == [(True,)]

    def columns(self, table: str) -> list[str]:
        """The columns of a table."""
        return self.names(
            "SELECT attname FROM pg_attribute WHERE attrelid = to_regclass(%s)"
            " AND attnum > 0 AND NOT attisdropped",
            table,
        )

    def attached(self, place: Place) -> str | None:
        """The partition at a place."""
        found = self.names(
            "SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid"
            " WHERE i.inhparent = to_regclass(%s) AND NOT i.inhdetachpending"
            " AND pg_get_expr(c.relpartbound, c.oid) = %s",
            place.parent,
            place.bound,
        )
        return found[0] if found else None

    def detached(self, place: Place) -> list[str]:
        """Tables that were at a place, or could be."""
        return self.names(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND NOT relispartition"
            " AND starts_with(relname, %s) AND relnamespace = 'public'::regnamespace"
            " ORDER BY oid",
            place.prefix,
        )

    def leaves(self, root: str) -> list[str]:
        """The partitions that hold rows."""
        return self.names(
            "SELECT relid::regclass::text FROM pg_partition_tree(to_regclass(%s)) WHERE isleaf",
            root,
        )


@dataclass
class Estate:
    """The tables of one database. Made by :meth:`create`."""

    database: Database
    publication: str
    #: The role of the pipeline, if it is not a superuser; the publication is not its own then.
    role: str | None = None
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 1 << 40)))
    _writers: list[EstateWriter] = field(default_factory=list)
    #: The publication's entries when it was last whole, and its options.
    _entries: dict[str, str] = field(default_factory=dict)
    _options: str = "publish_via_partition_root = true"
    #: The tables that are configured.
    configured: list[str] = field(default_factory=lambda: list(OWN_TABLES))
    #: Whether all of them have been copied; before that one that is made anew is refused.
    copied: bool = False
    #: Those of which rebuilds were begun in this round: they keep their vectors.
    rebuilding: set[str] = field(default_factory=set)
    #: The collections of those that were rebuilt, by table.
    collections: dict[str, str] = field(default_factory=dict)

    @classmethod
    def create(cls, database: Database, publication: str) -> Estate:
        """Make the tables with their first rows."""
        estate = cls(database, publication)
        with estate.hand() as hand:
            hand.run("CREATE TYPE grade AS ENUM ('low', 'high')")
            hand.run("CREATE TYPE person AS (name text, age int)")
            for table in (*OWN_TABLES, JOINER):
                hand.run(create_table(table))
                if table == REGIONS:
                    for region in "xy":
                        hand.run(
                            f"CREATE TABLE {REGIONS}_{region} PARTITION OF {REGIONS}"
                            f" FOR VALUES IN ('{region}') PARTITION BY RANGE (day)"
                        )
                for place in PLACES:
                    if place.root == table and place.low < 3 * _DAYS:
                        hand.run(
                            f"CREATE TABLE {place.prefix}{hand.number()}"
                            f" PARTITION OF {place.parent} {place.bound}"
                        )
                hand.run(fill(table, 1, ROWS, 0))
            hand.run(f"CREATE UNIQUE INDEX {SHOWN}_identity ON {SHOWN} (id, visible)")
            hand.run(f"ALTER TABLE {SHOWN} REPLICA IDENTITY USING INDEX {SHOWN}_identity")
        return estate

    def grant(self, role: str) -> None:
        """Let the pipeline's role read whatever there is, and will be."""
        self.role = role
        with self.hand() as hand:
            hand.run(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
            hand.run(f"ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO {role}")
            hand.run(f"ALTER ROLE {role} CONNECTION LIMIT 60")
        self.note_publication()

    @property
    def settings(self) -> tuple[Mapping[str, object], ...]:
        """How the tables are configured."""
        return tuple(
            {**SETTINGS[table], "collection": self.collections.get(table, table)}
            for table in self.configured
        )

    @contextlib.contextmanager
    def hand(self, *, autocommit: bool = True) -> Iterator[Hand]:
        """A connection to work with; without ``autocommit`` one transaction."""
        with self.database.connect(autocommit=autocommit) as connection:
            connection.execute(_LOCKS)
            yield Hand(connection, self._numbers)

    # -- writers

    def start(self, seed: int) -> None:
        """Let writers change rows."""
        self._writers = [EstateWriter(self, seed + number) for number in range(2)]
        for writer in self._writers:
            writer.start()

    def finish(self) -> Counter[str]:
        """Stop them; returns what they did."""
        done: Counter[str] = Counter()
        for writer in self._writers:
            done += writer.finish()
        self._writers = []
        return done

    # -- the publication

    def alterable(self, table: str) -> list[str]:
        """The columns that may be renamed or dropped. A collection that is made meanwhile has the
        vectors of the moment, and would not fit the table once they are put back."""
        vectors = ("emb", "hint") if table in self.rebuilding else ()
        return [name for name in COLUMNS[table] if name not in vectors]

    def begin_rebuild(self, table: str) -> bool:
        """Have the table keep its vectors; returns whether it has them now."""
        self.rebuilding.add(table)
        with self.hand() as hand:
            there = hand.columns(table)
        return {*COLUMNS[table]} <= {*there} and not any(name.endswith(AWAY) for name in there)

    def note_publication(self) -> None:
        """Remember the publication, if it has all of the tables."""
        with self.hand() as hand:
            found = {
                str(table): f"{table}{columns or ''}{f' WHERE ({where})' if where else ''}"
                for table, columns, where in hand.rows(
                    "SELECT c.relname, (SELECT '(' || string_agg(attname, ', ') || ')'"
                    " FROM unnest(r.prattrs) k (n) JOIN pg_attribute a ON a.attrelid = c.oid"
                    " AND a.attnum = n), pg_get_expr(r.prqual, c.oid)"
                    " FROM pg_publication p JOIN pg_publication_rel r ON r.prpubid = p.oid"
                    " JOIN pg_class c ON c.oid = r.prrelid WHERE p.pubname = %s",
                    self.publication,
                )
            }
            if found.keys() < self._entries.keys() or not found.keys() >= set(OWN_TABLES):
                return
            if not self._entries:
                generated = hand.names(
                    "SELECT pubgencols FROM pg_publication WHERE pubname = %s", self.publication
                )
                if generated == ["s"]:
                    self._options += ", publish_generated_columns = stored"
            self._entries |= {t: e for t, e in found.items() if t not in self._entries}

    def entry(self, table: str) -> str:
        """A table as it stands in the publication."""
        return self._entries.get(table, f"{table}{' WHERE (visible)' if table == SHOWN else ''}")

    def publication_sql(self) -> str | None:
        """SQL that makes the publication; None if it was never seen whole."""
        if not self._entries:
            return None
        tables = ", ".join(self._entries.values())
        return f"CREATE PUBLICATION {self.publication} FOR TABLE {tables} WITH ({self._options})"

    def set_tables_sql(self) -> str | None:
        """SQL that gives the publication the tables that it has; None as above."""
        if not self._entries:
            return None
        return f"ALTER PUBLICATION {self.publication} SET TABLE {', '.join(self._entries.values())}"

    # -- putting back

    def restore(self) -> None:
        """Put back whatever keeps a table from being followed. What others are in the way of is
        tried again; raises what is not to be had within a minute."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for repair in (
            self._finalize,
            self._put_back_names,
            self._put_back_columns,
            self._put_back_identities,
            self._put_back_publication,
            self._put_back_rights,
            self._put_back_rows,
        ):
            while True:
                try:
                    with self.hand() as hand:
                        repair(hand)
                    break
                except psycopg.Error:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)

    def try_restoring(self) -> None:
        """As far as it can be done now."""
        for repair in (
            self._put_back_names,
            self._put_back_columns,
            self._put_back_identities,
            self._put_back_publication,
            self._put_back_rights,
        ):
            with contextlib.suppress(psycopg.Error), self.hand() as hand:
                repair(hand)

    @staticmethod
    def _finalize(hand: Hand) -> None:
        for parent, child in hand.rows(
            "SELECT inhparent::regclass::text, inhrelid::regclass::text FROM pg_inherits"
            " WHERE inhdetachpending"
        ):
            hand.run(f"ALTER TABLE {parent} DETACH PARTITION {child} FINALIZE")

    @staticmethod
    def _put_back_names(hand: Hand) -> None:
        for table in OWN_TABLES:
            if hand.exists(f"{table}{AWAY}"):
                with hand.connection.transaction():
                    hand.run(f"DROP TABLE IF EXISTS {table}")
                    hand.run(f"ALTER TABLE {table}{AWAY} RENAME TO {table}")
            elif not hand.exists(table):
                hand.run(create_table(table))
        for region in "xy":
            name = f"{REGIONS}_{region}"
            if hand.rows("SELECT relispartition FROM pg_class WHERE relname = %s", name) == [
                (False,)
            ]:
                hand.run(
                    f"ALTER TABLE {REGIONS} ATTACH PARTITION {name} FOR VALUES IN ('{region}')"
                )

    @staticmethod
    def _put_back_columns(hand: Hand) -> None:
        for table, columns in COLUMNS.items():
            there = hand.columns(table)
            for name, type_ in columns.items():
                if name in there:
                    if f"{name}{AWAY}" in there:
                        hand.run(f"ALTER TABLE {table} DROP COLUMN {name}{AWAY}")
                elif f"{name}{AWAY}" in there:
                    hand.run(f"ALTER TABLE {table} RENAME COLUMN {name}{AWAY} TO {name}")
                else:
                    hand.run(f"ALTER TABLE {table} ADD COLUMN {name} {type_}")

    @staticmethod
    def _put_back_identities(hand: Hand) -> None:
        for name in hand.names(
            "SELECT oid::regclass::text FROM pg_class WHERE relreplident <> 'd' AND relkind IN"
            " ('r', 'p') AND relnamespace = 'public'::regnamespace"
            " AND relname ~ '^(papers|days|regions)'"
        ):
            hand.run(f"ALTER TABLE {name} REPLICA IDENTITY DEFAULT")
        if hand.rows("SELECT relreplident FROM pg_class WHERE relname = %s", SHOWN) != [("i",)]:
            hand.run(f"CREATE UNIQUE INDEX IF NOT EXISTS {SHOWN}_identity ON {SHOWN} (id, visible)")
            hand.run(f"ALTER TABLE {SHOWN} REPLICA IDENTITY USING INDEX {SHOWN}_identity")

    def _put_back_publication(self, hand: Hand) -> None:
        name = self.publication
        if not hand.rows("SELECT 1 FROM pg_publication WHERE pubname = %s", name):
            # The pipeline makes one of its own again.
            if self.role is not None and (statement := self.publication_sql()) is not None:
                hand.run(statement)
            return
        whole = hand.rows(
            "SELECT pubinsert AND pubupdate AND pubdelete AND pubtruncate, pubviaroot"
            " FROM pg_publication WHERE pubname = %s",
            name,
        )
        if whole != [(True, True)]:
            hand.run(
                f"ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate',"
                " publish_via_partition_root = true)"
            )
        filters: dict[str, str | None] = {
            str(table): None if where is None else str(where)
            for table, where in hand.rows(
                "SELECT c.relname, pg_get_expr(r.prqual, c.oid) FROM pg_publication p"
                " JOIN pg_publication_rel r ON r.prpubid = p.oid"
                " JOIN pg_class c ON c.oid = r.prrelid WHERE p.pubname = %s",
                name,
            )
        }
        for table in {*self.configured, *self._entries}:
            wanted = "visible" if table == SHOWN else None
            if table not in filters:
                hand.run(f"ALTER PUBLICATION {name} ADD TABLE {self.entry(table)}")
            elif table in OWN_TABLES and filters[table] != wanted:
                with hand.connection.transaction():
                    hand.run(f"ALTER PUBLICATION {name} DROP TABLE {table}")
                    hand.run(f"ALTER PUBLICATION {name} ADD TABLE {self.entry(table)}")

    def _put_back_rights(self, hand: Hand) -> None:
        if self.role is not None:
            hand.run(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {self.role}")

    @staticmethod
    def _put_back_rows(hand: Hand) -> None:
        hand.run(f"UPDATE {PAPERS} SET hint = '[1,2,3,4]' WHERE vector_dims(hint) <> 4")


class EstateWriter:
    """A thread that changes random rows until told to finish. Whatever administrators have done to
    a table at the moment may refuse a statement."""

    def __init__(self, estate: Estate, seed: int) -> None:
        self._estate = estate
        self._random = random.Random(seed)
        self._stopping = threading.Event()
        self._done: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def finish(self) -> Counter[str]:
        """Stop; returns how many transactions were committed, and how many refused."""
        self._stopping.set()
        self._thread.join(_PATIENCE_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError("a writer did not end")
        return self._done

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._estate.hand() as hand:
                    while not self._stopping.is_set():
                        self._transaction(hand)
                        self._stopping.wait(0.02)
            except psycopg.OperationalError:
                self._stopping.wait(0.1)

    def _transaction(self, hand: Hand) -> None:
        try:
            with hand.connection.transaction():
                for _ in range(self._random.choice((1, 1, 2, 5))):
                    table = self._random.choice((*OWN_TABLES, JOINER))
                    hand.run(change(hand, table, self._random))
        except (psycopg.Error, psycopg.Rollback):
            self._done["refused"] += 1
            if hand.connection.broken:
                raise psycopg.OperationalError from None
        else:
            self._done["written"] += 1


def change(hand: Hand, table: str, choose: random.Random) -> str:
    """SQL of a random change of rows."""
    one, number = choose.randint(1, 2 * ROWS), hand.number()
    some = f"id BETWEEN {one} AND {one + choose.choice((0, 0, 3, 20))}"
    moves = {
        DAYS: f"UPDATE {DAYS} SET day = (day + {_DAYS}) % 50 WHERE {some}",
        REGIONS: f"UPDATE {REGIONS} SET region = 'x', day = (day + {_DAYS}) % 20 WHERE {some}",
        SHOWN: f"UPDATE {SHOWN} SET visible = NOT visible WHERE {some}",
        PAPERS: f"UPDATE {PAPERS} SET grade = (enum_range(NULL::grade))[1 + id % 2],"
        ' author = jsonb_populate_record(NULL::person, \'{"name": "w", "age": 4}\')'
        f" WHERE {some}",
    }
    statements = [
        f"UPDATE {table} SET n = {number} WHERE {some}",
        f"UPDATE {table} SET n = {number}, note = 'w{number}' WHERE {some}",
        f"UPDATE {table} SET emb = {vector(str(number % 911))}, n = {number} WHERE {some}",
        f"UPDATE {table} SET emb = NULL WHERE id = {one}",
        f"DELETE FROM {table} WHERE id BETWEEN {one} AND {one + 3}",
        f"UPDATE {table} SET id = id + {2 * ROWS} WHERE id = {one}",
        f"UPDATE {table} SET id = id - {2 * ROWS} WHERE id = {one + 2 * ROWS}",
        fill(table, one, one + choose.choice((0, 6)), number),
        moves.get(table, f"UPDATE {table} SET note = 'x{number}' WHERE {some}"),
    ]
    return choose.choices(statements, (6, 4, 3, 1, 2, 1, 1, 6, 4))[0]
