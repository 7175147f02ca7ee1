"""Decoders of dates, times and intervals.

Sources: src/backend/utils/adt/{date,timestamp,datetime}.c of PostgreSQL; text output under
datestyle ISO, timezone UTC and intervalstyle iso_8601.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from datetime import date, datetime, timedelta
from typing import Final, cast

from cdc_sync.mapping.decoding import Codec, Decoder, malformed, plain

_INT32: Final = struct.Struct(">i")
_INT64: Final = struct.Struct(">q")
_TIMETZ: Final = struct.Struct(">qi")
_INTERVAL: Final = struct.Struct(">qii")

_INT64_OF: Final = cast("Callable[[bytes], tuple[int]]", _INT64.unpack)

_EPOCH: Final = datetime(2000, 1, 1)
_EPOCH_ORDINAL: Final = date(2000, 1, 1).toordinal()
_DAY_MICROSECONDS: Final = 86_400_000_000
#: Days whose text is kept: eleven years.
_KEPT_DAYS: Final = 4096
_DATE_INFINITIES: Final = {(1 << 31) - 1: "infinity", -(1 << 31): "-infinity"}
_TIMESTAMP_INFINITIES: Final = {(1 << 63) - 1: "infinity", -(1 << 63): "-infinity"}
_INTERVAL_INFINITIES: Final = {
    ((1 << 63) - 1, (1 << 31) - 1, (1 << 31) - 1): "infinity",
    (-(1 << 63), -(1 << 31), -(1 << 31)): "-infinity",
}
#: Postgres keeps time zone displacements below 16 hours (TZDISP_LIMIT).
_MAX_OFFSET_SECONDS: Final = 16 * 3600

_DATE_TEXT: Final = re.compile(rb"[0-9]{4,7}-[0-9]{2}-[0-9]{2}(?: BC)?|-?infinity")
_TIMESTAMP_TEXT: Final = re.compile(
    rb"([0-9]{4,6}-[0-9]{2}-[0-9]{2}) ([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,6}))?(\+00)?( BC)?"
)
_TIME_TEXT: Final = re.compile(rb"([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,6}))?")
_TIMETZ_TEXT: Final = re.compile(
    rb"([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,6}))?([-+][0-9]{2})(:[0-9]{2})?(:[0-9]{2})?"
)
_INTERVAL_TEXT: Final = re.compile(
    rb"P(?:-?[0-9]+[YMD])*(?:T(?:-?[0-9]+[HM])*(?:-?[0-9]+(?:\.[0-9]+)?S)?)?|-?infinity"
)


def _civil(days: int) -> tuple[str, str]:
    """Return date and era ("" or " BC") of days since 2000-01-01, proleptic Gregorian, of any year.

    Python's own dates end at the years 1 and 9999. The Gregorian calendar repeats every 400 years
    (146,097 days).
    """
    cycles, day = divmod(days + _EPOCH_ORDINAL - 1, 146_097)
    in_cycle = date.fromordinal(day + 1)
    year = in_cycle.year + 400 * cycles
    era = ""
    if year <= 0:
        year, era = 1 - year, " BC"
    return f"{year:04d}-{in_cycle.month:02d}-{in_cycle.day:02d}", era


def _clock(microseconds: int) -> str:
    seconds, fraction = divmod(microseconds, 1_000_000)
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    text = f"{hour:02d}:{minute:02d}:{second:02d}"
    return f"{text}.{fraction:06d}" if fraction else text


def _date_binary(data: bytes) -> str:
    days: int = _INT32.unpack(data)[0]
    if days in _DATE_INFINITIES:
        return _DATE_INFINITIES[days]
    return "".join(_civil(days))


def _date_text(data: bytes) -> str:
    if _DATE_TEXT.fullmatch(data) is None:
        raise malformed()
    return data.decode("ascii")


def timestamp_binary(data: bytes) -> str:
    """Return the RFC 3339 string of a ``timestamp`` or ``timestamptz`` (Int64 microseconds since
    2000-01-01 UTC).
    """
    microseconds: int = _INT64.unpack(data)[0]
    try:
        return (_EPOCH + timedelta(0, 0, microseconds)).isoformat() + "Z"
    except OverflowError:
        pass  # infinities, and years outside 1..9999
    if microseconds in _TIMESTAMP_INFINITIES:
        return _TIMESTAMP_INFINITIES[microseconds]
    days, time = divmod(microseconds, _DAY_MICROSECONDS)
    day, era = _civil(days)
    return f"{day}T{_clock(time)}Z{era}"


class _Days(dict[int, bytes]):
    """``YYYY-MM-DDT`` by the day since 2000-01-01; empty outside the years 1 to 9999."""

    def __missing__(self, day: int) -> bytes:
        try:
            text = f"{date.fromordinal(day + _EPOCH_ORDINAL).isoformat()}T".encode("ascii")
        except (ValueError, OverflowError):
            return b""
        if len(self) >= _KEPT_DAYS:
            self.clear()
        self[day] = text
        return text


_day_text: Final = _Days().__getitem__
_MINUTE_TEXTS: Final = tuple(b"%02d:%02d:" % divmod(minute, 60) for minute in range(24 * 60))
_SECOND_TEXTS: Final = tuple(b"%02d" % second for second in range(60))
_WHOLE_SECOND_TEXTS: Final = tuple(b"%02dZ" % second for second in range(60))


def timestamp_ascii(data: bytes) -> bytes:
    """Return the bytes of :func:`timestamp_binary`'s string: a third of its time."""
    (microseconds,) = _INT64_OF(data)
    day, rest = divmod(microseconds, _DAY_MICROSECONDS)
    start = _day_text(day)
    if not start:
        return timestamp_binary(data).encode("ascii")
    seconds, fraction = divmod(rest, 1_000_000)
    minute, second = divmod(seconds, 60)
    if fraction:
        return b"%b%b%b.%06dZ" % (start, _MINUTE_TEXTS[minute], _SECOND_TEXTS[second], fraction)
    return start + _MINUTE_TEXTS[minute] + _WHOLE_SECOND_TEXTS[second]


def _with_fraction(clock: bytes, fraction: bytes | None) -> str:
    text = clock.decode("ascii")
    # Postgres leaves trailing zeros out; we write six digits or none.
    return text if fraction is None else f"{text}.{fraction.decode('ascii').ljust(6, '0')}"


def _timestamp_text(with_zone: bool) -> Decoder:
    def text(data: bytes) -> str:
        if data in (b"infinity", b"-infinity"):
            return data.decode("ascii")
        match = _TIMESTAMP_TEXT.fullmatch(data)
        if match is None or (match[4] is not None) is not with_zone:
            raise malformed()
        era = " BC" if match[5] else ""
        return f"{match[1].decode('ascii')}T{_with_fraction(match[2], match[3])}Z{era}"

    return text


def _time_of_day(microseconds: int) -> str:
    if not 0 <= microseconds <= _DAY_MICROSECONDS:
        raise malformed()
    return _clock(microseconds)


def _time_binary(data: bytes) -> str:
    return _time_of_day(_INT64.unpack(data)[0])


def _time_text(data: bytes) -> str:
    match = _TIME_TEXT.fullmatch(data)
    if match is None:
        raise malformed()
    return _with_fraction(match[1], match[2])


def _timetz_binary(data: bytes) -> str:
    microseconds, west = _TIMETZ.unpack(data)
    if abs(west) >= _MAX_OFFSET_SECONDS:
        raise malformed()
    sign = "-" if west > 0 else "+"
    minutes, second = divmod(abs(west), 60)
    hour, minute = divmod(minutes, 60)
    offset = f"{sign}{hour:02d}:{minute:02d}"
    return f"{_time_of_day(microseconds)}{offset}" + (f":{second:02d}" if second else "")


def _timetz_text(data: bytes) -> str:
    match = _TIMETZ_TEXT.fullmatch(data)
    if match is None:
        raise malformed()
    offset = match[3] + (match[4] or b":00") + (match[5] or b"")
    return _with_fraction(match[1], match[2]) + offset.decode("ascii")


def _truncated(dividend: int, divisor: int) -> tuple[int, int]:
    """Return quotient and remainder rounded towards zero, as C divides."""
    quotient, remainder = divmod(abs(dividend), divisor)
    return (-quotient, -remainder) if dividend < 0 else (quotient, remainder)


def _interval_binary(data: bytes) -> str:
    time, days, months = _INTERVAL.unpack(data)
    if (time, days, months) in _INTERVAL_INFINITIES:
        return _INTERVAL_INFINITIES[time, days, months]
    year, month = _truncated(months, 12)
    hour, rest = _truncated(time, 3_600_000_000)
    minute, rest = _truncated(rest, 60_000_000)
    second, fraction = _truncated(rest, 1_000_000)
    upper = "".join(f"{n}{unit}" for n, unit in ((year, "Y"), (month, "M"), (days, "D")) if n)
    lower = "".join(f"{n}{unit}" for n, unit in ((hour, "H"), (minute, "M")) if n)
    if second or fraction:
        sign = "-" if rest < 0 else ""
        decimals = f".{abs(fraction):06d}".rstrip("0") if fraction else ""
        lower += f"{sign}{abs(second)}{decimals}S"
    if not upper and not lower:
        return "PT0S"
    return f"P{upper}T{lower}" if lower else f"P{upper}"


def _interval_text(data: bytes) -> str:
    if _INTERVAL_TEXT.fullmatch(data) is None:
        raise malformed()
    return data.decode("ascii")


#: ``pg_catalog`` types by name.
CODECS: Final[Mapping[str, Codec]] = {
    "date": Codec(plain(_date_binary), plain(_date_text)),
    "timestamp": Codec(plain(timestamp_binary), plain(_timestamp_text(False))),
    "timestamptz": Codec(plain(timestamp_binary), plain(_timestamp_text(True))),
    "time": Codec(plain(_time_binary), plain(_time_text)),
    "timetz": Codec(plain(_timetz_binary), plain(_timetz_text)),
    "interval": Codec(plain(_interval_binary), plain(_interval_text)),
}
