"""Command lines written for Qdrant's own migration tool, ``qdrant-migration pg ...``.

Their flags are ours. What is different is told here: the word for the kind of source, flags that
mean nothing to us, connection strings as Go's driver reads them, and the default port of a URL.

Source: github.com/qdrant/migration, ``cmd/root.go``, ``cmd/migrate_from_pg.go``,
``pkg/commons/config.go``, and the flag parser it uses, github.com/alecthomas/kong.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import typer

from cdc_sync.cli.options import SwitchCommand

SOURCE: Final = "pg"

#: Connection parameters of libpq (PostgreSQL documentation, "Parameter Key Words"); whatever else
#: Go's driver finds in a URL it sends to the server as a setting.
_LIBPQ: Final = frozenset(
    {
        "application_name",
        "channel_binding",
        "client_encoding",
        "connect_timeout",
        "dbname",
        "fallback_application_name",
        "gssdelegation",
        "gssencmode",
        "gsslib",
        "host",
        "hostaddr",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "krbsrvname",
        "load_balance_hosts",
        "max_protocol_version",
        "min_protocol_version",
        "oauth_client_id",
        "oauth_client_secret",
        "oauth_issuer",
        "oauth_scope",
        "options",
        "passfile",
        "password",
        "port",
        "replication",
        "require_auth",
        "requirepeer",
        "scram_client_key",
        "scram_server_key",
        "service",
        "servicefile",
        "ssl_max_protocol_version",
        "ssl_min_protocol_version",
        "sslcert",
        "sslcertmode",
        "sslcompression",
        "sslcrl",
        "sslcrldir",
        "sslkey",
        "sslkeylogfile",
        "sslmode",
        "sslnegotiation",
        "sslpassword",
        "sslrootcert",
        "sslsni",
        "target_session_attrs",
        "tcp_user_timeout",
        "user",
    }
)
#: Parameters that concern nothing but Go's driver.
_DRIVER: Final = re.compile(
    r"pool_\w+|default_query_exec_mode|(statement|description)_cache_capacity"
    r"|statement_cache_mode|prefer_simple_protocol|min_read_buffer_size"
)
_SETTING: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.$]*")


class MigrateCommand(SwitchCommand):
    """The command ``migrate``; after the word ``pg`` URLs are read as Qdrant's tool reads them."""

    # Typer knows its own context type by a private name only.
    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the arguments."""
        rest = super().parse_args(ctx, args)
        source = ctx.params.get("source")
        if source is not None and source != SOURCE:
            raise typer.BadParameter(
                f"{source!r} is no source; the only one is {SOURCE}, which can be left out.",
                ctx=ctx,
            )
        if source == SOURCE:
            _read_as_that_tool(ctx.params)
        if isinstance(url := ctx.params.get("pg_url"), str):
            ctx.params["pg_url"] = libpq_url(url)
        return rest


def _read_as_that_tool(params: MutableMapping[str, object]) -> None:
    if isinstance(url := params.get("qdrant_url"), str):
        params["qdrant_url"], port = with_port(url)
        if port is not None:
            note(
                f"--qdrant.url names no port: {port}, as qdrant-migration has it "
                "(without the word pg it would be 6334)."
            )
    if params.get("qdrant_collection") is None:
        note("--qdrant.collection is not given: the table's name is used.")


def note(text: str) -> None:
    """Say something about the command line, on stderr."""
    typer.echo(f"note: {text}", err=True)


def with_port(url: str) -> tuple[str, int | None]:
    """The URL of Qdrant with the port that its tool assumes where there is none, and that port."""
    try:
        parts = urlsplit(url)
        assumed = {"http": 80, "https": 443}.get(parts.scheme)
        if assumed is None or not parts.hostname or parts.port is not None:
            return url, None
    except ValueError:
        return url, None  # not a URL: the settings say so
    return urlunsplit(parts._replace(netloc=f"{parts.netloc.rstrip(':')}:{assumed}")), assumed


def libpq_url(url: str) -> str:
    """A connection URL as Go's driver takes it, in libpq's form.

    Server settings among the parameters (``?search_path=app``) move into ``options``; parameters of
    the driver itself are dropped. Anything else is returned as it is.
    """
    if not url.startswith(("postgres://", "postgresql://")):
        return url
    # Not urlsplit: passwords with unescaped characters are for libpq to judge.
    base, mark, query = url.rpartition("?")
    if not mark or "@" in query:
        return url
    parameters = parse_qsl(query, keep_blank_values=True)
    foreign = [(name, value) for name, value in parameters if name not in _LIBPQ]
    if not foreign or not all(_SETTING.fullmatch(name) for name, _ in foreign):
        return url
    kept = [(name, value) for name, value in parameters if name in _LIBPQ and name != "options"]
    options = [value for name, value in parameters if name == "options"]
    options += [_option(name, value) for name, value in foreign if not _DRIVER.fullmatch(name)]
    if options:
        kept.append(("options", " ".join(options)))
    return f"{base}?{urlencode(kept, quote_via=quote)}" if kept else base


def _option(name: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace(" ", "\\ ")
    return f"-c {name}={escaped}"
