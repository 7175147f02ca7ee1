"""Encodes payload columns: from a value's bytes to its entry of the payload map.

An *entry* is length and content of a protobuf map entry (key 1, value 2), all but the tag before
it, which the message around it decides. What is the same in every row of a column (the key, and
with it most of the lengths) is put together once. Common types go from Postgres's bytes to wire
bytes directly; all others by way of their JSON value.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias, cast

from cdc_sync.mapping.column_options import selects
from cdc_sync.mapping.decoding import DecodeOptions, Decoder, NonFiniteCount, malformed
from cdc_sync.mapping.document_wire import encode_document
from cdc_sync.mapping.documents import JSONB_VERSION
from cdc_sync.mapping.plan import ColumnPlan, TablePlan
from cdc_sync.mapping.protobuf import (
    DOUBLE,
    FALSE,
    INTEGER,
    LIST,
    NULL,
    STRING,
    TRUE,
    encode_value,
    map_entry,
    signed_varint,
    varint,
)
from cdc_sync.mapping.strings import uuid_binary
from cdc_sync.mapping.table import PgType, TypeKind
from cdc_sync.mapping.times import timestamp_ascii
from cdc_sync.mapping.values import raw_binary_decoder, raw_text_decoder

#: From a value's bytes to its entry. Raises any of ``decoding.MALFORMED``.
Encoder: TypeAlias = Callable[[bytes], bytes]
#: From an encoded ``Value`` to its entry: key and lengths are put before it.
Frame: TypeAlias = Callable[[bytes], bytes]

#: Entry headers kept by a value's length, a column; longer values get theirs made each time.
_CACHED_HEADERS: Final = 2048
#: Entries of whole values kept a column, and the longest value one is kept of.
_KEPT_ENTRIES: Final = 256
_KEPT_BYTES: Final = 64

_INT32_AT: Final = cast("Callable[[bytes, int], tuple[int]]", struct.Struct(">i").unpack_from)
#: One dimension, no NULLs.
_PLAIN_ARRAY: Final = b"\x00\x00\x00\x01\x00\x00\x00\x00"

_TEXT_TYPES: Final = frozenset({"text", "varchar", "bpchar", "name", "xml"})
_INTEGER_FORMS: Final = {
    "int2": ">h",
    "int4": ">i",
    "int8": ">q",
    "oid": ">I",
}


class FieldEncoder(NamedTuple):
    """The encoders of a payload column, and the entry that NULL becomes (None: left out)."""

    binary: Encoder
    text: Encoder
    null: bytes | None


def compile_field(column: ColumnPlan, plan: TablePlan, count: NonFiniteCount) -> FieldEncoder:
    """Compile a payload column; ``count`` counts NaN and infinities written as null."""
    options = DecodeOptions(selects(plan.numeric_as_string, column.name), count)
    key = str(column.field).encode("utf-8")
    frame = compile_frame(key)
    binary = _fast_encoder(column.type, key, options)
    if binary is None:
        generic = _generic_encoder(raw_binary_decoder(column.type, options), frame)
        binary = _Remembered(generic, count).__getitem__
    text = _generic_encoder(raw_text_decoder(column.type, options), frame)
    null = None if selects(plan.drop_nulls, column.name) else frame(NULL)
    return FieldEncoder(binary, text, null)


def make_entry(name: str, value: bytes) -> bytes:
    """Return the entry of a name and an encoded ``Value``."""
    entry = map_entry(name.encode("utf-8"), value)
    return varint(len(entry)) + entry


def compile_frame(key: bytes) -> Frame:
    """Compile the function that puts key and lengths before an encoded ``Value``."""
    header = _headers(key, b"", with_length=False)

    def frame(value: bytes) -> bytes:
        return header(len(value)) + value

    return frame


def _entry_header(key: bytes, value_length: int) -> bytes:
    """Return what comes before a value: the entry's length, the key, the value's tag and length."""
    before_value = b"\x0a%b%b\x12%b" % (varint(len(key)), key, varint(value_length))
    return varint(len(before_value) + value_length) + before_value


class _Headers(dict[int, bytes]):
    """What comes before a value, by its length."""

    __slots__ = ("_key", "_tag", "_with_length")

    def __init__(self, key: bytes, value_tag: bytes, *, with_length: bool) -> None:
        super().__init__()
        self._key, self._tag, self._with_length = key, value_tag, with_length

    def __missing__(self, length: int) -> bytes:
        before = self._tag + varint(length) if self._with_length else self._tag
        header = _entry_header(self._key, len(before) + length) + before
        if length < _CACHED_HEADERS:
            self[length] = header
        return header


def _headers(key: bytes, value_tag: bytes, *, with_length: bool) -> Callable[[int], bytes]:
    """Return the function from the length of a value to everything before it: the entry's header,
    and the value's own tag, with the length again where the value is length-delimited.
    """
    return _Headers(key, value_tag, with_length=with_length).__getitem__


class _Remembered(dict[bytes, bytes]):
    """An encoder that keeps the entries of short values: of columns that repeat a few.

    Forgets all when it holds too many, so it follows values that change with time, like dates.
    """

    __slots__ = ("_count", "_encode")

    def __init__(self, encode: Encoder, count: NonFiniteCount) -> None:
        super().__init__()
        self._encode, self._count = encode, count

    def __missing__(self, data: bytes) -> bytes:
        before = self._count.value
        entry = self._encode(data)
        # What counts NaN must go on counting it.
        if len(data) <= _KEPT_BYTES and self._count.value == before:
            if len(self) >= _KEPT_ENTRIES:
                self.clear()
            self[data] = entry
        return entry


def _generic_encoder(decode: Decoder, frame: Frame) -> Encoder:
    return lambda data: frame(encode_value(decode(data)))


# -- common types


def _fast_encoder(type_: PgType, key: bytes, options: DecodeOptions) -> Encoder | None:
    """Return the encoder of a common type that skips the JSON value; None for other types."""
    base = type_.base
    if base.kind is TypeKind.ARRAY and base.element is not None and _is_text(base.element.base):
        generic = _generic_encoder(raw_binary_decoder(base, options), compile_frame(key))
        encode = _text_array_encoder(key, generic)
        return _Remembered(encode, options.non_finite).__getitem__
    if _is_text(base):
        return _text_encoder(key)
    if base.kind is not TypeKind.BASE or base.schema != "pg_catalog":
        return None
    if base.name in _INTEGER_FORMS:
        return _integer_encoder(key, _INTEGER_FORMS[base.name])
    if base.name == "bool":
        return _bool_encoder(key)
    if base.name in ("float4", "float8"):
        form = ">f" if base.name == "float4" else ">d"
        return _float_encoder(key, form, options.non_finite)
    if base.name == "uuid":
        return _uuid_encoder(key)
    if base.name in ("timestamp", "timestamptz"):
        return _timestamp_encoder(key)
    if base.name in ("json", "jsonb"):
        # Entries are not kept: documents are seldom equal, and long to compare.
        return _document_encoder(key, binary_jsonb=base.name == "jsonb")
    return None


def _is_text(base: PgType) -> bool:
    if base.kind is TypeKind.ENUM or (base.extension, base.name) == ("citext", "citext"):
        return True
    return base.kind is TypeKind.BASE and base.schema == "pg_catalog" and base.name in _TEXT_TYPES


def _utf8(data: bytes) -> bytes:
    """Return text as it is, with U+FFFD for bytes that are not UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace").encode("utf-8")
    return data


def _text_encoder(key: bytes) -> Encoder:
    header = _headers(key, STRING, with_length=True)

    def encode(data: bytes) -> bytes:
        if not data.isascii():
            data = _utf8(data)
        return header(len(data)) + data

    return encode


def _uuid_encoder(key: bytes) -> Encoder:
    header = _headers(key, STRING, with_length=True)(36)
    return lambda data: header + uuid_binary(data).encode("ascii")


def _integer_encoder(key: bytes, form: str) -> Encoder:
    unpack = struct.Struct(form).unpack
    headers = tuple(_entry_header(key, 1 + length) + INTEGER for length in range(11))

    def encode(data: bytes) -> bytes:
        number = signed_varint(unpack(data)[0])
        return headers[len(number)] + number

    return encode


def _bool_encoder(key: bytes) -> Encoder:
    frame = compile_frame(key)
    entries = {b"\x00": frame(FALSE), b"\x01": frame(TRUE)}
    return entries.__getitem__


def _float_encoder(key: bytes, form: str, count: NonFiniteCount) -> Encoder:
    unpack = struct.Struct(form).unpack
    pack = struct.Struct("<d").pack
    header = _entry_header(key, 9) + DOUBLE
    null = compile_frame(key)(NULL)

    def encode(data: bytes) -> bytes:
        number: float = unpack(data)[0]
        if number - number == 0:  # false for NaN and infinities, and cheaper than a call
            return header + pack(number)
        count.value += 1
        return null

    return encode


def _timestamp_encoder(key: bytes) -> Encoder:
    header = _headers(key, STRING, with_length=True)

    def encode(data: bytes) -> bytes:
        text = timestamp_ascii(data)
        return header(len(text)) + text

    return encode


def _document_encoder(key: bytes, *, binary_jsonb: bool) -> Encoder:
    header = _headers(key, b"", with_length=False)

    def encode(data: bytes) -> bytes:
        value = encode_document(data)
        return header(len(value)) + value

    def encode_jsonb(data: bytes) -> bytes:
        if data[:1] != JSONB_VERSION:
            raise malformed()
        value = encode_document(data[1:])
        return header(len(value)) + value

    return encode_jsonb if binary_jsonb else encode


def _text_array_encoder(key: bytes, generic: Encoder) -> Encoder:
    """Encode arrays of one dimension without NULLs; ``generic`` takes all others, and what is
    malformed.
    """
    header = _headers(key, LIST, with_length=True)
    items = _ListItems().__getitem__

    def encode(data: bytes) -> bytes:
        if data[:8] != _PLAIN_ARRAY:
            return generic(data)
        (count,) = _INT32_AT(data, 12)
        parts = []
        offset, end = 20, len(data)
        for _ in range(min(count, end)):
            (size,) = _INT32_AT(data, offset)
            start = offset + 4
            offset = start + size
            if size < 0 or offset > end:
                return generic(data)
            parts.append(items(data[start:offset]))
        if offset != end or not parts:
            return generic(data)
        content = b"".join(parts)
        return header(len(content)) + content

    return encode


class _ListItems(dict[bytes, bytes]):
    """Strings as elements of a ``ListValue``; keeps short ones, as tags are."""

    def __missing__(self, data: bytes) -> bytes:
        text = data if data.isascii() else _utf8(data)
        value = STRING + varint(len(text)) + text
        item = b"\x0a" + varint(len(value)) + value
        if len(data) <= _KEPT_BYTES:
            if len(self) >= _KEPT_ENTRIES:
                self.clear()
            self[data] = item
        return item
