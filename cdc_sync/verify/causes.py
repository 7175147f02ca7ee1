"""Recognises what happened to a value: cut off, decoded wrongly, moved by a time zone, of another
type.

What is returned says in which way two values differ, never what they are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

import numpy as np

#: Offsets of time zones are multiples of this, and no two are further apart than that.
_ZONE_STEP: Final = timedelta(minutes=15)
_ZONES_APART: Final = timedelta(hours=26)
_ENCODINGS: Final = ("latin-1", "cp1252")
_ELLIPSES: Final = ("...", "…")
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_TIMESTAMP: Final = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?")


def type_name(value: object) -> str:
    """The JSON type of a value, with integers told apart from floats."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "float"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def type_cause(wanted: object, stored: object) -> str | None:
    """What turned a value into one of another JSON type; None: nothing that is known."""
    if isinstance(wanted, list) and stored in wanted:
        return "an array was stored as a single value"
    if isinstance(stored, list) and stored == [wanted]:
        return "a single value was stored as an array"
    if isinstance(stored, str) and not isinstance(wanted, str):
        return f"{_article(type_name(wanted))} was stored as text"
    if isinstance(wanted, bool) and isinstance(stored, (int, float)):
        return "a bool was stored as a number"
    if isinstance(wanted, int) and isinstance(stored, float):
        exact = math.isfinite(stored) and stored == wanted
        return "an integer was stored as a float" + ("" if exact else ", and its value changed")
    if isinstance(wanted, float) and isinstance(stored, int):
        return "a float was stored as an integer" + ("" if wanted == stored else ", cut off")
    if isinstance(wanted, str) and not isinstance(stored, (dict, list)):
        return "text was parsed as another type"
    return None


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeio" else f"a {name}"


def flattened(wanted: Mapping[str, object], stored: Mapping[str, object], field: str) -> list[str]:
    """The names under which the members of an object are found beside it: nested to flattened.

    ``field`` is an object of ``wanted`` which ``stored`` lacks, or holds as something else.
    """
    value = wanted.get(field)
    if not isinstance(value, dict) or not value:
        return []
    for separator in (".", "_", "__", "/"):
        names = [f"{field}{separator}{member}" for member in value]
        found = [name for name in names if name in stored and name not in wanted]
        if found:
            return found
    return []


def value_cause(wanted: object, stored: object) -> str | None:
    """What changed a value into another of the same JSON type; None: nothing that is known."""
    if isinstance(wanted, str) and isinstance(stored, str):
        return _text_cause(wanted, stored)
    if isinstance(wanted, float) and isinstance(stored, float):
        return _float_cause(wanted, stored)
    if isinstance(wanted, int) and isinstance(stored, int):
        same = math.isfinite(float(wanted)) and int(float(wanted)) == stored
        return "a large integer went through a float" if same else None
    if isinstance(wanted, list) and isinstance(stored, list):
        return _list_cause(wanted, stored)
    return None


def _list_cause(wanted: Sequence[object], stored: Sequence[object]) -> str | None:
    if len(stored) < len(wanted) and list(wanted[: len(stored)]) == list(stored):
        return "truncated: the end of the array is missing"
    if sorted(map(_text, wanted)) == sorted(map(_text, stored)):
        return "the elements are in another order"
    return None


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _float_cause(wanted: float, stored: float) -> str | None:
    with np.errstate(over="ignore"):
        single = float(np.float32(wanted))
    if single == stored:
        return "rounded to single precision"
    return None


def _text_cause(wanted: str, stored: str) -> str | None:
    shift = time_shift(wanted, stored)
    if shift is not None:
        return f"timestamp off by {shift}: a time zone was lost or applied twice"
    kept = stored
    for ellipsis in _ELLIPSES:
        kept = kept.removesuffix(ellipsis)
    if len(kept) < len(wanted) and wanted.startswith(kept):
        return "truncated text"
    if is_mojibake(wanted, stored):
        return "mojibake: UTF-8 was read as Latin-1"
    if _REPLACEMENT in stored and _REPLACEMENT not in wanted:
        return "characters were lost in decoding"
    if wanted.encode(errors="replace").decode("ascii", "ignore") == stored or (
        "?" in stored and _fits_question_marks(wanted, stored)
    ):
        return "characters outside of ASCII were lost"
    if wanted.split() == stored.split():
        return "white space differs"
    if wanted.casefold() == stored.casefold():
        return "upper and lower case differ"
    return None


def _fits_question_marks(wanted: str, stored: str) -> bool:
    return wanted.encode("ascii", "replace").decode() == stored


def is_mojibake(wanted: str, stored: str) -> bool:
    """Whether ``stored`` is ``wanted`` with its UTF-8 read in an encoding of one byte a character,
    once or twice."""
    for encoding in _ENCODINGS:
        text = wanted
        for _ in range(2):
            text = text.encode("utf-8", "surrogatepass").decode(encoding, "replace")
            if text == stored and text != wanted:
                return True
    return False


def time_shift(wanted: str, stored: str) -> str | None:
    """By what a timestamp was moved, as ``+02:00``, if it can be a time zone; else None."""
    if not (_TIMESTAMP.match(wanted) and _TIMESTAMP.match(stored)):
        return None
    try:
        times = [datetime.fromisoformat(text) for text in (wanted, stored)]
    except ValueError:
        return None
    if times[0].tzinfo is None or times[1].tzinfo is None:
        times = [time.replace(tzinfo=None) for time in times]
    shift = times[1] - times[0]
    if not shift or shift % _ZONE_STEP or abs(shift) > _ZONES_APART:
        return None
    minutes = abs(shift) // timedelta(minutes=1)
    return f"{'+' if shift > timedelta() else '-'}{minutes // 60:02}:{minutes % 60:02}"
