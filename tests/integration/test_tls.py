"""TLS on both sides: verified by default, refused with one clear line, client certificates.

The servers in Python wheels are built without OpenSSL, so Postgres is 17 from npm here; it has no
pgvector, and TLS does not ask for vectors.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from cdc_sync.config import QdrantSettings
from cdc_sync.demo.embedded import PostgresServer
from cdc_sync.errors import CdcSyncError, ErrorKind
from cdc_sync.postgres.connect import connect, transport_warning
from cdc_sync.qdrant.open import transport_warning as qdrant_warning
from cdc_sync.tls import is_loopback
from tests.support.certificates import Authority, Pair
from tests.support.daemon import Daemon, write_config
from tests.support.postgres_packages import PackageMissingError, protocol_binaries
from tests.support.qdrant_control import QdrantProcess
from tests.support.source_tables import source_settings

UNAVAILABLE, PERMISSION, CONFIG = 69, 77, 78
#: No server of ours is elsewhere: the name leads to the loopback, and is verified as any other.
HOST = "db.example.test"


@dataclass(frozen=True)
class Authorities:
    """Who signs: ``ours``, somebody else, and somebody else under our name."""

    ours: Authority
    other: Authority
    impostor: Authority


@pytest.fixture(scope="module")
def authorities(tmp_path_factory: pytest.TempPathFactory) -> Authorities:
    root = tmp_path_factory.mktemp("tls")
    return Authorities(
        Authority(root / "ours", "Our CA"),
        Authority(root / "other", "Other CA"),
        Authority(root / "impostor", "Our CA"),
    )


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """Postgres 17, with a table and a role whose name a certificate can carry."""
    try:
        binaries = protocol_binaries(17)
    except PackageMissingError as exc:
        if exc.required:
            pytest.fail(str(exc))
        pytest.skip(str(exc))
    server = PostgresServer(binaries)
    try:
        server.start()
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute("CREATE TABLE items (id int PRIMARY KEY, title text)")
            connection.execute(
                "INSERT INTO items SELECT n, 'title ' || n FROM generate_series(1, 50) n"
            )
            connection.execute("CREATE ROLE courier LOGIN SUPERUSER")
        yield server
    finally:
        server.close()


def use_tls(server: PostgresServer, pair: Pair | None, client_ca: Path | None = None) -> None:
    """Give the server a certificate, or none; with ``client_ca`` it demands one of its clients."""
    data = server.data_directory
    owner = data.stat()
    lines = ["ssl = off"]
    if pair is not None:
        files = {"server.crt": pair.certificate, "server.key": pair.key}
        if client_ca is not None:
            files["clients.crt"] = client_ca
        for name, source in files.items():
            shutil.copyfile(source, data / name)
            (data / name).chmod(0o600)
            os.chown(data / name, owner.st_uid, owner.st_gid)
        lines = ["ssl = on"]
        lines += ["ssl_ca_file = 'clients.crt'"] if client_ca is not None else []
    rules = "hostssl all all 127.0.0.1/32 cert\n" if client_ca is not None else ""
    hba = data / "pg_hba.conf"
    rest = [x for x in hba.read_text().splitlines(keepends=True) if not x.startswith("hostssl")]
    hba.write_text(rules + "".join(rest))
    (data / "postgresql.auto.conf").write_text("\n".join(lines) + "\n")
    server.restart()


def away(server: PostgresServer, **parameters: str) -> str:
    """A URL by the name that is not this machine's."""
    url = server.url("postgres", host=HOST)
    more = {"hostaddr": "127.0.0.1", **parameters}
    return url + "?" + "&".join(f"{name}={value}" for name, value in more.items())


def refused(url: str, **settings: object) -> CdcSyncError:
    with pytest.raises(CdcSyncError) as caught:
        connect(source_settings(url, **settings)).close()
    assert "\n" not in caught.value.message
    return caught.value


def encrypted(url: str, **settings: object) -> bool:
    with connect(source_settings(url, **settings)) as connection:
        return bool(connection.pgconn.ssl_in_use)


# -- Postgres


@pytest.mark.requirement("R10")
def test_a_server_elsewhere_is_verified_by_default(
    server: PostgresServer, authorities: Authorities
) -> None:
    use_tls(server, authorities.ours.server(HOST))
    ca = str(authorities.ours.file)
    assert encrypted(away(server), ca_file=ca)
    assert encrypted(away(server, sslrootcert=ca))
    with connect(source_settings(away(server), ca_file=ca), replication=True) as stream:
        assert stream.pgconn.ssl_in_use
    # The system's authorities do not know ours.
    error = refused(away(server))
    assert error.kind is ErrorKind.SOURCE_AUTH
    assert re.search("certificate .* is refused: .*issuer certificate", error.message)
    assert "source.ca_file" in error.remedy


def test_wrong_authorities_are_told_apart(server: PostgresServer, authorities: Authorities) -> None:
    use_tls(server, authorities.ours.server(HOST))
    other = refused(away(server), ca_file=str(authorities.other.file))
    assert "unable to get local issuer certificate" in other.message
    impostor = refused(away(server), ca_file=str(authorities.impostor.file))
    assert "certificate signature failure" in impostor.message
    assert other.kind is impostor.kind is ErrorKind.SOURCE_AUTH


def test_an_expired_certificate(server: PostgresServer, authorities: Authorities) -> None:
    use_tls(server, authorities.ours.server(HOST, expired=True))
    error = refused(away(server), ca_file=str(authorities.ours.file))
    assert error.kind is ErrorKind.SOURCE_AUTH
    assert "is refused: certificate has expired" in error.message


def test_a_certificate_for_another_host(server: PostgresServer, authorities: Authorities) -> None:
    use_tls(server, authorities.ours.server("elsewhere.example.test"))
    ca = str(authorities.ours.file)
    error = refused(away(server), ca_file=ca)
    assert error.kind is ErrorKind.SOURCE_AUTH
    assert "is for another host" in error.message
    # verify-ca compares no names; it has to be asked for.
    assert encrypted(away(server), ca_file=ca, sslmode="verify-ca")
    assert encrypted(away(server, sslmode="verify-ca"), ca_file=ca)


@pytest.mark.requirement("R10")
def test_a_server_without_tls(server: PostgresServer, authorities: Authorities) -> None:
    use_tls(server, None)
    for settings in ({}, {"ca_file": str(authorities.ours.file)}, {"sslmode": "require"}):
        error = refused(away(server), **settings)
        assert error.kind is ErrorKind.CONFIG, settings
        assert "does not offer TLS" in error.message
        assert "source.sslmode = disable" in error.remedy
    # Asked for by name it goes in clear, and says so.
    for source in (
        source_settings(away(server), sslmode="disable"),
        source_settings(away(server, sslmode="disable")),
        source_settings(away(server), sslmode="prefer"),
    ):
        with connect(source) as connection:
            assert not connection.pgconn.ssl_in_use
        assert transport_warning(source) is not None
    # To this machine itself nothing has to be asked for, and nothing is said.
    assert not encrypted(server.url())
    assert transport_warning(source_settings(server.url())) is None


def test_unverified_only_when_asked_for(server: PostgresServer, authorities: Authorities) -> None:
    use_tls(server, authorities.ours.server(HOST))
    source = source_settings(away(server, sslmode="require"))
    with connect(source) as connection:
        assert connection.pgconn.ssl_in_use
    assert "sslmode=require" in (transport_warning(source) or "")
    assert transport_warning(source_settings(away(server))) is None


def test_the_environment_asks_too(
    server: PostgresServer, authorities: Authorities, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tls(server, authorities.ours.server(HOST))
    monkeypatch.setenv("PGSSLROOTCERT", str(authorities.ours.file))
    assert encrypted(away(server))
    monkeypatch.setenv("PGSSLROOTCERT", str(authorities.other.file))
    assert "issuer" in refused(away(server)).message
    monkeypatch.setenv("PGSSLMODE", "disable")
    assert not encrypted(away(server))


def test_a_client_certificate(server: PostgresServer, authorities: Authorities) -> None:
    use_tls(server, authorities.ours.server(HOST), client_ca=authorities.ours.file)
    ca, client = str(authorities.ours.file), authorities.ours.client("courier")
    url = away(server, user="courier").replace("postgres:", "courier:", 1)
    url = re.sub(r"//[^@]*@", "//courier@", away(server))
    own = {"client_cert_file": str(client.certificate), "client_key_file": str(client.key)}
    assert encrypted(url, ca_file=ca, **own)
    missing = refused(url, ca_file=ca)
    assert missing.kind is ErrorKind.SOURCE_AUTH
    assert "demands a client certificate" in missing.message
    for unfit in (authorities.other.client("courier"), authorities.ours.client("somebody")):
        files = {"client_cert_file": str(unfit.certificate), "client_key_file": str(unfit.key)}
        error = refused(url, ca_file=ca, **files)
        assert error.kind is ErrorKind.SOURCE_AUTH
        assert "does not accept the client certificate" in error.message, error.message


def test_a_client_certificate_with_the_wrong_key(
    server: PostgresServer, authorities: Authorities, tmp_path: Path
) -> None:
    use_tls(server, authorities.ours.server(HOST), client_ca=authorities.ours.file)
    ca = str(authorities.ours.file)
    one, other = authorities.ours.client("courier"), authorities.ours.client("courier")
    files = {"client_cert_file": str(one.certificate), "client_key_file": str(other.key)}
    assert "key of the client certificate" in refused(away(server), ca_file=ca, **files).message
    alone = refused(away(server), ca_file=ca, client_cert_file=str(one.certificate))
    assert "are not both set" in alone.message
    loose = tmp_path / "loose.key"
    shutil.copyfile(one.key, loose)
    loose.chmod(0o644)
    files = {"client_cert_file": str(one.certificate), "client_key_file": str(loose)}
    assert "chmod 600" in refused(away(server), ca_file=ca, **files).remedy


def test_files_that_cannot_be_used(tmp_path: Path, authorities: Authorities) -> None:
    junk = tmp_path / "junk.pem"
    url = "postgresql://db.example.test/app"
    for content in (None, b"", b"no pem at all", b"-----BEGIN CERTIFICATE-----\nx\n"):
        if content is not None:
            junk.write_bytes(content)
        error = refused(url, ca_file=str(junk))
        assert error.kind is ErrorKind.CONFIG
        assert str(junk) in error.message
    for contradiction in ("sslmode=require", "sslrootcert=/elsewhere.pem"):
        error = refused(
            f"{url}?{contradiction}", sslmode="verify-full", ca_file=str(authorities.ours.file)
        )
        assert "contradicts" in error.message


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("LOCALHOST.", True),
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("/var/run/postgresql", True),
        ("@abstract", True),
        ("localhost.example.test", False),
        ("127.0.0.1.example.test", False),
        ("10.0.0.1", False),
        ("0.0.0.0", False),
        ("::ffff:10.0.0.1", False),
        ("db", False),
        ("", False),
    ],
)
def test_which_hosts_are_this_machine(host: str, local: bool) -> None:
    assert is_loopback(host) is local


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u@localhost,db.example.test/app?sslmode=require",
        "host=db.example.test dbname=app sslmode=prefer",
        "postgresql://u@/app?host=127.0.0.1,10.0.0.1&sslmode=allow",
        "service=elsewhere sslmode=disable",
    ],
)
def test_every_host_counts(url: str) -> None:
    assert transport_warning(source_settings(url)) is not None


# -- Qdrant


@pytest.fixture
def target(
    request: pytest.FixtureRequest, tmp_path: Path, authorities: Authorities
) -> Iterator[QdrantProcess]:
    """A server with the certificate that the test is parametrized with."""
    kind = request.param
    ours = authorities.ours
    pair: Pair | None = None
    if kind in ("good", "mutual"):
        pair = ours.server("127.0.0.1", "localhost")
    elif kind == "expired":
        pair = ours.server("127.0.0.1", expired=True)
    elif kind == "elsewhere":
        pair = ours.server("elsewhere.example.test")
    process = QdrantProcess(
        tmp_path / "qdrant",
        tls=None if pair is None else (pair.certificate, pair.key),
        ca_file=ours.file,
        client_ca=ours.file if kind == "mutual" else None,
    )
    try:
        yield process
    finally:
        process.close()


class Checks:
    """``cdc-sync check`` against a Qdrant server; the tables are of no interest."""

    def __init__(self, directory: Path, source: str) -> None:
        self._directory = directory
        self._source = source

    def __call__(self, url: str, **settings: object) -> tuple[int, Mapping[str, str]]:
        """Exit code, and the finding about qdrant."""
        config = write_config(
            self._directory / "check.toml",
            [{"name": "items"}],
            source={"url": self._source},
            qdrant={"url": url, "timeout_seconds": 10, **settings},
        )
        command = [sys.executable, "-m", "cdc_sync", "check", "--json", "--config", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.stderr == "", done.stderr
        findings = json.loads(done.stdout)["findings"]
        (found,) = [f for f in findings if f["subject"] == "qdrant"]
        assert "\n" not in found["message"]
        return done.returncode, found


@pytest.fixture
def check(server: PostgresServer, tmp_path: Path) -> Checks:
    return Checks(tmp_path, server.url())


def https(target: QdrantProcess, host: str = "127.0.0.1") -> str:
    return f"https://{host}:{target.url.rpartition(':')[2]}"


@pytest.mark.parametrize("target", ["good"], indirect=True)
def test_qdrant_with_its_authority(
    target: QdrantProcess, authorities: Authorities, check: Checks
) -> None:
    code, found = check(https(target), ca_file=str(authorities.ours.file))
    assert (code, found["severity"]) == (0, "ok")
    for wrong, why in (
        (authorities.other.file, "unable to get local issuer certificate"),
        (authorities.impostor.file, "certificate signature failure"),
        (None, "unable to get local issuer certificate"),
    ):
        code, found = check(https(target), **({"ca_file": str(wrong)} if wrong else {}))
        assert code == PERMISSION
        assert f"is refused: {why}" in found["message"]
        assert "qdrant.ca_file" in found["remedy"]
    code, found = check(https(target).replace("https", "http"))
    assert (code, found["kind"]) == (CONFIG, "config")
    assert "speaks TLS only" in found["message"]


@pytest.mark.parametrize("target", ["expired"], indirect=True)
def test_qdrant_with_an_expired_certificate(
    target: QdrantProcess, authorities: Authorities, check: Checks
) -> None:
    code, found = check(https(target), ca_file=str(authorities.ours.file))
    assert code == PERMISSION
    assert "certificate has expired" in found["message"]


@pytest.mark.parametrize("target", ["elsewhere"], indirect=True)
def test_qdrant_with_a_certificate_for_another_host(
    target: QdrantProcess, authorities: Authorities, check: Checks
) -> None:
    for host in ("127.0.0.1", "localhost"):
        code, found = check(https(target, host), ca_file=str(authorities.ours.file))
        assert code == PERMISSION
        assert "is for another host" in found["message"]


@pytest.mark.parametrize("target", ["plain"], indirect=True)
def test_qdrant_without_tls(target: QdrantProcess, authorities: Authorities, check: Checks) -> None:
    for settings in ({}, {"ca_file": str(authorities.ours.file)}):
        code, found = check(https(target), **settings)
        assert (code, found["kind"]) == (CONFIG, "config")
        assert "does not speak TLS" in found["message"]
        assert "http://" in found["remedy"]
    code, found = check(target.url, ca_file=str(authorities.ours.file))
    assert code == CONFIG
    assert "qdrant.url says http" in found["message"]


@pytest.mark.parametrize("target", ["mutual"], indirect=True)
def test_qdrant_demands_a_client_certificate(
    target: QdrantProcess, authorities: Authorities, check: Checks
) -> None:
    trust = {"ca_file": str(authorities.ours.file)}

    def files(pair: Pair) -> dict[str, str]:
        return {"client_cert_file": str(pair.certificate), "client_key_file": str(pair.key)}

    own = authorities.ours.client("courier")
    code, found = check(https(target), **trust, **files(own))
    assert (code, found["severity"]) == (0, "ok")
    # A gRPC server in C hangs up on the others without a word.
    code, found = check(https(target), **trust)
    assert code == UNAVAILABLE
    assert "hangs up, as it would if it demanded a client certificate" in found["message"]
    assert "qdrant.client_cert_file" in found["remedy"]
    code, found = check(https(target), **trust, **files(authorities.other.client("courier")))
    assert code == UNAVAILABLE
    assert "if it did not accept the client certificate" in found["message"]
    crossed = {**files(own), "client_key_file": str(authorities.ours.client("x").key)}
    code, found = check(https(target), **trust, **crossed)
    assert code == CONFIG
    assert "is not the key of" in found["message"]


@contextlib.contextmanager
def demanding(authorities: Authorities) -> Iterator[int]:
    """The port of a server that refuses clients by an alert, as Qdrant does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    pair = authorities.ours.server("127.0.0.1")
    context.load_cert_chain(pair.certificate, pair.key)
    context.load_verify_locations(authorities.ours.file)
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    accepted, _ = listener.accept()
                    with accepted, contextlib.suppress(ssl.SSLError, OSError):
                        context.wrap_socket(accepted, server_side=True).close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_qdrant_says_that_it_demands_a_client_certificate(
    authorities: Authorities, check: Checks
) -> None:
    other = authorities.other.client("courier")
    files = {"client_cert_file": str(other.certificate), "client_key_file": str(other.key)}
    with demanding(authorities) as port:
        url, trust = f"https://127.0.0.1:{port}", {"ca_file": str(authorities.ours.file)}
        code, found = check(url, **trust)
        assert (code, found["kind"]) == (PERMISSION, "sink_auth")
        assert "demands a client certificate" in found["message"]
        code, found = check(url, **trust, **files)
        assert (code, found["kind"]) == (PERMISSION, "sink_auth")
        assert "does not accept the client certificate" in found["message"]


def test_plain_text_to_elsewhere_is_said() -> None:
    def warning(url: str, **settings: object) -> str | None:
        return qdrant_warning(QdrantSettings.model_validate({"url": url, **settings}))

    assert warning("http://localhost:6334") is None
    assert warning("http://[::1]:6334", api_key="key") is None
    assert warning("https://qdrant:6334", api_key="key") is None
    assert warning("edge:/tmp/x") is None
    assert "API key" in (warning("http://qdrant:6334", api_key="key") or "")
    assert "API key" not in (warning("http://qdrant:6334") or "API key")


# -- all of it


@pytest.mark.parametrize("target", ["mutual"], indirect=True)
def test_a_pipeline_with_certificates_everywhere(
    server: PostgresServer, target: QdrantProcess, authorities: Authorities, tmp_path: Path
) -> None:
    """Copy by worker processes, stream, and a restart, both sides verified and verifying."""
    ours = authorities.ours
    use_tls(server, ours.server(HOST), client_ca=ours.file)
    courier = ours.client("courier")
    client = {"client_cert_file": str(courier.certificate), "client_key_file": str(courier.key)}
    trust = {"ca_file": str(ours.file), **client}
    daemon = Daemon(
        tmp_path,
        pg_url=re.sub(r"//[^@]*@", "//courier@", away(server)),
        qdrant_url=target.url,
        tables=[{"name": "items", "collection": "items"}],
        slot="certified",
        source=trust,
        qdrant=trust,
    )
    with daemon:
        daemon.start()
        with psycopg.connect(
            f"host={server.socket_directory} port={server.port} user=postgres"
        ) as c:
            c.execute("UPDATE items SET title = 'changed' WHERE id = 7")
            c.execute("DELETE FROM items WHERE id = 8")
        daemon.wait(lambda: daemon.metric("cdc_sync_changes_total") >= 2, "the changes")
        assert daemon.metric("cdc_sync_snapshot_rows_total") == 50
        assert daemon.terminate() == 0
        assert not [e for e in daemon.events() if e.get("event") == "connection_unprotected"]
