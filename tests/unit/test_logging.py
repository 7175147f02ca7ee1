"""Logs: what a line looks like, what is kept out of it, and that logging never fails."""

from __future__ import annotations

import ast
import asyncio
import io
import json
import logging
import re
import time
import warnings
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest

from cdc_sync.config import LogSettings, QdrantSettings, Settings, SourceSettings, TableSettings
from cdc_sync.ops import logging as logging_module
from cdc_sync.ops.logging import (
    REPEATS_A_MINUTE,
    EventHandler,
    RepeatLimiter,
    configure_logging,
    get_logger,
    log_context,
)
from cdc_sync.ops.redaction import add_secrets, forget_secrets, redact, secrets_of
from cdc_sync.pgoutput.lsn import Lsn

log = get_logger("cdc_sync.test")
PASSWORD = "hunter2-never-print-me"
ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def unchanged_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)
    forget_secrets()


@pytest.fixture
def stream() -> io.StringIO:
    out = io.StringIO()
    configure_logging(LogSettings(level="debug", format="json"), out)
    return out


def entries(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def only(stream: io.StringIO) -> dict[str, object]:
    (entry,) = entries(stream)
    return entry


# -- the shape of a line


def test_an_event_is_a_json_object_with_its_fields(stream: io.StringIO) -> None:
    log.info("batch_applied", table="public.items", rows=400, seconds=0.5, done=True, next=None)
    entry = only(stream)
    assert str(entry.pop("time")).endswith("Z")
    assert entry == {
        "level": "info",
        "logger": "cdc_sync.test",
        "event": "batch_applied",
        "table": "public.items",
        "rows": 400,
        "seconds": 0.5,
        "done": True,
        "next": None,
    }


def test_a_field_cannot_overwrite_what_every_line_has(stream: io.StringIO) -> None:
    log.info("real", time="x", level="x", logger="x", event="x", exception="x")
    entry = only(stream)
    assert (entry["event"], entry["event_"], entry["level"]) == ("real", "x", "info")


class Colour(Enum):
    RED = "red"


class Hostile:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_any_value_can_be_logged(stream: io.StringIO) -> None:
    log.info(
        "odd",
        lsn=Lsn.parse("16/B374D848"),
        kind=Colour.RED,
        huge=2**200,
        nan=float("nan"),
        raw=b"secret row",
        surrogate="\udcff",
        nested={1: [Colour.RED, {"a": (1, 2)}]},
        hostile=Hostile(),
        error=ValueError("broken"),
    )
    entry = only(stream)
    assert entry["lsn"] == "16/B374D848"
    assert entry["kind"] == "red"
    assert entry["huge"] == str(2**200)
    assert entry["nan"] is None
    assert entry["raw"] == "<10 bytes>"
    assert entry["surrogate"] == "\\udcff"
    assert entry["nested"] == {"1": ["red", {"a": [1, 2]}]}
    assert entry["hostile"] == "<Hostile: RuntimeError in str()>"
    assert entry["error"] == "broken"


def test_a_structure_that_contains_itself_ends(stream: io.StringIO) -> None:
    loop: list[object] = []
    loop.append(loop)
    log.info("loop", value=loop)
    assert only(stream)["event"] == "loop"


def test_an_exception_comes_with_its_trace(stream: io.StringIO) -> None:
    try:
        raise ValueError(f"cannot open postgresql://a:{PASSWORD}@h/d")
    except ValueError:
        log.exception("failed")
    entry = only(stream)
    assert entry["level"] == "error"
    assert "ValueError: cannot open postgresql://a:***@h/d" in str(entry["exception"])


def test_levels_below_the_configured_are_left_out() -> None:
    out = io.StringIO()
    configure_logging(LogSettings(level="warning", format="json"), out)
    log.info("no")
    log.warning("yes")
    assert only(out)["event"] == "yes"
    assert not log.is_enabled_for(logging.INFO)


def test_configuring_again_replaces_the_handler(stream: io.StringIO) -> None:
    second = io.StringIO()
    configure_logging(LogSettings(level="info", format="json"), second)
    log.info("once")
    assert stream.getvalue() == ""
    assert len(entries(second)) == 1


@pytest.mark.parametrize(
    ("terminal", "format_", "is_json"),
    [
        (True, "auto", False),
        (False, "auto", True),
        (False, "console", False),
        (True, "json", True),
    ],
)
def test_the_format_follows_the_stream_unless_set(
    terminal: bool, format_: Literal["auto", "console", "json"], is_json: bool
) -> None:
    out = Terminal() if terminal else io.StringIO()
    configure_logging(LogSettings(level="info", format=format_), out)
    log.info("event", rows=1)
    assert out.getvalue().startswith("{") is is_json


def test_a_console_line_is_coloured_on_a_terminal_unless_no_color(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured, plain = Terminal(), Terminal()
    configure_logging(LogSettings(format="console"), coloured)
    log.info("event", rows=1)
    monkeypatch.setenv("NO_COLOR", "1")
    configure_logging(LogSettings(format="console"), plain)
    log.info("event", rows=1, text="two words", ratio=1 / 3)
    assert "\x1b[" in coloured.getvalue()
    assert "\x1b[" not in plain.getvalue()
    assert plain.getvalue().endswith('rows=1 text="two words" ratio=0.333333\n')


def test_a_value_cannot_forge_a_console_line() -> None:
    out = io.StringIO()
    configure_logging(LogSettings(format="console"), out)
    log.info("event", name="a\n12:00:00 error forged\x1b[2J")
    assert out.getvalue().count("\n") == 1
    assert "\x1b" not in out.getvalue()


# -- context


async def test_context_reaches_what_is_awaited_and_ends_with_the_block(
    stream: io.StringIO,
) -> None:
    async def inner() -> None:
        await asyncio.sleep(0)
        log.info("inner", rows=1)

    with log_context(pipeline="p", table="t"):
        await asyncio.gather(inner())
        with log_context(table="u"):
            log.info("nested", pipeline="mine")
    log.info("outside")
    inside, nested, outside = entries(stream)
    assert (inside["pipeline"], inside["table"], inside["rows"]) == ("p", "t", 1)
    assert (nested["pipeline"], nested["table"]) == ("mine", "u")
    assert "pipeline" not in outside


# -- other libraries


def test_other_libraries_and_warnings_take_the_same_way(stream: io.StringIO) -> None:
    logging.getLogger("somebody").warning("cannot reach %s", f"http://u:{PASSWORD}@h:1")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", stacklevel=1)
    first, second = entries(stream)
    assert first["event"] == "cannot reach http://u:***@h:1"
    assert first["logger"] == "somebody"
    assert "old" in str(second["event"])


def test_arguments_that_do_not_fit_the_format_are_no_failure(stream: io.StringIO) -> None:
    record = logging.LogRecord("somebody", logging.INFO, "", 0, "%d rows", ("many",), None)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, EventHandler):
            handler.handle(record)
    assert only(stream)["event"] == "%d rows"


@pytest.mark.parametrize("name", ["hpack.hpack", "httpcore.http2", "httpx", "grpc._cython"])
def test_libraries_that_write_headers_stay_quiet_even_in_debug(
    stream: io.StringIO, name: str
) -> None:
    logging.getLogger(name).debug("api-key: %s", PASSWORD)
    logging.getLogger(name).info("api-key: %s", PASSWORD)
    assert stream.getvalue() == ""


# -- repeats


def test_repeats_are_counted_and_summarised() -> None:
    out = io.StringIO()
    now = [1000.0]
    handler = EventHandler(out)
    configure_logging(LogSettings(level="info", format="json"), out)
    (formatter,) = [
        h.formatter for h in logging.getLogger().handlers if isinstance(h, EventHandler)
    ]
    handler.setFormatter(formatter)
    handler._clock = lambda: now[0]
    logger = logging.Logger("cdc_sync.repeats")
    logger.addHandler(handler)

    def repeat(table: str, times: int) -> None:
        for number in range(times):
            fields = {"table": table, "number": number}
            logger.warning("retrying", extra={"event_fields": fields})

    repeat("a", REPEATS_A_MINUTE + 5)
    repeat("b", 3)
    assert len(entries(out)) == REPEATS_A_MINUTE + 3
    now[0] += 60
    repeat("a", 1)
    summary, again = entries(out)[-2:]
    assert summary["event"] == "log_repeats_suppressed"
    assert (summary["repeated_event"], summary["table"]) == ("retrying", "a")
    assert (summary["count"], summary["level"]) == (5, "warning")
    assert again["event"] == "retrying"
    handler.close()


def test_what_was_suppressed_is_told_when_the_handler_closes() -> None:
    out = io.StringIO()
    handler = EventHandler(out, RepeatLimiter(limit=1))
    logger = logging.Logger("cdc_sync.repeats")
    logger.addHandler(handler)
    for _ in range(4):
        logger.error("failed")
    assert out.getvalue() == "failed\n"
    handler.close()
    assert out.getvalue() == "failed\nlog_repeats_suppressed\n"


def test_closing_after_the_stream_is_closed_is_no_error() -> None:
    out = io.StringIO()
    handler = EventHandler(out, RepeatLimiter(limit=1))
    logger = logging.Logger("cdc_sync.repeats")
    logger.addHandler(handler)
    logger.error("failed")
    logger.error("failed")
    out.close()
    handler.close()


def test_windows_do_not_pile_up() -> None:
    limiter = RepeatLimiter()
    for number in range(1000):
        record = logging.LogRecord("x", logging.INFO, "", 0, f"message {number}", None, None)
        limiter.admit(record, float(number))
        limiter.due(float(number))
    assert len(limiter._windows) <= 61


def test_repeats_of_another_kind_are_not_suppressed() -> None:
    out = io.StringIO()
    handler = EventHandler(out, RepeatLimiter(limit=1))
    logger = logging.Logger("cdc_sync.repeats")
    logger.addHandler(handler)
    for _ in range(3):
        for kind in ("sink_unavailable", "source_unavailable"):
            logger.warning("retrying", extra={"event_fields": {"kind": kind}})
    assert out.getvalue() == "retrying\nretrying\n"
    handler.close()
    assert out.getvalue().count("log_repeats_suppressed") == 2


def test_what_was_suppressed_is_told_even_if_nothing_else_is_logged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging_module, "_WINDOW_SECONDS", 0.2)
    out = io.StringIO()
    handler = EventHandler(out, RepeatLimiter(limit=1))
    logger = logging.Logger("cdc_sync.repeats")
    logger.addHandler(handler)
    for _ in range(3):
        logger.warning("retrying")
    end = time.monotonic() + 60
    while "log_repeats_suppressed" not in out.getvalue():
        assert time.monotonic() < end
        time.sleep(0.02)
    handler.close()
    assert out.getvalue() == "retrying\nlog_repeats_suppressed\n"


# -- recent events


class Kept(logging.Handler):
    """Keeps the names of events."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.events: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.events.append(record.getMessage())


def test_recent_events_are_ours_and_kept_whatever_is_written() -> None:
    out, kept = io.StringIO(), Kept()
    configure_logging(LogSettings(level="error", format="json"), out, recent=kept)
    logging.getLogger("elsewhere").error("not ours")
    log.info("streaming_started")
    log.debug("window_opened")
    log.error("failed")
    assert kept.events == ["streaming_started", "failed"]
    assert [entry["event"] for entry in entries(out)] == ["not ours", "failed"]
    configure_logging(LogSettings(level="error", format="json"), out)
    log.error("stuck")
    log.info("stopped")
    assert kept.events == ["streaming_started", "failed"]
    assert not log.is_enabled_for(logging.INFO)


# -- the documented events

_CALLS = {"debug", "info", "warning", "error", "exception"}
_EVENT = re.compile(r"^\| `(\w+)` \| ([\w ,]*) \|([^|]*)\|([^|]*)\|$", re.MULTILINE)

Documented = dict[str, tuple[set[str], set[str]]]


def logged_events() -> Documented:
    """Levels and fields of every event, by its name, as the source has them."""
    # What the handler writes itself has the level of what it repeats.
    found: Documented = {
        "log_repeats_suppressed": ({"as repeated"}, {"repeated_event", "count", "table", "kind"})
    }
    for path in (ROOT / "cdc_sync").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of_log = isinstance(node.func.value, ast.Name) and node.func.value.id == "log"
            if not of_log or node.func.attr not in _CALLS:
                continue
            level = "error" if node.func.attr == "exception" else node.func.attr
            names = _names(node.args[0])
            assert names, f"{path}:{node.lineno}: the event's name is not written there"
            for name in names:
                levels, fields = found.setdefault(name, (set(), set()))
                levels.add(level)
                fields |= {keyword.arg or "…" for keyword in node.keywords}
    return found


def _names(node: ast.expr) -> list[str]:
    """The texts that an expression may be; none where that cannot be told."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        branches = [_names(node.body), _names(node.orelse)]
        return branches[0] + branches[1] if all(branches) else []
    return []


def test_every_event_is_documented_with_levels_and_fields() -> None:
    page = (ROOT / "docs" / "logs.md").read_text(encoding="utf-8")
    rows = list(_EVENT.finditer(page))
    assert len(rows) == len(re.findall(r"^\| `", page, re.MULTILINE)), "a row has another form"
    documented = {
        match[1]: (set(match[2].split(", ")), set(match[3].replace(",", " ").split()))
        for match in rows
    }
    assert len(documented) == len(rows), "an event is there twice"
    logged = logged_events()
    missing = {
        f"| `{name}` | {', '.join(sorted(logged[name][0]))} | {', '.join(sorted(logged[name][1]))} "
        "| (what it means) |"
        for name in logged.keys() - documented.keys()
    }
    assert not missing, "docs/logs.md lacks:\n" + "\n".join(sorted(missing))
    assert documented.keys() - logged.keys() == set(), "no longer logged"
    for name, (levels, fields) in logged.items():
        assert documented[name][0] == levels, name
        if "…" in fields:  # the page may name those that are not written in the source
            assert fields - {"…"} <= documented[name][1], name
            assert len(documented[name][1]) >= len(fields), name
        else:
            assert documented[name][1] == fields, name
    assert all(match[4].strip() for match in rows)


def test_names_of_events_are_words() -> None:
    for name in logged_events():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name), name


# -- secrets


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"postgresql://u:{PASSWORD}@h:5432/d", "postgresql://u:***@h:5432/d"),
        (f"postgres://:{PASSWORD}@h/d?x=1 failed", "postgres://:***@h/d?x=1 failed"),
        ("at postgres://u:p@ss/w0rd@h/d now", "at postgres://u:***@h/d now"),
        (f"postgres://u:{PASSWORD}@h1:1,h2:2/d", "postgres://u:***@h1:1,h2:2/d"),
        (f"http://h/?to=http://u:{PASSWORD}@h", "http://h/?to=http://u:***@h"),
        (f"'http://u:{PASSWORD}@h','http://h'", "'http://u:***@h','http://h'"),
        (f"https://u:{PASSWORD}@qdrant:6334", "https://u:***@qdrant:6334"),
        (f"host=h password={PASSWORD} dbname=d", "host=h password=*** dbname=d"),
        (rf"password = 'it\'s {PASSWORD}' host=h", "password = *** host=h"),
        (f"postgres://h/d?password={PASSWORD}&sslmode=x", "postgres://h/d?password=***&sslmode=x"),
        (f"sslpassword={PASSWORD}", "sslpassword=***"),
        (f"PGPASSWORD={PASSWORD} psql", "PGPASSWORD=*** psql"),
        (f"CDC_SYNC_QDRANT__API_KEY={PASSWORD}", "CDC_SYNC_QDRANT__API_KEY=***"),
        (f"{{'api-key': '{PASSWORD}'}}", "{'api-key': ***}"),
        (f'{{"password": "{PASSWORD}"}}', '{"password": ***}'),
        (f"(('api-key', '{PASSWORD}'),)", "(('api-key', ***),)"),
    ],
)
def test_secrets_are_masked_by_their_form(text: str, masked: str) -> None:
    assert redact(text) == masked
    assert redact(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "qdrant.api_key: expected a string (file x.toml line 3).",
        "password authentication failed for user cdc_sync",
        "http://localhost:6334/collections",
        "edge:/var/lib/cdc-sync",
        "see https://example.org/a@b",
        "ALTER ROLE cdc_sync REPLICATION; -- secret of success",
    ],
)
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "unit", ["a-", "password", "x://y:", "://@", "api_key= ", "'", "password='"]
)
def test_masking_long_text_takes_no_time(unit: str) -> None:
    import time

    text = unit * 5_000
    started = time.process_time()
    redact(text)
    redact(text + "@")
    assert time.process_time() - started < 0.5


def test_known_secrets_are_masked_wherever_they_are(stream: io.StringIO) -> None:
    settings = Settings(
        source=SourceSettings.model_validate({"url": f"postgres://u:{PASSWORD}%21@h/d"}),
        qdrant=QdrantSettings.model_validate({"api_key": "the+key/of$qdrant"}),
        tables=[TableSettings(name="t")],
    )
    add_secrets(secrets_of(settings))
    log.info("odd", text=f"said {PASSWORD}! and the+key/of$qdrant", item=[f"{PASSWORD}%21"])
    entry = only(stream)
    assert entry["text"] == "said *** and ***"
    assert entry["item"] == ["***"]


def test_passwords_of_keyword_strings_are_known_secrets() -> None:
    settings = Settings(
        source=SourceSettings.model_validate({"url": r"host=h password='pass\'word1'"}),
        tables=[TableSettings(name="t")],
    )
    assert "pass'word1" in secrets_of(settings)


def test_a_field_named_like_a_secret_is_masked_whole(stream: io.StringIO) -> None:
    log.info("odd", api_key="two words", password=12345, headers={"api-key": "a b c"}, key="id")
    entry = only(stream)
    assert entry["api_key"] == "***"
    assert entry["password"] == "***"
    assert entry["headers"] == {"api-key": "***"}
    assert entry["key"] == "id"


def test_short_values_are_not_taken_for_secrets() -> None:
    add_secrets(["", "a", "cdc"])
    assert redact("cdc_sync is a word") == "cdc_sync is a word"
