"""Every requirement has a test that names it, or a document says why it does not apply.

The markers are read from the source text: nothing is imported, and a test that is skipped counts.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

TESTS: Final = Path(__file__).resolve().parents[1]


def span(first: int, last: int) -> set[str]:
    return {f"R{number}" for number in range(first, last + 1)}


#: Does not apply, as the document says.
DOCUMENTED: Final = {"R48": "failures.md"}
#: All there are.
KNOWN: Final = span(1, 90)
REQUIRED: Final = KNOWN - DOCUMENTED.keys()


def is_requirement(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.requirement"


def markers(tree: ast.Module) -> Iterator[ast.Call]:
    """Calls of the marker that mark a test: decorators of test functions and classes, and
    ``pytestmark``."""
    for node in ast.walk(tree):
        marked: list[ast.expr] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.lower().startswith("test"):
                marked = node.decorator_list
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            marked = [node.value]
            if isinstance(node.value, ast.List | ast.Tuple):
                marked = node.value.elts
        yield from (call for call in marked if isinstance(call, ast.Call) and is_requirement(call))


def named_ids(text: str) -> set[str]:
    """The ids that the tests of a module name. Fails for a marker without ids, or with others than
    texts."""
    found: set[str] = set()
    for call in markers(ast.parse(text)):
        ids = {ast.literal_eval(argument) for argument in call.args}
        assert ids, f"line {call.lineno}: a requirement marker that names none"
        assert not call.keywords, f"line {call.lineno}: the marker takes ids only"
        assert all(isinstance(id_, str) for id_ in ids), f"line {call.lineno}: {ids}"
        found |= ids
    return found


def by_id() -> dict[str, set[str]]:
    """The test modules that name each requirement."""
    modules: defaultdict[str, set[str]] = defaultdict(set)
    for path in sorted(TESTS.rglob("test_*.py")):
        for id_ in named_ids(path.read_text(encoding="utf-8")):
            modules[id_].add(str(path.relative_to(TESTS)))
    return dict(modules)


def test_every_listed_requirement_is_named_by_a_test() -> None:
    missing = REQUIRED - set(by_id())
    assert not missing, f"no test names {', '.join(sorted(missing, key=lambda r: int(r[1:])))}"


def test_what_does_not_apply_is_documented() -> None:
    for id_, document in DOCUMENTED.items():
        text = (TESTS.parent / "docs" / document).read_text(encoding="utf-8")
        assert f"({id_})" in text


def test_no_test_names_a_requirement_that_is_none() -> None:
    unknown = {id_: where for id_, where in by_id().items() if id_ not in KNOWN}
    assert not unknown


def test_what_counts_as_naming() -> None:
    text = """
pytestmark = [pytest.mark.slow, pytest.mark.requirement("R1")]

@pytest.mark.requirement("R2", "R3")
async def test_one(): ...

class TestMany:
    @pytest.mark.parametrize("x", [1])
    @pytest.mark.requirement("R4")
    def test_two(self): ...

@pytest.mark.requirement("R5")
def not_collected(): ...

# @pytest.mark.requirement("R6")
def test_three(): "pytest.mark.requirement('R7')"
"""
    assert named_ids(text) == {"R1", "R2", "R3", "R4"}
    with pytest.raises(AssertionError, match="names none"):
        named_ids("@pytest.mark.requirement()\ndef test_one(): ...")
