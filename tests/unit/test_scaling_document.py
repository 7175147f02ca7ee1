"""The SQL in docs/scaling.md is what the program itself uses."""

from __future__ import annotations

import re
from pathlib import Path

from cdc_sync.mapping.table import Column, PgType, Table
from cdc_sync.postgres.shards import shard_filter

_DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_row_filters_of_the_shards() -> None:
    int8 = PgType(oid=20, schema="pg_catalog", name="int8")
    table = Table(
        oid=1,
        schema="public",
        name="docs",
        columns=(Column("id", 1, int8, not_null=True),),
        indexes=(),
        leaves=(),
        primary_key=("id",),
        replica_identity="d",
        identity_columns=("id",),
        partitioned=False,
    )
    found = re.findall(r"WHERE \((.*)\)\n", _DOCUMENT.read_text())
    assert found == [shard_filter(table, ["id"], f"{shard}/4") for shard in (1, 2, 3, 4)]
