"""Checks settings written by Qdrant's REST names against the client's own models of them.

The models know names and types. What they leave open and Qdrant takes in no form (negative numbers)
is refused here too; ranges are the server's to judge.
"""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError
from qdrant_client import models

from cdc_sync.errors import ConfigError

M = TypeVar("M", bound=BaseModel)

#: The kinds of quantization, by the key that names them.
_QUANTIZATIONS: Final[Mapping[str, type[BaseModel]]] = {
    "scalar": models.ScalarQuantization,
    "product": models.ProductQuantization,
    "binary": models.BinaryQuantization,
    "turbo": models.TurboQuantization,
}
_QUANTIZATION: Final = "quantization_config"
#: The largest number of the settings that protobuf has as uint32; others are uint64.
_UINT32: Final = 2**32 - 1
_SMALL: Final = frozenset({"shard_number", "replication_factor", "write_consistency_factor"})


class Refusals:
    """Makes the errors about one table's ``collection_config``."""

    def __init__(self, table: str) -> None:
        self._table = table

    def error(self, path: str, problem: str, remedy: str) -> ConfigError:
        """The error for a setting, by its dotted path below ``collection_config``."""
        setting = f"collection_config.{path}" if path else "collection_config"
        return ConfigError(f"{self._table}: `{setting}` {problem}", remedy)

    def unknown(self, path: str, known: Collection[str]) -> ConfigError:
        """The error for a name that nothing has; says which was probably meant."""
        name = path.rpartition(".")[2]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]}? " if close else ""
        return self.error(
            path, "is not a setting that Qdrant has", f"{hint}Known: {', '.join(sorted(known))}."
        )


def mapping(refusals: Refusals, path: str, value: object) -> dict[str, object]:
    """The value as a table of settings, those that are null left out. Raises ConfigError."""
    if not isinstance(value, Mapping):
        raise refusals.error(path, "must be a table of settings", "Write { name = value, ... }.")
    return {str(name): one for name, one in value.items() if one is not None}


def validated(refusals: Refusals, model: type[M], path: str, value: object) -> M:
    """The settings below ``path`` as the client's model. Raises ConfigError naming the first that
    is unknown, missing or of the wrong type.
    """
    given = mapping(refusals, path, value)
    unknown = [name for name in given if name not in model.model_fields]
    if unknown:
        raise refusals.unknown(_join(path, unknown[0]), model.model_fields)
    quantization = None
    if _QUANTIZATION in model.model_fields and _QUANTIZATION in given:
        quantization = _quantization(refusals, _join(path, _QUANTIZATION), given[_QUANTIZATION])
        given = {name: one for name, one in given.items() if name != _QUANTIZATION}
    _check_numbers(refusals, path, given)
    try:
        # As JSON, where text is an enumeration's value but never a number.
        checked = model.model_validate_json(json.dumps(given, default=str), strict=True)
    except ValidationError as error:
        raise _refused(refusals, model, path, given, error) from error
    if quantization is not None:
        checked = checked.model_copy(update={_QUANTIZATION: quantization})
    return checked


def _quantization(refusals: Refusals, path: str, value: object) -> BaseModel:
    given = mapping(refusals, path, value)
    for name in given:
        if name not in _QUANTIZATIONS:
            raise refusals.unknown(_join(path, name), _QUANTIZATIONS)
    if len(given) != 1:
        raise refusals.error(
            path,
            "must name one kind of quantization",
            'Take one: { scalar = { type = "int8" } }, { product = { compression = "x16" } } '
            "or { binary = {} }.",
        )
    (kind,) = given
    return validated(refusals, _QUANTIZATIONS[kind], path, given)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check_numbers(refusals: Refusals, path: str, value: object) -> None:
    if isinstance(value, Mapping):
        for name, one in value.items():
            _check_numbers(refusals, _join(path, str(name)), one)
    elif isinstance(value, (int, float)):
        limit = _UINT32 if path in _SMALL else 2**64 - 1
        if not 0 <= value <= limit:
            raise refusals.error(path, "is out of range", f"Give a number from 0 to {limit}.")


def _refused(
    refusals: Refusals,
    model: type[BaseModel],
    path: str,
    given: Mapping[str, object],
    error: ValidationError,
) -> ConfigError:
    first = error.errors(include_input=False, include_url=False)[0]
    names = _names(first["loc"], given, missing=first["type"] == "missing")
    where = ".".join([path, *names]) if path else ".".join(names)
    if first["type"] == "extra_forbidden":
        return refusals.unknown(where, _fields_at(model, names[:-1]))
    if first["type"] == "missing":
        return refusals.error(where, "is missing", "Add it, or leave out what it belongs to.")
    expected = first["msg"].removeprefix("Input should be ")
    return refusals.error(where, "has a value that does not fit", f"It should be {expected}.")


def _names(loc: Iterable[int | str], given: object, *, missing: bool) -> list[str]:
    """The keys of a place in ``given``, without the names of the models that pydantic tried."""
    names = []
    for part in loc:
        if isinstance(given, Mapping) and part in given:
            given = given[part]
        elif not (missing and isinstance(given, Mapping)):
            break
        names.append(str(part))
    return names


def _fields_at(model: type[BaseModel], names: Iterable[str]) -> Collection[str]:
    for name in names:
        field = model.model_fields.get(name)
        if field is not None:  # else it is a name of the user's own, as of a vector
            model = next(iter(_models(field.annotation)), model)
    return model.model_fields


def _models(annotation: object) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)
