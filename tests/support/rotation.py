"""Passwords and keys that are changed, on the server and in the file, one after the other."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from psycopg import conninfo, sql
from pydantic import SecretStr

from cdc_sync import credentials
from cdc_sync.config import Settings
from cdc_sync.credentials import SecretFile
from tests.support.fix_postgres import Database


@dataclass
class Heard:
    """What a :class:`~cdc_sync.credentials.Listener` was told."""

    read: list[str] = field(default_factory=list)
    refusals: list[tuple[str, str, float]] = field(default_factory=list)

    def read_again(self, secret: SecretFile) -> None:
        self.read.append(secret.setting)

    def refused(self, side: str, reason: str, seconds: float) -> None:
        self.refusals.append((side, reason, seconds))


@contextmanager
def listening() -> Iterator[Heard]:
    """Hear what becomes of credentials in this process."""
    heard = Heard()
    credentials.listen(heard)
    try:
        yield heard
    finally:
        credentials.listen(None)


@dataclass
class Password:
    """The password of a role with the least rights, and the file that holds it."""

    database: Database
    role: str
    url: str
    path: Path
    #: All there were.
    used: list[str]

    @classmethod
    def of(cls, database: Database, table: str, path: Path) -> Password:
        """Make the role, and its publication; write its first password into the file."""
        role = database.create_cdc_role([table])
        first = str(conninfo.conninfo_to_dict(role.url)["password"])
        path.write_text(first)
        url = database.server.url(database.name, role.name)
        return cls(database, role.name, url, path, [first])

    def settings(self, settings: Settings, *, grace_seconds: float = 600.0) -> Settings:
        """The settings with this role and file; its publication is made."""
        self.database.execute(
            f'CREATE PUBLICATION "{settings.source.publication}" FOR TABLE'
            f" {settings.tables[0].name} WITH (publish_via_partition_root = true)"
        )
        source = settings.source.model_copy(
            update={
                "url": SecretStr(self.url),
                "password": SecretFile(self.used[0], "source.password", self.path),
                "credentials_grace_seconds": grace_seconds,
            }
        )
        return settings.model_copy(update={"source": source})

    def new(self) -> str:
        """Make up another."""
        self.used.append(f"Wk7{secrets.token_urlsafe(12)}")
        return self.used[-1]

    def change_on_server(self, password: str) -> None:
        """From here on the server takes this one only."""
        with self.database.connect() as connection:
            statement = sql.SQL("ALTER ROLE {} PASSWORD {}")
            connection.execute(statement.format(sql.Identifier(self.role), password))

    def cut(self, *, slot_too: bool = False) -> int:
        """Cut the role's connections; that of the slot only if so. Returns how many."""
        kinds = ["client backend", "walsender"] if slot_too else ["client backend"]
        ((count,),) = self.database.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE usename = %s AND backend_type = ANY (%s)",
            (self.role, kinds),
        )
        assert isinstance(count, int)
        return count

    def slot_process(self, slot: str) -> int | None:
        """The walsender that reads the slot."""
        ((pid,),) = self.database.execute(
            "SELECT active_pid FROM pg_replication_slots WHERE slot_name = %s", (slot,)
        )
        assert pid is None or isinstance(pid, int)
        return pid


def says_nothing(
    secrets_used: Sequence[str], caplog: pytest.LogCaptureFixture, *others: object
) -> None:
    """Neither the log nor anything else that is given shows one of them."""
    text = "\n".join(
        [f"{r.getMessage()} {getattr(r, 'event_fields', '')}" for r in caplog.records]
        + [str(other) for other in others]
    )
    for secret in secrets_used:
        assert secret not in text
