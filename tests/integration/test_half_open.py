"""Connections that are open on our side only: a proxy answers TCP, and nobody answers questions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import psycopg
import pytest

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.postgres import connect as connections
from cdc_sync.postgres.connect import answering, connect
from cdc_sync.sync import kept_connection
from cdc_sync.sync.kept_connection import KeptConnection
from tests.support.fix_postgres import Database
from tests.support.pipeline_task import pipeline_settings, running
from tests.support.proxy import ProxyTo, TcpProxy
from tests.support.qdrant_control import QdrantTarget
from tests.support.source_tables import source_settings


@pytest.fixture
def proxy(database18: Database, proxy_to: ProxyTo) -> Iterator[TcpProxy]:
    with proxy_to(database18.server.host, database18.server.port) as proxy:
        yield proxy


def test_a_question_that_nobody_answers(database18: Database, proxy: TcpProxy) -> None:
    source = source_settings(database18.url_through(proxy))
    with connect(source) as connection:
        with answering(connection, 5):
            assert connection.execute("SELECT 1").fetchone() == (1,)
        proxy.stall()
        started = time.monotonic()
        with (
            pytest.raises(psycopg.OperationalError),
            answering(connection, 0.3),
        ):
            connection.execute("SELECT 2")
        assert time.monotonic() - started < 5


def test_a_connection_that_never_gets_ready(database18: Database, proxy: TcpProxy) -> None:
    source = source_settings(database18.url_through(proxy))
    source = source.model_copy(update={"connect_timeout_seconds": 2.0})
    # Enough of it goes through for libpq to be content.
    proxy.stall()
    with pytest.raises(SourceError) as caught:
        connect(source)
    assert caught.value.kind is ErrorKind.SOURCE_UNAVAILABLE


def test_a_kept_connection_is_opened_again(
    database18: Database, proxy: TcpProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_connection, "answering", lambda connection: answering(connection, 0.3))
    kept = KeptConnection(source_settings(database18.url_through(proxy)), "cdc_sync tests")

    def ask(connection: connections.PgConnection) -> object:
        try:
            return connection.execute("SELECT 3").fetchone()
        except psycopg.Error as error:
            raise connections.translate(error, "asking") from error

    assert kept.run(ask) == (3,)
    proxy.stall()
    with pytest.raises(SourceError) as caught:
        kept.run(ask)
    assert caught.value.kind is ErrorKind.SOURCE_UNAVAILABLE
    proxy.resume()
    assert kept.run(ask) == (3,)
    kept.end()


async def test_a_start_that_is_not_answered_is_made_again(
    database18: Database,
    qdrant: QdrantTarget,
    proxy: TcpProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database18.execute("CREATE TABLE docs (id int PRIMARY KEY, emb vector(3))")
    database18.execute("INSERT INTO docs VALUES (1, '[1,2,3]')")
    settings = pipeline_settings(database18, qdrant, "docs", pg_url=database18.url_through(proxy))
    source = settings.source.model_copy(update={"connect_timeout_seconds": 2.0})
    settings = settings.model_copy(update={"source": source})
    proxy.stall()
    async with running(settings, database18, qdrant, wait=False) as life:
        await life.wait(lambda: proxy.accepted > 0, "the connection")
        await asyncio.sleep(0.5)
        # What was opened meanwhile stays half open.
        proxy.abandon()
        proxy.resume()
        await life.wait_streaming()
        await life.assert_equal()
