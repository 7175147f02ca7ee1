"""Readers of tuples, made for the columns of one table.

A tuple is read column by column: what kind of value, how long, its bytes. Most rows of a table look
alike, so a function is written for them (as Python source, see :func:`reader_source`) in which the
loop is unrolled and neighbouring headers and values of fixed size are unpacked at once: half the
time of the loop. It returns None for a tuple that looks otherwise, or is cut short: whoever called
it then reads the tuple by the loop, which is also the one to say what is wrong with it.

For ``(id int8, title text, views int4)`` in pgoutput's format, all three of them sent in binary::

    def read(frame, at):
        head0, value0, kind1, size1 = unpack0(frame, at)  # ">7s8sBI"
        at += 20
        if head0 != literal0 or kind1 != 98:
            return None
        ...
        return [value0, value1, value2], at
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final, TypeAlias, cast

from cdc_sync.rows import UNCHANGED, RawValue, Row

#: From the bytes and where the tuple begins to the row and where it ends; None: it looks otherwise,
#: or the bytes end before it does. What follows the tuple does not matter.
TupleReader: TypeAlias = Callable[[bytes, int], "tuple[Row, int] | None"]

#: Kinds of values: binary of any size, NULL, UNCHANGED; a positive number is binary of so many
#: bytes.
ANY_SIZE: Final = 0
NULL: Final = -1
UNCHANGED_VALUE: Final = -2

#: Sizes of built-in types' binary formats that never vary, by type OID (pg_type.dat).
FIXED_SIZES: Final = {
    16: 1,  # bool
    20: 8,  # int8
    21: 2,  # int2
    23: 4,  # int4
    26: 4,  # oid
    700: 4,  # float4
    701: 8,  # float8
    1082: 4,  # date
    1083: 8,  # time
    1114: 8,  # timestamp
    1184: 8,  # timestamptz
    2950: 16,  # uuid
}

_BINARY_KIND: Final = ord("b")
_KIND_BYTES: Final = {NULL: b"n", UNCHANGED_VALUE: b"u"}
_NULL_SIZE: Final = struct.pack(">i", -1)
#: A table with more columns is read by the loop.
_MOST_COLUMNS: Final = 256
#: Readers kept a relation, and how many tuples must look otherwise before another one is taken.
_MOST_SHAPES: Final = 8
_MISSES: Final = 8
#: Rows of a COPY that tell how its rows look, and the longest value that may be of fixed size.
_SAMPLE_ROWS: Final = 64
_MOST_FIXED_BYTES: Final = 1 << 16


def compile_reader(columns: Sequence[int], *, kinds: bool) -> TupleReader | None:
    """Make the reader of tuples with such values, one a column.

    ``kinds``: pgoutput's TupleData, which has a byte before every value that tells its kind; else
    binary COPY's, where a size of -1 is NULL. Both begin with the number of columns. None for too
    many columns.
    """
    if not 0 < len(columns) <= _MOST_COLUMNS:
        return None
    source, names = reader_source(columns, kinds=kinds)
    exec(compile(source, "<tuple reader>", "exec"), names)
    return cast("TupleReader", names["read"])


def reader_source(columns: Sequence[int], *, kinds: bool) -> tuple[str, dict[str, object]]:
    """The source of a reader, and what it refers to by name."""
    writer = _SourceWriter()
    writer.literal(struct.pack(">H", len(columns)))
    for kind in columns:
        if kind > 0:
            writer.literal((b"b" if kinds else b"") + struct.pack(">I", kind))
            writer.fixed(kind)
        elif kind == ANY_SIZE:
            writer.sized(kind_byte=kinds)
        else:
            writer.literal(_KIND_BYTES[kind] if kinds else _NULL_SIZE)
            writer.values.append("None" if kind == NULL else "UNCHANGED")
    writer.flush()
    body = "\n".join(f"        {line}" for line in writer.lines)
    source = (
        "def read(frame, at):\n"
        "    try:\n"
        f"{body}\n"
        "    except error:\n"
        "        return None\n"
        # Sizes are not negative, so this shows whether any value went beyond the end.
        "    if at > len(frame):\n"
        "        return None\n"
        f"    return [{', '.join(writer.values)}], at\n"
    )
    return source, {"error": struct.error, "UNCHANGED": UNCHANGED, **writer.names}


class AdaptiveReader:
    """Reads tuples of one relation as the last ones looked that it was told of. Not for COPY.

    ``type_oids`` are the columns' types, as the Relation message has them.
    """

    __slots__ = ("_known", "_misses", "_shape", "_sizes", "read")

    def __init__(self, type_oids: Sequence[int]) -> None:
        self._sizes = [FIXED_SIZES.get(oid, ANY_SIZE) for oid in type_oids]
        self._known: dict[tuple[int, ...], TupleReader] = {}
        self._shape: tuple[int, ...] = ()
        self._misses = 0
        self.read: TupleReader = _read_nothing

    def learn(self, row: Row) -> bool:
        """Tell it how a tuple looked that :attr:`read` has returned None for. False: such a tuple
        is none of the relation's.

        It changes over when that has happened often enough not to be an exception.
        """
        if len(row) != len(self._sizes):
            return False
        self._misses += 1
        if self._shape and self._misses < _MISSES:
            return True
        self._misses = 0
        shape = self._shape_of(row)
        if shape in self._known:
            self._shape, self.read = shape, self._known[shape]
        elif shape and len(self._known) < _MOST_SHAPES:
            reader = compile_reader(shape, kinds=True) or _read_nothing
            self._shape, self.read = shape, reader
            self._known[shape] = reader
        return True

    def _shape_of(self, row: Row) -> tuple[int, ...]:
        """How the row looks; nothing where it has values in text format."""
        shape = []
        for value, size in zip(row, self._sizes, strict=True):
            if value is None:
                shape.append(NULL)
            elif value is UNCHANGED:
                shape.append(UNCHANGED_VALUE)
            elif type(value) is bytes:
                # A type of one size may have another one, if its OID is not what it seems.
                shape.append(size if len(value) == size else ANY_SIZE)
            else:
                return ()
        return tuple(shape)


class ObservedReader:
    """Reads rows of one binary COPY as the last ones looked that it was shown."""

    __slots__ = ("_shapes", "read")

    def __init__(self) -> None:
        self._shapes: set[tuple[int, ...]] = set()
        self.read: TupleReader = _read_nothing

    def learn(self, rows: Sequence[Row], misses: int) -> None:
        """Show it rows that were read, of which :attr:`read` could not read so many."""
        if misses < _MISSES or misses * 4 < len(rows):
            return
        sample = rows[-_SAMPLE_ROWS:]
        shape = tuple(_common_kind(values) for values in zip(*sample, strict=True))
        self._shapes.add(shape)
        many = len(self._shapes) > _MOST_SHAPES
        # Rows that keep looking otherwise are read by the loop alone.
        self.read = _read_nothing if many else (compile_copy_reader(shape) or _read_nothing)


def _common_kind(values: Sequence[RawValue]) -> int:
    """What most of the values of a column are."""
    sizes = {len(value) for value in values if isinstance(value, bytes)}
    if 2 * values.count(None) > len(values):
        return NULL
    size = sizes.pop()
    return size if not sizes and size <= _MOST_FIXED_BYTES else ANY_SIZE


@lru_cache(maxsize=64)
def compile_copy_reader(columns: tuple[int, ...]) -> TupleReader | None:
    """:func:`compile_reader` for COPY; a table is copied in many chunks, each by a COPY."""
    return compile_reader(columns, kinds=False)


def _read_nothing(_frame: bytes, _at: int) -> None:
    return None


class _SourceWriter:
    """Collects fields that one ``unpack`` reads, up to a value whose size must be known first."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.names: dict[str, object] = {}
        self.values: list[str] = []
        self._pending = b""
        self._format = ">"
        self._targets: list[str] = []
        self._checks: list[str] = []

    def literal(self, data: bytes) -> None:
        """Bytes that must be exactly these."""
        self._pending += data

    def fixed(self, size: int) -> None:
        """A value of so many bytes."""
        self._write_literal()
        self._format += f"{size}s"
        name = f"value{len(self.values)}"
        self._targets.append(name)
        self.values.append(name)

    def sized(self, *, kind_byte: bool) -> None:
        """A value with its size before it."""
        number = len(self.values)
        self._write_literal()
        if kind_byte:
            self._format += "B"
            self._targets.append(f"kind{number}")
            self._checks.append(f"kind{number} != {_BINARY_KIND}")
        self._format += "I"
        self._targets.append(f"size{number}")
        self.flush()
        self.lines += [f"start, at = at, at + size{number}", f"value{number} = frame[start:at]"]
        self.values.append(f"value{number}")

    def flush(self) -> None:
        """Read what has been collected."""
        self._write_literal()
        if not self._targets:
            return
        layout = struct.Struct(self._format)
        unpack = f"unpack{len(self.names)}"
        self.names[unpack] = layout.unpack_from
        targets = ", ".join(self._targets) + ("," if len(self._targets) == 1 else "")
        self.lines.append(f"{targets} = {unpack}(frame, at)")
        self.lines.append(f"at += {layout.size}")
        if self._checks:
            self.lines += [f"if {' or '.join(self._checks)}:", "    return None"]
        self._format, self._targets, self._checks = ">", [], []

    def _write_literal(self) -> None:
        if not self._pending:
            return
        name, head = f"literal{len(self.names)}", f"head{len(self.names)}"
        self.names[name] = self._pending
        self._format += f"{len(self._pending)}s"
        self._targets.append(head)
        self._checks.append(f"{head} != {name}")
        self._pending = b""
