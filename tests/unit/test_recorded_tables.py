"""Tables on record and their names in the configuration."""

from __future__ import annotations

import pytest

from cdc_sync.qdrant.sink import TableState
from cdc_sync.sync.fingerprints import as_stale, is_recorded_stale, same_configuration, same_options
from cdc_sync.sync.planning import is_named, recorded_as


@pytest.mark.parametrize(
    ("configured", "name", "named"),
    [
        ("docs", "public.docs", True),
        ("docs", "app.docs", True),
        ("public.docs", "public.docs", True),
        ("public.docs", "app.docs", False),
        ("shop.public.docs", "public.docs", True),
        ('"Docs"', "public.Docs", True),
        ("Docs", "public.Docs", True),
        ("Docs", "public.docs", True),
        ("DOCS", "public.Docs", False),
        ("app.docs", "public.app", False),
        ('app."my.docs"', "app.my.docs", True),
        ("my-docs", "public.my-docs", True),
        ("doc", "public.docs", False),
    ],
)
def test_a_name_in_the_configuration(configured: str, name: str, named: bool) -> None:
    assert is_named(configured, name) is named


def test_a_short_name_of_two_tables_tells_neither() -> None:
    known = [TableState("public.docs", "a", "x"), TableState("app.docs", "b", "y")]
    assert recorded_as("docs", known) is None
    assert recorded_as("app.docs", known) is known[1]
    assert recorded_as("docs", known[:1]) is known[0]
    assert recorded_as("others", known) is None


def test_fingerprints_tell_settings_from_keys() -> None:
    one = "0123456789abcdef" + "11111111" + ":plan:definition"
    other_key = "0123456789abcdef" + "22222222" + ":plan:definition"
    other_options = "fedcba9876543210" + "11111111" + ":plan:definition"
    assert same_options(one, other_key)
    assert not same_configuration(one, other_key)
    assert not same_options(one, other_options)
    assert same_configuration(one, as_stale(one))
    assert is_recorded_stale(as_stale(one))
    assert not is_recorded_stale(one)
