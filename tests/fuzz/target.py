"""What is fuzzed: each target decodes an input that was made by nobody.

A target returns True if it took the input and False if it refused it with the error it documents;
everything else that comes out of it is a finding, and so is an input that was taken for a value
that cannot be: wherever there is a second way to the result, both must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.fuzz.limits import Run


@dataclass(frozen=True, slots=True)
class Target:
    """A decoder with inputs that it takes (or nearly) to start from. ``share`` of a campaign's
    runs, relative to the other targets."""

    name: str
    run: Run
    seeds: tuple[bytes, ...]
    share: int = 1


def selected(runs: Sequence[Run]) -> Run:
    """Have the first byte of an input choose which of the runs gets the rest."""
    assert len(runs) <= 256

    def run(data: bytes) -> bool:
        return runs[data[0] % len(runs)](data[1:]) if data else False

    return run
