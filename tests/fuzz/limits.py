"""Runs one input under limits of CPU time and memory.

Whatever a decoder raises but the errors it documents, and whatever it takes beyond the limits, is
a finding.
"""

from __future__ import annotations

import contextlib
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import FrameType

#: Decodes an input: True if it was taken, False if it was refused with the documented error.
Run = Callable[[bytes], bool]


class FindingError(AssertionError):
    """An input that a decoder does not stand. Shows target, input and what happened."""


class _HangError(BaseException):
    """The input took too long; derived from BaseException so that no decoder catches it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an input may take.

    Memory is what Python and numpy allocate at once, ``base_bytes`` and so many for each byte of
    the input. An array of 4 bytes an element may nest each in five lists, so a byte may become a
    hundred; a field that claims 2^31 bytes is far beyond either.
    """

    cpu_seconds: float = 10.0
    base_bytes: int = 4 << 20
    bytes_a_byte: int = 512


LIMITS: Final = Limits()


def _too_long(_signal: int, _frame: FrameType | None) -> None:
    raise _HangError


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Make :func:`check` able to stop inputs that hang. For the main thread only."""
    before = signal.signal(signal.SIGPROF, _too_long)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def check(
    name: str, run: Run, data: bytes, *, limits: Limits = LIMITS, measure: bool = True
) -> bool:
    """Run one input; returns whether it was taken. Raises :class:`FindingError`.

    ``measure``: whether memory is measured, which costs time. Within :func:`watched` only.
    """
    started = measure and not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    try:
        return _check(name, run, data, limits, measure)
    finally:
        if started:
            tracemalloc.stop()


def _check(name: str, run: Run, data: bytes, limits: Limits, measure: bool) -> bool:
    before = 0
    if measure:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
    # CPU time, not wall time: the machine may be busy with other things.
    signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
    try:
        taken = run(data)
    except _HangError:
        raise FindingError(_shown(name, data, f"took {limits.cpu_seconds:g} s")) from None
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise FindingError(_shown(name, data, what)) from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if measure:
        peak = tracemalloc.get_traced_memory()[1] - before
        if peak > limits.base_bytes + limits.bytes_a_byte * len(data):
            raise FindingError(_shown(name, data, f"allocated {peak} bytes"))
    return taken


def _shown(name: str, data: bytes, what: str) -> str:
    shown = data.hex() if len(data) <= 2048 else f"{data[:2048].hex()}…"
    return f"{name}: {what}; input of {len(data)} bytes: {shown}"
