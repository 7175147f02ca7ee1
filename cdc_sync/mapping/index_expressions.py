"""Understands the expressions that people index vectors by, as the server prints them.

    (embedding)::halfvec(1536)                        stored as half precision in the index
    (embedding)::vector(768)                          a column declared without a dimension
    (binary_quantize(embedding))::bit(1536)           one bit a component
    (subvector(embedding, 1, 256))::vector(256)       a part of the vector
    l2_normalize(embedding)                           the vector brought to unit length

pgvector's names may come with the schema of the extension.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final, TypeAlias

_TOKEN: Final = re.compile(
    r'\s*(?:(?P<name>"(?:[^"]|"")+"|[^\W\d][\w$]*)|(?P<number>[0-9]+)|(?P<mark>::|[(),.]))'
)
_CASTS: Final = frozenset({"vector", "halfvec", "sparsevec", "bit"})


class IndexUse(enum.Enum):
    """What of a vector an index holds."""

    WHOLE = "whole"  #: the vector as it is
    HALF = "half"  #: its components in half precision
    BINARY = "binary"  #: their signs, a bit each
    PART = "part"  #: some of its components


@dataclass(frozen=True, slots=True)
class IndexedVector:
    """A vector column as an index has it. ``dimension`` is that of the index, None if it is the
    column's; ``normalized``: the index is over vectors of unit length.
    """

    column: str
    use: IndexUse = IndexUse.WHOLE
    dimension: int | None = None
    normalized: bool = False


@dataclass(frozen=True, slots=True)
class _Name:
    name: str


@dataclass(frozen=True, slots=True)
class _Cast:
    inner: _Node
    type: str
    typmod: int | None


@dataclass(frozen=True, slots=True)
class _Call:
    function: str
    arguments: tuple[_Node, ...]


_Node: TypeAlias = "_Name | _Cast | _Call | int"


class _NotUnderstoodError(Exception):
    """The expression is of a form that is not known here."""


class _Parser:
    """Reads names, calls, casts and parentheses; whatever else there is is not understood."""

    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        position = 0
        while position < len(text.rstrip()):
            match = _TOKEN.match(text, position)
            if match is None:
                raise _NotUnderstoodError
            self._tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
            position = match.end()

    def parse(self) -> _Node:
        node = self._expression()
        if self._tokens:
            raise _NotUnderstoodError
        return node

    def _accept(self, token: str) -> bool:
        if self._tokens and self._tokens[0] == ("mark", token):
            del self._tokens[0]
            return True
        return False

    def _take(self, kind: str) -> str:
        if not self._tokens or self._tokens[0][0] != kind:
            raise _NotUnderstoodError
        return self._tokens.pop(0)[1]

    def _expression(self) -> _Node:
        node = self._primary()
        while self._accept("::"):
            type_ = self._name()
            typmod = None
            if self._accept("("):
                typmod = int(self._take("number"))
                self._expect(")")
            node = _Cast(node, type_, typmod)
        return node

    def _expect(self, token: str) -> None:
        if not self._accept(token):
            raise _NotUnderstoodError

    def _primary(self) -> _Node:
        if self._accept("("):
            node = self._expression()
            self._expect(")")
            return node
        if self._tokens and self._tokens[0][0] == "number":
            return int(self._take("number"))
        name = self._name()
        if not self._accept("("):
            return _Name(name)
        arguments = [self._expression()]
        while self._accept(","):
            arguments.append(self._expression())
        self._expect(")")
        return _Call(name, tuple(arguments))

    def _name(self) -> str:
        """A name without its schema."""
        name = self._take("name")
        while self._accept("."):
            name = self._take("name")
        return name[1:-1].replace('""', '"') if name.startswith('"') else name


def indexed_vector(expression: str) -> IndexedVector | None:
    """Return which column an expression is of and how, None if it is of a form not known here."""
    try:
        return _understand(_Parser(expression).parse())
    except _NotUnderstoodError:
        return None


def _understand(node: _Node) -> IndexedVector:
    use, dimension, normalized = IndexUse.WHOLE, None, False
    while not isinstance(node, _Name):
        if isinstance(node, _Cast):
            if node.type not in _CASTS:
                raise _NotUnderstoodError
            dimension = node.typmod if dimension is None else dimension
            if node.type == "halfvec" and use is IndexUse.WHOLE:
                use = IndexUse.HALF
            node = node.inner
            continue
        if not isinstance(node, _Call):
            raise _NotUnderstoodError
        if node.function == "subvector":
            use = IndexUse.PART
        elif node.function == "binary_quantize" and len(node.arguments) == 1:
            use = use if use is IndexUse.PART else IndexUse.BINARY
        elif node.function == "l2_normalize" and len(node.arguments) == 1:
            normalized = True
        else:
            raise _NotUnderstoodError
        node = node.arguments[0]
    return IndexedVector(node.name, use, None if use is IndexUse.PART else dimension, normalized)
