"""The daemon as users run it: a process of its own, started from a TOML file, watched from
outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import psycopg

from tests.support.ledger_log import events_in

READY_SECONDS = 60.0


def toml_value(value: object) -> str:
    """A value in TOML (JSON's strings, numbers, booleans and arrays are TOML's too)."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{toml_value(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    # TOML has no surrogates.
    return json.dumps(value, ensure_ascii=False)


def write_config(
    path: Path, tables: Sequence[Mapping[str, object]], **sections: Mapping[str, object]
) -> Path:
    """Write a configuration: ``[section]`` per keyword, ``[[tables]]`` per table."""
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in values.items()]
    for table in tables:
        lines.append("[[tables]]")
        lines += [f"{key} = {toml_value(value)}" for key, value in table.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Daemon:
    """``cdc-sync run --config FILE`` in a subprocess."""

    def __init__(
        self,
        directory: Path,
        *,
        pg_url: str,
        qdrant_url: str,
        tables: Sequence[Mapping[str, object]],
        slot: str,
        api_key: str | None = None,
        pipeline: Mapping[str, object] | None = None,
        qdrant: Mapping[str, object] | None = None,
        migration: Mapping[str, object] | None = None,
        source: Mapping[str, object] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.pg_url = pg_url
        self.slot = slot
        self.log_path = directory / f"daemon-{slot}.log"
        self._env = dict(env or {})
        target: dict[str, object] = {"url": qdrant_url, **(qdrant or {})}
        if api_key is not None:
            target["api_key"] = api_key
        self.config = write_config(
            directory / f"daemon-{slot}.toml",
            tables,
            source={"url": pg_url, "slot": slot, "publication": slot, **(source or {})},
            qdrant=target,
            pipeline={"name": slot, **(pipeline or {})},
            # One copies in the daemon itself: processes cost a second each, so who wants them asks.
            migration={"num_workers": 1, **(migration or {})},
            http={"port": 0},
            log={"format": "json", "level": "debug"},
        )
        self.process: subprocess.Popen[bytes] | None = None
        self._port: int | None = None
        self._log_start = 0

    # -- life

    def start(self, *arguments: str, wait: bool = True) -> Daemon:
        self._port = None
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cdc_sync", "run", "--config", str(self.config), *arguments],
                stdout=log,
                stderr=log,
                env={**os.environ, **self._env},
                start_new_session=True,
            )
        if wait:
            self.wait_state("streaming")
        return self

    def kill(self) -> None:
        """kill -9, of the daemon alone: its workers must notice."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self, timeout: float = 30.0) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def peak_rss_bytes(self) -> int:
        """Peak resident memory of the daemon's own process, by the kernel's account."""
        return self._memory("VmHWM:")

    def anonymous_bytes(self) -> int:
        """Memory of its own: without the files that it maps, which an embedded database's are."""
        return self._memory("RssAnon:")

    def _memory(self, account: str) -> int:
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        line = next(x for x in status.splitlines() if x.startswith(account))
        return int(line.split()[1]) * 1024

    def children(self) -> list[psutil.Process]:
        assert self.process is not None
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    # -- what it says

    def log(self) -> str:
        """The log since the last start."""
        if not self.log_path.exists():
            return ""
        with self.log_path.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace")

    def events(self) -> list[dict[str, Any]]:
        """Log lines that are JSON."""
        return events_in(self.log())

    @property
    def port(self) -> int:
        if self._port is None:
            self.wait(
                lambda: any(e.get("event") == "http_listening" for e in self.events()), "http"
            )
            self._port = next(
                int(e["port"]) for e in self.events() if e.get("event") == "http_listening"
            )
        return self._port

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}{path}", timeout=10
            ) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.get("/status")[1])
        return status

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry the labels."""
        total = 0.0
        for line in self.get("/metrics")[1].splitlines():
            head, _, value = line.rpartition(" ")
            metric, _, rest = head.partition("{")
            if metric == name and all(f'{k}="{v}"' in rest for k, v in labels.items()):
                total += float(value)
        return total

    def wait(
        self, condition: Callable[[], bool], what: str, timeout: float = READY_SECONDS
    ) -> None:
        deadline = time.monotonic() + timeout
        while not self._holds(condition):
            if not self.running:
                raise AssertionError(
                    f"the daemon ended while waiting for {what}:\n{self.log()[-4000:]}"
                )
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{what} did not come within {timeout} s:\n{self.log()[-4000:]}"
                )
            time.sleep(0.05)

    @staticmethod
    def _holds(condition: Callable[[], bool]) -> bool:
        try:
            return condition()
        except OSError:
            # Its endpoint went away while answering: it ends, and wait() says with what words.
            return False

    def wait_state(self, state: str, timeout: float = READY_SECONDS) -> None:
        self.wait(lambda: self.status().get("state") == state, f"state {state}", timeout)

    def wait_caught_up(self, timeout: float = 120.0) -> None:
        """Until everything committed before now is confirmed to Postgres."""
        with psycopg.connect(self.pg_url, autocommit=True) as connection:
            target = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
            assert target is not None

            def reached() -> bool:
                row = connection.execute(
                    "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots WHERE "
                    "slot_name = %s",
                    (target[0], self.slot),
                ).fetchone()
                if row is not None and row[0]:
                    return True
                # A sign of life in the WAL, so that the server has something to report.
                connection.execute("SELECT pg_logical_emit_message(false, 'tests', '')")
                return False

            self.wait(reached, "the last position", timeout)
