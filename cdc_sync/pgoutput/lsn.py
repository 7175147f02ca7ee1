"""Log sequence numbers."""

from __future__ import annotations

from typing import Self


class Lsn(int):
    """A position in the write-ahead log: an unsigned 64-bit count of bytes, printed as ``X/Y`` in
    hex.

    Subtraction of two positions gives bytes.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``16/B374D848``. Raises ``ValueError`` for anything else."""
        high, slash, low = text.partition("/")
        if not slash or not (0 < len(high) <= 8 and 0 < len(low) <= 8):
            raise ValueError(f"not an LSN: {text!r}")
        return cls((int(high, 16) << 32) | int(low, 16))

    def __str__(self) -> str:
        return f"{self >> 32:X}/{self & 0xFFFFFFFF:X}"

    def __repr__(self) -> str:
        return f"Lsn({self})"
