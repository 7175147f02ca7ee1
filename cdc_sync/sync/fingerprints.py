"""Fingerprints: by what configuration, plan and definition of its table a collection was filled."""

from __future__ import annotations

import hashlib
from typing import Final

from cdc_sync.mapping.column_options import present_options
from cdc_sync.mapping.ids import plan_fingerprint
from cdc_sync.mapping.planner import key_family
from cdc_sync.mapping.table import redefined
from cdc_sync.sync.routing import PlannedTable

_OPTIONS_DIGITS: Final = 16
_KEY_DIGITS: Final = 8


def fingerprint(planned: PlannedTable) -> str:
    """``configuration:plan:definition``: by what a collection was filled."""
    return f"{_configuration(planned)}:{plan_fingerprint(planned.plan)}:{planned.table.definition}"


def stale_fingerprint(planned: PlannedTable) -> str:
    """The fingerprint of a collection that must be filled again: no plan gives it."""
    return f"{_configuration(planned)}:stale:"


def is_recorded_stale(recorded: str) -> bool:
    """Whether the record itself says that the collection must be filled again."""
    return recorded == as_stale(recorded)


def as_stale(recorded: str) -> str:
    """A fingerprint on record, as that of a collection that must be filled again."""
    return f"{recorded.partition(':')[0]}:stale:"


def is_stale(recorded: str, planned: PlannedTable) -> bool:
    """Whether a collection with this fingerprint is not as the table now is."""
    plan, _, definition = recorded.partition(":")[2].partition(":")
    return plan != plan_fingerprint(planned.plan) or redefined(definition, planned.table.definition)


def recorded_definition(recorded: str) -> str:
    """The table's definition when the fingerprint was made; empty where it says that all must be
    filled again."""
    return recorded.partition(":")[2].partition(":")[2]


def as_defined(recorded: str, definition: str) -> str:
    """A fingerprint on record, as that of a table with another definition; one that says that all
    must be filled again stays as it is."""
    if is_recorded_stale(recorded):
        return recorded
    configuration, plan, _ = recorded.split(":", 2)
    return f"{configuration}:{plan}:{definition}"


def same_configuration(one: str, other: str) -> bool:
    """Whether two fingerprints differ at most in the table."""
    return one.partition(":")[0] == other.partition(":")[0]


def same_options(one: str, other: str) -> bool:
    """Whether two fingerprints were made by the same settings, be the keys the same or not."""
    return one[:_OPTIONS_DIGITS] == other[:_OPTIONS_DIGITS]


def _configuration(planned: PlannedTable) -> str:
    """What must stay for the points to keep their ids and their form: digests of options and
    key."""
    plan = planned.plan
    key = [(plan.columns[i].name, key_family(plan.columns[i].type)) for i in plan.key]
    # Without columns that are gone, so that they can be taken out of the configuration.
    options = repr(present_options(planned.table, planned.options))
    return _digest(options)[:_OPTIONS_DIGITS] + _digest(repr(key))[:_KEY_DIGITS]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
