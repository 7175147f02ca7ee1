"""How much of a table is sent to a Qdrant server at once: it follows what the server answers.

The *window* is the number of points that may be in flight together. When the server does not answer
in time, is about to, or limits the rate, it becomes half of what was in flight; it grows by a small
step with every request that is completed in good time while the window is made use of, up to what
the settings allow (as TCP's congestion window does). First fewer requests are sent side by side,
then smaller ones. Requests that were sent before the window was halved say nothing about the new
one, so one trouble halves it once.

Limits that the server names (points a request by strict mode, bytes a message by a proxy) are kept
to as they are. All of it is forgotten after a while without trouble: load has passed, limits have
been raised.

Nothing here is done per row, and next to nothing per request while the window is open.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from cdc_sync.config import QdrantSettings

#: Why less is sent than the settings allow.
Cause: TypeAlias = Literal["deadline", "slow", "rate_limit", "batch_limit", "message_size"]

#: The window grows by this part of everything with a completed request, but not by more than the
#: second part of itself: a small one would be too large at once again.
_STEP: Final = 1 / 256
_GROWTH: Final = 1 / 8
#: An answer that takes more than this part of the deadline is a warning, one that takes more than
#: the second is no reason to send more.
_SLOW: Final = 1 / 2
_CALM: Final = 1 / 4
#: After so long without trouble everything is sent again.
_FORGET_SECONDS: Final = 600.0
#: Room for what is not a point in a message.
_HEADROOM_BYTES: Final = 1024
#: How much longer than the server says is waited at most, where a single point comes too early
#: again and again.
_MOST_PATIENCE: Final = 8


class Pace:
    """What may be in flight for one collection. ``on_change`` is called whenever that has changed,
    with whether it is less than before."""

    def __init__(
        self,
        settings: QdrantSettings,
        on_change: Callable[[Pace, bool], None] = lambda pace, slower: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_requests = settings.parallel_requests
        self._most_points = settings.request_points
        self._most_bytes = settings.request_bytes
        self._timeout = settings.timeout_seconds
        self._on_change = on_change
        self._clock = clock
        self._full = self._most_requests * self._most_points
        self._window = float(self._full)
        self._epoch = 0
        self._in_flight = 0
        self._point_cap: int | None = None
        self._byte_cap: int | None = None
        self._forget_at = 0.0
        self._patience = 1
        #: The last reason why less is sent than may be; None while it is not.
        self.cause: Cause | None = None

    @property
    def window(self) -> int:
        """Points that may be in flight together."""
        return min(int(self._window), self.requests * self.points)

    @property
    def requests(self) -> int:
        """Requests that may be in flight together."""
        return -(-int(self._window) // self._most_points)

    @property
    def points(self) -> int:
        """Points a request, at most."""
        most = self._share
        return most if self._point_cap is None else min(most, self._point_cap)

    @property
    def bytes(self) -> int:
        """Bytes a request, about; a single point may have more."""
        most = max(1, self._most_bytes * self._share // self._most_points)
        return most if self._byte_cap is None else min(most, self._byte_cap)

    @property
    def patience(self) -> int:
        """By how much to multiply the time that the rate limiter asks for.

        A single point can cost several tokens, one after the other, and the time told is that for
        the one that was refused: the others are spent anew with each try.
        """
        return self._patience

    @property
    def _share(self) -> int:
        """A request's part of the window, in points."""
        return int(self._window) // self.requests

    def sent(self, points: int) -> int:
        """A request of so many points is sent; returns what :meth:`shrink` is to be told of it."""
        self._in_flight += points
        return self._epoch

    def ended(self, points: int) -> None:
        """It was answered, or given up."""
        self._in_flight -= points

    def completed(self, seconds: float) -> None:
        """A request was completed after so long. To be said before :meth:`ended`, as what follows
        is."""
        if seconds > self._timeout * _SLOW:
            self.shrink("slow", self._epoch)
        elif self.cause is not None:
            self._patience = 1
            if self._clock() >= self._forget_at:
                self._forget()
            elif seconds <= self._timeout * _CALM and self._in_flight * 2 >= self._window:
                self._grow()

    def shrink(self, cause: Cause, epoch: int) -> None:
        """What was in flight with a request of that epoch was too much."""
        if epoch != self._epoch:
            return
        self._epoch += 1
        if self._in_flight <= 1 and cause == "rate_limit":
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
        self._window = max(1.0, min(self._window, self._in_flight) / 2)
        self._trouble(cause)

    def limit_points(self, points: int) -> None:
        """Strict mode or the rate limiter take so many points a request, at most (1 or more)."""
        self._point_cap = points if self._point_cap is None else min(points, self._point_cap)
        self._trouble("batch_limit")

    def limit_bytes(self, size: int) -> None:
        """Somebody on the way takes so many bytes a message, at most."""
        size = max(1, size - _HEADROOM_BYTES)
        self._byte_cap = size if self._byte_cap is None else min(size, self._byte_cap)
        self._trouble("message_size")

    def _trouble(self, cause: Cause) -> None:
        self._forget_at = self._clock() + _FORGET_SECONDS
        self.cause = cause
        self._on_change(self, True)

    def _grow(self) -> None:
        before = self.window
        step = min(max(1.0, self._full * _STEP), self._window * _GROWTH)
        self._window = min(float(self._full), self._window + step)
        if self._window == self._full and self._point_cap is None and self._byte_cap is None:
            self._forget()
        elif self.window != before:
            self._on_change(self, False)

    def _forget(self) -> None:
        self._window = float(self._full)
        self._point_cap = self._byte_cap = None
        self.cause = None
        self._on_change(self, False)
