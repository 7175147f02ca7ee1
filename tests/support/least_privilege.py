"""The role that pipelines of tests connect as: made by the script that ``cdc-sync check --sql``
prints, and by nothing else.

Set-up, changes of rows and the comparison at the end go on as the superuser: they play the
application and its administrator.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from psycopg import sql

from cdc_sync.config import Settings
from cdc_sync.sync.check import role_sql
from tests.support.fix_postgres import CdcRole, Database

_numbers = itertools.count(1)


def least_privileged(
    database: Database,
    tables: Sequence[Mapping[str, object]],
    *,
    publication: str = "cdc_sync",
    pipeline: Mapping[str, object] | None = None,
    name: str | None = None,
) -> CdcRole:
    """Run the script for these tables as the superuser; it makes the publication, too.

    PUBLIC loses CONNECT on the database, so that the grant is proved.
    """
    name = name or f"least_{next(_numbers)}_{secrets.token_hex(3)}"
    settings = Settings.model_validate(
        {
            "source": {"url": database.url, "publication": publication},
            "tables": [dict(table) for table in tables],
            "pipeline": dict(pipeline or {}),
        }
    )
    script = role_sql(settings, name)
    password = secrets.token_urlsafe(12)
    with database.connect() as connection:
        place = sql.Identifier(database.name)
        connection.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(place))
        database.drop_later(name)
        connection.execute(script.encode())
        connection.execute(
            sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(name), password)
        )
    return CdcRole(name, database.server.url(database.name, name, password))


def through(role: CdcRole, address: str) -> str:
    """The role's URL by way of another ``host:port``."""
    parts = urlsplit(role.url)
    credentials, _, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{credentials}@{address}").geturl()
