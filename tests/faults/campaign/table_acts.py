"""What administrators do to tables as a whole in a campaign: columns, types, names, rights, rows.

Registers its acts with those of :mod:`.acts`.
"""

from __future__ import annotations

import random

from tests.faults.campaign.acts import act, in_one, write
from tests.faults.campaign.estate import (
    AWAY,
    COLUMNS,
    DAYS,
    OWN_TABLES,
    PAPERS,
    REGIONS,
    ROWS,
    SHOWN,
    Estate,
    Hand,
    create_table,
    fill,
    vector,
)
from tests.faults.campaign.load import NotPossibleError

# -- columns and types


@act(times=2)
def column_added(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """With and without a default; or dropped, if it is there."""
    table, number = choose.choice(OWN_TABLES), choose.randrange(2)
    if f"more{number}" in hand.columns(table):
        hand.run(f"ALTER TABLE {table} DROP COLUMN more{number}")
        if choose.random() < 0.5:
            return
    kind = choose.choice(
        ("int", f"int DEFAULT {hand.number()}", "text DEFAULT 'd'", "float8 DEFAULT random()")
    )
    hand.run(f"ALTER TABLE {table} ADD COLUMN more{number} {kind}")
    write(hand, choose, table)


@act(times=2)
def column_dropped(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """And perhaps added again by the same name."""
    table = choose.choice(OWN_TABLES)
    name = choose.choice(estate.alterable(table))
    parts = [
        lambda: hand.run(f"ALTER TABLE {table} DROP COLUMN {name}"),
        lambda: write(hand, choose, table),
    ]
    if name in ("n", "emb"):
        del parts[1]
    if choose.random() < 0.6:
        parts.append(
            lambda: hand.run(f"ALTER TABLE {table} ADD COLUMN {name} {COLUMNS[table][name]}")
        )
    in_one(hand, choose, *parts)


@act(times=2)
def column_renamed(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """And perhaps back; others may be added by its name."""
    table = choose.choice(OWN_TABLES)
    name = choose.choice(estate.alterable(table))
    parts = [lambda: hand.run(f"ALTER TABLE {table} RENAME COLUMN {name} TO {name}{AWAY}")]
    after = choose.choice(("", "back", "another"))
    if after == "back":
        parts.append(lambda: hand.run(f"ALTER TABLE {table} RENAME COLUMN {name}{AWAY} TO {name}"))
    elif after == "another":
        parts.append(
            lambda: hand.run(f"ALTER TABLE {table} ADD COLUMN {name} {COLUMNS[table][name]}")
        )
    in_one(hand, choose, *parts)


@act(times=2)
def retyped(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Every row is computed anew, without a message."""
    table = choose.choice(OWN_TABLES)
    number = hand.number()
    hand.run(
        choose.choice(
            (
                f"ALTER TABLE {table} ALTER COLUMN n TYPE bigint USING n % 1000 + {number}",
                f"ALTER TABLE {table} ALTER COLUMN note TYPE text USING note || '{number % 7}'",
                f"ALTER TABLE {table} ALTER COLUMN n TYPE numeric USING n + {number}",
                (
                    f"ALTER TABLE {table} ALTER COLUMN emb TYPE {COLUMNS[table]['emb']}"
                    f" USING {vector(str(number % 300))}"
                ),
            )
        )
    )


@act()
def key_retyped(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """int to bigint, or back."""
    hand.run(f"ALTER TABLE {PAPERS} ALTER COLUMN id TYPE {choose.choice(('int', 'bigint'))}")


@act(times=2)
def label_renamed(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Or added."""
    labels = hand.names("SELECT unnest(enum_range(NULL::grade))::text")
    number = hand.number()
    if len(labels) < 5 and choose.random() < 0.4:
        hand.run(f"ALTER TYPE grade ADD VALUE 'added{number}'")
    else:
        hand.run(f"ALTER TYPE grade RENAME VALUE '{choose.choice(labels)}' TO 'label{number}'")


@act(times=2)
def composite_altered(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """An attribute more, or one less, or another name."""
    there = hand.names(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'person'::regclass AND attnum > 0"
        " AND NOT attisdropped"
    )
    others = [name for name in there if name != "name"]
    number = hand.number()
    if not others or (len(others) < 3 and choose.random() < 0.4):
        hand.run(f"ALTER TYPE person ADD ATTRIBUTE part{number} int")
    elif choose.random() < 0.5:
        hand.run(f"ALTER TYPE person RENAME ATTRIBUTE {choose.choice(others)} TO part{number}")
    else:
        hand.run(f"ALTER TYPE person DROP ATTRIBUTE {choose.choice(others)}")


@act()
def stored_otherwise(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Vectors beside the row, or in it."""
    table = choose.choice(OWN_TABLES)
    how = choose.choice(("PLAIN", "MAIN", "EXTERNAL", "EXTENDED"))
    hand.run(f"ALTER TABLE {table} ALTER COLUMN emb SET STORAGE {how}")
    write(hand, choose, table)


@act(times=2)
def identity_changed(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Of a table, or of one partition."""
    table = choose.choice(OWN_TABLES)
    if table in (DAYS, REGIONS) and choose.random() < 0.7:
        table = choose.choice(hand.leaves(table) or [table])
    kinds = ("FULL", "NOTHING") if table == SHOWN else ("FULL", "NOTHING", "DEFAULT")
    hand.run(f"ALTER TABLE {table} REPLICA IDENTITY {choose.choice(kinds)}")


# -- whole tables


@act(times=2)
def emptied(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """With rows inserted before and after, in the same transaction perhaps."""
    table = choose.choice(OWN_TABLES)
    first = choose.randint(1, 50)
    before = fill(table, first, first + 20, hand.number())
    after = fill(table, first, first + choose.randint(5, ROWS), hand.number())
    in_one(
        hand,
        choose,
        lambda: hand.run(before),
        lambda: hand.run(f"TRUNCATE {table}"),
        lambda: hand.run(after),
    )


@act(times=2, alone=True)
def stored_anew(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Every row gets another place."""
    table = choose.choice((PAPERS, SHOWN, *hand.leaves(DAYS), *hand.leaves(REGIONS)))
    keys = hand.names(
        "SELECT indexrelid::regclass::text FROM pg_index WHERE indisprimary"
        " AND indrelid = to_regclass(%s)",
        table,
    )
    cluster = keys and choose.random() < 0.5
    hand.run(f"CLUSTER {table} USING {keys[0]}" if cluster else f"VACUUM FULL {table}")


@act(times=2)
def renamed_away(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """And back; or another takes its name."""
    table = choose.choice(OWN_TABLES)
    parts = [
        lambda: hand.run(f"ALTER TABLE {table} RENAME TO {table}{AWAY}"),
        lambda: hand.run(f"UPDATE {table}{AWAY} SET n = n + 1 WHERE id % 3 = 0"),
    ]
    after = choose.choice(("", "back", "another"))
    if after == "back":
        parts.append(lambda: hand.run(f"ALTER TABLE {table}{AWAY} RENAME TO {table}"))
    elif after == "another" and table == PAPERS:
        parts += [
            lambda: hand.run(create_table(PAPERS)),
            lambda: hand.run(fill(PAPERS, 1, 30, hand.number())),
        ]
    in_one(hand, choose, *parts)


@act()
def made_anew(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Dropped and created again, with other rows of the same keys."""
    if not estate.copied:
        raise NotPossibleError("the first copy is not over")
    estate.note_publication()
    table = choose.choice((PAPERS, SHOWN))
    parts = [lambda: hand.run(f"DROP TABLE {table}"), lambda: hand.run(create_table(table))]
    if choose.random() < 0.5:
        entry = f"ALTER PUBLICATION {estate.publication} ADD TABLE {estate.entry(table)}"
        if table == PAPERS:
            parts.append(lambda: hand.run(entry))
    parts.append(lambda: hand.run(fill(table, 1, ROWS, hand.number())))
    in_one(hand, choose, *parts)


# -- rights and rows


@act(times=2)
def revoked(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """SELECT; and granted again, perhaps."""
    if estate.role is None:
        raise NotPossibleError("the pipeline's role owns everything")
    table = choose.choice(OWN_TABLES)
    if table in (DAYS, REGIONS) and choose.random() < 0.3:
        table = choose.choice(hand.leaves(table) or [table])
    hand.run(f"REVOKE SELECT ON {table} FROM {estate.role}")
    write(hand, choose)
    if choose.random() < 0.5:
        hand.run(f"GRANT SELECT ON {table} TO {estate.role}")


@act(times=2)
def rows_made_unwritable(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """By a vector of another length than the collection has."""
    first = choose.randint(1, 2 * ROWS)
    hand.run(
        f"UPDATE {PAPERS} SET hint = '[1,2]', n = {hand.number()}"
        f" WHERE id BETWEEN {first} AND {first + 6}"
    )


@act(times=2)
def many_rows_changed(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Of one table, or of several in one transaction."""
    number = hand.number()
    for table in choose.sample(OWN_TABLES, choose.randint(1, 3)):
        hand.run(
            choose.choice(
                (
                    f"UPDATE {table} SET n = {number}",
                    f"UPDATE {table} SET emb = {vector(str(number % 400))} WHERE id % 2 = 0",
                    f"DELETE FROM {table} WHERE id % 6 = {number % 6}",
                    fill(table, 1, ROWS, number),
                )
            )
        )
