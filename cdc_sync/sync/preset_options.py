"""Presets of tables: from the setting to options, with what only the database knows."""

from __future__ import annotations

import dataclasses

from cdc_sync.config import TableSettings
from cdc_sync.errors import ConfigError
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.presets import (
    LANGCHAIN_COLLECTION,
    Expansion,
    expand,
    lacks_dimension,
    no_collections,
    vector_column,
)
from cdc_sync.mapping.table import Table
from cdc_sync.postgres.connect import PgConnection
from cdc_sync.postgres.preset_tables import first_dimension, langchain_collection, only_condition


def preset_options(
    connection: PgConnection, table: Table, settings: TableSettings, options: PlanOptions
) -> Expansion:
    """Return the options of a table with what its preset, if it has one, adds.

    Raises :class:`ConfigError` if preset, table and other settings do not fit each other, and
    :class:`SourceError` if the database cannot be asked.
    """
    preset = settings.preset
    name = settings.preset_collection
    if name is not None and preset != "langchain":
        raise ConfigError(
            f"{table.qualified_name}: `preset_collection` is for preset langchain only",
            'Set preset = "langchain", or leave `preset_collection` out.',
        )
    if preset is None:
        return Expansion(options)
    collection = None
    if name is not None:
        if not any(column.name == LANGCHAIN_COLLECTION for column in table.columns):
            raise no_collections(table)
        collection = langchain_collection(connection, table, name)
    found = expand(preset, table, options, collection)
    if not lacks_dimension(preset, table, options):
        return found
    return _with_dimension(connection, table, vector_column(preset), found)


def _with_dimension(
    connection: PgConnection, table: Table, name: str, found: Expansion
) -> Expansion:
    """Take the dimension that the rows have, if there is one; without, the plan is refused."""
    only = found.options.only
    column = next(column for column in table.columns if column.name == name)
    where = "true" if only is None else only_condition(only)
    size = first_dimension(connection, table, column, where)
    if size is None:
        return found
    options = dataclasses.replace(
        found.options, dimensions={**found.options.dimensions, name: size}
    )
    warning = (
        f"{table.qualified_name}: column {name} declares no dimension; it is {size}, as in the "
        f"first row read. Name it, dimensions = {{ {name} = {size} }}, so that it does not depend "
        "on there being rows"
    )
    return Expansion(options, (*found.warnings, warning))
