"""Mutations of golden inputs: systematic ones, and random ones from a seed."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final

#: Bytes that each byte is replaced with, beside its neighbours.
_BYTES: Final = (0x00, 0x01, 0x20, 0x2D, 0x5C, 0x7F, 0x80, 0xFF)
#: What a length, count or dimension may be made to say.
_INT32: Final = tuple(
    struct.pack(">i", number)
    for number in (-(1 << 31), -2, -1, 0, 1, 6, 0x7FFF, 0x00FF_FFFF, 1 << 30, (1 << 31) - 1)
)
_INT16: Final = tuple(struct.pack(">H", number) for number in (0, 1, 1664, 0x7FFF, 0x8000, 0xFFFF))
#: What the text formats are made of.
_TOKENS: Final = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b"(",
        b")",
        b"<",
        b">",
        b",",
        b";",
        b":",
        b'"',
        b'""',
        b"\\",
        b"\\\\",
    ),
    *(b"NULL", b"null", b"NaN", b"Infinity", b"-Infinity", b"infinity", b"empty", b"true", b" BC"),
    *(b"1e400", b"1e-400", b"-0", b"9" * 19, b"9" * 20, b"9" * 400, b"0.", b".5", b"1_0", b"+1"),
    *(
        b"\\ud800",
        b"\\u0000",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\0",
        b"=>",
        b"/5",
        b"1:1",
        b"\n",
    ),
)


def truncations(data: bytes) -> Iterator[bytes]:
    """The input cut at every byte."""
    for end in range(len(data)):
        yield data[:end]


def byte_changes(data: bytes) -> Iterator[bytes]:
    """Every byte replaced by several others."""
    for at, byte in enumerate(data):
        for other in (*_BYTES, byte ^ 0x01, (byte + 1) & 0xFF):
            if other != byte:
                yield data[:at] + bytes([other]) + data[at + 1 :]


def wrong_lengths(data: bytes) -> Iterator[bytes]:
    """Every place where a length may stand overwritten with extreme ones."""
    for at in range(len(data) - 1):
        for short in _INT16:
            yield data[:at] + short + data[at + 2 :]
    for at in range(len(data) - 3):
        for number in _INT32:
            yield data[:at] + number + data[at + 4 :]


def systematic(data: bytes) -> Iterator[bytes]:
    """All of the above, and the input itself."""
    yield data
    yield from truncations(data)
    yield from byte_changes(data)
    yield from wrong_lengths(data)


def random_mutation(
    chance: random.Random, corpus: Sequence[bytes], others: Sequence[bytes] | None = None
) -> bytes:
    """One of the corpus, changed in one to four places; ``others`` (the corpus) give parts."""
    data = bytearray(chance.choice(corpus))
    for _ in range(chance.choice((1, 1, 2, 4))):
        chance.choice(_MUTATORS)(chance, data, others or corpus)
    return bytes(data)


def _place(chance: random.Random, data: bytearray) -> int:
    return chance.randrange(len(data) + 1)


def _flip(chance: random.Random, data: bytearray, _corpus: Sequence[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _remove(chance: random.Random, data: bytearray, _corpus: Sequence[bytes]) -> None:
    at = _place(chance, data)
    del data[at : at + chance.choice((1, 2, 4, 8, 64))]


def _insert(chance: random.Random, data: bytearray, _corpus: Sequence[bytes]) -> None:
    at = _place(chance, data)
    data[at:at] = chance.randbytes(chance.choice((1, 2, 4, 8)))


def _token(chance: random.Random, data: bytearray, _corpus: Sequence[bytes]) -> None:
    at = _place(chance, data)
    data[at : at + chance.randrange(3)] = chance.choice(_TOKENS) * chance.choice((1, 1, 2, 40))


def _number(chance: random.Random, data: bytearray, _corpus: Sequence[bytes]) -> None:
    number = chance.choice((*_INT32, *_INT16))
    at = _place(chance, data)
    data[at : at + len(number)] = number


def _repeat(chance: random.Random, data: bytearray, _corpus: Sequence[bytes]) -> None:
    at, size = _place(chance, data), chance.choice((1, 4, 8, 16))
    data[at:at] = data[at : at + size] * chance.choice((1, 3, 50))


def _splice(chance: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    other = chance.choice(corpus)
    data[_place(chance, data) :] = other[chance.randrange(len(other) + 1) :]


_MUTATORS: Final[tuple[Callable[[random.Random, bytearray, Sequence[bytes]], None], ...]] = (
    _flip,
    _remove,
    _insert,
    _token,
    _number,
    _repeat,
    _splice,
)
