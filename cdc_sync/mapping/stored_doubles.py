"""What becomes of doubles in stored payloads.

Qdrant keeps payloads as JSON text and reads a double by one multiplication or division, which is
not always the nearest one: of doubles with 16 or 17 digits one in nine is read a step beside. Most
of them stay what they are then, however often they are written again. A few, below 1e-7 or above
1e30, go a step further each time.

Source: serde_json, ``src/de.rs``, ``f64_from_parts`` (without the feature ``float_roundtrip``).
"""

from __future__ import annotations

import math
from typing import Final

from cdc_sync.mapping.decoding import JsonValue

#: Doubles between these are read a step beside once or twice, and then stay.
_LEAST: Final = 1e-7
_MOST: Final = 1e30
_LARGEST_POWER: Final = 308
_POWERS: Final = tuple(float(f"1e{exponent}") for exponent in range(_LARGEST_POWER + 1))


def read_back(value: float) -> float:
    """The double as which Qdrant reads a finite one that it has written."""
    digits, _, power = repr(abs(value)).partition("e")
    whole, _, fraction = digits.partition(".")
    number = float(int(whole + fraction))
    exponent = int(power or 0) - len(fraction)
    if exponent < -_LARGEST_POWER:
        number /= _POWERS[_LARGEST_POWER]
        exponent += _LARGEST_POWER
    number = number * _POWERS[exponent] if exponent >= 0 else number / _POWERS[-exponent]
    return math.copysign(number, value)


def may_be_written_back(value: JsonValue) -> bool:
    """Whether a value that was read from a payload does not go a step further if it is written
    again."""
    if isinstance(value, float):
        return _LEAST < abs(value) < _MOST or read_back(value) == value
    if isinstance(value, list):
        return all(map(may_be_written_back, value))
    if isinstance(value, dict):
        return all(map(may_be_written_back, value.values()))
    return True
