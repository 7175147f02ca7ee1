"""What administrators do to publications and partitions in a campaign, statement by statement.

An act works over one connection, which may be in a transaction; :data:`ACTS` has them by name. What
it leaves behind that a pipeline cannot live with, :meth:`.estate.Estate.restore` puts back.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from tests.faults.campaign.estate import (
    DAYS,
    OWN_TABLES,
    PLACES,
    REGIONS,
    ROWS,
    SHOWN,
    Estate,
    Hand,
    Place,
    change,
    vector,
)
from tests.faults.campaign.load import NotPossibleError

Perform: TypeAlias = Callable[[Estate, Hand, random.Random], None]


@dataclass(frozen=True)
class Act:
    """``alone``: not in a transaction with others."""

    name: str
    perform: Perform
    times: int
    alone: bool


ACTS: Final[dict[str, Act]] = {}


def act(*, times: int = 1, alone: bool = False) -> Callable[[Perform], Perform]:
    """Register a function as the act of its name."""

    def register(perform: Perform) -> Perform:
        ACTS[perform.__name__] = Act(perform.__name__, perform, times, alone)
        return perform

    return register


def write(hand: Hand, choose: random.Random, *tables: str) -> None:
    """Change some rows, of one of these tables or of any."""
    for _ in range(choose.randint(1, 3)):
        hand.run(change(hand, choose.choice(tables or OWN_TABLES), choose))


def in_one(hand: Hand, choose: random.Random, *parts: Callable[[], None]) -> None:
    """Parts in one transaction, or one after the other."""
    if choose.random() < 0.5:
        with hand.connection.transaction():
            for part in parts:
                part()
    else:
        for part in parts:
            part()
            if choose.random() < 0.3:
                time.sleep(choose.uniform(0, 0.4))


# -- the publication


@act(times=2)
def taken_out(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Of the publication; changes meanwhile are not sent."""
    estate.note_publication()
    table = choose.choice(OWN_TABLES)
    hand.run(f"ALTER PUBLICATION {estate.publication} DROP TABLE {table}")
    write(hand, choose, table)


@act(times=2)
def out_and_in(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Taken out, changed, and put in again."""
    estate.note_publication()
    table, name = choose.choice(OWN_TABLES), estate.publication
    in_one(
        hand,
        choose,
        lambda: hand.run(f"ALTER PUBLICATION {name} DROP TABLE {table}"),
        lambda: write(hand, choose, table),
        lambda: hand.run(f"ALTER PUBLICATION {name} ADD TABLE {estate.entry(table)}"),
    )


@act(times=2)
def narrowed_and_back(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Some kinds of changes are not sent for a while."""
    kinds = ["insert", "update", "delete", "truncate"]
    kept = choose.sample(kinds, choose.randint(1, 3))
    set_to = f"ALTER PUBLICATION {estate.publication} SET (publish = "
    parts = [
        lambda: hand.run(f"{set_to}'{', '.join(kept)}')"),
        lambda: write(hand, choose),
    ]
    if choose.random() < 0.6:
        parts.append(lambda: hand.run(f"{set_to}'{', '.join(kinds)}')"))
    in_one(hand, choose, *parts)


@act()
def set_again(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """The publication gets the tables that it has."""
    estate.note_publication()
    statement = estate.set_tables_sql()
    if statement is None:
        raise NotPossibleError("there is no publication yet")
    write(hand, choose)
    hand.run(statement)


@act()
def by_leaves(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Changes come under the names of partitions for a while."""
    set_to = f"ALTER PUBLICATION {estate.publication} SET (publish_via_partition_root = "
    parts = [lambda: hand.run(f"{set_to}false)"), lambda: write(hand, choose, DAYS, REGIONS)]
    if choose.random() < 0.6:
        parts.append(lambda: hand.run(f"{set_to}true)"))
    in_one(hand, choose, *parts)


@act()
def publication_dropped(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """And perhaps made again."""
    estate.note_publication()
    statement = estate.publication_sql()
    if statement is None:
        raise NotPossibleError("there is no publication yet")
    parts = [
        lambda: hand.run(f"DROP PUBLICATION {estate.publication}"),
        lambda: write(hand, choose),
    ]
    if choose.random() < 0.7:
        parts.append(lambda: hand.run(statement))
    in_one(hand, choose, *parts)


@act()
def filtered_otherwise(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Another row filter, and perhaps the one of before again."""
    estate.note_publication()
    name = estate.publication
    other = choose.choice(("", " WHERE (NOT visible)", " WHERE (id > 20)", " WHERE (visible)"))
    parts = [
        lambda: hand.run(f"ALTER PUBLICATION {name} DROP TABLE {SHOWN}"),
        lambda: hand.run(f"ALTER PUBLICATION {name} ADD TABLE {SHOWN}{other}"),
        lambda: write(hand, choose, SHOWN),
    ]
    if choose.random() < 0.5:
        parts += [
            lambda: hand.run(f"ALTER PUBLICATION {name} DROP TABLE {SHOWN}"),
            lambda: hand.run(f"ALTER PUBLICATION {name} ADD TABLE {estate.entry(SHOWN)}"),
        ]
    in_one(hand, choose, *parts)


# -- partitions


def _attached(hand: Hand, choose: random.Random) -> tuple[Place, str]:
    places = [(place, leaf) for place in PLACES if (leaf := hand.attached(place)) is not None]
    if not places:
        raise NotPossibleError("there are no partitions")
    return choose.choice(places)


def _free(hand: Hand, choose: random.Random) -> Place:
    places = [
        place
        for place in PLACES
        if hand.exists(place.parent) and not hand.attached(place) and not _overlaps(hand, place)
    ]
    if not places:
        raise NotPossibleError("every place has its partition")
    return choose.choice(places)


def _overlaps(hand: Hand, place: Place) -> bool:
    """A partition that is half detached holds its place."""
    pending = "SELECT 1 FROM pg_inherits WHERE inhdetachpending AND inhparent = to_regclass(%s)"
    return bool(hand.rows(pending, place.parent))


def _detach(hand: Hand, place: Place, leaf: str) -> None:
    hand.run(f"ALTER TABLE {place.parent} DETACH PARTITION {leaf}")


def _attach(hand: Hand, place: Place, leaf: str) -> None:
    hand.run(f"ALTER TABLE {place.parent} ATTACH PARTITION {leaf} {place.bound}")


def _new_table(hand: Hand, place: Place, rows: int) -> str:
    name = f"{place.prefix}{hand.number()}"
    hand.run(f"CREATE TABLE {name} (LIKE {place.root} INCLUDING ALL)")
    if rows:
        hand.run(place.rows(name, rows, hand.number()))
    return name


def _change_leaf(hand: Hand, choose: random.Random, leaf: str) -> None:
    """Changes of a table that may be no partition at the moment."""
    number = hand.number()
    for statement in choose.sample(
        (
            f"UPDATE {leaf} SET n = {number} WHERE id % 3 = {number % 3}",
            (
                f"UPDATE {leaf} SET note = 'leaf{number}', emb = {vector(str(number % 700))}"
                f" WHERE id % 4 = {number % 4}"
            ),
            f"DELETE FROM {leaf} WHERE id % 5 = {number % 5}",
            f"TRUNCATE {leaf}",
        ),
        choose.randint(1, 2),
    ):
        hand.run(statement)


@act(times=2)
def partition_created(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """With rows soon after."""
    place = _free(hand, choose)
    name = f"{place.prefix}{hand.number()}"
    rows = place.rows(place.root, choose.randint(1, ROWS), hand.number())
    create = f"CREATE TABLE {name} PARTITION OF {place.parent} {place.bound}"
    in_one(hand, choose, lambda: hand.run(create), lambda: hand.run(rows))


@act(times=3)
def partition_attached(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """One with rows, new or detached before."""
    place = _free(hand, choose)
    parked = hand.detached(place)
    for name in parked[:-2]:
        hand.run(f"DROP TABLE {name}")
    old = bool(parked) and choose.random() < 0.7

    def attach() -> None:
        name = parked[-1] if old else _new_table(hand, place, choose.randint(0, ROWS))
        _attach(hand, place, name)

    in_one(hand, choose, attach, lambda: write(hand, choose, place.root))


@act(times=2)
def partition_detached(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Its rows are the root's no more."""
    place, leaf = _attached(hand, choose)
    parts = [lambda: _detach(hand, place, leaf)]
    if choose.random() < 0.5:
        parts.append(lambda: _change_leaf(hand, choose, leaf))
    if choose.random() < 0.5:
        parts.insert(0, lambda: _change_leaf(hand, choose, leaf))
    in_one(hand, choose, *parts)


@act(times=2, alone=True)
def detached_concurrently(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Which may stay half done, if somebody is in its way."""
    place, leaf = _attached(hand, choose)
    hand.run(f"ALTER TABLE {place.parent} DETACH PARTITION {leaf} CONCURRENTLY")


@act(times=3)
def detached_changed_attached(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """What is changed meanwhile is not sent."""
    place, leaf = _attached(hand, choose)
    in_one(
        hand,
        choose,
        lambda: _detach(hand, place, leaf),
        lambda: _change_leaf(hand, choose, leaf),
        lambda: _attach(hand, place, leaf),
        lambda: write(hand, choose, place.root),
    )


@act(times=3)
def partition_swapped(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Another one takes its place, with the same keys."""
    place, leaf = _attached(hand, choose)
    name = _new_table(hand, place, ROWS)
    kept = f"INSERT INTO {name} SELECT * FROM {leaf} ON CONFLICT DO NOTHING"
    if choose.random() < 0.3 and hand.columns(name) == hand.columns(leaf):
        hand.run(kept)
    in_one(
        hand,
        choose,
        lambda: _detach(hand, place, leaf),
        lambda: _attach(hand, place, name),
        lambda: write(hand, choose, place.root),
    )


@act(times=3)
def attached_for_a_moment(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Attached, written to, detached."""
    place = _free(hand, choose)
    name = _new_table(hand, place, choose.choice((0, 20)))
    rows = place.rows(place.root, 40, hand.number())
    in_one(
        hand,
        choose,
        lambda: _attach(hand, place, name),
        lambda: hand.run(rows),
        lambda: _detach(hand, place, name),
    )


@act()
def partition_dropped(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """With its rows."""
    place, leaf = _attached(hand, choose)
    hand.run(f"DROP TABLE {leaf}")
    if choose.random() < 0.6:
        hand.run(
            f"CREATE TABLE {place.prefix}{hand.number()} PARTITION OF {place.parent} {place.bound}"
        )
        hand.run(place.rows(place.root, choose.randint(1, ROWS), hand.number()))


@act(times=2)
def partition_truncated(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """And filled again, perhaps by the same keys."""
    place, leaf = _attached(hand, choose)
    parts = [lambda: hand.run(f"TRUNCATE {leaf}")]
    if choose.random() < 0.6:
        rows = place.rows(place.root, choose.randint(1, ROWS), hand.number())
        parts.append(lambda: hand.run(rows))
    in_one(hand, choose, *parts)


@act()
def partition_written(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """By its own name, and its vectors are kept in the rows from now on."""
    place, leaf = _attached(hand, choose)
    number = hand.number()
    hand.run(f"UPDATE {leaf} SET emb = {vector(str(number % 500))}, n = {number}")
    hand.run(f"ALTER TABLE {leaf} ALTER COLUMN emb SET STORAGE MAIN")
    write(hand, choose, place.root)


@act()
def subtree_detached(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """A partition that has partitions: changed, and attached again."""
    region = choose.choice("xy")
    name = f"{REGIONS}_{region}"
    parts = [
        lambda: hand.run(f"ALTER TABLE {REGIONS} DETACH PARTITION {name}"),
        lambda: _change_leaf(hand, choose, name),
    ]
    if choose.random() < 0.7:
        attach = f"ALTER TABLE {REGIONS} ATTACH PARTITION {name} FOR VALUES IN ('{region}')"
        parts.append(lambda: hand.run(attach))
    in_one(hand, choose, *parts)


@act(times=2)
def rows_moved(estate: Estate, hand: Hand, choose: random.Random) -> None:
    """Between partitions."""
    hand.run(
        choose.choice(
            (
                f"UPDATE {DAYS} SET day = (day + 10) % 30 WHERE id % 3 = 1",
                (
                    f"UPDATE {REGIONS} SET region = CASE region WHEN 'x' THEN 'y' ELSE 'x' END"
                    " WHERE id % 3 = 2"
                ),
                f"UPDATE {REGIONS} SET day = 19 - day WHERE id % 4 = 2",
            )
        )
    )
