"""Loads :class:`~cdc_sync.config.Settings` from all its sources.

Precedence, highest first:

1. flags, ``--pg.url`` and so on (:data:`FLAGS`, :data:`TABLE_FLAGS`)
2. environment ``CDC_SYNC_<SECTION>__<KEY>``; ``CDC_SYNC_TABLES`` holds all tables as a JSON array
3. secret files: ``CDC_SYNC_<SECTION>__<KEY>_FILE`` names a file with the value (one trailing
   newline is dropped); secrets from there are read again when a server refuses them
4. the TOML file: ``--config`` or ``CDC_SYNC_CONFIG``
5. defaults

An empty variable counts as not set. The list of tables is taken whole from the highest source that
has one. Whatever maps to no setting is an error: a mistyped name that is silently ignored is a
setting that silently does not hold. Messages name keys, variables, files and lines, never values.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from cdc_sync.config import Settings, TableSettings
from cdc_sync.credentials import SecretFile, SecretFileError, read_secret
from cdc_sync.errors import ConfigError
from cdc_sync.flag_values import table_flag_value
from cdc_sync.settings_schema import (
    SECTIONS,
    expected_text,
    is_secret,
    line_of,
    setting_location,
    suggest,
    unknown_keys,
)

PREFIX: Final = "CDC_SYNC_"
CONFIG_VARIABLE: Final = "CDC_SYNC_CONFIG"
TABLES_VARIABLE: Final = "CDC_SYNC_TABLES"
#: What the program was built from, said by its image; see :mod:`cdc_sync.ops.revision`.
REVISION_VARIABLE: Final = "CDC_SYNC_REVISION"
FILE_SUFFIX: Final = "_FILE"

#: Variables with the prefix that are no settings.
OTHER_VARIABLES: Final = frozenset({CONFIG_VARIABLE, REVISION_VARIABLE})
#: Variables of this repository's own tests, which the programs they start inherit.
_TESTS_PREFIX: Final = "CDC_SYNC_TEST_"

#: Flag (without the dashes) -> setting.
FLAGS: Final[Mapping[str, str]] = {
    "pg.url": "source.url",
    "source.slot": "source.slot",
    "source.publication": "source.publication",
    "qdrant.url": "qdrant.url",
    "qdrant.api-key": "qdrant.api_key",
    "migration.num-workers": "migration.num_workers",
    "migration.batch-size": "migration.batch_size",
    "migration.batch-delay": "migration.batch_delay",
    "migration.create-collection": "migration.create_collection",
    "migration.adopt": "migration.adopt",
    "migration.executor": "migration.executor",
    "migration.window": "migration.window_seconds",
    "pipeline.name": "pipeline.name",
    "http.host": "http.host",
    "http.port": "http.port",
    "log.level": "log.level",
    "log.format": "log.format",
}

#: Flag (without the dashes) -> setting of the one table it describes.
TABLE_FLAGS: Final[Mapping[str, str]] = {
    "pg.table": "name",
    "pg.key-column": "key",
    "pg.columns": "columns",
    "pg.where": "where",
    "qdrant.collection": "collection",
    "qdrant.distance-metric": "metrics",
    "migration.ids": "ids",
}

# A Kubernetes Service called cdc-sync or cdc-sync-... makes the kubelet set variables with our
# prefix in every pod of the namespace. These are the names it uses; none can be one of ours.
_SERVICE_LINK = re.compile(
    r"CDC_SYNC(_[A-Z0-9_]+)?_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?"
    r"|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_LINK_PORT = re.compile(r"CDC_SYNC(_[A-Z0-9_]+)?_PORT")

OriginKind = Literal["flag", "environment", "secret file", "file", "default"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from.

    ``where`` is the flag, the variable or the file; empty for a default.
    """

    kind: OriginKind
    where: str = ""

    def __str__(self) -> str:
        kind = "environment variable" if self.kind == "environment" else self.kind
        return f"{kind} {self.where}" if self.where else kind


DEFAULT: Final = Origin("default")


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings with the origin of each value.

    ``origins`` maps dotted keys (``http.port``, ``tables[0].name``) to origins; a key that is
    absent has its default. ``config_file`` is the TOML file that was read, if any.
    """

    settings: Settings
    origins: Mapping[str, Origin]
    config_file: Path | None

    def origin(self, key: str) -> Origin:
        """Origin of a dotted key."""
        return self.origins.get(key, DEFAULT)


@dataclass(slots=True)
class _Layer:
    """Values of one source as nested dicts, and where each leaf comes from."""

    values: dict[str, object] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def put(self, key: str, value: object, origin: Origin) -> None:
        """Set ``section.key``."""
        section, name = key.split(".")
        group = self.values.setdefault(section, {})
        assert isinstance(group, dict)
        group[name] = value
        self.origins[key] = origin

    def put_tables(self, tables: Sequence[Mapping[str, object]], origin: Origin) -> None:
        """Set all tables, every key with the same origin."""
        self.values["tables"] = [dict(table) for table in tables]
        for index, table in enumerate(tables):
            self.origins.update({f"tables[{index}].{key}": origin for key in table})

    def tables(self) -> list[dict[str, object]] | None:
        """The layer's tables, None when it has none."""
        tables = self.values.get("tables")
        return tables if isinstance(tables, list) else None


class _LayerSource(PydanticBaseSettingsSource):
    """A layer as a pydantic-settings source."""

    def __init__(self, settings_cls: type[BaseSettings], layer: _Layer) -> None:
        super().__init__(settings_cls)
        self._layer = layer

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[object, str, bool]:
        return self._layer.values.get(field_name), field_name, False

    def __call__(self) -> dict[str, object]:
        return self._layer.values


def load_settings(
    config_file: Path | None, overrides: Mapping[str, object], environ: Mapping[str, str]
) -> LoadedSettings:
    """Load settings.

    ``overrides`` are flags without their dashes (keys of :data:`FLAGS` and :data:`TABLE_FLAGS`);
    None means not given. ``environ`` is ``os.environ``. Raises :class:`ConfigError` listing
    everything that is wrong, one problem a line.
    """
    _check_variables(environ)
    path, path_origin = _config_path(config_file, environ)
    document, text = _read_toml(path, path_origin) if path else ({}, "")
    layers = [
        _environment_layer(environ),
        _secret_file_layer(environ),
        _file_layer(document, text, path),
    ]
    layers.insert(0, _flag_layer(overrides, layers))
    merged = _merge(layers)
    origins = _merge_origins(layers)
    return LoadedSettings(_validate(merged, origins, text), origins, path)


# -- the TOML file


def _config_path(
    config_file: Path | None, environ: Mapping[str, str]
) -> tuple[Path | None, Origin]:
    if config_file is not None:
        return config_file, Origin("flag", "--config")
    if named := environ.get(CONFIG_VARIABLE):
        return Path(named), Origin("environment", CONFIG_VARIABLE)
    return None, DEFAULT


def _read_toml(path: Path, origin: Origin) -> tuple[dict[str, object], str]:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(
            f"Cannot read the configuration file {path} ({origin}): {error.strerror}.",
            "Correct the path; `cdc-sync config init --output FILE` writes a file to start from.",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"The configuration file {path} is not UTF-8 (byte {error.start}).",
            "Save it as UTF-8; TOML has no other encoding.",
        ) from None
    # A byte order mark is what some editors write; TOML does not allow for it.
    text = text.removeprefix("\ufeff")
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"The configuration file {path} is not valid TOML: {_toml_message(error, text)}.",
            "Correct the line named; strings need quotes, tables are written [[tables]].",
        ) from None


def _toml_message(error: tomllib.TOMLDecodeError, text: str) -> str:
    """The parser's message with a line, also where it only says that the document ended."""
    lines = text.count("\n") + 1
    return str(error).replace("(at end of document)", f"(at end of document, line {lines})")


def _file_layer(document: dict[str, object], text: str, path: Path | None) -> _Layer:
    layer = _Layer()
    if path is None:
        return layer
    origin = Origin("file", str(path))
    problems = [
        f"{path}{_line_suffix(text, location)}: {problem}"
        for location, problem in unknown_keys(document)
    ]
    _raise_if(
        problems, "Correct the name, or remove it; `cdc-sync config init` lists all settings."
    )
    for section, content in document.items():
        if section == "tables":
            assert isinstance(content, list)
            layer.put_tables(content, origin)
        else:
            assert isinstance(content, dict)
            for key, value in content.items():
                layer.put(f"{section}.{key}", value, origin)
    return layer


def _line_suffix(text: str, location: tuple[str | int, ...]) -> str:
    line = line_of(text, location)
    return f" line {line}" if line else ""


# -- environment and secret files


def variable_of(section: str, key: str) -> str:
    """The environment variable of a setting."""
    return f"{PREFIX}{section}__{key}".upper()


def _variables() -> Iterator[tuple[str, str]]:
    """Every variable of a setting with the setting's dotted key."""
    for section, model in SECTIONS.items():
        for key in model.model_fields:
            yield variable_of(section, key), f"{section}.{key}"


_KEY_BY_VARIABLE: Final[Mapping[str, str]] = dict(_variables())


def _secret_key(variable: str) -> str | None:
    """The setting whose file ``variable`` names, unless it is one itself (``..._CA_FILE``)."""
    if variable in _KEY_BY_VARIABLE or not variable.endswith(FILE_SUFFIX):
        return None
    return _KEY_BY_VARIABLE.get(variable.removesuffix(FILE_SUFFIX))


def _check_variables(environ: Mapping[str, str]) -> None:
    problems = []
    for name, value in sorted(environ.items()):
        if not name.upper().startswith(PREFIX) or _is_known_variable(name, value):
            continue
        problems.append(f"The environment variable {name} is no setting{_variable_hint(name)}.")
    _raise_if(
        problems,
        "Correct or unset it; variables are named CDC_SYNC_<SECTION>__<KEY>, "
        "see `cdc-sync config init`.",
    )


def _is_known_variable(name: str, value: str) -> bool:
    if name in _KEY_BY_VARIABLE or name in OTHER_VARIABLES or name == TABLES_VARIABLE:
        return True
    if name.startswith(_TESTS_PREFIX):
        return True
    if _secret_key(name) is not None or _SERVICE_LINK.fullmatch(name):
        return True
    # CDC_SYNC_PORT is also what somebody types who means CDC_SYNC_HTTP__PORT: only the value tells.
    return bool(_SERVICE_LINK_PORT.fullmatch(name)) and value.startswith(("tcp://", "udp://"))


def _variable_hint(name: str) -> str:
    stem = name.upper().removeprefix(PREFIX)
    if stem.startswith("TABLES_"):
        return f"; tables are given together as a JSON array in {TABLES_VARIABLE}"
    # Compared without the prefix, which would make any two names look alike.
    settings = [variable.removeprefix(PREFIX) for variable in _KEY_BY_VARIABLE]
    others = [variable.removeprefix(PREFIX) for variable in (*OTHER_VARIABLES, TABLES_VARIABLE)]
    section_left_out = [known for known in settings if known.endswith(f"__{stem}")]
    files = [known + FILE_SUFFIX for known in settings]
    hint = next(iter(section_left_out), None) or suggest(stem, [*settings, *files, *others])
    return f"; did you mean {PREFIX}{hint}" if hint else ""


def _environment_layer(environ: Mapping[str, str]) -> _Layer:
    layer = _Layer()
    for variable, key in _KEY_BY_VARIABLE.items():
        if value := environ.get(variable):
            layer.put(key, _from_text(key, value), Origin("environment", variable))
    if value := environ.get(TABLES_VARIABLE):
        layer.put_tables(_tables_from_json(value), Origin("environment", TABLES_VARIABLE))
    return layer


def _tables_from_json(value: str) -> list[dict[str, object]]:
    example = f"""{TABLES_VARIABLE}='[{{"name": "public.items"}}]'"""
    try:
        tables = json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f" (at character {error.pos})" if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(
            f"The environment variable {TABLES_VARIABLE} is not valid JSON{where}.",
            f"It holds an array of tables: {example}",
        ) from None
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(
            f"The environment variable {TABLES_VARIABLE} is not a JSON array of objects.",
            f"Write: {example}",
        )
    problems = [
        f"Environment variable {TABLES_VARIABLE}: {problem}"
        for _, problem in unknown_keys({"tables": tables})
    ]
    _raise_if(problems, "Correct the name; `cdc-sync config init` lists what a table may have.")
    return tables


def _secret_file_layer(environ: Mapping[str, str]) -> _Layer:
    layer = _Layer()
    for variable, named in sorted(environ.items()):
        key = _secret_key(variable)
        if key is not None and named:
            value = _of_file(key, _read_secret(variable, Path(named)), Path(named))
            layer.put(key, value, Origin("secret file", f"{named} ({variable})"))
    return layer


def _of_file(key: str, text: str, path: Path) -> object:
    section, name = key.split(".")
    if is_secret(SECTIONS[section].model_fields[name]):
        return SecretFile(text, key, path.absolute())
    return _from_text(key, text)


def _read_secret(variable: str, path: Path) -> str:
    # What is no absolute path may be the secret itself, put where the path belongs.
    named = f"the file {path} that {variable} names" if path.is_absolute() else variable
    try:
        return read_secret(path)
    except UnicodeDecodeError:
        raise ConfigError(f"Cannot read {named}: it is not UTF-8 text.") from None
    except SecretFileError as error:
        raise ConfigError(f"Cannot use {named}: {error}.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is no path"
        raise ConfigError(
            f"Cannot read {named}: {reason}.",
            "The variable holds the path of a file with the value, not the value itself.",
        ) from None


def _from_text(key: str, text: str) -> object:
    """A number or boolean from its text.

    Text that is neither stays as it is, and fails the validation with the name of its source.
    """
    section, name = key.split(".")
    annotation = SECTIONS[section].model_fields[name].annotation
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind in (int, float, bool)]
    if len(kinds) != 1:
        return text
    try:
        converted: object = TypeAdapter(kinds[0]).validate_python(text)
    except ValidationError:
        return text
    return converted


# -- flags


def _flag_layer(overrides: Mapping[str, object], below: Sequence[_Layer]) -> _Layer:
    given = {name: value for name, value in overrides.items() if value is not None and value != ()}
    problems = [
        f"There is no flag --{name}{_hinted(suggest(name, [*FLAGS, *TABLE_FLAGS]), '--')}."
        for name in given
        if name not in FLAGS and name not in TABLE_FLAGS
    ]
    _raise_if(problems, "See `cdc-sync run --help`.")
    layer = _Layer()
    for name, value in given.items():
        if key := FLAGS.get(name):
            converted = _from_text(key, value) if isinstance(value, str) else value
            layer.put(key, converted, Origin("flag", f"--{name}"))
    table_flags = {name: value for name, value in given.items() if name in TABLE_FLAGS}
    if table_flags:
        _put_flag_table(layer, table_flags, below)
    return layer


def _put_flag_table(layer: _Layer, flags: Mapping[str, object], below: Sequence[_Layer]) -> None:
    """Flags describe one table: the configured one of that name, the only one, or a new one."""
    base = next((source for source in below if source.tables() is not None), _Layer())
    configured = base.tables() or []
    index = _index_of_table(flags, configured)
    entry = dict(configured[index]) if index is not None else {}
    origins = {key: base.origins[f"tables[{index}].{key}"] for key in entry}
    for name, value in flags.items():
        key = TABLE_FLAGS[name]
        entry[key] = table_flag_value(name, value, entry.get(key))
        origins[key] = Origin("flag", f"--{name}")
    layer.values["tables"] = [entry]
    layer.origins.update({f"tables[0].{key}": origin for key, origin in origins.items()})


def _index_of_table(
    flags: Mapping[str, object], configured: Sequence[Mapping[str, object]]
) -> int | None:
    if "pg.table" in flags:
        names = [table.get("name") for table in configured]
        return names.index(flags["pg.table"]) if flags["pg.table"] in names else None
    if len(configured) == 1:
        return 0
    named = ", ".join(f"--{name}" for name in flags)
    raise ConfigError(
        f"{named}: which table this is for is not said ({len(configured)} tables are configured).",
        "Add --pg.table.",
    )


# -- merging and validation


def _merge(layers: Sequence[_Layer]) -> dict[str, object]:
    """Merge layers, highest first, section by section and key by key."""

    class Merged(BaseSettings):
        """What all sources say together, not yet validated."""

        model_config = SettingsConfigDict(extra="allow")

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return tuple(_LayerSource(settings_cls, layer) for layer in layers)

    return Merged().model_dump()


def _merge_origins(layers: Sequence[_Layer]) -> dict[str, Origin]:
    origins: dict[str, Origin] = {}
    tables_taken = False
    for layer in layers:
        for key, origin in layer.origins.items():
            if not (key.startswith("tables[") and tables_taken):
                origins.setdefault(key, origin)
        tables_taken = tables_taken or layer.tables() is not None
    return origins


def _validate(merged: Mapping[str, object], origins: Mapping[str, Origin], text: str) -> Settings:
    missing = [] if merged.get("source") else ["source"]
    # An absent section is reported by its missing key, not as a missing table of keys.
    content = {**merged, **{section: {} for section in missing}}
    try:
        settings = Settings.model_validate(content, strict=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        problems = [_problem(item["type"], item["loc"], origins, text) for item in found]
        raise ConfigError(
            "\n".join(dict.fromkeys(problems)), _validation_remedy(found[0]["loc"])
        ) from None
    _check_duplicates(settings.tables)
    return settings


def _problem(
    kind: str, location: tuple[str | int, ...], origins: Mapping[str, Origin], text: str
) -> str:
    location = setting_location(location)
    key = dotted(location)
    origin = next((origins[part] for part in _prefixes(location) if part in origins), None)
    if kind == "missing" or (location == ("tables",) and origin is None):
        return f"{key} is not set."
    expected = expected_text(location)
    if origin is None:
        return f"{key}: expected {expected}."
    line = _line_suffix(text, location) if origin.kind == "file" else ""
    return f"{key}: expected {expected} ({origin}{line})."


def _validation_remedy(location: tuple[str | int, ...]) -> str | None:
    if location == ("source", "url"):
        return (
            "Give the connection string of Postgres: url in [source] of the TOML file, "
            "CDC_SYNC_SOURCE__URL, CDC_SYNC_SOURCE__URL_FILE, or --pg.url."
        )
    if location == ("tables",):
        return (
            "Name the tables to keep in step: [[tables]] in the TOML file, CDC_SYNC_TABLES, "
            "or --pg.table."
        )
    return None


def _check_duplicates(tables: Sequence[TableSettings]) -> None:
    first: dict[str, int] = {}
    for index, table in enumerate(tables):
        if table.name in first:
            raise ConfigError(
                f"tables[{index}].name: the table {table.name} is listed already, "
                f"as tables[{first[table.name]}].",
                "Remove one of the two.",
            )
        first[table.name] = index


def dotted(location: Sequence[str | int]) -> str:
    """``("tables", 0, "name")`` as ``tables[0].name``."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _prefixes(location: Sequence[str | int]) -> Iterator[str]:
    """Dotted keys of the location and of what contains it, longest first."""
    for end in range(len(location), 0, -1):
        yield dotted(location[:end])


def _hinted(suggestion: str | None, prefix: str = "") -> str:
    return f"; did you mean {prefix}{suggestion}" if suggestion else ""


def _raise_if(problems: Sequence[str], remedy: str) -> None:
    if problems:
        raise ConfigError("\n".join(problems), remedy)
