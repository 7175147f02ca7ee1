"""The seam between the engine and Qdrant: what a sink must do, whether a server or an embedded
engine is behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

from cdc_sync.mapping.comparison import StoredArray
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.vectors import SparseValue
from cdc_sync.qdrant.pace import Cause
from cdc_sync.rows import PointId, Row

if TYPE_CHECKING:
    from cdc_sync.qdrant.collections import FoundVector
    from cdc_sync.qdrant.search import Searcher


@dataclass(slots=True)
class Changes:
    """Final operations on points of one table. No id occurs twice in it, in whatever list.

    ``upserts``: rows known in full. ``partials``: rows with UNCHANGED values (payload, vectors or
    both), whose stored values stay as they are. ``deletes``: ids, present or not. ``large``: some
    row may have a megabyte or more. ``beside``: so many changes of other tables are written at the
    same time.
    """

    upserts: list[tuple[PointId, Row]] = field(default_factory=list)
    partials: list[tuple[PointId, Row]] = field(default_factory=list)
    deletes: list[PointId] = field(default_factory=list)
    large: bool = False
    beside: int = 0

    def __len__(self) -> int:
        return len(self.upserts) + len(self.partials) + len(self.deletes)


@dataclass(frozen=True, slots=True)
class Applied:
    """Outcome of :meth:`TableWriter.apply`, once Qdrant said Completed to all of it.

    ``missing``: ids of partials whose point does not exist, or lacks a payload field that the row
    left UNCHANGED; the engine fetches the rows from Postgres and upserts them. ``refused``: points
    Qdrant takes as invalid, isolated by halving, with its reason; everything else was written.
    ``unmappable``: those of the refused of which no point could be made, so that Qdrant was not
    asked.
    """

    missing: frozenset[PointId] = frozenset()
    refused: tuple[tuple[PointId, str], ...] = ()
    unmappable: frozenset[PointId] = frozenset()


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that upserts so many ``points``, encoded already. ``send`` sends it on a lane, and
    returns when Qdrant has completed it; errors as of :meth:`TableWriter.apply`.
    """

    points: int
    send: Callable[[int], Awaitable[None]]


#: A vector as stored: dense, multivector (a list of rows), or sparse. Cosine vectors are stored
#: normalised.
StoredVector: TypeAlias = list[float] | list[list[float]] | SparseValue


@dataclass(frozen=True, slots=True)
class StoredPoint:
    """A point as Qdrant returns it. ``vectors`` by name ("" for the unnamed one) is empty unless
    asked for."""

    id: PointId
    payload: dict[str, object]
    vectors: dict[str, StoredVector] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RetrievedPoint:
    """A point as Qdrant returns it, with all its vectors as arrays: for comparing many."""

    id: PointId
    payload: dict[str, object]
    vectors: dict[str, StoredArray]


class RequestObserver(Protocol):
    """Told of every request to a server. Called on the event loop; must not wait."""

    def started(self) -> None:
        """A request was sent."""
        ...

    def ended(self, method: str, code: str, seconds: float) -> None:
        """It was answered or given up: gRPC's bare method name, and its status code's name."""
        ...

    def paced(self, collection: str, points: int, cause: Cause | None, *, slower: bool) -> None:
        """So many points of a collection may be in flight together from now on, or they go in
        smaller requests; ``cause``: why not as configured, None if as configured."""
        ...


class TableWriter(Protocol):
    """Writes the points of one table. Made by :meth:`Sink.writer`; holds the compiled encoders of
    its plan."""

    @property
    def plan(self) -> TablePlan:
        """The plan it was made for."""
        ...

    @property
    def values_nulled(self) -> int:
        """NaN and infinities written as null so far."""
        ...

    async def apply(self, changes: Changes) -> Applied:
        """Write all changes and return when Qdrant has completed every one.

        Safe to call again with the same changes after any error. Raises :class:`SinkError` with
        kind SINK_UNAVAILABLE, SINK_UNKNOWN (deadline, INTERNAL, WaitTimeout: may or may not have
        been written), SINK_RATE_LIMITED, SINK_AUTH or COLLECTION_MISSING. Never retries by itself.
        """
        ...

    async def clear(self) -> None:
        """Remove every point of the table (with a namespace: only those that carry it). Errors as
        :meth:`apply`."""
        ...

    async def count(self) -> int:
        """Exact number of points of the table."""
        ...

    async def retrieve(self, ids: Sequence[PointId]) -> list[RetrievedPoint]:
        """The points of these ids that exist, in any order. Errors as :meth:`apply`."""
        ...

    def scroll_ids(self, page: int = 1000) -> AsyncIterator[list[PointId]]:
        """All ids of the table's points, in pages."""
        ...

    def scroll_points(
        self, page: int = 256, with_vectors: bool = True
    ) -> AsyncIterator[list[StoredPoint]]:
        """All points of the table with their payload, in pages."""
        ...

    async def search(
        self, vector_name: str, vector: StoredVector, limit: int
    ) -> list[tuple[PointId, float, dict[str, object]]]:
        """The ``limit`` nearest points of the table with score and payload, best first."""
        ...


@dataclass(frozen=True, slots=True)
class CollectionState:
    """A finding of :meth:`Sink.inspect`: whether the collection exists, how many points it holds,
    and sentences about settings that are other than the plan asks for."""

    exists: bool
    points: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TableRebuild:
    """What the pipeline has made of requests to go over to a rebuilt collection.

    ``answered`` is the token of the last request that was decided, ``taken`` of the last that was
    granted. Since that the table is kept by ``settings`` (JSON of a TableSettings; empty once the
    configuration says the same), instead of in the collection ``replaced``. ``alias`` is still to
    be pointed to the new one; empty once it is.
    """

    answered: str
    taken: str = ""
    settings: str = ""
    replaced: str = ""
    alias: str = ""


#: A position that no stream comes to.
NEVER: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class TableState:
    """Our record of one table of the pipeline; ``copied`` once its first copy is complete.

    ``oid`` is the table's, ``vectors`` its columns that are vectors of the collection.
    ``read_lsn`` is where the stream was, at the least, when its rows were last read for changes
    that the stream does not bring; ``swept_lsn`` when its points were last looked through for
    rows that are gone without a message. A stream that begins before that makes it necessary
    again; :data:`NEVER` says that it is to be done.
    """

    table: str
    collection: str
    plan_fingerprint: str
    copied: bool = False
    oid: int = 0
    vectors: tuple[str, ...] = ()
    rebuild: TableRebuild | None = None
    read_lsn: int = 0
    swept_lsn: int = 0


@dataclass(frozen=True, slots=True)
class PipelineState:
    """Our record of a pipeline: which slot on which cluster it belongs to, and how far the first
    copy is.

    ``system_identifier`` and ``timeline`` as told by IDENTIFY_SYSTEM when the slot was created;
    ``slot_lsn`` is the slot's consistent point, 0 until the slot has been created.
    ``owns_publication``: we have made it, so we may alter it. ``adopting``: collections that held
    points were taken over.
    """

    pipeline: str
    slot: str
    publication: str
    system_identifier: str
    timeline: int
    slot_lsn: int
    tables: tuple[TableState, ...] = ()
    owns_publication: bool = False
    adopting: bool = False


#: What a rebuild is doing: filling its collection and following the table; asking to be taken over;
#: standing at the request's position; being removed.
RebuildPhase: TypeAlias = Literal["filling", "requested", "ready", "aborting"]


@dataclass(frozen=True, slots=True)
class RebuildState:
    """Our record of a rebuild: a second collection that is filled from ``table``, to take the place
    of the one that ``pipeline`` keeps. Written by the rebuild alone.

    ``worker`` is the pipeline that fills it, from ``slot``, by ``settings`` (JSON of a
    TableSettings) into ``collection``; readers come by ``alias`` to ``old``. ``token`` is that of
    the request under way, ``lsn`` the commit position at which the rebuild stands when it is ready.
    ``made_collection``, ``made_alias``: the rebuild has made them. ``widened``: the publication got
    columns for it.
    """

    pipeline: str
    table: str
    worker: str
    slot: str
    settings: str
    collection: str
    old: str
    alias: str
    phase: RebuildPhase = "filling"
    token: str = ""
    lsn: int = 0
    made_collection: bool = False
    made_alias: bool = False
    widened: bool = False


@dataclass(frozen=True, slots=True)
class SourceMark:
    """How far the source was known to be: what shows later that it has gone back, or that the
    publication was altered behind our back.

    ``lsn``: it had written so much; ``timeline`` in which. ``xid``: a transaction (64 bit) known to
    be committed, 0 for none. ``publications``: by table, what changes whenever the publication is
    altered for it.
    """

    pipeline: str
    lsn: int
    timeline: int
    xid: int = 0
    publications: tuple[tuple[str, str], ...] = ()


#: A range of blocks: from the first up to but not including the second (None: to the end).
BlockRange: TypeAlias = tuple[int, int | None]


@dataclass(frozen=True, slots=True)
class LeafLedger:
    """What has been copied of one leaf.

    ``relfilenode`` is the storage that the ranges are of; ``pages`` its size in blocks when it was
    cut into chunks of ``chunk_pages``; ``done`` are ascending and disjoint.
    """

    oid: int
    relfilenode: int
    pages: int
    chunk_pages: int
    done: tuple[BlockRange, ...] = ()


@dataclass(frozen=True, slots=True)
class TableLedger:
    """Our record of a copy under way: what is done of a table, so that it is not done again.

    ``fingerprint`` is of the plan and definition by which it is copied. ``repair``: existing points
    are compared instead of written over. ``sweep``: points without a row are looked for once all
    chunks are done, in ``buckets`` parts (0: not known yet) of which ``swept`` are done. ``again``:
    another copy is to follow. The counts are of finished chunks.
    """

    pipeline: str
    table: str
    fingerprint: str
    leaves: tuple[LeafLedger, ...] = ()
    repair: bool = False
    sweep: bool = False
    buckets: int = 0
    swept: int = 0
    rows: int = 0
    bytes: int = 0
    orphans: int = 0
    again: bool = False


@dataclass(frozen=True, slots=True)
class Mismatches:
    """What a verification of a table found: rows without a point, points without a row, and points
    that are other than their rows."""

    missing: int = 0
    extra: int = 0
    different: int = 0


@dataclass(frozen=True, slots=True)
class TableVerification:
    """Our record of the continuous verification of one table.

    ``leaf`` (an OID, 0: none), ``relfilenode`` and ``block`` say up to where its rows have been
    verified in the pass under way, leaf by leaf in the order of their OIDs; ``rows`` how many.
    ``found`` is what was found in it so far, ``last`` in the last complete one, which ended at
    ``completed`` (Unix time, whole seconds; 0: none did).
    """

    pipeline: str
    table: str
    leaf: int = 0
    relfilenode: int = 0
    block: int = 0
    rows: int = 0
    found: Mismatches = Mismatches()
    last: Mismatches = Mismatches()
    completed: int = 0


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A row that could not be written. ``reason`` holds no row values.

    ``key`` is the point id, or a note where the row has none; ``key_values`` the values of the key
    columns, in key order, as texts that Postgres reads (None: not known). ``lsn`` and
    ``commit_time`` (ISO 8601) are of the change, ``lsn`` 0/0 where a copy read the row.
    ``kind``: value of an ErrorKind, empty in records of 0.1, as are the times of the first and the
    last of so many ``attempts`` to write the row.
    """

    pipeline: str
    table: str
    key: str
    lsn: str
    commit_time: str
    reason: str
    kind: str = ""
    attempts: int = 1
    first_seen: str = ""
    last_seen: str = ""
    key_values: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class CollectionVectors:
    """The vectors that a collection has, by name ("" for the unnamed one), whether or not they fit
    a plan; ``quantized`` are the names of those of which it also keeps a quantized copy."""

    vectors: dict[str, FoundVector]
    quantized: frozenset[str] = frozenset()


class StateStore(Protocol):
    """The pipeline's records beside the data. Every write is durable when it returns. Errors as for
    writers, and StateError."""

    async def load(self, pipeline: str) -> PipelineState | None: ...

    async def save(self, state: PipelineState) -> None: ...

    async def forget(self, pipeline: str) -> None:
        """Remove the pipeline's record, its mark, its ledgers, its dead letters and what is known
        of its verification."""
        ...

    async def mark(self, pipeline: str) -> SourceMark | None:
        """The last mark kept, or None."""
        ...

    async def save_mark(self, mark: SourceMark) -> None:
        """Keep a mark; it replaces the pipeline's earlier one."""
        ...

    async def ledgers(self, pipeline: str) -> list[TableLedger]:
        """The ledgers of copies under way, by table."""
        ...

    async def save_ledger(self, ledger: TableLedger) -> None:
        """Keep a ledger; it replaces the table's earlier one."""
        ...

    async def drop_ledger(self, pipeline: str, table: str) -> None:
        """Remove a table's ledger, present or not."""
        ...

    async def verifications(self, pipeline: str) -> list[TableVerification]:
        """How far the continuous verification is, by table."""
        ...

    async def save_verification(self, verification: TableVerification) -> None:
        """Keep how far it is; it replaces the table's earlier record."""
        ...

    async def rebuilds(self, pipeline: str) -> list[RebuildState]:
        """The rebuilds under way of the pipeline's tables, by table; none where there are no
        aliases."""
        ...

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters; the same table and key replaces the earlier one."""
        ...

    async def dead_letters(self, pipeline: str) -> list[DeadLetter]: ...

    async def release(self, pipeline: str, letters: Sequence[tuple[str, str]]) -> None:
        """Remove dead letters by (table, key), present or not."""
        ...


class Sink(Protocol):
    """Qdrant, opened. One an event loop and process."""

    @property
    def multi_process(self) -> bool:
        """Whether other processes may open the same sink at the same time (a server: yes; an
        embedded database: no)."""
        ...

    @property
    def version(self) -> str:
        """Server or engine version."""
        ...

    @property
    def parallel(self) -> int:
        """Requests that it takes side by side, and so tables that are worth writing together."""
        ...

    @property
    def state(self) -> StateStore: ...

    async def ping(self) -> None:
        """Raise :class:`SinkError` unless it answers."""
        ...

    async def inspect(self, plan: TablePlan) -> CollectionState:
        """Compare the collection with the plan, read-only.

        Raises :class:`SinkError` COLLECTION_MISMATCH naming the vector, what it has and what the
        plan wants; a :class:`DimensionMismatchError` if nothing differs but dimensions.
        """
        ...

    async def vectors(self, plan: TablePlan) -> CollectionVectors | None:
        """The vectors of the plan's collection, read-only; None without a collection. Errors as for
        writers."""
        ...

    async def ensure_collection(
        self, plan: TablePlan, *, create: bool = True, defer_hnsw: bool = False
    ) -> tuple[str, ...]:
        """Create the collection and its payload indexes where absent; else as :meth:`inspect`.

        Without ``create`` an absent collection is a ConfigError. ``defer_hnsw``: a collection that
        is created gets no HNSW index before :meth:`build_index`. Returns sentences about settings
        of a collection that existed, which are never changed.
        """
        ...

    async def drop_collection(self, plan: TablePlan) -> None:
        """Remove the plan's collection with all its points, present or not. Errors as for
        writers."""
        ...

    async def defer_indexing(self, plan: TablePlan) -> None:
        """Build no HNSW index in the plan's collection, which exists, before :meth:`build_index`.

        What it had is remembered beside it. Harmless when repeated.
        """
        ...

    async def configuration(self, plan: TablePlan) -> str:
        """What changes whenever the collection's configuration does; empty where it cannot change
        while the sink is open, or there is no collection."""
        ...

    async def build_index(self, plan: TablePlan) -> None:
        """Give the plan's collection the HNSW settings that were deferred, at its creation or by
        :meth:`defer_indexing`, in whatever process; nothing if none were. Harmless when repeated.

        Returns before the index is built, which Qdrant does in the background.
        """
        ...

    def writer(self, plan: TablePlan) -> TableWriter: ...

    def searcher(self, plan: TablePlan) -> Searcher: ...

    async def make_durable(self) -> None:
        """Make everything applied so far survive a power loss. Called before positions are
        confirmed."""
        ...

    async def close(self) -> None: ...
