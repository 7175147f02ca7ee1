"""Settings: where values come from, and what is said when they are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cdc_sync.errors import ConfigError, ExitCode
from cdc_sync.loading import FLAGS, TABLE_FLAGS, LoadedSettings, Origin, load_settings
from cdc_sync.settings_schema import line_of

SECRET = "hunter2-never-print-me"
URL = f"postgresql://sync:{SECRET}@db/app"
MINIMAL = """
[source]
url = "postgresql://db/app"

[[tables]]
name = "items"
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def writer(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text)
        return path

    return writer


def load(
    config: Path | None = None,
    flags: dict[str, object] | None = None,
    environ: dict[str, str] | None = None,
) -> LoadedSettings:
    return load_settings(config, flags or {}, environ or {})


def refused(
    config: Path | None = None,
    flags: dict[str, object] | None = None,
    environ: dict[str, str] | None = None,
) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(config, flags, environ)
    assert SECRET not in f"{caught.value.message}{caught.value.remedy}{caught.value!r}"
    assert "pydantic" not in caught.value.message
    assert caught.value.policy.exit_code is ExitCode.CONFIG
    return caught.value


# -- precedence


def test_each_source_gives_way_to_the_one_above_it(write: Write, tmp_path: Path) -> None:
    config = write(f"{MINIMAL}\n[pipeline]\nname = 'file'\n")
    secret = tmp_path / "name"
    secret.write_text("secretfile\n")
    environ: dict[str, str] = {}
    flags: dict[str, object] = {}
    seen = []

    def look() -> None:
        loaded = load(config, flags, environ)
        seen.append((loaded.settings.pipeline.name, loaded.origin("pipeline.name")))

    look()
    environ["CDC_SYNC_PIPELINE__NAME_FILE"] = str(secret)
    look()
    environ["CDC_SYNC_PIPELINE__NAME"] = "environment"
    look()
    flags["pipeline.name"] = "flag"
    look()
    assert seen == [
        ("file", Origin("file", str(config))),
        ("secretfile", Origin("secret file", f"{secret} (CDC_SYNC_PIPELINE__NAME_FILE)")),
        ("environment", Origin("environment", "CDC_SYNC_PIPELINE__NAME")),
        ("flag", Origin("flag", "--pipeline.name")),
    ]


def test_sources_merge_key_by_key_within_a_section(write: Write) -> None:
    config = write(f"{MINIMAL}\n[http]\nhost = '0.0.0.0'\nport = 1\n")
    loaded = load(config, {"http.port": "3"}, {"CDC_SYNC_HTTP__PORT": "2"})
    assert (loaded.settings.http.host, loaded.settings.http.port) == ("0.0.0.0", 3)
    assert loaded.origin("http.host").kind == "file"
    assert loaded.origin("http.enabled") == Origin("default")


def test_the_config_file_comes_from_the_environment_unless_given(
    write: Write, tmp_path: Path
) -> None:
    config = write(MINIMAL)
    assert load(None, {}, {"CDC_SYNC_CONFIG": str(config)}).config_file == config
    environ = {"CDC_SYNC_CONFIG": str(tmp_path / "absent")}
    assert load(config, {}, environ).config_file == config


def test_environment_values_become_numbers_and_booleans(write: Write) -> None:
    environ = {
        "CDC_SYNC_HTTP__ENABLED": "false",
        "CDC_SYNC_MIGRATION__NUM_WORKERS": "3",
        "CDC_SYNC_QDRANT__TIMEOUT_SECONDS": "2.5",
        "CDC_SYNC_QDRANT__API_KEY": "123456",
    }
    settings = load(write(MINIMAL), {}, environ).settings
    assert settings.http.enabled is False
    assert settings.migration.num_workers == 3
    assert settings.qdrant.timeout_seconds == 2.5
    assert settings.qdrant.api_key is not None
    assert settings.qdrant.api_key.get_secret_value() == "123456"


def test_an_empty_variable_counts_as_not_set(write: Write) -> None:
    environ = {"CDC_SYNC_QDRANT__API_KEY": "", "CDC_SYNC_PIPELINE__NAME_FILE": ""}
    loaded = load(write(MINIMAL), {}, environ)
    assert loaded.settings.qdrant.api_key is None
    assert loaded.settings.pipeline.name == "default"


def test_only_one_newline_at_the_end_of_a_secret_is_dropped(write: Write, tmp_path: Path) -> None:
    secret = tmp_path / "key"
    secret.write_bytes(b" key with spaces \n\n")
    loaded = load(write(MINIMAL), {}, {"CDC_SYNC_QDRANT__API_KEY_FILE": str(secret)})
    assert loaded.settings.qdrant.api_key is not None
    assert loaded.settings.qdrant.api_key.get_secret_value() == " key with spaces \n"


def test_a_setting_whose_name_ends_in_file_is_no_secret_file(write: Write) -> None:
    environ = {"CDC_SYNC_QDRANT__CA_FILE": "/nowhere/ca.pem"}
    assert load(write(MINIMAL), {}, environ).settings.qdrant.ca_file == "/nowhere/ca.pem"


# -- one table by flags


def test_flags_alone_describe_one_table() -> None:
    flags = {
        "pg.url": URL,
        "pg.table": "shop.items",
        "pg.key-column": "id",
        "pg.columns": 'id, title,"odd,name"',
        "qdrant.collection": "goods",
        "qdrant.distance-metric": ["a=Cosine", "b=dot,c=euclid"],
        "migration.num-workers": "2",
    }
    settings = load(None, dict(flags)).settings
    (table,) = settings.tables
    assert table.name == "shop.items"
    assert table.key == ["id"]
    assert table.columns == ["id", "title", "odd,name"]
    assert table.collection == "goods"
    assert table.metrics == {"a": "cosine", "b": "dot", "c": "euclid"}
    assert settings.migration.num_workers == 2
    assert settings.source.url.get_secret_value() == URL


def test_table_flags_override_the_configured_table_of_that_name(write: Write) -> None:
    config = write(
        f"{MINIMAL}collection = 'a'\nmetrics = {{ x = 'dot', y = 'dot' }}\n"
        "[[tables]]\nname = 'other'\n"
    )
    flags: dict[str, object] = {"pg.table": "items", "qdrant.distance-metric": ["x=euclid"]}
    loaded = load(config, flags)
    (table,) = loaded.settings.tables
    assert (table.name, table.collection) == ("items", "a")
    assert table.metrics == {"x": "euclid", "y": "dot"}
    assert loaded.origin("tables[0].collection").kind == "file"
    assert loaded.origin("tables[0].metrics").kind == "flag"


def test_table_flags_without_a_table_mean_the_only_one(write: Write) -> None:
    loaded = load(write(MINIMAL), {"qdrant.collection": "elsewhere"})
    assert [(t.name, t.collection) for t in loaded.settings.tables] == [("items", "elsewhere")]
    several = write(f"{MINIMAL}\n[[tables]]\nname = 'other'\n")
    assert "--pg.table" in (refused(several, {"qdrant.collection": "x"}).remedy or "")


def test_another_table_by_flag_replaces_the_configured_ones(write: Write) -> None:
    loaded = load(write(f"{MINIMAL}collection = 'a'\n"), {"pg.table": "new"})
    assert [(t.name, t.collection) for t in loaded.settings.tables] == [("new", None)]
    assert "tables[0].collection" not in loaded.origins


def test_tables_from_the_environment_replace_those_of_the_file(write: Write) -> None:
    tables = json.dumps([{"name": "a"}, {"name": "b", "key": ["id"]}])
    loaded = load(write(f"{MINIMAL}key = ['x']\n"), {}, {"CDC_SYNC_TABLES": tables})
    assert [(t.name, t.key) for t in loaded.settings.tables] == [("a", None), ("b", ["id"])]
    assert loaded.origin("tables[0].key") == Origin("default")
    assert loaded.origin("tables[1].key").where == "CDC_SYNC_TABLES"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("pg.columns", "id,,title"),
        ("pg.columns", '"id'),
        ("pg.key-column", " "),
        ("qdrant.distance-metric", ["cosine"]),
        ("qdrant.distance-metric", ["=cosine"]),
        ("qdrant.distance-metric", ["a=cosin"]),
    ],
)
def test_a_wrong_table_flag_is_named(flag: str, value: object) -> None:
    error = refused(None, {"pg.url": URL, "pg.table": "t", flag: value})
    assert f"--{flag}" in error.message


def test_every_flag_leads_to_a_setting() -> None:
    from cdc_sync.config import TableSettings
    from cdc_sync.settings_schema import SECTIONS

    for key in FLAGS.values():
        section, name = key.split(".")
        assert name in SECTIONS[section].model_fields
    assert set(TABLE_FLAGS.values()) <= set(TableSettings.model_fields)


def test_an_unknown_flag_is_an_error_with_a_suggestion() -> None:
    assert "--pg.table" in refused(None, {"pg.tabel": "x"}).message


# -- what is wrong in the environment


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("CDC_SYNC_SORCE__URL", "CDC_SYNC_SOURCE__URL"),
        ("CDC_SYNC_SOURCE__ULR", "CDC_SYNC_SOURCE__URL"),
        ("CDC_SYNC_SOURCE_URL", "CDC_SYNC_SOURCE__URL"),
        ("CDC_SYNC_QDRANT__APIKEY_FILE", "CDC_SYNC_QDRANT__API_KEY_FILE"),
        ("CDC_SYNC_CONFG", "CDC_SYNC_CONFIG"),
        ("cdc_sync_source__url", "CDC_SYNC_SOURCE__URL"),
        ("CDC_SYNC_TABLES__0__NAME", "CDC_SYNC_TABLES"),
    ],
)
def test_a_mistyped_variable_is_refused_with_a_suggestion(
    write: Write, name: str, meant: str
) -> None:
    message = refused(write(MINIMAL), {}, {name: SECRET}).message
    assert name in message
    assert message.endswith(f"{meant}.")


def test_every_unknown_variable_is_listed_at_once(write: Write) -> None:
    environ = {"CDC_SYNC_SNAPSHTO__WORKERS": "1", "CDC_SYNC_XYZ": "1", "OTHER_XYZ": "1"}
    message = refused(write(MINIMAL), {}, environ).message
    assert "CDC_SYNC_SNAPSHTO__WORKERS" in message
    assert "CDC_SYNC_XYZ" in message
    assert "OTHER_XYZ" not in message


def test_the_variables_of_a_kubernetes_service_are_not_ours(write: Write) -> None:
    links = {
        "CDC_SYNC_SERVICE_HOST": "10.0.0.1",
        "CDC_SYNC_SERVICE_PORT": "9464",
        "CDC_SYNC_SERVICE_PORT_HTTP": "9464",
        "CDC_SYNC_PORT": "tcp://10.0.0.1:9464",
        "CDC_SYNC_PORT_9464_TCP": "tcp://10.0.0.1:9464",
        "CDC_SYNC_PORT_9464_TCP_PROTO": "tcp",
        "CDC_SYNC_METRICS_PORT_9464_TCP_ADDR": "10.0.0.1",
    }
    assert load(write(MINIMAL), {}, links).settings.http.port == 9464
    message = refused(write(MINIMAL), {}, {"CDC_SYNC_PORT": "9464"}).message
    assert "CDC_SYNC_HTTP__PORT" in message


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("CDC_SYNC_HTTP__PORT", "70000", "an integer from 0 to 65535"),
        ("CDC_SYNC_HTTP__PORT", "http", "an integer from 0 to 65535"),
        ("CDC_SYNC_HTTP__ENABLED", "perhaps", "true or false"),
        ("CDC_SYNC_QDRANT__TIMEOUT_SECONDS", "nan", "a number greater than 0"),
        ("CDC_SYNC_QDRANT__TIMEOUT_SECONDS", "inf", "a number greater than 0"),
        ("CDC_SYNC_QDRANT__TIMEOUT_SECONDS", "-1", "a number greater than 0"),
        ("CDC_SYNC_LOG__LEVEL", "loud", 'one of "debug", "info", "warning", "error"'),
        ("CDC_SYNC_SOURCE__SLOT", "No-Slot", "a string that matches"),
    ],
)
def test_a_wrong_value_names_key_variable_and_what_is_expected(
    write: Write, variable: str, value: str, expected: str
) -> None:
    message = refused(write(MINIMAL), {}, {variable: value}).message
    key = variable.removeprefix("CDC_SYNC_").lower().replace("__", ".")
    assert message.startswith(f"{key}: expected {expected}")
    assert f"environment variable {variable}" in message


@pytest.mark.parametrize(
    "tables",
    [
        "items",
        '{"name": "items"}',
        "[1]",
        "[]",
        '[{"nmae": "items"}]',
        "[" * 100_000,
        f'[{{"name": "{SECRET}", "key": 1}}]',
    ],
)
def test_wrong_tables_in_the_environment_are_refused(tables: str) -> None:
    environ = {"CDC_SYNC_SOURCE__URL": URL, "CDC_SYNC_TABLES": tables}
    assert "tables" in refused(None, {}, environ).message.lower()


@pytest.mark.parametrize("kind", ["absent", "directory", "empty", "binary", "huge", "nul"])
def test_a_secret_file_that_cannot_be_used_is_named(
    write: Write, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "secret"
    if kind == "directory":
        path.mkdir()
    elif kind != "absent":
        content = {"empty": b"\n", "binary": b"\xff\xfe", "huge": b"x" * 70_000, "nul": b""}[kind]
        path.write_bytes(content)
    named = "a\0b" if kind == "nul" else str(path)
    error = refused(write(MINIMAL), {}, {"CDC_SYNC_SOURCE__URL_FILE": named})
    assert "CDC_SYNC_SOURCE__URL_FILE" in error.message


@pytest.mark.parametrize("secret", [SECRET, URL])
def test_a_secret_put_where_its_path_belongs_is_not_shown(write: Write, secret: str) -> None:
    error = refused(write(MINIMAL), {}, {"CDC_SYNC_SOURCE__URL_FILE": secret})
    assert "CDC_SYNC_SOURCE__URL_FILE" in error.message
    assert "not the value itself" in (error.remedy or "")


# -- what is wrong in the file


def test_a_syntax_error_names_the_line(write: Write) -> None:
    message = refused(write('[source]\nurl = "x\n')).message
    assert "settings.toml" in message
    assert "line 2" in message


def test_an_end_that_comes_too_early_names_the_line_too(write: Write) -> None:
    assert "line 2" in refused(write('[source]\nurl = """x')).message


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (f"{MINIMAL}[htpp]\nport = 1\n", 7, "unknown section htpp; did you mean http?"),
        ("port = 1\n", 1, "did you mean http.port?"),
        (f"{MINIMAL}colection = 'x'\n", 7, "tables[0].colection; did you mean tables[0].coll"),
        (f"{MINIMAL}port = 1\n", 7, "tables[0].port; did you mean http.port?"),
        (f"{MINIMAL}[pipeline]\nxyz = 1\n", 8, "pipeline.xyz; there are name,"),
        ("http = 3\n", 1, "http: expected a table, [http]"),
        ("tables = 3\n", 1, "expected an array of tables, [[tables]]"),
        ("tables = ['items']\n", 1, "expected an array of tables, [[tables]]"),
        (f"{MINIMAL}[[tables]]\nname = 'b'\nkye = 1\n", 9, "tables[1].kye"),
        ("[tables]\nname = 'items'\n", 1, "expected an array of tables, [[tables]]"),
    ],
)
def test_an_unknown_key_is_refused_with_line_and_suggestion(
    write: Write, text: str, line: int, problem: str
) -> None:
    message = refused(write(text)).message
    assert problem in message
    assert f"settings.toml line {line}:" in message


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        (f"{MINIMAL}[http]\nport = '9464'\n", "http.port", 8),
        (f"{MINIMAL}[http]\nport = true\n", "http.port", 8),
        (f"{MINIMAL}[http]\nport = 1.5\n", "http.port", 8),
        (f"{MINIMAL}[http]\nenabled = 1\n", "http.enabled", 8),
        (f"{MINIMAL}key = 'id'\n", "tables[0].key", 7),
        (f"{MINIMAL}key = []\n", "tables[0].key", 7),
        (f"{MINIMAL}metrics = {{ e = 'cosin' }}\n", "tables[0].metrics.e", 7),
        (f"{MINIMAL}[[tables]]\nname = 5\n", "tables[1].name", 8),
        (MINIMAL.replace('"postgresql://db/app"', f"['{SECRET}']"), "source.url", 3),
        (f"{MINIMAL}[qdrant]\napi_key = 1979\n", "qdrant.api_key", 8),
        (f"{MINIMAL}[qdrant]\ntimeout_seconds = inf\n", "qdrant.timeout_seconds", 8),
    ],
)
def test_a_wrong_type_names_key_file_and_line(write: Write, text: str, key: str, line: int) -> None:
    message = refused(write(text)).message
    assert message.startswith(f"{key}: expected ")
    assert message.endswith(f"settings.toml line {line}).")
    assert "1979" not in message


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("drop_nulls = 3", "tables[0].drop_nulls: expected true or false or an array of strings"),
        ("skip_bytea = [1]", "tables[0].skip_bytea: expected true or false or an array of strings"),
        (
            "constants = { a = [1] }",
            "tables[0].constants.a: expected a string, an integer, a number or true or false",
        ),
        ("collection_config = 1", "tables[0].collection_config: expected a table"),
        ("key = [1]", "tables[0].key[0]: expected a string"),
        ("rename = { a = 1 }", "tables[0].rename.a: expected a string"),
        (
            "metrics = { e = 'cos' }",
            'tables[0].metrics.e: expected one of "cosine", "euclid", "dot", "manhattan"',
        ),
    ],
)
def test_a_field_of_several_types_is_one_problem(write: Write, entry: str, said: str) -> None:
    path = write(f"{MINIMAL}{entry}\n")
    (line,) = refused(path).message.splitlines()
    assert line.startswith(f"{said} (file ")
    number = len(path.read_text().splitlines())
    assert line.endswith(f"line {number}).")


def test_all_problems_are_told_at_once(write: Write) -> None:
    text = "[http]\nport = 'x'\nenabled = 3\n[[tables]]\ncollection = 'c'\n"
    keys = {line.split()[0].rstrip(":") for line in refused(write(text)).message.splitlines()}
    assert keys == {"http.port", "http.enabled", "source.url", "tables[0].name"}


@pytest.mark.parametrize("text", ["", "[source]\nurl = 'x'\ntables = 1\n", MINIMAL[:40]])
def test_missing_settings_are_named(write: Write, text: str) -> None:
    refused(write(text))


def test_nothing_at_all_says_how_to_begin() -> None:
    error = refused()
    assert error.message == "source.url is not set.\ntables is not set."
    assert "--pg.url" in (error.remedy or "")


def test_the_same_table_twice_is_refused(write: Write) -> None:
    message = refused(write(f"{MINIMAL}[[tables]]\nname = 'items'\n")).message
    assert "tables[1].name" in message
    assert "tables[0]" in message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent.toml"
    message = refused(absent).message
    assert str(absent) in message
    assert "--config" in message
    assert "CDC_SYNC_CONFIG" in refused(None, {}, {"CDC_SYNC_CONFIG": str(absent)}).message
    refused(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff")
    assert "UTF-8" in refused(binary).message


def test_a_byte_order_mark_is_no_error(write: Write) -> None:
    assert load(write("\ufeff" + MINIMAL)).settings.tables[0].name == "items"


@pytest.mark.parametrize(
    ("text", "location", "line"),
    [
        ('x = """\n[http]\nport = 1\n"""\n[http]\nport = 2', ("http", "port"), None),
        ("[http] # here\n  port = 1", ("http", "port"), 2),
        ("[http]\n[source]\nport = 1", ("http", "port"), 1),
        ("a = 1", ("http", "port"), None),
        ("", ("http",), None),
        ("a = 1", (), None),
    ],
)
def test_a_line_is_told_only_where_it_is_certain(
    text: str, location: tuple[Any, ...], line: int | None
) -> None:
    assert line_of(text, location) == line
