"""Credentials of gRPC channels, and what went wrong with TLS when a channel does not come about.

A channel to ``https`` is always verified, host name included; gRPC knows no way around it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

# gRPC writes of every failed handshake to stderr, between the lines of our log. Read when it is
# imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ConfigError, ErrorKind, SinkError
from cdc_sync.tls import (
    Greeting,
    check_authority,
    check_pair,
    greeting,
    is_loopback,
    system_authorities,
)

# As in "SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:CERTIFICATE_VERIFY_FAILED:
# certificate has expired: OK".
_SSL_ERROR: Final = re.compile(r"SSL_ERROR_SSL: error:[^:]*:[^:]*:[^:]*:([A-Z0-9_]+)(?:: ([^:]*))?")


def credentials(settings: QdrantSettings, *, secure: bool) -> grpc.ChannelCredentials | None:
    """Return the credentials of a channel: None for plain text, else TLS verified against
    ``qdrant.ca_file``, the system's authorities, or those gRPC brings along.

    Raises :class:`ConfigError` for files that cannot be used, or that are set without https.
    """
    certificate, key = settings.client_cert_file, settings.client_key_file
    if (certificate is None) != (key is None):
        raise ConfigError(
            "qdrant.client_cert_file and qdrant.client_key_file are not both set.",
            "A client certificate is no use without its key: set both.",
        )
    if not secure:
        if settings.ca_file is not None or certificate is not None:
            raise ConfigError(
                "qdrant.ca_file or qdrant.client_cert_file is set, but qdrant.url says http.",
                "Write https:// in qdrant.url, or remove those settings.",
            )
        return None
    roots = settings.ca_file or system_authorities()
    authorities = None if roots is None else check_authority("qdrant.ca_file", roots)
    if certificate is None or key is None:
        return grpc.ssl_channel_credentials(root_certificates=authorities)
    chain, private = check_pair("qdrant", certificate, key)
    return grpc.ssl_channel_credentials(authorities, private, chain)


def files_seen(settings: QdrantSettings) -> tuple[tuple[int, ...], ...]:
    """Return what changes when somebody renews the files that :func:`credentials` reads; of those
    that cannot be looked at, nothing."""
    named = (
        settings.ca_file or system_authorities(),
        settings.client_cert_file,
        settings.client_key_file,
    )
    seen = []
    for path in named:
        try:
            found = None if path is None else Path(path).stat()
        except (OSError, ValueError):
            found = None
        seen.append(
            () if found is None else (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
        )
    return tuple(seen)


def plain_text_warning(settings: QdrantSettings, host: str) -> str | None:
    """Return one sentence if a channel by http leaves this machine."""
    if is_loopback(host):
        return None
    key = " The API key is sent in clear, too." if settings.api_key is not None else ""
    return f"The connection to Qdrant is not encrypted (http).{key}"


def handshake_failure(details: str, target: str) -> SinkError | None:
    """Return the error of a failed TLS handshake by gRPC's text; None for all other failures."""
    if "Hostname Verification Check failed" in details:
        return SinkError(
            ErrorKind.SINK_AUTH,
            f"The certificate of {target} is for another host.",
            "Write a name that the certificate has into qdrant.url, or give the server a "
            "certificate with this one.",
        )
    found = _SSL_ERROR.search(details)
    if found is None:
        return None
    code, reason = found[1], found[2]
    if code in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "BAD_PACKET_LENGTH"):
        return SinkError(
            ErrorKind.CONFIG,
            f"{target} does not speak TLS.",
            "Turn on TLS in Qdrant (service.enable_tls). Or, if everybody on the network in "
            "between may read and change what is sent, write http:// in qdrant.url.",
        )
    return SinkError(
        ErrorKind.SINK_AUTH,
        f"The certificate of {target} is refused: {reason or code}.",
        "Name the authority that signed it in qdrant.ca_file, or renew the certificate.",
    )


def opening_failure(
    details: str, settings: QdrantSettings, host: str, port: int, *, secure: bool
) -> SinkError | None:
    """Return the error of a first connection that TLS has prevented; None if it was something
    else. Asks the server once more, where gRPC only knows that it hung up."""
    target = f"Qdrant at {host}:{port}"
    failed = handshake_failure(details, target)
    if failed is not None:
        return failed
    found = greeting(host.strip("[]"), port)
    if found is None or found is Greeting.PLAIN:
        return None
    if not secure:
        return SinkError(
            ErrorKind.CONFIG, f"{target} speaks TLS only.", "Write https:// in qdrant.url."
        )
    if found is Greeting.TLS:
        return None
    certain = found is Greeting.CERTIFICATE_DEMANDED
    kind = ErrorKind.SINK_AUTH if certain else ErrorKind.SINK_UNAVAILABLE
    if settings.client_cert_file is None:
        demands = "demands" if certain else "hangs up, as it would if it demanded"
        return SinkError(
            kind,
            f"{target} {demands} a client certificate.",
            "Set qdrant.client_cert_file and qdrant.client_key_file.",
        )
    refuses = "does not accept" if certain else "hangs up, as it would if it did not accept"
    return SinkError(
        kind,
        f"{target} {refuses} the client certificate.",
        "Its authority must be the one the server trusts (tls.ca_cert), and it must not have "
        "expired.",
    )
