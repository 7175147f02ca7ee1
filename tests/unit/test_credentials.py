"""Secrets from files, and for how long one that worked before may be refused."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import SecretStr

from cdc_sync.config import QdrantSettings, SourceSettings
from cdc_sync.credentials import Login, SecretFile
from cdc_sync.loading import load_settings
from cdc_sync.postgres.connect import LoginRefusedError
from cdc_sync.qdrant.api_keys import ApiKeys
from tests.support.rotation import Heard, listening


@pytest.fixture
def heard() -> Iterator[Heard]:
    with listening() as told:
        yield told


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, to be set."""
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("cdc_sync.credentials.time", clock)
    return now


@pytest.fixture
def secret(tmp_path: Path) -> SecretFile:
    path = tmp_path / "secret"
    path.write_text("the-first\n")
    return SecretFile("the-first", "source.password", path)


def test_secrets_come_from_files_with_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "c.toml"
    config.write_text("[[tables]]\nname = 't'\n")
    environ = {"CDC_SYNC_SOURCE__SLOT_FILE": str(tmp_path / "slot")}
    (tmp_path / "slot").write_text("a_slot\n")
    for key in ("SOURCE__PASSWORD", "SOURCE__URL", "QDRANT__API_KEY"):
        (tmp_path / key).write_text(f"value-of-{key}\r\n")
        environ[f"CDC_SYNC_{key}_FILE"] = key if key == "SOURCE__URL" else str(tmp_path / key)
    settings = load_settings(config, {}, environ).settings
    found = (settings.source.url, settings.source.password, settings.qdrant.api_key)
    for secret, key in zip(
        found, ("SOURCE__URL", "SOURCE__PASSWORD", "QDRANT__API_KEY"), strict=True
    ):
        assert isinstance(secret, SecretFile)
        assert secret.get_secret_value() == f"value-of-{key}"
        assert secret.setting == key.lower().replace("__", ".")
        # It stays the same file wherever the process goes.
        assert secret.path == tmp_path / key
        assert f"value-of-{key}" not in repr(settings) + str(settings) + settings.model_dump_json()
    assert settings.source.slot == "a_slot"


def test_a_secret_by_value_is_none_from_a_file() -> None:
    settings = SourceSettings.model_validate({"url": "host=x", "password": "by-value"})
    assert type(settings.password) is SecretStr


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"another", "another"),
        (b"another\n", "another"),
        (b"another\r\n", "another"),
        (b"another\n\n", "another\n"),
        (b" another ", " another "),
        (b"", None),
        (b"\n", None),
        (b"\xff\xfe", None),
        (b"x" * (1 << 17), None),
        (None, None),
    ],
)
def test_what_a_file_holds(secret: SecretFile, content: bytes | None, found: str | None) -> None:
    secret.path.unlink()
    if content is not None:
        secret.path.write_bytes(content)
    assert secret.look() == found
    assert secret.get_secret_value() == "the-first"


def test_a_directory_in_its_place_is_no_secret(secret: SecretFile) -> None:
    secret.path.unlink()
    secret.path.mkdir()
    assert secret.look() is None


def test_what_is_taken_over_is_in_all_copies_and_goes_to_other_processes(
    secret: SecretFile, heard: Heard
) -> None:
    source = SourceSettings(url=SecretStr("host=x"), password=secret)
    copy = source.model_copy(update={"slot": "other"})
    copy.login.accept()
    secret.take("the-first")
    assert heard.read == []
    secret.take("another")
    assert heard.read == ["source.password"]
    elsewhere = pickle.loads(pickle.dumps(source))
    for settings in (source, copy, elsewhere):
        assert isinstance(settings.password, SecretFile)
        assert settings.password.get_secret_value() == "another"
        assert settings.password.path == secret.path
        assert settings.login.accepted


def test_settings_do_not_differ_for_what_became_of_them() -> None:
    one, other = (SourceSettings.model_validate({"url": "host=x"}) for _ in range(2))
    one.login.accept()
    assert one == other
    assert hash(one) == hash(other)


# -- how long a refusal is waited for


def test_what_never_worked_is_refused_at_once(secret: SecretFile, heard: Heard) -> None:
    refusal = Login("postgres").refuse("no", 300, secret)
    assert not refusal.waits
    assert refusal.remedy is None
    assert heard.refusals == []


def test_a_secret_by_value_is_not_waited_for_and_says_what_would_be(heard: Heard) -> None:
    for side, variable in (("postgres", "PASSWORD_FILE"), ("qdrant", "API_KEY_FILE")):
        login = Login(side)
        login.accept()
        refusal = login.refuse("no", 300, SecretStr("by-value"))
        assert not refusal.waits
        assert variable in (refusal.remedy or "")
        assert "by-value" not in str(refusal)
    assert heard.refusals == []


def test_grace_runs_from_the_first_refusal(
    secret: SecretFile, clock: list[float], heard: Heard
) -> None:
    login = Login("postgres")
    login.accept()
    for second in range(300):
        clock[0] = 1000.0 + second
        refusal = login.refuse("no", 300, secret)
        assert refusal.waits, second
        assert str(secret.path) in refusal.about + str(refusal.remedy)
    clock[0] = 1300.0
    last = login.refuse("no", 300, secret)
    assert not last.waits
    assert "tried again for 300 s" in last.about
    assert str(secret.path) in (last.remedy or "")
    # Said once a minute, with the time that is left.
    assert [round(seconds) for *_, seconds in heard.refusals] == [300, 240, 180, 120, 60]
    assert "the-first" not in str(heard.refusals) + str(last)


def test_success_begins_a_new_time(secret: SecretFile, clock: list[float]) -> None:
    login = Login("postgres")
    login.accept()
    assert login.refuse("no", 50, secret).waits
    clock[0] += 49
    login.accept()
    clock[0] += 40
    assert login.refuse("no", 50, secret).waits
    clock[0] += 51
    assert not login.refuse("no", 50, secret).waits


def test_a_refusal_of_long_ago_does_not_count(secret: SecretFile, clock: list[float]) -> None:
    """Connections that are kept go on for months, and nobody logs in."""
    login = Login("postgres")
    login.accept()
    assert login.refuse("no", 300, secret).waits
    clock[0] += 86_400
    assert login.refuse("no", 300, secret).waits


def test_without_grace_it_ends_at_once(secret: SecretFile, heard: Heard) -> None:
    login = Login("postgres")
    login.accept()
    refusal = login.refuse("no", 0, secret)
    assert not refusal.waits
    assert "tried again" not in refusal.about
    assert heard.refusals == []


def test_what_libpq_reads_itself_is_waited_for(clock: list[float]) -> None:
    login = Login("postgres")
    login.accept()
    assert login.refuse("no", 10, None).waits
    clock[0] += 10
    assert not login.refuse("no", 10, None).waits


def test_a_server_is_not_asked_again_at_once_with_the_same(
    secret: SecretFile, clock: list[float]
) -> None:
    login = Login("postgres")
    login.accept()
    assert login.refused_lately(("old",), 10) is None
    login.refuse("no", 15, secret, ("old",))
    assert login.refused_lately(("old",), 10) is not None
    assert login.refused_lately(("old", "new"), 10) is None
    clock[0] += 10
    assert login.refused_lately(("old",), 10) is None
    login.refuse("no", 15, secret, ("old",))
    # The last try is one.
    clock[0] += 5
    assert login.refused_lately(("old",), 10) is None
    login.accept()
    assert login.refused_lately(("old",), 10) is None


def test_the_error_goes_from_process_to_process() -> None:
    error = pickle.loads(pickle.dumps(LoginRefusedError("what", "how")))
    assert isinstance(error, LoginRefusedError)
    assert (error.message, error.remedy) == ("what", "how")


# -- keys of Qdrant


def test_keys_are_tried_one_after_the_other(tmp_path: Path, heard: Heard) -> None:
    path = tmp_path / "key"
    path.write_text("first")
    settings = QdrantSettings(api_key=SecretFile("first", "qdrant.api_key", path))
    keys = ApiKeys(settings)
    assert keys.next([]) == "first"
    assert keys.next(["first"]) == "first"
    path.write_text("second")
    assert keys.next([]) == "first"
    assert keys.next(["first"]) == "second"
    keys.accepted("second")
    assert heard.read == ["qdrant.api_key"]
    assert keys.next([]) == "second"
    # A node that has not been given the other key yet.
    assert keys.next(["second"]) == "first"
    path.unlink()
    assert keys.next(["second", "first"]) == "second"


@pytest.mark.parametrize("content", ["bröken", "line\nbreak", " spaced", "tab\there"])
def test_a_key_that_no_header_carries_is_not_sent(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key"
    path.write_text(content, encoding="utf-8")
    settings = QdrantSettings(api_key=SecretFile("first", "qdrant.api_key", path))
    settings.login.accept()
    keys = ApiKeys(settings)
    assert keys.next(["first"]) == "first"
    refusal = keys.refused("no")
    assert refusal.waits
    assert "header cannot carry" in refusal.about
    assert content not in refusal.about


def test_a_server_that_begins_to_ask_for_a_key_is_not_waited_for() -> None:
    settings = QdrantSettings()
    settings.login.accept()
    keys = ApiKeys(settings)
    assert keys.next([None]) is None
    assert not keys.refused("Must provide an API key").waits
