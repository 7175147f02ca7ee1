"""Settings of a pipeline: the models. Where values come from is in ``cdc_sync/loading.py``.

``examples`` of a field fill the file that ``cdc-sync config init`` writes, where a default would
say nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr

from cdc_sync.credentials import Login

MetricName = Literal["cosine", "euclid", "dot", "manhattan"]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class SourceSettings(_Section):
    """Postgres."""

    url: SecretStr = Field(
        description="Connection string (URI or key=value); libpq's PG* variables fill what it "
        "leaves out. Of several hosts the primary is used.",
        examples=["postgresql://cdc_sync@localhost:5432/app"],
    )
    password: SecretStr | None = Field(
        None, description="Password, if the URL has none.", examples=["the-password"]
    )
    sslmode: Literal["disable", "prefer", "require", "verify-ca", "verify-full"] | None = Field(
        None,
        description="As libpq's; default: the URL's, else verify-full, but prefer to this machine "
        "itself.",
        examples=["verify-full"],
    )
    ca_file: str | None = Field(
        None,
        min_length=1,
        description="PEM file with the certificate authority to trust instead of the system's.",
        examples=["/etc/ssl/certs/postgres-ca.pem"],
    )
    client_cert_file: str | None = Field(
        None,
        min_length=1,
        description="PEM file with the certificate that is shown to Postgres.",
        examples=["/etc/cdc-sync/postgres-client.pem"],
    )
    client_key_file: str | None = Field(
        None,
        min_length=1,
        description="PEM file with the key of client_cert_file.",
        examples=["/etc/cdc-sync/postgres-client.key"],
    )
    slot: str = Field(
        "cdc_sync",
        pattern=r"^[a-z0-9_]{1,63}$",
        description="Name of the replication slot; created when absent.",
    )
    publication: str = Field(
        "cdc_sync",
        min_length=1,
        max_length=63,
        description="Name of the publication; created when absent and permitted, else checked.",
    )
    connect_timeout_seconds: float = Field(
        10.0, gt=0, description="How long to wait for a connection."
    )
    on_slot_lost: Literal["recreate", "stop"] = Field(
        "recreate",
        description="When the slot is lost, or the cluster was restored to an earlier state: make "
        "a new one and read every table again under the running stream, or stop.",
    )
    on_source_changed: Literal["recreate", "stop"] = Field(
        "stop",
        description="The same when the URL leads to another cluster than before, which may be a "
        "mistake: points without a row there are removed.",
    )
    failover: bool = Field(
        True,
        description="Let standbys take over the slot (Postgres 17 and later); it is then "
        "synchronised by standbys that have sync_replication_slots on.",
    )
    slot_creation_timeout_seconds: float = Field(
        60.0,
        gt=0,
        description="How long slot creation may wait for open write transactions, a try.",
    )
    credentials_grace_seconds: float = Field(
        300.0,
        ge=0,
        description="How long credentials that worked before may be refused while a pipeline runs "
        "before it ends: as long as a new password may take to arrive in its file.",
    )
    _login: Login = PrivateAttr(default_factory=lambda: Login("postgres"))

    @property
    def login(self) -> Login:
        """Whether Postgres takes the credentials; one for all copies of these settings."""
        return self._login


class QdrantSettings(_Section):
    """Qdrant."""

    url: str = Field(
        "http://localhost:6334",
        description="http(s)://host:6334 (gRPC) or edge:/path for an embedded database.",
    )
    api_key: SecretStr | None = Field(
        None, description="API key or token.", examples=["the-api-key"]
    )
    timeout_seconds: float = Field(60.0, gt=0, description="Deadline of one request.")
    parallel_requests: int = Field(
        4,
        ge=1,
        le=64,
        description="Requests over disjoint ids sent together, whatever collections they are for.",
    )
    request_points: int = Field(256, ge=1, description="Points a request, at most.")
    request_bytes: int = Field(4 << 20, ge=1 << 10, description="Bytes a request, about.")
    max_row_bytes: int = Field(
        32 << 20,
        ge=8 << 20,
        description="Bytes of the largest row that is written; a larger one is a dead letter.",
    )
    ca_file: str | None = Field(
        None,
        description="PEM file with the certificate authority to trust instead of the system's.",
        examples=["/etc/ssl/certs/qdrant-ca.pem"],
    )
    client_cert_file: str | None = Field(
        None,
        min_length=1,
        description="PEM file with the certificate that is shown to Qdrant.",
        examples=["/etc/cdc-sync/qdrant-client.pem"],
    )
    client_key_file: str | None = Field(
        None,
        min_length=1,
        description="PEM file with the key of client_cert_file.",
        examples=["/etc/cdc-sync/qdrant-client.key"],
    )
    credentials_grace_seconds: float = Field(
        300.0,
        ge=0,
        description="How long an API key that worked before may be refused while a pipeline runs "
        "before it ends: as long as a new key may take to arrive in its file.",
    )
    _login: Login = PrivateAttr(default_factory=lambda: Login("qdrant"))

    @property
    def login(self) -> Login:
        """Whether Qdrant takes the API key; one for all copies of these settings."""
        return self._login


class TableSettings(_Section):
    """One table."""

    name: str = Field(
        min_length=1,
        description="Table: name, schema.name, or quoted as in SQL.",
        examples=["public.items"],
    )
    key: list[str] | None = Field(
        None, min_length=1, description="Key columns; default: the primary key.", examples=[["id"]]
    )
    columns: list[str] | None = Field(
        None,
        min_length=1,
        description="Columns to take; default: all.",
        examples=[["id", "title", "embedding"]],
    )
    collection: str | None = Field(
        None, min_length=1, description="Collection; default: the table's name.", examples=["items"]
    )
    metrics: dict[str, MetricName] = Field(
        default_factory=dict,
        description="Distance metric by vector column.",
        examples=[{"embedding": "cosine"}],
    )
    dimensions: dict[str, int] = Field(
        default_factory=dict,
        description="Dimension by vector column, for columns declared without one.",
        examples=[{"embedding": 768}],
    )
    unnamed_vector: str | None = Field(
        None,
        description="The vector column that becomes the collection's unnamed vector.",
        examples=["embedding"],
    )
    bit_vectors: list[str] = Field(
        default_factory=list, description="bit(n) columns that become uint8 vectors."
    )
    namespace: str | None = Field(
        None,
        description="Makes ids distinct where several tables share a collection.",
        examples=["items"],
    )
    exclude: list[str] = Field(default_factory=list, description="Columns to leave out.")
    rename: dict[str, str] = Field(
        default_factory=dict,
        description="Payload field or vector name by column; default: the column's name.",
        examples=[{"embedding": "dense"}],
    )
    where: str | None = Field(
        None,
        min_length=1,
        description="SQL predicate: only rows for which it is true are kept in step.",
        examples=["deleted_at IS NULL"],
    )
    constants: dict[str, str | int | float | bool | None] = Field(
        default_factory=dict,
        description="Payload fields with a fixed value, written to every point.",
        examples=[{"source": "shop"}],
    )
    payload_key: str | None = Field(
        None,
        min_length=1,
        description="Payload field that holds all columns as one object; default: each its own.",
        examples=["metadata"],
    )
    drop_nulls: bool | list[str] = Field(
        False,
        description="Leave NULLs out of the payload instead of writing null: all, or of these "
        "columns.",
    )
    numeric_as_string: bool | list[str] = Field(
        False, description="Write numeric columns as strings always: all, or these columns."
    )
    skip_bytea: bool | list[str] = Field(
        False,
        description="Leave bytea columns out instead of writing base64: all, or these columns.",
    )
    ids: Literal["native", "qdrant-migration", "qdrant-migration-uuid", "qdrant-migration-hex"] = (
        Field(
            "native",
            description="How keys become point ids; qdrant-migration: as Qdrant's migration tool "
            "computes them (-uuid, -hex: of text keys that are UUIDs, or 32 hexadecimal digits).",
        )
    )
    on_dimension_change: Literal["stop", "rebuild"] = Field(
        "stop",
        description="When the dimension of a vector column changes: stop the table, or drop its "
        "collection, make it anew and copy the table.",
    )
    preset: Literal["langchain", "llamaindex", "vecs"] | None = Field(
        None,
        description="Map the table as that library's own Qdrant store reads it.",
        examples=["langchain"],
    )
    preset_collection: str | None = Field(
        None,
        description="With preset langchain: the LangChain collection whose rows are taken; "
        "default: all, told apart by a payload field.",
        examples=["docs"],
    )
    collection_config: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of a collection that is created, by Qdrant's own names.",
        examples=[{"shard_number": 2, "on_disk_payload": True}],
    )


class PipelineSettings(_Section):
    """The engine."""

    name: str = Field(
        "default",
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="Name of the pipeline in its own records.",
    )
    shard: str | None = Field(
        None,
        pattern=r"^[1-9][0-9]*/[1-9][0-9]*$",
        description="i/n: keep only the i-th of n parts of every table, by a hash of its key.",
        examples=["1/4"],
    )
    batch_rows: int = Field(4096, ge=1, description="Rows gathered into one batch, at most.")
    batch_bytes: int = Field(
        16 << 20, ge=1 << 16, description="Bytes gathered into one batch, at most."
    )
    dead_letter_limit: int = Field(
        1000, ge=0, description="Stop once more rows than this could not be written."
    )
    dead_letter_retry_seconds: float = Field(
        3600.0,
        ge=0,
        description="How often rows that could not be written are read and tried again; 0: only "
        "at the start, and when the table or its collection changes.",
    )
    status_interval_seconds: float = Field(
        10.0, gt=0, description="How often the position is reported at the least."
    )
    startup_timeout_seconds: float = Field(
        15.0,
        ge=0,
        description="How long to try for a first connection to Postgres and to Qdrant.",
    )
    shutdown_timeout_seconds: float = Field(
        25.0, gt=0, description="How long a graceful stop may take."
    )
    heartbeat_seconds: float = Field(
        0.0,
        ge=0,
        description="Write a logical message of our own every so often, and measure how long it "
        "takes to come back; 0: never. It is not needed for the position to move.",
    )
    stuck_seconds: float = Field(
        600.0,
        ge=0,
        description="Not alive (/livez) once the position has not moved for so long although the "
        "server has more and both sides answer; 0: never.",
    )
    let_go_seconds: float = Field(
        30.0,
        gt=0,
        description="Let go of the slot's connection once Qdrant has failed for so long; it would "
        "hold up a fast shutdown of Postgres.",
    )


class MigrationSettings(_Section):
    """The copy of tables."""

    num_workers: int = Field(
        0,
        ge=0,
        le=256,
        description="Worker processes of the copy; 0: as many as there are CPU cores to be used.",
    )
    batch_size: int = Field(
        1024, ge=1, le=100_000, description="Rows a worker reads and writes at once, at most."
    )
    batch_delay: int = Field(
        0, ge=0, description="Milliseconds a worker rests after each batch, to spare both sides."
    )
    window_seconds: float = Field(
        30.0,
        gt=0,
        description="How long the copy may hold the stream before changes are applied again; "
        "bounds lag and retained WAL.",
    )
    max_retained_wal_bytes: int | None = Field(
        None,
        ge=1,
        description="WAL that the copy may make the slot keep: more ends a window early, and the "
        "next waits until it is half of it; default: four fifths of max_slot_wal_keep_size.",
        examples=[10_737_418_240],
    )
    chunk_rows: int = Field(
        5_000, ge=100, description="Rows a chunk, about: the unit of work, and of resuming."
    )
    create_collection: bool = Field(
        True, description="Create collections that do not exist; else that is an error."
    )
    defer_hnsw: bool = Field(
        False, description="Build the HNSW index only after the first copy (m = 0 until then)."
    )
    adopt: bool = Field(
        False,
        description="Take over collections that hold points already: verify and repair them "
        "instead of copying.",
    )
    extra_points: Literal["remove", "report"] = Field(
        "remove",
        description="What becomes of points without a row, found after an adoption or a resync.",
    )
    executor: Literal["processes", "ray"] = Field(
        "processes", description="What runs the workers: local processes, or a Ray cluster."
    )
    ray_address: str = Field(
        "auto", description="Address of the Ray cluster, or local for one in this process."
    )


class VerifySettings(_Section):
    """Verification without end, beside the stream."""

    continuous: bool = Field(
        False,
        description="Verify all tables again and again while the pipeline streams, which reads "
        "every row and every point each time.",
    )
    rows_per_second: float = Field(
        200.0, gt=0, description="Rows and points looked at a second, at most."
    )
    pause_seconds: float = Field(
        3600.0, ge=0, description="Rest between the end of one pass and the next."
    )
    repair: bool = Field(
        False, description="Have rows and points that differ read again, by the pipeline itself."
    )


class HttpSettings(_Section):
    """The HTTP endpoint: a status page, /metrics, /livez, /readyz, /status."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        9464, description="Port to listen on; 0 picks a free one."
    )
    enabled: bool = Field(True, description="Whether to listen at all.")


class LogSettings(_Section):
    """Logs."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity."
    )
    format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, else JSON."
    )


class Settings(_Section):
    """Everything."""

    source: SourceSettings
    qdrant: QdrantSettings = Field(default_factory=QdrantSettings)
    tables: list[TableSettings] = Field(min_length=1, description="The tables to keep in step.")
    pipeline: PipelineSettings = Field(default_factory=PipelineSettings)
    migration: MigrationSettings = Field(default_factory=MigrationSettings)
    verify: VerifySettings = Field(default_factory=VerifySettings)
    http: HttpSettings = Field(default_factory=HttpSettings)
    log: LogSettings = Field(default_factory=LogSettings)
