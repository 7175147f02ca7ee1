"""Logs as events: a fixed snake_case name, data in fields, through the standard library.

    log = get_logger(__name__)
    log.info("batch_applied", table="public.items", rows=400, seconds=0.02)

On a terminal an event is an aligned line, elsewhere a JSON object: ``time`` (UTC, RFC 3339),
``level``, ``logger``, ``event``, then the fields, then ``exception`` (the trace) when there is one.
Records of other libraries take the same way, with their message as the event.

- :func:`log_context` adds fields to whatever is logged inside it, across awaits.
- The same event about the same table and of the same kind more than :data:`REPEATS_A_MINUTE` times
  a minute is counted instead of written; a ``log_repeats_suppressed`` event says how many. Whoever
  asks for debug events gets all of those.
- Secrets are masked (see ``redaction.py``), values of fields included. Rows never belong into a
  field.

The daemon calls :func:`configure_logging` once a process; nothing else touches handlers.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import enum
import logging
import os
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TextIO

import orjson

from cdc_sync.config import LogSettings
from cdc_sync.ops.redaction import MASK, redact
from cdc_sync.pgoutput.lsn import Lsn

LogValue = str | int | float | bool | None | BaseException | object

REPEATS_A_MINUTE: Final = 20
_WINDOW_SECONDS: Final = 60.0
_EVENT_WIDTH: Final = 28
_OWN: Final = "cdc_sync"
_RESERVED: Final = frozenset({"time", "level", "logger", "event", "exception"})

#: Other libraries that say too much at our level. Below WARNING the HTTP ones also write headers,
#: and so API keys.
_QUIET_LOGGERS: Final = (
    "httpx",
    "httpcore",
    "hpack",
    "h2",
    "asyncio",
    "grpc",
    "urllib3",
    "tzlocal",
)

_context: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar(
    "cdc_sync_log_context", default=types.MappingProxyType({})
)


class EventLogger:
    """A logger of events.

    ``**fields`` are JSON values; anything else is written as ``str()`` has it.
    """

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def is_enabled_for(self, level: int) -> bool:
        """Whether events of this level (of :mod:`logging`) are written."""
        return self._logger.isEnabledFor(level)

    def debug(self, event: str, /, **fields: LogValue) -> None:
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, /, **fields: LogValue) -> None:
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, /, **fields: LogValue) -> None:
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, /, **fields: LogValue) -> None:
        self._log(logging.ERROR, event, fields)

    def exception(self, event: str, /, **fields: LogValue) -> None:
        """An error with the trace of the exception being handled."""
        self._log(logging.ERROR, event, fields, exc_info=True)

    def _log(
        self, level: int, event: str, fields: Mapping[str, LogValue], *, exc_info: bool = False
    ) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(
                level, event, extra={"event_fields": fields}, exc_info=exc_info, stacklevel=3
            )


def get_logger(name: str) -> EventLogger:
    """The event logger of a module; ``name`` is its ``__name__``."""
    return EventLogger(logging.getLogger(name))


@contextlib.contextmanager
def log_context(**fields: LogValue) -> Iterator[None]:
    """Add fields to every event logged inside."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def configure_logging(
    settings: LogSettings,
    stream: TextIO | None = None,
    *,
    recent: logging.Handler | None = None,
) -> None:
    """Send everything logged in this process to ``stream`` (default: stderr).

    ``recent`` gets our own events of level info and above too, even where less is written. Replaces
    what an earlier call set up.
    """
    target = sys.stderr if stream is None else stream
    handler = EventHandler(target)
    handler.setFormatter(_formatter(settings, target))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, EventHandler):
            root.removeHandler(old)
            old.close()
    root.addHandler(handler)
    root.setLevel(settings.level.upper())
    handler.setLevel(root.level)
    _keep_recent(recent, root.level)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.captureWarnings(True)


def _keep_recent(recent: logging.Handler | None, level: int) -> None:
    own = logging.getLogger(_OWN)
    for old in own.handlers[:]:
        own.removeHandler(old)
    own.setLevel(logging.NOTSET if recent is None else min(level, logging.INFO))
    if recent is not None:
        own.addHandler(recent)


def _formatter(settings: LogSettings, stream: TextIO) -> logging.Formatter:
    terminal = stream.isatty()
    if settings.format == "console" or (settings.format == "auto" and terminal):
        return ConsoleFormatter(colour=terminal and not os.environ.get("NO_COLOR"))
    return JsonFormatter()


# -- formatters


def record_fields(record: logging.LogRecord) -> dict[str, object]:
    """Context and fields of a record; a field named like one of ours gets an underscore."""
    own = getattr(record, "event_fields", None)
    merged = {**_context.get(), **(own if isinstance(own, Mapping) else {})}
    return {
        f"{key}_" if key in _RESERVED else key: _named(key, value, 0)
        for key, value in merged.items()
    }


def _plain(value: object, depth: int = 0) -> object:
    """A value as JSON has it, secrets masked."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value, depth)
    if isinstance(value, int) and not isinstance(value, Lsn):
        return int(value) if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, Mapping) and depth < 4:
        return {_text(key): _named(_text(key), item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset) and depth < 4:
        return [_plain(item, depth + 1) for item in value]
    return _text(value)


def _named(name: str, value: object, depth: int) -> object:
    """A value with a name, which may be what tells that it is a secret."""
    if value is not None and redact(f"{name}=x") != f"{name}=x":
        return MASK
    return _plain(value, depth)


def _text(value: object) -> str:
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception as error:  # noqa: BLE001 - a log line must never raise, whatever __str__ does
        text = f"<{type(value).__name__}: {type(error).__name__} in str()>"
    # Lone surrogates (undecodable file names) cannot be encoded.
    return redact(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def event_name(record: logging.LogRecord) -> str:
    """The event of a record; of another library's, its message."""
    try:
        return _text(record.getMessage())
    except (TypeError, ValueError, KeyError):
        return _text(record.msg)  # another library's arguments do not fit its format


def _trace(record: logging.LogRecord) -> str | None:
    parts = []
    if record.exc_info and record.exc_info[1] is not None:
        parts.append("".join(traceback.format_exception(record.exc_info[1])).rstrip())
    if record.stack_info:
        parts.append(record.stack_info)
    return _text("\n".join(parts)) if parts else None


def rfc3339(seconds: float) -> str:
    """A Unix time as all of our JSON has it: UTC, milliseconds."""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": rfc3339(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": event_name(record),
            **record_fields(record),
        }
        if trace := _trace(record):
            entry["exception"] = trace
        return orjson.dumps(entry).decode()


_COLOURS: Final = {
    logging.DEBUG: "\x1b[2m",
    logging.INFO: "\x1b[32m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[31;1m",
}
_RESET: Final = "\x1b[0m"
_DIM: Final = "\x1b[2m"
_BOLD: Final = "\x1b[1m"


class ConsoleFormatter(logging.Formatter):
    """An aligned line for people; control characters in values are escaped."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.UTC).astimezone()
        clock = moment.strftime("%H:%M:%S.%f")[:-3]
        level = f"{record.levelname.lower():<8}"
        event = _one_line(event_name(record))
        fields = [
            f"{self._paint(_DIM, key + '=')}{_console_value(value)}"
            for key, value in record_fields(record).items()
        ]
        padded = f"{event:<{_EVENT_WIDTH}}" if fields else event
        head = f"{self._paint(_DIM, clock)} {self._paint(_COLOURS.get(record.levelno, ''), level)}"
        line = " ".join([f"{head} {self._paint(_BOLD, padded)}", *fields])
        trace = _trace(record)
        return f"{line}\n{trace}" if trace else line

    def _paint(self, code: str, text: str) -> str:
        return f"{code}{text}{_RESET}" if self._colour and code else text


def _console_value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, str):
        return _one_line(orjson.dumps(value).decode())
    text = _one_line(value)
    return f'"{text}"' if not text or " " in text else text


def _one_line(text: str) -> str:
    """Text without line breaks and terminal control sequences."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


# -- repeats


#: Event, table, kind, level.
_Key = tuple[str, str, str, int]


@dataclass(slots=True)
class _Window:
    """A minute of one event about one table, of one kind."""

    opened: float
    logger: str
    level: int
    written: int = 0
    suppressed: int = 0


class RepeatLimiter:
    """Counts repeats of an event about a table (field ``table``), of a kind (field ``kind``).

    Not thread-safe: the lock of the handler guards it.
    """

    def __init__(self, limit: int = REPEATS_A_MINUTE) -> None:
        self._limit = limit
        self._windows: dict[_Key, _Window] = {}

    def admit(self, record: logging.LogRecord, now: float) -> bool:
        """Whether to write the record. ``now`` is monotonic, in seconds."""
        if record.levelno <= logging.DEBUG:
            return True
        own = getattr(record, "event_fields", None)
        merged = {**_context.get(), **(own if isinstance(own, Mapping) else {})}
        about = (str(merged.get("table", "")), str(merged.get("kind", "")))
        key = (str(record.msg), *about, record.levelno)
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window(now, record.name, record.levelno)
        if window.written < self._limit:
            window.written += 1
            return True
        window.suppressed += 1
        return False

    @property
    def waiting(self) -> bool:
        """Whether something was suppressed that has not been told yet."""
        return any(window.suppressed for window in self._windows.values())

    def due(self, now: float, *, everything: bool = False) -> list[logging.LogRecord]:
        """Summaries of windows that have ended, which are then forgotten."""
        ended = [
            (key, window)
            for key, window in self._windows.items()
            if everything or now - window.opened >= _WINDOW_SECONDS
        ]
        for key, _ in ended:
            del self._windows[key]
        return [_summary(key, window) for key, window in ended if window.suppressed]


def _summary(key: _Key, window: _Window) -> logging.LogRecord:
    event, table, kind, level = key
    record = logging.LogRecord(
        window.logger, level, __file__, 0, "log_repeats_suppressed", None, None
    )
    fields: dict[str, object] = {"repeated_event": event, "count": window.suppressed}
    about = {name: value for name, value in (("table", table), ("kind", kind)) if value}
    record.event_fields = {**fields, **about}
    return record


class EventHandler(logging.Handler):
    """Writes records, whatever their origin, and summaries of repeats.

    A summary is written when its minute is over, or when the handler is closed.
    """

    def __init__(self, stream: TextIO, limiter: RepeatLimiter | None = None) -> None:
        super().__init__()
        self._stream = stream
        self._limiter = limiter or RepeatLimiter()
        self._clock = time.monotonic
        self._timer: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            now = self._clock()
            self._summarise(now)
            if self._limiter.admit(record, now):
                self._write(record)
            else:
                self._summarise_later()
        except Exception:  # noqa: BLE001 - logging's contract: report to stderr, never to the caller
            self.handleError(record)

    def close(self) -> None:
        # ValueError, OSError: the stream may be closed already.
        with self.lock or threading.RLock(), contextlib.suppress(ValueError, OSError):
            if self._timer is not None:
                self._timer.cancel()
            self._summarise(self._clock(), everything=True)
        super().close()

    def _summarise(self, now: float, *, everything: bool = False) -> None:
        for summary in self._limiter.due(now, everything=everything):
            self._write(summary)

    def _summarise_later(self) -> None:
        """Whatever is suppressed is told even if nothing more is logged."""
        if self._timer is None:
            self._timer = threading.Timer(_WINDOW_SECONDS, self._on_timer)
            self._timer.daemon = True
            self._timer.start()

    def _on_timer(self) -> None:
        with self.lock or threading.RLock(), contextlib.suppress(ValueError, OSError):
            self._timer = None
            self._summarise(self._clock())
            if self._limiter.waiting:
                self._summarise_later()

    def _write(self, record: logging.LogRecord) -> None:
        self._stream.write(self.format(record) + "\n")
        self._stream.flush()
