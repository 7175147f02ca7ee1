"""Opening connections in threads. A thread cannot be cancelled: what it opens after nobody waits
for it any more is closed by itself, since it may hold a lock or a slot."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, Protocol, TypeVar


class Closable(Protocol):
    """Something that is open."""

    def close(self) -> None: ...


P = ParamSpec("P")
T = TypeVar("T", bound=Closable)


async def opening(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Run a function in a thread that opens something, and return that."""
    one = _Opening(lambda: function(*arguments, **keywords))
    try:
        return await asyncio.to_thread(one.run)
    except asyncio.CancelledError:
        one.abandon()
        raise


class _Opening(Generic[T]):
    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._opened: T | None = None
        self._abandoned = False

    def run(self) -> T:
        opened = self._function()
        with self._lock:
            self._opened = opened
            if self._abandoned:
                opened.close()
        return opened

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            if self._opened is not None:
                self._opened.close()
