"""Writing changes of one table until all of them are completed, wherever it is interrupted."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from cdc_sync.errors import SinkError
from cdc_sync.qdrant.sink import Applied, Changes, TableWriter


def writing(
    writer: TableWriter, changes: Changes, progress: Callable[[], None] = lambda: None
) -> Callable[[], Awaitable[Applied]]:
    """Return a function that writes the changes, or what is left of them after it has failed.

    So every try gets further, also where Qdrant takes fewer points a minute than there are; trying
    again is the caller's. ``progress`` is called whenever some were completed.
    """
    left = changes

    async def attempt() -> Applied:
        nonlocal left
        try:
            applied = await writer.apply(left)
        except SinkError as error:
            if error.completed:
                left = _without(left, error.completed)
                progress()
            raise
        progress()
        return applied

    return attempt


def _without(changes: Changes, completed: frozenset[object]) -> Changes:
    return Changes(
        upserts=[change for change in changes.upserts if change[0] not in completed],
        partials=[change for change in changes.partials if change[0] not in completed],
        deletes=[point_id for point_id in changes.deletes if point_id not in completed],
        large=changes.large,
    )
