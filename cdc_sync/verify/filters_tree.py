"""The conditions that baseline queries may filter by, as a tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Operator: TypeAlias = Literal["=", "<>", "<", "<=", ">", ">="]


@dataclass(frozen=True, slots=True)
class Value:
    """A literal. ``kind`` is string, number, boolean or null; ``type`` the type it is cast to."""

    kind: Literal["string", "number", "boolean", "null"]
    text: str
    type: str | None = None


@dataclass(frozen=True, slots=True)
class Operand:
    """A column, or with ``keys`` the text (``->>``) at that path in a column of JSON."""

    column: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """``operand op value``."""

    operand: Operand
    operator: Operator
    value: Value


@dataclass(frozen=True, slots=True)
class Membership:
    """``operand IN (values)``, which is ``operand = ANY (ARRAY[values])``."""

    operand: Operand
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Contains:
    """``value = ANY (operand)``: the column is an array."""

    operand: Operand
    value: Value


@dataclass(frozen=True, slots=True)
class Like:
    """``operand LIKE pattern``."""

    operand: Operand
    pattern: Value


@dataclass(frozen=True, slots=True)
class IsNull:
    """``operand IS NULL``."""

    operand: Operand


@dataclass(frozen=True, slots=True)
class Distinct:
    """``operand IS DISTINCT FROM value``."""

    operand: Operand
    value: Value


@dataclass(frozen=True, slots=True)
class Truth:
    """A boolean column by itself."""

    operand: Operand


@dataclass(frozen=True, slots=True)
class IsTruth:
    """``part IS TRUE`` (True), ``IS FALSE`` (False) or ``IS UNKNOWN`` (None)."""

    part: Expression
    truth: bool | None


@dataclass(frozen=True, slots=True)
class Not:
    """``NOT part``."""

    part: Expression


@dataclass(frozen=True, slots=True)
class And:
    """All of the parts."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Any of the parts."""

    parts: tuple[Expression, ...]


Expression: TypeAlias = (
    Comparison | Membership | Contains | Like | IsNull | Distinct | Truth | IsTruth | Not | And | Or
)
