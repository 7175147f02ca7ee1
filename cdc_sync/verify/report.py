"""The report of a verification: what was compared, what differs, and how sure that is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cdc_sync.errors import ExitCode
from cdc_sync.rows import PointId
from cdc_sync.verify.kinds import MEANINGS, Deviation, Kind

_CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Example:
    """A point with a difference: its id, the key of its row as texts (None: not known), and in
    which way it differs."""

    id: PointId | None
    key: tuple[str, ...] | None
    text: str


@dataclass(slots=True)
class Finding:
    """All differences of one kind in one field with one likely cause: ``count`` points, of which
    some are ``examples``."""

    kind: Kind
    field: str
    cause: str
    count: int = 0
    examples: list[Example] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """As ``--json`` shows it."""
        meaning = MEANINGS[self.kind]
        return {
            "kind": self.kind.value,
            "title": meaning.title,
            "field": self.field,
            "count": self.count,
            "cause": self.cause,
            "remedy": meaning.remedy,
            "repairable": meaning.repairable,
            "examples": [
                {
                    "id": example.id,
                    "key": None if example.key is None else list(example.key),
                    "text": example.text,
                }
                for example in self.examples
            ],
        }


@dataclass(slots=True)
class LeafReport:
    """A leaf partition, or a table that has none: rows that were read, and those without a
    point."""

    name: str
    rows: int = 0
    missing: int = 0


@dataclass(slots=True)
class TableReport:
    """What was found of one table.

    ``rows`` and ``points`` are counts of both sides, at different moments if something is written
    meanwhile; ``compared`` rows were compared with their points, ``ids`` points were looked up.
    ``different``: points with differences, missing and extra ones among them. ``pending``: points
    that differ, and whose changes wait in the slot of a stopped pipeline. ``undecided``: points
    that differ, and of which the stream did not get so far that it could be told.
    ``rechecked``: how many first differences went away by themselves.
    """

    table: str
    collection: str
    examples: int
    rows: int = 0
    points: int = 0
    compared: int = 0
    ids: int = 0
    different: int = 0
    missing: int = 0
    extra: int = 0
    pending: int = 0
    undecided: int = 0
    rechecked: int = 0
    dead_letters: int = 0
    leaves: list[LeafReport] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    sampled: bool = False
    findings: dict[tuple[Kind, str, str], Finding] = dataclasses.field(default_factory=dict)

    def add(
        self,
        deviation: Deviation,
        id_: PointId | None = None,
        key: tuple[str, ...] | None = None,
        count: int = 1,
        example: bool = True,
    ) -> None:
        """Count a difference, and keep it as an example if it is one and there are few."""
        cause = deviation.cause or MEANINGS[deviation.kind].cause
        place = (deviation.kind, deviation.field, cause)
        finding = self.findings.get(place)
        if finding is None:
            finding = self.findings[place] = Finding(*place)
        finding.count += count
        if example and len(finding.examples) < self.examples:
            finding.examples.append(Example(id_, key, deviation.text))

    @property
    def equal(self) -> bool:
        """Whether no difference was found for certain."""
        return not self.findings

    def bound(self) -> float | None:
        """Of a sample: the part of all rows that differs at the most, with 95 % confidence; None
        elsewhere."""
        if not self.sampled or not self.compared:
            return None
        return upper_bound(self.rows_different, self.compared, _CONFIDENCE)

    def extra_bound(self) -> float | None:
        """The same for the part of all points that have no row."""
        if not self.sampled or not self.ids:
            return None
        return upper_bound(self.extra, self.ids, _CONFIDENCE)

    @property
    def rows_different(self) -> int:
        """Rows whose points differ or are missing."""
        return self.different - self.extra

    def to_json(self) -> dict[str, object]:
        """As ``--json`` shows it."""
        return {
            "table": self.table,
            "collection": self.collection,
            "equal": self.equal,
            "rows": self.rows,
            "points": self.points,
            "rows_compared": self.compared,
            "points_looked_up": self.ids,
            "different": self.different,
            "missing": self.missing,
            "extra": self.extra,
            "pending": self.pending,
            "undecided": self.undecided,
            "settled_by_themselves": self.rechecked,
            "dead_letters": self.dead_letters,
            "at_most_different": self.bound(),
            "at_most_extra": self.extra_bound(),
            "leaves": [
                {"name": leaf.name, "rows": leaf.rows, "missing": leaf.missing}
                for leaf in self.leaves
            ],
            "notes": self.notes,
            "findings": [finding.to_json() for finding in ordered(self.findings.values())],
        }


@dataclass(slots=True)
class Report:
    """A whole verification. ``mode`` is full, sample or where; ``stream`` says how far the pipeline
    was. ``repaired`` says what a repair did, in sentences."""

    mode: str
    stream: str
    tables: list[TableReport]
    seconds: float = 0.0
    repaired: list[str] = dataclasses.field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether no difference was found for certain."""
        return all(table.equal for table in self.tables)

    @property
    def exit_code(self) -> int:
        """0 equal, 3 different; 75 where nothing is known to differ and something could not be
        told."""
        if not self.equal:
            return ExitCode.DIFFERENCES
        if any(table.undecided for table in self.tables):
            return ExitCode.TEMPORARY
        return ExitCode.OK

    def to_json(self) -> dict[str, object]:
        """As ``--json`` shows it."""
        compared = sum(table.compared for table in self.tables)
        return {
            "equal": self.equal,
            "exit_code": int(self.exit_code),
            "mode": self.mode,
            "stream": self.stream,
            "seconds": round(self.seconds, 3),
            "rows_per_second": round(compared / self.seconds, 1) if self.seconds else None,
            "repaired": self.repaired,
            "tables": [table.to_json() for table in self.tables],
        }


_ORDER: Final = {kind: number for number, kind in enumerate(Kind)}


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """The worst kinds first, the most frequent ones within a kind."""
    return sorted(findings, key=lambda one: (_ORDER[one.kind], -one.count, one.field))


def upper_bound(found: int, looked: int, confidence: float) -> float:
    """The part of all that is wrong at the most, if ``found`` of ``looked`` drawn at random are
    (Clopper and Pearson, one-sided); 3 / ``looked`` for none at 95 %, about."""
    if found >= looked:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most(found, looked, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most(found: int, looked: int, part: float) -> float:
    """The probability to find no more than that."""
    if part <= 0.0:
        return 1.0
    if part >= 1.0:
        return 0.0
    return sum(
        math.exp(
            math.lgamma(looked + 1)
            - math.lgamma(number + 1)
            - math.lgamma(looked - number + 1)
            + number * math.log(part)
            + (looked - number) * math.log1p(-part)
        )
        for number in range(found + 1)
    )
