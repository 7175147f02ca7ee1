"""A short history of the lag, kept in memory so that a status page that is opened has one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final, TypeVar

#: One sample is the highest lag of so many seconds.
SAMPLE_SECONDS: Final = 5.0
#: Ten minutes.
SAMPLES: Final = 120

_Number = TypeVar("_Number", int, float)


@dataclass(slots=True)
class _Sample:
    slot: int
    bytes: int | None
    seconds: float | None


class LagHistory:
    """Samples by :data:`SAMPLE_SECONDS`; times are of one monotonic clock, in seconds.

    Not thread-safe: the lock of the board guards it.
    """

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque(maxlen=SAMPLES)

    def add(self, now: float, *, lag_bytes: int | None, seconds: float | None) -> None:
        """Take in what the lag is now; None: not known."""
        slot = int(now // SAMPLE_SECONDS)
        if not self._samples or self._samples[-1].slot != slot:
            self._samples.append(_Sample(slot, lag_bytes, seconds))
            return
        last = self._samples[-1]
        last.bytes = _highest(last.bytes, lag_bytes)
        last.seconds = _highest(last.seconds, seconds)

    def to_json(self, now: float) -> dict[str, object]:
        """``bytes`` and ``seconds``, oldest first, the last one of now; null where nobody knew."""
        newest = int(now // SAMPLE_SECONDS)
        known = {sample.slot: sample for sample in self._samples}
        first = max(newest - SAMPLES + 1, min(known, default=newest))
        samples = [known.get(slot) for slot in range(first, newest + 1)]
        return {
            "interval_seconds": SAMPLE_SECONDS,
            "bytes": [None if sample is None else sample.bytes for sample in samples],
            "seconds": [
                None if sample is None or sample.seconds is None else round(sample.seconds, 3)
                for sample in samples
            ],
        }


def _highest(one: _Number | None, other: _Number | None) -> _Number | None:
    if one is None or other is None:
        return other if one is None else one
    return max(one, other)
