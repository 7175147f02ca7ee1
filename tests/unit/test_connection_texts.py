"""What libpq says of a connection that did not come about, told apart from the names in it."""

from __future__ import annotations

import socket

import psycopg
import pytest

from cdc_sync.errors import ErrorKind, SourceError
from cdc_sync.postgres.connect import connect
from tests.support.source_tables import source_settings

#: Names of hosts that a reason for giving up could be read into.
NAMES = ("db-pooler-rw", "pgbouncer.db.svc", "certificates.example", "sasl", "scram-db")


@pytest.mark.parametrize("name", NAMES)
def test_a_server_that_is_away_is_waited_for_whatever_it_is_called(name: str) -> None:
    with socket.socket() as taken:
        # Bound and not listened on: nobody else gets the port, and it refuses.
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        url = f"postgresql://app@{name}:{port}/app?hostaddr=127.0.0.1&sslmode=disable"
        with pytest.raises(SourceError) as caught:
            connect(source_settings(url))
    assert caught.value.kind is ErrorKind.SOURCE_UNAVAILABLE
    assert name in caught.value.message


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_not_found_is_waited_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f'could not translate host name "{name}" to address: Temporary failure'
    _fails(monkeypatch, text)
    with pytest.raises(SourceError) as caught:
        connect(source_settings(f"postgresql://app@{name}/app?sslmode=disable"))
    assert caught.value.kind is ErrorKind.SOURCE_UNAVAILABLE


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ('FATAL:  password authentication failed for user "app"', ErrorKind.SOURCE_AUTH),
        ("FATAL:  unsupported startup parameter: replication", ErrorKind.CONFIG),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.1"', ErrorKind.SOURCE_AUTH),
        ("server is in hot standby mode", ErrorKind.SOURCE_UNAVAILABLE),
        ("FATAL:  the database system is starting up", ErrorKind.SOURCE_UNAVAILABLE),
    ],
)
def test_what_the_server_says_still_counts(
    said: str, kind: ErrorKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fails(monkeypatch, f'connection to server at "pooler" (10.0.0.2), port 5432 failed: {said}')
    with pytest.raises(SourceError) as caught:
        connect(source_settings("postgresql://app@pooler/app?sslmode=disable"))
    assert caught.value.kind is kind


def _fails(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def refuse(**_: object) -> None:
        raise psycopg.OperationalError(text)

    monkeypatch.setattr(psycopg, "connect", refuse)
