"""TLS on both sides: which authorities are trusted, which hosts need none, and why a certificate
was refused.

libpq and gRPC verify certificates themselves; the probes here only ask a server once more for a
reason that those leave out.
"""

from __future__ import annotations

import enum
import ipaddress
import socket
import ssl
import struct
from pathlib import Path
from typing import Final

from cdc_sync.errors import ConfigError

#: Bundles of the system's authorities where Python's own OpenSSL may not look for them.
_BUNDLES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
#: PostgreSQL documentation, "Message Formats", SSLRequest.
_SSL_REQUEST: Final = struct.pack("!ii", 8, 80877103)
_PROBE_SECONDS: Final = 5.0


def system_authorities() -> str | None:
    """Return the file with the system's certificate authorities, if there is one.

    The environment variable ``SSL_CERT_FILE`` names another.
    """
    default = ssl.get_default_verify_paths().cafile
    return default or next((path for path in _BUNDLES if Path(path).is_file()), None)


def is_loopback(host: str) -> bool:
    """Whether a host name, address or directory of a Unix socket leads to this machine."""
    if host.startswith(("/", "@")) or host.lower().rstrip(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def read_pem(setting: str, path: str) -> bytes:
    """Read a PEM file. Raises :class:`ConfigError` that names the setting."""
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "this is no path"
        raise ConfigError(
            f"{setting} {path} cannot be read: {reason}.", "Name a readable PEM file."
        ) from None
    if b"-----BEGIN " not in content:
        raise ConfigError(
            f"{setting} {path} is no PEM file.", "Name a file with -----BEGIN … lines."
        )
    return content


def check_authority(setting: str, path: str) -> bytes:
    """Read a file of certificate authorities. Raises :class:`ConfigError` that names the setting,
    also for one without a certificate."""
    content = read_pem(setting, path)
    try:
        ssl.create_default_context(cadata=content.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(
            f"{setting} {path} holds no certificate that can be read.",
            "Name the PEM file of the authority's certificate.",
        ) from None
    return content


def check_pair(section: str, certificate: str, key: str) -> tuple[bytes, bytes]:
    """Read a client certificate and its key. Raises :class:`ConfigError` for files that cannot be
    read or do not belong together, and for a key with a passphrase."""
    pems = (
        read_pem(f"{section}.client_cert_file", certificate),
        read_pem(f"{section}.client_key_file", key),
    )
    try:
        # Without a passphrase given OpenSSL would ask for it on the terminal.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError):
        raise ConfigError(
            f"{section}.client_key_file {key} is not the key of {section}.client_cert_file, or has"
            " a passphrase.",
            "Name a certificate and its own key without a passphrase, both as PEM.",
        ) from None
    return pems


def verification_failure(
    host: str, port: int, ca_file: str | None, *, postgres: bool
) -> str | None:
    """Return why the certificate that a server shows is not trusted, in OpenSSL's words; None when
    it is, or when the server does not answer.

    The host name is not compared. ``ca_file`` None: the system's authorities.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
        context.check_hostname = False
        # Python 3.13 asks more of certificates than libpq and gRPC do.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        with socket.create_connection((host, port), _PROBE_SECONDS) as plain:
            if postgres:
                plain.sendall(_SSL_REQUEST)
                if plain.recv(1) != b"S":
                    return None
            with context.wrap_socket(plain, server_hostname=host):
                return None
    except ssl.SSLCertVerificationError as exc:
        return str(exc.verify_message)
    except (OSError, ValueError):
        return None


class Greeting(enum.Enum):
    """What a gRPC server makes of a handshake without a client certificate."""

    PLAIN = "plain"  #: it does not speak TLS
    TLS = "tls"
    CERTIFICATE_DEMANDED = "certificate demanded"
    HUNG_UP = "hung up"  #: after the handshake: gRPC's own servers refuse certificates that way


def greeting(host: str, port: int) -> Greeting | None:
    """Ask a gRPC server whether it speaks TLS; None when it does not answer. Nothing else is sent
    to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), _PROBE_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as encrypted,
        ):
            # TLS 1.3 refuses a client without a certificate only after the handshake. A server of
            # HTTP/2 begins with its settings.
            if not encrypted.recv(1):
                return Greeting.HUNG_UP
    except TimeoutError:
        return None
    except ssl.SSLError as exc:
        text = f"{exc.reason} {exc}".lower().replace("_", " ")
        if "certificate required" in text or "handshake failure" in text:
            return Greeting.CERTIFICATE_DEMANDED
        return Greeting.TLS if "alert" in text else Greeting.PLAIN
    except (OSError, ValueError):
        return None
    return Greeting.TLS
