"""Point ids as Qdrant's migration tool computes them.

The expected texts and ids are output of the tool's own functions (``keyToString`` and
``arbitraryIDToUUID``, with pgx 5.10.0 and google/uuid 1.6.0), run over values of these types in a
Postgres 18.
"""

from __future__ import annotations

import re
import struct
import uuid
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdc_sync.config import TableSettings
from cdc_sync.errors import ConfigError, MappingError
from cdc_sync.mapping.ids import compile_key_id, compile_point_id, plan_fingerprint
from cdc_sync.mapping.migration_ids import migration_scheme
from cdc_sync.mapping.options import PlanOptions
from cdc_sync.mapping.plan import ColumnPlan, IdScheme, TablePlan
from cdc_sync.mapping.planner import build_plan
from cdc_sync.mapping.table import Column, Index, IndexColumn, PgType, Table, TypeKind
from cdc_sync.rows import UNCHANGED, RawValue, TextValue
from cdc_sync.sync.planning import plan_options
from tests.support.mapping_types import array, core, domain, table_plan

UUID_TEXT = "550e8400-e29b-41d4-a716-446655440000"
VERSION_5 = "b80c8fef-a677-5340-85fb-2c162d75df03"  # the hash of "1"
MOOD = PgType(90001, "public", "mood", TypeKind.ENUM)
CITEXT = PgType(90002, "public", "citext", extension="citext")
LTREE = PgType(90003, "public", "ltree", extension="ltree")


def plan_of(type_: PgType, ids: str = "qdrant-migration") -> TablePlan:
    plan = table_plan(ColumnPlan("k", type_, "k"), ColumnPlan("rest", core("text"), "rest"))
    scheme = migration_scheme("public.docs", [("k", type_)], None, ids)
    return TablePlan(
        **{name: getattr(plan, name) for name in plan.__slots__} | {"id_scheme": scheme}
    )


def id_of(type_: PgType, value: RawValue, ids: str = "qdrant-migration") -> object:
    plan = plan_of(type_, ids)
    found = compile_point_id(plan)([value, UNCHANGED])
    assert compile_key_id(plan)([value]) == found
    return found


def timestamp(seconds: float) -> bytes:
    """Seconds since 2026-01-31 as Postgres sends them: microseconds since 2000-01-01."""
    return struct.pack(">q", (9527 * 86400) * 10**6 + round(seconds * 10**6))


# (type, binary, text, the tool's text, the tool's id)
EXAMPLES = [
    ("int2", struct.pack(">h", 5), "5", "5", "afca48e9-59ea-5a28-b8a4-88e0cc6eda1c"),
    ("int4", struct.pack(">i", -7), "-7", "-7", "bde9e496-392e-59b2-a266-1374bd4edff6"),
    ("int4", struct.pack(">i", 1), "1", "1", "b80c8fef-a677-5340-85fb-2c162d75df03"),
    ("int4", struct.pack(">i", 42), "42", "42", "5c2b23de-4bad-58ee-a4b3-f22f3b9cfd7d"),
    (
        "int8",
        struct.pack(">q", 2**63 - 1),
        "9223372036854775807",
        "9223372036854775807",
        "ed51891a-c47b-5ebd-a0cd-fbf64fe112ae",
    ),
    ("oid", struct.pack(">I", 123), "123", "123", "b9b6607d-6974-594f-8e99-ac3de71c4d89"),
    ("xid8", struct.pack(">Q", 77), "77", "77", "3a242dce-7e7f-5644-bcf4-1c0c7baf3033"),
    ("bool", b"\1", "t", "true", "9cb261ba-0d48-50e4-afda-63304dd43c3d"),
    ("float4", struct.pack(">f", 1e6), "1e+06", "1e+06", "5ac0b4e3-0b64-5102-b8da-6bbee7b927a6"),
    ("float4", struct.pack(">f", 0.1), "0.1", "0.1", "03b66c9d-74a0-5e3e-ae01-95fe5456c75b"),
    (
        "float4",
        struct.pack(">f", 16777216),
        "1.6777216e+07",
        "1.6777216e+07",
        "12e72bed-b2af-528f-80bf-1a885513eae9",
    ),
    ("float4", struct.pack(">f", 1e-5), "1e-05", "1e-05", "767833d0-b054-539f-b845-b3fee42acfce"),
    ("float4", struct.pack(">f", -0.0), "-0", "-0", "46680ac9-1046-57e0-bca3-41ef088f1484"),
    (
        "float4",
        struct.pack(">f", float("nan")),
        "NaN",
        "NaN",
        "be45d233-d8eb-55b1-a52b-dbaa1552febd",
    ),
    (
        "float4",
        struct.pack(">f", float("inf")),
        "Infinity",
        "+Inf",
        "9e72481e-dd90-508e-b83d-064d101a453d",
    ),
    ("float8", struct.pack(">d", 1), "1", "1", "b80c8fef-a677-5340-85fb-2c162d75df03"),
    (
        "float8",
        struct.pack(">d", 123456789),
        "123456789",
        "1.23456789e+08",
        "359928c0-6678-5328-9457-c321eaf61f84",
    ),
    ("float8", struct.pack(">d", 1e21), "1e+21", "1e+21", "7252fddc-d953-53c2-b3f3-2ceb2c7882cf"),
    (
        "float8",
        struct.pack(">d", 0.0001),
        "0.0001",
        "0.0001",
        "9b61cb5a-ccbe-50a4-a842-ff9d9e569539",
    ),
    (
        "float8",
        struct.pack(">d", 100000),
        "100000",
        "100000",
        "b6c787b8-9925-5169-8652-57eb221f41d7",
    ),
    (
        "float8",
        struct.pack(">d", 123456.789),
        "123456.789",
        "123456.789",
        "ab1df4e5-3a12-5fa5-8228-902edb285e9e",
    ),
    (
        "float8",
        struct.pack(">d", 5e-324),
        "5e-324",
        "5e-324",
        "d46f1c8e-bf33-5871-903f-048b9c317b5a",
    ),
    (
        "float8",
        struct.pack(">d", float("-inf")),
        "-Infinity",
        "-Inf",
        "c5ad5489-b92e-539d-a8a4-6d850e6397a0",
    ),
    ("text", b"abc", "abc", "abc", "68661508-f3c4-55b4-945d-ae2b4dfe5db4"),
    ("varchar", b"user:7", "user:7", "user:7", "bd9cbeb4-93d3-5ed3-b7fb-a0d8ab5e85a2"),
    ("bpchar", b"ab    ", "ab    ", "ab    ", "e6c0a4e7-4ced-57cb-bcee-74f8d6feeda2"),
    ("name", b"nm", "nm", "nm", "9f01df29-9a78-527b-82dd-0cc0b6d4e230"),
    ("char", b"a", "a", "97", "7911a2fe-90e2-5884-a9a5-ffbca4979c3f"),
    ("uuid", uuid.UUID(UUID_TEXT).bytes, UUID_TEXT, UUID_TEXT, UUID_TEXT),
    ("text", UUID_TEXT.encode(), UUID_TEXT, UUID_TEXT, UUID_TEXT),
    ("bytea", b"\1\2", "\\x0102", "\1\2", "e09ecef2-50e2-5a04-ab24-3c6941797566"),
    ("bytea", b"\xff\0", "\\xff00", None, "d5c9ca94-b48a-5647-b09c-b366ceb01cc8"),
    (
        "bytea",
        uuid.UUID(UUID_TEXT).bytes,
        "\\x" + UUID_TEXT.replace("-", ""),
        UUID_TEXT,
        UUID_TEXT,
    ),
    (
        "date",
        struct.pack(">i", 9527),
        "2026-01-31",
        "2026-01-31 00:00:00 +0000 UTC",
        "ef3ead92-9cae-587d-bc46-ad3206f10dee",
    ),
    (
        "date",
        struct.pack(">i", -746117),
        "0044-03-15 BC",
        "-0043-03-15 00:00:00 +0000 UTC",
        "a257d4df-8494-52d1-bb0e-1774a1f1db92",
    ),
    (
        "date",
        struct.pack(">i", 2**31 - 1),
        "infinity",
        "infinity",
        "468c44ff-4681-58ba-b737-4eb4b8259abe",
    ),
    (
        "timestamp",
        timestamp(37230.5),
        "2026-01-31 10:20:30.5",
        "2026-01-31 10:20:30.5 +0000 UTC",
        "f1a1ae20-2b4b-5a0c-8059-056cb89e452d",
    ),
    (
        "timestamp",
        timestamp(37230.000123),
        "2026-01-31 10:20:30.000123",
        "2026-01-31 10:20:30.000123 +0000 UTC",
        "b85c50bc-c856-58bf-848e-5ba2ec1153aa",
    ),
    (
        "timestamp",
        timestamp(37230),
        "2026-01-31 10:20:30",
        "2026-01-31 10:20:30 +0000 UTC",
        "fe9dab7e-1069-5cea-9544-a5c1a75f686d",
    ),
    (
        "timestamp",
        struct.pack(">q", -(2**63)),
        "-infinity",
        "-infinity",
        "98854d3f-d65e-5138-ab23-fcc421ef4b70",
    ),
    (
        "inet",
        bytes([2, 32, 0, 4, 10, 1, 2, 3]),
        "10.1.2.3",
        "10.1.2.3/32",
        "032c7076-c328-57ae-b5d0-f2ed095d5efa",
    ),
    (
        "inet",
        bytes([2, 8, 0, 4, 10, 1, 2, 3]),
        "10.1.2.3/8",
        "10.1.2.3/8",
        "cbb90ec9-a00b-52be-9191-1c216bbe8e2c",
    ),
    (
        "inet",
        bytes([3, 128, 0, 16, *[0] * 15, 1]),
        "::1",
        "::1/128",
        "420164f8-119c-5f78-8777-8174dee650a4",
    ),
    (
        "inet",
        bytes([3, 128, 0, 16, *[0] * 10, 255, 255, 1, 2, 3, 4]),
        "::ffff:1.2.3.4",
        "::ffff:1.2.3.4/128",
        "1172cd8a-a915-5a1b-8258-3ac33aadf33c",
    ),
    (
        "inet",
        bytes([3, 128, 0, 16, *[0] * 12, 1, 2, 3, 4]),
        "::1.2.3.4",
        "::102:304/128",
        "22fdcb96-4bc5-542a-9876-535ddf16322c",
    ),
    (
        "cidr",
        bytes([2, 8, 1, 4, 10, 0, 0, 0]),
        "10.0.0.0/8",
        "10.0.0.0/8",
        "42057b45-a301-5e01-bf7f-db2d5b153588",
    ),
    (
        "macaddr",
        bytes([8, 0, 43, 1, 2, 3]),
        "08:00:2b:01:02:03",
        "08:00:2b:01:02:03",
        "36425ae6-198c-5a8d-bac1-4e9f315240f9",
    ),
    (
        "macaddr8",
        bytes([8, 0, 43, 1, 2, 3, 4, 5]),
        "08:00:2b:01:02:03:04:05",
        "08:00:2b:01:02:03:04:05",
        "032389ac-e4a6-5661-a06d-1819c883cde6",
    ),
    (
        "pg_lsn",
        struct.pack(">II", 0x16, 0xB374D848),
        "16/B374D848",
        "16/B374D848",
        "67a89835-0adf-5d65-86b6-2a99631a0f9b",
    ),
]


@pytest.mark.parametrize(("name", "binary", "text", "tool_text", "expected"), EXAMPLES)
def test_worked_examples(
    name: str, binary: bytes, text: str, tool_text: str | None, expected: str
) -> None:
    type_ = core(name)
    assert id_of(type_, binary) == expected
    assert id_of(type_, TextValue(text.encode())) == expected
    assert id_of(domain(type_), binary) == expected
    if tool_text is not None and tool_text != expected:
        assert str(uuid.uuid5(uuid.NAMESPACE_URL, tool_text)) == expected


def test_enums_and_extension_types() -> None:
    examples: Mapping[str, tuple[PgType, bytes, bytes]] = {
        "85da163f-60b4-5845-8637-be66363d67f9": (MOOD, b"happy", b"happy"),
        "af8c65ce-2018-52ce-9532-5d62c4ed9d8a": (CITEXT, b"AbC", b"AbC"),
        "a37888df-4975-56b9-8e52-9561bbc36afc": (LTREE, b"\1a.b", b"a.b"),
    }
    for expected, (type_, binary, text) in examples.items():
        assert id_of(type_, binary) == expected
        assert id_of(type_, TextValue(text)) == expected


def test_the_exponent_of_a_float4_is_that_of_its_digits() -> None:
    # 0.0001 as float4 is less than 1e-4.
    assert id_of(core("float4"), struct.pack(">f", 1e-4)) == str(
        uuid.uuid5(uuid.NAMESPACE_URL, "0.0001")
    )


# -- keys that could share an id


SHARED = [
    UUID_TEXT.upper(),
    UUID_TEXT.replace("-", ""),
    UUID_TEXT.replace("-", "").upper(),
    f"urn:uuid:{UUID_TEXT}",
    f"URN:UUID:{UUID_TEXT}",
    f"{{{UUID_TEXT}}}",
    f"x{UUID_TEXT}y",
    f"\n{UUID_TEXT}\n",
    VERSION_5,
]


@pytest.mark.parametrize("text", SHARED)
def test_texts_that_may_share_an_id_are_refused(text: str) -> None:
    for type_ in (core("text"), core("varchar"), core("bytea"), CITEXT):
        with pytest.raises(MappingError) as caught:
            id_of(type_, text.encode())
        assert "same point id" in caught.value.message
        assert caught.value.remedy is not None
        assert "qdrant-migration-uuid" in caught.value.remedy
        assert text not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        UUID_TEXT[:-1],
        UUID_TEXT + "0",
        UUID_TEXT.replace("-", "")[:-1],
        UUID_TEXT.replace("-", "_"),
        "é" + UUID_TEXT,  # 38 bytes, but the middle 36 are none
        f"urn:uuid_{UUID_TEXT}",
        f" {UUID_TEXT}",
        "g" * 32,
        "",
        "é",
        "\0",
    ],
)
def test_texts_that_are_no_uuid_are_hashed(text: str) -> None:
    expected = str(uuid.uuid5(uuid.NAMESPACE_URL, text))
    assert id_of(core("text"), text.encode()) == expected
    assert id_of(core("text"), TextValue(text.encode())) == expected
    assert id_of(core("bytea"), text.encode()) == expected


def test_bytes_of_a_uuid_and_its_text_do_not_both_become_it() -> None:
    assert id_of(core("bytea"), uuid.UUID(UUID_TEXT).bytes) == UUID_TEXT
    for data in (UUID_TEXT.encode(), uuid.UUID(VERSION_5).bytes):
        with pytest.raises(MappingError):
            id_of(core("bytea"), data)


def test_tables_of_uuids_as_text() -> None:
    for ids, good, same in (
        ("qdrant-migration-uuid", UUID_TEXT, UUID_TEXT),
        ("qdrant-migration-uuid", VERSION_5, VERSION_5),
        ("qdrant-migration-hex", UUID_TEXT.replace("-", ""), UUID_TEXT),
        ("qdrant-migration-hex", VERSION_5.replace("-", ""), VERSION_5),
    ):
        assert id_of(core("text"), good.encode(), ids) == same
        assert id_of(core("text"), TextValue(good.encode()), ids) == same
    for ids, bad in (
        ("qdrant-migration-uuid", UUID_TEXT.replace("-", "")),
        ("qdrant-migration-uuid", UUID_TEXT.upper()),
        ("qdrant-migration-uuid", "abc"),
        ("qdrant-migration-hex", UUID_TEXT),
        ("qdrant-migration-hex", UUID_TEXT.replace("-", "").upper()),
        ("qdrant-migration-hex", "abc"),
    ):
        with pytest.raises(MappingError):
            id_of(core("text"), bad.encode(), ids)
    assert id_of(core("bytea"), uuid.UUID(VERSION_5).bytes, "qdrant-migration-uuid") == VERSION_5


_HEX = st.text("0123456789abcdefABCDEF", min_size=32, max_size=32)


def _spelled(digits: str, form: int) -> str:
    hyphenated = "-".join(re.fullmatch("(.{8})(.{4})(.{4})(.{4})(.{12})", digits).groups())  # type: ignore[union-attr]
    return (
        digits,
        hyphenated,
        hyphenated.lower(),
        f"urn:uuid:{hyphenated}",
        f"{{{hyphenated}}}",
        str(uuid.uuid5(uuid.NAMESPACE_URL, digits[:4])),
        digits[:4],
    )[form]


@given(
    _HEX,
    st.lists(st.integers(0, 6), min_size=2, max_size=7),
    st.sampled_from(["qdrant-migration", "qdrant-migration-uuid", "qdrant-migration-hex"]),
    st.sampled_from(["text", "bytea"]),
)
def test_no_two_keys_share_an_id(digits: str, forms: list[int], ids: str, name: str) -> None:
    values = {_spelled(digits, form).encode() for form in forms}
    values |= {_spelled(digits.lower(), form).encode() for form in forms}
    if name == "bytea":
        values.add(bytes.fromhex(digits))
    found: dict[object, bytes] = {}
    for value in values:
        try:
            id_ = id_of(core(name), value, ids)
        except MappingError:
            continue
        assert found.setdefault(id_, value) == value


@pytest.mark.parametrize(
    ("value", "message"), [(None, "is NULL"), (UNCHANGED, "is not in the message")]
)
def test_keys_without_a_value(value: RawValue, message: str) -> None:
    with pytest.raises(MappingError, match=message):
        id_of(core("int4"), value)


def test_malformed_keys_are_refused() -> None:
    for name, bad in (("int4", b"\0"), ("inet", b"\2"), ("float8", b"1234"), ("char", b"ab")):
        with pytest.raises(MappingError, match="does not hold a value"):
            id_of(core(name), bad)
    with pytest.raises(MappingError, match="does not hold a value"):
        id_of(LTREE, b"\1\xff")


# -- configuration


REFUSED = ["numeric", "timestamptz", "time", "timetz", "interval", "money", "bit", "varbit"]


@pytest.mark.parametrize("name", [*REFUSED, "tsvector", "tid"])
def test_keys_of_which_the_tool_has_no_stable_text_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        migration_scheme("public.docs", [("k", core(name))], None, "qdrant-migration")
    assert name in caught.value.message
    assert "Take `ids` out" in (caught.value.remedy or "")


def test_what_else_has_no_id_of_the_tool() -> None:
    key = [("a", core("int4")), ("b", core("int4"))]
    with pytest.raises(ConfigError, match="one column"):
        migration_scheme("public.docs", key, None, "qdrant-migration")
    with pytest.raises(ConfigError, match="namespace"):
        migration_scheme("public.docs", key[:1], "n", "qdrant-migration")
    with pytest.raises(ConfigError, match="keys of text"):
        migration_scheme("public.docs", key[:1], None, "qdrant-migration-hex")
    with pytest.raises(ConfigError, match="cannot be computed"):
        migration_scheme("public.docs", [("a", array(core("int4")))], None, "qdrant-migration")


def _table(*key: Column) -> Table:
    names = tuple(column.name for column in key)
    index = Index(
        "docs_pkey",
        "btree",
        tuple(IndexColumn(name, "text_ops") for name in names),
        unique=True,
        primary=True,
    )
    note = Column("note", 9, core("text"))
    return Table(1, "public", "docs", False, (*key, note), names, "d", names, (index,), ())


def test_the_setting_reaches_the_plan() -> None:
    settings = TableSettings.model_validate({"name": "docs", "ids": "qdrant-migration"})
    options = plan_options(settings)
    number = _table(Column("id", 1, core("int8"), not_null=True))
    plan = build_plan(number, options).plan
    assert plan.id_scheme is IdScheme.MIGRATION
    native = build_plan(number, PlanOptions()).plan
    assert native.id_scheme is IdScheme.INTEGER
    assert plan_fingerprint(plan) != plan_fingerprint(native)
    # Such ids do not stand for the key, so its payload index stays.
    text = _table(Column("id", 1, core("text"), not_null=True))
    assert [index.field for index in build_plan(text, options).plan.payload_indexes] == ["id"]
    uuids = build_plan(_table(Column("id", 1, core("uuid"), not_null=True)), options).plan
    assert (uuids.id_scheme, uuids.payload_indexes) == (IdScheme.UUID, ())
    two = _table(
        Column("a", 1, core("int8"), not_null=True), Column("b", 2, core("int8"), not_null=True)
    )
    with pytest.raises(ConfigError, match="one column"):
        build_plan(two, options)
