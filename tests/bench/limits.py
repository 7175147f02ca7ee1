"""The limits: what Postgres and Qdrant do for a loop that does nothing else.

- drain limit: reading a slot's binary pgoutput frames through libpq and dropping them
- copy limit: COPY BINARY of the table, read through libpq and dropped
- sink limit: finished requests sent to a Qdrant server, or finished operations applied to an
  embedded database
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Final

import grpc
import psycopg
import qdrant_edge as edge
from psycopg import pq
from qdrant_client import grpc as q

from cdc_sync.postgres.replication import StreamOptions, start_command
from cdc_sync.qdrant.edge_database import EdgeDatabase
from cdc_sync.qdrant.rpc import UPSERT
from tests.bench.usage import Cost, Meter

_COPY_OUT: Final = pq.ExecStatus.COPY_OUT
_COPY_BOTH: Final = pq.ExecStatus.COPY_BOTH
_XLOG_DATA: Final = 0x77
_COMMIT: Final = 0x43
#: Where the message begins in an XLogData frame.
_MESSAGE: Final = 25

_CHANNEL_OPTIONS: Final = (
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
)


class DrainError(Exception):
    """The server ended the stream, or COPY, before its end."""


@contextmanager
def draining(url: str, slot: str, publication: str) -> Iterator[pq.abc.PGconn]:
    """A connection on which the slot's stream has been started; nothing is ever confirmed."""
    with closing(psycopg.connect(f"{url}?replication=database", autocommit=True)) as connection:
        pgconn = connection.pgconn
        command = start_command(slot, publication, StreamOptions(), connection.info.server_version)
        result = pgconn.exec_(command.encode())
        if result.status != _COPY_BOTH:
            raise DrainError(result.get_error_message())
        pgconn.nonblocking = 1
        yield pgconn


def last_commit(url: str, slot: str, publication: str, commits: int) -> bytes:
    """The position in the header of the frame with the so-many-th Commit, as its eight bytes."""
    with draining(url, slot, publication) as pgconn:
        for frame in _frames(pgconn):
            if frame[0] == _XLOG_DATA and frame[_MESSAGE] == _COMMIT:
                commits -= 1
                if not commits:
                    return bytes(frame[1:9])
    raise DrainError("the stream ended before its last commit")


def _frames(pgconn: pq.abc.PGconn) -> Iterator[memoryview]:
    poll = select.poll()
    poll.register(pgconn.socket, select.POLLIN)
    while True:
        size, frame = pgconn.get_copy_data(1)
        if size > 0:
            yield frame
        elif size < 0:
            return
        else:
            poll.poll(1000)
            pgconn.consume_input()


def drain(url: str, slot: str, publication: str, end: bytes, meter: Meter) -> Cost:
    """Read up to the frame with the position, and drop everything: the drain limit."""
    with draining(url, slot, publication) as pgconn:
        began = meter.begin()
        poll = select.poll()
        poll.register(pgconn.socket, select.POLLIN)
        read, last = pgconn.get_copy_data, memoryview(b"")
        while True:
            size, frame = read(1)
            if size > 0:
                last = frame
            elif size < 0:
                raise DrainError("the stream ended before its last commit")
            else:
                # A keepalive tells there how far the server has sent.
                if bytes(last[1:9]) >= end:
                    return began.until(meter.end())
                poll.poll(1000)
                pgconn.consume_input()


def copy_out(url: str, query: str, meter: Meter) -> Cost:
    """Read COPY (query) TO STDOUT and drop everything: the copy limit."""
    with closing(psycopg.connect(url)) as connection:
        pgconn = connection.pgconn
        began = meter.begin()
        result = pgconn.exec_(f"COPY ({query}) TO STDOUT (FORMAT binary)".encode())
        if result.status != _COPY_OUT:
            raise DrainError(result.get_error_message())
        read = pgconn.get_copy_data
        size = 1
        while size > 0:
            size, _ = read(0)
        cost = began.until(meter.end())
        while (result_ := pgconn.get_result()) is not None:
            if result_.status != pq.ExecStatus.COMMAND_OK:
                raise DrainError(result_.get_error_message())
        return cost


class RequestLoop:
    """Sends finished upserts to a server, a few at a time, as many as the pipeline sends side by
    side, and does nothing else."""

    def __init__(
        self, address: str, api_key: str | None, parallel: int, *, secure: bool = False
    ) -> None:
        self._channels = [_channel(address, secure) for _ in range(parallel)]
        self._metadata = (("api-key", api_key),) if api_key else ()
        self._calls = [
            channel.unary_unary(
                UPSERT.path,
                request_serializer=None,
                response_deserializer=q.PointsOperationResponse.FromString,
            )
            for channel in self._channels
        ]

    def send(self, requests: Sequence[bytes], meter: Meter) -> Cost:
        """Send all requests; returns when each was answered Completed."""
        waiting: deque[grpc.Future] = deque()
        began = meter.begin()
        for number, request in enumerate(requests):
            if len(waiting) == len(self._calls):
                _completed(waiting.popleft().result())
            call = self._calls[number % len(self._calls)]
            waiting.append(call.future(request, metadata=self._metadata))
        while waiting:
            _completed(waiting.popleft().result())
        return began.until(meter.end())

    def send_one(self, request: bytes) -> None:
        """Send a request and wait for its answer."""
        _completed(self._calls[0](request, metadata=self._metadata))

    def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            channel.close()


def _channel(address: str, secure: bool) -> grpc.Channel:
    if secure:
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(), _CHANNEL_OPTIONS)
    return grpc.insecure_channel(address, _CHANNEL_OPTIONS)


def _completed(answer: q.PointsOperationResponse) -> None:
    if answer.result.status != q.UpdateStatus.Completed:
        raise RuntimeError("a request of the sink limit was not answered with Completed")


@dataclass(frozen=True, slots=True)
class AppliedCost(Cost):
    """What finished operations cost, and the wall seconds after them until they were durable, for
    which an embedded database holds the interpreter."""

    durable: float = 0.0


def apply_operations(
    database: EdgeDatabase,
    collection: str,
    operations: Sequence[edge.UpdateOperation],
    meter: Meter,
    flush: Callable[[], None],
) -> AppliedCost:
    """Apply finished operations to an embedded database, one after the other."""
    began = meter.begin()
    for operation in operations:
        database.update(collection, operation)
    applied = meter.end()
    flush()
    cost = began.until(applied)
    durable = meter.own().at - applied.at
    return AppliedCost(cost.seconds, cost.cpu, cost.main, cost.others, durable)
