"""What processes use: CPU time of a process and all its children, and memory, from ``/proc``
(Linux; see proc(5)).

The CPU time of a process that has ended goes to the parent that waited for it, so the sum over a
tree loses nothing when backends come and go meanwhile.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_TICK: Final = 1 / os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")
_MB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Cost:
    """What one round took: wall seconds, CPU seconds of this process, CPU seconds of its main
    thread, and CPU seconds of other process trees by their names."""

    seconds: float
    cpu: float
    main: float = 0.0
    others: Mapping[str, float] = field(default_factory=dict)

    def per_row(self, rows: int) -> float:
        """CPU of this process, microseconds a row."""
        return self.cpu / rows * 1e6

    def other_per_row(self, name: str, rows: int) -> float:
        """CPU of another process tree, microseconds a row; 0 where it was not measured."""
        return self.others.get(name, 0.0) / rows * 1e6

    def rate(self, rows: int) -> float:
        """Rows a second."""
        return rows / self.seconds


@dataclass(frozen=True, slots=True)
class Reading:
    """Clocks at one moment: monotonic seconds, CPU seconds of this process, of its main thread, and
    of other process trees."""

    at: float
    cpu: float
    main: float
    others: Mapping[str, float]

    def until(self, end: Reading) -> Cost:
        """The cost between this moment and a later one."""
        return Cost(
            end.at - self.at,
            end.cpu - self.cpu,
            end.main - self.main,
            {name: end.others.get(name, used) - used for name, used in self.others.items()},
        )


@dataclass(frozen=True, slots=True)
class Report:
    """What a pipeline measured of one of its lives: cost and rows of the copy, cost of the stream
    up to a position, and the peak of its memory, in MB."""

    copy: Cost | None
    copied_rows: int
    stream: Cost | None
    peak_mb: float


class Meter:
    """Reads the clocks of this process and of other process trees, by the names and process ids
    given."""

    def __init__(self, **others: int | None) -> None:
        self._others = {name: pid for name, pid in others.items() if pid is not None}
        main = threading.main_thread().ident
        assert main is not None
        self._main_clock = time.pthread_getcpuclockid(main)

    def begin(self) -> Reading:
        """Read all clocks, our own last: to look at the others takes some milliseconds."""
        others = self._trees()
        return dataclasses.replace(self.own(), others=others)

    def end(self) -> Reading:
        """Read all clocks, our own first."""
        return self.with_others(self.own())

    def own(self) -> Reading:
        """Read the clocks of this process only."""
        return Reading(
            time.perf_counter(), time.process_time(), time.clock_gettime(self._main_clock), {}
        )

    def with_others(self, own: Reading) -> Reading:
        """Add the clocks of the other process trees to a reading made just now."""
        return dataclasses.replace(own, others=self._trees())

    def _trees(self) -> dict[str, float]:
        return {name: tree_cpu(pid) for name, pid in self._others.items()}


def interpreter_step(rounds: int = 20, steps: int = 50_000) -> float:
    """How long a step of a loop takes that does nothing but run the interpreter, in nanoseconds:
    the least of some rounds. On a shared machine it changes by a quarter from hour to hour, where
    copying memory does not."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        text, total = "", 0
        for step in range(steps):
            text = f"{step}"
            total += len(text) + (step & 7)
        found.append(time.perf_counter() - began)
    return min(found) / steps * 1e9


def tree_cpu(pid: int) -> float:
    """CPU seconds of a process and all below it, ended children included; in steps of 10 ms a
    process. 0 for one that is gone."""
    stats = dict(_stats())
    children: defaultdict[int, list[int]] = defaultdict(list)
    for one, fields in stats.items():
        children[int(fields[1])].append(one)
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        if one in stats:
            # utime, stime, cutime and cstime: fields 14 to 17 of the file, the state being 3.
            total += sum(int(value) for value in stats[one][11:15])
            todo += children[one]
    return total * _TICK


def descendants(pid: int) -> list[int]:
    """Process ids of the children that a process has now, and of theirs."""
    parents = {one: int(fields[1]) for one, fields in _stats()}
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        below = [one for one, its in parents.items() if its == parent]
        found += below
        todo += below
    return found


def _stats() -> Iterator[tuple[int, list[str]]]:
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                text = (entry / "stat").read_text(errors="replace")
            except OSError:  # it has ended
                continue
            # The command's name is in parentheses, and may hold anything.
            yield int(entry.name), text.rpartition(")")[2].split()


def memory_mb(pid: int, what: str = "VmRSS") -> float:
    """Resident memory in MB (2^20 bytes); ``VmHWM``: its peak. 0 for a process that is gone."""
    try:
        text = (_PROC / str(pid) / "status").read_text()
    except OSError:
        return 0.0
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == what:
            return int(value.split()[0]) * 1024 / _MB
    return 0.0
