"""Opens the sink that ``qdrant.url`` names."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ConfigError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant.channel import plain_text_warning
from cdc_sync.qdrant.collection_config import check_config
from cdc_sync.qdrant.server import ServerSink
from cdc_sync.qdrant.sink import DeadLetter, RequestObserver, Sink

_DEFAULT_PORT: Final = 6334
_FORMS: Final = "Write http://host:6334, https://host:6334, or edge:/path."


async def open_sink(settings: QdrantSettings, observer: RequestObserver | None = None) -> Sink:
    """Open ``http(s)://host[:port]`` (a server or cluster, gRPC port) or ``edge:/path`` (an
    embedded database). ``observer`` is told of the requests to a server.

    Raises :class:`ConfigError` for other URLs, a missing package or an outdated server, and
    :class:`SinkError` if the server does not answer, or another process has the embedded database
    open.
    """
    scheme, colon, rest = settings.url.partition(":")
    if colon and scheme == "edge":
        return await _open_edge(_edge_path(rest))
    if not colon or scheme not in ("http", "https"):
        # What stands there may be a key that was put into the wrong place: not shown.
        raise ConfigError("qdrant.url has no scheme that is known.", _FORMS)
    try:
        parts = urlsplit(settings.url)
        port = parts.port
    except ValueError:
        # Not chained: its text quotes what may be part of a password.
        raise ConfigError("qdrant.url is not a URL with a valid port.", _FORMS) from None
    if not parts.hostname:
        raise ConfigError("qdrant.url names no host.", _FORMS)
    if parts.username is not None or parts.password is not None:
        raise ConfigError("qdrant.url holds credentials.", "Set qdrant.api_key instead.")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(
            "qdrant.url has a path, which gRPC cannot have.", "Name host and gRPC port only."
        )
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return await ServerSink.open(
        settings,
        host,
        _DEFAULT_PORT if port is None else port,
        secure=scheme == "https",
        observer=observer,
    )


async def read_dead_letters(settings: QdrantSettings, pipeline: str) -> list[DeadLetter]:
    """A pipeline's dead letters, also while another process has the embedded database open. Errors
    as of :func:`open_sink`, and :class:`StateError`."""
    scheme, _, rest = settings.url.partition(":")
    if scheme == "edge" and importlib.util.find_spec("qdrant_edge") is not None:
        from cdc_sync.qdrant.file_state import read_dead_letters as read_file

        return read_file(_edge_path(rest), pipeline)
    sink = await open_sink(settings)
    try:
        return await sink.state.dead_letters(pipeline)
    finally:
        await sink.close()


def transport_warning(settings: QdrantSettings) -> str | None:
    """Return one sentence if requests leave this machine in clear, as ``http`` asks for."""
    try:
        parts = urlsplit(settings.url)
    except ValueError:
        return None
    if parts.scheme != "http" or not parts.hostname:
        return None
    return plain_text_warning(settings, parts.hostname)


def check_collection_config(settings: QdrantSettings, plan: TablePlan) -> None:
    """Check that the plan's collection can be made where ``qdrant.url`` leads, unseen.

    Raises :class:`ConfigError` naming the setting of ``collection_config`` that is unknown, has the
    wrong type, contradicts the table, or is not for an embedded database.
    """
    check_config(plan)
    if settings.url.startswith("edge:") and importlib.util.find_spec("qdrant_edge") is not None:
        from cdc_sync.qdrant.edge_config import edge_config

        edge_config(plan)


def edge_directory(settings: QdrantSettings) -> Path | None:
    """The directory of the embedded database; None for a server, and for a URL that names none."""
    scheme, colon, rest = settings.url.partition(":")
    if not colon or scheme != "edge" or not rest.removeprefix("//"):
        return None
    return _edge_path(rest)


def _edge_path(rest: str) -> Path:
    path = rest.removeprefix("//")
    if not path:
        raise ConfigError("qdrant.url edge: names no directory.", _FORMS)
    return Path(path).expanduser().absolute()


async def _open_edge(path: Path) -> Sink:
    if importlib.util.find_spec("qdrant_edge") is None:
        raise ConfigError(
            "qdrant.url asks for an embedded database, but Qdrant Edge is not installed.",
            "pip install 'cdc-sync[edge]'",
        )
    # Here and not above, since the package is optional.
    from cdc_sync.qdrant.edge import EdgeSink

    return await EdgeSink.open(path)
