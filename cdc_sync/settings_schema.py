"""What the settings models say about themselves: sections, values in words, unknown keys, lines."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from cdc_sync.config import Settings, TableSettings

Location = tuple[str | int, ...]


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, info in Settings.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield name, info.annotation


#: Sections that are tables of keys (all but ``tables``), by name.
SECTIONS: Final[Mapping[str, type[BaseModel]]] = dict(_sections())


def is_secret(info: FieldInfo) -> bool:
    """Whether a field holds a secret."""
    return SecretStr in (info.annotation, *get_args(info.annotation))


def suggest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` is probably meant to be."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return matches[0] if matches else None


# -- values in words


def expected_text(location: Location) -> str:
    """What belongs at a location, in words: "an integer from 0 to 65535"."""
    section, *rest = location
    if section != "tables":
        if not rest:
            return f"a table, [{section}]"
        return field_text(SECTIONS[str(section)].model_fields[str(rest[0])])
    if len(rest) < 2:
        return "an array of tables, [[tables]]"
    info = TableSettings.model_fields[str(rest[1])]
    if len(rest) > 2 and (container := _container(info.annotation)) is not None:
        return _type_text(get_args(container)[-1])
    return field_text(info)


def setting_location(location: Location) -> Location:
    """The part of a pydantic location that names a setting, or an item of one.

    Where a field takes several types pydantic adds the one it tried, which is no key of a file.
    """
    if location[:1] != ("tables",) or len(location) < 3:
        return location
    info = TableSettings.model_fields.get(str(location[2]))
    if info is None:
        return location
    return location[: 4 if _container(info.annotation) is not None else 3]


def _container(annotation: object) -> object | None:
    """The list or dict type of a field that takes nothing else but None."""
    options = [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        options = [item for item in get_args(annotation) if item is not types.NoneType]
    if len(options) == 1 and get_origin(options[0]) in (list, dict):
        return options[0]
    return None


def field_text(info: FieldInfo) -> str:
    """What belongs in a field, in words."""
    return _type_text(info.annotation) + _bounds_text(info)


def _type_text(annotation: object) -> str:
    simple = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    if isinstance(annotation, type) and annotation in simple:
        return simple[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(f'"{value}"' for value in arguments)
    if origin in (Union, types.UnionType):
        kinds = [_type_text(item) for item in arguments if item is not types.NoneType]
        return " or ".join([", ".join(kinds[:-1]), kinds[-1]]) if kinds[1:] else kinds[0]
    if origin is list:
        return "an array of strings"
    if origin is dict:
        if arguments[1] is Any:
            return "a table"
        return f"a table whose values are {_type_text(arguments[1])} each"
    return "a string"


def _bounds_text(info: FieldInfo) -> str:
    low: str | None = None
    high: str | None = None
    longest = next(
        (i.max_length for i in info.metadata if isinstance(i, annotated_types.MaxLen)), None
    )
    for item in info.metadata:
        if isinstance(item, annotated_types.Ge):
            low = f"{item.ge}"
        elif isinstance(item, annotated_types.Le):
            high = f"{item.le}"
        elif isinstance(item, annotated_types.Gt):
            return f" greater than {item.gt}"
        elif isinstance(item, annotated_types.MinLen):
            return f" of 1 to {longest} characters" if longest else " that is not empty"
        elif pattern := getattr(item, "pattern", None):
            return f" that matches {pattern}"
    if low and high:
        return f" from {low} to {high}"
    return f" of at least {low}" if low else ""


# -- unknown keys


def unknown_keys(document: Mapping[str, object]) -> list[tuple[Location, str]]:
    """Whatever in a document is no setting, and sections that are no tables, with locations."""
    found: list[tuple[Location, str]] = []
    for section, content in document.items():
        if section == "tables":
            found.extend(_unknown_in_tables(content))
        elif section not in SECTIONS:
            found.append(((section,), _unknown_section(section)))
        elif not isinstance(content, dict):
            found.append(((section,), f"{section}: expected a table, [{section}]."))
        else:
            known = SECTIONS[section].model_fields
            found.extend(
                ((section, key), _unknown_key(f"{section}.", key, known))
                for key in content
                if key not in known
            )
    return found


def _unknown_in_tables(content: object) -> Iterator[tuple[Location, str]]:
    if not isinstance(content, list):
        yield ("tables",), "tables: expected an array of tables, [[tables]]."
        return
    for index, table in enumerate(content):
        if not isinstance(table, dict):
            yield ("tables", index), "tables: expected an array of tables, [[tables]]."
            continue
        for key in table:
            if key not in TableSettings.model_fields:
                problem = _unknown_key(f"tables[{index}].", key, TableSettings.model_fields)
                yield ("tables", index, key), problem


def _unknown_section(section: str) -> str:
    owner = next((name for name, model in SECTIONS.items() if section in model.model_fields), None)
    if owner:
        return f"unknown section or key {section}; did you mean {owner}.{section}?"
    hint = suggest(section, [*SECTIONS, "tables"])
    if hint:
        return f"unknown section {section}; did you mean {hint}?"
    return f"unknown section {section}; there are {', '.join([*SECTIONS, 'tables'])}."


def _unknown_key(prefix: str, key: str, known: Iterable[str]) -> str:
    known = list(known)
    if hint := suggest(key, known):
        return f"unknown key {prefix}{key}; did you mean {prefix}{hint}?"
    owner = next((name for name, model in SECTIONS.items() if key in model.model_fields), None)
    if owner:
        return f"unknown key {prefix}{key}; did you mean {owner}.{key}?"
    return f"unknown key {prefix}{key}; there are {', '.join(known)}."


# -- lines

_HEADER = re.compile(r"\s*\[(\[)?\s*([A-Za-z0-9_-]+)\s*\]")
_KEY = re.compile(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*[.=]""")


def line_of(text: str, location: Sequence[str | int]) -> int | None:
    """Line (from 1) of a setting in a TOML text, None when the plain forms do not show it.

    tomllib tells no lines. This finds ``[section]``, ``[[tables]]`` and ``key = value``, which is
    how the files are written; with multi-line strings a line of text might be taken for a key, so
    nothing is said about such files.
    """
    if '"""' in text or "'''" in text or not location:
        return None
    section, index, key = _parts(location)
    current, seen, opened = "", -1, None
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            current = header[2]
            seen += bool(header[1]) and current == section
            if current == section and (index is None or seen == index):
                opened = number
        elif (entry := _KEY.match(line)) and key is not None:
            here = current == section and (index is None or seen == index)
            if here and entry[1] == key:
                return number
        elif (entry := _KEY.match(line)) and not current and entry[1] == section:
            return number
    return opened


def _parts(location: Sequence[str | int]) -> tuple[str, int | None, str | None]:
    rest = list(location[1:])
    index = rest.pop(0) if rest and isinstance(rest[0], int) else None
    assert index is None or isinstance(index, int)
    return str(location[0]), index, str(rest[0]) if rest else None
