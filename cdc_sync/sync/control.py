"""The control channel: requests to a running pipeline, written into the WAL as logical messages.

    SELECT pg_logical_emit_message(true, 'cdc_sync',
        '{"resync": {"pipeline": "default", "table": "public.docs"}}');
    SELECT pg_logical_emit_message(true, 'cdc_sync',
        '{"resync": {"pipeline": "default", "table": "public.docs", "keys": [["1"], ["2"]]}}');

The first asks to read the table again as a whole, the second to read the rows with these keys
again, which also removes the points of keys that have no row. Keys are values in Postgres's text
format, in key order.

    {"rebuild": {"pipeline": "default", "table": "public.docs", "token": "..."}}

marks the position at which the pipeline goes over to a rebuilt collection
(:mod:`cdc_sync.sync.swaps`), if a rebuild with this token is on record.

Any role may write such messages, so none is trusted (R49): a request can do no more than have the
pipeline read its own tables again, or its own records. It holds no SQL, is checked to the last
field, and is limited in rate. Rows of a table that are asked for faster than that are read with the
table as a whole, so a request for rows is refused only when whole tables are asked for too often.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import orjson

from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.metrics import ControlOutcome, Metrics
from cdc_sync.pgoutput.messages import LogicalMessage
from cdc_sync.sync.routing import PlannedTable

log = get_logger(__name__)

#: The prefix of our messages.
PREFIX: Final = "cdc_sync"
MAX_CONTENT_BYTES: Final = 1 << 20
MAX_KEYS: Final = 500
#: INDEX_MAX_KEYS of Postgres.
MAX_KEY_COLUMNS: Final = 32
#: An index entry has 2,700 bytes at the most, compressed.
MAX_VALUE_CHARACTERS: Final = 8192
_MAX_NAME_CHARACTERS: Final = 512
_TOKEN: Final = re.compile(r"[0-9a-f]{32}")

#: Whole tables: so many at once, then one in so many seconds, a table.
TABLE_BURST: Final = 5
_SECONDS_A_TABLE: Final = 300.0
#: Rows: so many keys at once, then so many a second, a table.
KEY_BURST: Final = 60_000
KEYS_A_SECOND: Final = 1_000
#: Rebuilds: so many looks at the records at once, then one in so many seconds, a table.
SWAP_BURST: Final = 10
_SECONDS_A_SWAP: Final = 10.0
#: What a message counts at the least: reading a single row takes a round trip too.
_LEAST_KEYS: Final = 100

Key: TypeAlias = tuple[str, ...]


class InvalidRequestError(ValueError):
    """A message with our prefix that is no request. Its text holds nothing of the message."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it stands in a message. ``table`` is ``schema.table``, unquoted; ``keys`` is
    None for the table as a whole."""

    pipeline: str
    table: str
    keys: tuple[Key, ...] | None = None


@dataclass(frozen=True, slots=True)
class ResyncTable:
    """An accepted request to read a table again as a whole."""

    planned: PlannedTable

    @property
    def oid(self) -> int:
        """The table's."""
        return self.planned.plan.oid


@dataclass(frozen=True, slots=True)
class ResyncRows:
    """Rows to read again. ``keys``: distinct, each with a value in text format for every key
    column, in key order. ``retry``: nobody has asked for them; they are dead letters to be tried
    again."""

    planned: PlannedTable
    keys: tuple[Key, ...]
    retry: bool = False

    @property
    def oid(self) -> int:
        """The table's."""
        return self.planned.plan.oid


@dataclass(frozen=True, slots=True)
class SwapRequest(ResyncRows):
    """A place in the stream at which a table may go over to a rebuilt collection: what comes before
    it is written first, and nothing after it. As a request for rows it asks for none."""

    token: str = ""


Accepted: TypeAlias = ResyncTable | ResyncRows


@dataclass(frozen=True, slots=True)
class RebuildMessage:
    """A message of a rebuild: ``table`` as of a :class:`Request`, ``token`` names the rebuild's
    request on record."""

    pipeline: str
    table: str
    token: str


def rebuild_content(message: RebuildMessage) -> bytes:
    """The content of a message that :func:`parse_message` reads."""
    body = {"pipeline": message.pipeline, "table": message.table, "token": message.token}
    return json.dumps({"rebuild": body}, separators=(",", ":")).encode("ascii")


def request_content(request: Request) -> bytes:
    """The content of the message that makes a request; :func:`parse_message` reads it.

    In ASCII: a message comes in the database's encoding.
    """
    body: dict[str, object] = {"pipeline": request.pipeline, "table": request.table}
    if request.keys is not None:
        body["keys"] = request.keys
    return json.dumps({"resync": body}, separators=(",", ":")).encode("ascii")


def parse_message(prefix: str, content: bytes) -> Request | RebuildMessage | None:
    """Read a message; None if its prefix is not ours. Raises :class:`InvalidRequestError`."""
    if prefix != PREFIX:
        return None
    if len(content) > MAX_CONTENT_BYTES:
        raise InvalidRequestError(f"it is longer than {MAX_CONTENT_BYTES} bytes")
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError:
        # Not chained: the error quotes the document.
        raise InvalidRequestError("it is not JSON") from None
    if isinstance(document, dict) and "rebuild" in document:
        body = _fields(_fields(document, {"rebuild"})["rebuild"], {"pipeline", "table", "token"})
        return RebuildMessage(_name(body["pipeline"]), _name(body["table"]), _token(body["token"]))
    body = _fields(_fields(document, {"resync"})["resync"], {"pipeline", "table"}, {"keys"})
    return Request(
        _name(body["pipeline"]),
        _name(body["table"]),
        _keys(body["keys"]) if "keys" in body else None,
    )


def _fields(
    value: object, required: set[str], optional: Iterable[str] = ()
) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise InvalidRequestError("an object is missing")
    if not required <= value.keys():
        raise InvalidRequestError(
            f"a field is missing: {', '.join(sorted(required))} must be there"
        )
    if not value.keys() <= required | set(optional):
        raise InvalidRequestError("there is a field that is not known")
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME_CHARACTERS:
        raise InvalidRequestError("a name is not a string of a name's length")
    return value


def _token(value: object) -> str:
    if not isinstance(value, str) or _TOKEN.fullmatch(value) is None:
        raise InvalidRequestError("`token` is not 32 hexadecimal digits")
    return value


def _keys(value: object) -> tuple[Key, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_KEYS:
        raise InvalidRequestError(f"`keys` is not a list of 1 to {MAX_KEYS} keys")
    keys = tuple(dict.fromkeys(map(_key, value)))
    if len({len(key) for key in keys}) > 1:
        raise InvalidRequestError("keys differ in the number of their values")
    return keys


def _key(value: object) -> Key:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_KEY_COLUMNS:
        raise InvalidRequestError(f"a key is not a list of 1 to {MAX_KEY_COLUMNS} values")
    for part in value:
        if not isinstance(part, str) or len(part) > MAX_VALUE_CHARACTERS or "\0" in part:
            raise InvalidRequestError(
                f"a key's value is not a string of up to {MAX_VALUE_CHARACTERS} characters without "
                "NUL"
            )
    return tuple(value)


class TokenBucket:
    """Lets ``burst`` tokens through at once, and ``a_second`` from then on."""

    def __init__(self, burst: float, a_second: float, clock: Callable[[], float]) -> None:
        self._burst = burst
        self._a_second = a_second
        self._clock = clock
        self._tokens = burst
        self._filled = clock()

    def take(self, tokens: float) -> bool:
        """Take tokens, if so many are there."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._a_second)
        self._filled = now
        if tokens > self._tokens:
            return False
        self._tokens -= tokens
        return True


@dataclass(slots=True)
class _Limits:
    tables: TokenBucket
    keys: TokenBucket
    swaps: TokenBucket


class ControlChannel:
    """Decides which messages are requests to this pipeline, and which of those are granted.

    ``tables()`` gives the pipeline's tables with the plans in force; ``follows`` names another
    pipeline whose messages about rebuilds concern this one, too.
    """

    def __init__(
        self,
        pipeline: str,
        tables: Callable[[], Iterable[PlannedTable]],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        *,
        follows: str | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._follows = follows
        self._tables = tables
        self._metrics = metrics
        self._clock = clock
        self._limits: dict[int, _Limits] = {}

    def accept(self, message: LogicalMessage) -> Accepted | None:
        """Return what a message asks for; None if it is not for this pipeline, or refused."""
        if message.prefix != PREFIX:
            return None
        try:
            request = parse_message(message.prefix, message.content)
            if request is None or not self._concerns(request):
                return None
            if not message.transactional:
                # Such a message stands even if its transaction is rolled back, and its place
                # between the changes says nothing.
                raise InvalidRequestError("it was not written as transactional")
        except InvalidRequestError as error:
            self._refuse("invalid", str(error))
            return None
        planned = next((p for p in self._tables() if p.name == request.table), None)
        if planned is None:
            self._refuse("unknown_table", "it names no table of this pipeline")
            return None
        if isinstance(request, RebuildMessage):
            return self._swap(planned, request.token)
        if request.keys is not None and len(request.keys[0]) != len(planned.plan.key):
            self._refuse("invalid", f"a key has {len(planned.plan.key)} values", planned)
            return None
        return self._limited(planned, request.keys)

    def _concerns(self, request: Request | RebuildMessage) -> bool:
        if isinstance(request, RebuildMessage) and self._follows is not None:
            return request.pipeline == self._follows
        return request.pipeline == self._pipeline

    def _swap(self, planned: PlannedTable, token: str) -> Accepted | None:
        if not self._limits_of(planned).swaps.take(1):
            self._refuse("limited", "the table was asked for too often", planned)
            return None
        # Whether it is granted is seen once the stream is there.
        return SwapRequest(planned, (), retry=True, token=token)

    def _limits_of(self, planned: PlannedTable) -> _Limits:
        limits = self._limits.get(planned.plan.oid)
        if limits is None:
            limits = self._limits[planned.plan.oid] = _Limits(
                TokenBucket(TABLE_BURST, 1 / _SECONDS_A_TABLE, self._clock),
                TokenBucket(KEY_BURST, KEYS_A_SECOND, self._clock),
                TokenBucket(SWAP_BURST, 1 / _SECONDS_A_SWAP, self._clock),
            )
        return limits

    def _limited(self, planned: PlannedTable, keys: tuple[Key, ...] | None) -> Accepted | None:
        limits = self._limits_of(planned)
        if keys is not None and limits.keys.take(max(len(keys), _LEAST_KEYS)):
            self._metrics.control_requests["rows"].inc()
            log.info("resync_requested", table=planned.name, keys=len(keys))
            return ResyncRows(planned, keys)
        if not limits.tables.take(1):
            self._refuse("limited", "the table was asked for too often", planned)
            return None
        self._metrics.control_requests["table"].inc()
        log.info(
            "resync_requested",
            table=planned.name,
            reason="as a whole" if keys is None else "as a whole: too many rows were asked for",
        )
        return ResyncTable(planned)

    def _refuse(
        self, outcome: ControlOutcome, reason: str, planned: PlannedTable | None = None
    ) -> None:
        self._metrics.control_requests[outcome].inc()
        if planned is None:
            # Nothing of the message itself: whoever wrote it could write into the log.
            log.warning("request_refused", reason=reason)
        else:
            log.warning("request_refused", table=planned.name, reason=reason)
