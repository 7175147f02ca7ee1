"""Test side of the Qdrant test server: starting, killing and restarting its process, and scripting
its faults.
"""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import grpc
from qdrant_client import QdrantClient

from tests.support.qdrant_faults import RANDOM_KINDS, Fault, FaultKind, RandomKind
from tests.support.qdrant_node import CONTROL, OBSERVER

_ROOT = Path(__file__).resolve().parents[2]
_CALL_TIMEOUT = 20.0
_RECONNECT = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
]


class Faults:
    """Scripts the failures of a test server. Operation names and kinds: see
    tests/support/qdrant_faults.py.
    """

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        if credentials is None:
            self._channel = grpc.insecure_channel(address, options=_RECONNECT)
        else:
            self._channel = grpc.secure_channel(address, credentials, options=_RECONNECT)
        self._call = self._channel.unary_unary(CONTROL)

    def _command(self, name: str, *arguments: object, **keywords: object) -> Any:
        request = json.dumps([name, arguments, keywords]).encode()
        return json.loads(self._call(request, timeout=_CALL_TIMEOUT, wait_for_ready=True))

    def add(
        self,
        operation: str,
        kind: FaultKind,
        *,
        code: str | None = None,
        message: str | None = None,
        retry_after: float | None = None,
        seconds: float = 0.0,
        times: int = 1,
    ) -> None:
        """Queue a fault for the next ``times`` requests of ``operation``."""
        fault: dict[str, object] = {"kind": kind, "retry_after": retry_after, "seconds": seconds}
        if code is not None:
            fault["code"] = code
            fault["message"] = message or f"scripted {code}"
        elif message is not None:
            fault["message"] = message
        # A misspelt kind or field fails here, not in the server.
        Fault(**fault)  # type: ignore[arg-type]
        self._command("fault", operation, times, **fault)

    def reject(
        self,
        operation: str,
        code: str,
        message: str = "",
        *,
        retry_after: float | None = None,
        times: int = 1,
    ) -> None:
        """Answer with ``code`` without applying."""
        self.add(
            operation,
            "reject",
            code=code,
            message=message or None,
            retry_after=retry_after,
            times=times,
        )

    def fail_after_apply(
        self,
        operation: str,
        code: str = "UNAVAILABLE",
        message: str = "Socket closed",
        *,
        times: int = 1,
    ) -> None:
        """Apply, then answer with ``code``: the lost response."""
        self.add(operation, "fail_after_apply", code=code, message=message, times=times)

    def never_answer(self, operation: str, *, applied: bool, times: int = 1) -> None:
        """Apply or not, and let the client run into its deadline."""
        kind: FaultKind = "silent_after_apply" if applied else "silent_before_apply"
        self.add(operation, kind, times=times)

    def wait_timeout(self, operation: str, *, times: int = 1) -> None:
        """Queue the write and answer with status WaitTimeout."""
        self.add(operation, "wait_timeout", times=times)

    def slow(self, operation: str, seconds: float, *, times: int = 1) -> None:
        """Apply after ``seconds``."""
        self.add(operation, "slow", seconds=seconds, times=times)

    def hold(self, operation: str, *, times: int = 1) -> None:
        """Keep requests waiting, unapplied, until :meth:`release`."""
        self.add(operation, "hold", times=times)

    def crash(self, operation: str, *, applied: bool) -> None:
        """The process kills itself on the next such request, before or after applying it."""
        self.add(operation, "crash_after_apply" if applied else "crash_before_apply")

    def release(self) -> None:
        """Let go all held requests."""
        self._command("release")

    def held(self) -> int:
        """Requests held now."""
        return int(self._command("state")["held"])

    def queued(self) -> int:
        """Scripted faults not yet met by a request."""
        return int(self._command("state")["queued"])

    def down(self, down: bool = True) -> None:
        """Answer everything with UNAVAILABLE until called with False."""
        self._command("down", down)

    def refuse_first_tries(self, refused: bool = True) -> None:
        """Answer every request with UNAVAILABLE when it comes for the first time from now on."""
        self._command("first_tries", refused)

    def refuse_every(self, every: int, before: int = 0) -> None:
        """Answer one of ``every`` requests with UNAVAILABLE, the first one after so many others
        (modulo ``every``)."""
        self._command("every", every, before % every + 1)

    def random(
        self, probability: float, seed: int, kinds: Sequence[RandomKind] = RANDOM_KINDS
    ) -> None:
        """Let writes fail by chance; probability 0 stops it."""
        self._command("random", probability, seed, list(kinds))

    def rate_limit(self, points_per_minute: int | None) -> None:
        """Limit writes as strict mode does: RESOURCE_EXHAUSTED, `retry-after` in the trailing
        metadata.
        """
        self._command("rate_limit", points_per_minute)

    def lag(self, seconds: float) -> None:
        """Delay between the acknowledgement of a `wait=false` write and its application."""
        self._command("lag", seconds)

    def version(self, version: str) -> None:
        """Report another server version from now on."""
        self._command("version", version)

    def optimize(self, collection: str) -> bool:
        """Run the engine's optimizers (builds HNSW) and wait for them."""
        return bool(self._command("optimize", collection))

    def clear(self) -> None:
        """No more faults, limits or holds, up again."""
        self._command("clear")

    def log(self) -> list[dict[str, Any]]:
        """Requests since the start or :meth:`clear_log`: operation, collection, points, start, end,
        outcome, in_flight.
        """
        return cast("list[dict[str, Any]]", self._command("log"))

    def operations(self) -> list[str]:
        """Operation names of the log, in the order of arrival."""
        return [str(entry["operation"]) for entry in self.log()]

    def violations(self) -> list[dict[str, Any]]:
        return cast("list[dict[str, Any]]", self._command("violations"))

    def clear_log(self) -> None:
        """Forget logged requests and violations."""
        self._command("clear_log")

    def close(self) -> None:
        self._channel.close()


class QdrantTarget:
    """A Qdrant server under test: its address, a client that meets no faults, and what a test may
    do to it.

    ``faults`` is None on a real server, and then :meth:`kill`, :meth:`restart` and
    :meth:`violations` are not available.
    """

    def __init__(self, url: str, api_key: str | None = None, faults: Faults | None = None) -> None:
        self.url = url
        self.api_key = api_key
        self.faults = faults
        self._clients: list[QdrantClient] = []
        self._observer: QdrantClient | None = None

    @property
    def script(self) -> Faults:
        """``faults``, for tests that run on the test server only."""
        if self.faults is None:
            raise RuntimeError("a real Qdrant server has no scripted faults; use qdrant_private")
        return self.faults

    def client(self) -> QdrantClient:
        """The client for assertions: its requests meet no faults and are not logged.

        Made once and closed with the target: do not close it.
        """
        if self._observer is None:
            self._observer = self.new_client(observer=True)
        return self._observer

    def new_client(self, *, observer: bool = False, timeout: int = 60) -> QdrantClient:
        """A new client, closed with the target. With ``observer`` its requests meet no faults and
        are not logged.
        """
        headers = {OBSERVER: "1"} if observer and self.faults is not None else {}
        if self.api_key is not None:
            headers["api-key"] = self.api_key
        scheme, _, address = self.url.rpartition("://")
        host, _, port = address.rpartition(":")
        client = QdrantClient(
            host=host,
            grpc_port=int(port),
            https=scheme == "https",
            prefer_grpc=True,
            check_compatibility=False,
            timeout=timeout,
            headers=headers,
            grpc_options=dict(_RECONNECT),
        )
        self._clients.append(client)
        return client

    def new_collection_name(self, prefix: str = "test") -> str:
        """A name no other test has."""
        return f"{prefix}_{uuid.uuid4().hex[:12]}"

    def violations(self) -> list[dict[str, Any]]:
        """Pairs of write requests that were in flight together for the same point."""
        return self.script.violations()

    def kill(self) -> None:
        """SIGKILL."""
        raise RuntimeError("only a private test server can be killed; use qdrant_private")

    def restart(self) -> None:
        """Start again on the same data and port after :meth:`kill`."""
        raise RuntimeError("only a private test server can be restarted; use qdrant_private")

    def _close_clients(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()
        self._observer = None

    def close(self) -> None:
        self._close_clients()
        if self.faults is not None:
            self.faults.close()


class QdrantProcess(QdrantTarget):
    """A test server in a process of its own. It ends with this process at the latest, however this
    one ends.
    """

    def __init__(
        self,
        path: Path,
        api_key: str | None = None,
        tls: tuple[Path, Path] | None = None,
        version: str = "1.18.0",
        *,
        ca_file: Path | None = None,
        client_ca: Path | None = None,
    ) -> None:
        """``path``: directory for its data and log; ``tls``: certificate chain and key, PEM, for
        127.0.0.1, which ``ca_file`` (default: itself) has signed; ``client_ca``: who must have
        signed the certificates of clients. :attr:`faults` and clients have none.
        """
        self._path = path
        self._tls = tls
        self._client_ca = client_ca
        self._version = version
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        path.mkdir(parents=True, exist_ok=True)
        self.api_key = api_key
        self._start()
        credentials = None
        if tls is not None:
            credentials = grpc.ssl_channel_credentials((ca_file or tls[0]).read_bytes())
        scheme = "http" if tls is None else "https"
        faults = Faults(f"127.0.0.1:{self._port}", credentials)
        super().__init__(f"{scheme}://127.0.0.1:{self._port}", api_key, faults)

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.support.qdrant_server", "--exit-with-stdin"]
        command += ["--path", str(self._path / "collections"), "--port", str(self._port)]
        command += ["--server-version", self._version]
        if self.api_key is not None:
            command += ["--api-key", self.api_key]
        if self._tls is not None:
            command += ["--tls-cert", str(self._tls[0]), "--tls-key", str(self._tls[1])]
        if self._client_ca is not None:
            command += ["--tls-client-ca", str(self._client_ca)]
        with (self._path / "server.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        self._process = process
        line = process.stdout.readline() if process.stdout is not None else b""
        if not line:
            self._reap()
            tail = (self._path / "server.log").read_text()[-2000:]
            raise RuntimeError(f"the Qdrant test server did not start:\n{tail}")
        self._port = int(line)

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError("the Qdrant test server is not running")
        return self._process.pid

    def server_log(self) -> str:
        """What the server wrote to its log, declined updates among it."""
        return (self._path / "server.log").read_text()

    def _reap(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """SIGKILL; harmless when it is dead already."""
        if self._process is not None:
            self._process.kill()
        self._reap()

    def lose_power(self) -> None:
        """SIGKILL, and the loss of acknowledged `wait=false` writes that were not yet applied.

        How many those are is set by :meth:`Faults.lag`. Completed writes survive.
        """
        self.kill()
        for journal in self._path.glob("collections/*/journal"):
            journal.unlink()

    def wait_dead(self, seconds: float = 10.0) -> None:
        """Wait until a scripted crash has ended the process."""
        if self._process is not None:
            self._process.wait(timeout=seconds)
        self._reap()

    def restart(self) -> None:
        """Kill if it runs, then start on the same data and port.

        Clients made before are closed; scripted faults and the request log are gone.
        """
        self.kill()
        self._close_clients()
        self._start()

    def close(self) -> None:
        """Close clients and stop the process in good order."""
        super().close()
        self._reap()
