"""Plans of changed tables: what goes on, and what stops the table."""

from __future__ import annotations

import dataclasses

import pytest

from cdc_sync.errors import MappingError
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import IdScheme, PayloadIndexType
from cdc_sync.mapping.planner import DimensionChangedError, build_plan, replan
from cdc_sync.mapping.table import PgType, attached_leaves, may_lack_rows, redefined
from tests.support.mapping_types import array, core, pgvector
from tests.unit.test_planner import COLUMNS, column_of, index, table, vector_of

BEFORE = build_plan(
    table(indexes=(index("t", "btree", ("title", "text_ops")),)), PlanOptions()
).plan
NAMES = [(column.name, column.type) for column in COLUMNS]


def test_an_unchanged_relation_gives_the_same_plan() -> None:
    assert replan(BEFORE, NAMES, PlanOptions()) == BEFORE


def test_new_and_dropped_columns() -> None:
    columns = [("extra", core("jsonb")), *NAMES[:1], NAMES[2], ("v2", pgvector("vector", 5))]
    plan = replan(BEFORE, columns, PlanOptions())
    assert [column.name for column in plan.columns] == ["extra", "id", "embedding"]
    assert plan.key == (1,)
    assert column_of(plan, "extra").field == "extra"
    assert vector_of(plan, "embedding") == vector_of(BEFORE, "embedding")
    assert plan.payload_indexes == ()
    selected = PlanOptions(columns=["title", "embedding"])
    before = build_plan(table(), selected).plan
    assert replan(before, [*NAMES, ("extra", core("jsonb"))], selected) == before
    dropped = replan(BEFORE, NAMES[:2], PlanOptions())
    assert dropped.vectors == ()
    assert dropped.payload_indexes == BEFORE.payload_indexes
    # Indexes on fields that no column has, but members of its documents, stay as they are.
    options = PlanOptions(indexes={"kind": PayloadIndexType.KEYWORD})
    before = build_plan(table(), options).plan
    assert replan(before, columns, options).payload_indexes == before.payload_indexes != ()
    # Like vectors that are new, bits that are to be one are left out.
    bits = [*NAMES, ("code", core("bit", 8))]
    for chosen, added in (((), ["code"]), (("code",), [])):
        plan = replan(BEFORE, bits, PlanOptions(bit_vectors=chosen))
        assert [column.name for column in plan.columns] == [*dict(NAMES), *added]


@pytest.mark.requirement("R32")
@pytest.mark.parametrize(
    "type_",
    [
        pgvector("vector", 4),
        pgvector("halfvec", 3),
        pgvector("sparsevec", 3),
        array(pgvector("vector", 3), 3),
        core("text"),
        core("bit", 3),
    ],
)
def test_a_changed_vector_is_refused(type_: PgType) -> None:
    with pytest.raises(MappingError, match=r"public\.docs: column embedding") as caught:
        replan(BEFORE, [*NAMES[:2], ("embedding", type_)], PlanOptions())
    assert "collection" in caught.value.remedy


@pytest.mark.requirement("R13")
def test_a_vector_type_of_another_oid_and_schema_is_the_same() -> None:
    moved = dataclasses.replace(pgvector("vector", 3, "extensions"), oid=77)
    plan = replan(BEFORE, [*NAMES[:2], ("embedding", moved)], PlanOptions())
    assert plan.vectors == BEFORE.vectors
    assert column_of(plan, "embedding").type is moved


@pytest.mark.requirement("R22")
def test_a_changed_key_is_refused_unless_ids_stay_the_same() -> None:
    with pytest.raises(MappingError, match="key column id is gone"):
        replan(BEFORE, NAMES[1:], PlanOptions())
    for name in ("text", "uuid", "numeric"):
        with pytest.raises(MappingError, match="column id is part of the key"):
            replan(BEFORE, [("id", core(name)), *NAMES[1:]], PlanOptions())
    plan = replan(BEFORE, [("id", core("int4")), *NAMES[1:]], PlanOptions())
    assert plan.id_scheme is IdScheme.INTEGER


def test_new_columns_that_cannot_be_mapped_are_refused() -> None:
    with pytest.raises(MappingError, match=r"column odd: type tsquery") as caught:
        replan(BEFORE, [*NAMES, ("odd", core("tsquery"))], PlanOptions())
    assert "columns" in caught.value.remedy
    namespaced = build_plan(table(), PlanOptions(namespace="n")).plan
    with pytest.raises(MappingError, match="_table"):
        replan(namespaced, [*NAMES, ("_table", core("text"))], PlanOptions(namespace="n"))
    plan = replan(BEFORE, [*NAMES, ("raw", core("bytea"))], PlanOptions(skip_bytea=True))
    assert plan == BEFORE


@pytest.mark.parametrize(
    ("after", "changed"),
    [
        ("c.s.v.1=a,2=b", False),
        ("c.s.v.1=a,2=b,3=c", False),  # a label was added
        ("c.s.v.1=a,2=x", True),  # one was renamed
        ("c.s.v.", False),  # no column has the type any more, which the columns say
        ("d.s.v.1=a,2=b", True),
        ("c.t.v.1=a,2=b", False),  # VACUUM FULL
        ("c.s.w.1=a,2=b", False),  # SET DEFAULT
        ("c.t.w.1=a,2=b", True),  # computed anew
    ],
)
def test_what_redefines_a_table(after: str, changed: bool) -> None:
    assert redefined("c.s.v.1=a,2=b", after) is changed
    if not changed:
        # What was recorded before labels were.
        assert not redefined("c.s.v", after)


DIGEST, PARTITIONS = "c" * 32, "p" * 32
PARTITIONED = f"{DIGEST}{PARTITIONS}.s.v.1=a.11=x-1,12=y-2"


@pytest.mark.requirement("R34")
@pytest.mark.parametrize(
    ("after", "attached", "lost"),
    [
        (PARTITIONED, set(), False),
        (f"{DIGEST}q.t.v.1=a.11=x-1,12=y-2,13=z-3", {13}, False),
        (f"{DIGEST}q.t.v.1=a.11=x-1", set(), True),  # detached
        (f"{DIGEST}{PARTITIONS}.s.v.1=a.11=x-1,12=z-2", {12}, True),  # and attached again
        (f"{DIGEST}q.t.v.1=a.12=y-2,13=z-3", {13}, True),  # swapped
        (f"{DIGEST}q.t.v.1=a.11=x-1,12=y-4,13=z-3", {13}, True),  # one of them truncated
        (f"{DIGEST}.t.v.1=a.", set(), True),  # none is left
    ],
)
def test_partitions_that_come_and_go_do_not_redefine_a_table(
    after: str, attached: set[int], lost: bool
) -> None:
    assert not redefined(PARTITIONED, after)
    assert attached_leaves(PARTITIONED, after) == attached
    assert may_lack_rows(PARTITIONED, after) is lost
    assert redefined(PARTITIONED, after.replace("v.1=a", "v.1=b"))
    assert redefined(PARTITIONED, after.replace("c", "d"))
    # Computed anew, if a partition that was there is in another file; else a default, or a GRANT.
    assert redefined(PARTITIONED, after.replace(".v.", ".w.")) is ("12=y-4" in after)


@pytest.mark.requirement("R34")
def test_where_leaves_are_not_named_other_partitions_redefine_a_table() -> None:
    older = PARTITIONED.rpartition(".")[0]
    assert not redefined(older, PARTITIONED)
    assert not may_lack_rows(older, PARTITIONED)
    assert redefined(older, f"{DIGEST}q.t.v.1=a.11=x-1")
    assert redefined(older, f"{DIGEST}{PARTITIONS}.t.w.1=a.11=x-1")
    assert not attached_leaves(older, PARTITIONED)
    # Tables that inherit are not leaves.
    assert redefined(older, f"{DIGEST}q.t.v.1=a")


def test_a_dimension_that_changed_can_be_told_from_other_changes() -> None:
    with pytest.raises(DimensionChangedError) as caught:
        replan(BEFORE, [*NAMES[:2], ("embedding", pgvector("vector", 4))], PlanOptions())
    assert "rebuild" in caught.value.remedy
    with pytest.raises(MappingError) as other:
        replan(BEFORE, [*NAMES[:2], ("embedding", pgvector("halfvec", 3))], PlanOptions())
    assert not isinstance(other.value, DimensionChangedError)
