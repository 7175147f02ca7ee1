"""What all value decoders share: the JSON type, the options they are compiled with, and how bad
bytes are reported.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from cdc_sync.errors import MappingError
from cdc_sync.mapping.table import PgType

#: A JSON value. Integers are within int64 and floats are finite, so that Qdrant takes every one.
JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

#: Turns the bytes of one value, never NULL, into JSON.
Decoder: TypeAlias = Callable[[bytes], JsonValue]

INT64_MIN: Final = -(1 << 63)
INT64_MAX: Final = (1 << 63) - 1

#: Digits that one value may take without having them sent, far more than is of use in a payload.
MAX_ZEROS: Final = 1 << 21

#: What decoders raise on bytes that are not a value of their type; the compiled decoder turns them
#: into MappingError.
MALFORMED: Final = (struct.error, ValueError, LookupError, ArithmeticError, RecursionError)


class NonFiniteCount:
    """How many NaN and infinite numbers became null, since JSON has neither."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


class DigitBudget:
    """How many digits the numbers of one value may still take.

    Ten bytes of numeric may say 1e131071, and so an array of a megabyte gigabytes of digits. Digits
    that are sent (four in two bytes) always fit, and :data:`MAX_ZEROS` besides.
    """

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = 0

    def begin(self, size: int) -> None:
        """Begin with a value of so many bytes."""
        self._left = 2 * size + MAX_ZEROS

    def take(self, digits: int) -> None:
        """Count a number that was written. Raises ValueError for one that is too much."""
        self._left -= digits
        if self._left < 0:
            raise malformed()


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """What decoders are compiled with; ``non_finite`` counts for all decoders that share it.
    ``digits`` is for the decoders below one array, range or composite.
    """

    numeric_as_string: bool = False
    non_finite: NonFiniteCount = field(default_factory=NonFiniteCount)
    digits: DigitBudget | None = None


#: Makes the decoder of one type.
Make: TypeAlias = Callable[[PgType, DecodeOptions], Decoder]


class Codec(NamedTuple):
    """Decoders of a scalar type: of its binary send format and of its text output."""

    binary: Make
    text: Make


def plain(decode: Decoder) -> Make:
    """Return a maker for a decoder that depends neither on the type nor on options."""

    def make(_type: PgType, _options: DecodeOptions) -> Decoder:
        return decode

    return make


def describe(type_: PgType) -> str:
    """Return the type's name as people write it: ``int4[]``, ``public.mood``."""
    if type_.kind.value == "array" and type_.element is not None:
        return f"{describe(type_.element)}[]"
    if type_.schema == "pg_catalog":
        return type_.name
    return f"{type_.schema}.{type_.name}"


def guarded(decode: Decoder, type_: PgType, form: str) -> Decoder:
    """Wrap a decoder so that it raises nothing but :class:`MappingError`."""
    name = describe(type_)

    def decode_or_refuse(data: bytes) -> JsonValue:
        try:
            return decode(data)
        except MALFORMED as error:
            raise MappingError(
                f"{len(data)} bytes are not a value of type {name} in {form} format"
            ) from error

    return decode_or_refuse


def malformed() -> ValueError:
    """Return the error for bytes that cannot be a value; its text goes nowhere."""
    return ValueError("malformed value")
