"""Turns the SQL conditions of baseline queries into Qdrant's, so that both select the same rows.

SQL has three truth values and selects where a condition is true; Qdrant has two. So each part is
translated twice, into what is true and what is false, and NOT exchanges both; a part that is
unknown (NULL) is in neither. What cannot be said exactly is refused with a reason.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Final, NamedTuple, NoReturn, TypeAlias

import numpy as np

from cdc_sync.mapping.column_options import selects
from cdc_sync.mapping.decoding import describe
from cdc_sync.mapping.plan import ColumnPlan, TablePlan
from cdc_sync.mapping.table import PgType, TypeKind
from cdc_sync.qdrant import conditions as c
from cdc_sync.qdrant.collections import index_path
from cdc_sync.verify import filters_tree as g
from cdc_sync.verify.filters_grammar import parse_filter, refused
from cdc_sync.verify.filters_sql import as_sql

#: A condition, or what holds always or never.
Truth: TypeAlias = c.Condition | bool


class _Both(NamedTuple):
    """What makes an expression true, and what makes it false."""

    true: Truth
    false: Truth


@dataclass(frozen=True, slots=True)
class TranslatedFilter:
    """A filter for both sides. ``condition`` is None where every row passes; ``nothing``: no row
    does. ``notes`` are sentences about rows that the two sides may see differently.
    """

    sql: str
    condition: c.Condition | None
    nothing: bool = False
    notes: tuple[str, ...] = ()


def translate_filter(text: str, plan: TablePlan) -> TranslatedFilter:
    """Translate an SQL condition on a table's columns.

    Raises :class:`ConfigError` for what is not understood, names no column, or has no exact
    counterpart; its text quotes no values.
    """
    expression = parse_filter(text)
    translator = _Translator(plan)
    true = translator.both(expression).true
    return TranslatedFilter(
        sql=as_sql(expression),
        condition=None if isinstance(true, bool) else true,
        nothing=true is False,
        notes=tuple(dict.fromkeys(translator.notes)),
    )


# -- conditions and constants together


def _every(parts: Sequence[Truth]) -> Truth:
    if any(part is False for part in parts):
        return False
    kept = tuple(part for part in parts if not isinstance(part, bool))
    return True if not kept else kept[0] if len(kept) == 1 else c.Every(kept)


def _either(parts: Sequence[Truth]) -> Truth:
    if any(part is True for part in parts):
        return True
    kept = tuple(part for part in parts if not isinstance(part, bool))
    return False if not kept else kept[0] if len(kept) == 1 else c.Either(kept)


def _negated(part: Truth) -> Truth:
    return (not part) if isinstance(part, bool) else c.Negation(part)


_TEXT: Final = frozenset({"text", "varchar", "bpchar", "name"})
_INTEGERS: Final = {"int2": 15, "int4": 31, "int8": 63}
_FLOATS: Final = frozenset({"float4", "float8"})
_TIMES: Final = frozenset({"date", "timestamp", "timestamptz"})
#: Types whose value is never null, nor an empty list, unless it is NULL.
_PLAIN: Final = frozenset(
    {*_TEXT, *_INTEGERS, *_FLOATS, *_TIMES, "bool", "numeric", "uuid", "oid", "time", "timetz"}
    | {"interval", "inet", "cidr", "macaddr", "macaddr8", "bit", "varbit", "money", "bytea", "char"}
)
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_ISO_TIME: Final = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[T ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:\.([0-9]{1,6}))?)?"
    r"(?: ?(Z|[+-][0-9]{2}(?::?[0-9]{2})?))?)?"
)
_JSON_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_JSON_INTEGER: Final = re.compile(r"-?[1-9][0-9]{0,17}|0")
#: Bounds are doubles for Qdrant: integers below this are themselves.
_EXACT: Final = 2**53
#: Significant decimal digits that survive the way through a double.
_SAFE_DIGITS: Final = 15


class _Translator:
    def __init__(self, plan: TablePlan) -> None:
        self._plan = plan
        self._columns = {column.name: column for column in plan.columns}
        self.notes: list[str] = []

    def both(self, expression: g.Expression) -> _Both:
        match expression:
            case g.And(parts):
                found = [self.both(part) for part in parts]
                return _Both(_every([f.true for f in found]), _either([f.false for f in found]))
            case g.Or(parts):
                found = [self.both(part) for part in parts]
                return _Both(_either([f.true for f in found]), _every([f.false for f in found]))
            case g.Not(part):
                inner = self.both(part)
                return _Both(inner.false, inner.true)
            case g.IsTruth(part, truth):
                return self._is_truth(self.both(part), truth)
            case g.Truth(operand):
                return self._compared(operand, "=", g.Value("boolean", "true"))
            case g.Comparison(operand, operator, value):
                return self._compared(operand, operator, value)
            case g.Membership(operand, values):
                found = [self._compared(operand, "=", value) for value in values]
                return _Both(_either([f.true for f in found]), _every([f.false for f in found]))
            case g.Contains(operand, value):
                return self._contains(operand, value)
            case g.Like(operand, pattern):
                return self._like(operand, pattern)
            case g.IsNull(operand):
                null = self._null(operand)
                return _Both(null, _negated(null))
            case g.Distinct(operand, value):
                return self._distinct(operand, value)

    @staticmethod
    def _is_truth(inner: _Both, truth: bool | None) -> _Both:
        if truth is None:
            holds = _every([_negated(inner.true), _negated(inner.false)])
        else:
            holds = inner.true if truth else inner.false
        return _Both(holds, _negated(holds))

    def _distinct(self, operand: g.Operand, value: g.Value) -> _Both:
        if value.kind == "null":
            null = self._null(operand)
            return _Both(_negated(null), null)
        equal = self._compared(operand, "=", value).true
        return _Both(_negated(equal), equal)

    # -- columns

    def _column(self, operand: g.Operand) -> ColumnPlan:
        column = self._columns.get(operand.column)
        if column is None:
            raise refused(
                f"table {self._plan.qualified_name} has no column {operand.column} that is taken",
                f"Its columns are {', '.join(self._columns)}.",
            )
        if column.vector is not None or column.field is None or column.part is not None:
            raise refused(f"column {operand.column} is no field of the payload by itself")
        return column

    def _path(self, column: ColumnPlan, keys: Sequence[str] = ()) -> str:
        assert column.field is not None
        parts = [index_path(column.field, self._plan.payload_key), *map(index_path, keys)]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            raise refused(
                f"the field of column {column.name} has a quote or a backslash in its name, which "
                "Qdrant's paths cannot have"
            )
        return ".".join(known)

    def _null(self, operand: g.Operand) -> Truth:
        """What makes an operand NULL."""
        column = self._column(operand)
        base = column.type.base
        if operand.keys:
            self._json(operand)
            self._note_empty_list()
            return c.Empty(self._path(column, operand.keys))
        plain = base.kind is TypeKind.ENUM or (
            base.kind is TypeKind.BASE and base.schema == "pg_catalog" and base.name in _PLAIN
        )
        if not plain:
            raise refused(
                f"whether column {column.name} of type {describe(column.type)} is NULL cannot be "
                "told from its payload field"
            )
        return c.Empty(self._path(column))

    def _note_empty_list(self) -> None:
        self.notes.append("an empty list in JSON is taken for NULL by Qdrant's filter")

    def _refuse_type(self, column: ColumnPlan, what: str) -> NoReturn:
        raise refused(f"column {column.name} is of type {describe(column.type)}, {what}")

    # -- comparisons

    def _compared(self, operand: g.Operand, operator: g.Operator, value: g.Value) -> _Both:
        column = self._column(operand)
        if operand.keys:
            return self._json_compared(operand, operator, value)
        if value.kind == "null":
            self._null(operand)
            return _Both(False, False)
        if operator == "<>":
            equal = self._compared(operand, "=", value)
            return _Both(equal.false, equal.true)
        base = column.type.base
        compare = self._comparison(column, base)
        if operator == "=":
            true = compare("=", value)
            return _Both(true, _every([_negated(self._null(operand)), _negated(true)]))
        return _Both(compare(operator, value), compare(_INVERSE[operator], value))

    def _comparison(
        self, column: ColumnPlan, base: PgType
    ) -> Callable[[g.Operator, g.Value], Truth]:
        path = self._path(column)
        if base.kind is TypeKind.ENUM:
            return lambda op, value: self._strings(column, path, op, value)
        if base.kind is TypeKind.BASE and base.schema == "pg_catalog":
            name = base.name
            if name in _TEXT or name == "uuid":
                return lambda op, value: self._strings(column, path, op, value)
            if name in _INTEGERS:
                return lambda op, value: self._integers(column, path, op, value)
            if name in _FLOATS or name == "numeric":
                return lambda op, value: self._numbers(column, path, op, value)
            if name == "bool":
                return lambda op, value: self._booleans(column, path, op, value)
            if name in _TIMES:
                return lambda op, value: self._times(column, path, op, value)
        self._refuse_type(column, "which filters cannot compare")

    def _check_cast(self, column: ColumnPlan, value: g.Value, *types: str) -> None:
        if value.type is not None and value.type not in types:
            self._refuse_type(column, f"and its literal of type {value.type}")

    def _strings(self, column: ColumnPlan, path: str, op: g.Operator, value: g.Value) -> Truth:
        base = column.type.base
        if op != "=":
            self._refuse_type(
                column, "whose order depends on a collation that Qdrant does not have"
            )
        if value.kind != "string":
            self._refuse_type(column, "and its literal is no string")
        self._check_cast(
            column, value, base.name, *(("text", "varchar") if base.name in _TEXT else ())
        )
        text = value.text
        if base.name == "uuid":
            text = text.lower()
            if _UUID.fullmatch(text) is None:
                self._refuse_type(column, "and its literal is not a hyphenated UUID")
        elif base.name == "bpchar":
            return self._padded(column, path, value)
        return c.Match(path, text)

    def _padded(self, column: ColumnPlan, path: str, value: g.Value) -> Truth:
        """char(n): trailing blanks do not count, and are in the payload."""
        size = column.type.base.typmod - 4
        if size < 1 or value.type not in (None, "bpchar"):
            self._refuse_type(column, "whose trailing blanks a filter cannot leave out of account")
        text = value.text.rstrip(" ")
        return c.Match(path, text.ljust(size)) if len(text) <= size else False

    def _booleans(self, column: ColumnPlan, path: str, op: g.Operator, value: g.Value) -> Truth:
        self._check_cast(column, value, "bool")
        text = value.text.lower()
        if op != "=" or value.kind == "number" or text not in _BOOLEANS:
            self._refuse_type(column, "which is compared by = with true or false only")
        return c.Match(path, _BOOLEANS[text])

    def _decimal(self, column: ColumnPlan, value: g.Value) -> Decimal:
        try:
            number = Decimal(value.text.strip())
        except InvalidOperation:
            number = Decimal("NaN")
        if value.kind == "boolean" or not number.is_finite() or len(value.text) > 60:
            self._refuse_type(column, "and its literal is no finite number")
        return number

    def _integers(self, column: ColumnPlan, path: str, op: g.Operator, value: g.Value) -> Truth:
        self._check_cast(column, value, *_INTEGERS, "numeric")
        number = self._decimal(column, value)
        whole = number == number.to_integral_value()
        if value.kind == "string" and not (whole and value.text.strip().lstrip("+-").isdecimal()):
            self._refuse_type(column, "and its literal is no integer")
        if op == "=":
            fits = whole and -(2**63) <= number < 2**63
            return c.Match(path, int(number)) if fits else False
        # Bounds become integers, as the values are.
        upper = op in ("<", "<=")
        if whole:
            bound = int(number) - (1 if op == "<" else -1 if op == ">" else 0)
        else:
            bound = math.floor(number) if upper else math.ceil(number)
        if abs(bound) >= _EXACT:
            self._refuse_type(column, "and its bound is beyond 2^53, where Qdrant's are not exact")
        return c.NumberRange(path, lte=bound) if upper else c.NumberRange(path, gte=bound)

    def _numbers(self, column: ColumnPlan, path: str, op: g.Operator, value: g.Value) -> Truth:
        base = column.type.base
        self._check_cast(column, value, *_INTEGERS, *_FLOATS, "numeric")
        if selects(self._plan.numeric_as_string, column.name) and base.name == "numeric":
            self._refuse_type(column, "and its values are strings in the payload")
        number = self._decimal(column, value)
        bound = float(number)
        if base.name == "numeric":
            if Decimal(repr(bound)) != number or value.type in _FLOATS:
                self._refuse_type(column, "and its literal is not exact as a double")
            self._note_numeric(column)
        elif value.type == "float4" or (base.name == "float4" and value.kind == "string"):
            # The literal itself is rounded to single precision.
            bound = float(np.float32(bound))
        if not math.isfinite(bound):
            self._refuse_type(column, "and its literal is too large for a double")
        if op == "=":
            return c.NumberRange(path, gte=bound, lte=bound)
        return c.NumberRange(path, **{_BOUND[op]: bound})

    def _note_numeric(self, column: ColumnPlan) -> None:
        typmod = column.type.base.typmod
        if typmod < 4 or ((typmod - 4) >> 16) & 0xFFFF > _SAFE_DIGITS:
            self.notes.append(
                f"numbers of column {column.name} that are not exact as a double are strings in the"
                " payload, and not found by the filter"
            )

    def _times(self, column: ColumnPlan, path: str, op: g.Operator, value: g.Value) -> Truth:
        base = column.type.base.name
        if value.kind != "string":
            self._refuse_type(column, "and its literal is no string")
        self._check_cast(column, value, base, "date")
        moment = self._moment(column, base, value)
        if op == "=":
            return c.TimeRange(path, gte=moment, lte=moment)
        bounded = c.TimeRange(path, **{_BOUND[op]: moment})
        # Infinite dates and times are strings that are no time.
        infinite = "-infinity" if op in ("<", "<=") else "infinity"
        return c.Either((bounded, c.Match(path, infinite)))

    def _moment(self, column: ColumnPlan, base: str, value: g.Value) -> datetime.datetime:
        match = _ISO_TIME.fullmatch(value.text.strip())
        if match is None:
            self._refuse_type(column, "and its literal is not written as 2026-01-31 10:20:30")
        year, month, day, hour, minute, second, fraction, zone = match.groups()
        if hour is not None and "date" in (base, value.type):
            self._refuse_type(column, "and its literal has a time of day")
        if zone is not None and base != "timestamptz":
            self._refuse_type(column, "and its literal has a zone, which SQL leaves out of account")
        try:
            moment = datetime.datetime(
                *(int(year), int(month), int(day), int(hour or 0), int(minute or 0)),
                int(second or 0),
                int((fraction or "").ljust(6, "0")),
                tzinfo=datetime.UTC,
            )
            return moment - _offset(zone)
        except (ValueError, OverflowError):
            self._refuse_type(column, "and its literal is no date")

    # -- arrays, patterns, JSON

    def _contains(self, operand: g.Operand, value: g.Value) -> _Both:
        column = self._column(operand)
        base = column.type.base
        element = base.element if base.kind is TypeKind.ARRAY else None
        if operand.keys or element is None:
            self._refuse_type(column, "and ANY wants an array")
        if selects(self._plan.drop_nulls, column.name):
            self._refuse_type(column, "whose NULLs are left out of the payload (drop_nulls)")
        path = self._path(column)
        if value.kind == "null":
            # True of no array; false of empty ones, which cannot be told from NULL.
            return _Both(False, self._unknown(column))
        inner = element.base
        compare = self._comparison(ColumnPlan(column.name, element, field=column.field), inner)
        found = compare("=", value)
        # A NULL among the elements makes it unknown unless another element is the value.
        return _Both(found, _every([_negated(found), _negated(c.Null(path))]))

    def _unknown(self, column: ColumnPlan) -> NoReturn:
        self._refuse_type(column, "and NULL is looked for in it")

    def _like(self, operand: g.Operand, pattern: g.Value) -> _Both:
        column = self._column(operand)
        if not operand.keys and not (
            column.type.base.schema == "pg_catalog" and column.type.base.name in _TEXT - {"bpchar"}
        ):
            self._refuse_type(column, "and LIKE is for text")
        if pattern.kind == "null":
            return _Both(False, False)
        if pattern.kind != "string" or pattern.type not in (None, "text", "varchar"):
            self._refuse_type(column, "and the pattern is no string")
        text = _literal_pattern(pattern.text)
        if text is None:
            raise refused(
                f"LIKE on column {operand.column} has wildcards, for which Qdrant has no exact "
                "counterpart"
            )
        return self._compared(operand, "=", g.Value("string", text))

    def _json(self, operand: g.Operand) -> ColumnPlan:
        column = self._column(operand)
        base = column.type.base
        if base.schema != "pg_catalog" or base.name != "jsonb":
            self._refuse_type(column, "and ->> is understood of jsonb only")
        return column

    def _json_compared(self, operand: g.Operand, operator: g.Operator, value: g.Value) -> _Both:
        column = self._json(operand)
        path = self._path(column, operand.keys)
        if operator not in ("=", "<>"):
            raise refused(f"text of JSON in column {column.name} has no order in Qdrant")
        if value.kind == "null":
            return _Both(False, False)
        if value.kind != "string" or value.type not in (None, "text", "varchar"):
            raise refused(f"{column.name} ->> is text, and its literal is no string")
        # A list with the value matches too: its elements have the path with [].
        true = _every([self._json_text(column, path, value.text), c.Empty(f"{path}[]")])
        self._note_empty_list()
        false = _every([_negated(true), _negated(c.Empty(path))])
        return _Both(true, false) if operator == "=" else _Both(false, true)

    def _json_text(self, column: ColumnPlan, path: str, text: str) -> Truth:
        """What ``->>`` turns into this text: a string, or a number or boolean written so."""
        match = c.Match(path, text)
        if text in ("true", "false"):
            return _either([match, c.Match(path, text == "true")])
        if _JSON_INTEGER.fullmatch(text):
            return _either([match, c.Match(path, int(text))])
        if _JSON_NUMBER.fullmatch(text) or text[:1] in ("{", "["):
            raise refused(
                f"the text compared with {column.name} ->> looks like a number, object or list of "
                "JSON, whose spelling Qdrant does not keep"
            )
        return match


_BOOLEANS: Final = {
    **dict.fromkeys(("true", "t", "yes", "y", "on", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "off", "0"), False),
}
_INVERSE: Final[dict[g.Operator, g.Operator]] = {"<": ">=", "<=": ">", ">": "<=", ">=": "<"}
_BOUND: Final[dict[g.Operator, str]] = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}


def _offset(zone: str | None) -> datetime.timedelta:
    if zone in (None, "Z"):
        return datetime.timedelta()
    assert zone is not None
    digits = zone[1:].replace(":", "")
    offset = datetime.timedelta(hours=int(digits[:2]), minutes=int(digits[2:] or 0))
    return -offset if zone[0] == "-" else offset


def _literal_pattern(pattern: str) -> str | None:
    """The text that a LIKE pattern without wildcards stands for; None for one that has some."""
    kept: list[str] = []
    characters = iter(pattern)
    for character in characters:
        if character in "%_":
            return None
        if character == "\\":
            character = next(characters, "")
            if not character:
                raise refused("a LIKE pattern ends with a backslash")
        kept.append(character)
    return "".join(kept)
