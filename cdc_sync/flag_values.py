"""Values of flags that describe a table: lists of columns, and metrics by column."""

from __future__ import annotations

import csv
import re

from cdc_sync.errors import ConfigError


def table_flag_value(name: str, value: object, configured: object) -> object:
    """The setting that a flag of a table gives; ``configured`` is what it adds to or replaces.

    Raises :class:`ConfigError` for what is not written as the flag wants it.
    """
    if name in ("pg.key-column", "pg.columns"):
        return _comma_list(name, value)
    if name == "qdrant.distance-metric":
        metrics = _metric_pairs(value)
        return {**configured, **metrics} if isinstance(configured, dict) else metrics
    return value


def _comma_list(name: str, value: object) -> list[str]:
    r"""``a,b`` as a list; a name with a comma is written in double quotes, as in SQL, or with
    ``\,``."""
    texts = [value] if isinstance(value, str) else value
    assert isinstance(texts, list | tuple)
    # A backslash is itself except before a comma.
    escaped = [re.sub(r"\\(?!,)", r"\\\\", text) for text in texts]
    rows = csv.reader(escaped, skipinitialspace=True, strict=True, escapechar="\\")
    try:
        items = [item.strip() for row in rows for item in row]
    except csv.Error:
        items = []
    if not items or not all(items):
        raise ConfigError(
            f"--{name}: expected column names separated by commas.", f"Write --{name} id,title"
        )
    return items


def _metric_pairs(value: object) -> dict[str, str]:
    metrics: dict[str, str] = {}
    texts = [value] if isinstance(value, str) else value
    assert isinstance(texts, list | tuple)
    pairs = [pair for text in texts for pair in text.split(";") if pair.strip()]
    for item in _comma_list("qdrant.distance-metric", pairs):
        column, equals, metric = item.rpartition("=")
        if not equals or not column.strip() or not metric.strip():
            raise ConfigError(
                "--qdrant.distance-metric: expected column=metric.",
                "Write --qdrant.distance-metric embedding=cosine "
                "(or euclid, dot, manhattan); repeat it for more columns, or write a=dot;b=cosine.",
            )
        metrics[column.strip()] = metric.strip().lower()
    return metrics
