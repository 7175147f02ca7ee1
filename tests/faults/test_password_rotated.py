"""The password of Postgres is changed under a pipeline that has it from a file: on the server
first, in the file first, while one or the other is away. The stream goes on, nothing is lost."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo
from pydantic import SecretStr

from cdc_sync.config import Settings, SourceSettings
from cdc_sync.credentials import SecretFile
from cdc_sync.errors import CdcSyncError, ErrorKind, SourceError
from cdc_sync.postgres import connect as connecting
from cdc_sync.postgres.connect import LoginRefusedError, connect
from cdc_sync.sync import source_history, worker_pool
from cdc_sync.sync.executors import LocalProcesses
from cdc_sync.sync.worker_pool import MAX_LOSSES
from tests.faults.test_slot_lost import change, fill, settled
from tests.support.chunk_source import (
    Chunks,
    plan_case,
    ready_sink,
    wait_until,
)
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.proxy import ProxyTo
from tests.support.qdrant_control import QdrantTarget
from tests.support.rotation import Heard, Password, listening, says_nothing


@pytest.fixture(autouse=True)
def _marks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)


@pytest.fixture
def password(database18: Database, tmp_path: Path) -> Password:
    fill(database18)
    return Password.of(database18, "docs", tmp_path / "password")


@pytest.fixture
def settings(database18: Database, qdrant: QdrantTarget, password: Password) -> Settings:
    return password.settings(pipeline_settings(database18, qdrant, "docs"))


def with_grace(settings: Settings, seconds: float) -> Settings:
    source = settings.source.model_copy(update={"credentials_grace_seconds": seconds})
    return settings.model_copy(update={"source": source})


async def streams(life: Running) -> None:
    """Until the stream has brought a change: the first one of a session has types looked up."""
    await settled(life)
    life.database.execute("INSERT INTO docs VALUES (30000, 'first', '[1,1,1]')")
    await life.caught_up()


async def refused(life: Running, password: Password, heard: Heard) -> None:
    """Cut all but the slot's connection, and wait until somebody was refused."""
    await life.wait(lambda: password.cut() > 0 or bool(heard.refusals), "a kept connection")
    await life.wait(lambda: bool(heard.refusals), "a refusal")


async def test_the_server_first(
    settings: Settings,
    database18: Database,
    qdrant: QdrantTarget,
    password: Password,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Changes come on over the slot's connection while every other is refused, and after that is
    cut too, they come once the file has arrived."""
    caplog.set_level("DEBUG")
    with listening() as heard:
        async with running(settings, database18, qdrant) as life:
            await streams(life)
            caplog.clear()
            walsender = password.slot_process(life.slot)
            new = password.new()
            password.change_on_server(new)
            await refused(life, password, heard)
            change(database18)
            await life.assert_equal()
            assert password.slot_process(life.slot) == walsender
            assert life.pipeline.positions.alone_since is None
            password.cut(slot_too=True)
            await life.wait(lambda: not life.pipeline.board.source_up, "the cut")
            database18.execute("INSERT INTO docs VALUES (30001, 'while away', '[1,1,1]')")
            assert heard.read == []
            password.path.write_text(new + "\n")
            await life.wait(lambda: life.pipeline.board.source_up, "the stream")
            await life.assert_equal()
            assert heard.read == ["source.password"]
            says_nothing(password.used, caplog, heard.refusals, life.pipeline.board.snapshot())
    side, reason, _ = heard.refusals[0]
    assert side == "postgres"
    assert "authentication failed" in reason
    assert str(password.path) in reason
    assert not {"resync_wanted", "resync_completed"} & set(caplog.messages)


async def test_the_file_first(
    settings: Settings,
    database18: Database,
    qdrant: QdrantTarget,
    password: Password,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Until the server is changed the old one goes on, also through a reconnection."""
    with listening() as heard:
        async with running(settings, database18, qdrant) as life:
            await settled(life)
            new = password.new()
            password.path.write_text(new)
            password.cut(slot_too=True)
            change(database18)
            await life.assert_equal()
            assert heard.read == []
            password.change_on_server(new)
            password.cut(slot_too=True)
            database18.execute("INSERT INTO docs VALUES (30001, 'afterwards', '[1,1,1]')")
            await life.assert_equal()
            assert heard.read == ["source.password"]
            assert heard.refusals == []
            says_nothing(password.used, caplog)


@pytest.mark.parametrize("meanwhile", [None, b"", b"half\xff"])
async def test_the_file_is_away_or_half_written_meanwhile(
    settings: Settings,
    database18: Database,
    qdrant: QdrantTarget,
    password: Password,
    meanwhile: bytes | None,
) -> None:
    with listening() as heard:
        async with running(settings, database18, qdrant) as life:
            await settled(life)
            new = password.new()
            password.path.unlink()
            if meanwhile is not None:
                password.path.write_bytes(meanwhile)
            password.change_on_server(new)
            password.cut(slot_too=True)
            await life.wait(lambda: bool(heard.refusals), "a refusal")
            change(database18)
            assert "cannot be read" in heard.refusals[0][1]
            password.path.write_text(new + "\n")
            await life.assert_equal()
            assert heard.read == ["source.password"]


async def test_a_row_that_must_be_read_is_waited_for_with_the_slot_in_hand(
    settings: Settings, database18: Database, qdrant: QdrantTarget, password: Password
) -> None:
    """A point that is gone is made again from the row, which takes a connection."""
    database18.execute(
        "ALTER TABLE docs ALTER note SET STORAGE EXTERNAL;"
        "UPDATE docs SET note = repeat('x', 5000) WHERE id = 5"
    )
    collection = settings.tables[0].collection
    assert collection is not None
    with listening() as heard:
        async with running(settings, database18, qdrant) as life:
            await streams(life)
            walsender = password.slot_process(life.slot)
            qdrant.client().delete(collection, [5], wait=True)
            new = password.new()
            password.change_on_server(new)
            await refused(life, password, heard)
            database18.execute("UPDATE docs SET emb = '[7,7,7]' WHERE id = 5")
            await life.wait(lambda: not life.pipeline.board.source_up, "the row wanted")
            password.path.write_text(new)
            await life.assert_equal()
            assert password.slot_process(life.slot) == walsender


@pytest.mark.requirement("R39")
async def test_a_publication_altered_unseen_is_noticed_afterwards(
    settings: Settings,
    database18: Database,
    qdrant: QdrantTarget,
    password: Password,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody can look while the password is refused; rows that were not sent then are read once
    somebody can."""
    caplog.set_level("INFO")
    name = settings.source.publication
    with listening() as heard:
        async with running(settings, database18, qdrant) as life:
            await streams(life)
            caplog.clear()
            new = password.new()
            password.change_on_server(new)
            await refused(life, password, heard)
            database18.execute(
                f'ALTER PUBLICATION "{name}" DROP TABLE docs;'
                "INSERT INTO docs VALUES (30001, 'not sent', '[1,1,1]')"
            )
            database18.execute(f'ALTER PUBLICATION "{name}" ADD TABLE docs')
            change(database18)
            await life.caught_up()
            password.path.write_text(new)
            await life.wait(lambda: "resync_completed" in caplog.messages, "the table read again")
            await life.assert_equal()


async def test_postgres_is_away_while_it_is_changed(
    database18: Database,
    qdrant: QdrantTarget,
    password: Password,
    proxy_to: ProxyTo,
) -> None:
    """The file changes while nobody can tell which one is right."""
    proxy = proxy_to(database18.server.host, database18.server.port)
    password.url = conninfo.make_conninfo(password.url, host=proxy.host, port=proxy.port)
    settings = password.settings(pipeline_settings(database18, qdrant, "docs"))
    with listening() as heard:
        async with running(settings, database18, qdrant) as life:
            await settled(life)
            proxy.refuse()
            proxy.cut()
            await life.wait(lambda: not life.pipeline.board.source_up, "the outage")
            new = password.new()
            password.path.write_text(new + "\n")
            change(database18)
            tries = life.metric("source_reconnects_total", reason="source_unavailable")
            await life.wait(
                lambda: life.metric("source_reconnects_total", reason="source_unavailable") > tries,
                "tries",
            )
            # The server still has the old one, which was not given up meanwhile.
            proxy.accept()
            await life.assert_equal()
            assert heard.read == []
            proxy.refuse()
            proxy.cut()
            await life.wait(lambda: not life.pipeline.board.source_up, "the second outage")
            password.change_on_server(new)
            proxy.accept()
            database18.execute("INSERT INTO docs VALUES (30001, 'afterwards', '[1,1,1]')")
            await life.assert_equal()
            assert heard.read == ["source.password"]


@pytest.mark.parametrize("grace", [0.0, 1.0])
async def test_it_ends_when_the_time_is_over(
    settings: Settings,
    database18: Database,
    qdrant: QdrantTarget,
    password: Password,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    grace: float,
) -> None:
    caplog.set_level("DEBUG")
    with listening() as heard:
        async with running(with_grace(settings, grace), database18, qdrant) as life:
            await settled(life)
            password.change_on_server(password.new())
            password.cut()
            with pytest.raises(CdcSyncError) as caught:
                await asyncio.wait_for(life.task, 90)
    error = caught.value
    assert error.kind is ErrorKind.SOURCE_AUTH
    assert error.policy.exit_code == 77
    assert "authentication failed" in error.message
    assert f"{password.path} holds no other" in error.message
    assert ("tried again for 1 s" in error.message) == bool(grace)
    assert str(password.path) in error.remedy
    assert bool(heard.refusals) == bool(grace)
    says_nothing(password.used, caplog, error, error.remedy)


async def test_a_wrong_one_at_the_start_ends_at_once(
    settings: Settings, database18: Database, qdrant: QdrantTarget, password: Password
) -> None:
    password.change_on_server(password.new())
    with listening() as heard:
        async with running(settings, database18, qdrant, wait=False) as life:
            with pytest.raises(CdcSyncError) as caught:
                await asyncio.wait_for(life.task, 90)
        assert caught.value.kind is ErrorKind.SOURCE_AUTH
        assert "authentication failed" in caught.value.message
        assert heard.refusals == []


def add_pages(database: Database) -> None:
    """Rows for several chunks."""
    database.execute(
        "INSERT INTO docs SELECT i, repeat('x', 300), ARRAY[i, 1, 2]::real[]::vector"
        " FROM generate_series(1001, 2000) i; ANALYZE docs"
    )


async def test_workers_of_a_copy_wait_for_it_and_take_it(
    settings: Settings,
    database18: Database,
    qdrant: QdrantTarget,
    password: Password,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy with processes goes on under the same snapshot; its chunks do not count as lost."""
    monkeypatch.setattr(worker_pool, "_REFUSED_PAUSE_SECONDS", 0.1)
    add_pages(database18)
    case = plan_case(database18, settings)
    executor = LocalProcesses(2)
    with listening() as heard:
        async with ready_sink(case):
            with case.snapshot() as snapshot:
                source = Chunks.of(case.tasks(snapshot, 4))
                new = password.new()
                password.change_on_server(new)
                copying = asyncio.create_task(executor.copy(source, source.done))
                try:
                    await wait_until(
                        lambda: copying.done() or len(source.put_back_tasks) > 4 * MAX_LOSSES,
                        "workers refused",
                    )
                    assert not copying.done()
                    assert source.results == []
                    password.path.write_text(new + "\n")
                    await asyncio.wait_for(copying, 150)
                finally:
                    copying.cancel()
                    await asyncio.gather(copying, return_exceptions=True)
                    await executor.close()
        case.assert_equal(qdrant)
        assert heard.refusals


async def test_workers_of_a_copy_do_not_wait_for_ever(
    settings: Settings, database18: Database, qdrant: QdrantTarget, password: Password
) -> None:
    add_pages(database18)
    case = plan_case(database18, with_grace(settings, 1.0))
    executor = LocalProcesses(2)
    async with ready_sink(case):
        with case.snapshot() as snapshot:
            source = Chunks.of(case.tasks(snapshot, 4))
            password.change_on_server(password.new())
            try:
                with pytest.raises(CdcSyncError) as caught:
                    await asyncio.wait_for(executor.copy(source, source.done), 150)
            finally:
                await executor.close()
    assert caught.value.kind is ErrorKind.SOURCE_AUTH
    assert str(password.path) in caught.value.message


async def test_a_first_copy_goes_on_when_it_has_arrived(
    database18: Database,
    qdrant: QdrantTarget,
    password: Password,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Changed in the middle of a window: its workers go on, and the next one waits."""
    caplog.set_level("DEBUG")
    add_pages(database18)
    slow = {"num_workers": 2, "window_seconds": 0.2, "chunk_rows": 100, "batch_delay": 200}
    settings = password.settings(pipeline_settings(database18, qdrant, "docs", migration=slow))
    with listening() as heard:
        async with running(settings, database18, qdrant, wait=False) as life:
            await life.wait(lambda: "chunk_copied" in caplog.messages, "the first chunk")
            new = password.new()
            password.change_on_server(new)
            change(database18)
            await life.wait(lambda: bool(heard.refusals), "a refusal")
            assert "table_copied" not in caplog.messages
            password.path.write_text(new)
            await life.wait_streaming()
            await life.assert_equal()
            assert heard.read == ["source.password"]


# -- one connection


def url_of(password: Password, value: str, **changes: str) -> str:
    parts = {**conninfo.conninfo_to_dict(password.url), **changes}
    host = f"{parts['host']}:{parts['port']}/{parts['dbname']}"
    return f"postgresql://{parts['user']}:{value}@{host}"


@pytest.fixture
def by_url(password: Password) -> SourceSettings:
    """Settings whose connection string comes from the file, with the password in it."""
    first = url_of(password, password.used[0])
    password.path.write_text(first)
    source = SourceSettings(url=SecretFile(first, "source.url", password.path))
    connect(source).close()
    return source


def test_a_url_from_a_file_may_bring_another_role(
    by_url: SourceSettings, password: Password, database18: Database
) -> None:
    """Stores of secrets make up roles that live for a while."""
    other = database18.create_cdc_role(["docs"])
    password.change_on_server(password.new())
    password.path.write_text(other.url)
    with listening() as heard, connect(by_url) as connection:
        assert connection.info.user == other.name
        assert heard.read == ["source.url"]
    assert by_url.url.get_secret_value() == other.url


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"dbname": "postgres"}, "leads elsewhere"),
        ({"host": "localhost"}, "leads elsewhere"),
        ({"host": "no@where"}, "no connection string"),
    ],
)
def test_a_url_from_a_file_may_not_lead_elsewhere(
    by_url: SourceSettings, password: Password, changes: dict[str, str], state: str
) -> None:
    """Connections that are open lead to the one server, and rows would be read from the other."""
    new = password.new()
    password.change_on_server(new)
    password.path.write_text(url_of(password, new, **changes))
    with pytest.raises(LoginRefusedError) as caught:
        connect(by_url)
    assert state in caught.value.message
    for used in password.used:
        assert used not in caught.value.message + caught.value.remedy
    password.path.write_text(url_of(password, new))
    connect(by_url).close()


def test_a_server_that_refuses_is_not_asked_by_everybody(
    settings: Settings, password: Password, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some lock a role after a few failed logins."""
    monkeypatch.setattr(connecting, "_REFUSED_SECONDS", 600.0)
    source = settings.source
    connect(source).close()
    new = password.new()
    password.change_on_server(new)
    tries = []
    really = psycopg.connect

    def counted(**parameters: object) -> object:
        tries.append(parameters["password"])
        return really(**parameters)  # type: ignore[arg-type]

    monkeypatch.setattr(psycopg, "connect", counted)
    texts = set()
    for _ in range(5):
        with pytest.raises(LoginRefusedError) as caught:
            connect(source)
        texts.add(caught.value.message)
    assert tries == password.used[:1]
    assert len(texts) == 1
    # What is new in the file is tried at once.
    password.path.write_text(new)
    connect(source).close()
    monkeypatch.undo()
    assert tries == [password.used[0], password.used[0], new]


@pytest.mark.parametrize("severity", ["FATAL", "FATALE", "ВАЖНО", "致命的エラー"])
def test_a_server_may_refuse_in_any_language(
    settings: Settings, password: Password, monkeypatch: pytest.MonkeyPatch, severity: str
) -> None:
    source = settings.source
    really = psycopg.connect
    refusals = []

    def foreign(**parameters: object) -> object:
        try:
            return really(**parameters)  # type: ignore[arg-type]
        except psycopg.OperationalError as error:
            refusals.append(str(error))
            text = re.sub("FATAL: .*", f"{severity}:  nicht ohne", str(error), flags=re.DOTALL)
            raise psycopg.OperationalError(text) from None

    connect(source).close()
    new = password.new()
    password.change_on_server(new)
    password.path.write_text(new)
    monkeypatch.setattr(psycopg, "connect", foreign)
    with listening() as heard:
        connect(source).close()
        monkeypatch.undo()
        assert heard.read == ["source.password"]
    assert "FATAL: " in refusals[0]


def test_a_password_by_value_says_how_one_is_renewed(password: Password) -> None:
    source = SourceSettings(url=SecretStr(password.url), password=SecretStr(password.used[0]))
    connect(source).close()
    password.change_on_server(password.new())
    with pytest.raises(SourceError) as caught:
        connect(source)
    assert caught.value.kind is ErrorKind.SOURCE_AUTH
    assert "CDC_SYNC_SOURCE__PASSWORD_FILE" in caught.value.remedy


def test_what_is_not_the_passwords_fault_keeps_its_remedy(
    settings: Settings, password: Password, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that is no longer let in, or a certificate that has expired, passes, too."""
    source = settings.source
    connect(source).close()
    monkeypatch.setattr(connecting, "_REFUSED_SECONDS", 0.0)
    texts = {
        'FATAL:  no pg_hba.conf entry for host "10.0.0.1"': "pg_hba.conf on the server",
        'server certificate for "x" does not match host name "y"': "name in the certificate",
    }
    for text, remedy in texts.items():

        def refuse(failure: str = text, **_: object) -> None:
            raise psycopg.OperationalError(f"connection to server at x failed: {failure}")

        monkeypatch.setattr(psycopg, "connect", refuse)
        for given in (source, source.model_copy(update={"password": SecretStr("by-value")})):
            with pytest.raises(LoginRefusedError) as caught:
                connect(given)
            assert remedy in caught.value.remedy
            assert str(password.path) not in caught.value.message
    monkeypatch.undo()


def test_a_password_file_of_libpq_is_waited_for(password: Password) -> None:
    passfile = password.path
    passfile.chmod(0o600)
    passfile.write_text(f"*:*:*:*:{password.used[0]}\n")
    url = conninfo.make_conninfo(password.url, passfile=str(passfile))
    source = SourceSettings(url=SecretStr(url))
    connect(source).close()
    new = password.new()
    password.change_on_server(new)
    with pytest.raises(LoginRefusedError):
        connect(source)
    passfile.write_text(f"*:*:*:*:{new}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connecting, "_REFUSED_SECONDS", 0.0)
        connect(source).close()
