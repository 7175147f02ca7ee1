"""Where every task and thread stands, for whoever looks into a daemon that hangs."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Iterator
from types import FrameType


def dump_tasks() -> None:
    """Write it to stderr."""
    lines = []
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        lines.append(f"Task {task.get_name()}:\n")
        frames = [(frame, frame.f_lineno) for frame in _awaiting(task.get_coro())]
        lines += traceback.StackSummary.extract(iter(frames)).format()
    for thread, frame in sys._current_frames().items():
        lines.append(f"Thread {thread}:\n")
        lines += traceback.format_stack(frame)
    sys.stderr.write("".join(lines))


def _awaiting(awaited: object) -> Iterator[FrameType]:
    """The frames of a coroutine and of what it waits for, the outermost first. A task itself shows
    only the first."""
    while awaited is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(awaited, f"{kind}_frame", None)
            if frame is not None:
                yield frame
                break
        else:
            return
        awaited = getattr(awaited, "gi_yieldfrom" if kind == "gi" else f"{kind}_await", None)
