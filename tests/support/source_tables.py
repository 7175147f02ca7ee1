"""For tests of the Postgres side: settings of a source, plans that take columns as they are."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import SecretStr

from cdc_sync.config import SourceSettings
from cdc_sync.mapping.plan import ColumnPlan, IdScheme, TablePlan
from cdc_sync.mapping.table import Table
from cdc_sync.postgres.catalog import find_table
from cdc_sync.postgres.connect import connect
from tests.support.fix_postgres import Database


def source_settings(url: str, **settings: object) -> SourceSettings:
    """Settings of a pipeline's source at this URL."""
    return SourceSettings.model_validate({"url": SecretStr(url), **settings})


def find(database: Database, name: str) -> Table:
    """A table as the catalog has it, by a name as in the configuration."""
    with connect(source_settings(database.url)) as connection:
        return find_table(connection, name)


def raw_plan(table: Table, columns: Sequence[str] | None = None) -> TablePlan:
    """A plan that takes the columns (all) as they are, keyed by the table's primary key."""
    names = [column.name for column in table.columns] if columns is None else list(columns)
    types = {column.name: column.type for column in table.columns}
    return TablePlan(
        oid=table.oid,
        schema=table.schema,
        table=table.name,
        collection=table.name,
        columns=tuple(ColumnPlan(name, types[name], field=name) for name in names),
        key=tuple(names.index(name) for name in table.primary_key),
        id_scheme=IdScheme.HASHED,
    )
