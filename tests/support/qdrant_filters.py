"""Filters of Qdrant's gRPC messages as the embedded engine takes them."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable

import qdrant_edge as edge
from numpy import bool_
from qdrant_client import grpc as q

from tests.support.qdrant_convert import point_key
from tests.support.qdrant_status import invalid, validation


def engine_filter(message: q.Filter) -> edge.Filter:
    """The filter with all its conditions. Refuses empty and unsupported conditions with
    INVALID_ARGUMENT.
    """
    min_should = None
    if message.HasField("min_should"):
        min_should = edge.MinShould(
            _conditions(message.min_should.conditions), message.min_should.min_count
        )
    return edge.Filter(
        must=_conditions(message.must) or None,
        should=_conditions(message.should) or None,
        must_not=_conditions(message.must_not) or None,
        min_should=min_should,
    )


def optional_filter(present: bool, message: q.Filter) -> edge.Filter | None:
    return engine_filter(message) if present else None


def _conditions(messages: Iterable[q.Condition]) -> list[edge.ConditionType]:
    return [_condition(message) for message in messages]


def _condition(message: q.Condition) -> edge.ConditionType:
    kind = message.WhichOneof("condition_one_of")
    if kind == "field":
        return _field(message.field)
    if kind == "is_empty":
        return edge.IsEmptyCondition(message.is_empty.key)
    if kind == "is_null":
        return edge.IsNullCondition(message.is_null.key)
    if kind == "has_id":
        return edge.HasIdCondition({point_key(item) for item in message.has_id.has_id})
    if kind == "has_vector":
        return edge.HasVectorCondition(message.has_vector.has_vector)
    if kind == "nested":
        return edge.NestedCondition(message.nested.key, engine_filter(message.nested.filter))
    if kind == "filter":
        return engine_filter(message.filter)
    raise invalid("Malformed Condition type")


def _field(message: q.FieldCondition) -> edge.FieldCondition:
    set_fields = {field.name for field, _ in message.ListFields()} - {"key"}
    if not set_fields:
        raise validation(
            "filter", 'Validation error: At least one field condition must be specified [{"value"}]'
        )
    value_range: edge.RangeFloat | edge.RangeDateTime | None = None
    if message.HasField("range"):
        value_range = _float_range(message.range)
    elif message.HasField("datetime_range"):
        value_range = _datetime_range(message.datetime_range)
    return edge.FieldCondition(
        message.key,
        match=_match(message.match) if message.HasField("match") else None,
        range=value_range,
        geo_bounding_box=_box(message.geo_bounding_box)
        if message.HasField("geo_bounding_box")
        else None,
        geo_radius=_radius(message.geo_radius) if message.HasField("geo_radius") else None,
        geo_polygon=_polygon(message.geo_polygon) if message.HasField("geo_polygon") else None,
        values_count=_values_count(message.values_count)
        if message.HasField("values_count")
        else None,
        is_empty=message.is_empty if message.HasField("is_empty") else None,
        is_null=message.is_null if message.HasField("is_null") else None,
    )


_MATCHES: dict[str, Callable[[q.Match], edge.MatchType]] = {
    "keyword": lambda match: edge.MatchValue(match.keyword),
    "integer": lambda match: edge.MatchValue(match.integer),
    # The engine's binding takes a bool for the integer 0 or 1, but not a NumPy one.
    "boolean": lambda match: edge.MatchValue(bool_(match.boolean)),  # type: ignore[arg-type]
    "text": lambda match: edge.MatchText(match.text),
    "text_any": lambda match: edge.MatchTextAny(match.text_any),
    "phrase": lambda match: edge.MatchPhrase(match.phrase),
    "prefix": lambda match: edge.MatchPrefix(match.prefix),
    "keywords": lambda match: edge.MatchAny(list(match.keywords.strings)),
    "integers": lambda match: edge.MatchAny(list(match.integers.integers)),
    "except_keywords": lambda match: edge.MatchExcept(list(match.except_keywords.strings)),
    "except_integers": lambda match: edge.MatchExcept(list(match.except_integers.integers)),
}


def _match(message: q.Match) -> edge.MatchType:
    kind = message.WhichOneof("match_value")
    if kind is None:
        raise invalid("Malformed Match condition")
    return _MATCHES[kind](message)


def _float_range(message: q.Range) -> edge.RangeFloat:
    return edge.RangeFloat(
        gte=message.gte if message.HasField("gte") else None,
        gt=message.gt if message.HasField("gt") else None,
        lte=message.lte if message.HasField("lte") else None,
        lt=message.lt if message.HasField("lt") else None,
    )


def _datetime_range(message: q.DatetimeRange) -> edge.RangeDateTime:
    bounds = {
        field.name: moment.ToDatetime(tzinfo=datetime.UTC).isoformat()
        for field, moment in message.ListFields()
    }
    return edge.RangeDateTime(**bounds)


def _values_count(message: q.ValuesCount) -> edge.ValuesCount:
    return edge.ValuesCount(
        gte=message.gte if message.HasField("gte") else None,
        gt=message.gt if message.HasField("gt") else None,
        lte=message.lte if message.HasField("lte") else None,
        lt=message.lt if message.HasField("lt") else None,
    )


def _geo_point(message: q.GeoPoint) -> edge.GeoPoint:
    return edge.GeoPoint(lon=message.lon, lat=message.lat)


def _box(message: q.GeoBoundingBox) -> edge.GeoBoundingBox:
    if not (message.HasField("top_left") and message.HasField("bottom_right")):
        raise invalid("Malformed GeoBoundingBox type")
    return edge.GeoBoundingBox(
        top_left=_geo_point(message.top_left), bottom_right=_geo_point(message.bottom_right)
    )


def _radius(message: q.GeoRadius) -> edge.GeoRadius:
    if not message.HasField("center"):
        raise invalid("Malformed GeoRadius type")
    return edge.GeoRadius(center=_geo_point(message.center), radius=message.radius)


def _polygon(message: q.GeoPolygon) -> edge.GeoPolygon:
    if not message.HasField("exterior"):
        raise invalid("Malformed GeoPolygon type")
    return edge.GeoPolygon(
        exterior=[_geo_point(point) for point in message.exterior.points],
        interiors=[[_geo_point(point) for point in ring.points] for ring in message.interiors],
    )
