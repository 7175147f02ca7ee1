"""Partitions come and go in random order, with rows that change in and outside of the table, while
lives of the pipeline are cut off anywhere and the slot's position goes back (R34)."""

from __future__ import annotations

import asyncio
import random

import psycopg
import pytest

from cdc_sync.sync import ledger, resync, source_history, stream
from tests.faults.test_partitions import COLUMNS, DIM, settled
from tests.faults.test_slot_gone_back import go_back, remember
from tests.faults.test_slot_lost import drop_slot
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantTarget

pytestmark = pytest.mark.requirement("R34")

#: Ranges of 100 ids, each of one partition at the most.
RANGES = 6
LIVES = 25
ACTS = (
    *("insert", "update", "delete", "move", "detach", "change", "attach", "attach", "bounce"),
    *("swap", "drop", "create", "visit", "truncate", "rewrite", "divide", "split_off", "alter"),
)


@pytest.fixture(autouse=True)
def _small_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resync, "_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(stream, "_IDLE_SECONDS", 0.1)
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.2)
    monkeypatch.setattr(ledger, "_MIN_CHUNK_PAGES", 1)
    monkeypatch.setattr(ledger, "_MAX_CHUNK_PAGES", 1)


class Partitions:
    """The partitioned table ``docs``; ``done`` is what was done, for people."""

    def __init__(self, database: Database, choose: random.Random) -> None:
        self._database = database
        self._choose = choose
        #: Partitions by range, and tables that are none now, with theirs.
        self._attached: dict[int, str] = {}
        self._detached: dict[str, int] = {}
        self._made = 0
        self.done: list[str] = []
        self._run(f"CREATE TABLE docs {COLUMNS} PARTITION BY RANGE (id)")
        for _ in range(3):
            self._create()
            self._insert()

    def act(self) -> None:
        """One of the acts; one for which there is nothing does nothing."""
        getattr(self, f"_{self._choose.choice(ACTS)}")()

    def _run(self, *statements: str) -> None:
        self.done.append("; ".join(statements))
        self._database.execute(f"BEGIN; {'; '.join(statements)}; COMMIT")

    def _some(self) -> int | None:
        return self._choose.choice(list(self._attached)) if self._attached else None

    def _room(self) -> tuple[int, str] | None:
        """A range without a partition, and a name for one."""
        free = [i for i in range(RANGES) if i not in self._attached]
        self._made += 1
        return (self._choose.choice(free), f"part_{self._made}") if free else None

    def _vector(self) -> str:
        first = self._choose.randint(1, 50)
        return f"array_fill({first}::float4 + (id % 7)::float4, ARRAY[{DIM}])::vector"

    def _rows(self, table: str, range_: int, note: str) -> str:
        first = range_ * 100 + self._choose.randint(0, 60)
        return (
            f"INSERT INTO {table} SELECT id, '{note}', {self._vector()}"
            f" FROM generate_series({first}, {first + 30}) id ON CONFLICT DO NOTHING"
        )

    def _where(self, range_: int) -> str:
        first = range_ * 100 + self._choose.randint(0, 60)
        return f"WHERE id BETWEEN {first} AND {first + self._choose.randint(0, 40)}"

    # -- rows of the table

    def _insert(self) -> None:
        if (range_ := self._some()) is not None:
            self._run(self._rows("docs", range_, "inserted"))

    def _update(self) -> None:
        if (range_ := self._some()) is not None:
            vector = self._choose.choice(["", f", emb = {self._vector()}"])
            note = f"note {self._choose.random()}"
            self._run(f"UPDATE docs SET note = '{note}'{vector} {self._where(range_)}")

    def _delete(self) -> None:
        if (range_ := self._some()) is not None:
            self._run(f"DELETE FROM docs {self._where(range_)}")

    def _move(self) -> None:
        """A row to another key, maybe of another partition."""
        old, new = self._some(), self._some()
        if old is not None and new is not None:
            keys = [f"{range_ * 100 + self._choose.randint(0, 99)}" for range_ in (old, new)]
            free = f"NOT EXISTS (SELECT FROM docs WHERE id = {keys[1]})"
            self._run(f"UPDATE docs SET id = {keys[1]} WHERE id = {keys[0]} AND {free}")

    # -- partitions

    def _attaching(self, table: str, range_: int) -> str:
        bounds = f"FROM ({range_ * 100}) TO ({range_ * 100 + 100})"
        return f"ALTER TABLE docs ATTACH PARTITION {table} FOR VALUES {bounds}"

    def _creating(self, table: str, range_: int) -> str:
        bounds = f"FROM ({range_ * 100}) TO ({range_ * 100 + 100})"
        return f"CREATE TABLE {table} PARTITION OF docs FOR VALUES {bounds}"

    def _create(self) -> None:
        if (room := self._room()) is not None:
            range_, table = room
            self._run(self._creating(table, range_))
            self._attached[range_] = table

    def _divide(self) -> None:
        """Create one that is divided further."""
        if (room := self._room()) is not None:
            range_, table = room
            self._run(
                f"{self._creating(table, range_)} PARTITION BY RANGE (id)",
                f"CREATE TABLE {table}_a PARTITION OF {table}"
                f" FOR VALUES FROM ({range_ * 100}) TO ({range_ * 100 + 50})",
                f"CREATE TABLE {table}_b PARTITION OF {table} DEFAULT",
                self._rows("docs", range_, "divided"),
            )
            self._attached[range_] = table

    def _visit(self) -> None:
        """One that comes, is written to, and goes."""
        if (room := self._room()) is not None:
            range_, table = room
            rows = self._rows("docs", range_, "visiting")
            self._run(self._creating(table, range_), rows, f"DROP TABLE {table}")

    def _detach(self) -> None:
        if (range_ := self._some()) is not None:
            table = self._attached.pop(range_)
            self._run(f"ALTER TABLE docs DETACH PARTITION {table}")
            self._detached[table] = range_

    def _change(self) -> None:
        """Rows of one that is none now."""
        if self._detached:
            table = self._choose.choice(list(self._detached))
            self._run(
                f"DELETE FROM {table} WHERE id % {self._choose.randint(2, 5)} = 0",
                f"UPDATE {table} SET note = 'unsent', emb = {self._vector()} WHERE id % 3 = 1",
                self._rows(table, self._detached[table], "unsent"),
            )

    def _attach(self) -> None:
        for table, range_ in self._detached.items():
            if range_ not in self._attached:
                self._run(self._attaching(table, range_))
                self._attached[range_] = table
                del self._detached[table]
                return

    def _bounce(self) -> None:
        if (range_ := self._some()) is not None:
            table = self._attached[range_]
            self._run(
                f"ALTER TABLE docs DETACH PARTITION {table}",
                f"UPDATE {table} SET note = 'unsent', emb = {self._vector()} WHERE id % 3 = 0",
                f"DELETE FROM {table} WHERE id % 4 = 1",
                self._attaching(table, range_),
            )

    def _swap(self) -> None:
        if (range_ := self._some()) is not None:
            old, table = self._attached[range_], f"swapped_{len(self.done)}"
            self._run(
                f"CREATE TABLE {table} (LIKE docs INCLUDING ALL)",
                f"INSERT INTO {table} SELECT id, 'swapped', {self._vector()} FROM {old}"
                " WHERE id % 5 <> 0",
                f"DROP TABLE {old}",
                self._attaching(table, range_),
            )
            self._attached[range_] = table

    def _split_off(self) -> None:
        """Rows go to a partition that is not yet one, under other keys."""
        source, room = self._some(), self._room()
        if source is not None and room is not None:
            range_, table = room
            self._run(
                f"CREATE TABLE {table} (LIKE docs INCLUDING ALL)",
                f"WITH gone AS (DELETE FROM docs {self._where(source)} RETURNING *)"
                f" INSERT INTO {table} SELECT id + {(range_ - source) * 100}, note, emb FROM gone",
                self._attaching(table, range_),
            )
            self._attached[range_] = table

    def _drop(self) -> None:
        if (range_ := self._some()) is not None:
            self._run(f"DROP TABLE {self._attached.pop(range_)}")

    def _truncate(self) -> None:
        if (range_ := self._some()) is not None:
            self._run(f"TRUNCATE {self._attached[range_]}")

    def _rewrite(self) -> None:
        if (range_ := self._some()) is not None:
            self.done.append(f"VACUUM FULL {self._attached[range_]}")
            self._database.execute(self.done[-1])

    def _alter(self) -> None:
        self._run(
            self._choose.choice(
                [
                    f"ALTER TABLE docs ALTER note SET DEFAULT '{self._choose.random()}'",
                    "ALTER TABLE docs ALTER note TYPE text USING note || '!'",
                ]
            )
        )


async def live(life: Running, partitions: Partitions, choose: random.Random) -> None:
    for _ in range(choose.randint(0, 12)):
        await asyncio.to_thread(partitions.act)
        await asyncio.sleep(choose.choice((0, 0, 0.05, 0.3)))
        if life.task.done():
            life.task.result()
    if choose.random() < 0.5:
        await life.wait_streaming()
        await life.caught_up()
        for _ in range(2):
            # The catalog has been looked at meanwhile.
            await asyncio.sleep(0.4)
            await settled(life)
        await life.assert_equal()


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(4))
async def test_partitions_in_any_order(
    database18: Database, qdrant: QdrantTarget, seed: int
) -> None:
    choose = random.Random(seed)
    partitions = Partitions(database18, choose)
    migration = {"window_seconds": choose.choice((0.001, 5.0)), "chunk_rows": 100}
    settings = pipeline_settings(database18, qdrant, "docs", migration=migration)
    slot, remembered = settings.source.slot, False
    try:
        for number in range(LIVES):
            if remembered and choose.random() < 0.5:
                partitions.done.append("-- the slot goes back")
                await asyncio.to_thread(go_back, database18, slot)
            if remembered:
                await asyncio.to_thread(drop_slot, database18, f"{slot}_old")
            partitions.done.append(f"-- life {number}")
            wait = choose.random() < 0.5
            async with running(settings, database18, qdrant, wait=wait) as life:
                await live(life, partitions, choose)
            remembered = choose.random() < 0.5
            try:
                if remembered:
                    await asyncio.to_thread(remember, database18, slot)
            except psycopg.Error:
                # It was cut off before it had one, or that is still in use.
                remembered = False
            for _ in range(choose.randint(0, 4)):
                partitions.act()
    except AssertionError as error:
        raise AssertionError("\n".join((*partitions.done[-60:], str(error)))) from error
