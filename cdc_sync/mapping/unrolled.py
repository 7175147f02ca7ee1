"""The encoder of a row's payload columns, written for one table.

As Python source in which the loop over the columns is unrolled: for ``(title text, views int4)`` of
``(id int8, title text, views int4)``::

    def entries(row, head):
        try:
            value0, value1, value2 = row
            return [
                head,
                binary1(value1) if type(value1) is bytes else null1 if value1 is None else other(),
                ...
            ]
        except malformed:
            return None

It knows values in binary and NULL; for a row that has others, or is malformed, it returns None, and
the loop encodes it or says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias, cast

from cdc_sync.mapping.decoding import MALFORMED, malformed
from cdc_sync.mapping.entries import Encoder
from cdc_sync.rows import Row

#: From a row, and what shall stand in front, to that and the entries of its payload.
RowEncoder: TypeAlias = Callable[[Row, bytes], "list[bytes] | None"]
#: A payload column: its position, its encoder, and the entry that NULL becomes (None: left out).
RowField: TypeAlias = tuple[int, Encoder, "bytes | None"]

#: A table with more columns is encoded by the loop.
_MOST_COLUMNS: Final = 256


def compile_row(
    width: int, fields: Sequence[RowField], constants: Sequence[bytes]
) -> RowEncoder | None:
    """Compile the encoder of rows of so many columns; ``constants`` are entries of every row. None:
    of such a table rows are encoded by the loop.
    """
    if not fields or width > _MOST_COLUMNS or any(null is None for _, _, null in fields):
        return None
    source, names = row_source(width, fields, constants)
    exec(compile(source, "<row encoder>", "exec"), names)
    return cast("RowEncoder", names["entries"])


def row_source(
    width: int, fields: Sequence[RowField], constants: Sequence[bytes]
) -> tuple[str, dict[str, object]]:
    """The source of an encoder, and what it refers to by name."""
    values = ", ".join(f"value{position}" for position in range(width))
    names: dict[str, object] = {"malformed": MALFORMED, "other": _other}
    lines = []
    for position, binary, null in fields:
        names[f"binary{position}"], names[f"null{position}"] = binary, null
        value = f"value{position}"
        lines.append(
            f"            binary{position}({value}) if type({value}) is bytes"
            f" else null{position} if {value} is None else other(),\n"
        )
    for number, constant in enumerate(constants):
        names[f"constant{number}"] = constant
        lines.append(f"            constant{number},\n")
    source = (
        "def entries(row, head):\n"
        "    try:\n"
        f"        {values}, = row\n"
        "        return [\n"
        "            head,\n"
        f"{''.join(lines)}"
        "        ]\n"
        "    except malformed:\n"
        "        return None\n"
    )
    return source, names


def _other() -> bytes:
    raise malformed()
