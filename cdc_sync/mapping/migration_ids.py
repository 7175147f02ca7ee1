"""Point ids as Qdrant's own migration tool computes them: to take over collections it has filled.

The tool turns the value of one key column into text. A text that Go's ``uuid.Parse`` takes is the
id, every other one is hashed: UUIDv5 in the URL namespace. Integers are hashed too.

By that rule keys can share an id: a UUID has many spellings, and one may be the hash of another
key. Which keys are taken is therefore narrower, so that no two of them share an id; by scheme:

- ``qdrant-migration``: texts that are no UUID, and UUIDs as Postgres prints them unless they are of
  version 5, as all hashes are;
- ``qdrant-migration-uuid``: UUIDs as Postgres prints them, and nothing else;
- ``qdrant-migration-hex``: 32 lower-case hexadecimal digits (as of ``md5()``), and nothing else.

Sources: qdrant/migration, ``cmd/migrate_from_pg.go`` (``keyToString``) and ``cmd/utils.go``
(``arbitraryIDToUUID``); github.com/google/uuid 1.6.0, ``uuid.go`` (``Parse``); the texts of the
types: github.com/jackc/pgx 5.10.0 and Go's ``fmt``, whose output the tests hold.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import math
import re
import struct
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

import numpy as np

from cdc_sync.errors import ConfigError
from cdc_sync.mapping import numbers
from cdc_sync.mapping.decoding import Decoder, JsonValue, describe, malformed
from cdc_sync.mapping.plan import IdScheme
from cdc_sync.mapping.strings import uuid_binary
from cdc_sync.mapping.table import PgType, TypeKind
from cdc_sync.mapping.values import raw_binary_decoder, raw_text_decoder

#: From the bytes of a key value to the point id. Raises what bad bytes raise
#: (:data:`~cdc_sync.mapping.decoding.MALFORMED`), and :class:`SharedIdError`.
IdFunction: TypeAlias = Callable[[bytes], str]
_Text: TypeAlias = Callable[[bytes], bytes]

#: The setting ``ids`` for the ids of this program.
NATIVE_IDS: Final = "native"
MIGRATION_SCHEMES: Final = frozenset(
    {IdScheme.MIGRATION, IdScheme.MIGRATION_UUID, IdScheme.MIGRATION_HEX}
)

_CANONICAL: Final = rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_UUID: Final = re.compile(_CANONICAL)
_HASH: Final = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-5[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_HEX: Final = re.compile(rb"[0-9a-f]{32}")
#: All that uuid.Parse takes; of 38 bytes it looks at the middle 36 only.
_PARSED: Final = re.compile(
    rb"[0-9a-f]{32}|(?:urn:uuid:)?%b|.%b." % (_CANONICAL, _CANONICAL), re.IGNORECASE | re.DOTALL
)
_TIMESTAMP: Final = re.compile(
    r"([0-9]{4,})-([0-9]{2}-[0-9]{2})(?:T([0-9:]{8})(?:\.([0-9]{6}))?Z)?( BC)?"
)
_OCTAL_CHAR: Final = re.compile(rb"\\([0-3][0-7]{2})")

_TEXT_TYPES: Final = frozenset({"text", "varchar", "bpchar", "name"})
#: Types whose payload value is the text, or becomes it by str().
_PLAIN_TYPES: Final = frozenset(
    {"int2", "int4", "int8", "oid", "xid8", "macaddr", "macaddr8", "pg_lsn"}
)
_OTHER_TYPES: Final = frozenset(
    {"bool", "float4", "float8", "char", "bytea", "date", "timestamp", "inet", "cidr"}
)
_EXTENSION_TYPES: Final = frozenset({("citext", "citext"), ("ltree", "ltree")})

SHARED_ID_REMEDY: Final = (
    'Set ids = "qdrant-migration-uuid" if all keys are UUIDs, "qdrant-migration-hex" if all are '
    "32 hexadecimal digits; both in lower case."
)


class SharedIdError(Exception):
    """The key is a text with which another key could share its id; ``id`` is what the tool gave
    it.
    """

    def __init__(self, text: bytes) -> None:
        super().__init__()
        self.id = _tool_id(text)


def migration_scheme(
    table: str, key: Sequence[tuple[str, PgType]], namespace: str | None, ids: str
) -> IdScheme:
    """Return the scheme of a configured ``ids`` other than native, for these key columns.

    Raises :class:`ConfigError` where the tool has no id, or none that can be computed.
    """
    if namespace is not None:
        raise ConfigError(
            f'{table}: `ids = "{ids}"` and `namespace` contradict each other; the tool\'s ids have '
            "no namespace",
            "Take one of them out of the table's configuration.",
        )
    if len(key) != 1:
        raise ConfigError(
            f'{table}: `ids = "{ids}"` needs a key of one column, but the key is '
            f"({', '.join(name for name, _ in key)})",
            "Name the column that the tool was given as --pg.key-column as `key`, or take "
            "`ids` out and copy the table into a new collection.",
        )
    scheme = IdScheme(ids)
    ((name, type_),) = key
    base = type_.base
    textual = _is_textual(base)
    if scheme is not IdScheme.MIGRATION and not textual:
        raise ConfigError(
            f'{table}: `ids = "{ids}"` is for keys of text, but key column {name} is of type '
            f"{describe(type_)}",
            'Set ids = "qdrant-migration".',
        )
    if _is_core(base, frozenset({"uuid"})):
        return IdScheme.UUID
    if not textual and not _is_core(base, _PLAIN_TYPES | _OTHER_TYPES):
        raise ConfigError(
            f"{table}: the ids that Qdrant's migration tool gives to keys of type "
            f"{describe(type_)} (column {name}) cannot be computed: they depend on the tool's "
            "version or on where it ran",
            "Take `ids` out of the table's configuration and copy it into a new collection.",
        )
    return scheme


def _is_core(type_: PgType, names: frozenset[str]) -> bool:
    plain = type_.kind is TypeKind.BASE and type_.extension is None
    return plain and type_.schema == "pg_catalog" and type_.name in names


def _is_textual(type_: PgType) -> bool:
    return (
        type_.kind is TypeKind.ENUM
        or (type_.extension, type_.name) in _EXTENSION_TYPES
        or _is_core(type_, _TEXT_TYPES | {"bytea"})
    )


def compile_migration_id(type_: PgType, scheme: IdScheme) -> tuple[IdFunction, IdFunction]:
    """Return the functions from a key value (binary, text) to its id."""
    base = type_.base
    # The text of a number, a date or an address is never that of a UUID.
    to_id = _OF_TEXT[scheme] if _is_textual(base) else _hashed
    if _is_core(base, frozenset({"bytea"})):
        to_id = _of_bytes(scheme, to_id)
    binary, text = _texts(type_)
    return lambda data: to_id(binary(data)), lambda data: to_id(text(data))


# -- from text to id


def _hashed(text: bytes) -> str:
    digest = hashlib.sha1(uuid.NAMESPACE_URL.bytes + text, usedforsecurity=False).digest()
    version = bytes([digest[6] & 0x0F | 0x50, digest[7], digest[8] & 0x3F | 0x80])
    return uuid_binary(digest[:6] + version + digest[9:16])


def _tool_id(text: bytes) -> str:
    if _PARSED.fullmatch(text) is None:
        return _hashed(text)
    start = {32: 0, 36: 0, 38: 1, 45: 9}[len(text)]
    digits = text[start : start + 36].replace(b"-", b"").decode("ascii")
    return uuid_binary(bytes.fromhex(digits))


def _any_text(text: bytes) -> str:
    if _PARSED.fullmatch(text) is None:
        return _hashed(text)
    if _UUID.fullmatch(text) is None or _HASH.fullmatch(text) is not None:
        raise SharedIdError(text)
    return text.decode("ascii")


def _uuid_text(text: bytes) -> str:
    if _UUID.fullmatch(text) is None:
        raise SharedIdError(text)
    return text.decode("ascii")


def _hex_text(text: bytes) -> str:
    if _HEX.fullmatch(text) is None:
        raise SharedIdError(text)
    return _tool_id(text)


_OF_TEXT: Final[Mapping[IdScheme, Callable[[bytes], str]]] = {
    IdScheme.MIGRATION: _any_text,
    IdScheme.MIGRATION_UUID: _uuid_text,
    IdScheme.MIGRATION_HEX: _hex_text,
}


def _of_bytes(scheme: IdScheme, to_id: IdFunction) -> IdFunction:
    """As ``to_id``, but 16 bytes are a UUID, and so the text of one is not taken."""
    if scheme is IdScheme.MIGRATION_HEX:
        return to_id

    def bytes_id(data: bytes) -> str:
        if len(data) == 16:
            return to_id(uuid_binary(data).encode())
        if _PARSED.fullmatch(data) is not None:
            raise SharedIdError(data)
        return to_id(data)

    return bytes_id


# -- from value to text


def _texts(type_: PgType) -> tuple[_Text, _Text]:
    """Return the functions from a key value (binary, text) to the text that the tool makes of it:
    what Go prints of what pgx reads.
    """
    base = type_.base
    if base.kind is TypeKind.ENUM or base.extension == "citext" or base.name in _TEXT_TYPES:
        return bytes, bytes
    if base.name == "char":
        return _char_binary, _char_text
    if base.name in ("float4", "float8"):
        return _float_texts(base.name)
    write = _WRITERS.get(base.name, str)

    def through(decode: Decoder) -> _Text:
        def text(data: bytes) -> bytes:
            written = write(decode(data))
            if isinstance(written, bytes):
                return written
            if "\ufffd" in written:
                raise malformed()  # bytes that are not UTF-8: keys would get the same id
            return written.encode("utf-8")

        return text

    return through(raw_binary_decoder(type_)), through(raw_text_decoder(type_))


def _char_binary(data: bytes) -> bytes:
    if len(data) != 1:
        raise malformed()
    return b"%d" % data[0]


def _char_text(data: bytes) -> bytes:
    octal = _OCTAL_CHAR.fullmatch(data)
    if octal is not None:
        return b"%d" % int(octal[1], 8)
    return _char_binary(data or b"\0")


def _float_texts(name: str) -> tuple[_Text, _Text]:
    single = name == "float4"
    layout = struct.Struct(">f" if single else ">d")
    parse = numbers.parse_float4 if single else numbers.parse_float8
    return (
        lambda data: _go_float(layout.unpack(data)[0], single=single),
        lambda data: _go_float(parse(data), single=single),
    )


def _go_float(value: float, *, single: bool) -> bytes:
    """As Go prints it: the shortest digits that read back as the same; below 1e-4 and from 1e6 on
    with an exponent of at least two digits.
    """
    if math.isnan(value):
        return b"NaN"
    if math.isinf(value):
        return b"+Inf" if value > 0 else b"-Inf"
    number = np.float32(value) if single else np.float64(value)
    written = np.format_float_scientific(number, trim="-", exp_digits=2)
    # By the exponent of the digits, not by the value: float32's 0.0001 is a little less than 1e-4.
    if -4 <= int(written.partition("e")[2]) < 6:
        written = np.format_float_positional(number, trim="-")
    return written.encode("ascii")


def _bool_text(value: JsonValue) -> str:
    return "true" if value else "false"


def _bytea(value: JsonValue) -> bytes:
    return base64.b64decode(str(value))


def _go_time(value: JsonValue) -> str:
    """``2026-01-31 10:20:30.5 +0000 UTC``; the year before 1 is 0000, the one before that -001."""
    match = _TIMESTAMP.fullmatch(str(value))
    if match is None:
        return str(value)  # infinity, -infinity
    digits, day, time, fraction, before_christ = match.groups()
    year = 1 - int(digits) if before_christ else int(digits)
    written = f"-{-year:04d}" if year < 0 else f"{year:04d}"
    seconds = time or "00:00:00"
    rest = (fraction or "").rstrip("0")
    return f"{written}-{day} {seconds}{'.' if rest else ''}{rest} +0000 UTC"


def _go_prefix(value: JsonValue) -> str:
    """The address with its prefix length always; IPv4 in IPv6 with dots."""
    interface = ipaddress.ip_interface(str(value))
    mapped = interface.ip.ipv4_mapped if interface.version == 6 else None
    address = str(interface.ip) if mapped is None else f"::ffff:{mapped}"
    return f"{address}/{interface.network.prefixlen}"


_WRITERS: Final[Mapping[str, Callable[[JsonValue], str | bytes]]] = {
    "bool": _bool_text,
    "bytea": _bytea,
    "date": _go_time,
    "timestamp": _go_time,
    "inet": _go_prefix,
    "cidr": _go_prefix,
}
