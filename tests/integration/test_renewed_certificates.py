"""Certificates and passwords that are renewed under a daemon: what libpq reads from files is read
with every connection, certificates for Qdrant when it no longer takes the old ones."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ErrorKind, SinkError, SourceError
from cdc_sync.postgres.connect import connect
from cdc_sync.qdrant.open import open_sink
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import Sink
from cdc_sync.sync.retry import retrying
from tests.support.certificates import Authority, Pair
from tests.support.fix_postgres import Database
from tests.support.qdrant_control import QdrantProcess
from tests.support.source_tables import source_settings

_PATIENCE_SECONDS = 60.0


@dataclass
class Scene:
    """A server that demands client certificates, and the files of a client."""

    process: QdrantProcess
    settings: QdrantSettings
    accepted: Path
    certificate: Path
    key: Path
    ca_file: Path
    own: Pair

    def accept(self, authority: Authority) -> None:
        """Have the server take the certificates of this authority only."""
        shutil.copyfile(authority.file, self.accepted)
        self.process.restart()

    def renew(self, pair: Pair) -> None:
        """Put another certificate and its key in the place of the old ones, one after the other."""
        shutil.copyfile(pair.certificate, self.certificate)
        shutil.copyfile(pair.key, self.key)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    old = Authority(tmp_path / "old", "Old CA")
    files = [tmp_path / name for name in ("accepted.pem", "client.pem", "client.key", "ca.pem")]
    accepted, certificate, key, ca_file = files
    shutil.copyfile(old.file, accepted)
    shutil.copyfile(old.file, ca_file)
    own, client = old.server("127.0.0.1"), old.client("courier")
    shown = Pair(tmp_path / "server.pem", tmp_path / "server.key")
    shutil.copyfile(own.certificate, shown.certificate)
    shutil.copyfile(own.key, shown.key)
    process = QdrantProcess(
        tmp_path / "qdrant",
        tls=(shown.certificate, shown.key),
        ca_file=old.file,
        client_ca=accepted,
    )
    settings = QdrantSettings(
        url=f"https://127.0.0.1:{process.url.rpartition(':')[2]}",
        ca_file=str(ca_file),
        client_cert_file=str(certificate),
        client_key_file=str(key),
        timeout_seconds=10,
    )
    scene = Scene(process, settings, accepted, certificate, key, ca_file, shown)
    scene.renew(client)
    try:
        yield scene
    finally:
        process.close()


async def answers(sink: Sink) -> None:
    """Until it answers, as a daemon asks again and again."""
    async with asyncio.timeout(_PATIENCE_SECONDS):
        await retrying(sink.ping, lambda error, seconds: None)


async def fails(sink: Sink, times: int = 5) -> SinkError:
    """It does not answer, however often it is asked."""
    for _ in range(times):
        with pytest.raises(SinkError) as caught:
            await sink.ping()
        await asyncio.sleep(0.1)
    assert caught.value.kind is ErrorKind.SINK_UNAVAILABLE
    return caught.value


async def test_a_client_certificate_that_is_renewed(scene: Scene, tmp_path: Path) -> None:
    new = Authority(tmp_path / "new", "New CA")
    sink = await open_sink(scene.settings)
    assert isinstance(sink, ServerSink)
    try:
        await sink.ping()
        scene.accept(new)
        await fails(sink)
        client = new.client("courier")
        shutil.copyfile(client.certificate, scene.certificate)
        # With the old key still: half of the renewal is no reason to end.
        assert "is not the key of" in (await fails(sink)).message
        scene.renew(client)
        await answers(sink)
        # And all of its lanes.
        await asyncio.gather(*(sink.state.load(f"p{n}") for n in range(8)))
    finally:
        await sink.close()


async def test_an_authority_that_is_renewed(scene: Scene, tmp_path: Path) -> None:
    new = Authority(tmp_path / "new", "New CA")
    sink = await open_sink(scene.settings)
    try:
        await sink.ping()
        renewed = new.server("127.0.0.1")
        shutil.copyfile(renewed.certificate, scene.own.certificate)
        shutil.copyfile(renewed.key, scene.own.key)
        scene.process.restart()
        await fails(sink)
        shutil.copyfile(new.file, scene.ca_file)
        await answers(sink)
    finally:
        await sink.close()


def test_a_password_in_a_file_of_libpq_is_read_with_every_connection(
    database18: Database, tmp_path: Path
) -> None:
    role = database18.create_cdc_role([])
    password = urlsplit(role.url).password
    passfile = tmp_path / "pgpass"
    passfile.touch(mode=0o600)
    url = role.url.replace(f":{password}@", "@") + f"?passfile={passfile}"
    with pytest.raises(SourceError) as caught:
        connect(source_settings(url))
    assert caught.value.kind is ErrorKind.SOURCE_AUTH
    for renewed in (str(password), "another"):
        database18.execute(f"ALTER ROLE \"{role.name}\" PASSWORD '{renewed}'")
        passfile.write_text(f"*:*:*:*:{renewed}\n")
        for replication in (False, True):
            connect(source_settings(url), replication=replication).close()
