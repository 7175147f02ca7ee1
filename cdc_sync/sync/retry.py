"""Retrying: every retry of the daemon goes through here, and only the policy table decides."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_never
from tenacity.wait import wait_base, wait_random_exponential

from cdc_sync.errors import CdcSyncError, ErrorKind, Retry, SinkError, SourceError
from cdc_sync.postgres.connect import LoginRefusedError

T = TypeVar("T")

#: Exponential backoff with full jitter: between nothing and this, doubling from the first to the
#: second.
FIRST_BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 10.0
#: A standby looks for its turn at least so often.
STANDBY_SECONDS = 2.0


class _Backoff(wait_base):
    """Full jitter; where the server says when to come again, then, and not much later."""

    def __init__(self) -> None:
        self._jitter = wait_random_exponential(
            multiplier=FIRST_BACKOFF_SECONDS, max=MAX_BACKOFF_SECONDS
        )

    def __call__(self, retry_state: RetryCallState) -> float:
        wait = self._jitter(retry_state)
        error = retry_state.outcome.exception() if retry_state.outcome is not None else None
        if isinstance(error, SinkError) and error.retry_after_seconds is not None:
            wait = error.retry_after_seconds * random.uniform(1.0, 1.25)
        if isinstance(error, SourceError) and error.kind is ErrorKind.SLOT_ACTIVE:
            wait = min(wait, STANDBY_SECONDS)
        return wait


def is_transient(error: BaseException) -> bool:
    """Whether the policy says to try again by itself."""
    return isinstance(error, CdcSyncError) and error.policy.retry is Retry.TIMED


def is_sink_trouble(error: BaseException) -> bool:
    """Whether to try again while the slot's connection is held.

    What fails on the side of Postgres is not: in a fast shutdown it refuses every other connection
    and waits until the walsender's consumer has got everything, or gone. That it refuses a password
    which was changed is: connections that are open go on, and so does the stream.
    """
    if isinstance(error, LoginRefusedError):
        return True
    return is_transient(error) and not isinstance(error, SourceError)


async def retrying(
    operation: Callable[[], Awaitable[T]],
    on_retry: Callable[[CdcSyncError, float], None],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    retry: Callable[[BaseException], bool] = is_transient,
) -> T:
    """Run ``operation`` until it succeeds or fails for good.

    Transient kinds are retried without end; ``on_retry(error, seconds until the next try)`` is
    called before each wait. Everything else is raised as it is, and so is what ``sleep`` raises.
    ``retry`` says which errors are worth another try.
    """

    try:
        # Most succeed at once, and what may have to wait takes longer to make than many a request.
        return await operation()
    except BaseException as error:
        if not retry(error):
            raise
        failed = [error]

    def before_sleep(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, CdcSyncError):
            on_retry(error, state.next_action.sleep if state.next_action is not None else 0.0)

    async for attempt in AsyncRetrying(
        retry=retry_if_exception(retry),
        wait=_Backoff(),
        stop=stop_never,
        before_sleep=before_sleep,
        sleep=sleep,
        reraise=True,
    ):
        with attempt:
            if failed:
                raise failed.pop()
            return await operation()
    raise AssertionError("unreachable: retries never stop by themselves")
