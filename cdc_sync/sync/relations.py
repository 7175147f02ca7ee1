"""The tables of the pipeline as the stream sees them, and which of them must be read again.

DDL says nothing in the stream by itself (R30), and rows that exist get no message when a column is
added with a default or dropped. So a table's points can be of older columns than the table. Each
table has a *synced* column list: that of its first copy, or of its last resync. Whatever is written
by other columns, or found in the catalog with other columns, makes the table stale; a stale table
is read again as a whole by :mod:`cdc_sync.sync.resync`. A partition that was attached is read by
itself, and points are looked through for those whose partition is gone (R34).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.errors import CdcSyncError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.table import PgType, attached_leaves, may_lack_rows, redefined
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.pgoutput.messages import Relation
from cdc_sync.postgres.catalog import TypeResolver
from cdc_sync.postgres.connect import connect
from cdc_sync.qdrant.sink import PipelineState
from cdc_sync.sync.fingerprints import is_stale, recorded_definition
from cdc_sync.sync.gather import Batch
from cdc_sync.sync.routing import Binding, PlannedTable, Unusable, bind
from cdc_sync.sync.stopped_tables import concerns_one_table

log = get_logger(__name__)

#: Tables that are not ours which are remembered, so that each is spoken of once.
_MAX_IGNORED: Final = 5_000


class Relations:
    """Routes Relation messages to planned tables, and keeps book of stale ones."""

    def __init__(
        self, tables: Sequence[PlannedTable], settings: Settings, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._planned = {planned.plan.oid: planned for planned in tables}
        self._synced: dict[int, TablePlan] = {p.plan.oid: p.plan for p in tables}
        self._definitions: dict[int, str] = {p.plan.oid: p.table.definition for p in tables}
        self._bindings: dict[int, Binding] = {}
        #: Tables that inherit send their changes under their own OIDs (R40).
        self._roots = {leaf.oid: p.plan.oid for p in tables for leaf in p.table.children}
        self._types: dict[tuple[int, int], PgType] = {}
        self._ignored: set[int] = set()
        #: Tables without a plan, by OID.
        self._unplanned: dict[int, Unusable] = {}
        #: Grows whenever a Relation message that has come may be bound otherwise now.
        self.generation = 0
        self.stale: set[int] = set()
        #: Stale tables of which changes may not be sent, of transactions that are still open too.
        self.unsent: set[int] = set()
        #: Tables of which rows may be gone without a message.
        self.unswept: set[int] = set()
        #: Leaf partitions of which rows may have come without one.
        self.unread: dict[int, set[int]] = {}
        for planned in tables:
            for column in planned.table.columns:
                self._types[column.type.oid, column.type.typmod] = column.type

    @property
    def wanted(self) -> set[int]:
        """OIDs of the tables of which something must be read again, or looked through."""
        return self.stale | self.unswept | self.unread.keys()

    @property
    def settled_definitions(self) -> dict[str, str]:
        """How the tables are defined of which nothing is to be read, by name."""
        wanted = self.wanted
        return {p.name: self._definitions[o] for o, p in self._planned.items() if o not in wanted}

    @property
    def tables(self) -> tuple[PlannedTable, ...]:
        """The tables with the plans in force."""
        return tuple(self._planned.values())

    def compare(self, state: PipelineState) -> None:
        """Mark tables that are not as they were when their collection was filled, or that an
        earlier life has marked."""
        for known in state.tables:
            for planned in self._planned.values():
                if planned.name != known.table:
                    continue
                if is_stale(known.plan_fingerprint, planned):
                    self.mark(planned, "changed while the pipeline was down")
                else:
                    before = recorded_definition(known.plan_fingerprint)
                    self._compare_partitions(planned, before, planned.table.definition)

    def mark_replayed(self, state: PipelineState, begins: int) -> list[tuple[PlannedTable, bool]]:
        """Mark the tables of which a stream that begins there brings changes again that others have
        followed which it does not bring (R34, R39). The slot's position goes back when Postgres
        crashes before it has saved it. Returns them, each with whether its rows must be read."""
        found = []
        reason = "the stream begins before the table was last read"
        for known in state.tables:
            planned = self.find(known.table)
            if planned is None or max(known.read_lsn, known.swept_lsn) <= begins:
                continue
            rows = known.read_lsn > begins
            if rows:
                self.mark(planned, reason)
            else:
                self.mark_unswept(planned, reason)
            found.append((planned, rows))
        return found

    def mark_begun(self, names: Iterable[str]) -> None:
        """Mark tables of which a copy or a sweep was under way when a life ended. That it was a
        sweep for a stream which began too early shows nowhere else."""
        for name in names:
            planned = self.find(name)
            if planned is not None and planned.plan.oid not in self.stale:
                self.mark_unswept(planned, "it was begun before")

    def is_redefined(self, oid: int, definition: str) -> bool:
        """Whether a table is not defined any more as when it was read as a whole."""
        known = self._definitions.get(oid)
        if known is None or known == definition:
            # Comparing thousands of partitions takes a while.
            return False
        return redefined(known, definition)

    def observe(self, oid: int, definition: str) -> None:
        """Mark a table that was redefined since it was read as a whole."""
        planned = self._planned.get(oid)
        if planned is None:
            return  # Another has its name by now.
        if self.is_redefined(oid, definition):
            self.mark(planned, "changed in the catalog")
        else:
            self._compare_partitions(planned, self._definitions[oid], definition)
            self._definitions[oid] = definition

    @property
    def oids(self) -> dict[str, int]:
        """The OIDs of all tables by name, of those without a plan too."""
        unplanned = {table.table: oid for oid, table in self._unplanned.items()}
        return unplanned | {planned.name: oid for oid, planned in self._planned.items()}

    def name(self, oid: int) -> str:
        """The name of a table that has a plan."""
        return self._planned[oid].name

    def find(self, name: str) -> PlannedTable | None:
        """The table of this name, if it has a plan."""
        return next((p for p in self._planned.values() if p.name == name), None)

    def route(self, relation: Relation) -> Binding | Unusable | None:
        """Bind a Relation message; None for a table that is not configured. Raises
        :class:`SourceError` when the catalog cannot be asked."""
        root = self._roots.get(relation.oid, relation.oid)
        planned = self._planned.get(root)
        if planned is None:
            if relation.oid in self._unplanned:
                return self._unplanned[relation.oid]
            self._ignore(relation)
            return None
        known = self._bindings.get(relation.oid)
        if known is not None and known.relation == relation:
            return known
        try:
            binding = bind(planned, relation, self._resolve)
        except CdcSyncError as error:
            if not concerns_one_table(error):
                raise
            self._bindings.pop(relation.oid, None)
            return Unusable(planned.name, error)
        self._bindings[relation.oid] = binding
        if binding.replanned:
            self._planned[root] = binding.planned
            self._metrics.add_table(planned.name).schema_changes["applied"].inc()
            log.info("columns_changed", table=planned.name, columns=len(relation.columns))
        return binding

    def _ignore(self, relation: Relation) -> None:
        """Say once that a table is not ours; partitions of ours have their own messages, too."""
        if relation.oid in self._ignored:
            return
        if len(self._ignored) >= _MAX_IGNORED:
            # Where all tables are published, temporary ones come and go without end.
            self._ignored.clear()
        self._ignored.add(relation.oid)
        leaves = (leaf.oid for p in self._planned.values() for leaf in p.table.leaves)
        if relation.oid not in leaves:
            log.info("relation_ignored", table=f"{relation.namespace}.{relation.name}")

    def forget_type(self, oid: int) -> None:
        """A Type message came: what is known of that OID may be out of date (R13)."""
        for key in [key for key in self._types if key[0] == oid]:
            del self._types[key]

    def note(self, batch: Batch) -> list[PlannedTable]:
        """Mark tables that the batch writes by other columns than those they are synced to, and
        return them, whether they were marked before or not."""
        found = []
        written = [binding.planned for binding in batch.bindings.values()]
        for planned in (*written, *(request.planned for request in batch.rereads)):
            synced = self._synced.get(planned.plan.oid)
            if synced is not None and planned.plan.columns != synced.columns:
                self.mark(planned, "rows were written by other columns")
                found.append(planned)
        return found

    def note_leaves(self, batch: Batch) -> list[PlannedTable]:
        """Mark tables of which the batch may hold rows of a partition that is not known: it may be
        gone before anybody has seen it (R34). Returns them, marked before or not, and those of
        which it may hold rows of one that is to be read and is not on record."""
        found = []
        for oid, leaves in batch.leaves.items():
            planned = self._planned.get(oid)
            if planned is None:
                continue
            known = {leaf.oid for leaf in planned.table.leaves}
            if not leaves <= known:
                self.mark_unswept(planned, "rows came of a partition that is not known")
            if not leaves <= known - self.unread.get(oid, set()):
                found.append(planned)
        return found

    def reading(self, planned: PlannedTable) -> None:
        """The table is being read as a whole, by this plan."""
        before = self._planned.get(planned.plan.oid)
        if before is None or before.plan != planned.plan or before.ignored != planned.ignored:
            self.generation += 1
        self._planned[planned.plan.oid] = planned
        for column in planned.table.columns:
            # A composite may have got other attributes, of which no message tells.
            self._types[column.type.oid, column.type.typmod] = column.type
        self._synced[planned.plan.oid] = planned.plan
        self._definitions[planned.plan.oid] = planned.table.definition
        # Whatever Relation message comes next is bound to the new plan.
        for leaf in [oid for oid, root in self._roots.items() if root == planned.plan.oid]:
            # It may have left the table.
            self._bindings.pop(leaf, None)
            del self._roots[leaf]
        for leaf in (planned.plan.oid, *(child.oid for child in planned.table.children)):
            self._bindings.pop(leaf, None)
            self._roots[leaf] = planned.plan.oid

    def take(self, planned: PlannedTable, before: int | None = None) -> None:
        """Bind what comes of a stopped table by this plan. ``before``: the OID that the table had,
        if it has another now."""
        oid = planned.plan.oid
        if before is not None and before != oid:
            self._leave(before)
        self._unplanned.pop(oid, None)
        if oid in self._planned:
            self._planned[oid] = planned
            for leaf in [leaf for leaf, root in self._roots.items() if root == oid]:
                self._bindings.pop(leaf, None)
            self._bindings.pop(oid, None)
        else:
            self.reading(planned)
            self.stale.add(oid)
        for column in planned.table.columns:
            self._types[column.type.oid, column.type.typmod] = column.type
        for child in planned.table.children:
            self._roots[child.oid] = oid
        self.generation += 1

    def leave_unplanned(self, oid: int, unusable: Unusable) -> None:
        """The table cannot be planned: what comes of it is dropped."""
        self._unplanned[oid] = unusable

    def _leave(self, oid: int) -> None:
        """The table is gone; another has its name."""
        self._unplanned.pop(oid, None)
        for known in (self._planned, self._synced, self._definitions, self._bindings):
            known.pop(oid, None)
        for leaf in [leaf for leaf, root in self._roots.items() if root == oid]:
            self._bindings.pop(leaf, None)
            del self._roots[leaf]
        for marked in (self.stale, self.unswept, self.unsent):
            marked.discard(oid)
        self.unread.pop(oid, None)

    def synced(self, planned: PlannedTable) -> None:
        """The table was read as a whole, by this plan."""
        self.reading(planned)
        self.stale.discard(planned.plan.oid)
        self.unswept.discard(planned.plan.oid)
        self.unread.pop(planned.plan.oid, None)

    def mark(self, planned: PlannedTable, reason: str, *, unsent: bool = False) -> None:
        """Mark a table stale. ``unsent``: changes made until now may not be sent, whenever they are
        committed (R39)."""
        if unsent:
            self.unsent.add(planned.plan.oid)
        if planned.plan.oid not in self.stale:
            self.stale.add(planned.plan.oid)
            log.info("resync_wanted", table=planned.name, reason=reason)

    def _compare_partitions(self, planned: PlannedTable, before: str, now: str) -> None:
        """Mark a table whose rows may have come or gone with partitions: of that the stream says
        nothing, nor of TRUNCATE of one (R34)."""
        if not planned.table.partitioned or not before or before == now:
            return
        attached = attached_leaves(before, now)
        if attached - self.unread.get(planned.plan.oid, set()):
            self.unread.setdefault(planned.plan.oid, set()).update(attached)
            log.info("partitions_attached", table=planned.name, partitions=len(attached))
        if may_lack_rows(before, now):
            self.mark_unswept(planned, "partitions have changed")

    def mark_unswept(self, planned: PlannedTable, reason: str) -> None:
        """Have the table's points looked through for those without a row."""
        if planned.plan.oid not in self.unswept:
            self.unswept.add(planned.plan.oid)
            log.info("sweep_wanted", table=planned.name, reason=reason)

    def _resolve(self, oid: int, typmod: int) -> PgType:
        known = self._types.get((oid, typmod))
        if known is None:
            # Rare (a column was added or retyped), so the loop may wait for it.
            with connect(self._settings.source, application_name="cdc_sync types") as connection:
                known = self._types[oid, typmod] = TypeResolver(connection).resolve(oid, typmod)
        return known
