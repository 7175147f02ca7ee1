"""Write requests of Qdrant's Points service as operations of the embedded engine.

The messages of the single calls and the members of an UpdateBatch have the same fields, so one
function serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import qdrant_edge as edge
from qdrant_client import grpc as q

from tests.support.qdrant_convert import (
    PLACEHOLDER,
    PointKey,
    engine_point,
    engine_vectors,
    json_object,
    point_key,
)
from tests.support.qdrant_filters import engine_filter, optional_filter
from tests.support.qdrant_schema import payload_index
from tests.support.qdrant_status import bad_request, invalid, validation, wrong_input

_MODES = {
    q.Upsert: edge.UpdateMode.Upsert,
    q.InsertOnly: edge.UpdateMode.InsertOnly,
    q.UpdateOnly: edge.UpdateMode.UpdateOnly,
}


@dataclass(slots=True)
class Edit:
    """One engine operation. ``index`` is the payload index it makes, ``drops_index`` the field that
    loses its own.
    """

    operation: edge.UpdateOperation
    index: tuple[str, q.PayloadSchemaInfo] | None = None
    drops_index: str | None = None


def _selected(
    present: bool, selector: q.PointsSelector, missing: str = "points_selector is expected"
) -> list[PointKey] | edge.Filter:
    kind = selector.WhichOneof("points_selector_one_of") if present else None
    if kind == "points":
        _check_some(len(selector.points.ids))
        return [point_key(item) for item in selector.points.ids]
    if kind == "filter":
        return engine_filter(selector.filter)
    raise invalid(missing)


def _check_some(points: int) -> None:
    """Refuse an operation that reaches no shard, as the server does."""
    if not points:
        raise bad_request("Empty update request")


def _ids(keys: list[PointKey]) -> list[edge.PointId]:
    return cast("list[edge.PointId]", keys)


def _upsert(request: q.UpsertPoints | q.PointsUpdateOperation.PointStructList) -> Edit:
    _check_some(len(request.points))
    points = [engine_point(number, point) for number, point in enumerate(request.points)]
    condition = optional_filter(request.HasField("update_filter"), request.update_filter)
    mode = _MODES.get(request.update_mode) if request.HasField("update_mode") else None
    return Edit(edge.UpdateOperation.upsert_points(points, condition, mode))


def _delete(request: q.DeletePoints | q.PointsUpdateOperation.DeletePoints) -> Edit:
    return _delete_selected(request.points, request.HasField("points"))


def _delete_selected(selector: q.PointsSelector, present: bool = True) -> Edit:
    target = _selected(present, selector, "PointSelector is missing")
    if isinstance(target, edge.Filter):
        return Edit(edge.UpdateOperation.delete_points_by_filter(target))
    return Edit(edge.UpdateOperation.delete_points(_ids(target)))


def _update_vectors(request: q.UpdatePointVectors | q.PointsUpdateOperation.UpdateVectors) -> Edit:
    _check_some(len(request.points))
    points = []
    for number, point in enumerate(request.points):
        if not point.HasField("id"):
            raise invalid("id is expected")
        if not point.HasField("vectors"):
            raise invalid("vectors is expected")
        vectors = engine_vectors(f"points[{number}].vector", point.vectors)
        points.append(edge.PointVectors(point_key(point.id), vectors))
    condition = optional_filter(request.HasField("update_filter"), request.update_filter)
    return Edit(edge.UpdateOperation.update_vectors(points, condition))


def _delete_vectors(request: q.DeletePointVectors | q.PointsUpdateOperation.DeleteVectors) -> Edit:
    if not request.HasField("vectors"):
        raise invalid("vectors is expected")
    names = list(request.vectors.names)
    if not names:
        raise validation("vector", "must specify vector names to delete")
    if PLACEHOLDER in names:
        raise wrong_input(f"Not existing vector name error: {PLACEHOLDER}")
    target = _selected(request.HasField("points_selector"), request.points_selector)
    if isinstance(target, edge.Filter):
        return Edit(edge.UpdateOperation.delete_vectors_by_filter(target, names))
    return Edit(edge.UpdateOperation.delete_vectors(_ids(target), names))


_PayloadRequest = (
    q.SetPayloadPoints
    | q.PointsUpdateOperation.SetPayload
    | q.PointsUpdateOperation.OverwritePayload
)


def _set_payload(request: _PayloadRequest) -> Edit:
    payload = cast("dict[str, Any]", json_object(request.payload))
    key = request.key if request.HasField("key") else None
    target = _selected(request.HasField("points_selector"), request.points_selector)
    if isinstance(target, edge.Filter):
        return Edit(edge.UpdateOperation.set_payload_by_filter(target, payload, key))
    return Edit(edge.UpdateOperation.set_payload(_ids(target), payload, key))


def _overwrite_payload(request: _PayloadRequest) -> Edit:
    payload = cast("dict[str, Any]", json_object(request.payload))
    key = request.key if request.HasField("key") else None
    target = _selected(request.HasField("points_selector"), request.points_selector)
    if isinstance(target, edge.Filter):
        return Edit(edge.UpdateOperation.overwrite_payload_by_filter(target, payload, key))
    return Edit(edge.UpdateOperation.overwrite_payload(_ids(target), payload, key))


def _delete_payload(request: q.DeletePayloadPoints | q.PointsUpdateOperation.DeletePayload) -> Edit:
    target = _selected(request.HasField("points_selector"), request.points_selector)
    keys = list(request.keys)
    if isinstance(target, edge.Filter):
        return Edit(edge.UpdateOperation.delete_payload_by_filter(target, keys))
    return Edit(edge.UpdateOperation.delete_payload(_ids(target), keys))


def _clear_payload(request: q.ClearPayloadPoints | q.PointsUpdateOperation.ClearPayload) -> Edit:
    return _clear_selected(request.points, request.HasField("points"))


def _clear_selected(selector: q.PointsSelector, present: bool = True) -> Edit:
    target = _selected(present, selector)
    if isinstance(target, edge.Filter):
        return Edit(edge.UpdateOperation.clear_payload_by_filter(target))
    return Edit(edge.UpdateOperation.clear_payload(_ids(target)))


def _create_index(request: q.CreateFieldIndexCollection) -> Edit:
    info, schema = payload_index(request)
    operation = edge.UpdateOperation.create_field_index(request.field_name, schema)
    return Edit(operation, index=(request.field_name, info))


def _delete_index(request: q.DeleteFieldIndexCollection) -> Edit:
    if not request.field_name:
        raise validation("field_name", 'value "" invalid, must be at least 1 characters')
    operation = edge.UpdateOperation.delete_field_index(request.field_name)
    return Edit(operation, drops_index=request.field_name)


_BATCHED: dict[str, Callable[[Any], Edit]] = {
    "upsert": _upsert,
    "delete_deprecated": _delete_selected,
    "set_payload": _set_payload,
    "overwrite_payload": _overwrite_payload,
    "delete_payload": _delete_payload,
    "clear_payload_deprecated": _clear_selected,
    "update_vectors": _update_vectors,
    "delete_vectors": _delete_vectors,
    "delete_points": _delete,
    "clear_payload": _clear_payload,
}


def _batched(operation: q.PointsUpdateOperation) -> Edit:
    kind = operation.WhichOneof("operation")
    if kind is None:
        raise invalid("Operation is missing")
    return _BATCHED[kind](getattr(operation, kind))


BATCHED = "Batched"
"""The pseudo method of one member of an UpdateBatch."""

_METHODS: dict[str, tuple[type[Any], Callable[[Any], Edit]]] = {
    "Upsert": (q.UpsertPoints, _upsert),
    "Delete": (q.DeletePoints, _delete),
    "UpdateVectors": (q.UpdatePointVectors, _update_vectors),
    "DeleteVectors": (q.DeletePointVectors, _delete_vectors),
    "SetPayload": (q.SetPayloadPoints, _set_payload),
    "OverwritePayload": (q.SetPayloadPoints, _overwrite_payload),
    "DeletePayload": (q.DeletePayloadPoints, _delete_payload),
    "ClearPayload": (q.ClearPayloadPoints, _clear_payload),
    "CreateFieldIndex": (q.CreateFieldIndexCollection, _create_index),
    "DeleteFieldIndex": (q.DeleteFieldIndexCollection, _delete_index),
    BATCHED: (q.PointsUpdateOperation, _batched),
}

WRITES = tuple(name for name in _METHODS if name != BATCHED)
"""Methods of the Points service that write, besides UpdateBatch."""


def request_type(method: str) -> type[Any]:
    return _METHODS[method][0]


def edit(method: str, request: Any) -> Edit:
    """The engine operation of a write request. Raises RefusalError for what the server refuses
    before its queue.
    """
    try:
        return _METHODS[method][1](request)
    except (ValueError, TypeError) as error:
        raise wrong_input(str(error)) from error


def serialized(method: str, request: Any) -> bytes:
    """The request as a journal record, see :func:`parsed`."""
    return method.encode() + b"\n" + cast("bytes", request.SerializeToString())


def parsed(record: bytes) -> Edit:
    name, _, body = record.partition(b"\n")
    method = name.decode()
    return edit(method, request_type(method).FromString(body))


def _selector_keys(selector: q.PointsSelector) -> Iterable[q.PointId] | None:
    kind = selector.WhichOneof("points_selector_one_of")
    if kind == "points":
        return list(selector.points.ids)
    if kind == "filter" and selector.filter.ByteSize() == 0:
        return None
    return ()


def touched(method: str, request: Any) -> list[PointKey] | None:
    """Ids the request names; empty where it selects by filter, None where it selects all points."""
    if method == "UpdateBatch":
        keys: list[PointKey] = []
        for operation in request.operations:
            kind = operation.WhichOneof("operation")
            if kind is None:
                continue
            more = _message_keys(getattr(operation, kind))
            if more is None:
                return None
            keys.extend(more)
        return keys
    return _message_keys(request)


def _message_keys(message: Any) -> list[PointKey] | None:
    if isinstance(message, q.PointsSelector):
        ids = _selector_keys(message)
    elif "points_selector" in message.DESCRIPTOR.fields_by_name:
        ids = _selector_keys(message.points_selector)
    elif "points" not in message.DESCRIPTOR.fields_by_name:
        return []
    elif isinstance(message.points, q.PointsSelector):
        ids = _selector_keys(message.points)
    else:
        ids = [point.id for point in message.points]
    return None if ids is None else [point_key(item) for item in ids]
