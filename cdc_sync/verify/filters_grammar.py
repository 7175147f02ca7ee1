"""The part of SQL's conditions that baseline queries may filter by, read as a tree
(:mod:`cdc_sync.verify.filters_tree`).

    condition   = conjunction { OR conjunction }
    conjunction = negation { AND negation }
    negation    = NOT negation | test { IS [NOT] TRUE | FALSE | UNKNOWN }
    test        = "(" condition ")"
                | operand ( op literal | op ANY "(" array ")" | [NOT] IN "(" literals ")"
                          | [NOT] BETWEEN literal AND literal | [NOT] LIKE literal
                          | IS [NOT] NULL | IS [NOT] DISTINCT FROM literal | nothing )
                | literal op operand | literal = ANY "(" operand ")"
    operand     = column { "->" key } "->>" key | column
    literal     = string | number | TRUE | FALSE | NULL, with an optional type: DATE '…', '…'::date
    array       = ARRAY "[" literals "]" | '{…}'
    op          = = | <> | != | < | <= | > | >=

Source: PostgreSQL documentation, "Lexical Structure" and "Value Expressions". Whatever else SQL has
is refused, so that what is accepted means the same to both sides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from cdc_sync.errors import ConfigError
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
    Operator,
    Or,
    Truth,
    Value,
)

_TOKEN: Final = re.compile(
    r"""\s*(?:
      (?P<string>'(?:[^']|'')*')
    | (?P<quoted>"(?:[^"]|"")+")
    | (?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)
    | (?P<name>[A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_$\u0080-\U0010ffff]*)
    | (?P<sign>->>|->|::|<=|>=|<>|!=|[=<>()\[\],.+-])
    )""",
    re.VERBOSE,
)
_OPERATORS: Final[dict[str, Operator]] = {
    "=": "=",
    "<>": "<>",
    "!=": "<>",
    "<": "<",
    "<=": "<=",
    ">": ">",
    ">=": ">=",
}
_FLIPPED: Final[dict[Operator, Operator]] = {
    "=": "=",
    "<>": "<>",
    "<": ">",
    "<=": ">=",
    ">": "<",
    ">=": "<=",
}
_TYPES: Final = {
    "boolean": "bool",
    "smallint": "int2",
    "integer": "int4",
    "int": "int4",
    "bigint": "int8",
    "real": "float4",
    "decimal": "numeric",
    "character varying": "varchar",
    "double precision": "float8",
    "timestamp without time zone": "timestamp",
    "timestamp with time zone": "timestamptz",
} | {
    name: name
    for name in (
        *("bool", "int2", "int4", "int8", "float4", "float8", "numeric", "text", "varchar"),
        *("uuid", "date", "timestamp", "timestamptz"),
    )
}
_RESERVED: Final = frozenset(
    {"and", "or", "not", "in", "between", "like", "ilike", "is", "null", "true", "false"}
    | {"any", "all", "some", "array", "case", "select", "exists", "similar", "symmetric", "cast"}
    | {"collate"}
)
#: Conditions in each other, at most.
_DEPTH: Final = 50
_LONGEST: Final = 20_000

_REMEDY: Final = (
    "Filters may have: = <> < <= > >=, IN, BETWEEN, IS [NOT] NULL, = ANY(array), column ->> 'key' ="
    " 'text', AND, OR, NOT; see docs/search-quality.md."
)


def refused(problem: str, remedy: str = _REMEDY) -> ConfigError:
    """The error for a filter that cannot be said in Qdrant."""
    return ConfigError(f"the filter cannot be translated: {problem}", remedy)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str

    def is_word(self, *words: str) -> bool:
        return self.kind == "name" and self.text.lower() in words

    def is_sign(self, *signs: str) -> bool:
        return self.kind == "sign" and self.text in signs


_END: Final = _Token("end", "")


def parse_filter(text: str) -> Expression:
    """Parse a condition. Raises :class:`ConfigError` saying what is not understood, without
    quoting values.
    """
    if len(text) > _LONGEST:
        raise refused(f"it has more than {_LONGEST} characters")
    return _Parser(_tokens(text)).whole()


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    end = len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None or "\0" in match[0]:
            raise refused(f"what stands at character {position + 1} is not understood")
        kind = str(match.lastgroup)
        if kind == "string" and match[0][0] == "'" and _is_prefix(tokens):
            # E'…', B'…' and the like.
            raise refused(f"a string of this form at character {position + 1} is not understood")
        tokens.append(_Token(kind, match[kind]))
        position = match.end()
    return tokens


def _is_prefix(tokens: Sequence[_Token]) -> bool:
    return bool(tokens) and tokens[-1].kind == "name" and len(tokens[-1].text) == 1


class _Parser:
    def __init__(self, tokens: Sequence[_Token]) -> None:
        self._tokens = tokens
        self._next = 0
        self._depth = 0

    def whole(self) -> Expression:
        if not self._tokens:
            raise refused("it is empty")
        found = self._condition()
        if self._peek() is not _END:
            self._unexpected()
        return found

    # -- tokens

    def _peek(self, ahead: int = 0) -> _Token:
        place = self._next + ahead
        return self._tokens[place] if place < len(self._tokens) else _END

    def _take(self) -> _Token:
        token = self._peek()
        self._next += 1
        return token

    def _word(self, *words: str) -> bool:
        """Take these words if they come next, in this order."""
        if all(self._peek(place).is_word(word) for place, word in enumerate(words)):
            self._next += len(words)
            return True
        return False

    def _sign(self, sign: str) -> bool:
        if self._peek().is_sign(sign):
            self._next += 1
            return True
        return False

    def _need(self, sign: str) -> None:
        if not self._sign(sign):
            self._unexpected(f", {sign} is expected")

    def _unexpected(self, more: str = "") -> NoReturn:
        token = self._peek()
        shown = {"string": "a string", "number": "a number", "end": "its end"}.get(
            token.kind, f"`{token.text}`"
        )
        raise refused(f"{shown} is not understood at word {self._next + 1}{more}")

    # -- conditions

    def _condition(self) -> Expression:
        parts = [self._conjunction()]
        while self._word("or"):
            parts.append(self._conjunction())
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def _conjunction(self) -> Expression:
        parts = [self._negation()]
        while self._word("and"):
            parts.append(self._negation())
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def _negation(self) -> Expression:
        self._depth += 1
        if self._depth > _DEPTH:
            raise refused(f"conditions are nested more than {_DEPTH} deep")
        try:
            if self._word("not"):
                return Not(self._negation())
            return self._truth(self._test())
        finally:
            self._depth -= 1

    def _truth(self, part: Expression) -> Expression:
        while self._peek().is_word("is"):
            self._take()
            negated = self._word("not")
            for word, truth in (("true", True), ("false", False), ("unknown", None)):
                if self._word(word):
                    part = IsTruth(part, truth)
                    break
            else:
                self._unexpected()
            part = Not(part) if negated else part
        return part

    def _test(self) -> Expression:
        if self._sign("("):
            inner = self._condition()
            self._need(")")
            return inner
        if self._literal_follows():
            return self._literal_first()
        operand = self._operand()
        token = self._peek()
        if token.kind == "sign" and token.text in _OPERATORS:
            self._take()
            return self._compared(operand, _OPERATORS[token.text])
        if self._peek().is_word("is"):
            return self._is(operand)
        negated = self._word("not")
        found = self._special(operand)
        if found is None:
            if negated:
                self._unexpected()
            return Truth(operand)
        return Not(found) if negated else found

    def _special(self, operand: Operand) -> Expression | None:
        if self._word("in"):
            self._need("(")
            return Membership(operand, self._literals(")"))
        if self._word("between"):
            if self._peek().is_word("symmetric"):
                self._unexpected()
            low = self._literal()
            if not self._word("and"):
                self._unexpected()
            high = self._literal()
            return And((Comparison(operand, ">=", low), Comparison(operand, "<=", high)))
        if self._word("like"):
            return Like(operand, self._literal())
        return None

    def _is(self, operand: Operand) -> Expression:
        for words, make in (
            (("null",), lambda: IsNull(operand)),
            (("distinct", "from"), lambda: Distinct(operand, self._literal())),
        ):
            if self._word("is", *words):
                return make()
            if self._word("is", "not", *words):
                return Not(make())
        return Truth(operand)

    def _compared(self, operand: Operand, operator: Operator) -> Expression:
        if self._peek().is_word("any", "some"):
            if operator != "=":
                self._unexpected(", ANY is understood after = only")
            self._take()
            self._need("(")
            values = self._array()
            self._need(")")
            return Membership(operand, values)
        return Comparison(operand, operator, self._literal())

    def _literal_first(self) -> Expression:
        value = self._literal()
        token = self._peek()
        if token.kind != "sign" or token.text not in _OPERATORS:
            self._unexpected()
        self._take()
        operator = _OPERATORS[token.text]
        if self._peek().is_word("any", "some"):
            if operator != "=":
                self._unexpected(", ANY is understood after = only")
            self._take()
            self._need("(")
            operand = self._operand()
            self._need(")")
            return Contains(operand, value)
        return Comparison(self._operand(), _FLIPPED[operator], value)

    # -- operands

    def _operand(self) -> Operand:
        column = self._name()
        keys: list[str] = []
        while self._peek().is_sign("->"):
            self._take()
            keys.append(self._key())
        if self._sign("->>"):
            return Operand(column, (*keys, self._key()))
        if keys:
            self._unexpected(", a path into JSON ends with ->>")
        return Operand(column)

    def _name(self) -> str:
        token = self._peek()
        if token.kind == "quoted":
            self._take()
            name = token.text[1:-1].replace('""', '"')
        elif token.kind == "name" and token.text.lower() not in _RESERVED:
            self._take()
            name = "".join(c.lower() if c.isascii() else c for c in token.text)
        else:
            self._unexpected()
        follows = self._peek()
        if follows.is_sign(".", "(", "::", "[", "+", "-"):
            self._unexpected(": columns stand by themselves, without table, function or cast")
        return name

    def _key(self) -> str:
        token = self._peek()
        if token.kind != "string":
            self._unexpected(": keys of JSON objects are strings")
        self._take()
        return _unquoted(token)

    # -- literals

    def _literal_follows(self) -> bool:
        token = self._peek()
        return (
            token.kind in ("string", "number")
            or token.is_sign("-", "+")
            or (token.is_word("null"))
            or (
                token.is_word("true", "false")
                and self._peek(1).kind == "sign"
                and self._peek(1).text in _OPERATORS
            )
            or self._typed_string() is not None
        )

    def _typed_string(self) -> tuple[str, int] | None:
        """A type's name before a string, and how many words it has."""
        for count in (4, 2, 1):
            words = [self._peek(place) for place in range(count)]
            name = " ".join(word.text.lower() for word in words)
            named = name in _TYPES and all(word.kind == "name" for word in words)
            if named and self._peek(count).kind == "string":
                return _TYPES[name], count
        return None

    def _literal(self) -> Value:
        typed = self._typed_string()
        if typed is not None:
            self._next += typed[1]
            return Value("string", _unquoted(self._take()), typed[0])
        negative = self._sign("-")
        if not negative:
            self._sign("+")
        token = self._take()
        if token.kind == "number":
            value = Value("number", ("-" if negative else "") + token.text)
        elif negative:
            self._next -= 1
            self._unexpected()
        elif token.kind == "string":
            value = Value("string", _unquoted(token))
        elif token.is_word("true", "false"):
            value = Value("boolean", token.text.lower())
        elif token.is_word("null"):
            value = Value("null", "")
        else:
            self._next -= 1
            self._unexpected(": a literal is expected")
        if self._peek().is_sign("::"):
            self._take()
            return Value(value.kind, value.text, self._type())
        return value

    def _type(self) -> str:
        for count in (4, 2, 1):
            words = [self._peek(place) for place in range(count)]
            name = " ".join(word.text.lower() for word in words)
            if name in _TYPES and all(word.kind == "name" for word in words):
                self._next += count
                if self._peek().is_sign("(", "[", "::"):
                    self._unexpected()
                return _TYPES[name]
        self._unexpected(": the type of a literal")

    def _literals(self, end: str) -> tuple[Value, ...]:
        found = [self._literal()]
        while self._sign(","):
            found.append(self._literal())
        self._need(end)
        return tuple(found)

    def _array(self) -> tuple[Value, ...]:
        if self._word("array"):
            self._need("[")
            if self._sign("]"):
                self._unexpected(": an empty array has no type")
            return self._literals("]")
        token = self._take()
        if token.kind != "string":
            self._next -= 1
            self._unexpected(": an array is expected, ARRAY[…] or '{…}'")
        return _array_literal(_unquoted(token))


_ELEMENT: Final = re.compile(
    r'\s*(?:"((?:[^"\\]|\\.)*)"|([^\s"{},\\][^"{},\\]*?))\s*(,|$)', re.DOTALL
)


def _array_literal(text: str) -> tuple[Value, ...]:
    """The elements of a one-dimensional array in Postgres's text form."""
    inner = text.strip()
    if inner[:1] != "{" or inner[-1:] != "}":
        raise refused("an array is expected in braces, or as ARRAY[...]")
    inner = inner[1:-1]
    values: list[Value] = []
    position = 0
    while inner.strip() and position <= len(inner):
        match = _ELEMENT.match(inner, position)
        if match is None:
            raise refused("an array in braces is not a one-dimensional array")
        quoted, bare, comma = match.groups()
        if quoted is not None:
            values.append(Value("string", re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL)))
        elif bare.upper() == "NULL":
            values.append(Value("null", ""))
        else:
            values.append(Value("string", bare))
        position = match.end()
        if not comma:
            break
    return tuple(values)


def _unquoted(token: _Token) -> str:
    return token.text[1:-1].replace("''", "'")
