"""Feeds the metrics of requests to Qdrant."""

from __future__ import annotations

from typing import Final

from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import Metrics, SinkOperation, SinkOutcome
from cdc_sync.ops.status import StatusBoard
from cdc_sync.qdrant.pace import Cause

log = get_logger(__name__)

#: gRPC's method names, as the metrics call them; everything else is "other".
_OPERATIONS: Final[dict[str, SinkOperation]] = {
    "Upsert": "upsert",
    "Delete": "delete",
    "UpdateBatch": "update_batch",
    "SetPayload": "set_payload",
    "Get": "get",
    "Scroll": "scroll",
    "Count": "count",
    "Query": "query",
}


class RequestMetrics:
    """A :class:`~cdc_sync.qdrant.sink.RequestObserver` that counts and times, and says why less is
    sent than configured."""

    def __init__(self, metrics: Metrics, board: StatusBoard) -> None:
        self._metrics = metrics
        self._board = board

    def started(self) -> None:
        """A request was sent."""
        self._metrics.sink_in_flight_requests.inc()

    def ended(self, method: str, code: str, seconds: float) -> None:
        """It was answered or given up."""
        self._metrics.sink_in_flight_requests.dec()
        outcome: SinkOutcome = "error"
        if code == "OK":
            outcome = "ok"
        elif code == "DEADLINE_EXCEEDED":
            outcome = "timeout"
        operation = _OPERATIONS.get(method, "other")
        self._metrics.sink_request_duration_seconds[operation, outcome].observe(seconds)

    def paced(self, collection: str, points: int, cause: Cause | None, *, slower: bool) -> None:
        """Less is sent at once, or more again."""
        self._metrics.sink_window_points.labels(collection).set(points)
        self._board.set_pace(collection, points, cause)
        if cause is None:
            log.info("sending_as_configured", collection=collection)
        elif slower:
            self._metrics.sink_slowdowns[cause].inc()
            log.warning("sending_less", collection=collection, points=points, cause=cause)
