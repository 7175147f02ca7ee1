"""Raw rows: the form in which a row travels from Postgres to the encoder.

A row is a list with one raw value a column. A raw value is one of

- ``bytes``: the type's binary send format (COPY BINARY and pgoutput ``binary 'true'`` carry the
  same bytes),
- :class:`TextValue`: the type's text output, for types that have no binary output function,
- ``None``: SQL NULL,
- :data:`UNCHANGED`: pgoutput's ``u``, a TOASTed value the update did not touch; the message does
  not carry it.

Source: PostgreSQL documentation, "Logical Replication Message Formats", TupleData.
"""

from __future__ import annotations

import enum
from typing import Final, TypeAlias


class TextValue(bytes):
    """A column value in the type's text output format (UTF-8), where binary is not to be had."""

    __slots__ = ()


class Unchanged(enum.Enum):
    """The type of :data:`UNCHANGED`."""

    UNCHANGED = "unchanged"

    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED: Final = Unchanged.UNCHANGED

#: A row of more bytes takes long to encode, and is worth to be handled by itself.
LARGE_ROW_BYTES: Final = 1 << 20

RawValue: TypeAlias = bytes | Unchanged | None
Row: TypeAlias = list[RawValue]

#: An unsigned 64-bit integer, or a UUID in its hyphenated lower-case form.
PointId: TypeAlias = int | str
