"""What ``check`` says of where the vectors of a table lie. Pure: from the facts to findings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cdc_sync.mapping.plan import Datatype, TablePlan, VectorKind, VectorPlan
from cdc_sync.mapping.table import Table
from cdc_sync.postgres.identifiers import qualified, quote_ident
from cdc_sync.postgres.toast_facts import ColumnPlace, ToastFacts
from cdc_sync.sync.findings import Finding
from cdc_sync.sync.known_findings import finding
from cdc_sync.sync.routing import PlannedTable

#: From so many bytes a value is out of line by itself: toast_tuple_target (2032) less the header.
_SURELY_OUT: Final = 2008
_COMPONENT_BYTES: Final = {Datatype.FLOAT16: 2, Datatype.UINT8: 0.125}
_VECTOR_HEADER: Final = 8


def toast_findings(planned: PlannedTable, facts: ToastFacts) -> Iterator[Finding]:
    """What an update of other columns carries, and what REPLICA IDENTITY FULL would cost or does
    cost."""
    vectors = {column.name for column in planned.plan.columns if column.vector is not None}
    places = [place for place in facts.columns if place.name in vectors]
    if not vectors:
        return
    name = planned.name
    if not any(place.rows for place in places):
        yield finding("toast", "ok", name, _expected(planned.plan))
    else:
        yield _places(name, [place for place in places if place.rows], facts)
    yield from _full_identity(planned, facts)
    yield from _storage(planned.table, vectors)


def _places(name: str, places: list[ColumnPlace], facts: ToastFacts) -> Finding:
    rows = sum(place.rows for place in places)
    out = sum(place.out_of_line for place in places)
    size = sum(place.mean_bytes for place in places)
    cost = f"REPLICA IDENTITY FULL would cost about {facts.full_identity_factor:.0f} times the WAL"
    looked = f"of {facts.rows} rows looked at"
    if out == rows:
        text = (
            f"all vectors out of line ({looked}): metadata updates will be payload-only; {cost} of "
            "such an update"
        )
    elif out == 0:
        text = (
            f"all vectors in the row ({looked}): every update carries them, {size:.0f} bytes a row "
            "on average, and writes the whole point"
        )
    else:
        text = (
            f"{out} of {rows} vectors out of line ({looked}): metadata updates of those rows will "
            f"be payload-only, the others carry the vector; {cost} of such an update"
        )
    return finding("toast", "ok", name, text)


def _expected(plan: TablePlan) -> str:
    sizes = [size for vector in plan.vectors if (size := _bytes(vector)) is not None]
    if sizes and len(sizes) == len(plan.vectors) and min(sizes) > _SURELY_OUT:
        return (
            "no rows to look at; by their dimensions all vectors will lie out of line, and "
            "metadata updates will be payload-only"
        )
    return (
        "no rows to look at; vectors lie in the row where it is short, and then every update "
        "carries them"
    )


def _bytes(vector: VectorPlan) -> float | None:
    if vector.kind is not VectorKind.DENSE or vector.size is None:
        return None
    return _VECTOR_HEADER + vector.size * _COMPONENT_BYTES.get(vector.datatype, 4)


def _full_identity(planned: PlannedTable, facts: ToastFacts) -> Iterator[Finding]:
    table = planned.table
    if table.replica_identity != "f":
        return
    # A row filter, or a key other than the primary one, may need it.
    needed = planned.row_filter is not None or not table.primary_key or table.deferrable_key
    keys = {planned.plan.columns[position].name for position in planned.plan.key}
    if needed or not keys <= set(table.primary_key):
        return
    cost = (
        f"an update writes about {facts.full_identity_factor:.0f} times the WAL that it has to"
        if facts.rows
        else "every update writes the whole old row to the WAL"
    )
    yield finding(
        "replica-identity",
        "advice",
        planned.name,
        f"its REPLICA IDENTITY is FULL, which cdc-sync does not need: {cost}",
        "If nobody else needs it:\n"
        f"ALTER TABLE {qualified(table.schema, table.name)} REPLICA IDENTITY DEFAULT;",
    )


def _storage(table: Table, vectors: set[str]) -> Iterator[Finding]:
    """pgvector's types are EXTERNAL since 0.6.0; columns that are older keep EXTENDED."""
    compressed = [
        column.name
        for column in table.columns
        if column.name in vectors and column.storage == "x" and column.type.base.is_pgvector
    ]
    if compressed:
        name = qualified(table.schema, table.name)
        yield finding(
            "vector-storage",
            "advice",
            table.qualified_name,
            f"{', '.join(compressed)}: storage is EXTENDED, so Postgres tries in vain to compress "
            "each vector; pgvector's default since 0.6.0 is EXTERNAL",
            "For rows written from then on:\n"
            + "\n".join(
                f"ALTER TABLE {name} ALTER COLUMN {quote_ident(column)} SET STORAGE EXTERNAL;"
                for column in compressed
            ),
        )
