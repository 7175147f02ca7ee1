"""Settings of a pipeline: the models. Where values come from is in ``cdc_sync/loading.py``.

``examples`` of a field fill the file that ``cdc-sync config init`` writes, where a default would
say nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

MetricName = Literal["cosine", "euclid", "dot", "manhattan"]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class SourceSettings(_Section):
    """Postgres."""

    url: SecretStr = Field(
        description="Connection string (URI or key=value); libpq's PG* variables fill what it "
        "leaves out.",
        examples=["postgresql://cdc_sync@localhost:5432/app"],
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
    slot_creation_timeout_seconds: float = Field(
        60.0,
        gt=0,
        description="How long slot creation may wait for open write transactions, a try.",
    )


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
        4, ge=1, le=64, description="Requests over disjoint ids sent together."
    )
    request_points: int = Field(256, ge=1, description="Points a request, at most.")
    request_bytes: int = Field(4 << 20, ge=1 << 10, description="Bytes a request, about.")
    ca_file: str | None = Field(
        None,
        description="PEM file with the certificate authority to trust instead of the system's.",
        examples=["/etc/ssl/certs/qdrant-ca.pem"],
    )


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
    drop_nulls: bool = Field(
        False, description="Leave NULL columns out of the payload instead of writing null."
    )
    numeric_as_string: bool = Field(False, description="Write numeric columns as strings always.")
    skip_bytea: bool = Field(
        False, description="Leave bytea columns out instead of writing base64."
    )


class PipelineSettings(_Section):
    """The engine."""

    name: str = Field(
        "default",
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="Name of the pipeline in its own records.",
    )
    copy_workers: int = Field(
        0, ge=0, le=64, description="Worker processes of the copy; 0: as many as CPU cores."
    )
    batch_rows: int = Field(4096, ge=1, description="Rows gathered into one batch, at most.")
    batch_bytes: int = Field(
        16 << 20, ge=1 << 16, description="Bytes gathered into one batch, at most."
    )
    dead_letter_limit: int = Field(
        1000, ge=0, description="Stop once this many rows could not be written."
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
    let_go_seconds: float = Field(
        30.0,
        gt=0,
        description="Let go of the slot's connection once Qdrant has failed for so long; it would "
        "hold up a fast shutdown of Postgres.",
    )


class HttpSettings(_Section):
    """The HTTP endpoint: /metrics, /livez, /readyz, /status."""

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
    http: HttpSettings = Field(default_factory=HttpSettings)
    log: LogSettings = Field(default_factory=LogSettings)
