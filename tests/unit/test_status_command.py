"""``cdc-sync status``: what it prints, its exit codes, and what it does when nobody answers."""

from __future__ import annotations

import http.server
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from cdc_sync.cli import main
from cdc_sync.cli.status_text import (
    duration_text,
    seconds_text,
    size_text,
    status_line,
    status_text,
)
from cdc_sync.errors import ExitCode
from cdc_sync.ops.http import HttpServer
from tests.support.status_scenes import (
    HOSTILE,
    SCENES,
    Scene,
    copying,
    dead_letters,
    hostile,
    qdrant_away,
    served,
    stopped_table,
    streaming,
    told,
)

pytestmark = pytest.mark.usefixtures("clean_environment")


def run(server: HttpServer, *arguments: str) -> int:
    return main(["status", "--url", server.url, *arguments])


# -- exit codes


def starting() -> Scene:
    scene = Scene()
    scene.board.set_state("starting")
    return scene


def failed() -> Scene:
    scene = Scene()
    scene.board.set_state("failed", "the slot was dropped")
    return scene


def stuck() -> Scene:
    scene = streaming()
    scene.board.stuck("stuck at 16/B374D848")
    return scene


def standby() -> Scene:
    scene = Scene()
    scene.board.set_state("standby")
    return scene


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (streaming, ExitCode.OK),
        (copying, ExitCode.OK),
        (standby, ExitCode.OK),
        (dead_letters, ExitCode.OK),
        (starting, ExitCode.TEMPORARY),
        (qdrant_away, ExitCode.TEMPORARY),
        (stopped_table, ExitCode.DATA),
        (failed, ExitCode.DATA),
        (stuck, ExitCode.DATA),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_exit_code_tells_how_it_is(
    make: Callable[[], Scene], code: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(make()) as server:
        assert run(server) == code
        assert capsys.readouterr().err == ""
        assert run(server, "--json") == code


def test_json_is_the_answer_itself(capsys: pytest.CaptureFixture[str]) -> None:
    scene = streaming()
    with served(scene) as server:
        assert run(server, "--json") == 0
    printed, expected = json.loads(capsys.readouterr().out), told(scene)
    for answer in (printed, expected):
        del answer["time"]
    assert printed == expected


# -- nobody answers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["status", "--url", url]) == ExitCode.UNAVAILABLE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: No answer from {url}: Connection refused.\ntry: ")
    assert main(["status", "--url", url, "--json"]) == ExitCode.UNAVAILABLE
    assert "Connection refused" in json.loads(capsys.readouterr().out)["error"]


class _Other(http.server.BaseHTTPRequestHandler):
    """Somebody else's server."""

    answer: tuple[int, bytes] = (200, b"")

    def do_GET(self) -> None:
        code, body = self.answer
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def other() -> Iterator[tuple[type[_Other], str]]:
    class Handler(_Other):
        pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield Handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((404, b"nothing here"), "it answers 404"),
        ((200, b"<!doctype html>"), "no JSON"),
        ((200, b"[1, 2]"), "no state"),
        ((200, b"{}"), "no state"),
        ((200, b"\xff\xfe"), "no JSON"),
        ((500, b"{}"), "it answers 500"),
    ],
)
def test_somebody_else_answers(
    other: tuple[type[_Other], str],
    answer: tuple[int, bytes],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler, url = other
    handler.answer = answer
    assert main(["status", "--url", url]) == ExitCode.UNAVAILABLE
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("url", ["127.0.0.1:9464", "file:///etc/passwd", "ftp://h/", ""])
def test_only_http_is_asked(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", url]) == ExitCode.USAGE
    assert "expected http://HOST:PORT" in capsys.readouterr().err


def test_no_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with served(streaming()) as server:
        assert run(server) == 0


# -- what is printed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("streaming", ["✓ In step", "Every committed change is in Qdrant.", "Postgres 18.0 ✓",
                       "12.0 MiB of 1.0 GiB of WAL kept, low risk, reserved, active",
                       "dead letters  0 (stops beyond 1,000)", "1,204,311 rows copied"]),
        ("copying", ["… Copying", "20 %", "60 %, 731,200 of 1,204,311", "of ~8,930,121",
                     "waits, 48,211 rows"]),
        ("qdrant-away", ["✕ Qdrant does not answer", "Nothing is lost", "retrying ×23"]),
        ("slot-at-risk", ["needs attention too", "✕ The slot is about to be lost", "try: Raise"]),
        ("dead-letters", ["! Dead letters", "17 rows could not be written", "cdc-sync dlq list"]),
        ("stopped-table", ["✕ shop.products has stopped", "try: Set on_dimension_change"]),
    ],
)  # fmt: skip
def test_each_scene_says_what_matters(
    name: str, words: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with served(SCENES[name]()) as server:
        run(server)
    printed = capsys.readouterr().out
    for expected in words:
        assert expected in printed
    assert "\x1b" not in printed, "no colours where there is no terminal"


def test_names_cannot_control_the_terminal() -> None:
    text = status_text(told(hostile()), colour=False)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\u202egnp.evil\\x1b[31m" in text
    assert HOSTILE[2] in text, "nothing reads markup into names"


def test_colours_are_only_added() -> None:
    answer = told(stopped_table())
    coloured = status_text(answer, colour=True)
    assert "\x1b[31m" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == status_text(answer, colour=False)


def test_an_answer_of_an_older_daemon_is_shown_as_far_as_it_goes() -> None:
    old = {"format": 1, "state": "streaming", "ready": True, "tables": [{"name": "public.items"}]}
    text = status_text(old)
    assert text.startswith("✓ streaming")
    assert "public.items" in text
    assert "lag           not known, not known" in text
    assert status_line({"state": "starting"}).split("  ")[1:3] == ["warning", "starting"]


def test_a_verification_is_shown_once_there_is_one() -> None:
    answer = told(copying())
    assert "verified" not in status_text(answer)
    table = {"name": "public.items", "missing": 2, "extra": 1, "different": 0}
    answer["verification"] = {"finished": "2026-01-01T12:00:00Z", "tables": [table]}
    assert "verified      2026-01-01T12:00:00Z: 3 differences" in status_text(answer)
    answer["verification"] = {"finished": "2026-01-01T12:00:00Z", "ok": True}
    assert "no difference" in status_text(answer)


@pytest.mark.parametrize(
    ("size", "text"),
    [(None, "not known"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (150 << 20, "150 MiB"),
     (1 << 30, "1.0 GiB"), (5 << 40, "5.0 TiB")],
)  # fmt: skip
def test_sizes(size: int | None, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "not known"), (0, "0 s"), (0.0001, "0 s"), (0.0123, "12 ms"), (1.25, "1.2 s"),
     (59.94, "59.9 s"), (600, "10 min 0 s")],
)  # fmt: skip
def test_lags(seconds: float | None, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3600, "1 h 0 min"), (86400, "1 day 0 h"),
     (200_000, "2 days 7 h")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


# -- watching


def watched(monkeypatch: pytest.MonkeyPatch, turns: Sequence[Callable[[], None]]) -> None:
    """Have the pauses of --watch do something; after the last one comes Ctrl-C."""
    left = list(turns)

    def pause(_: float) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    monkeypatch.setattr("time.sleep", pause)


def test_watch_prints_a_line_each_time_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = streaming()
    with served(scene) as server:
        turns = [lambda: scene.board.set_sink(False, "refused"), server.stop, lambda: None]
        watched(monkeypatch, turns)
        assert run(server, "--watch") == ExitCode.UNAVAILABLE
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert "  ok  In step  lag 0 s, 56 B  0 dead letters" in first
    assert "warning  Qdrant does not answer" in second
    assert re.match(r"no answer since \d\d:\d\d:\d\d from http://127", third)
    assert fourth.startswith("no answer since")


def test_watch_ends_with_the_code_of_the_last_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = streaming()
    with served(scene) as server:
        watched(monkeypatch, [lambda: scene.board.set_state("failed")])
        assert run(server, "--watch", "--json") == ExitCode.DATA
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    assert states == ["streaming", "failed"]


def test_watch_draws_on_a_terminal_in_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("LINES", "20")
    monkeypatch.setenv("COLUMNS", "100")
    scene = hostile()
    with served(scene) as server:
        watched(monkeypatch, [server.stop])
        run(server, "--watch")
    drawn = capsys.readouterr().out.split("\x1b[H")[2:]
    assert len(drawn) == 2
    assert all(text.count("\n") < 20 for text in drawn), "more than fits would scroll"
    assert all(text.endswith("\x1b[J\n") for text in drawn)
    assert drawn[1].startswith("no answer since")
    assert "has stopped" in drawn[1], "what was known last stays"


def test_a_terminal_without_such_characters_gets_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    import io
    import sys

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with served(streaming()) as server:
        assert run(server) == 0
    out.seek(0)
    assert "? In step" in out.read()
