"""Slots of rebuilds: how they are called, and which there are.

Nobody reads the slot of a rebuild that was stopped half way, and Postgres keeps WAL for it like for
any other; so the pipeline of the table looks after it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Final

from cdc_sync.config import Settings
from cdc_sync.ops.attention import RebuildSlot
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.watch import slots_beginning

_DIGITS: Final = 8
_SLOT_CHARACTERS: Final = 63
_NAME_CHARACTERS: Final = 64
_ROOM: Final = _SLOT_CHARACTERS - len("_rebuild_") - _DIGITS


def worker_names(settings: Settings, table: str) -> tuple[str, str]:
    """The name and the slot of the pipeline that rebuilds a table (``schema.table``)."""
    name = settings.pipeline.name
    digest = hashlib.sha256(f"{name}\n{table}".encode()).hexdigest()[:_DIGITS]
    worker = f"{name[: _NAME_CHARACTERS - len('.rebuild.') - _DIGITS]}.rebuild.{digest}"
    return worker, f"{_prefix(settings)}{digest}"


def _prefix(settings: Settings) -> str:
    return f"{settings.source.slot[:_ROOM]}_rebuild_"


def rebuild_slots(
    connection: PgConnection, settings: Settings, tables: Iterable[str]
) -> list[RebuildSlot]:
    """The slots of the pipeline's rebuilds. ``tables``: its tables, as ``schema.table``; a rebuild
    of another, which has left the pipeline since, has none. Raises :class:`SourceError`."""
    prefix = _prefix(settings)
    by_slot = {worker_names(settings, table)[1]: table for table in tables}
    # Of a name that was cut off, another pipeline may have the same beginning.
    whole = len(settings.source.slot) <= _ROOM
    return [
        RebuildSlot(slot.name, by_slot.get(slot.name), slot.in_use, slot.retained_bytes)
        for slot in slots_beginning(connection, prefix)
        if re.fullmatch(f"[0-9a-f]{{{_DIGITS}}}", slot.name.removeprefix(prefix))
        and (whole or slot.name in by_slot)
    ]
