"""Taking the slot: the beginning of a session, and where slot and server stand. All blocking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cdc_sync.config import SourceSettings
from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.mapping.values import needs_text
from cdc_sync.postgres.connect import answering, closed_on_error, connect
from cdc_sync.postgres.replication import ReplicationConnection, StreamOptions
from cdc_sync.postgres.slot import read_slot
from cdc_sync.postgres.watch import source_position
from cdc_sync.qdrant.sink import SourceMark
from cdc_sync.sync.planning import PipelinePlan
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.sync.source_history import check_history


@dataclass(frozen=True, slots=True)
class TakenSlot:
    """A slot that streams to us, and the timeline of the server."""

    connection: ReplicationConnection
    timeline: int

    def close(self) -> None:
        """Let go of it."""
        self.connection.close()


def start_stream(
    source: SourceSettings,
    plan: PipelinePlan,
    tables: Sequence[PlannedTable],
    mark: SourceMark | None,
    applied: int,
    *,
    text: bool = False,
) -> TakenSlot:
    """Start replication from where the slot stands; values come as ``text`` if so, else in binary
    format where the tables allow it.

    Raises :class:`SourceError`: SLOT_ACTIVE while another process has it, SOURCE_CHANGED when the
    server is another than the plan's, SOURCE_REWOUND as :func:`check_history`.
    """
    connection = ReplicationConnection.open(source)
    with closed_on_error(connection):
        identity = connection.identify()
        if identity.system_identifier != plan.server.system_identifier:
            raise SourceError(
                ErrorKind.SOURCE_CHANGED,
                f"the cluster behind the connection changed from "
                f"{plan.server.system_identifier} to {identity.system_identifier}",
            )
        timeline = check_history(connection, mark, applied)
        # Of a table that could not be planned it is not known; should one of its columns forbid it,
        # the server says so, and the next session takes text.
        binary = not text and _can_be_binary(tables)
        connection.start(source.slot, source.publication, options=StreamOptions(binary=binary))
    return TakenSlot(connection, timeline)


def _can_be_binary(tables: Sequence[PlannedTable]) -> bool:
    """A type without binary output below an array, composite or range would stop the server's
    decoding for good (R12)."""
    return not any(
        needs_text(column.type) for planned in tables for column in planned.table.columns
    )


def confirmed_position(source: SourceSettings) -> int:
    """Where the slot stands; it moves no more by others once this process has it."""
    with connect(source) as connection, answering(connection):
        slot = read_slot(connection, source.slot)
    return int(slot.confirmed_flush_lsn or 0) if slot is not None else 0


def server_position(source: SourceSettings) -> int:
    """The end of the server's WAL."""
    with connect(source) as connection, answering(connection):
        return int(source_position(connection, source.slot).current)
