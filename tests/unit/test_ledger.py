"""The ledger: what is done stays done, what is left is cut into chunks, and nothing is left out."""

from __future__ import annotations

import dataclasses
import itertools

from hypothesis import given
from hypothesis import strategies as st

from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import ColumnPlan, IdScheme, TablePlan
from cdc_sync.mapping.table import Column, Leaf, PgType, Table, TypeKind
from cdc_sync.qdrant.records import ledger_record, table_ledger
from cdc_sync.sync.ledger import Ledger
from cdc_sync.sync.routing import PlannedTable

BIGINT = PgType(oid=20, schema="pg_catalog", name="int8", kind=TypeKind.BASE)


def leaf(oid: int = 1, *, relfilenode: int = 100, pages: int = 1000, rows: float = 1e5) -> Leaf:
    return Leaf(oid, "public", f"part_{oid}", relfilenode, pages, rows)


def planned(*leaves: Leaf, definition: str = "1.1.1") -> PlannedTable:
    table = Table(
        oid=7,
        schema="public",
        name="items",
        partitioned=len(leaves) > 1,
        columns=(Column("id", 1, BIGINT, not_null=True),),
        primary_key=("id",),
        replica_identity="d",
        identity_columns=("id",),
        indexes=(),
        leaves=leaves,
        definition=definition,
    )
    plan = TablePlan(
        oid=7,
        schema="public",
        table="items",
        collection="items",
        columns=(ColumnPlan("id", BIGINT, field="id"),),
        key=(0,),
        id_scheme=IdScheme.INTEGER,
    )
    return PlannedTable(table, plan, PlanOptions())


def new(table: PlannedTable, *, sweep: bool = False, chunk_rows: int = 5000) -> Ledger:
    return Ledger.new("p", table, chunk_rows, sweep=sweep, repair=False)


def test_chunks_cover_every_block_once_and_the_last_is_open() -> None:
    table = planned(leaf(1), leaf(2, pages=0, rows=-1))
    ledger = new(table)
    chunks = ledger.left(table)
    ranges = [(c.start_block, c.end_block) for c in chunks if c.leaf.oid == 1]
    assert ranges[0][0] == 0
    assert ranges[-1][1] is None
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert len(ranges) == 20
    assert [(c.start_block, c.end_block) for c in chunks if c.leaf.oid == 2] == [(0, None)]


@given(
    pages=st.integers(0, 500),
    rows=st.floats(-1, 5e4),
    order=st.randoms(use_true_random=False),
    steps=st.integers(0, 40),
)
def test_what_is_done_is_never_left_and_the_rest_always_is(
    pages: int, rows: float, order: object, steps: int
) -> None:
    """Also over restarts, for which the ledger goes through its record."""
    table = planned(leaf(pages=pages, rows=rows))
    ledger = new(table, chunk_rows=100)
    done: list[tuple[int, int | None]] = []
    for _ in range(steps):
        left = ledger.left(table)
        if not left:
            break
        chunk = order.choice(left)  # type: ignore[attr-defined]
        ledger.finish(chunk, 10, 100)
        done.append((chunk.start_block, chunk.end_block))
        ledger = Ledger(table_ledger(ledger_record(ledger.record), "test"), 100)
        ledger.meet(table)
    ranges = sorted(
        [*done, *((c.start_block, c.end_block) for c in ledger.left(table))], key=lambda r: r[0]
    )
    assert ranges[0][0] == 0
    assert ranges[-1][1] is None
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert ledger.copied == (not ledger.left(table))
    assert ledger.record.rows == 10 * len(done)


def finish_all(ledger: Ledger, table: PlannedTable) -> None:
    for chunk in ledger.left(table):
        ledger.finish(chunk, 1, 1)


def test_a_leaf_with_other_storage_starts_again_and_the_others_do_not() -> None:
    table = planned(leaf(1), leaf(2))
    ledger = new(table)
    finish_all(ledger, table)
    rewritten = planned(leaf(1), leaf(2, relfilenode=101))
    ledger.meet(rewritten)
    assert {chunk.leaf.oid for chunk in ledger.left(rewritten)} == {2}
    assert not ledger.copied


def test_a_leaf_that_is_gone_leaves_points_to_sweep() -> None:
    table = planned(leaf(1), leaf(2))
    ledger = new(table)
    finish_all(ledger, table)
    assert ledger.complete
    detached = planned(leaf(1))
    ledger.meet(detached)
    assert ledger.copied
    assert not ledger.complete
    ledger.divide(10)
    ledger.finish_sweep(3)
    assert ledger.complete
    assert ledger.record.orphans == 3


def test_a_new_leaf_is_copied() -> None:
    table = planned(leaf(1))
    ledger = new(table)
    finish_all(ledger, table)
    attached = planned(leaf(1), leaf(2))
    ledger.meet(attached)
    assert {chunk.leaf.oid for chunk in ledger.left(attached)} == {2}


def test_another_definition_starts_from_nothing() -> None:
    table = planned(leaf(1))
    ledger = new(table)
    finish_all(ledger, table)
    altered = planned(leaf(1), definition="2.1.1")
    ledger.meet(altered)
    assert len(ledger.left(altered)) == len(new(altered).left(altered))
    assert ledger.record.sweep
    assert ledger.record.rows == 0


def test_growth_does_not_move_what_is_done() -> None:
    table = planned(leaf(1))
    ledger = new(table)
    finish_all(ledger, table)
    grown = planned(leaf(1, pages=5000, rows=5e5))
    ledger.meet(grown)
    assert ledger.complete


def test_a_sweep_has_a_part_for_every_million_points() -> None:
    ledger = new(planned(leaf(1)), sweep=True)
    for points, parts in ((0, 1), (1_000_000, 1), (1_000_001, 2), (25_000_000, 25)):
        ledger.divide(points)
        assert ledger.record.buckets == parts


def test_the_record_comes_back_as_it_was() -> None:
    table = planned(leaf(1), leaf(2))
    ledger = new(table, sweep=True)
    ledger.finish(ledger.left(table)[3], 5, 6)
    ledger.finish(ledger.left(table)[-1], 5, 6)
    record = dataclasses.replace(
        ledger.record, repair=True, again=True, buckets=3, swept=1, orphans=9
    )
    assert table_ledger(ledger_record(record), "test") == record
