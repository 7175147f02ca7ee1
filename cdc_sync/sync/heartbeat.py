"""Heartbeats: logical messages of our own, by which an idle pipeline proves that it works, and how
long a commit takes to arrive.

Without them the position moves too while the tables are quiet (keepalives say how far the server
is); with them the way from a commit to Qdrant is measured also when nobody writes.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque

from cdc_sync.config import SourceSettings
from cdc_sync.errors import CdcSyncError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.pgoutput.messages import LogicalMessage
from cdc_sync.postgres.control import emit_messages
from cdc_sync.sync.kept_connection import KeptConnection

log = get_logger(__name__)

PREFIX = "cdc_sync_heartbeat"
#: Heartbeats under way that are remembered at the most.
_REMEMBERED = 1_000


class Heartbeat:
    """Sends heartbeats every ``seconds`` (0: never), and measures those that come back."""

    def __init__(self, source: SourceSettings, seconds: float, metrics: Metrics) -> None:
        self._connection = KeptConnection(source, "cdc_sync heartbeat")
        self._seconds = seconds
        self._metrics = metrics
        # Anybody may write such messages; only ours are believed.
        self._token = secrets.token_hex(8)
        self._sent: dict[int, float] = {}
        self._number = 0
        self._arrived: deque[tuple[int, float]] = deque()

    async def run(self) -> None:
        """Send until cancelled; what fails is sent again the next time."""
        if not self._seconds:
            return
        try:
            while True:
                self._number += 1
                self._sent[self._number] = time.monotonic()
                if len(self._sent) > _REMEMBERED:
                    self._sent.pop(next(iter(self._sent)))
                content = f"{self._token} {self._number}".encode()
                try:
                    await asyncio.to_thread(
                        self._connection.run, lambda c, b=content: emit_messages(c, PREFIX, [b])
                    )
                except CdcSyncError as error:
                    log.debug("heartbeat_failed", kind=error.kind.value, error=error.message)
                await asyncio.sleep(self._seconds)
        finally:
            self._connection.end()

    def arrived(self, message: LogicalMessage) -> bool:
        """Take in a message of the stream; whether it was a heartbeat, of whomever."""
        if message.prefix != PREFIX:
            return False
        number = self._number_of(message.content)
        sent = self._sent.pop(number, None) if number is not None else None
        if sent is not None:
            self._arrived.append((message.lsn, sent))
        return True

    def applied(self, lsn: int) -> None:
        """Everything before a position has been completed by Qdrant."""
        while self._arrived and self._arrived[0][0] < lsn:
            _, sent = self._arrived.popleft()
            self._metrics.heartbeat_latency_seconds.observe(time.monotonic() - sent)

    def _number_of(self, content: bytes) -> int | None:
        token, _, number = content.partition(b" ")
        if token != self._token.encode() or not number.isdigit() or len(number) > 18:
            return None
        return int(number)
