"""The API key of Qdrant is changed under a pipeline that has it from a file: on the server first,
in the file first, while the file is away. What is refused is sent again, and nothing is lost."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cdc_sync.config import QdrantSettings, Settings
from cdc_sync.credentials import SecretFile
from cdc_sync.errors import CdcSyncError, ErrorKind, SinkError
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.sink import Changes
from cdc_sync.sync import source_history
from cdc_sync.sync.executors import LocalProcesses
from tests.faults.test_slot_lost import change, fill, settled
from tests.support.chunk_source import Chunks, plan_case, ready_sink, wait_until
from tests.support.daemon import Daemon
from tests.support.fix_postgres import Database
from tests.support.oracle import assert_equal
from tests.support.pipeline_task import Running, pipeline_settings, running
from tests.support.qdrant_control import QdrantProcess
from tests.support.rotation import Heard, Password, listening, says_nothing
from tests.support.sink_rows import items_plan


@pytest.fixture(autouse=True)
def _marks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_history, "_SAVE_SECONDS", 0.05)


@dataclass
class Key:
    """The key of a server, and the file that holds it."""

    server: QdrantProcess
    path: Path
    used: list[str] = field(default_factory=list)

    def new(self) -> str:
        """Make up another."""
        self.used.append(f"Wk7{secrets.token_urlsafe(12)}")
        return self.used[-1]

    def change_on_server(self, key: str) -> None:
        """From here on the server takes this one only."""
        self.server.api_key = key
        self.server.restart()

    def settings(self, settings: Settings, *, grace_seconds: float = 600.0) -> Settings:
        """The settings with the key from the file."""
        target = settings.qdrant.model_copy(
            update={
                "api_key": SecretFile(self.used[0], "qdrant.api_key", self.path),
                "credentials_grace_seconds": grace_seconds,
            }
        )
        return settings.model_copy(update={"qdrant": target})


@pytest.fixture
def key(tmp_path: Path) -> Iterator[Key]:
    first = f"Wk7{secrets.token_urlsafe(12)}"
    path = tmp_path / "key"
    path.write_text(first + "\n")
    server = QdrantProcess(tmp_path / "qdrant", api_key=first)
    yield Key(server, path, [first])
    server.close()


@pytest.fixture
def settings(database18: Database, key: Key) -> Settings:
    fill(database18)
    return key.settings(pipeline_settings(database18, key.server, "docs"))


async def refused(life: Running, heard: Heard) -> None:
    """Change something, and wait until that is refused."""
    change(life.database)
    await life.wait(lambda: bool(heard.refusals), "a refusal")


@pytest.mark.parametrize("meanwhile", ["the old one", "nothing", "half of it"])
async def test_the_server_first(
    settings: Settings,
    database18: Database,
    key: Key,
    meanwhile: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    with listening() as heard:
        async with running(settings, database18, key.server) as life:
            await settled(life)
            caplog.clear()
            new = key.new()
            if meanwhile == "nothing":
                key.path.unlink()
            elif meanwhile == "half of it":
                key.path.write_bytes(b"Wk7\n\xff")
            key.change_on_server(new)
            await refused(life, heard)
            tries = life.metric("sink_retries_total", kind="sink_unavailable")
            await life.wait(
                lambda: life.metric("sink_retries_total", kind="sink_unavailable") > tries + 2,
                "tries",
            )
            assert heard.read == []
            key.path.write_text(new + "\n")
            await life.assert_equal()
            assert heard.read == ["qdrant.api_key"]
            says_nothing(key.used, caplog, heard.refusals, life.pipeline.board.snapshot())
    side, reason, _ = heard.refusals[0]
    assert side == "qdrant"
    assert str(key.path) in reason
    assert "resync_wanted" not in caplog.messages


async def test_the_file_first(settings: Settings, database18: Database, key: Key) -> None:
    with listening() as heard:
        async with running(settings, database18, key.server) as life:
            await settled(life)
            new = key.new()
            key.path.write_text(new)
            key.server.restart()
            change(database18)
            await life.assert_equal()
            assert heard.read == []
            key.change_on_server(new)
            database18.execute("INSERT INTO docs VALUES (30001, 'afterwards', '[1,1,1]')")
            await life.assert_equal()
            assert heard.read == ["qdrant.api_key"]
            assert heard.refusals == []


@pytest.mark.parametrize("grace", [0.0, 1.0])
async def test_it_ends_when_the_time_is_over(
    settings: Settings,
    database18: Database,
    key: Key,
    grace: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    settings = key.settings(settings, grace_seconds=grace)
    async with running(settings, database18, key.server) as life:
        await settled(life)
        key.change_on_server(key.new())
        change(database18)
        with pytest.raises(CdcSyncError) as caught:
            await asyncio.wait_for(life.task, 90)
    error = caught.value
    assert error.kind is ErrorKind.SINK_AUTH
    assert error.policy.exit_code == 77
    assert f"{key.path} holds no other" in error.message
    assert ("tried again for 1 s" in error.message) == bool(grace)
    assert str(key.path) in error.remedy
    says_nothing(key.used, caplog, error, error.remedy)


async def test_a_wrong_one_at_the_start_ends_at_once(
    settings: Settings, database18: Database, key: Key
) -> None:
    key.change_on_server(key.new())
    with listening() as heard:
        async with running(settings, database18, key.server, wait=False) as life:
            with pytest.raises(CdcSyncError) as caught:
                await asyncio.wait_for(life.task, 90)
        assert caught.value.kind is ErrorKind.SINK_AUTH
        assert heard.refusals == []


async def test_workers_of_a_copy_wait_for_it_and_take_it(
    settings: Settings, database18: Database, key: Key
) -> None:
    database18.execute(
        "INSERT INTO docs SELECT i, repeat('x', 300), ARRAY[i, 1, 2]::real[]::vector"
        " FROM generate_series(1001, 2000) i; ANALYZE docs"
    )
    case = plan_case(database18, settings)
    retried: list[CdcSyncError] = []
    executor = LocalProcesses(2, lambda error, _: retried.append(error))
    async with ready_sink(case):
        with case.snapshot() as snapshot:
            source = Chunks.of(case.tasks(snapshot, 4))
            new = key.new()
            key.change_on_server(new)
            copying = asyncio.create_task(executor.copy(source, source.done))
            try:
                await wait_until(lambda: copying.done() or len(retried) > 4, "workers refused")
                assert not copying.done()
                key.path.write_text(new + "\n")
                await asyncio.wait_for(copying, 150)
            finally:
                copying.cancel()
                await asyncio.gather(copying, return_exceptions=True)
                await executor.close()
    case.assert_equal(key.server)
    assert source.put_back_tasks == []


async def test_all_requests_in_flight_take_it_together(key: Key) -> None:
    """Of many that are refused at once each is sent again."""
    target = QdrantSettings(
        url=key.server.url, api_key=SecretFile(key.used[0], "qdrant.api_key", key.path)
    )
    sink = await open_sink(target)
    try:
        plan = items_plan("items")
        await sink.ensure_collection(plan)
        new = key.new()
        key.change_on_server(new)
        with listening() as heard:
            with pytest.raises(SinkError) as caught:
                await sink.writer(plan).apply(Changes(deletes=[1]))
            assert caught.value.kind is ErrorKind.SINK_UNAVAILABLE
            key.path.write_text(new)
            await asyncio.gather(*(sink.inspect(plan) for _ in range(16)))
            assert heard.read == ["qdrant.api_key"]
    finally:
        await sink.close()


async def test_nodes_that_are_changed_one_after_the_other(key: Key, tmp_path: Path) -> None:
    """Behind one address some nodes know the new key and others the old one."""
    target = QdrantSettings(
        url=key.server.url, api_key=SecretFile(key.used[0], "qdrant.api_key", key.path)
    )
    sink = await open_sink(target)
    try:
        plan = items_plan("items")
        await sink.ensure_collection(plan)
        old, new = key.used[0], key.new()
        key.path.write_text(new)
        for taken in (new, old, new):
            key.change_on_server(taken)
            errors: list[str] = []
            while len(errors) < 600:
                try:
                    await sink.inspect(plan)
                    break
                except SinkError as error:
                    errors.append(error.message)
                    await asyncio.sleep(0.1)
            assert len(errors) < 600, "the server did not come back"
            assert "UNAUTHENTICATED" not in "".join(errors)
    finally:
        await sink.close()


def test_a_daemon_takes_both_and_says_neither(
    database18: Database, key: Key, tmp_path: Path
) -> None:
    """As users run it, by variables that name files; then the password does not come."""
    fill(database18)
    password = Password.of(database18, "docs", tmp_path / "password")
    slot = f"rotated_{database18.name}"[:60]
    database18.execute(f'CREATE PUBLICATION "{slot}" FOR TABLE docs')
    daemon = Daemon(
        tmp_path,
        pg_url=password.url,
        qdrant_url=key.server.url,
        tables=[{"name": "docs", "collection": "docs"}],
        slot=slot,
        source={"credentials_grace_seconds": 2},
        env={
            "CDC_SYNC_SOURCE__PASSWORD_FILE": str(password.path),
            "CDC_SYNC_QDRANT__API_KEY_FILE": str(key.path),
        },
    )
    with daemon:
        daemon.start()
        # What watches it from outside is not rotated.
        daemon.pg_url = database18.url
        new_key, new_password = key.new(), password.new()
        key.path.write_text(new_key + "\n")
        password.path.write_text(new_password + "\n")
        key.change_on_server(new_key)
        password.change_on_server(new_password)
        password.cut(slot_too=True)
        change(database18)
        daemon.wait(lambda: daemon.log().count('"secret_read_again"') == 2, "both are read again")
        daemon.wait_caught_up()
        assert_equal(
            database18.url,
            "docs",
            qdrant_url=key.server.url,
            collection="docs",
            api_key=key.server.api_key,
        )
        shown = "".join(daemon.get(path)[1] for path in ("/status", "/metrics", "/readyz"))
        password.change_on_server(password.new())
        password.cut(slot_too=True)
        assert daemon.process is not None
        assert daemon.process.wait(90) == 77
        text = daemon.log_path.read_text(encoding="utf-8")
    for secret in (*key.used, *password.used):
        assert secret not in text + shown
    read = [event for event in daemon.events() if event["event"] == "secret_read_again"]
    assert {event["setting"] for event in read} == {"source.password", "qdrant.api_key"}
    assert {event["path"] for event in read} == {str(password.path), str(key.path)}
    assert "credentials_refused" in text
    failed = [event for event in daemon.events() if event["event"] == "failed"]
    assert str(password.path) in failed[-1]["remedy"]
