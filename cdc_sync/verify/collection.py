"""Is the collection made for the table: its vectors, their dimension, metric and datatype?"""

from __future__ import annotations

import dataclasses
from typing import Final

from cdc_sync.mapping.plan import Datatype, Metric, TablePlan, VectorKind, VectorPlan
from cdc_sync.qdrant.collections import FoundVector, wanted
from cdc_sync.qdrant.sink import CollectionVectors
from cdc_sync.verify.kinds import Deviation, Kind

_METRICS: Final = {metric.value: metric for metric in Metric}
_DATATYPES: Final = {datatype.value: datatype for datatype in Datatype}


def compare_collection(
    plan: TablePlan, found: CollectionVectors
) -> tuple[list[Deviation], dict[str, VectorPlan | None]]:
    """Return what is wrong with the collection, and how to read those of its vectors that are other
    than planned, by name (None: their components cannot be compared)."""
    deviations: list[Deviation] = []
    readable: dict[str, VectorPlan | None] = {}
    wants = wanted(plan)
    for vector in plan.vectors:
        want, has = wants[vector.name], found.vectors.get(vector.name)
        if has is None:
            deviations.append(
                Deviation(Kind.VECTOR_CONFIG, vector.name, f"absent, wanted is ({want})")
            )
            readable[vector.name] = None
        elif has != want:
            deviations += _differences(vector.name, want, has)
            readable[vector.name] = _as_found(vector, has)
    deviations += [
        Deviation(Kind.VECTOR_CONFIG, name, f"({has}) is no column of the table")
        for name, has in found.vectors.items()
        if name not in wants
    ]
    return deviations, readable


def _differences(name: str, want: FoundVector, has: FoundVector) -> list[Deviation]:
    if want.kind is not has.kind:
        text = f"{want.kind.value}, the collection has {has.kind.value}"
        return [Deviation(Kind.VECTOR_CONFIG, name, text)]
    pairs = (
        (Kind.DIMENSION, want.size, has.size),
        (Kind.METRIC, want.metric, has.metric),
        (Kind.DATATYPE, want.datatype, has.datatype),
    )
    return [
        Deviation(kind, name, f"{one}, the collection has {other}")
        for kind, one, other in pairs
        if one != other
    ]


def _as_found(vector: VectorPlan, has: FoundVector) -> VectorPlan | None:
    metric, datatype = _METRICS.get(has.metric), _DATATYPES.get(has.datatype)
    if vector.kind is not has.kind or vector.size != has.size:
        return None
    if vector.kind is VectorKind.SPARSE:
        return vector
    if metric is None or datatype is None:
        return None
    return dataclasses.replace(vector, metric=metric, datatype=datatype)
