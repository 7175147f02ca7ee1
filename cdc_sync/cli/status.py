"""``cdc-sync status``: how a running pipeline is."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Annotated, Final

import typer

from cdc_sync.errors import ExitCode

_DEFAULT_URL: Final = "http://127.0.0.1:9464"
_ANSWER_SECONDS: Final = 5.0
_WATCH_SECONDS: Final = 2.0
_LONGEST_ANSWER: Final = 64 << 20

#: Home, and clear what is below: without the flicker of clearing first.
_REDRAW: Final = "\x1b[H"
_CLEAR_LINE: Final = "\x1b[K"
_CLEAR_BELOW: Final = "\x1b[J"


class _NoAnswerError(Exception):
    """Nothing answers, or something else does."""


def status(
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="HTTP endpoint of the pipeline.")
    ] = _DEFAULT_URL,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every two seconds, until Ctrl-C.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer of /status.")] = False,
) -> int:
    """Show how a running pipeline is, and what needs attention.

    Exit code 0: ready; 75: not ready, and goes on by itself; 65: somebody has to act; 69: nothing
    answers.
    """
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter("--url: expected http://HOST:PORT or https://HOST:PORT.")
    if watch:
        return _watch(url, as_json)
    try:
        answer = _ask(url)
    except _NoAnswerError as error:
        return _no_answer(url, str(error), as_json)
    _write(json.dumps(answer, indent=2) if as_json else _screen(answer))
    return exit_code(answer)


def exit_code(answer: Mapping[str, object]) -> ExitCode:
    """The exit code for an answer of ``/status``."""
    if answer.get("state") == "failed" or answer.get("alive") is False:
        return ExitCode.DATA
    tables = answer.get("tables")
    for table in tables if isinstance(tables, list) else ():
        if isinstance(table, Mapping) and table.get("state") in ("stopped", "failed"):
            return ExitCode.DATA
    return ExitCode.OK if answer.get("ready") is True else ExitCode.TEMPORARY


def _watch(url: str, as_json: bool) -> int:
    """A screen that is drawn again and again; where there is none, a line each time."""
    code = ExitCode.UNAVAILABLE
    screen = sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb") and not as_json
    heard: float | None = None
    drawn = ""
    if screen:
        sys.stdout.write(_REDRAW + _CLEAR_BELOW)
    try:
        while True:
            try:
                answer = _ask(url)
                code, heard = exit_code(answer), time.time()
                if as_json:
                    text = json.dumps(answer)
                elif screen:
                    text = drawn = _screen(answer)
                else:
                    text = _line(answer)
            except _NoAnswerError as error:
                code = ExitCode.UNAVAILABLE
                since = "" if heard is None else time.strftime(" since %H:%M:%S", _local(heard))
                if as_json:
                    text = json.dumps({"error": str(error)})
                else:
                    text = f"no answer{since} from {url}: {error}"
                    text += f"\n\n{drawn}" if screen and drawn else ""
            if screen:
                _draw(text)
            else:
                _write(text)
            time.sleep(_WATCH_SECONDS)
    except KeyboardInterrupt:
        return code


def _draw(text: str) -> None:
    """In place of what is on the screen; what does not fit would scroll it away."""
    from shutil import get_terminal_size

    lines = text.split("\n")[: get_terminal_size().lines - 1]
    _write(f"{_REDRAW}{f'{_CLEAR_LINE}{chr(10)}'.join(lines)}{_CLEAR_LINE}{_CLEAR_BELOW}")


def _local(seconds: float) -> time.struct_time:
    return time.localtime(seconds)


def _ask(url: str) -> dict[str, object]:
    import http.client
    import urllib.error
    import urllib.request

    # A proxy of the environment is for the world outside, and does not know our 127.0.0.1.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.rstrip('/')}/status", timeout=_ANSWER_SECONDS) as answer:
            found = json.loads(answer.read(_LONGEST_ANSWER))
    except urllib.error.HTTPError as error:
        raise _NoAnswerError(f"it answers {error.code}, so it is no endpoint of ours") from error
    except urllib.error.URLError as error:
        reason = error.reason
        words = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
        raise _NoAnswerError(words) from error
    except (OSError, http.client.HTTPException) as error:
        raise _NoAnswerError(str(error) or type(error).__name__) from error
    except ValueError as error:
        raise _NoAnswerError("its answer is no JSON, so it is no endpoint of ours") from error
    if not isinstance(found, dict) or "state" not in found:
        raise _NoAnswerError("its answer has no state, so it is no endpoint of ours")
    return found


def _no_answer(url: str, reason: str, as_json: bool) -> ExitCode:
    if as_json:
        _write(json.dumps({"error": f"no answer from {url}: {reason}"}))
    else:
        typer.echo(f"error: No answer from {url}: {reason}.", err=True)
        typer.echo(
            "try: cdc-sync status --url http://HOST:PORT with http.host and http.port of the "
            "pipeline; is it running, and http.enabled?",
            err=True,
        )
    return ExitCode.UNAVAILABLE


def _screen(answer: Mapping[str, object]) -> str:
    from shutil import get_terminal_size

    from cdc_sync.cli.status_text import status_text

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return status_text(answer, width=get_terminal_size((110, 40)).columns, colour=colour)


def _line(answer: Mapping[str, object]) -> str:
    from cdc_sync.cli.status_text import status_line

    return status_line(answer)


def _write(text: str) -> None:
    """Print; characters that the terminal has not become question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(f"{text}\n".encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
