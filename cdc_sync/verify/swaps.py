"""Recognises vectors that were stored with the wrong points, among those that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from cdc_sync.mapping.comparison import StoredArray
from cdc_sync.mapping.vectors import VectorData
from cdc_sync.rows import PointId
from cdc_sync.verify.comparing import Comparer, normalised
from cdc_sync.verify.kinds import Deviation, Kind

_SEED: Final = 20250214
#: How near projections of equal vectors are, rounding considered.
_NEAR: Final = 1e-4
#: How many of those that are near are compared.
_COMPARED: Final = 64


@dataclass(frozen=True, slots=True)
class WrongVector:
    """A vector that differs: of which point, what was found of it, and both sides."""

    id: PointId
    key: tuple[str, ...] | None
    deviation: Deviation
    wanted: VectorData
    stored: StoredArray


def recognise_swaps(comparer: Comparer, wrong: Sequence[WrongVector]) -> list[Deviation]:
    """What is to be said of each of the wrong vectors, in their order: as before, or that it was
    swapped with another, or is another's."""
    owners: dict[int, int] = {}
    groups: dict[tuple[str, int], list[int]] = {}
    for number, one in enumerate(wrong):
        if not (isinstance(one.wanted, np.ndarray) and isinstance(one.stored, np.ndarray)):
            continue
        if one.wanted.shape == one.stored.shape and one.wanted.ndim == 1:
            groups.setdefault((one.deviation.field, one.wanted.shape[0]), []).append(number)
    for numbers in groups.values():
        owners |= _owners(comparer, wrong, numbers)
    return [_judge(wrong, number, owners) for number in range(len(wrong))]


def _judge(wrong: Sequence[WrongVector], number: int, owners: Mapping[int, int]) -> Deviation:
    one = wrong[number]
    owner = owners.get(number)
    if owner is None:
        return one.deviation
    other = wrong[owner].id
    if owners.get(owner) == number:
        return Deviation(Kind.VECTORS_SWAPPED, one.deviation.field, f"with point {other}")
    return Deviation(
        Kind.VECTOR,
        one.deviation.field,
        f"it is the vector of point {other}",
        "ids and vectors were paired wrongly",
    )


def _owners(
    comparer: Comparer, wrong: Sequence[WrongVector], numbers: Sequence[int]
) -> dict[int, int]:
    """Whose vector is stored with each, by number; only where it is another's.

    All vectors are projected on one direction: equal ones have nearly equal projections, so few
    have to be compared.
    """
    wanted = _matrix([wrong[number].wanted for number in numbers])
    stored = _matrix([wrong[number].stored for number in numbers])
    direction = np.random.default_rng(_SEED).standard_normal(wanted.shape[1])
    places, looked_for = wanted @ direction, stored @ direction
    order = np.argsort(places)
    found: dict[int, int] = {}
    for place, number in enumerate(numbers):
        value = looked_for[place]
        low = int(np.searchsorted(places, value - _NEAR, sorter=order))
        high = int(np.searchsorted(places, value + _NEAR, "right", sorter=order))
        for candidate in order[low : min(high, low + _COMPARED)]:
            other = numbers[int(candidate)]
            if other != number and comparer.matches(
                wrong[number].deviation.field, wrong[other].wanted, wrong[number].stored
            ):
                found[number] = other
                break
    return found


def _matrix(vectors: Sequence[object]) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore", over="ignore"):
        return np.nan_to_num(normalised(np.array(vectors, dtype=np.float64)))
