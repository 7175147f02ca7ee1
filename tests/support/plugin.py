"""The pytest plugin of this repository: loads the fixture modules, and has the longest tests begin
first, so that no process is left alone with one of them in the end."""

from __future__ import annotations

import pytest

pytest_plugins = [
    "tests.support.fix_postgres",
    "tests.support.fix_qdrant",
    "tests.support.fix_pipeline",
    "tests.support.fix_windows",
    "tests.support.fix_schema",
    "tests.support.fix_cli",
    "tests.support.fix_libraries",
    "tests.support.fix_campaign",
]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """After the order was made random: those that say how long they take, longest first."""
    items.sort(key=_seconds, reverse=True)


def _seconds(item: pytest.Item) -> float:
    marker = item.get_closest_marker("slow")
    return 0.0 if marker is None else float(marker.kwargs.get("seconds", 0))
