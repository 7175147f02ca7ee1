"""Connections to Postgres with pinned session settings, and psycopg's errors turned into ours.

Roles and databases may carry settings of their own (``ALTER ROLE … SET``). Some change the text of
values, some end a long copy, one hides the warning that a publication is gone; so every setting
that matters is pinned here.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import psycopg
from psycopg import conninfo, pq
from psycopg.rows import TupleRow
from pydantic import SecretStr

from cdc_sync.config import SourceSettings
from cdc_sync.credentials import SecretFile
from cdc_sync.errors import CdcSyncError, ConfigError, ErrorKind, SourceError, policy
from cdc_sync.postgres.sslmode import refused_tls, secure, unverified

PgConnection: TypeAlias = psycopg.Connection[TupleRow]

#: Settings sent in the start-up packet, so that they hold before the first command (R6). All exist
#: since Postgres 9.5.
_PINNED: Final = {
    "datestyle": "ISO",
    "timezone": "UTC",
    "intervalstyle": "iso_8601",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "row_security": "off",
    "standard_conforming_strings": "on",
    # pgoutput of Postgres 18 says by a WARNING only that it skips a publication; the role must not
    # be able to hide it.
    "client_min_messages": "warning",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}
#: Timeouts that only some versions know: an unknown setting in the start-up packet would refuse the
#: connection.
_PINNED_SINCE: Final = {"idle_session_timeout": 140000, "transaction_timeout": 170000}

_POOLER_REMEDY: Final = (
    "Connect to Postgres itself: this looks like a connection pooler. PgBouncer carries replication"
    " from 1.23 on (with ignore_startup_parameters = options); Supavisor and older versions do not."
)

_AT_IN_PATH: Final = re.compile(r"postgres(?:ql)?://[^/?]*/[^?]*@", re.IGNORECASE)

#: Texts of a refused connection, which has no SQLSTATE in libpq; first match wins. Servers may not
#: speak English: what is not recognised counts as unavailable and is tried again.
_REFUSALS: Final[tuple[tuple[str, ErrorKind, str | None], ...]] = (
    (
        (
            "unsupported startup parameter|replication connections? (is|are) not|no such database"
            "|pgbouncer|supavisor|tenant or user not found|pooler"
        ),
        ErrorKind.CONFIG,
        _POOLER_REMEDY,
    ),
    (
        (
            'authentication failed|pg_hba.conf|no password supplied|role ".*" does not exist'
            "|not permitted to log in|certificate|SASL|SCRAM"
        ),
        ErrorKind.SOURCE_AUTH,
        None,
    ),
    (
        "must be superuser|permission denied|REPLICATION attribute|replication role",
        ErrorKind.SOURCE_PERMISSION,
        (
            "As a superuser: GRANT CONNECT ON DATABASE … TO …; and for replication connections"
            " ALTER ROLE … REPLICATION;"
        ),
    ),
    (
        'database ".*" does not exist',
        ErrorKind.CONFIG,
        "Correct the database name in source.url.",
    ),
    (
        "unrecognized configuration parameter|invalid value for parameter",
        ErrorKind.CONFIG,
        "Correct the options in source.url; cdc_sync needs Postgres 14 or later.",
    ),
    (
        "exceeds max_wal_senders",
        ErrorKind.SOURCE_SETTING,
        "ALTER SYSTEM SET max_wal_senders = 20; then restart Postgres.",
    ),
)


#: Where libpq's texts name a host, which may be called like one of the reasons above.
_HOST_NAMES: Final = re.compile(r'(server at|host name|host address) "[^"]*"')

#: How long a question may take that the server answers at once.
PATIENCE_SECONDS: Final = 60.0

#: How long a server is not asked again that has refused the same credentials: many count failed
#: logins, and some lock the role.
_REFUSED_SECONDS: Final = 10.0
#: What the server has said itself, in whatever language, stands behind its severity and two spaces.
_SPOKEN: Final = re.compile(r" failed: [^\s:]+:  ")


#: What may differ in a connection string that is read again.
_ROLE: Final = frozenset({"user", "password"})


class LoginRefusedError(SourceError):
    """Postgres refuses credentials that it took before: it is tried again until the new ones are in
    their file, or the time for that is over. Its kind is SOURCE_UNAVAILABLE."""

    def __init__(self, message: str, remedy: str | None = None) -> None:
        super().__init__(ErrorKind.SOURCE_UNAVAILABLE, message, remedy)

    def __reduce__(self) -> tuple[type[CdcSyncError], tuple[str, str]]:  # type: ignore[override]
        return (type(self), (self.message, self.remedy))


def connect(
    source: SourceSettings,
    *,
    application_name: str = "cdc_sync",
    replication: bool = False,
    autocommit: bool = True,
    standby: bool = False,
) -> PgConnection:
    """Open a connection with all session settings pinned (R6, R53) and an empty ``search_path``.

    The empty search path makes every name in our SQL, and in the SQL Postgres prints, mean one
    thing only; :func:`cdc_sync.postgres.catalog.find_table` looks names up in the role's own path.
    A replication connection speaks the simple query protocol only (no parameters). A standby is
    refused, as a server that is not there yet, unless the URL asks for one, or ``standby`` takes
    one where the URL names a single server. A password from a file is read again when the server
    refuses it. Raises :class:`ConfigError` for a malformed URL, :class:`LoginRefusedError`, and
    :class:`SourceError` for everything else.
    """

    def parameters_of(wanted: SourceSettings) -> dict[str, Any]:
        return _parameters(wanted, application_name, standby=standby, replication=replication)

    connection = _log_in(source, parameters_of, autocommit=autocommit)
    with closed_on_error(connection), answering(connection, source.connect_timeout_seconds):
        _pin_session(connection)
    # Statements prepared behind our back would outlive DDL and fail after it.
    connection.prepare_threshold = None
    return connection


def _log_in(
    source: SourceSettings,
    parameters_of: Callable[[SourceSettings], dict[str, Any]],
    *,
    autocommit: bool,
) -> PgConnection:
    """Connect with the credentials in force, or else with what their files hold now, which is then
    in force: where a file is replaced before the server is changed, the old ones go on."""
    parameters = parameters_of(source)
    newer, state = _newer(source, parameters, parameters_of)
    ways = [parameters] if newer is None else [parameters, newer.parameters]
    tried = tuple(f"{way.get('user')} {way.get('password')}" for way in ways)
    login = source.login
    if (lately := login.refused_lately(tried, _REFUSED_SECONDS)) is not None:
        raise LoginRefusedError(*lately)
    failed: list[SourceError] = []
    for way in ways:
        try:
            connection = psycopg.connect(autocommit=autocommit, **way)
        except psycopg.Error as exc:
            error = _refused(exc, way)
            failed.append(error)
            if error.kind is not ErrorKind.SOURCE_AUTH and not _SPOKEN.search(str(exc)):
                break
            continue
        if newer is not None and way is newer.parameters:
            newer.take()
        login.accept()
        return connection
    for error in failed:
        if error.kind is not ErrorKind.SOURCE_AUTH:
            raise error
    [error, *_] = failed
    # A certificate, or an address that pg_hba.conf does not name, is not the password's fault.
    by_itself = error.remedy != policy(error.kind).advice or "pg_hba.conf" in error.message
    secret = None if by_itself else _used(source, parameters)
    refusal = login.refuse(error.message, source.credentials_grace_seconds, secret, tried, state)
    if refusal.waits:
        raise LoginRefusedError(error.message + refusal.about, refusal.remedy or error.remedy)
    remedy = refusal.remedy or error.remedy
    raise SourceError(error.kind, error.message + refusal.about, remedy)


@dataclass(frozen=True, slots=True)
class _Newer:
    """What the files of credentials hold that differs from those in force."""

    secrets: tuple[tuple[SecretFile, str], ...]
    parameters: dict[str, Any]

    def take(self) -> None:
        for secret, value in self.secrets:
            secret.take(value)


def _newer(
    source: SourceSettings,
    parameters: Mapping[str, Any],
    parameters_of: Callable[[SourceSettings], dict[str, Any]],
) -> tuple[_Newer | None, str | None]:
    """What the files hold; and why that is of no use, where it is not."""
    found = {}
    for name, secret in (("url", source.url), ("password", source.password)):
        value = secret.look() if isinstance(secret, SecretFile) else None
        if isinstance(secret, SecretFile) and value not in (None, secret.get_secret_value()):
            found[name] = (secret, str(value))
    if not found:
        return None, None
    changed = {name: SecretStr(value) for name, (_, value) in found.items()}
    try:
        wanted = parameters_of(source.model_copy(update=changed))
    except ConfigError:
        return None, "what its file holds now is no connection string"
    if any(parameters.get(name) != wanted.get(name) for name in {*parameters, *wanted} - _ROLE):
        # Connections that are open would be to another server than those that are opened.
        return None, "what its file holds now leads elsewhere, which takes a new start"
    return _Newer(tuple(found.values()), wanted), None


def _used(source: SourceSettings, parameters: Mapping[str, Any]) -> SecretStr | None:
    """The secret that was used; None: what libpq reads with every connection."""
    if source.password is not None:
        return source.password
    if isinstance(source.url, SecretFile) or parameters.get("password"):
        return source.url
    return SecretStr("") if os.environ.get("PGPASSWORD") else None


def unchecked_text(connection: PgConnection, *, local: bool = False) -> str:
    """Return the command by which a server sends texts of a database without an encoding
    (SQL_ASCII) as they are; "" for other databases.

    It would refuse those that are not UTF-8, and with them the whole COPY or stream. psycopg must
    not see other texts than ASCII meanwhile: end it with :data:`CHECKED_TEXT`, or with the
    transaction (``local``).
    """
    if connection.pgconn.parameter_status(b"server_encoding") != b"SQL_ASCII":
        return ""
    return f"SET {'LOCAL ' if local else ''}client_encoding TO 'SQL_ASCII'"


#: Ends what :func:`unchecked_text` has begun.
CHECKED_TEXT: Final = "SET client_encoding TO 'UTF8'"


class _Closes(Protocol):
    def close(self) -> None: ...


@contextlib.contextmanager
def closed_on_error(connection: _Closes) -> Iterator[None]:
    """Close a connection that is being set up when that fails: nobody else would."""
    try:
        yield
    except BaseException:
        connection.close()
        raise


def _parameters(
    source: SourceSettings,
    application_name: str,
    *,
    standby: bool = False,
    replication: bool = False,
) -> dict[str, Any]:
    try:
        parameters = conninfo.conninfo_to_dict(source.url.get_secret_value())
    except psycopg.Error:
        # Not chained, and without libpq's text: it quotes parts of the URL, which may be parts of
        # the password.
        raise ConfigError(
            "source.url is neither a PostgreSQL URI nor a list of key=value",
            "Write postgresql://user:password@host:5432/database, and percent-encode special"
            " characters of the password.",
        ) from None
    url = source.url.get_secret_value()
    if "@" in str(parameters.get("host") or "") or _AT_IN_PATH.match(url):
        # Part of a password, most likely, and then what libpq took for host, port and database are
        # its other parts.
        raise ConfigError(
            "source.url has an @ in its host name or database name",
            "Percent-encode special characters of user and password: @ is %40, / is %2F, : is %3A.",
        )
    _set_password(source, parameters)
    secure(source, parameters)
    if replication:
        parameters["replication"] = "database"
    options = [str(parameters.get("options") or os.environ.get("PGOPTIONS", ""))]
    options += [f"-c {name}={value}" for name, value in _PINNED.items()]
    parameters.update(
        options=" ".join(options).strip(),
        application_name=application_name,
        client_encoding="UTF8",
        # libpq takes whole seconds and reads 1 as 2.
        connect_timeout=max(2, math.ceil(source.connect_timeout_seconds)),
    )
    # A host that vanishes without a word is noticed within about a minute, unless the URL says
    # otherwise. One that does not acknowledge our status reports may have given the slot to another
    # process after wal_sender_timeout, 60 s by default; we are to know before that.
    for name, value in (("idle", 20), ("interval", 10), ("count", 4)):
        parameters.setdefault(f"keepalives_{name}", value)
    parameters.setdefault("tcp_user_timeout", 30_000 if replication else 60_000)
    hosts = parameters.get("host") or parameters.get("hostaddr") or os.environ.get("PGHOST")
    if not os.environ.get("PGTARGETSESSIONATTRS") and ("," in str(hosts or "") or not standby):
        # Else a connection may lead to a standby while the others lead to the primary (R73). In the
        # middle of a failover a name or a virtual address does so too, with all of them.
        parameters.setdefault("target_session_attrs", "primary")
    return parameters


def _set_password(source: SourceSettings, parameters: dict[str, Any]) -> None:
    if source.password is None:
        return
    if parameters.get("password"):
        raise ConfigError(
            "source.password is set, and source.url has a password too.", "Remove one of the two."
        )
    parameters["password"] = source.password.get_secret_value()


def transport_warning(source: SourceSettings) -> str | None:
    """Return one sentence if connections leave this machine unverified, as was asked for. Raises
    :class:`ConfigError` for a malformed URL."""
    return unverified(_parameters(source, "cdc_sync"))


def _pin_session(connection: PgConnection) -> None:
    settings = [
        f"SET {name} = 0"
        for name, version in _PINNED_SINCE.items()
        if connection.info.server_version >= version
    ]
    settings.append("SELECT pg_catalog.set_config('search_path', '', false)")
    # Through libpq, since a connection without autocommit would open a transaction for it.
    result = connection.pgconn.exec_("; ".join(settings).encode())
    if result.status != pq.ExecStatus.TUPLES_OK:
        raise translate(result_error(connection, result), "setting up the session")


def interrupt(connection: PgConnection) -> None:
    """End whatever another thread waits for on the connection; it fails there as a lost one does.

    Closing it instead would free what that thread is using.
    """
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as held:
            held.shutdown(socket.SHUT_RDWR)
    except (OSError, psycopg.Error):
        pass  # It has just been closed.


@contextlib.contextmanager
def answering(connection: PgConnection, seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """Do something short, and :func:`interrupt` it if it takes longer.

    Behind a proxy or a firewall a connection may be open on our side only, which TCP does not
    notice while the proxy answers it: a question would then be waited on for ever.
    """
    timer = threading.Timer(seconds, interrupt, [connection])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def result_error(connection: PgConnection, result: pq.abc.PGresult) -> psycopg.Error:
    """Make the psycopg error of a failed libpq result."""
    encoding = connection.info.encoding
    sqlstate = result.error_field(pq.DiagnosticField.SQLSTATE)
    error_class: type[psycopg.Error] = psycopg.OperationalError
    if sqlstate:
        try:
            error_class = psycopg.errors.lookup(sqlstate.decode())
        except KeyError:
            error_class = psycopg.DatabaseError
    message = result.get_error_message(encoding) or connection.pgconn.get_error_message(encoding)
    return error_class(message, info=result, encoding=encoding)


def _refused(error: psycopg.Error, parameters: dict[str, Any]) -> SourceError:
    text = " ".join(str(error).split())
    where = _address(parameters)
    if (over_tls := refused_tls(text, where, parameters)) is not None:
        return over_tls
    # The server's own words, where it has spoken; libpq's prefix before them only repeats the
    # address.
    _, fatal, spoken = text.rpartition("FATAL: ")
    reason = spoken.strip() if fatal else text.rpartition(" failed: ")[2]
    said = _HOST_NAMES.sub("", text)
    for pattern, kind, remedy in _REFUSALS:
        if re.search(pattern, said, re.IGNORECASE):
            return SourceError(
                kind, f"Postgres at {where} refuses the connection: {reason}", remedy
            )
    if "hot standby mode" in said:
        return SourceError(
            ErrorKind.SOURCE_UNAVAILABLE,
            f"Postgres at {where} is a standby in recovery",
            "Let source.url lead to the primary. In the middle of a failover this passes by"
            " itself.",
        )
    return SourceError(
        ErrorKind.SOURCE_UNAVAILABLE, f"cannot connect to Postgres at {where}: {reason}"
    )


def _address(parameters: dict[str, Any]) -> str:
    host = parameters.get("host") or parameters.get("hostaddr") or os.environ.get("PGHOST")
    port = parameters.get("port") or os.environ.get("PGPORT") or "5432"
    database = parameters.get("dbname") or os.environ.get("PGDATABASE")
    return f"{host or 'the local socket'}:{port}" + (f", database {database}" if database else "")


#: SQLSTATE, or its class of two characters, to the kind of error. The longer one wins.
_KINDS: Final[dict[str, ErrorKind]] = {
    "08": ErrorKind.SOURCE_UNAVAILABLE,
    "0A": ErrorKind.PROTOCOL,
    "25006": ErrorKind.SOURCE_SETTING,
    "25P02": ErrorKind.SOURCE_UNAVAILABLE,
    "25P03": ErrorKind.SOURCE_UNAVAILABLE,
    "25P04": ErrorKind.SOURCE_UNAVAILABLE,
    "28": ErrorKind.SOURCE_AUTH,
    "3D": ErrorKind.CONFIG,
    "3F": ErrorKind.TABLE_UNUSABLE,
    "40": ErrorKind.SOURCE_UNAVAILABLE,
    "42501": ErrorKind.SOURCE_PERMISSION,
    "42P01": ErrorKind.TABLE_UNUSABLE,
    "42703": ErrorKind.TABLE_UNUSABLE,
    "42704": ErrorKind.TABLE_UNUSABLE,
    "42809": ErrorKind.TABLE_UNUSABLE,
    "53": ErrorKind.SOURCE_UNAVAILABLE,
    "53400": ErrorKind.SOURCE_SETTING,
    "55006": ErrorKind.SLOT_ACTIVE,
    "55P03": ErrorKind.TABLE_LOCKED,
    "57": ErrorKind.SOURCE_UNAVAILABLE,
    "58": ErrorKind.SOURCE_UNAVAILABLE,
}


def translate(error: psycopg.Error, doing: str) -> SourceError:
    """Turn a psycopg error into ours. ``doing`` completes "Postgres fails while …".

    The server's primary message is kept; its detail, and the whole message of data errors (class
    22, 23), are not, since they quote values.
    """
    sqlstate = error.sqlstate
    if sqlstate is None:
        if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
            reason = " ".join(str(error).split()) or "no reason given"
            return SourceError(
                ErrorKind.SOURCE_UNAVAILABLE,
                f"the connection to Postgres was lost while {doing}: {reason}",
            )
        return SourceError(
            ErrorKind.PROTOCOL, f"psycopg fails while {doing}: {type(error).__name__}"
        )
    kind = _KINDS.get(sqlstate) or _KINDS.get(sqlstate[:2]) or ErrorKind.PROTOCOL
    reason = error.diag.message_primary or "no reason given"
    if sqlstate[:2] in ("22", "23"):
        reason = "a value is refused"
    remedy = None
    if kind is ErrorKind.SOURCE_SETTING and sqlstate == "25006":
        remedy = "Connect to the primary: this server is a read-only standby."
    return SourceError(
        kind, f"Postgres fails while {doing}: {reason} (SQLSTATE {sqlstate})", remedy
    )


def pooler_suspected(doing: str) -> SourceError:
    """The error for a server that does not know replication commands (R66)."""
    return SourceError(
        ErrorKind.CONFIG,
        f"the server does not understand replication commands ({doing})",
        _POOLER_REMEDY,
    )


def set_lock_timeout(conn: PgConnection, seconds: float) -> None:
    """Let statements wait for locks, advisory ones too, for so long at the most."""
    try:
        conn.execute(f"SET lock_timeout = {max(1, round(seconds * 1000))}")
    except psycopg.Error as exc:
        raise translate(exc, "setting lock_timeout") from exc
