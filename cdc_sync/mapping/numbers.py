"""Decoders of numbers: bool, integers, floats, numeric, money.

Sources: src/backend/utils/adt/{bool,int,int8,oid,xid,float,numeric,cash,regproc}.c of PostgreSQL,
the ``*send`` and ``*out`` functions.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Final

from cdc_sync.mapping.decoding import (
    INT64_MAX,
    INT64_MIN,
    Codec,
    DecodeOptions,
    Decoder,
    DigitBudget,
    JsonValue,
    Make,
    NonFiniteCount,
    malformed,
    plain,
)
from cdc_sync.mapping.table import PgType

_INTEGER_TEXT: Final = re.compile(rb"-?[0-9]{1,20}")
_FLOAT_TEXT: Final = re.compile(rb"-?(?:[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|Infinity)|NaN")
_NUMERIC_TEXT: Final = re.compile(rb"-?[0-9]+(?:\.[0-9]+)?|NaN|-?Infinity")
_NUMERIC_HEADER: Final = struct.Struct(">HhHH")
_FLOAT4: Final = struct.Struct(">f")
_FLOAT8: Final = struct.Struct(">d")
_INT64: Final = struct.Struct(">q")
#: numeric_recv accepts no larger display scale (NUMERIC_DSCALE_MASK).
_MAX_DISPLAY_SCALE: Final = 0x3FFF
_NUMERIC_SPECIAL: Final = {0xC000: "NaN", 0xD000: "Infinity", 0xF000: "-Infinity"}
#: Numbers of more digits are counted where many of them may stand in one value.
_LONG_DIGITS: Final = 256
#: A decimal of at most this many significant digits survives the way through a double.
_SAFE_DIGITS: Final = 15


def _bool_binary(data: bytes) -> bool:
    if data == b"\x01":
        return True
    if data == b"\x00":
        return False
    raise malformed()


def _bool_text(data: bytes) -> bool:
    if data == b"t":
        return True
    if data == b"f":
        return False
    raise malformed()


def _integer(form: str) -> Codec:
    layout = struct.Struct(form)
    unpack = layout.unpack
    bits = 8 * layout.size
    signed = form[-1].islower()
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    fits = high <= INT64_MAX

    def binary(data: bytes) -> JsonValue:
        value: int = unpack(data)[0]
        return value if fits or value <= INT64_MAX else str(value)

    def text(data: bytes) -> JsonValue:
        if _INTEGER_TEXT.fullmatch(data) is None:
            raise malformed()
        value = int(data)
        if not low <= value <= high:
            raise malformed()
        return value if value <= INT64_MAX else str(value)

    return Codec(plain(binary), plain(text))


_OID: Final = _integer(">I")
_oid_text: Final = _OID.text(PgType(26, "pg_catalog", "oid"), DecodeOptions())


def _reg_text(data: bytes) -> JsonValue:
    # The text output of reg* types is a name where there is one; only their binary form tells the
    # number.
    return 0 if data == b"-" else _oid_text(data)


def finite(value: float, count: NonFiniteCount) -> float | None:
    """Return the number, or None (counted) for NaN and infinities."""
    if math.isfinite(value):
        return value
    count.value += 1
    return None


def parse_float8(data: bytes) -> float:
    """Return the number of float8's text output. Raises ValueError."""
    if _FLOAT_TEXT.fullmatch(data) is None:
        raise malformed()
    return float(data)


def parse_float4(data: bytes) -> float:
    """Return the number of float4's text output, widened exactly. Raises ValueError and
    OverflowError.
    """
    value: float = _FLOAT4.unpack(_FLOAT4.pack(parse_float8(data)))[0]
    return value


def _float(layout: struct.Struct) -> Make:
    unpack = layout.unpack
    isfinite = math.isfinite

    def make(_type: PgType, options: DecodeOptions) -> Decoder:
        count = options.non_finite

        def binary(data: bytes) -> JsonValue:
            value: float = unpack(data)[0]
            if isfinite(value):
                return value
            count.value += 1
            return None

        return binary

    return make


def _float4_text(_type: PgType, options: DecodeOptions) -> Decoder:
    count = options.non_finite
    return lambda data: finite(parse_float4(data), count)


def _float8_text(_type: PgType, options: DecodeOptions) -> Decoder:
    count = options.non_finite
    return lambda data: finite(parse_float8(data), count)


def numeric_text(data: bytes) -> str:
    """Return what numeric's text output would be, from its binary format.

    Layout: UInt16 digits, Int16 weight, UInt16 sign, UInt16 display scale, then base-10000 digits;
    the first one is worth 10000 to the power of weight. Raises ValueError and struct.error.
    """
    count, weight, sign, scale = _NUMERIC_HEADER.unpack_from(data)
    if len(data) != 8 + 2 * count:
        raise malformed()
    if sign not in (0, 0x4000):
        special = _NUMERIC_SPECIAL.get(sign)
        if special is None or count:
            raise malformed()
        return special
    if scale > _MAX_DISPLAY_SCALE:
        raise malformed()
    words = struct.unpack_from(f">{count}H", data, 8)
    if count and max(words) > 9999:
        raise malformed()
    digits = ("%04d" * count) % words
    whole_digits = 4 * (weight + 1)
    if not count:
        whole, fraction = "", ""
    elif whole_digits > 0:
        whole = digits[:whole_digits].ljust(whole_digits, "0").lstrip("0")
        fraction = digits[whole_digits:]
    else:
        # Only the display scale can be seen of the fraction, so no more zeros than that are needed.
        whole = ""
        fraction = "0" * -whole_digits + digits if -whole_digits < scale else ""
    text = whole or "0"
    if scale:
        text = f"{text}.{fraction[:scale].ljust(scale, '0')}"
    return f"-{text}" if sign else text


def numeric_json(text: str, count: NonFiniteCount) -> JsonValue:
    """Return the JSON value of a numeric in Postgres's notation: a number when that loses nothing,
    else the text.
    """
    length = len(text)
    if "." not in text:
        if length <= 20 and text[-1].isdigit():
            value = int(text)
            return value if INT64_MIN <= value <= INT64_MAX else text
        if text[-1].isdigit():
            return text
        count.value += 1
        return None
    number = float(text)
    if length <= _SAFE_DIGITS + 1:
        return number
    if math.isfinite(number) and Decimal(repr(number)) == Decimal(text):
        return number
    return text


def _numeric_binary(_type: PgType, options: DecodeOptions) -> Decoder:
    expand: Callable[[bytes], str] = numeric_text
    if options.digits is not None:
        expand = _counted_numeric_text(options.digits)
    if options.numeric_as_string:
        return expand
    count = options.non_finite
    return lambda data: numeric_json(expand(data), count)


def _counted_numeric_text(budget: DigitBudget) -> Callable[[bytes], str]:
    def text(data: bytes) -> str:
        digits = numeric_text(data)
        if len(digits) > _LONG_DIGITS:
            budget.take(len(digits))
        return digits

    return text


def numeric_from_text(data: bytes) -> str:
    """Return numeric's text output as it is, after a check. Raises ValueError."""
    if _NUMERIC_TEXT.fullmatch(data) is None:
        raise malformed()
    return data.decode("ascii")


def _numeric_text(_type: PgType, options: DecodeOptions) -> Decoder:
    if options.numeric_as_string:
        return numeric_from_text
    count = options.non_finite
    return lambda data: numeric_json(numeric_from_text(data), count)


def _money_string(amount: int, digits: int) -> str:
    whole = str(abs(amount)).rjust(digits + 1, "0")
    text = f"{whole[:-digits]}.{whole[-digits:]}" if digits else whole
    return f"-{text}" if amount < 0 else text


def _money_digits(type_: PgType) -> int:
    return 2 if type_.typmod < 0 else type_.typmod


def _money_binary(type_: PgType, _options: DecodeOptions) -> Decoder:
    digits = _money_digits(type_)
    return lambda data: _money_string(_INT64.unpack(data)[0], digits)


def _money_text(type_: PgType, _options: DecodeOptions) -> Decoder:
    # lc_monetary chooses symbol, separators and the way to write a minus; what it cannot change is
    # the sequence of digits, of which the last ones are the fraction.
    fraction_digits = _money_digits(type_)

    def text(data: bytes) -> JsonValue:
        digits = bytes(character for character in data if 48 <= character <= 57)
        if not digits or len(digits) > 20:
            raise malformed()
        amount = int(digits)
        negative = b"-" in data or b"(" in data
        return _money_string(-amount if negative else amount, fraction_digits)

    return text


NUMERIC: Final = Codec(_numeric_binary, _numeric_text)

#: ``pg_catalog`` types by name.
CODECS: Final[Mapping[str, Codec]] = {
    "bool": Codec(plain(_bool_binary), plain(_bool_text)),
    "int2": _integer(">h"),
    "int4": _integer(">i"),
    "int8": _integer(">q"),
    "oid": _OID,
    "xid": _OID,
    "cid": _OID,
    "xid8": _integer(">Q"),
    "float4": Codec(_float(_FLOAT4), _float4_text),
    "float8": Codec(_float(_FLOAT8), _float8_text),
    "numeric": NUMERIC,
    "money": Codec(_money_binary, _money_text),
} | {
    name: Codec(_OID.binary, plain(_reg_text))
    for name in (
        "regclass",
        "regcollation",
        "regconfig",
        "regdatabase",
        "regdictionary",
        "regnamespace",
        "regoper",
        "regoperator",
        "regproc",
        "regprocedure",
        "regrole",
        "regtype",
    )
}
