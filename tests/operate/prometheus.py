"""A real Prometheus and promtool: Debian's package ``prometheus``."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest
import yaml

_READY_SECONDS: Final = 60.0
_STARTS: Final = 5


def required_program(name: str, package: str) -> str:
    """The path of a program; without it the test is skipped, and fails in CI."""
    path = shutil.which(name)
    if path is None:
        reason = f"needs {name}: apt-get install --no-install-recommends {package}"
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def promtool(*arguments: str, directory: Path) -> str:
    """Run promtool and return what it says; fails with it."""
    done = subprocess.run(
        [required_program("promtool", "prometheus"), *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


@dataclass(frozen=True, slots=True)
class Series:
    """One series of an answer: labels, and (Unix time, value) pairs."""

    labels: Mapping[str, str]
    points: list[tuple[float, float]]


class Prometheus:
    """A server in a directory of its own. Targets are given by :meth:`scrape`, unless it is given
    its ``scrape_configs``."""

    def __init__(
        self,
        directory: Path,
        *,
        interval_seconds: float,
        rules: str | None = None,
        scrape_configs: Sequence[object] | None = None,
    ) -> None:
        self._program = required_program("prometheus", "prometheus")
        self._directory = directory
        directory.mkdir(parents=True)
        self._targets = directory / "targets.json"
        self._targets.write_text("[]", encoding="utf-8")
        interval = f"{round(interval_seconds * 1000)}ms"
        config: dict[str, object] = {
            "global": {
                "scrape_interval": interval,
                "scrape_timeout": interval,
                "evaluation_interval": interval,
            },
            "scrape_configs": list(scrape_configs)
            if scrape_configs is not None
            else [
                {
                    "job_name": "cdc-sync",
                    "file_sd_configs": [{"files": ["targets.json"], "refresh_interval": "1s"}],
                }
            ],
        }
        if rules is not None:
            (directory / "alerts.yml").write_text(rules, encoding="utf-8")
            config["rule_files"] = ["alerts.yml"]
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def __enter__(self) -> Self:
        for _ in range(_STARTS):
            if self._start():
                return self
        raise AssertionError(f"prometheus did not start\n{self.log()}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)

    def _start(self) -> bool:
        """False if the port was taken by somebody else meanwhile."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    "--config.file=prometheus.yml",
                    "--storage.tsdb.path=data",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                ],
                cwd=self._directory,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + _READY_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                self._get("/-/ready")
            except OSError:
                time.sleep(0.1)
            else:
                return True
        self._process.kill()
        self._process.wait()
        return False

    def log(self) -> str:
        """What it has written."""
        return (self._directory / "log").read_text(errors="replace")[-4000:]

    def scrape(self, port: int, instance: str = "daemon") -> None:
        """Scrape the daemon at a port of this machine from now on, and nothing else."""
        entry = {"targets": [f"127.0.0.1:{port}"], "labels": {"instance": instance}}
        new = self._targets.with_suffix(".new.json")
        new.write_text(json.dumps([entry]), encoding="utf-8")
        new.replace(self._targets)

    def _get(self, path: str, **parameters: str) -> str:
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        url = f"http://127.0.0.1:{self._port}{path}{query}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                raise ConnectionError(f"{error.code}: {error.read().decode()[:500]}") from error

    def _data(self, path: str, **parameters: str) -> Any:
        answer = json.loads(self._get(path, **parameters))
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[Series]:
        """What an expression is now."""
        data = self._data("/api/v1/query", query=expression)
        assert data["resultType"] == "vector", expression
        return [Series(x["metric"], [_point(x["value"])]) for x in data["result"]]

    def query_range(
        self, expression: str, start: float, end: float, step: float = 0.5
    ) -> list[Series]:
        """What an expression was between two times (Unix)."""
        data = self._data(
            "/api/v1/query_range",
            query=expression,
            start=f"{start:.3f}",
            end=f"{end:.3f}",
            step=f"{step:g}",
        )
        return [Series(x["metric"], [_point(p) for p in x["values"]]) for x in data["result"]]

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        alerts = self._data("/api/v1/alerts")["alerts"]
        return {str(x["labels"]["alertname"]) for x in alerts if x["state"] == "firing"}

    def rule_errors(self) -> dict[str, str]:
        """What went wrong with rules when they were last evaluated, by name."""
        groups = self._data("/api/v1/rules")["groups"]
        return {
            rule["name"]: rule.get("lastError", "")
            for group in groups
            for rule in group["rules"]
            if rule["health"] == "err"
        }


def _point(pair: list[Any]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])
