"""Feeds the metrics of requests to Qdrant."""

from __future__ import annotations

from typing import Final

from cdc_sync.ops.metrics import Metrics, SinkOperation, SinkOutcome

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
    """A :class:`~cdc_sync.qdrant.sink.RequestObserver` that counts and times."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

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
