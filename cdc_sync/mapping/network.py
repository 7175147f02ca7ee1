"""Decoders of network addresses: inet, cidr, macaddr, macaddr8.

Sources: src/backend/utils/adt/{network,mac,mac8}.c and src/port/inet_net_ntop.c of PostgreSQL.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Final

from cdc_sync.mapping.decoding import Codec, malformed, plain

#: Address bytes by family number (PGSQL_AF_INET, PGSQL_AF_INET6).
_ADDRESS_BYTES: Final = {2: 4, 3: 16}
_ADDRESS_TEXT: Final = re.compile(rb"[0-9a-f:.]{2,45}(?:/[0-9]{1,3})?")


def _longest_zeros(groups: tuple[int, ...]) -> tuple[int, int]:
    """Return start and length of the first longest run of zero groups; length 0 if none has two
    groups.
    """
    best_start = best_length = length = 0
    for index, group in enumerate(groups):
        length = 0 if group else length + 1
        if length > best_length:
            best_start, best_length = index + 1 - length, length
    return (best_start, best_length) if best_length >= 2 else (-1, 0)


def _dotted(address: bytes) -> str:
    return ".".join(map(str, address))


def _ipv6(address: bytes) -> str:
    groups = struct.unpack(">8H", address)
    start, length = _longest_zeros(groups)
    # An embedded IPv4 address shows as one, by the rules of inet_net_ntop.c.
    if start == 0 and (length == 6 or (length == 5 and groups[5] == 0xFFFF)):
        head = "::ffff:" if length == 5 else "::"
        return f"{head}{_dotted(address[12:])}"
    words = [f"{group:x}" for group in groups]
    if not length:
        return ":".join(words)
    return f"{':'.join(words[:start])}::{':'.join(words[start + length :])}"


def _address_binary(data: bytes) -> str:
    """Return inet's or cidr's text output. Layout: family, bits, is cidr, address bytes, the
    address.
    """
    family, bits, is_cidr, length = data[0], data[1], data[2], data[3]
    address = data[4:]
    if _ADDRESS_BYTES.get(family) != length or len(address) != length or bits > 8 * length:
        raise malformed()
    text = _dotted(address) if length == 4 else _ipv6(address)
    return f"{text}/{bits}" if is_cidr or bits != 8 * length else text


def _address_text(data: bytes) -> str:
    if _ADDRESS_TEXT.fullmatch(data) is None:
        raise malformed()
    return data.decode("ascii")


def _mac(size: int) -> Codec:
    digits = re.compile(rb"[0-9a-f]{2}(?::[0-9a-f]{2}){%d}" % (size - 1))

    def binary(data: bytes) -> str:
        if len(data) != size:
            raise malformed()
        return data.hex(":")

    def text(data: bytes) -> str:
        if digits.fullmatch(data) is None:
            raise malformed()
        return data.decode("ascii")

    return Codec(plain(binary), plain(text))


_ADDRESS: Final = Codec(plain(_address_binary), plain(_address_text))

#: ``pg_catalog`` types by name.
CODECS: Final[Mapping[str, Codec]] = {
    "inet": _ADDRESS,
    "cidr": _ADDRESS,
    "macaddr": _mac(6),
    "macaddr8": _mac(8),
}
