"""Expressions of vector indexes, as the server prints them: which column, and what of it."""

from __future__ import annotations

import pytest

from cdc_sync.mapping.index_expressions import IndexedVector, IndexUse, indexed_vector

WHOLE, HALF, BINARY, PART = IndexUse.WHOLE, IndexUse.HALF, IndexUse.BINARY, IndexUse.PART


@pytest.mark.parametrize(
    ("expression", "vector"),
    [
        ("((embedding)::halfvec(1536))", IndexedVector("embedding", HALF, 1536)),
        ("((embedding)::public.halfvec(3))", IndexedVector("embedding", HALF, 3)),
        ('((embedding)::"Odd ""s".halfvec(3))', IndexedVector("embedding", HALF, 3)),
        ("(embedding)::vector(768)", IndexedVector("embedding", WHOLE, 768)),
        ("((s)::sparsevec(9))", IndexedVector("s", WHOLE, 9)),
        ('(("Em (b) ""x"" :: é")::halfvec(3))', IndexedVector('Em (b) "x" :: é', HALF, 3)),
        ("((binary_quantize(embedding))::bit(64))", IndexedVector("embedding", BINARY, 64)),
        (
            "((public.binary_quantize((embedding)::public.halfvec(64)))::bit(64))",
            IndexedVector("embedding", BINARY, 64),
        ),
        ("((subvector(embedding, 1, 256))::vector(256))", IndexedVector("embedding", PART)),
        (
            "((binary_quantize(subvector(embedding, 1, 256)))::bit(256))",
            IndexedVector("embedding", PART),
        ),
        (
            "((subvector(embedding, 1, 256))::halfvec(256))",
            IndexedVector("embedding", PART),
        ),
        ("l2_normalize(embedding)", IndexedVector("embedding", WHOLE, None, normalized=True)),
        (
            "((l2_normalize(embedding))::halfvec(3))",
            IndexedVector("embedding", HALF, 3, normalized=True),
        ),
        # The outermost cast is what the index holds.
        ("(((embedding)::halfvec(3))::vector(3))", IndexedVector("embedding", HALF, 3)),
    ],
)
def test_known_forms(expression: str, vector: IndexedVector) -> None:
    assert indexed_vector(expression) == vector


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "lower(title)",
        "(a + b)",
        "((a)::text)",
        "CASE WHEN a THEN b ELSE c END",
        "((embedding)::halfvec(3)",
        "((embedding)::halfvec(x))",
        "binary_quantize(a, b)",
        "coalesce(a, b)",
        "('[1,2,3]'::vector)",
        "subvector(1, 2, 3)",
        '"unfinished',
        "(embedding)::halfvec(3) DESC",
        "::vector",
        "3",
    ],
)
def test_what_is_not_understood(expression: str) -> None:
    assert indexed_vector(expression) is None
