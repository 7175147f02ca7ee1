"""The log of a campaign: every event with its time, and at the end how many there were of each."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import TextIO


class CampaignLog:
    """Writes a line an event, to a file and to the standard output."""

    def __init__(self, seed: int, path: Path, stream: TextIO | None = None) -> None:
        self.path = path
        self.seed = seed
        self.round = 0
        self._stream = stream
        self._file = path.open("a", encoding="utf-8")
        self._started = time.monotonic()
        self.done: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Write a line."""
        line = f"{self.seconds:8.2f}  seed {self.seed} round {self.round}  {text}"
        self._file.write(line + "\n")
        self._file.flush()
        (self._stream or sys.stdout).write(line + "\n")
        (self._stream or sys.stdout).flush()

    def event(self, kind: str, detail: str = "") -> None:
        """Something was done to the site."""
        self.done[kind] += 1
        self.say(f"{kind} {detail}".rstrip())

    def skip(self, kind: str, why: str) -> None:
        """Something could not be done."""
        self.skipped[kind] += 1
        self.say(f"({kind}: {why})")

    def lines_of_round(self) -> str:
        """What was written in the present round."""
        mark = f"seed {self.seed} round {self.round}  "
        return "\n".join(x for x in self.path.read_text().splitlines() if mark in x)

    def summary(self) -> str:
        """How often each kind of event took place."""
        width = max(map(len, self.done), default=0)
        lines = [
            f"  {kind:<{width}} {count:5}"
            + (f"  ({self.skipped[kind]} skipped)" if self.skipped[kind] else "")
            for kind, count in sorted(self.done.items())
        ]
        return "\n".join([f"{sum(self.done.values())} events in {self.seconds:.0f} s:", *lines])

    def close(self) -> None:
        """Close the file."""
        self._file.close()
