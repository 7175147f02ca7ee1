"""Figures, their targets, and verdicts."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from tests.bench.rounds import Median


class Verdict(StrEnum):
    """What became of a target. ``UNTESTED``: the machine does not allow it, or something that it
    needs is not there; the figure's note says which."""

    MET = "met"
    MISSED = "missed"
    UNTESTED = "untested"
    NONE = ""


@dataclass(frozen=True, slots=True)
class Target:
    """A bound that a value must keep."""

    sense: Literal[">=", "<="]
    bound: float

    def met(self, value: float) -> bool:
        """Whether the value keeps the bound, exactly reached counting as kept."""
        return value >= self.bound if self.sense == ">=" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.sense} {number(self.bound)}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report.

    ``name`` is stable, for comparisons between runs; ``relative``: it is a ratio of what was
    measured in the same run, which another day should not change. ``facts``: what it was computed
    from, for the JSON.
    """

    name: str
    title: str
    unit: str
    value: Median | None
    target: Target | None = None
    note: str = ""
    relative: bool = False
    untested: bool = False
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """By the median."""
        if self.target is None:
            return Verdict.NONE
        if self.value is None or self.untested:
            return Verdict.UNTESTED
        return Verdict.MET if self.target.met(self.value.value) else Verdict.MISSED

    def to_json(self) -> dict[str, object]:
        """As the JSON report holds it."""
        value = self.value
        return {
            "name": self.name,
            "title": self.title,
            "unit": self.unit,
            "value": None if value is None else round(value.value, 4),
            "least": None if value is None else round(value.least, 4),
            "most": None if value is None else round(value.most, 4),
            "target": None if self.target is None else str(self.target),
            "verdict": str(self.verdict),
            "relative": self.relative,
            "note": self.note,
            "facts": {name: round(fact, 4) for name, fact in self.facts.items()},
        }


def number(value: float) -> str:
    """With three digits that count, and thousands set apart."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if value == round(value):
        return f"{value:.0f}"
    return f"{value:.3g}"
