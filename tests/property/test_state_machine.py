"""Random changes of rows and of the table, interleaved transactions, crashes and faults: whatever
the order, the collection ends as the table is.

The machine knows nothing of what should come out; the oracle does. It runs a pipeline in a process
of its own against a real Postgres and the Qdrant test server, and lets Hypothesis choose what
happens next. At checkpoints the load pauses, the pipeline catches up, and both sides are compared.

CDC_SYNC_TEST_MACHINE_EXAMPLES sets how many runs the campaign makes (default 300),
CDC_SYNC_TEST_MACHINE_SEED with which seed (default 1); the normal run is always the same one.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pydantic import SecretStr

from cdc_sync.config import (
    MigrationSettings,
    PipelineSettings,
    QdrantSettings,
    Settings,
    SourceSettings,
    TableSettings,
)
from cdc_sync.demo.embedded import PostgresServer
from tests.support import breaks
from tests.support.fix_postgres import create_database, drop_database
from tests.support.oracle import compare
from tests.support.pipeline_process import Break, PipelineProcess
from tests.support.qdrant_control import QdrantProcess
from tests.support.qdrant_faults import RANDOM_KINDS
from tests.support.sql_load import CONNECTIONS, DDL, KEYS, ROWS, SEQUENCES, TABLE, SqlLoad

_EXAMPLES = "CDC_SYNC_TEST_MACHINE_EXAMPLES"
_SEED = "CDC_SYNC_TEST_MACHINE_SEED"

connections = st.integers(0, CONNECTIONS - 1)
keys = st.integers(0, KEYS - 1)
row_statements = st.sampled_from([*ROWS, *SEQUENCES])

_numbers = itertools.count(1)


@dataclass
class Surroundings:
    """What all runs of a test share. ``sabotage`` is done to every pipeline; ``done`` counts over
    all runs."""

    server: PostgresServer
    qdrant: QdrantProcess
    directory: Path
    sabotage: Break | None = None
    done: Counter[str] = field(default_factory=Counter)


class SyncMachine(RuleBasedStateMachine):
    """One database, one collection, one pipeline after the other. ``around`` is set by subclasses,
    since Hypothesis makes the instances."""

    around: Surroundings

    def __init__(self) -> None:
        super().__init__()
        number = next(_numbers)
        self.qdrant = self.around.qdrant
        self.faults = self.qdrant.script
        self.faults.clear()
        self.faults.clear_log()
        self.database = create_database(self.around.server)
        self.load = SqlLoad.create(self.database)
        self.collection = self.qdrant.new_collection_name("machine")
        self.log_path = self.around.directory / f"pipeline-{number}.log"
        self.settings = Settings(
            source=SourceSettings(
                url=SecretStr(self.database.url),
                slot=self.database.name,
                publication=self.database.name,
                slot_creation_timeout_seconds=1.0,
            ),
            qdrant=QdrantSettings(url=self.qdrant.url, timeout_seconds=5.0),
            tables=[TableSettings(name=TABLE, collection=self.collection)],
            pipeline=PipelineSettings(
                name=self.database.name, batch_rows=5, shutdown_timeout_seconds=5.0
            ),
            migration=MigrationSettings(num_workers=1),
        )
        self.pipeline: PipelineProcess | None = None
        self.watcher = self.database.connect()
        self.broken = False

    # -- the pipeline

    @initialize(wait=st.booleans())
    def start(self, wait: bool) -> None:
        if self.pipeline is None:
            self.pipeline = PipelineProcess(
                self.settings, self.log_path, sabotage=self.around.sabotage
            )
        if wait:
            self.pipeline.wait_streaming()

    @precondition(lambda self: self.pipeline is None)
    @rule()
    def start_again(self) -> None:
        self.start(wait=False)

    @precondition(lambda self: self.pipeline is not None)
    @rule(again=st.booleans())
    def crash(self, again: bool) -> None:
        """kill -9."""
        assert self.pipeline is not None
        self.pipeline.kill()
        self.pipeline = None
        self.around.done["crash"] += 1
        if again:
            self.start(wait=False)

    @precondition(lambda self: self.pipeline is not None)
    @rule(again=st.booleans())
    def stop(self, again: bool) -> None:
        # An open transaction that has altered the table would hold up the last batch.
        self.load.end_all()
        assert self.pipeline is not None
        end = self.pipeline.stop()
        assert end.exit_code == 0, f"{end.kind}: {end.message}"
        self.pipeline = None
        self.around.done["stop"] += 1
        if again:
            self.start(wait=False)

    # -- rows

    @rule(changes=st.lists(st.tuples(connections, row_statements, keys, keys), min_size=1))
    def change_rows(self, changes: list[tuple[int, str, int, int]]) -> None:
        """Changes by connections that are in a transaction or not."""
        for connection, statement, key, other in changes:
            self.load.rows(connection, statement, key, other)

    @rule(
        connection=connections,
        statements=st.lists(row_statements, min_size=2, max_size=6),
        key=keys,
        other=keys,
    )
    def change_rows_at_once(
        self, connection: int, statements: list[str], key: int, other: int
    ) -> None:
        """Several changes of the same few rows in one transaction."""
        self.load.begin(connection)
        for statement in statements:
            self.load.rows(connection, statement, key, other)
        self.load.end(connection, "COMMIT")

    @rule(connection=connections, statement=row_statements, key=keys, other=keys)
    def begin(self, connection: int, statement: str, key: int, other: int) -> None:
        self.load.begin(connection)
        self.load.rows(connection, statement, key, other)

    @rule(connection=connections)
    def commit(self, connection: int) -> None:
        self.load.end(connection, "COMMIT")

    @rule(connection=connections)
    def roll_back(self, connection: int) -> None:
        self.load.end(connection, "ROLLBACK")

    @rule(connection=connections, statement=row_statements, key=keys, other=keys)
    def roll_back_to_savepoint(self, connection: int, statement: str, key: int, other: int) -> None:
        self.load.begin(connection)
        self.load.abandon(connection, statement, key, other)

    @rule(connection=connections, key=keys, fill=st.booleans(), commit=st.booleans())
    def truncate_between(self, connection: int, key: int, fill: bool, commit: bool) -> None:
        """Rows before a TRUNCATE and after it, in one transaction."""
        self.load.begin(connection)
        self.load.rows(connection, "insert", key)
        self.load.ddl(connection, "truncate")
        self.load.rows(connection, "fill" if fill else "insert", key)
        self.load.end(connection, "COMMIT" if commit else "ROLLBACK")

    # -- the table

    @rule(connection=connections, statement=st.sampled_from([*DDL]), column=st.integers(0, 1))
    def change_table(self, connection: int, statement: str, column: int) -> None:
        self.load.ddl(connection, statement, column)

    @rule(
        statements=st.lists(st.sampled_from([*DDL]), min_size=1, max_size=3),
        column=st.integers(0, 1),
        key=keys,
        commit=st.booleans(),
    )
    def change_table_and_rows(
        self, statements: list[str], column: int, key: int, commit: bool
    ) -> None:
        """Changes of the table between changes of rows, in one transaction."""
        self.load.end_all()
        self.load.begin(0)
        for statement in statements:
            self.load.rows(0, "update_payload", key)
            self.load.ddl(0, statement, column)
            self.load.rows(0, "update_big", key)
            self.load.rows(0, "change_key", key, key + 1)
        self.load.end(0, "COMMIT" if commit else "ROLLBACK")

    # -- faults

    @rule(walsender_only=st.booleans())
    def cut_postgres(self, walsender_only: bool) -> None:
        """End the pipeline's connections, the replication connection or all."""
        self.watcher.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
            " AND pid <> pg_backend_pid() AND application_name LIKE 'cdc_sync%%'"
            " AND (backend_type = 'walsender' OR NOT %s)",
            (self.database.name, walsender_only),
        )
        self.around.done["cut"] += 1

    @rule(
        kind=st.sampled_from(["reject", "lost_response", "wait_timeout", "slow"]),
        times=st.integers(1, 3),
    )
    def fail_writes(self, kind: str, times: int) -> None:
        match kind:
            case "reject":
                self.faults.reject("write", "UNAVAILABLE", "Socket closed", times=times)
            case "lost_response":
                self.faults.fail_after_apply("write", times=times)
            case "wait_timeout":
                self.faults.wait_timeout("write", times=times)
            case "silent":
                self.faults.never_answer("write", applied=False, times=times)
            case _:
                # A write that outlives a killed pipeline and comes after those of the next one
                # could not be told from a new one, so it is over before that has started.
                self.faults.slow("write", 0.03, times=times)
        self.around.done[kind] += 1

    @rule(probability=st.sampled_from([0.0, 0.2, 0.5]), number=st.integers(0, 1000))
    def fail_at_random(self, probability: float, number: int) -> None:
        kinds = [kind for kind in RANDOM_KINDS if kind not in ("rate_limited", "slow")]
        self.faults.random(probability, number, kinds)

    @rule(down=st.booleans())
    def take_qdrant_away(self, down: bool) -> None:
        self.faults.down(down)
        self.around.done["down"] += down

    @rule(go=st.sampled_from([True, False, False, False]))
    def kill_qdrant(self, go: bool) -> None:
        """kill -9; rarely, since it takes a second to start."""
        if go:
            self.check_order()
            self.qdrant.restart()
            self.around.done["qdrant killed"] += 1

    def wait_for_unanswered_write(self) -> None:
        """Wait until the write has come; then a little, in which it must not be confirmed."""
        deadline = time.monotonic() + 10
        while self.faults.queued():
            assert time.monotonic() < deadline, "no write came"
            time.sleep(0.01)
        time.sleep(0.6)

    # -- what must hold

    @rule(go=st.sampled_from([True, False, False, False]))
    def check_now_and_then(self, go: bool) -> None:
        if go:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Everything comes to rest, and both sides are equal."""
        self.load.end_all()
        self.faults.clear()
        self.start(wait=False)
        assert self.pipeline is not None
        self.pipeline.wait_settled(self.watcher)
        self.check_order()
        differences = compare(
            self.database.url, TABLE, qdrant_url=self.qdrant.url, collection=self.collection
        )
        shown = "\n".join(str(difference) for difference in differences[:20])
        assert not differences, f"{shown}\n{self.pipeline.log()}"
        self.around.done["checkpoint"] += 1

    def check_order(self) -> None:
        """No two requests for one point were ever in flight together."""
        assert self.faults.violations() == []

    def teardown(self) -> None:
        try:
            self.checkpoint()
        finally:
            self.close()

    def close(self) -> None:
        """Let go of everything."""
        self.around.done.update(self.load.done)
        if self.pipeline is not None:
            self.pipeline.close()
            self.pipeline = None
        self.watcher.close()
        self.load.close()
        self.faults.clear()
        drop_database(self.database)


@pytest.fixture
def around(
    postgres18: PostgresServer, qdrant_private: QdrantProcess, tmp_path: Path
) -> Surroundings:
    return Surroundings(postgres18, qdrant_private, tmp_path)


def machine_in(around: Surroundings) -> type[SyncMachine]:
    return type("Machine", (SyncMachine,), {"around": around})


def run_machine(around: Surroundings, examples: int, seed_: int) -> None:
    machine = seed(seed_)(machine_in(around))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            database=None,
            # Shrinking would run for hours, and what depends on timing does not shrink.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.normal,
            print_blob=False,
        ),
    )
    print(dict(sorted(around.done.items())))  # noqa: T201 - shown by pytest -rP


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.requirement("R19", "R20", "R21", "R29", "R30", "R41")
def test_whatever_happens_both_sides_end_equal(around: Surroundings) -> None:
    run_machine(around, examples=8, seed_=1)
    assert around.done["checkpoint"] >= 8


# -- that it can fail


def coalesced(machine: SyncMachine) -> None:
    """A row and a change of it in one batch."""
    machine.change_rows_at_once(0, ["delete", "insert", "update_payload"], 1, 1)


def deleted(machine: SyncMachine) -> None:
    machine.change_rows([(0, "delete", 2, 2)])


def moved(machine: SyncMachine) -> None:
    machine.change_rows([(0, "change_key", 1, 7)])


def crashed_before_it_was_written(machine: SyncMachine) -> None:
    machine.fail_writes("silent", 1)
    machine.change_rows([(0, "update_both", 1, 1)])
    machine.wait_for_unanswered_write()
    machine.crash(again=True)


def altered(machine: SyncMachine) -> None:
    machine.change_table(0, "add_default", 0)


@pytest.mark.parametrize(
    ("steps", "mistake"),
    [
        (coalesced, breaks.unchanged_becomes_null),
        (deleted, breaks.one_delete_is_dropped),
        (moved, breaks.a_moved_row_stays),
        (crashed_before_it_was_written, breaks.confirmed_before_it_is_written),
        (altered, breaks.schema_changes_go_unseen),
    ],
)
def test_the_machine_finds_a_mistake(
    around: Surroundings, steps: Callable[[SyncMachine], None], mistake: Break
) -> None:
    """Few steps, with the mistake in the pipeline and without."""
    for sabotage in (None, mistake):
        around.sabotage = sabotage
        machine = machine_in(around)()
        try:
            machine.start(wait=True)
            steps(machine)
            if sabotage is None:
                machine.checkpoint()
            else:
                with pytest.raises(AssertionError, match=r"payload|vector|extra|missing"):
                    machine.checkpoint()
        finally:
            machine.close()


@pytest.mark.campaign
@pytest.mark.timeout(24 * 3600)
def test_campaign(around: Surroundings) -> None:
    run_machine(
        around,
        examples=int(os.environ.get(_EXAMPLES, "300")),
        seed_=int(os.environ.get(_SEED, "1")),
    )
