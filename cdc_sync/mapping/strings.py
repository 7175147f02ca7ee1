"""Decoders of what becomes a plain string: text and its kin, uuid, bytea, bit strings, tsvector,
pg_lsn, tid.

Sources: src/backend/utils/adt/{varlena,char,uuid,varbit,tsvector,pg_lsn,tid,jsonpath}.c of
PostgreSQL, contrib/ltree.
"""

from __future__ import annotations

import binascii
import re
import struct
from collections.abc import Mapping
from typing import Final

from cdc_sync.mapping.decoding import Codec, malformed, plain

_INT32: Final = struct.Struct(">i")
_UINT16: Final = struct.Struct(">H")
_UINT64: Final = struct.Struct(">Q")
_TID: Final = struct.Struct(">IH")
_UUID_TEXT: Final = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_LSN_TEXT: Final = re.compile(rb"([0-9A-F]{1,8})/([0-9A-F]{1,8})")
_TID_TEXT: Final = re.compile(rb"\([0-9]{1,10},[0-9]{1,5}\)")
_BITS_TEXT: Final = re.compile(rb"[01]*")
_OCTAL_CHAR: Final = re.compile(rb"\\([0-3][0-7]{2})")
_WEIGHTS: Final = ("", "C", "B", "A")


def text(data: bytes) -> str:
    """Return text; bytes that are not UTF-8 become U+FFFD."""
    return data.decode("utf-8", "replace")


def _versioned(data: bytes) -> str:
    # ltree, lquery, ltxtquery and jsonpath send a version number before their text.
    if data[:1] != b"\x01":
        raise malformed()
    return text(data[1:])


def _char_binary(data: bytes) -> str:
    if len(data) != 1:
        raise malformed()
    return "" if data == b"\x00" else text(data)


def _char_text(data: bytes) -> str:
    # From Postgres 16 on bytes above 127 are written as \ooo; before, as they are.
    octal = _OCTAL_CHAR.fullmatch(data)
    if octal is not None:
        return text(bytes([int(octal[1], 8)]))
    if len(data) > 1:
        raise malformed()
    return text(data)


def uuid_binary(data: bytes) -> str:
    """Return the hyphenated form of 16 bytes. Raises ValueError."""
    if len(data) != 16:
        raise malformed()
    digits = data.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def uuid_text(data: bytes) -> str:
    """Return a uuid's text output after a check. Raises ValueError."""
    if _UUID_TEXT.fullmatch(data) is None:
        raise malformed()
    return data.decode("ascii")


def _base64(data: bytes) -> str:
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def _bytea_text(data: bytes) -> str:
    if data[:2] != b"\\x":
        raise malformed()
    return _base64(binascii.unhexlify(data[2:]))


def _bits_binary(data: bytes) -> str:
    count: int = _INT32.unpack_from(data)[0]
    if count < 0 or len(data) != 4 + (count + 7) // 8:
        raise malformed()
    if not count:
        return ""
    digits = 8 * (len(data) - 4)
    return format(int.from_bytes(data[4:], "big"), f"0{digits}b")[:count]


def _bits_text(data: bytes) -> str:
    if _BITS_TEXT.fullmatch(data) is None:
        raise malformed()
    return data.decode("ascii")


def _tsvector_binary(data: bytes) -> str:
    """Return tsvector's text output.

    Layout: Int32 lexemes; each NUL-terminated text, UInt16 positions, each UInt16 with the weight
    in the top two bits.
    """
    count: int = _INT32.unpack_from(data)[0]
    if not 0 <= count <= (len(data) - 4) // 3:
        raise malformed()
    offset = 4
    lexemes = []
    for _ in range(count):
        end = data.index(b"\x00", offset)
        lexeme = text(data[offset:end]).replace("\\", "\\\\").replace("'", "''")
        positions: int = _UINT16.unpack_from(data, end + 1)[0]
        offset = end + 3 + 2 * positions
        marks = struct.unpack_from(f">{positions}H", data, end + 3)
        where = ",".join(f"{mark & 0x3FFF}{_WEIGHTS[mark >> 14]}" for mark in marks)
        lexemes.append(f"'{lexeme}':{where}" if where else f"'{lexeme}'")
    if offset != len(data):
        raise malformed()
    return " ".join(lexemes)


def _lsn_string(value: int) -> str:
    return f"{value >> 32:X}/{value & 0xFFFFFFFF:X}"


def _lsn_binary(data: bytes) -> str:
    return _lsn_string(_UINT64.unpack(data)[0])


def _lsn_text(data: bytes) -> str:
    # Parsed and printed again: newer servers pad the lower half with zeros.
    match = _LSN_TEXT.fullmatch(data)
    if match is None:
        raise malformed()
    return _lsn_string(int(match[1], 16) << 32 | int(match[2], 16))


def _tid_binary(data: bytes) -> str:
    block, item = _TID.unpack(data)
    return f"({block},{item})"


def _tid_text(data: bytes) -> str:
    if _TID_TEXT.fullmatch(data) is None:
        raise malformed()
    return data.decode("ascii")


TEXT: Final = Codec(plain(text), plain(text))
_VERSIONED: Final = Codec(plain(_versioned), plain(text))
_BITS: Final = Codec(plain(_bits_binary), plain(_bits_text))

#: ``pg_catalog`` types by name.
CODECS: Final[Mapping[str, Codec]] = {
    "text": TEXT,
    "varchar": TEXT,
    "bpchar": TEXT,
    "name": TEXT,
    "xml": TEXT,
    "char": Codec(plain(_char_binary), plain(_char_text)),
    "jsonpath": _VERSIONED,
    "uuid": Codec(plain(uuid_binary), plain(uuid_text)),
    "bytea": Codec(plain(_base64), plain(_bytea_text)),
    "bit": _BITS,
    "varbit": _BITS,
    "tsvector": Codec(plain(_tsvector_binary), plain(text)),
    "pg_lsn": Codec(plain(_lsn_binary), plain(_lsn_text)),
    "tid": Codec(plain(_tid_binary), plain(_tid_text)),
}

#: Types of extensions, by extension and name.
EXTENSION_CODECS: Final[Mapping[tuple[str, str], Codec]] = {
    ("citext", "citext"): TEXT,
    ("ltree", "ltree"): _VERSIONED,
    ("ltree", "lquery"): _VERSIONED,
    ("ltree", "ltxtquery"): _VERSIONED,
}
