"""Shards: a row filter that gives each of n pipelines its part of a table, by a hash of the key.

The hash is that of Postgres's own hash partitioning: extended hash functions of the key's types,
which must stay as they are from version to version, since partitions lie on disk by them, and which
are equal for equal keys. All of them are built in and immutable, as a publication's row filter
requires, and their result depends neither on settings nor on the order of columns.

Source: PostgreSQL documentation, "Logical Replication", Row Filters; ``src/include/catalog/
pg_proc.dat`` of 15 to 18.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cdc_sync.errors import ConfigError
from cdc_sync.mapping.table import Column, PgType, Table, TypeKind
from cdc_sync.postgres.identifiers import quote_ident

#: Shards a table can have, at most.
MAX_SHARDS: Final = 1024

_INTEGERS: Final = "pg_catalog.hashint8extended({}::pg_catalog.int8, {})"
_BYTES: Final = "pg_catalog.hashtextextended(pg_catalog.encode({}, 'hex'), {})"
#: The hash of a column by the name of its type: {} are the column and a seed.
_HASHES: Final[dict[str, str]] = {
    "int2": _INTEGERS,
    "int4": _INTEGERS,
    "int8": _INTEGERS,
    "bool": "pg_catalog.hashint4extended({}::pg_catalog.int4, {})",
    "oid": "pg_catalog.hashoidextended({}, {})",
    "uuid": "pg_catalog.uuid_hash_extended({}, {})",
    "text": "pg_catalog.hashtextextended({}, {})",
    "varchar": "pg_catalog.hashtextextended({}::pg_catalog.text, {})",
    "bpchar": "pg_catalog.hashbpcharextended({}, {})",
    "name": "pg_catalog.hashnameextended({}, {})",
    "char": "pg_catalog.hashcharextended({}, {})",
    "numeric": "pg_catalog.hash_numeric_extended({}, {})",
    "float4": "pg_catalog.hashfloat4extended({}, {})",
    "float8": "pg_catalog.hashfloat8extended({}, {})",
    "timestamp": "pg_catalog.timestamp_hash_extended({}, {})",
    "time": "pg_catalog.time_hash_extended({}, {})",
    "timetz": "pg_catalog.timetz_hash_extended({}, {})",
    "interval": "pg_catalog.interval_hash_extended({}, {})",
    "inet": "pg_catalog.hashinetextended({}, {})",
    "cidr": "pg_catalog.hashinetextended({}, {})",
    "macaddr": "pg_catalog.hashmacaddrextended({}, {})",
    "macaddr8": "pg_catalog.hashmacaddr8extended({}, {})",
    "pg_lsn": "pg_catalog.pg_lsn_hash_extended({}, {})",
    # Without a hash function that SQL can call on 15: equal values have equal bytes.
    "date": _BYTES.format("pg_catalog.date_send({})", "{}"),
    "timestamptz": _BYTES.format("pg_catalog.timestamptz_send({})", "{}"),
    "money": _BYTES.format("pg_catalog.cash_send({})", "{}"),
    "xid8": _BYTES.format("pg_catalog.xid8send({})", "{}"),
    "bit": _BYTES.format("pg_catalog.bit_send({})", "{}"),
    "varbit": _BYTES.format("pg_catalog.varbit_send({})", "{}"),
    "bytea": _BYTES,
}


def parse_shard(text: str) -> tuple[int, int]:
    """Return which shard of how many "i/n" is. Raises :class:`ConfigError` unless 1 <= i <= n."""
    index, _, count = text.partition("/")
    numbers = (int(index), int(count)) if index.isdecimal() and count.isdecimal() else (0, 0)
    if not 1 <= numbers[0] <= numbers[1] <= MAX_SHARDS:
        raise ConfigError(
            f"pipeline.shard {text!r} is not one of 1/n to n/n, n being {MAX_SHARDS} at most",
            'Write it as "1/4", and give each of the four pipelines its own.',
        )
    return numbers


def shard_filter(table: Table, key: Sequence[str], shard: str) -> str:
    """Return the row filter of a shard, as SQL: true for the rows of shard i of n by their key.

    Each row is in exactly one shard, and rows with equal keys are in the same. NULL counts as a
    value. Raises :class:`ConfigError` for a shard that is none, and for a key without a column by
    which row filters can tell rows apart (enumerations, domains, types of extensions).
    """
    index, count = parse_shard(shard)
    columns = {column.name: column for column in table.columns}
    hashes = [
        text for seed, name in enumerate(key) if (text := _hash(columns[name], seed)) is not None
    ]
    if not hashes:
        raise ConfigError(
            f"{table.qualified_name}: its rows cannot be told apart for pipeline.shard: no key "
            f"column ({', '.join(key)}) is of a built-in type, and row filters take no other",
            "Take another unique key with `key`, or keep the table in a pipeline without shards.",
        )
    # The sign is cut off, since the remainder of a negative number is negative.
    mixed = " # ".join(hashes)
    return f"(({mixed}) & 9223372036854775807) % {count} = {index - 1}"


def _hash(column: Column, seed: int) -> str | None:
    # A domain is a type of its own to a row filter.
    if not _built_in(column.type) or column.type.name not in _HASHES:
        return None
    value = _HASHES[column.type.name].format(quote_ident(column.name), seed)
    return value if column.not_null else f"coalesce({value}, {seed})"


def _built_in(type_: PgType) -> bool:
    return type_.kind is TypeKind.BASE and type_.extension is None and type_.schema == "pg_catalog"
