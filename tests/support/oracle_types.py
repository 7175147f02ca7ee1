"""The oracle's reading of Postgres: text output to the JSON value that docs/mapping.md wants.

Written from docs/mapping.md alone and on purpose another way than the product: the product decodes
binary values, this parses text, type by type, as simply as can be. Slow and plain is right here.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Final, TypeAlias

import numpy as np
import psycopg

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Parse: TypeAlias = Callable[[str], Json]
Connection: TypeAlias = psycopg.Connection[tuple[object, ...]]

INT64_MIN: Final = -(1 << 63)
INT64_MAX: Final = (1 << 63) - 1


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_INTEGERS: Final = _words("int2 int4 int8 oid xid cid")
_OID_ALIASES: Final = _words(
    "regclass regcollation regconfig regdictionary regnamespace regoper regoperator regproc"
    " regprocedure regrole regtype"
)
_STRINGS: Final = _words(
    "text varchar bpchar name char citext xml ltree lquery ltxtquery jsonpath uuid interval inet"
    " cidr macaddr macaddr8 bit varbit tsvector pg_lsn tid date"
)


class OracleError(AssertionError):
    """The oracle cannot judge this table; it never guesses."""


@dataclass(frozen=True)
class OracleType:
    """A type as the catalog has it, domains resolved."""

    oid: int
    name: str
    kind: str  #: b base, c composite, e enum, r range, m multirange
    element: OracleType | None = None  #: of an array, a range or a multirange
    delimiter: str = ","  #: between elements of an array of this type
    attributes: tuple[tuple[str, OracleType], ...] = ()

    @property
    def is_array(self) -> bool:
        return self.kind == "b" and self.element is not None


def load_type(connection: Connection, oid: int) -> OracleType:
    """Read a type and everything below it."""
    row = connection.execute(
        "SELECT typname, typtype, typbasetype, typelem, typrelid, typdelim,"
        " typoutput = 'array_out'::regproc FROM pg_type WHERE oid = %s",
        (oid,),
    ).fetchone()
    if row is None:
        raise OracleError(f"no type {oid}")
    name, kind, base, element, relation, delimiter, is_array = row
    if kind == "d":
        return load_type(connection, _int(base))
    loaded: OracleType | None = None
    attributes: list[tuple[str, OracleType]] = []
    if is_array:
        loaded = load_type(connection, _int(element))
    elif kind in ("r", "m"):
        column = "rngtypid" if kind == "r" else "rngmultitypid"
        wanted = "rngsubtype" if kind == "r" else "rngtypid"
        found = connection.execute(
            f"SELECT {wanted} FROM pg_range WHERE {column} = %s".encode(), (oid,)
        ).fetchone()
        assert found is not None
        loaded = load_type(connection, _int(found[0]))
    elif kind == "c":
        for attribute, type_oid in connection.execute(
            "SELECT attname, atttypid FROM pg_attribute"
            " WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            (relation,),
        ):
            attributes.append((str(attribute), load_type(connection, _int(type_oid))))
    return OracleType(oid, str(name), str(kind), loaded, str(delimiter), tuple(attributes))


def sql_cast(type_: OracleType) -> str:
    """What to append to a column so that its text is what :func:`parser` reads."""
    suffix = "[]" if type_.is_array else ""
    base = type_.element if type_.is_array and type_.element is not None else type_
    if base.name in _OID_ALIASES:
        return "::oid" + suffix
    if base.name == "money":
        return "::numeric" + suffix
    return ""


def parser(type_: OracleType, numeric_as_string: bool = False, nested: bool = False) -> Parse:
    """The parser of a type's text output. Raises :class:`OracleError` for an unknown type."""

    def below(inner: OracleType) -> Parse:
        return parser(inner, numeric_as_string, nested=not type_.is_array or nested)

    if type_.element is not None:
        element = below(type_.element)
        if type_.kind == "r":
            return lambda text: _range(text, element)
        if type_.kind == "m":
            return lambda text: [element(one) for one in _RANGE.findall(text)]
        delimiter = type_.element.delimiter
        return lambda text: _array(text, delimiter, element)
    if type_.kind == "c":
        parsers = [(name, below(inner)) for name, inner in type_.attributes]
        return lambda text: _composite(text, parsers)
    if type_.kind == "e" or type_.name in _STRINGS:
        return str
    if type_.name == "numeric":
        return _numeric_string if numeric_as_string else _numeric
    if nested and (type_.name in _OID_ALIASES or type_.name == "money"):
        raise OracleError(f"{type_.name} inside a composite or range")
    found = _PARSERS.get(type_.name)
    if found is None:
        raise OracleError(f"no rule for type {type_.name}")
    return found


def float32(text: str) -> float:
    """The float4 that prints as ``text``, widened."""
    return float(np.float32(text))


def canonical_key(type_: OracleType) -> Callable[[str], str]:
    """How a key column's text becomes a string of the id's canonical text."""
    name = type_.name
    if type_.kind not in ("b", "e") or type_.is_array or name in _NOT_KEYS:
        raise OracleError(f"{name} cannot be a key")
    if name == "numeric":
        return lambda text: text.rstrip("0").rstrip(".") if "." in text else text
    if name == "bool":
        return lambda text: "true" if text == "t" else "false"
    if name in ("float4", "float8"):
        return lambda text: _float_key(float32(text) if name == "float4" else float(text))
    parse = parser(type_)
    return lambda text: str(parse(text))


def _float_key(value: float) -> str:
    # The shortest form of the (widened) double; to Postgres 0 and -0 are the same key.
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return "0" if value == 0 else repr(value).removesuffix(".0")


_NOT_KEYS: Final = _words(
    "json jsonb hstore point line lseg box path polygon circle vector halfvec sparsevec"
)


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _integer(text: str) -> Json:
    value = int(text)
    return value if INT64_MIN <= value <= INT64_MAX else text


def _numeric(text: str) -> Json:
    if text in ("NaN", "Infinity", "-Infinity"):
        return None
    if "." not in text:
        return _integer(text)
    value = float(text)
    if math.isfinite(value) and Decimal(repr(value)) == Decimal(text):
        return value
    return text


def _numeric_string(text: str) -> Json:
    return text


def _fraction(text: str) -> str:
    """Six digits of fraction, or none."""
    return re.sub(r"\.(\d{1,6})", lambda found: "." + found[1].ljust(6, "0"), text)


def _timestamp(text: str) -> Json:
    if text in ("infinity", "-infinity"):
        return text
    text, bc, _ = text.partition(" BC")
    date, _, time = text.partition(" ")
    # The session's time zone is UTC, so timestamptz ends in +00.
    return f"{date}T{_fraction(time.removesuffix('+00'))}Z{bc}"


def _timetz(text: str) -> Json:
    found = re.fullmatch(r"([\d:.]+)([+-]\d\d)(:\d\d)?(:\d\d)?", text)
    assert found is not None
    return _fraction(found[1]) + found[2] + (found[3] or ":00") + (found[4] or "")


def _bytea(text: str) -> Json:
    assert text.startswith("\\x")
    return base64.b64encode(bytes.fromhex(text[2:])).decode()


def _json(text: str) -> Json:
    def number(literal: str) -> Json:
        value = float(literal)
        return value if math.isfinite(value) else literal

    parsed: Json = json.loads(text, parse_int=_integer, parse_float=number)
    return parsed


def _hstore(text: str) -> Json:
    pairs = re.findall(r'"((?:[^"\\]|\\.)*)"=>(NULL|"(?:[^"\\]|\\.)*")', text, re.DOTALL)
    result: dict[str, Json] = {}
    for key, value in pairs:
        result[_unescape(key)] = None if value == "NULL" else _unescape(value[1:-1])
    return result


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


_NUMBER: Final = re.compile(r"-?Infinity|NaN|[-+0-9.eE]+")
_RANGE: Final = re.compile(r'empty|[\[(](?:"(?:[^"\\]|\\.|"")*"|[^"\])])*[\])]', re.DOTALL)


def _numbers(text: str) -> list[Json]:
    return [_finite(float(one)) for one in _NUMBER.findall(text)]


def _points(text: str) -> list[Json]:
    numbers = _numbers(text)
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    return [{"x": x, "y": y} for x, y in pairs]


def _point(text: str) -> Json:
    return _points(text)[0]


def _line(text: str) -> Json:
    return dict(zip("abc", _numbers(text), strict=True))


def _box(text: str) -> Json:
    return dict(zip(("high", "low"), _points(text), strict=True))


def _path(text: str) -> Json:
    return {"open": text.startswith("["), "points": _points(text)}


def _circle(text: str) -> Json:
    *centre, radius = _numbers(text)
    return {"center": {"x": centre[0], "y": centre[1]}, "radius": radius}


def _vector(text: str) -> Json:
    return [float32(one) for one in text.strip("[]").split(",")]


def sparse_items(text: str) -> tuple[list[int], list[float], int]:
    """0-based indices, values and size of ``{1:1.5,3:2}/5``."""
    inside, _, size = text[1:].partition("}/")
    pairs = [one.split(":") for one in inside.split(",") if one]
    return [int(index) - 1 for index, _ in pairs], [float32(v) for _, v in pairs], int(size)


def _sparse(text: str) -> Json:
    indices, values, size = sparse_items(text)
    return {"indices": [*indices], "values": [*values], "size": size}


def _array(text: str, delimiter: str, element: Parse) -> Json:
    if text.startswith("["):  # [0:1]={...}: lower bounds are not kept
        text = text[text.index("=") + 1 :]
    value, end = _array_level(text, 0, delimiter, element)
    assert end == len(text)
    return value


def _array_level(text: str, at: int, delimiter: str, element: Parse) -> tuple[list[Json], int]:
    assert text[at] == "{"
    items: list[Json] = []
    at += 1
    while text[at] != "}":
        if text[at] == delimiter:
            at += 1
        elif text[at] == "{":
            inner, at = _array_level(text, at, delimiter, element)
            items.append(inner)
        elif text[at] == '"':
            found = _QUOTED.match(text, at)
            assert found is not None
            items.append(element(_unescape(found[1])))
            at = found.end()
        else:
            end = at
            while text[end] not in (delimiter, "}"):
                end += 1
            items.append(None if text[at:end] == "NULL" else element(text[at:end]))
            at = end
    return items, at + 1


_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_FIELD: Final = re.compile(r'"((?:[^"\\]|\\.|"")*)"|([^",)]*)', re.DOTALL)


def _fields(inside: str) -> Iterator[str | None]:
    """Fields of a row's or range's text between its brackets; an empty one is None."""
    at = 0
    while True:
        found = _FIELD.match(inside, at)
        assert found is not None
        if found[1] is not None:
            yield _unescape(found[1].replace('""', '\\"'))
        else:
            yield found[2] or None
        at = found.end()
        if at >= len(inside):
            return
        assert inside[at] == ","
        at += 1


def _composite(text: str, parsers: list[tuple[str, Parse]]) -> Json:
    result: dict[str, Json] = {}
    fields = list(_fields(text[1:-1])) if parsers else []
    for (name, parse), field in zip(parsers, fields, strict=True):
        result[name] = None if field is None else parse(field)
    return result


def _range(text: str, element: Parse) -> Json:
    if text == "empty":
        return {"empty": True}
    lower, upper = _fields(text[1:-1])
    return {
        "lower": None if lower is None else element(lower),
        "upper": None if upper is None else element(upper),
        "bounds": text[0] + text[-1],
    }


_PARSERS: Final[dict[str, Parse]] = {
    **dict.fromkeys(_INTEGERS, int),
    **dict.fromkeys(_OID_ALIASES, int),
    "xid8": _integer,
    "bool": lambda text: text == "t",
    "float4": lambda text: _finite(float32(text)),
    "float8": lambda text: _finite(float(text)),
    "money": str,
    "timestamp": _timestamp,
    "timestamptz": _timestamp,
    "time": _fraction,
    "timetz": _timetz,
    "bytea": _bytea,
    "json": _json,
    "jsonb": _json,
    "hstore": _hstore,
    "point": _point,
    "line": _line,
    "lseg": lambda text: {"points": _points(text)},
    "box": _box,
    "path": _path,
    "polygon": lambda text: {"points": _points(text)},
    "circle": _circle,
    "vector": _vector,
    "halfvec": _vector,
    "sparsevec": _sparse,
}
