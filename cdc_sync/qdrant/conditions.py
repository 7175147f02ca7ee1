"""Conditions on payloads, the same for a server and an embedded database.

Paths are JSON paths in Qdrant's form (:func:`cdc_sync.qdrant.collections.index_path`).
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Match:
    """The field is this value, or a list with it."""

    path: str
    value: str | int | bool


@dataclass(frozen=True, slots=True)
class MatchAny:
    """The field is one of these values, all of one type, or a list with one of them."""

    path: str
    values: tuple[str, ...] | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NumberRange:
    """The field is a number within these bounds."""

    path: str
    gt: float | None = None
    gte: float | None = None
    lt: float | None = None
    lte: float | None = None


@dataclass(frozen=True, slots=True)
class TimeRange:
    """The field is a date or a time within these bounds, which have a zone."""

    path: str
    gt: datetime.datetime | None = None
    gte: datetime.datetime | None = None
    lt: datetime.datetime | None = None
    lte: datetime.datetime | None = None


@dataclass(frozen=True, slots=True)
class Empty:
    """The field is null, absent, or an empty list."""

    path: str


@dataclass(frozen=True, slots=True)
class Null:
    """The field is null, or a list with null in it."""

    path: str


@dataclass(frozen=True, slots=True)
class Every:
    """All of the parts hold. At least one."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Either:
    """At least one of the parts holds. At least one part."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True, slots=True)
class Negation:
    """The part does not hold."""

    part: Condition


Condition: TypeAlias = (
    Match | MatchAny | NumberRange | TimeRange | Empty | Null | Every | Either | Negation
)
