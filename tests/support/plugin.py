"""The pytest plugin of this repository: loads the fixture modules."""

from __future__ import annotations

pytest_plugins = [
    "tests.support.fix_postgres",
    "tests.support.fix_qdrant",
    "tests.support.fix_pipeline",
    "tests.support.fix_cli",
    "tests.support.fix_libraries",
    "tests.support.fix_campaign",
]
