"""Tells systemd how the service is doing: one datagram to ``NOTIFY_SOCKET``, see sd_notify(3).

Does nothing where that variable is absent, so callers need not care whether systemd started them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Final

from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.redaction import redact

log = get_logger(__name__)

_STATUS_LIMIT: Final = 500


class Notifier:
    """A connection to the service manager; every method returns at once and never raises."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._socket: socket.socket | None = None
        self._failed = False
        #: How often the watchdog wants to hear from us, in seconds (half its limit); None: it does
        #: not.
        self.watchdog_seconds = _watchdog_seconds(environ) if self._address else None

    @property
    def enabled(self) -> bool:
        """Whether anybody listens."""
        return self._address is not None

    def ready(self, status: str = "") -> bool:
        """Say that the service has started; returns whether that was heard. A service manager that
        is busy takes nothing more for a while, and would end what it thinks has not started."""
        return self._send("READY=1", *([_status(status)] if status else []))

    def status(self, text: str) -> None:
        """Say in a line how things are; shown by ``systemctl status``."""
        self._send(_status(text))

    def stopping(self) -> None:
        """Say that the service is shutting down."""
        self._send("STOPPING=1")

    def watchdog(self) -> None:
        """Say that every loop still turns."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Close the socket; a later message opens it again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *assignments: str) -> bool:
        if self._address is None:
            return False
        try:
            if self._socket is None:
                kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
                self._socket = socket.socket(socket.AF_UNIX, kind)
            self._socket.sendto("\n".join(assignments).encode(), self._address)
            self._failed = False
        except OSError as error:
            # The service works without its manager hearing of it; one line tells, not one a beat.
            if not self._failed:
                log.warning("service_notification_failed", error=error.strerror)
            self._failed = True
            return False
        return True


def _address(value: str) -> str | None:
    """The socket's address; ``@`` stands for the NUL byte of the abstract namespace."""
    if value.startswith("@"):
        return "\0" + value[1:]
    return value if value.startswith("/") else None


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """Half of ``WATCHDOG_USEC``, unless it is meant for another process."""
    try:
        microseconds = int(environ.get("WATCHDOG_USEC", ""))
        process = int(environ.get("WATCHDOG_PID", os.getpid()))
    except ValueError:
        return None
    return microseconds / 2e6 if microseconds > 0 and process == os.getpid() else None


def _status(text: str) -> str:
    line = " ".join(redact(text).split())
    return f"STATUS={line[:_STATUS_LIMIT]}"
