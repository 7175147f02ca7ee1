"""Every metric of the daemon, in a registry of its own; ``docs/metrics.md`` explains each.

Names are without the prefix ``cdc_sync_`` and without ``_total`` as attributes here. Known label
sets exist from the start, so ``rate()`` has a zero to begin with; children are bound once, so an
update is one attribute and one call. Update per batch, not per row. Labels are bounded by
configuration: never ids, positions or messages.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cdc_sync import __version__
from cdc_sync.errors import ErrorKind, Retry, policy
from cdc_sync.ops.attention import RebuildSlot

PREFIX: Final = "cdc_sync_"

State = Literal[
    "starting", "standby", "snapshotting", "catching_up", "streaming", "draining", "failed"
]
TablePhase = Literal["pending", "copying", "catching_up", "streaming", "stopped", "failed"]
Operation = Literal["insert", "update", "delete", "truncate"]
MessageKind = Literal[
    "begin", "commit", "insert", "update", "delete", "truncate", "relation", "type", "origin",
    "message", "stream", "prepare", "keepalive",
]  # fmt: skip
LagStage = Literal["receive", "apply", "acknowledge"]
Stage = Literal["receive_wait", "decode", "buffer_wait", "sink_wait", "checkpoint"]
Phase = Literal["snapshot", "stream"]
ToastResolution = Literal["kept", "refetched", "failed"]
SchemaOutcome = Literal["applied", "refused", "resynced"]
ChunkState = Literal["pending", "running", "done"]
SinkOperation = Literal[
    "upsert", "delete", "update_batch", "set_payload", "get", "scroll", "count", "query", "other",
]  # fmt: skip
SinkOutcome = Literal["ok", "error", "timeout"]
SlowdownCause = Literal["deadline", "slow", "rate_limit", "batch_limit", "message_size"]
Trigger = Literal["timer", "requested", "progress"]
WalStatus = Literal["reserved", "extended", "unreserved", "lost"]
CheckpointOutcome = Literal["ok", "error"]
ControlOutcome = Literal[
    "table", "rows", "rebuild", "invalid", "unknown_table", "limited", "unreadable"
]
RereadResult = Literal["written", "deleted"]
LetterRetry = Literal["written", "deleted", "refused", "unreadable"]

#: What the metrics count errors of, by the start of the kind's name.
_COMPONENTS: Final[Mapping[str, str]] = {
    "source": "source", "table": "source", "publication": "source", "slot": "source",
    "protocol": "source", "sink": "sink", "collection": "sink", "mapping": "mapping",
    "dead": "mapping", "state": "state", "config": "config",
}  # fmt: skip

_LATENCY_BUCKETS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300,
)  # fmt: skip
_REQUEST_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
)  # fmt: skip
_DELAY_BUCKETS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 10, 30)
_CHUNK_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_COUNT_BUCKETS: Final = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
_BATCH_BUCKETS: Final = (1, 4, 16, 64, 256, 1_024, 4_096, 16_384, 65_536)
_BYTES_BUCKETS: Final = tuple(float(1 << power) for power in range(10, 29, 2))

MetricType = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """A metric as it is exposed: full name (counters with ``_total``), type, labels, help."""

    name: str
    type: MetricType
    labels: tuple[str, ...]
    help: str


class OptionalGauge(Collector):
    """A gauge that exposes nothing while its value is unknown: a zero would read as a fact."""

    def __init__(self, name: str, help_text: str) -> None:
        self._name = name
        self._help = help_text
        self._value: float | None = None

    def set(self, value: float | None) -> None:
        """Set the value; None takes the sample away."""
        self._value = value

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self._name, self._help)
        if (value := self._value) is not None:
            family.add_metric([], value)
        return [family]

    def describe(self) -> Iterable[Metric]:
        return [GaugeMetricFamily(self._name, self._help)]


class MirroredCounter(Collector):
    """A counter that somebody else keeps, shown as it was last read; nothing before that."""

    def __init__(self, name: str, help_text: str) -> None:
        self._name = name
        self._help = help_text
        self._value: float | None = None

    def set(self, value: float | None) -> None:
        """Set the value; None takes the sample away."""
        self._value = value

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(self._name, self._help)
        if (value := self._value) is not None:
            family.add_metric([], value)
        return [family]

    def describe(self) -> Iterable[Metric]:
        return [CounterMetricFamily(self._name, self._help)]


class _Factory:
    """Creates metrics and keeps a list of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self.specs: list[MetricSpec] = []

    def counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
        self._add(f"{name}_total", "counter", labels, help_text)
        return Counter(PREFIX + name, help_text, labels, registry=self._registry)

    def gauge(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Gauge:
        self._add(name, "gauge", labels, help_text)
        return Gauge(PREFIX + name, help_text, labels, registry=self._registry)

    def optional_gauge(self, name: str, help_text: str) -> OptionalGauge:
        self._add(name, "gauge", (), help_text)
        gauge = OptionalGauge(PREFIX + name, help_text)
        self._registry.register(gauge)
        return gauge

    def mirrored_counter(self, name: str, help_text: str) -> MirroredCounter:
        self._add(f"{name}_total", "counter", (), help_text)
        counter = MirroredCounter(PREFIX + name, help_text)
        self._registry.register(counter)
        return counter

    def histogram(
        self, name: str, help_text: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> Histogram:
        self._add(name, "histogram", labels, help_text)
        return Histogram(PREFIX + name, help_text, labels, registry=self._registry, buckets=buckets)

    def _add(self, name: str, type_: MetricType, labels: Sequence[str], help_text: str) -> None:
        self.specs.append(MetricSpec(PREFIX + name, type_, tuple(labels), help_text))


class TableMetrics:
    """The metrics of one table, bound. Made by :meth:`Metrics.add_table`."""

    def __init__(self, metrics: Metrics, table: str) -> None:
        self.table = table
        self.changes: Mapping[Operation, Counter] = {
            op: metrics.changes.labels(table, op) for op in get_args(Operation)
        }
        self.coalesced = metrics.changes_coalesced.labels(table)
        self.unchanged_toast: Mapping[ToastResolution, Counter] = {
            resolution: metrics.unchanged_toast.labels(table, resolution)
            for resolution in get_args(ToastResolution)
        }
        self.schema_changes: Mapping[SchemaOutcome, Counter] = {
            outcome: metrics.schema_changes.labels(table, outcome)
            for outcome in get_args(SchemaOutcome)
        }
        self.values_nulled = metrics.values_nulled.labels(table)
        self.orphans = metrics.orphans.labels(table)
        self.sweep_parts = metrics.sweep_parts.labels(table)
        self.rows_reread: Mapping[RereadResult, Counter] = {
            result: metrics.rows_reread.labels(table, result) for result in get_args(RereadResult)
        }
        self.dead_letters: Mapping[ErrorKind, Counter] = {
            kind: metrics.dead_letters.labels(table, kind.value)
            for kind in (ErrorKind.MAPPING, ErrorKind.SINK_REFUSED)
        }
        self.dead_letters_pending = metrics.dead_letters_pending.labels(table)
        self.dead_letter_retries: Mapping[LetterRetry, Counter] = {
            result: metrics.dead_letter_retries.labels(table, result)
            for result in get_args(LetterRetry)
        }
        self.stopped = metrics.table_stopped.labels(table)
        self.changes_dropped = metrics.changes_dropped.labels(table)
        self.snapshot_rows = metrics.snapshot_rows.labels(table)
        self.snapshot_bytes = metrics.snapshot_bytes.labels(table)
        self.snapshot_rows_estimated = metrics.snapshot_rows_estimated.labels(table)
        self.snapshot_chunks: Mapping[ChunkState, Gauge] = {
            state: metrics.snapshot_chunks.labels(table, state) for state in get_args(ChunkState)
        }


class Metrics:
    """All metrics of a pipeline. Thread-safe, as prometheus_client is."""

    def __init__(self, revision: str = "unknown") -> None:
        # A process-wide switch: without it every counter and histogram has a second series that
        # says when it was created, which process_start_time_seconds says already.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._factory = _Factory(self.registry)
        self._tables: dict[str, TableMetrics] = {}
        self._replaced: dict[Gauge, frozenset[tuple[str, ...]]] = {}
        self._create_pipeline(revision)
        self._create_slot()
        self._create_lag()
        self._create_stream()
        self._create_tables()
        self._create_sink()
        self._create_snapshot()
        self._create_runtime()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    @property
    def specs(self) -> tuple[MetricSpec, ...]:
        """Every metric of our own; those of process, platform and GC are not in it."""
        return tuple(self._factory.specs)

    # -- what callers do in one step

    def add_table(self, name: str) -> TableMetrics:
        """The metrics of a table (``schema.table``); created with zeros at the first call."""
        if name not in self._tables:
            self._tables[name] = TableMetrics(self, name)
        return self._tables[name]

    def add_task(self, name: str) -> None:
        """Create the metrics of a supervised task."""
        self.loop_heartbeat_timestamp_seconds.labels(name).set(time.time())

    def set_pipeline(self, *, slot: str, publication: str, database: str, protocol: int) -> None:
        """Say what the pipeline reads; ``protocol`` is the pgoutput version in use."""
        self.pipeline_info.clear()
        self.pipeline_info.labels(slot, publication, database, str(protocol)).set(1)

    def set_state(self, state: State) -> None:
        """Set the state, and only it, to 1."""
        for name, gauge in self.state.items():
            gauge.set(1 if name == state else 0)

    def set_wal_status(self, status: WalStatus | None) -> None:
        """Set ``pg_replication_slots.wal_status``; None: not known, all are 0."""
        for name, gauge in self.slot_wal_status.items():
            gauge.set(1 if name == status else 0)

    def set_rebuild_slots(self, slots: Iterable[RebuildSlot]) -> None:
        """Set what is known of slots of rebuilds; those not given have no samples any more."""
        named: dict[tuple[str, ...], RebuildSlot] = {
            (slot.table or "", slot.slot): slot for slot in slots
        }
        used = {labels: float(slot.in_use) for labels, slot in named.items()}
        kept = {
            labels: float(slot.retained_bytes)
            for labels, slot in named.items()
            if slot.retained_bytes is not None
        }
        self._replace(self.rebuild_slot_active, used)
        self._replace(self.rebuild_slot_retained_wal_bytes, kept)

    def _replace(self, gauge: Gauge, values: Mapping[tuple[str, ...], float]) -> None:
        """Have the gauge hold these samples only. One that stays is there all the time: an alert
        that waits would begin anew."""
        known = self._replaced.get(gauge, frozenset())
        for labels in known - values.keys():
            gauge.remove(*labels)
        for labels, value in values.items():
            gauge.labels(*labels).set(value)
        self._replaced[gauge] = frozenset(values)

    def count_error(self, kind: ErrorKind) -> None:
        """Count an error, of whatever consequence."""
        self._errors[kind].inc()

    # -- creation

    def _create_pipeline(self, revision: str) -> None:
        make = self._factory
        info = make.gauge("build_info", "Constant 1.", ("version", "revision", "python"))
        info.labels(__version__, revision, platform.python_version()).set(1)
        self.pipeline_info = make.gauge(
            "pipeline_info", "Constant 1.", ("slot", "publication", "database", "protocol")
        )
        self.state = _bound(make.gauge("state", "1 for the current state.", ("state",)), State)
        self.tables = _bound(make.gauge("tables", "Tables by state.", ("state",)), TablePhase)
        self.tables_waiting = make.gauge(
            "tables_waiting", "Tables whose copy, or reading again, waits for something."
        )
        self.source_up = make.gauge("source_up", "1 while Postgres answers.")
        self.sink_up = make.gauge("sink_up", "1 while Qdrant answers.")
        reconnects = make.counter(
            "source_reconnects", "Replication connections opened again.", ("reason",)
        )
        self.source_reconnects = {
            kind: reconnects.labels(kind.value)
            for kind in ErrorKind
            # Some that do not pass by themselves are healed by a new slot.
            if _component(kind) == "source" and policy(kind).retry is not Retry.NEVER
        }

    def _create_slot(self) -> None:
        make = self._factory
        self.slot_active = make.optional_gauge("slot_active", "1 while the slot has a consumer.")
        self.slot_retained_wal_bytes = make.optional_gauge(
            "slot_retained_wal_bytes", "WAL the slot keeps on the server."
        )
        self.slot_safe_wal_bytes = make.optional_gauge(
            "slot_safe_wal_bytes", "WAL until the slot is invalidated; absent without a limit."
        )
        self.slot_wal_status = _bound(
            make.gauge("slot_wal_status", "1 for the slot's wal_status.", ("status",)), WalStatus
        )
        self.slot_spilled_bytes = make.mirrored_counter(
            "slot_spilled_bytes", "Bytes of transactions that decoding wrote to the server's disk."
        )
        # Of each one that there is; none while Postgres cannot be asked.
        self.rebuild_slot_active = make.gauge(
            "rebuild_slot_active",
            "1 while somebody is at work with the slot of a rebuild.",
            ("table", "slot"),
        )
        self.rebuild_slot_retained_wal_bytes = make.gauge(
            "rebuild_slot_retained_wal_bytes",
            "WAL the slot of a rebuild keeps on the server.",
            ("table", "slot"),
        )
        self.slot_spilled_transactions = make.mirrored_counter(
            "slot_spilled_transactions", "Transactions that decoding wrote to the server's disk."
        )

    def _create_lag(self) -> None:
        make = self._factory
        self.lag_bytes = _bound(
            make.gauge("lag_bytes", "WAL between stages; the sum is the whole lag.", ("stage",)),
            LagStage,
        )
        self.lag_seconds = make.optional_gauge(
            "lag_seconds", "Age of the oldest commit not yet applied; 0 when caught up."
        )
        self.end_to_end_latency_seconds = make.histogram(
            "end_to_end_latency_seconds",
            "From commit in Postgres to completion in Qdrant, by transaction.",
            _LATENCY_BUCKETS,
        )
        self.source_clock_offset_seconds = make.optional_gauge(
            "source_clock_offset_seconds", "The server's clock minus ours."
        )

    def _create_stream(self) -> None:
        make = self._factory
        self.received_messages = _bound(
            make.counter("received_messages", "Replication messages received.", ("kind",)),
            MessageKind,
        )
        self.received_bytes = make.counter("received_bytes", "Bytes of replication received.")
        self.transactions = make.counter("transactions", "Transactions applied.")
        self.heartbeat_latency_seconds = make.histogram(
            "heartbeat_latency_seconds",
            "From the writing of a heartbeat to its completion.",
            _LATENCY_BUCKETS,
        )
        self.transaction_changes = make.histogram(
            "transaction_changes", "Row changes a transaction.", _COUNT_BUCKETS
        )
        self.batch_changes = _bound(
            make.histogram("batch_changes", "Points a batch.", _BATCH_BUCKETS, ("phase",)), Phase
        )
        self.batch_bytes = _bound(
            make.histogram("batch_bytes", "Bytes of rows a batch.", _BYTES_BUCKETS, ("phase",)),
            Phase,
        )
        self.buffer_bytes = make.gauge("buffer_bytes", "Decoded and not yet applied.")
        self.buffer_limit_bytes = make.gauge("buffer_limit_bytes", "Bound of buffer_bytes.")
        self.stage_seconds = _bound(
            make.counter("stage_seconds", "Wall time by stage.", ("stage",)), Stage
        )
        self.status_updates = _bound(
            make.counter("status_updates", "Standby status updates sent.", ("trigger",)), Trigger
        )

    def _create_tables(self) -> None:
        make = self._factory
        self.changes = make.counter("changes", "Row changes applied.", ("table", "op"))
        self.changes_ignored = make.counter(
            "changes_ignored", "Row changes of tables that are not configured."
        )
        self.table_stopped = make.gauge(
            "table_stopped", "1 while the table cannot be followed.", ("table",)
        )
        self.changes_dropped = make.counter(
            "changes_dropped", "Row changes of stopped tables, read and dropped.", ("table",)
        )
        self.changes_coalesced = make.counter(
            "changes_coalesced", "Row changes superseded inside a batch.", ("table",)
        )
        self.unchanged_toast = make.counter(
            "unchanged_toast", "Values not sent because unchanged.", ("table", "resolution")
        )
        self.schema_changes = make.counter(
            "schema_changes", "Changes of a table's definition.", ("table", "outcome")
        )
        self.values_nulled = make.counter(
            "values_nulled", "NaN and infinities written as null.", ("table",)
        )
        self.control_requests = _bound(
            make.counter("control_requests", "Requests in logical messages.", ("outcome",)),
            ControlOutcome,
        )
        self.sweep_parts = make.counter(
            "sweep_parts", "Parts of searches for points without a row.", ("table",)
        )
        self.orphans = make.counter(
            "orphans", "Points found without a row, after a copy.", ("table",)
        )
        # Nothing before a table has been verified: a zero would read as a fact.
        self.verify_mismatches = make.gauge(
            "verify_mismatches",
            "Rows and points that differ, by the continuous verification.",
            ("table", "kind"),
        )
        self.verify_last_success_timestamp_seconds = make.gauge(
            "verify_last_success_timestamp_seconds",
            "Unix time at which the last pass over the table ended.",
            ("table",),
        )
        self.rows_reread = make.counter(
            "rows_reread", "Rows read again because it was asked for.", ("table", "result")
        )
        self.dead_letters = make.counter(
            "dead_letters", "Rows that could not be written.", ("table", "kind")
        )
        self.dead_letter_failures = make.counter(
            "dead_letter_failures", "Dead letters that could not even be kept."
        )
        self.dead_letters_pending = make.gauge(
            "dead_letters_pending", "Dead letters waiting.", ("table",)
        )
        self.dead_letter_retries = make.counter(
            "dead_letter_retries", "Dead letters whose rows were read again.", ("table", "result")
        )

    def _create_sink(self) -> None:
        make = self._factory
        requests = make.histogram(
            "sink_request_duration_seconds",
            "Duration of a request to Qdrant.",
            _REQUEST_BUCKETS,
            ("operation", "outcome"),
        )
        self.sink_request_duration_seconds: Mapping[
            tuple[SinkOperation, SinkOutcome], Histogram
        ] = {
            (operation, outcome): requests.labels(operation, outcome)
            for operation in get_args(SinkOperation)
            for outcome in get_args(SinkOutcome)
        }
        retries = make.counter("sink_retries", "Requests to Qdrant sent again.", ("kind",))
        self.sink_retries = {
            kind: retries.labels(kind.value)
            for kind in ErrorKind
            if _component(kind) == "sink" and policy(kind).retry is Retry.TIMED
        }
        self.sink_in_flight_requests = make.gauge(
            "sink_in_flight_requests", "Requests Qdrant has not answered."
        )
        self.sink_window_points = make.gauge(
            "sink_window_points",
            "Points that may be in flight together; no sample before the first slowdown.",
            ("collection",),
        )
        self.sink_slowdowns = _bound(
            make.counter("sink_slowdowns", "Times that less was sent at once.", ("cause",)),
            SlowdownCause,
        )

    def _create_snapshot(self) -> None:
        make = self._factory
        self.snapshot_rows = make.counter("snapshot_rows", "Rows copied.", ("table",))
        self.snapshot_bytes = make.counter("snapshot_bytes", "Bytes copied.", ("table",))
        self.snapshot_rows_estimated = make.gauge(
            "snapshot_rows_estimated", "Rows the planner expects.", ("table",)
        )
        self.snapshot_chunks = make.gauge(
            "snapshot_chunks", "Chunks of the copy by state.", ("table", "state")
        )
        self.snapshot_chunk_duration_seconds = make.histogram(
            "snapshot_chunk_duration_seconds", "Time a chunk takes.", _CHUNK_BUCKETS
        )
        self.snapshot_taken_timestamp_seconds = make.optional_gauge(
            "snapshot_taken_timestamp_seconds", "When the snapshot that is held was taken."
        )
        self.snapshot_xmin_age_transactions = make.optional_gauge(
            "snapshot_xmin_age_transactions", "Transactions since the snapshot that is held."
        )

    def _create_runtime(self) -> None:
        make = self._factory
        self.checkpoint_writes = _bound(
            make.counter("checkpoint_writes", "Progress made durable.", ("outcome",)),
            CheckpointOutcome,
        )
        self.checkpoint_last_success_timestamp_seconds = make.optional_gauge(
            "checkpoint_last_success_timestamp_seconds", "Unix time of the last one."
        )
        errors = make.counter("errors", "Errors.", ("component", "kind", "retry"))
        self._errors = {
            kind: errors.labels(_component(kind), kind.value, policy(kind).retry.value)
            for kind in ErrorKind
        }
        self.loop_heartbeat_timestamp_seconds = make.gauge(
            "loop_heartbeat_timestamp_seconds", "Unix time of a loop's last turn.", ("task",)
        )
        self.event_loop_delay_seconds = make.histogram(
            "event_loop_delay_seconds", "How late the event loop wakes up.", _DELAY_BUCKETS
        )


_Labelled = TypeVar("_Labelled", Counter, Gauge, Histogram)


def _bound(metric: _Labelled, names: object) -> Mapping[str, _Labelled]:
    """The children of a metric with one label, by the values of a ``Literal``."""
    return {name: metric.labels(name) for name in get_args(names)}


def _component(kind: ErrorKind) -> str:
    return _COMPONENTS[kind.value.partition("_")[0]]
