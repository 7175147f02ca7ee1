"""A connection for questions asked now and then, by a thread that cannot be cancelled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from cdc_sync.config import SourceSettings
from cdc_sync.errors import SourceError
from cdc_sync.postgres.connect import PgConnection, answering, connect

T = TypeVar("T")


class KeptConnection:
    """Opened when it is needed, closed when something fails, and at the end by whoever has it
    last: it must not be closed under a thread that uses it."""

    def __init__(self, source: SourceSettings, application_name: str) -> None:
        self._source = source
        self._name = application_name
        self._lock = threading.Lock()
        self._connection: PgConnection | None = None
        self._ended = False

    @property
    def is_open(self) -> bool:
        """Whether it was opened, and did not fail since."""
        return self._connection is not None

    def run(self, work: Callable[[PgConnection], T]) -> T:
        """Do something with the connection, one thread at a time. Raises :class:`SourceError`."""
        try:
            with self._lock:
                try:
                    if self._connection is None:
                        self._connection = connect(self._source, application_name=self._name)
                    with answering(self._connection):
                        return work(self._connection)
                except SourceError:
                    self._close()
                    raise
        finally:
            if self._ended:
                self.end()

    def rest(self) -> None:
        """Close it until it is needed again; waits for who uses it."""
        with self._lock:
            self._close()

    def end(self) -> None:
        """It is not needed any more. Does not wait."""
        self._ended = True
        if self._lock.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._lock.release()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
