"""From points back to the keys of their rows.

Ids that are the key itself say it. Where an id is a hash, the key's columns stand in the payload;
they are believed only if the id is their hash. What is left is found, or not, by computing the ids
of all rows once, under one snapshot.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias

from cdc_sync.errors import MappingError
from cdc_sync.mapping.ids import compile_key_id, compile_point_id
from cdc_sync.mapping.key_values import key_values_of_id
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.key_texts import KeyTextError, parse_keys
from cdc_sync.postgres.snapshot import copy_rows, key_query
from cdc_sync.qdrant.sink import RetrievedPoint
from cdc_sync.rows import PointId, RawValue, Row
from cdc_sync.sync.routing import PlannedTable
from cdc_sync.verify.source import SourceReader, patiently

#: The raw values of a key, in key order.
RawKey: TypeAlias = tuple[RawValue, ...]

_SCAN_ROWS: Final = 8192


class KeyFinder:
    """Finds the keys of a table's points."""

    def __init__(self, planned: PlannedTable, reader: SourceReader) -> None:
        self._planned = planned
        self._reader = reader
        self._point_id = compile_point_id(planned.plan)
        self._key_id = compile_key_id(planned.plan)

    async def find(self, points: Collection[RetrievedPoint]) -> dict[PointId, RawKey]:
        """The keys that points have or had; none for those that no row of the table has made.
        Raises :class:`SourceError`."""
        if not points:
            return {}
        found = await self.told(points)
        left = {point.id for point in points} - found.keys()
        if left:
            found |= await patiently(lambda: self._reader.run(lambda c: self._scan(c, left)))
        return found

    async def told(self, points: Collection[RetrievedPoint]) -> dict[PointId, RawKey]:
        """The keys that points tell by themselves, be there rows or not. Raises
        :class:`SourceError`."""
        texts = {point.id: key_texts(self._planned.plan, point) for point in points}
        return await self.parse({id_: key for id_, key in texts.items() if key is not None})

    async def parse(self, texts: Mapping[PointId, tuple[str, ...]]) -> dict[PointId, RawKey]:
        """Read keys of texts; those are left out that are no keys, or of other points. Raises
        :class:`SourceError`."""
        return await patiently(lambda: self._reader.run(lambda c: self._parse(c, texts)))

    def _parse(
        self, connection: PgConnection, texts: Mapping[PointId, tuple[str, ...]]
    ) -> dict[PointId, RawKey]:
        found: dict[PointId, RawKey] = {}
        for key in _parse(connection, self._planned.plan, list(texts.values())):
            try:
                id_ = self._key_id(list(key))
            except MappingError:
                continue
            if id_ in texts:
                found[id_] = key
        return found

    def _scan(self, connection: PgConnection, ids: Collection[PointId]) -> dict[PointId, RawKey]:
        """The keys of the rows that have these ids."""
        found: dict[PointId, RawKey] = {}
        for row in self._all_keys(connection):
            try:
                id_ = self._key_id(row)
            except MappingError:
                continue
            if id_ in ids:
                found[id_] = tuple(row)
        return found

    def _all_keys(self, connection: PgConnection) -> Iterator[Row]:
        for leaf in self._planned.table.leaves:
            query, text = key_query(self._planned.plan, leaf, self._planned.selection)
            for batch in copy_rows(connection, query, text, batch_rows=_SCAN_ROWS):
                yield from batch


def _parse(
    connection: PgConnection, plan: TablePlan, texts: Sequence[tuple[str, ...]]
) -> Iterable[tuple[bytes, ...]]:
    """Parse keys, and leave out those that are none."""
    if not texts:
        return
    columns = [plan.columns[position] for position in plan.key]
    try:
        yield from parse_keys(connection, columns, texts)
    except KeyTextError:
        if len(texts) > 1:
            half = len(texts) // 2
            yield from _parse(connection, plan, texts[:half])
            yield from _parse(connection, plan, texts[half:])


def key_texts(plan: TablePlan, point: RetrievedPoint) -> tuple[str, ...] | None:
    """The key of a point's row as texts, by its id or else by its payload; None if neither has
    it."""
    values = key_values_of_id(plan, str(point.id))
    if values is not None:
        return values
    fields: object = point.payload
    if plan.payload_key is not None:
        fields = point.payload.get(plan.payload_key)
    if not isinstance(fields, dict):
        return None
    texts = []
    for position in plan.key:
        column = plan.columns[position]
        if column.field is None or column.part is not None:
            return None
        text = _text(fields.get(column.field), column.type.base.name)
        if text is None:
            return None
        texts.append(text)
    return tuple(texts)


def _text(value: object, type_name: str) -> str | None:
    """A key's payload value as text that Postgres reads."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str) or "\0" in value:
        return None
    if type_name == "bytea":
        try:
            return "\\x" + base64.b64decode(value, validate=True).hex()
        except binascii.Error:
            return None
    return value
