"""Names in SQL: quoting them, and reading them as Postgres reads them.

Source: PostgreSQL documentation, "Lexical Structure", Identifiers and Key Words.
"""

from __future__ import annotations

import re
import string
from typing import Final

_MAX_BYTES: Final = 63
_FOLD: Final = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_PART: Final = re.compile(
    r'\s*(?:"((?:[^"\0]|"")+)"|([A-Za-z_\u0080-\U0010ffff][A-Za-z0-9_$\u0080-\U0010ffff]*))\s*'
)


def quote_ident(name: str) -> str:
    """Quote an identifier; always, so that it is right without a list of keywords."""
    if "\0" in name or not name:
        raise ValueError("an identifier is neither empty nor holds NUL")
    return '"' + name.replace('"', '""') + '"'


def quote_literal(text: str) -> str:
    """Quote a string literal, where parameters are not to be had.

    Right while ``standard_conforming_strings`` is on, which every connection of ours pins, and in
    replication commands.
    """
    if "\0" in text:
        raise ValueError("a literal does not hold NUL")
    return "'" + text.replace("'", "''") + "'"


def qualified(schema: str, name: str) -> str:
    """Return ``"schema"."name"``."""
    return f"{quote_ident(schema)}.{quote_ident(name)}"


def column_list(names: tuple[str, ...] | list[str]) -> str:
    """Return ``"a", "b"``."""
    return ", ".join(map(quote_ident, names))


def parse_name(text: str) -> tuple[str, ...]:
    """Split a name as written in SQL into its parts, folded and unquoted as Postgres does.

    ``Docs`` is ``docs``, ``app."Docs"`` is ``app``, ``Docs``; parts over 63 bytes are cut. Raises
    ``ValueError`` for what is not one to three identifiers joined by dots.
    """
    parts: list[str] = []
    position = 0
    while True:
        match = _PART.match(text, position)
        if match is None:
            raise ValueError(f"not a name as in SQL: {text!r}")
        inside, bare = match.groups()
        parts.append(
            _cut(inside.replace('""', '"') if inside is not None else bare.translate(_FOLD))
        )
        position = match.end()
        if position == len(text):
            break
        if text[position] != "." or len(parts) == 3:
            raise ValueError(f"not a name as in SQL: {text!r}")
        position += 1
    return tuple(parts)


def _cut(name: str) -> str:
    return name.encode()[:_MAX_BYTES].decode(errors="ignore")
