"""Changes of a table's definition: columns come, go and are renamed, types change, rows are
rewritten; with rows changed at the same time or not at all, while the pipeline runs, is down, or is
killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from pydantic import SecretStr

from cdc_sync.config import (
    PipelineSettings,
    QdrantSettings,
    Settings,
    SourceSettings,
    TableSettings,
)
from tests.support.fix_pipeline import SyncTable
from tests.support.fix_postgres import Database
from tests.support.oracle import compare
from tests.support.pipeline_process import PipelineProcess
from tests.support.qdrant_control import QdrantTarget

DIM = 640
CREATE = f"""
CREATE TYPE mood AS ENUM ('glad', 'sad');
CREATE TABLE docs (id bigint PRIMARY KEY, note text, n int, label varchar(20), feeling mood,
                   emb vector({DIM}), side vector(4));
INSERT INTO docs SELECT i, 'note ' || i, i, 'label', 'glad',
  array_fill((i + 1)::float4 / 8, ARRAY[{DIM}])::vector, '[1,2,3,4]' FROM generate_series(1, 6) i;
"""


@dataclass
class Followed:
    """A table and the pipeline that follows it."""

    database: Database
    settings: Settings
    qdrant: QdrantTarget
    collection: str
    log_path: Path
    stack: ExitStack = field(default_factory=ExitStack)
    table: str = "docs"
    pipeline_: PipelineProcess | None = None

    @property
    def pipeline(self) -> PipelineProcess:
        assert self.pipeline_ is not None, "the pipeline is not running"
        return self.pipeline_

    def start(self, wait: bool = True) -> None:
        self.pipeline_ = PipelineProcess(self.settings, self.log_path)
        self.stack.callback(self.pipeline_.close)
        if wait:
            self.pipeline.wait_streaming()

    def stop(self) -> None:
        end = self.pipeline.stop()
        assert end.exit_code == 0, end

    def execute(self, *statements: str) -> None:
        """In one transaction."""
        self.database.execute("BEGIN; " + "; ".join(statements) + "; COMMIT")

    def assert_equal(self) -> None:
        """Compare once everything has settled."""
        with self.database.connect() as connection:
            self.pipeline.wait_settled(connection)
        differences = compare(
            self.database.url, self.table, qdrant_url=self.qdrant.url, collection=self.collection
        )
        shown = "\n".join(str(one) for one in differences[:20])
        assert not differences, f"{shown}\n{self.pipeline.log()}"


Follow = Callable[..., Followed]


@pytest.fixture
def follow(
    database18: Database, qdrant: QdrantTarget, tmp_path: Path
) -> Iterator[Follow]:
    """Create the table and start a pipeline on it (``start=False``: do not)."""
    with ExitStack() as stack:

        def make(*, start: bool = True, extra: str = "") -> Followed:
            database18.execute(CREATE + extra)
            name = database18.name
            collection = qdrant.new_collection_name()
            settings = Settings(
                source=SourceSettings(
                    url=SecretStr(database18.url), slot=name, publication=name
                ),
                qdrant=QdrantSettings(url=qdrant.url),
                tables=[TableSettings(name="docs", collection=collection)],
                pipeline=PipelineSettings(name=name, copy_workers=1),
            )
            followed = Followed(
                database18, settings, qdrant, collection, tmp_path / "pipeline.log", stack
            )
            if start:
                followed.start()
            return followed

        yield make


CHANGES = {
    "add": "ALTER TABLE docs ADD COLUMN added int",
    "add with default": "ALTER TABLE docs ADD COLUMN added text DEFAULT 'given'",
    "add with volatile default": "ALTER TABLE docs ADD COLUMN added float8 DEFAULT random()",
    "drop": "ALTER TABLE docs DROP COLUMN label",
    "drop and add again": "ALTER TABLE docs DROP COLUMN label, ADD COLUMN label varchar(20)",
    "rename": "ALTER TABLE docs RENAME COLUMN label TO title",
    "int to bigint": "ALTER TABLE docs ALTER COLUMN n TYPE bigint USING n * 5000000000",
    "int to text": "ALTER TABLE docs ALTER COLUMN n TYPE text",
    "varchar to text": "ALTER TABLE docs ALTER COLUMN label TYPE text",
    "same type, other values": "ALTER TABLE docs ALTER COLUMN n TYPE int USING n * 2",
    "order": "ALTER TABLE docs DROP COLUMN note; ALTER TABLE docs ADD COLUMN note text DEFAULT 'x'",
    "enum value": "ALTER TYPE mood ADD VALUE 'calm'",
}
changes = pytest.mark.parametrize("change", [pytest.param(v, id=k) for k, v in CHANGES.items()])
ROWS = (
    "UPDATE docs SET feeling = 'sad' WHERE id = 1",
    "UPDATE docs SET id = 20 WHERE id = 2",
    "INSERT INTO docs (id, side) VALUES (30, '[4,3,2,1]')",
    "DELETE FROM docs WHERE id = 3",
)


@changes
@pytest.mark.requirement("R30", "R31")
def test_change_without_rows(follow: Follow, change: str) -> None:
    """DDL sends no message, so only the catalog can tell."""
    followed = follow()
    followed.execute(change)
    followed.assert_equal()


@changes
def test_change_between_rows_of_one_transaction(follow: Follow, change: str) -> None:
    followed = follow()
    followed.execute("UPDATE docs SET feeling = 'sad' WHERE id = 4", change, *ROWS)
    followed.assert_equal()


@changes
@pytest.mark.requirement("R30")
def test_change_while_the_pipeline_is_down(follow: Follow, change: str) -> None:
    followed = follow()
    followed.stop()
    followed.execute(*ROWS[:2])
    followed.execute(change)
    followed.execute(*ROWS[2:])
    followed.start()
    followed.assert_equal()


@changes
def test_change_without_rows_while_the_pipeline_is_down(follow: Follow, change: str) -> None:
    followed = follow()
    followed.stop()
    followed.execute(change)
    followed.start()
    followed.assert_equal()


@changes
@pytest.mark.parametrize("rows", [False, True], ids=["without rows", "with rows"])
def test_killed_right_after_a_change(follow: Follow, change: str, rows: bool) -> None:
    followed = follow()
    followed.execute(change, *(ROWS if rows else ()))
    followed.pipeline.kill()
    followed.start()
    followed.assert_equal()


@changes
def test_change_overtakes_a_row_that_must_be_read_again(follow: Follow, change: str) -> None:
    """The row's vector is not in the message, and when it is asked for the table has changed."""
    followed = follow()
    followed.stop()
    followed.execute("UPDATE docs SET id = 40 WHERE id = 4")
    followed.execute(change)
    followed.start()
    followed.assert_equal()
