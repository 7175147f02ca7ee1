"""Tasks that go on beside the stream until they are cancelled, and what becomes of one that ends by
itself: nobody awaits it, so nobody would hear of that."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Coroutine

from cdc_sync.errors import CdcSyncError
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.status import StatusBoard

log = get_logger(__name__)


def supervised(
    work: Coroutine[None, None, None], name: str, board: StatusBoard, *, vital: bool = False
) -> asyncio.Task[None]:
    """Start a task. Should it fail, the log says so; and if it is ``vital``, which the daemon is
    not to go on without, ``/livez`` fails from then on, so that whoever supervises the daemon
    starts it again."""

    def ended(task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        # The text of an error that is not ours may hold values.
        reason = error.message if isinstance(error, CdcSyncError) else type(error).__name__
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None
        log.error("task_died", task=name, error=reason, where=where)
        if vital:
            board.supervisor_died(f"the {name} has ended: {reason}")

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(ended)
    return task
