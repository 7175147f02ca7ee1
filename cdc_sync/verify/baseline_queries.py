"""The queries of a baseline: from a file of the user's, or the vectors of sampled rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from cdc_sync.errors import ConfigError
from cdc_sync.verify.baseline_file import Label, QueryVector, SparseQuery

#: Parts of a query in a file.
_KNOWN: Final = frozenset({"vector", "table", "column", "k", "filter", "relevant", "label"})
_LARGEST_K: Final = 1000
_FORM: Final = (
    'A query is an object such as {"vector": [0.1, 0.2], "column": "embedding", "k": 10, "filter": '
    '"lang = \'en\'", "relevant": [17, 4711]}; a file holds an array of them, or one a line.'
)


class GivenQuery:
    """A query as it stands in a file: vector, and what it may leave open (None)."""

    __slots__ = ("column", "filter", "k", "label", "number", "relevant", "table", "vector")

    def __init__(self, number: int, given: Mapping[str, object]) -> None:
        self.number = number
        unknown = sorted(set(given) - _KNOWN)
        if unknown:
            raise self._wrong(f"has the unknown part {unknown[0]!r}")
        if "vector" not in given:
            raise self._wrong("has no vector")
        self.vector = self._vector(given["vector"])
        self.table = self._text(given, "table")
        self.column = self._text(given, "column")
        self.filter = self._text(given, "filter")
        self.label = self._text(given, "label")
        self.k = self._k(given.get("k"))
        self.relevant = self._labels(given.get("relevant"))

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"query {self.number} of the file {what}.", _FORM)

    def _text(self, given: Mapping[str, object], name: str) -> str | None:
        value = given.get(name)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise self._wrong(f"has a {name} that is no text")
        return value

    def _k(self, value: object) -> int | None:
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_K:
            raise self._wrong(f"has a k that is not 1 to {_LARGEST_K}")
        return value

    def _vector(self, value: object) -> QueryVector:
        if isinstance(value, Mapping):
            return self._sparse(value)
        if not isinstance(value, list) or not value:
            raise self._wrong("has a vector that is no list of numbers")
        return self._numbers(value)

    def _numbers(self, values: Sequence[object]) -> list[float]:
        numbers = [
            float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)
        ]
        with np.errstate(over="ignore"):
            finite = all(math.isfinite(float(np.float32(number))) for number in numbers)
        if len(numbers) != len(values) or not finite:
            raise self._wrong("has a vector with components that are no finite numbers")
        return numbers

    def _sparse(self, value: Mapping[str, object]) -> SparseQuery:
        indices, values, size = (value.get(name) for name in ("indices", "values", "size"))
        if (
            not isinstance(indices, list)
            or not isinstance(values, list)
            or set(value)
            - {
                "indices",
                "values",
                "size",
            }
        ):
            raise self._wrong("has a sparse vector that is not {indices, values, size}")
        good = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in indices)
        if not good or len(indices) != len(values) or len(set(indices)) != len(indices):
            raise self._wrong("has a sparse vector without distinct indices from 0, one a value")
        if size is not None and not isinstance(size, int):
            raise self._wrong("has a sparse vector whose size is no number")
        numbers = self._numbers(values)
        pairs = sorted(zip(indices, numbers, strict=True))
        return SparseQuery(
            indices=[index for index, _ in pairs],
            values=[number for _, number in pairs],
            size=size or 0,
        )

    def _labels(self, value: object) -> list[Label] | None:
        if value is None:
            return None
        entries: list[object] = []
        if isinstance(value, Mapping):
            entries = [{"key": key, "grade": grade} for key, grade in value.items()]
        elif isinstance(value, list):
            entries = value
        if not entries:
            raise self._wrong("has `relevant` that is no list of keys")
        return [self._label(entry) for entry in entries]

    def _label(self, entry: object) -> Label:
        grade: object = 1.0
        key = entry
        if isinstance(entry, Mapping):
            if set(entry) - {"key", "grade"} or "key" not in entry:
                raise self._wrong('has a relevant row that is not {"key": ..., "grade": ...}')
            key, grade = entry["key"], entry.get("grade", 1.0)
        number = isinstance(grade, (int, float)) and not isinstance(grade, bool)
        if not number or not 0 <= float(str(grade)) <= 100:
            raise self._wrong("has a grade that is not 0 to 100")
        values = key if isinstance(key, list) else [key]
        return Label(key=[self._key(one) for one in values], grade=float(str(grade)))

    def _key(self, value: object) -> str:
        if isinstance(value, bool):
            return "t" if value else "f"
        if isinstance(value, (str, int)):
            return str(value)
        raise self._wrong("has a relevant row whose key is neither text nor integer")


def read_queries(path: Path) -> list[GivenQuery]:
    """Read a file of queries: a JSON array, or (JSONL) an object a line.

    Raises :class:`ConfigError` naming the query, and never what is in it.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--queries {path} cannot be read: {reason}.", _FORM) from error
    objects: list[object] = []
    if text.lstrip()[:1] == "[":
        found = _parsed(path, text, "its content")
        objects = found if isinstance(found, list) else []
    else:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                objects.append(_parsed(path, line, f"line {number}"))
    if not objects:
        raise ConfigError(f"--queries {path} holds no query.", _FORM)
    queries = []
    for number, one in enumerate(objects, 1):
        if not isinstance(one, dict):
            raise ConfigError(f"query {number} of the file is no object.", _FORM)
        queries.append(GivenQuery(number, one))
    return queries


def _parsed(path: Path, text: str, what: str) -> object:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ConfigError(f"--queries {path}: {what} is not JSON.", _FORM) from None


def _no_constant(_name: str) -> float:
    raise ValueError("not a number of JSON")


def vector_text(vector: QueryVector, bits: bool) -> str:
    """A query's vector as pgvector reads it; of a column of bits as a bit string."""
    if isinstance(vector, SparseQuery):
        pairs = zip(vector.indices, vector.values, strict=True)
        listed = ",".join(f"{index + 1}:{value!r}" for index, value in pairs if value)
        return f"{{{listed}}}/{vector.size}"
    if bits:
        return "".join("1" if component else "0" for component in vector)
    return f"[{','.join(map(repr, vector))}]"


def parse_vector(text: str) -> QueryVector:
    """A vector, or a bit string, from its text form."""
    if text.startswith("{"):
        inner, _, size = text[1:].partition("}/")
        pairs = [pair.split(":") for pair in inner.split(",")] if inner else []
        return SparseQuery(
            indices=[int(index) - 1 for index, _ in pairs],
            values=[float(value) for _, value in pairs],
            size=int(size),
        )
    if text.startswith("["):
        return [float(number) for number in text[1:-1].split(",")]
    return [float(bit) for bit in text]
