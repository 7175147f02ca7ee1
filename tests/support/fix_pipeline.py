"""Fixtures that put a daemon between a test's database and a target, and compare both at the
end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.daemon import Daemon
from tests.support.fix_postgres import Database
from tests.support.least_privilege import least_privileged
from tests.support.oracle import Difference, compare
from tests.support.qdrant_control import QdrantTarget

_numbers = itertools.count(1)


@dataclass
class Synced:
    """A table, the collection it becomes, and the daemon between them."""

    database: Database
    table: str
    collection: str
    daemon: Daemon
    qdrant_url: str
    qdrant: QdrantTarget | None
    compare_options: Mapping[str, object] = field(default_factory=dict)

    def execute(self, query: str, parameters: Sequence[object] = ()) -> list[tuple[object, ...]]:
        return self.database.execute(query, parameters)

    def differences(self) -> list[Difference]:
        """Compare once the daemon has caught up. An embedded database is locked, so there the
        daemon is stopped first."""
        if self.daemon.running:
            self.daemon.wait_caught_up()
        if self.qdrant is None and self.daemon.running:
            assert self.daemon.terminate() == 0
        return compare(
            self.database.url,
            self.table,
            qdrant_url=self.qdrant_url,
            collection=self.collection,
            api_key=self.qdrant.api_key if self.qdrant is not None else None,
            **self.compare_options,  # type: ignore[arg-type]
        )

    def assert_equal(self) -> None:
        differences = self.differences()
        assert not differences, "\n".join(str(d) for d in differences[:20])
        if self.qdrant is not None:
            assert self.qdrant.violations() == []


SyncTable = Callable[..., Synced]


@pytest.fixture
def sync_table(tmp_path: Path, qdrant: QdrantTarget) -> Iterator[SyncTable]:
    """Make a daemon for a table: ``sync_table(database, "docs", target="server"|"edge", ...)``.

    It connects as a role with the least rights, made for this table, unless ``superuser`` or
    ``pg_url`` say otherwise: the superuser then makes the publication by itself. There is no
    such role for a table that cannot be planned.

    ``start=False`` leaves starting to the test. Other keywords go to the table's configuration;
    ``pipeline``, ``migration``, ``qdrant`` and ``pg_url`` to the daemon's.
    """
    # Asked for here, so that daemons end before what they have made is removed.
    shared = qdrant
    with ExitStack() as stack:

        def make(
            database: Database,
            table: str,
            *,
            target: str = "server",
            start: bool = True,
            qdrant: QdrantTarget | None = None,
            collection: str | None = None,
            pg_url: str | None = None,
            qdrant_url: str | None = None,
            pipeline: Mapping[str, object] | None = None,
            migration: Mapping[str, object] | None = None,
            qdrant_settings: Mapping[str, object] | None = None,
            compare_options: Mapping[str, object] | None = None,
            superuser: bool = False,
            **table_settings: object,
        ) -> Synced:
            if target == "server" and qdrant is None:
                qdrant = shared
            slot = f"t{next(_numbers)}_{database.name}"[:60]
            if collection is None:
                collection = qdrant.new_collection_name() if qdrant is not None else "docs"
            url = qdrant.url if qdrant is not None else f"edge:{tmp_path / slot}"
            tables = [{"name": table, "collection": collection, **table_settings}]
            if pg_url is None and not superuser:
                pg_url = least_privileged(database, tables, publication=slot, pipeline=pipeline).url
            daemon = Daemon(
                tmp_path,
                pg_url=pg_url or database.url,
                qdrant_url=qdrant_url or url,
                api_key=qdrant.api_key if qdrant is not None else None,
                tables=tables,
                slot=slot,
                pipeline=pipeline,
                qdrant=qdrant_settings,
                migration=migration,
            )
            stack.callback(daemon.close)
            if start:
                daemon.start()
            return Synced(database, table, collection, daemon, url, qdrant, compare_options or {})

        yield make
