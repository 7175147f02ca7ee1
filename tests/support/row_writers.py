"""Writers that change rows of the table ``docs`` (:mod:`tests.support.windows`) in every way, while
it is copied."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import psycopg

from tests.support.fix_postgres import Database
from tests.support.windows import ROWS, vector


@dataclass
class RowWriters:
    """Threads that set random rows, their vectors too, one transaction a row."""

    database: Database
    threads: int
    settings: str = "SELECT 1"
    written: int = 0
    _stopping: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._run, args=(n,)) for n in range(self.threads)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            for thread in threads:
                thread.join()
        assert self.written > 10 * self.threads

    def _run(self, number: int) -> None:
        statements = (
            f"UPDATE docs SET n = {{n}}, emb = {vector('{n}')} WHERE id = {{id}}",
            "UPDATE docs SET note = '{n}' WHERE id = {id}",
            "DELETE FROM docs WHERE id = {id}",
            (
                f"INSERT INTO docs (id, n, emb) VALUES ({{id}}, {{n}}, {vector('{n}')})"
                " ON CONFLICT (id) DO UPDATE SET n = excluded.n"
            ),
            "UPDATE docs SET id = -id WHERE id = {id}",
        )
        with self.database.connect() as connection:
            connection.execute(self.settings.encode())
            for n in itertools.count(1):
                if self._stopping.wait(0.002):
                    return
                # Rows of the whole table, each of one writer.
                id_ = (n * 8 * 37 + number) % (ROWS - 8) + 8
                statement = statements[n % len(statements)].format(n=n, id=id_ - id_ % 8 + number)
                with contextlib.suppress(psycopg.errors.UniqueViolation):
                    connection.execute(statement.encode())
                self.written += 1
