"""Routing: from a relation of the stream to the plan of a table.

A Relation message describes the tuples that follow it. Its columns may be fewer, more or in another
order than those of the plan, so each message gets a :class:`Binding` which brings tuples into plan
order. Most Relation messages repeat what is known (R15); a real difference gives a new plan from
that point of the stream on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cdc_sync.errors import CdcSyncError, ErrorKind, MappingError, ProtocolError, SourceError
from cdc_sync.mapping.ids import compile_point_id
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.planner import replan
from cdc_sync.mapping.strings import uuid_binary
from cdc_sync.mapping.table import PgType, Table
from cdc_sync.pgoutput.messages import Relation
from cdc_sync.postgres.preset_tables import only_condition
from cdc_sync.rows import PointId, Row


@dataclass(frozen=True, slots=True)
class PlannedTable:
    """A table of the pipeline with its plan.

    ``ignored``: columns the table has and the plan leaves out. ``row_filter``: the publication's,
    as SQL.
    """

    table: Table
    plan: TablePlan
    options: PlanOptions
    row_filter: str | None = None
    ignored: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``schema.table``, the label of the table everywhere."""
        return self.plan.qualified_name

    @property
    def selection(self) -> str | None:
        """The condition, as SQL, of the rows that are read; None: all. It is the publication's row
        filter and ``options.only``, which is no part of that: its column would then have to be in
        the replica identity."""
        if self.options.only is None:
            return self.row_filter
        condition = only_condition(self.options.only)
        return condition if self.row_filter is None else f"({self.row_filter}) AND {condition}"


@dataclass(slots=True)
class Binding:
    """How tuples of one Relation message become rows in plan order.

    ``order`` gives for each plan column its place in the tuple, or is None when tuples are in plan
    order as they come. ``types`` are the columns' types by which the plan was made; ``replanned``
    says that the plan differs from the one before the message. ``only``: the position of a column,
    and its values (in binary and text format) in the rows that are kept; None: all are.
    """

    planned: PlannedTable
    relation: Relation
    order: tuple[int, ...] | None
    key: tuple[int, ...]
    point_id: Callable[[Row], PointId]
    replanned: bool = False
    only: tuple[int, frozenset[bytes]] | None = None

    def keeps(self, row: Row) -> bool:
        """Whether a row in plan order is one of those that are kept in step."""
        return self.only is None or row[self.only[0]] in self.only[1]

    def arrange(self, row: Row) -> Row:
        """Return the tuple in plan order. Raises :class:`ProtocolError` for one of other width than
        its Relation message."""
        if len(row) != len(self.relation.columns):
            raise ProtocolError(
                f"a tuple of {len(row)} values for the relation {self.relation.namespace}."
                f"{self.relation.name} of {len(self.relation.columns)} columns"
            )
        order = self.order
        return row if order is None else [row[i] for i in order]


@dataclass(frozen=True, slots=True)
class Unusable:
    """What a Relation message gives whose rows cannot be followed: they are read and dropped, and
    the table (``schema.table`` as on record) stops for ``error``."""

    table: str
    error: CdcSyncError


ResolveType = Callable[[int, int], PgType]


def bind(planned: PlannedTable, relation: Relation, resolve: ResolveType) -> Binding:
    """Bind a Relation message to its table, with a new plan where the columns really differ.

    ``resolve`` gives the type for an OID and a type modifier. Raises :class:`SourceError` when the
    replica identity no longer covers the key (R22), :class:`MappingError` when the new columns
    cannot be mapped.
    """
    _check_identity(planned, relation)
    plan = planned.plan
    columns = [c for c in relation.columns if c.name not in planned.ignored]
    if planned.options.columns is not None:
        wanted = {c.name for c in plan.columns}
        columns = [c for c in columns if c.name in wanted]
    if relation.oid != plan.oid:
        # A table that inherits may have columns of its own.
        inherited = {c.name for c in plan.columns}
        columns = [c for c in columns if c.name in inherited]
    found = [(c.name, resolve(c.type_oid, c.type_modifier)) for c in columns]
    known = {c.name: c.type for c in plan.columns}
    replanned = dict(found) != known
    if replanned:
        plan = replan(plan, found, planned.options)
        planned = PlannedTable(
            planned.table,
            plan,
            planned.options,
            planned.row_filter,
            planned.ignored,
            planned.warnings,
        )
    places = {c.name: i for i, c in enumerate(relation.columns)}
    order = tuple(places[c.name] for c in plan.columns)
    in_order = order == tuple(range(len(relation.columns)))
    return Binding(
        planned=planned,
        relation=relation,
        order=None if in_order else order,
        key=plan.key,
        point_id=compile_point_id(plan),
        replanned=replanned,
        only=_only(plan, planned.options.only),
    )


def _only(plan: TablePlan, only: tuple[str, bytes] | None) -> tuple[int, frozenset[bytes]] | None:
    if only is None:
        return None
    name, value = only
    for position, column in enumerate(plan.columns):
        if column.name == name and column.type.base.name == "uuid":
            return position, frozenset({value, uuid_binary(value).encode("ascii")})
    raise MappingError(
        f"{plan.qualified_name}: column {name}, which tells the rows that are kept, is gone or is "
        "no uuid any more",
        "Take out `preset_collection` and copy the table anew, or bring the column back.",
    )


def _check_identity(planned: PlannedTable, relation: Relation) -> None:
    table = f'"{relation.namespace}"."{relation.name}"'
    if relation.replica_identity == "n":
        raise SourceError(
            ErrorKind.TABLE_UNUSABLE,
            f"table {planned.name} now has REPLICA IDENTITY NOTHING: its updates and deletes "
            "cannot be followed",
            f"Run: ALTER TABLE {table} REPLICA IDENTITY DEFAULT; or with a unique index on the "
            "key: REPLICA IDENTITY USING INDEX …;",
        )
    identity = {column.name for column in relation.columns if column.key}
    key = [planned.plan.columns[i].name for i in planned.plan.key]
    missing = [name for name in key if name not in identity]
    if missing:
        raise SourceError(
            ErrorKind.TABLE_UNUSABLE,
            f"the replica identity of table {planned.name} no longer covers its key column"
            f"{'s' if len(missing) > 1 else ''} {', '.join(missing)}",
            f"Run: ALTER TABLE {table} REPLICA IDENTITY DEFAULT; or name the identity's columns as "
            "the key.",
        )
