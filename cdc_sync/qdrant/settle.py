"""Waiting for all of several tasks, whatever happens to some of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cdc_sync.errors import CdcSyncError, Retry


async def settle(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait until every task has ended, then raise the gravest of their errors.

    Cancellation is handed to the tasks and waited out, so that nothing is under way when this
    returns or raises.
    """
    cancelled: asyncio.CancelledError | None = None
    while not all(task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError as exc:
            cancelled = exc
            for task in tasks:
                task.cancel()
    errors = [error for task in tasks if not task.cancelled() and (error := task.exception())]
    if cancelled is not None:
        raise cancelled
    if errors:
        raise max(errors, key=_gravity)


def _gravity(error: BaseException) -> int:
    """What ends the program outweighs what a retry may mend."""
    if not isinstance(error, CdcSyncError):
        return 3
    return {Retry.NEVER: 2, Retry.MANUAL: 1, Retry.TIMED: 0}[error.policy.retry]
