"""TLS of connections to Postgres: ``verify-full`` unless something else was asked for by name.

libpq's own default (``prefer``) encrypts where the server happens to offer it and verifies nothing,
so whoever is in between reads everything. It stays the default to this machine itself only.

Source: PostgreSQL documentation, "libpq", SSL Support.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cdc_sync.config import SourceSettings
from cdc_sync.errors import ConfigError, ErrorKind, SourceError
from cdc_sync.tls import (
    check_authority,
    is_loopback,
    read_pem,
    system_authorities,
    verification_failure,
)

#: Our setting -> libpq's keyword, and its environment variable.
_FILES: Final = {
    "ca_file": ("sslrootcert", "PGSSLROOTCERT"),
    "client_cert_file": ("sslcert", "PGSSLCERT"),
    "client_key_file": ("sslkey", "PGSSLKEY"),
}
_VERIFIED: Final = ("verify-ca", "verify-full")
_OPT_OUT: Final = (
    "Turn on ssl in Postgres. Or, if everybody on the network in between may read and change what"
    " is sent, set source.sslmode = disable (or add sslmode=disable to source.url)."
)


def secure(source: SourceSettings, parameters: dict[str, Any]) -> None:
    """Lay the settings of TLS over the parameters of a connection, in place.

    Raises :class:`ConfigError` for settings that contradict the URL, files that cannot be read, and
    a client certificate without its key.
    """
    for setting, (keyword, _) in _FILES.items():
        path = getattr(source, setting)
        if path is not None:
            _set(parameters, keyword, path, f"source.{setting}")
    if (source.client_cert_file is None) != (source.client_key_file is None):
        raise ConfigError(
            "source.client_cert_file and source.client_key_file are not both set.",
            "A client certificate is no use without its key: set both.",
        )
    if source.ca_file is not None:
        check_authority("source.ca_file", source.ca_file)
    for setting in ("client_cert_file", "client_key_file"):
        if (path := getattr(source, setting)) is not None:
            read_pem(f"source.{setting}", path)
    if source.sslmode is not None:
        _set(parameters, "sslmode", source.sslmode, "source.sslmode")
    mode = parameters.get("sslmode") or os.environ.get("PGSSLMODE")
    if mode is None and not (_stays_here(parameters) and not _asks_for_tls(source, parameters)):
        mode = parameters["sslmode"] = "verify-full"
    if mode == "verify-full" and not _has_root(parameters):
        authorities = system_authorities()
        if authorities is not None:
            parameters["sslrootcert"] = authorities


def _set(parameters: dict[str, Any], keyword: str, value: str, setting: str) -> None:
    if parameters.get(keyword, value) != value:
        raise ConfigError(
            f"{setting} contradicts {keyword} in source.url.", "Remove one of the two."
        )
    parameters[keyword] = value


def _asks_for_tls(source: SourceSettings, parameters: Mapping[str, Any]) -> bool:
    return any(getattr(source, setting) for setting in _FILES) or any(
        parameters.get(keyword) for keyword, _ in _FILES.values()
    )


def _has_root(parameters: Mapping[str, Any]) -> bool:
    if parameters.get("sslrootcert") or os.environ.get("PGSSLROOTCERT"):
        return True
    try:
        return (Path.home() / ".postgresql" / "root.crt").exists()
    except (RuntimeError, OSError):  # without a home, or one that is closed to us
        return False


def _hosts(parameters: Mapping[str, Any]) -> list[str]:
    """The hosts whose names are verified, one for each place libpq will try; none: a socket."""
    named = parameters.get("host") or os.environ.get("PGHOST")
    named = named or parameters.get("hostaddr") or os.environ.get("PGHOSTADDR") or ""
    return [host for host in str(named).split(",") if host]


def _stays_here(parameters: Mapping[str, Any]) -> bool:
    """Whether the connection leads to this machine only. What a service file says is not known."""
    if parameters.get("service") or os.environ.get("PGSERVICE"):
        return False
    return all(map(is_loopback, _hosts(parameters)))


def unverified(parameters: Mapping[str, Any]) -> str | None:
    """Return one sentence if the connection leaves this machine without the server's identity being
    verified; ``parameters`` are what :func:`secure` has made."""
    mode = str(parameters.get("sslmode") or os.environ.get("PGSSLMODE") or "prefer")
    if mode in _VERIFIED or _stays_here(parameters):
        return None
    if mode == "disable":
        return "The connection to Postgres is not encrypted (sslmode=disable)."
    return (
        f"Postgres is not verified (sslmode={mode}): whoever is in between can read and change"
        " what is sent; sslmode=verify-full prevents that."
    )


def refused_tls(text: str, where: str, parameters: Mapping[str, Any]) -> SourceError | None:
    """Return the error for a connection that failed over TLS, None if it failed over something
    else. ``text`` is libpq's; ``where`` the address."""
    authority = (
        "Name the authority that signed the server's certificate in source.ca_file, or renew the"
        " certificate."
    )
    if "does not support SSL" in text:
        return SourceError(
            ErrorKind.CONFIG, f"Postgres at {where} does not offer TLS (ssl is off)", _OPT_OUT
        )
    if "SSL error: " in text and "alert" not in text:
        # What libpq calls it depends on its OpenSSL; what is wrong, it does not say.
        reason = _reason(parameters)
        if reason is None and "certificate verify failed" in text:
            reason = "it was not signed by a trusted authority, or has expired"
        if reason is None:
            return None
        return _refusal(f"the certificate of Postgres at {where} is refused: {reason}", authority)
    if "does not match host name" in text:
        return _refusal(
            f"the certificate of Postgres at {where} is for another host",
            "Connect by the name in the certificate (with hostaddr=… in source.url if it does not"
            " resolve), or give the server a certificate with this one.",
        )
    if "root certificate file" in text:
        return SourceError(
            ErrorKind.CONFIG,
            f"no certificate authority to verify Postgres at {where} against could be read",
            "Name its file in source.ca_file; the system's authorities come with the package"
            " ca-certificates.",
        )
    if "private key file" in text or "could not load" in text:
        return SourceError(
            ErrorKind.CONFIG,
            "the key of the client certificate cannot be used: it is missing, does not fit the"
            " certificate, needs sslpassword, or others than its owner may read it",
            "chmod 600 source.client_key_file, and see that it belongs to client_cert_file.",
        )
    if "alert certificate required" in text or "valid client certificate" in text:
        return _refusal(
            f"Postgres at {where} demands a client certificate",
            "Set source.client_cert_file and source.client_key_file.",
        )
    if "alert unknown ca" in text or "certificate authentication failed" in text:
        return _refusal(
            f"Postgres at {where} does not accept the client certificate for this user",
            "Its authority must be in the server's ssl_ca_file, and its common name be the role's"
            " (or be mapped to it in pg_ident.conf).",
        )
    return None


def _refusal(message: str, remedy: str) -> SourceError:
    return SourceError(ErrorKind.SOURCE_AUTH, message, remedy)


def _reason(parameters: Mapping[str, Any]) -> str | None:
    """Ask the server for its certificate again: libpq does not say what is wrong with it."""
    hosts = _hosts(parameters)
    port = str(parameters.get("port") or os.environ.get("PGPORT") or "5432")
    root = parameters.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")
    if len(hosts) != 1 or hosts[0].startswith(("/", "@")) or not port.isdecimal():
        return None
    address = str(parameters.get("hostaddr") or hosts[0])
    return verification_failure(address, int(port), root and str(root), postgres=True)
