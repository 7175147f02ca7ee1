"""Documents encoded without care are as those encoded with it."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdc_sync.mapping import document_wire
from cdc_sync.mapping.decoding import MALFORMED, JsonValue
from cdc_sync.mapping.document_wire import encode_document
from cdc_sync.mapping.documents import document
from cdc_sync.mapping.protobuf import encode_value

digits = st.text("0123456789", min_size=1, max_size=40)
#: Numbers as JSON may spell them, of any size.
spelled = st.builds(
    lambda sign, first, rest, fraction, exponent: f"{sign}{first}{rest}{fraction}{exponent}",
    st.sampled_from(["", "-"]),
    st.sampled_from("123456789"),
    st.text("0123456789", max_size=40),
    st.one_of(st.just(""), digits.map(lambda text: f".{text}")),
    st.one_of(
        st.just(""),
        st.builds(
            lambda letter, power: f"{letter}{power}",
            st.sampled_from(["e", "E", "e+", "E-", "e-"]),
            st.integers(0, 400),
        ),
    ),
)
#: What has been hardest: where int64, uint64 and double end.
edges = st.builds(
    lambda base, step, tail: f"{base + step}{tail}",
    st.sampled_from([2**63, -(2**63), 2**64, 10**18, 10**19, 10**308, 2**1024]),
    st.integers(-2, 2),
    st.sampled_from(["", ".0", ".5", "e0", "e1"]),
)
texts = st.one_of(
    st.text(max_size=5),
    st.sampled_from(["\\ud800", "\\udc00\\ud800", "\\ud83d\\ude00", "\\u0000", "\\u0041"]),
    st.integers(120, 130).map(lambda size: "é" * (size // 2) + "x" * (size % 2)),
    st.sampled_from([16_380, 16_384]).map(lambda size: "y" * size),
)
quoted = texts.map(
    lambda text: f'"{text}"' if text.startswith("\\u") else json.dumps(text, ensure_ascii=False)
)
scalars = st.one_of(spelled, edges, quoted, st.sampled_from(["null", "true", "false", "-0", "0.0"]))
documents = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(quoted, inner), max_size=4).map(
            lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items) + "}"
        ),
    ),
    max_leaves=12,
)


def outcome(data: bytes) -> bytes | None:
    """What the decoder and the general encoder make of a document; None: they refuse it."""
    try:
        return encode_value(document(data))
    except MALFORMED:
        return None


def encoded(data: bytes) -> bytes | None:
    try:
        return encode_document(data)
    except MALFORMED:
        return None


@given(documents.map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"9223372036854775807")
@example(b"9223372036854775808")
@example(b"-9223372036854775808")
@example(b"-9223372036854775809")
@example(b"18446744073709551616")
@example(b"-9223372036854775808.0")
@example(b"[1e400, 1e-400, 1e308]")
@example(b'{"a": 1, "a": "\\ud800"}')
@example(b'{"\xff": "\xff"}')
@example(b"[NaN]")
@example(b"")
@example(b"[" * 100 + b"]" * 100)
@example(b"[" * 100_000)
def test_both_ways_give_the_same(data: bytes) -> None:
    assert encoded(data) == outcome(data)


@given(st.binary(max_size=30))
def test_any_bytes_are_taken_the_same(data: bytes) -> None:
    assert encoded(data) == outcome(data)


@pytest.mark.parametrize(
    "value",
    [{"page": 7, "source": "web"}, [1, "two", 2.5, None, True, {"x": [-1, 1 << 40]}], "é", 3],
)
def test_an_ordinary_document_is_parsed_once(
    value: JsonValue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(data: bytes) -> JsonValue:
        raise AssertionError(f"{len(data)} bytes were parsed with care")

    monkeypatch.setattr(document_wire, "parse_with_care", refuse)
    assert encode_document(json.dumps(value).encode()) == encode_value(value)
