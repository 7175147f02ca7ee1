"""Which libpq psycopg was built with or has found."""

from __future__ import annotations

from psycopg import pq


def libpq_version() -> str:
    """Version of the libpq in use, such as "18.1"."""
    number = pq.version()  # PQlibVersion: major * 10000 + minor
    return f"{number // 10000}.{number % 10000}"
