"""Entries of the reports for people: text that is wrapped, beside a label or with later lines
indented further."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdc_sync.sync.findings import Finding

#: Columns of a label, and of a line.
LABEL = 14
WIDTH = 100


def entry(label: str, text: str, indent: str = "") -> Iterator[str]:
    """``label    text``, more lines of text below each other."""
    margin = " " * (LABEL + len(indent))
    wrapped = textwrap.wrap(
        text, WIDTH - len(margin), break_long_words=False, break_on_hyphens=False
    )
    for number, line in enumerate(wrapped or [""]):
        yield f"{indent}{label:<{LABEL}}{line}" if number == 0 else f"{margin}{line}"


def finding_entry(finding: Finding) -> Iterator[str]:
    """A finding under its severity, and what to do about it."""
    yield from entry(finding.severity, f"{finding.subject}: {finding.message}")
    if finding.remedy:
        # Left-aligned under each other, so that SQL can be copied as it is.
        yield textwrap.indent(finding.remedy, " " * LABEL)


def hanging(text: str, indent: str, width: int = WIDTH) -> list[str]:
    """Lines of a text; those after the first are indented by two more columns."""
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False
    )
