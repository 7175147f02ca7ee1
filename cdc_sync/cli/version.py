"""``cdc-sync version``."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from typing import Annotated

import typer

from cdc_sync import __version__


def version(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Print version, commit, and versions of what it runs on."""
    from cdc_sync.ops.revision import revision
    from cdc_sync.postgres.libpq import libpq_version

    versions = {
        "cdc-sync": __version__,
        "revision": revision(),
        "python": platform.python_version(),
        "psycopg": metadata.version("psycopg"),
        "libpq": libpq_version(),
        "qdrant-client": metadata.version("qdrant-client"),
        "qdrant-edge": _version_if_installed("qdrant-edge-py"),
    }
    if as_json:
        typer.echo(json.dumps(versions, indent=2))
    else:
        width = max(map(len, versions))
        for name, text in versions.items():
            typer.echo(f"{name:<{width}}  {text or 'not installed'}")
    return 0


def _version_if_installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
