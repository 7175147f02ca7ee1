"""Has a pipeline die at failpoints again and again, with rows being changed meanwhile, and
compares both sides at the end."""

from __future__ import annotations

import functools
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pydantic import SecretStr
from qdrant_client import models as q

from cdc_sync.config import (
    MigrationSettings,
    PipelineSettings,
    QdrantSettings,
    Settings,
    SourceSettings,
    TableSettings,
)
from tests.support.failpoints import EXIT_CODE, Failpoint, arm_after
from tests.support.fix_postgres import Connection, Database
from tests.support.oracle import compare
from tests.support.pipeline_process import Break, PipelineProcess
from tests.support.qdrant_control import QdrantTarget
from tests.support.sql_load import KEYS, ROWS, SEQUENCES, TABLE, SqlLoad

_NOTES: Final = "notes"
_ROWS: Final = 150
#: How long a life may take to come to its failpoint while rows are changed.
_PATIENCE_SECONDS: Final = 120.0
#: Between two changes, first when a life begins and again when it streams: ever longer, so that a
#: slow machine is not given more of them than it can apply.
_FIRST_PAUSE_SECONDS: Final = 0.03
_LONGEST_PAUSE_SECONDS: Final = 1.0
_LONGER: Final = 1.3
#: Lives that end before they confirm leave their changes to the next one. After so many that are
#: not confirmed for sure one life is to catch up.
_UNCONFIRMED_CHANGES: Final = 150
#: How long after it began to stream a pipeline whose copy was to crash is given up on as done.
_DONE_SECONDS: Final = 0.3
_POISON: Final = 1_000_000

_numbers = itertools.count(1)


@dataclass
class CrashSeries:
    """Crashes at failpoints in turn, all of a copy or none. ``qdrant`` is None for the embedded
    database; ``sabotage`` is done to every life that is to crash."""

    database: Database
    qdrant: QdrantTarget | None
    directory: Path
    failpoints: Sequence[Failpoint]
    seed: int
    sabotage: Break | None = None
    crashes: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    pipelines: int = 0
    _load: SqlLoad = field(init=False)
    _choose: random.Random = field(init=False)
    _connection: Connection = field(init=False)
    _settings: Settings = field(init=False)
    _number: int = 0
    _settled: int = 0

    def __post_init__(self) -> None:
        self._choose = random.Random(self.seed)
        self._load = SqlLoad.create(self.database)
        self._connection = self.database.connect()
        self._connection.execute(
            f"CREATE TABLE {_NOTES} (id bigint PRIMARY KEY, note text, pad text, free vector);"
            f"ALTER TABLE {_NOTES} ALTER pad SET STORAGE PLAIN;"
            f"INSERT INTO {_NOTES} SELECT i, 'n', repeat('x', 2400), '[1,2,3]'"
            f" FROM generate_series(1, {_ROWS}) i"
        )
        # With an estimate of its rows it is cut into several chunks.
        self._connection.execute(f"ANALYZE {_NOTES}")
        self._new_pipeline()

    def run(self, crashes: int) -> None:
        """Crash so often at each; raises AssertionError for what is not equal afterwards, and if a
        failpoint is not reached."""
        try:
            self._run(crashes)
        finally:
            self._load.close()
            self._connection.close()

    def _run(self, crashes: int) -> None:
        if not self._copying:
            self._settle()
        while left := [one for one in self.failpoints if self.crashes[one.name] < crashes]:
            for failpoint in left:
                self._life(failpoint)
            if self.lives > 3 * crashes * len(self.failpoints) + 10:
                raise AssertionError(
                    f"{self.lives} lives, and these crashes only: {self.crashes}\n"
                    + self._log().read_text()[-3000:]
                )
        self._settle()

    @property
    def _copying(self) -> bool:
        return self.failpoints[0].needs == "copy"

    # -- lives

    def _life(self, failpoint: Failpoint) -> None:
        """Run the pipeline until it dies, or until its copy is over."""
        self.lives += 1
        if self._number - self._settled > _UNCONFIRMED_CHANGES and not self._copying:
            self._settle()
        self._change()
        self._do(failpoint.needs)
        passes = min(failpoint.passes, self._choose.choice((1, 1, 1, 2, 2, 3, 5)))
        sabotage = functools.partial(arm_after, self.sabotage, failpoint.name, passes)
        life = PipelineProcess(self._settings, self._log(), sabotage)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        streams: float | None = None
        try:
            pause = _FIRST_PAUSE_SECONDS
            while (code := life.exit_code(pause)) is None:
                now = time.monotonic()
                assert now < deadline, f"{failpoint.name} was not reached\n{life.log()}"
                self._change()
                pause = min(pause * _LONGER, _LONGEST_PAUSE_SECONDS)
                if streams is None:
                    if self._is_streaming(life):
                        streams, pause = now, _FIRST_PAUSE_SECONDS
                elif not self._copying:
                    if failpoint.passes > 1:
                        self._do(failpoint.needs)
                elif now - streams > _DONE_SECONDS:
                    break
        finally:
            life.close()
        if code is None:
            self._settle()
            self._new_pipeline()
            return
        assert code == EXIT_CODE, f"the pipeline ended with {code}\n{life.log()}"
        self.crashes[failpoint.name] += 1

    @staticmethod
    def _is_streaming(life: PipelineProcess) -> bool:
        try:
            return life.status().state == "streaming"
        except AssertionError:
            return False  # It has died meanwhile.

    def _settle(self) -> None:
        """Run the pipeline without a failpoint until it has caught up, and compare."""
        life = PipelineProcess(self._settings, self._log())
        try:
            life.wait_streaming()
            life.wait_settled(self._connection)
            end = life.stop()
            assert end.exit_code == 0, f"{end.kind}: {end.message}"
        finally:
            life.close()
        url = self._settings.qdrant.url
        for table, where in ((TABLE, None), (_NOTES, "vector_dims(free) = 3")):
            differences = compare(
                self.database.url, table, qdrant_url=url, collection=self._name(table), where=where
            )
            assert not differences, f"after {self.crashes}:\n" + "\n".join(
                map(str, differences[:10])
            )
        self._settled = self._number

    def _log(self) -> Path:
        return self.directory / "pipeline.log"

    # -- the pipeline

    def _name(self, table: str) -> str:
        return f"{table}_{self._settings.source.slot}"

    def _new_pipeline(self) -> None:
        """Another pipeline for the same tables; what the last one had is removed."""
        if self.pipelines:
            self._connection.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
                " WHERE slot_name = %s AND NOT active",
                (self._settings.source.slot,),
            )
        self.pipelines += 1
        name = f"c{next(_numbers)}_{self.database.name}"[:60]
        url = f"edge:{self.directory / name}" if self.qdrant is None else self.qdrant.url
        self._settings = Settings(
            source=SourceSettings(url=SecretStr(self.database.url), slot=name, publication=name),
            qdrant=QdrantSettings(url=url, timeout_seconds=10.0),
            tables=[
                TableSettings(name=TABLE, collection=f"{TABLE}_{name}"),
                TableSettings(name=_NOTES, collection=f"{_NOTES}_{name}", dimensions={"free": 3}),
            ],
            pipeline=PipelineSettings(name=name, batch_rows=20, dead_letter_limit=100_000),
            # A window takes a chunk at the least, and these not more.
            migration=MigrationSettings(num_workers=1, chunk_rows=100, window_seconds=0.001),
        )

    # -- changes

    def _change(self) -> None:
        """Some transactions."""
        for _ in range(self._choose.randint(1, 3)):
            name = self._choose.choice((*ROWS, *SEQUENCES))
            keys = self._choose.randrange(KEYS), self._choose.randrange(KEYS)
            self._load.rows(0, name, *keys)
        self._number += 1
        self._connection.execute(
            f"UPDATE {_NOTES} SET note = %s WHERE id = %s",
            (f"n{self._number}", self._choose.randint(1, _ROWS)),
        )

    def _do(self, needs: str) -> None:
        """What a failpoint needs."""
        match needs:
            case "truncate":
                self._connection.execute(f"TRUNCATE {self._choose.choice((TABLE, _NOTES))}")
                self._refill()
            case "poison" | "copy":
                self._poison()
            case "missing":
                self._remove_points()
            case "rows":
                self._request([[str(self._choose.randrange(2 * KEYS))] for _ in range(3)])
            case "resync":
                self._add_orphan()
                self._request(None)

    def _refill(self) -> None:
        self._connection.execute(
            f"INSERT INTO {_NOTES} (id, note, free) SELECT i, 'again', '[1,2,3]'"
            " FROM generate_series(1, 9) i ON CONFLICT DO NOTHING"
        )

    def _poison(self) -> None:
        """A row that cannot be written; the one before last is mended or deleted."""
        last = _POISON + self._number
        self._connection.execute(
            f"INSERT INTO {_NOTES} (id, note, free) VALUES (%s, 'poison', '[1]')", (last,)
        )
        mend = self._choose.choice(
            (
                f"UPDATE {_NOTES} SET free = '[3,2,1]' WHERE id < %s AND vector_dims(free) = 1",
                f"DELETE FROM {_NOTES} WHERE id > {_POISON} AND id < %s",
            )
        )
        self._connection.execute(mend, (last - 1,))

    def _remove_points(self) -> None:
        """Take points away behind the pipeline's back, and update their rows in part."""
        assert self.qdrant is not None
        some = [self._choose.randrange(KEYS) for _ in range(3)]
        gone = q.PointIdsList(points=list(some))
        self.qdrant.client().delete(self._name(TABLE), points_selector=gone, wait=True)
        self._number += 1
        self._connection.execute(
            f"INSERT INTO {TABLE} (id, n) SELECT unnest(%s), %s"
            " ON CONFLICT (id) DO UPDATE SET n = excluded.n",
            (list(dict.fromkeys(some)), self._number),
        )

    def _add_orphan(self) -> None:
        if self.qdrant is not None:
            self.qdrant.client().upsert(
                self._name(_NOTES),
                [q.PointStruct(id=5_000_000 + self._number, vector={}, payload={"note": "none"})],
                wait=True,
            )

    def _request(self, keys: list[list[str]] | None) -> None:
        table = TABLE if keys is not None else _NOTES
        name = self._settings.pipeline.name
        body: dict[str, object] = {"pipeline": name, "table": f"public.{table}"}
        if keys is not None:
            body["keys"] = keys
        self._connection.execute(
            "SELECT pg_logical_emit_message(true, 'cdc_sync', %s)", (json.dumps({"resync": body}),)
        )
