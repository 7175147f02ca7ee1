"""Settings of an existing collection that differ from those that a new one would get."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from qdrant_client import grpc as q
from qdrant_client.conversions.conversion import GrpcToRest

from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant.collection_config import plain, wanted_collection
from cdc_sync.qdrant.deferral import deferred_of

#: What makes a collection unfit when it differs; :func:`cdc_sync.qdrant.collections.check` has it.
_CHECKED: Final = frozenset({"size", "distance", "datatype", "multivector_config", "modifier"})
#: Settings of a vector that it has from the collection unless it has its own.
_INHERITED: Final = ("hnsw_config", "quantization_config")
_TOLERANCE: Final = 1e-6


def differences(plan: TablePlan, config: q.CollectionConfig) -> tuple[str, ...]:
    """Sentences about settings that the plan asks for and the collection has otherwise.

    They are for the operator: an existing collection is never changed. Raises ConfigError as
    :func:`cdc_sync.qdrant.collection_config.wanted_collection`.
    """
    return sentences(plan.collection, by_name(plain(wanted_collection(plan))), _found(config))


def sentences(
    collection: str, wanted: Mapping[str, object], found: Mapping[str, object]
) -> tuple[str, ...]:
    """A sentence for each setting of ``wanted`` that ``found`` has otherwise, by the REST API's
    names, vectors by theirs. A vector without HNSW or quantization settings has the collection's.
    """
    found = {**found, "vectors": _with_inherited(found)}
    return tuple(
        f"collection {collection} exists with {path} = {_text(has)}, the configuration and the "
        f"table's indexes ask for {_text(want)}; an existing collection is not changed"
        for path, want, has in _compare("", wanted, found)
    )


def _with_inherited(found: Mapping[str, object]) -> dict[str, dict[str, object]]:
    vectors = found.get("vectors")
    return {
        name: dict(params)
        | {part: _merged(found.get(part), params.get(part)) for part in _INHERITED}
        for name, params in (vectors.items() if isinstance(vectors, Mapping) else ())
    }


def _found(config: q.CollectionConfig) -> dict[str, object]:
    rest = GrpcToRest.convert_collection_config(config).model_dump(mode="json", exclude_none=True)
    params = rest.pop("params")
    found = by_name({**params, **rest, "optimizers_config": rest.get("optimizer_config")})
    whole = found.get("hnsw_config")
    vectors = found["vectors"]
    assert isinstance(vectors, dict)
    for name, deferred in deferred_of(config).items():
        # As if it were not deferred.
        hnsw = vectors.get(name, {}).get("hnsw_config", {})
        for setting, value in deferred.items():
            hnsw[setting] = _setting(whole, setting) if value is None else value
    return found


def by_name(settings: Mapping[str, object]) -> dict[str, object]:
    """Settings with the unnamed vector under the name ""."""
    vectors = settings.get("vectors") or {}
    if isinstance(vectors, Mapping) and "size" in vectors and "distance" in vectors:
        return {**settings, "vectors": {"": vectors}}
    return {**settings, "vectors": vectors}


def _merged(inherited: object, own: object) -> dict[str, object]:
    merged = dict(inherited) if isinstance(inherited, Mapping) else {}
    given = own if isinstance(own, Mapping) else {}
    return merged | {name: value for name, value in given.items() if value is not None}


def _setting(settings: object, name: str) -> object:
    return settings.get(name) if isinstance(settings, Mapping) else None


def _compare(path: str, want: object, has: object) -> Iterator[tuple[str, object, object]]:
    if isinstance(want, Mapping):
        for name, one in want.items():
            if path.startswith(("vectors.", "sparse_vectors.")) and name in _CHECKED:
                continue
            below = f"{path}.{name}" if path else str(name)
            yield from _compare(below, one, _setting(has, name))
    elif not _same(want, has):
        yield path, want, has


def _same(want: object, has: object) -> bool:
    if want == "auto" and has is None:
        return True
    if isinstance(want, bool) or isinstance(has, bool):
        return bool(want) == bool(has)
    if isinstance(want, (int, float)) and isinstance(has, (int, float)):
        # float32 on the server's side
        return abs(want - has) <= _TOLERANCE * max(1.0, abs(want))
    return want == has


def _text(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)}"
    return str(value)
