"""Secrets stay out of everything that is printed, logged, served or listed: odd passwords and keys
in every place where they can be put, and every error that can be provoked around them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, quote_plus

import psutil
import pytest
from psycopg import conninfo, sql

from cdc_sync.cli import main
from cdc_sync.cli.process_list import masked
from cdc_sync.config import Settings
from cdc_sync.ops.redaction import add_secrets, redact
from tests.support.daemon import Daemon, toml_value, write_config
from tests.support.fix_postgres import Database
from tests.support.least_privilege import least_privileged
from tests.support.qdrant_control import QdrantProcess

pytestmark = pytest.mark.usefixtures("clean_environment")

#: Passwords: their pieces are as secret as the whole.
PASSWORDS = {
    "plain": "Wk7unremarkable",
    "url": "Wk7first@Yq8second/Zw9third:Xv6fourth?Tt5fifth#Ss4sixth&Rr3seventh=%41Qq",
    "quotes": "Wk7single'Yq8double\"Zw9back\\slash",
    "sql": "Wk7semi;DROP--Yq8dollar$$Zw9tick`x`",
    "space": "Wk7space Yq8tab\tZw9end",
    "unicode": "Wk7smörgåsYq8日本語Zw9🔑",
    "percent": "Wk7%40Yq8%25sZw9%",
}
#: What a header can carry.
KEYS = {name: key for name, key in PASSWORDS.items() if key.isascii() and "\t" not in key}
#: Pieces are cut where a URL, SQL, JSON or a shell may cut.
_SEPARATORS = re.compile(r"""[^0-9A-Za-z]+""")


def traces(secret: str) -> set[str]:
    """A secret in every form in which it may show, and its pieces."""
    forms = {secret, quote(secret, safe=""), quote(secret), quote_plus(secret), repr(secret)[1:-1]}
    forms |= {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]}
    forms |= {conninfo.make_conninfo(password=secret).removeprefix("password=")}
    return forms | {piece for piece in _SEPARATORS.split(secret) if len(piece) >= 6}


def assert_hidden(text: str, *secrets: str) -> None:
    for secret in secrets:
        for trace in traces(secret):
            assert trace.lower() not in text.lower(), f"{trace!r} shows:\n{text}"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(url: str, key: str | None = None, **more: Mapping[str, object]) -> Path:
        target: dict[str, object] = {"url": "http://127.0.0.1:1", "timeout_seconds": 2}
        if key is not None:
            target["api_key"] = key
        return write_config(
            tmp_path / "secret.toml",
            [{"name": "docs"}],
            source={"url": url, "connect_timeout_seconds": 2, **more.pop("source", {})},
            qdrant={**target, **more.pop("qdrant", {})},
            pipeline={"startup_timeout_seconds": 0},
            http={"enabled": False},
            **more,
        )

    return make


def all_commands(
    capfd: pytest.CaptureFixture[str], arguments: Sequence[str], commands: Sequence[str] = ()
) -> str:
    """What the commands print, all of them ending in an error or none."""
    printed = ""
    for command in commands or ("check", "plan", "config show", "run"):
        for flags in ([], ["--debug"]):
            code = main([*flags, *command.split(), *arguments])
            captured = capfd.readouterr()
            printed += f"{command}: {code}\n{captured.out}{captured.err}\n"
    return printed


# -- Postgres


def urls(database: Database, password: str) -> Iterator[tuple[str, str]]:
    """Connection strings with the password, each wrong in its own way: name, URL."""
    server = database.server
    encoded = quote(password, safe="")
    where = f"{server.host}:{server.port}/{database.name}"
    yield "refused", f"postgresql://postgres:{encoded}@{where}"
    yield "no such user", f"postgresql://nobody:{encoded}@{where}"
    yield "no such host", f"postgresql://postgres:{encoded}@no-such-host.invalid/app"
    yield "nobody listens", f"postgresql://postgres:{encoded}@127.0.0.1:1/app"
    yield "unescaped", f"postgresql://postgres:{password}@{where}"
    yield "bad option", f"postgresql://postgres:{encoded}@{where}?sslmode=maybe"
    yield "unknown option", f"postgresql://postgres:{encoded}@{where}?{encoded}=1"
    yield "in the query", f"postgresql://{where}?user=postgres&password={encoded}"
    yield "for the key", f"postgresql://postgres@{where}?sslpassword={encoded}&sslkey=/none"
    yield "as the user", f"postgresql://{encoded}@{where}"
    yield "another scheme", f"mysql://postgres:{encoded}@{where}"
    yield (
        "keywords",
        conninfo.make_conninfo(
            host=server.host, port=server.port, user="postgres", password=password
        ),
    )
    yield "broken keywords", f"host={server.host} user=postgres password='{password}"


@pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS)
def test_no_error_of_postgres_shows_a_password(
    database18: Database,
    password: str,
    write: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, url in urls(database18, password):
        printed = all_commands(capfd, ["--config", str(write(url))], ("check", "config show"))
        if name == "as the user":
            # A password in the place of the user's name is a name: it is only not quoted by us.
            continue
        assert_hidden(printed, password)
        assert "check: 0" not in printed, (name, printed)
        assert "Traceback" not in printed.partition("check: ")[2].partition("check: ")[0]


@pytest.mark.parametrize(
    "password", [PASSWORDS["url"], PASSWORDS["unicode"]], ids=["url", "unicode"]
)
def test_run_and_plan_hide_it_too(
    database18: Database,
    password: str,
    write: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    url = f"postgresql://postgres@{database18.server.host}:{database18.server.port}/app"
    config = write(url, source={"password": password}, log={"level": "debug"})
    printed = all_commands(capfd, ["--config", str(config)], ("plan", "run", "migrate", "resync"))
    assert_hidden(printed, password)
    assert "authentication failed" in printed or "qdrant" in printed.lower()


def test_the_password_setting(
    database18: Database,
    write: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It connects, by file too; beside a password in the URL it is an error."""
    database18.execute("CREATE TABLE docs (id int PRIMARY KEY)")
    for name, password in PASSWORDS.items():
        role = least_privileged(database18, [{"name": "docs"}], publication=f"p_{name}")
        change = sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role.name), password)
        with database18.connect() as connection:
            connection.execute(change)
        secret = tmp_path / "password"
        secret.write_text(password + "\n", encoding="utf-8")
        monkeypatch.setenv("CDC_SYNC_SOURCE__PASSWORD_FILE", str(secret))
        url = database18.server.url(database18.name, role.name)
        main(["check", "--json", "--config", str(write(url, source={"publication": f"p_{name}"}))])
        captured = capfd.readouterr()
        findings = json.loads(captured.out)["findings"]
        assert ("ok", "postgres") in [(f["severity"], f["subject"]) for f in findings], findings
        both = write(database18.server.url(database18.name, role.name, "another-one"))
        main(["check", "--config", str(both)])
        captured = capfd.readouterr()
        assert "source.password is set, and source.url has a password too" in captured.out
        assert_hidden(captured.out + captured.err, password, "another-one")


# -- Qdrant


@pytest.mark.parametrize("key", [KEYS["url"], KEYS["quotes"]], ids=["url", "quotes"])
def test_no_error_of_qdrant_shows_a_key(
    database18: Database,
    tmp_path: Path,
    key: str,
    write: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    database18.execute("CREATE TABLE docs (id int PRIMARY KEY)")
    server = QdrantProcess(tmp_path / "qdrant", api_key="another key entirely")
    try:
        address = server.url.removeprefix("http://")
        printed = ""
        for url in (server.url, f"https://{address}", "http://127.0.0.1:1", "http://no.invalid:1"):
            config = write(database18.url, key, qdrant={"url": url}, log={"level": "debug"})
            printed += all_commands(capfd, ["--config", str(config)], ("check", "run"))
        assert "sink_auth" in printed
        for url in (
            f"http://user:{quote(key, safe='')}@{address}",
            f"http://user:{key}@{address}",
            f"http://127.0.0.1:{key}",
            f"{key}://127.0.0.1:6334",
        ):
            config = write(database18.url, qdrant={"url": url})
            shown = all_commands(capfd, ["--config", str(config)], ("check",))
            assert "check: 78" in shown
            assert_hidden(shown, key)
    finally:
        server.close()
    assert_hidden(printed, key)


@pytest.mark.parametrize("key", ["Wk7line\nYq8break", "Wk7carriage\r", "Wk7smörgås", " Wk7spaced "])
def test_a_key_that_no_header_carries(
    database18: Database, key: str, write: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    config = write(database18.url, key)
    printed = all_commands(capfd, ["--config", str(config)], ("check", "run"))
    assert_hidden(printed, key.strip())
    assert "check: 78" in printed
    assert "qdrant.api_key holds characters that a header cannot carry" in printed


# -- where settings come from


@pytest.mark.parametrize("secret", PASSWORDS.values(), ids=PASSWORDS)
def test_no_error_of_the_configuration_shows_a_secret(
    secret: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    url = f"postgresql://u:{quote(secret, safe='')}@127.0.0.1:1/app"
    quoted = toml_value(secret)
    config = tmp_path / "c.toml"
    documents = (
        f"[source]\nurl = {secret}\n",
        f"[source]\nurl = {url}\n",
        f"[source]\nurl = {quoted[:-1]}\n",
        f"[source]\nurl = [{quoted}]\n[[tables]]\nname = 't'",
        f"[source]\nurl = {{ password = {quoted} }}\n[[tables]]\nname = 't'",
        f"[source]\nurl = 'host=x'\npassword = [{quoted}]\n[[tables]]\nname = 't'",
        f"[source]\nurl = 'host=x'\n[qdrant]\napi_key = [{quoted}]\n[[tables]]\nname = 't'",
        f"[source]\nurl = 'host=x'\nsslmode = {quoted}\n[[tables]]\nname = 't'",
        f"source = {quoted}\n",
    )
    printed = ""
    for document in documents:
        config.write_text(document, encoding="utf-8")
        shown = all_commands(capfd, ["--config", str(config)], ("check",))
        assert "check: 78" in shown, shown
        printed += shown
    config.write_text("[source]\nurl = 'host=127.0.0.1 port=1'\n[[tables]]\nname = 't'\n")
    for variable in (
        "CDC_SYNC_SOURCE__URL_FILE",
        "CDC_SYNC_SOURCE__PASSWORD_FILE",
        "CDC_SYNC_QDRANT__API_KEY_FILE",
        "CDC_SYNC_TABLES",
        "CDC_SYNC_HTTP__PORT",
        "CDC_SYNC_SOURCE__SLOT",
    ):
        with monkeypatch.context() as environment:
            environment.setenv(variable, secret)
            shown = all_commands(capfd, ["--config", str(config)], ("check",))
            assert "check: 78" in shown, shown
            printed += shown
    assert_hidden(printed, secret)


def test_typing_errors_on_the_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    """What cannot be told from a name is shown; a URL with a password and a named key are not."""
    secret = PASSWORDS["plain"]
    url = f"postgresql://u:{secret}@127.0.0.1:1/app"
    for arguments in (
        ["run", "--pg.ulr", url],
        ["run", "--pg.url", url, "--no-such-flag"],
        ["run", url],
        [url],
        ["run", f"--pg.ulr={url}"],
        ["run", f"--qdrant.api-kye={secret}"],
        ["run", "--pg.url", url, "--qdrant.api-key", secret],
        ["--debug", "check", "--pg.url", url, "--qdrant.api-key", secret, "--pg.table", "t"],
    ):
        assert main(arguments) != 0
        captured = capfd.readouterr()
        assert_hidden(captured.out + captured.err, secret)


@pytest.mark.parametrize("secret", PASSWORDS.values(), ids=PASSWORDS)
def test_known_secrets_are_masked_in_every_form(secret: str) -> None:
    add_secrets([secret])
    shown = redact("\n".join(f"<{form}>" for form in sorted(traces(secret), key=len, reverse=True)))
    for form in traces(secret):
        if form in _SEPARATORS.split(secret):
            continue
        assert f"<{form}>" not in shown
    try:
        raise ValueError(secret, {"k": secret})
    except ValueError as error:
        assert_whole_hidden(redact(repr(error)), secret)


def assert_whole_hidden(text: str, secret: str) -> None:
    assert secret not in text
    assert repr(secret)[1:-1] not in text


def test_settings_print_without_secrets() -> None:
    settings = Settings.model_validate(
        {
            "source": {"url": "postgresql://u:Wk7inside@h/d", "password": "Wk7beside"},
            "qdrant": {"api_key": "Wk7api-key"},
            "tables": [{"name": "t"}],
        }
    )
    for text in (repr(settings), str(settings), settings.model_dump_json(), str(settings.source)):
        assert_hidden(text, "Wk7inside", "Wk7beside", "Wk7api-key")


# -- the process list


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("run\0--qdrant.api-key\0key\0--x\0", "run\0--qdrant.api-key\0***\0--x\0"),
        ("run\0--qdrant.api-key=key7\0", "run\0--qdrant.api-key=***\0\0"),
        ("run\0--qdrant.api-key=k\0", "run\0--qdrant.api-key=*\0"),
        ("run\0--qdrant.api-key\0\0--x\0", "run\0--qdrant.api-key\0\0--x\0"),
        ("run\0--pg.url\0--pg.url\0--pg.url\0", "run\0--pg.url\0***\0\0\0\0\0\0--pg.url\0"),
        ("run\0--pg.url=host=h user=u\0", "run\0--pg.url=***" + "\0" * 11),
        ("run\0--pg.ulr\0postgresql://u:p@h\0", "run\0--pg.ulr\0***" + "\0" * 16),
        ("run\0--pg.ulr\0host=h password = 'p'\0", "run\0--pg.ulr\0***" + "\0" * 19),
        ("run\0--pg.table\0docs\0", "run\0--pg.table\0docs\0"),
        ("", ""),
    ],
)
def test_what_is_masked(before: str, after: str) -> None:
    assert len(before) == len(after)
    assert masked(before.encode()) == after.encode()


def listed(process: psutil.Process | subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/cmdline").read_bytes().decode("utf-8", "replace")


def test_the_process_list_does_not_show_them(database18: Database, tmp_path: Path) -> None:
    """Flags with secrets work, and neither the program nor its workers show them, while it runs."""
    password, key = PASSWORDS["url"], KEYS["quotes"]
    database18.execute(
        "CREATE TABLE docs (id int PRIMARY KEY, body text);"
        "INSERT INTO docs SELECT n, repeat('x', 200) FROM generate_series(1, 6000) n"
    )
    role = least_privileged(database18, [{"name": "docs"}], publication="listed")
    with database18.connect() as connection:
        change = sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role.name), password)
        connection.execute(change)
    qdrant = QdrantProcess(tmp_path / "qdrant", api_key=key)
    url = database18.server.url(database18.name, role.name, password)
    log = tmp_path / "log"
    slot = f"listed_{database18.name}"[:60]
    command = [
        *(sys.executable, "-m", "cdc_sync", "run", "--pg.url", url, f"--qdrant.api-key={key}"),
        *("--qdrant.url", qdrant.url, "--pg.table", "docs", "--source.slot", slot),
        *("--source.publication", "listed", "--http.port", "0", "--migration.num-workers", "2"),
        *("--log.level", "debug", "--log.format", "json"),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=_environment())
    try:
        seen = []
        deadline = time.monotonic() + 150
        while '"state":"streaming"' not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            # Before it has begun, the interpreter itself shows what it was given.
            if log.stat().st_size:
                with contextlib.suppress(psutil.NoSuchProcess, OSError):
                    seen.append(listed(process))
                    seen += map(listed, psutil.Process(process.pid).children(recursive=True))
            time.sleep(0.02)
        assert any("spawn" in shown for shown in seen), "no worker was seen"
        seen.append(listed(process))
        assert "--qdrant.api-key=***" in seen[-1]
        assert "--pg.table\0docs\0" in seen[-1]
        for shown in set(seen):
            assert_hidden(shown, password, key)
    finally:
        process.terminate()
        process.wait(30)
        qdrant.close()
    text = log.read_text()
    assert_hidden(text, password, key)
    assert "hint: --qdrant.api-key shows in process lists" in text
    assert "CDC_SYNC_SOURCE__URL_FILE" in text


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("CDC_SYNC_")}


# -- a daemon


def test_a_daemon_says_nothing_of_them(database18: Database, tmp_path: Path) -> None:
    """Streaming, and then neither password nor key is accepted any more."""
    password, key = PASSWORDS["unicode"], KEYS["url"]
    database18.execute("CREATE TABLE docs (id int PRIMARY KEY, body text)")
    role = least_privileged(database18, [{"name": "docs"}], publication="said")
    alter = sql.SQL("ALTER ROLE {} PASSWORD {}")
    with database18.connect() as connection:
        connection.execute(alter.format(sql.Identifier(role.name), password))
    qdrant = QdrantProcess(tmp_path / "qdrant", api_key=key)
    url = database18.server.url(database18.name, role.name, password)
    answers = ""
    try:
        daemon = Daemon(
            tmp_path,
            pg_url=url,
            qdrant_url=qdrant.url,
            api_key=key,
            tables=[{"name": "docs"}],
            slot=f"said_{database18.name}"[:60],
            source={"publication": "said"},
        )
        with daemon:
            daemon.start()
            database18.execute("INSERT INTO docs VALUES (1, 'one')")
            daemon.wait_caught_up()
            answers += everything_served(daemon)
            # The key is refused: an error while streaming.
            qdrant.api_key = "another"
            qdrant.restart()
            database18.execute("INSERT INTO docs VALUES (2, 'two')")
            daemon.wait(lambda: "sink_" in daemon.log(), "the refused key")
            with contextlib.suppress(OSError):
                answers += everything_served(daemon)
            with database18.connect() as connection:
                connection.execute(alter.format(sql.Identifier(role.name), "something else"))
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s",
                    (role.name,),
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert daemon.process is not None
                daemon.process.wait(20)
            # And from its start.
            if not daemon.running:
                daemon.start(wait=False)
                assert daemon.process is not None
                assert daemon.process.wait(60) != 0
        text = daemon.log_path.read_text(encoding="utf-8")
    finally:
        qdrant.close()
    assert "sink_auth" in text or "source_auth" in text
    assert_hidden(text + answers, password, key)


def everything_served(daemon: Daemon) -> str:
    return "".join(
        daemon.get(path)[1] for path in ("/status", "/metrics", "/livez", "/readyz", "/")
    )


def test_the_endpoint_is_for_this_machine_only_by_default() -> None:
    settings = Settings.model_validate(
        {"source": {"url": "host=x"}, "tables": [{"name": "t"}], "qdrant": {}}
    )
    assert settings.http.host == "127.0.0.1"
