"""Rows of a megabyte and more: encoded one at a time, in a thread, and up to a size only.

Encoding such a row can take longer than Postgres waits for a sign of life, and many times its size
in memory (nested JSON becomes an object a value).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from cdc_sync.errors import MappingError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.mapping.wire import WireCodec
from cdc_sync.rows import LARGE_ROW_BYTES, Row

Encoded = TypeVar("Encoded")


class LargeRows:
    """Encodes large rows of one table; ``most`` are the bytes of the largest one that is taken."""

    def __init__(self, plan: TablePlan, most: int) -> None:
        self._plan = plan
        self._most = most
        self._turn = asyncio.Lock()
        self._codec: WireCodec | None = None

    @property
    def non_finite(self) -> int:
        """NaN and infinities written as null so far."""
        return 0 if self._codec is None else self._codec.non_finite

    async def encode(self, row: Row, encode: Callable[[WireCodec], Encoded]) -> Encoded:
        """Run ``encode`` in a thread, with a codec of its own (a codec is for one thread).

        Raises :class:`MappingError` for a row that is too large.
        """
        size = row_bytes(row)
        if size > self._most:
            raise MappingError(
                f"{self._plan.qualified_name}: the row has {size} bytes, more than {self._most} "
                "(qdrant.max_row_bytes)",
                "Raise qdrant.max_row_bytes if there is the memory for it, or leave the column "
                "out.",
            )
        async with self._turn:
            if self._codec is None:
                self._codec = WireCodec(self._plan)
            return await asyncio.to_thread(encode, self._codec)


def row_bytes(row: Row) -> int:
    """Bytes of the row's values as Postgres sent them."""
    return sum([len(value) for value in row if isinstance(value, bytes)])


def is_large(row: Row) -> bool:
    """Whether to encode the row by :class:`LargeRows`."""
    return row_bytes(row) > LARGE_ROW_BYTES
