"""The conditions of :mod:`cdc_sync.verify.filters_tree` as SQL again."""

from __future__ import annotations

from cdc_sync.verify.filters_tree import (
    And,
    Comparison,
    Contains,
    Distinct,
    Expression,
    IsNull,
    IsTruth,
    Like,
    Membership,
    Not,
    Operand,
    Or,
    Truth,
    Value,
)


def as_sql(expression: Expression) -> str:
    """The condition as SQL in which every name is a column's, whatever else it may mean in SQL."""
    match expression:
        case Comparison(operand, operator, value):
            return f"({_operand_sql(operand)} {operator} {_value_sql(value)})"
        case Membership(operand, values):
            if not values:
                return "FALSE"
            return f"({_operand_sql(operand)} IN ({', '.join(map(_value_sql, values))}))"
        case Contains(operand, value):
            return f"({_value_sql(value)} = ANY ({_operand_sql(operand)}))"
        case Like(operand, pattern):
            return f"({_operand_sql(operand)} LIKE {_value_sql(pattern)})"
        case IsNull(operand):
            return f"({_operand_sql(operand)} IS NULL)"
        case Distinct(operand, value):
            return f"({_operand_sql(operand)} IS DISTINCT FROM {_value_sql(value)})"
        case Truth(operand):
            return _operand_sql(operand)
        case IsTruth(part, truth):
            return f"({as_sql(part)} IS {'UNKNOWN' if truth is None else str(truth).upper()})"
        case Not(part):
            return f"(NOT {as_sql(part)})"
        case And(parts):
            return f"({' AND '.join(map(as_sql, parts))})"
        case Or(parts):
            return f"({' OR '.join(map(as_sql, parts))})"


def _operand_sql(operand: Operand) -> str:
    path = [_quoted(operand.column, '"')]
    for place, key in enumerate(operand.keys):
        path.append("->>" if place == len(operand.keys) - 1 else "->")
        path.append(_quoted(key, "'"))
    return " ".join(path)


def _value_sql(value: Value) -> str:
    if value.kind == "null":
        text = "NULL"
    elif value.kind == "string":
        text = _quoted(value.text, "'")
    else:
        text = value.text
    if value.type is None:
        return text
    # A cast binds more tightly than the sign.
    return (
        f"({text})::pg_catalog.{value.type}"
        if text[0] == "-"
        else f"{text}::pg_catalog.{value.type}"
    )


def _quoted(text: str, mark: str) -> str:
    return mark + text.replace(mark, mark * 2) + mark
