"""An answer of ``/status``, written for people. What an older daemon does not say is left out."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, TypeAlias

Answer: TypeAlias = Mapping[str, object]

_MARKS: Final = {"ok": "✓", "busy": "…", "warning": "!", "critical": "✕"}
_COLOURS: Final = {"ok": "32", "busy": "34", "warning": "33", "critical": "31", "dim": "2"}
_TONES: Final = {
    "streaming": "ok", "copying": "busy", "catching_up": "busy", "stopped": "critical",
    "failed": "critical",
}  # fmt: skip
_RISKS: Final = {
    "unknown": ("dim", "no such slot"),
    "unlimited": ("warning", "no limit is set (max_slot_wal_keep_size)"),
    "low": ("ok", "low risk"),
    "raised": ("warning", "more than half"),
    "high": ("critical", "about to be lost"),
    "lost": ("critical", "lost"),
}
_BARS: Final = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH: Final = 40
_EVENTS: Final = 6
_NAME_WIDTH: Final = 40
_BAR_WIDTH: Final = 16

_Paint: TypeAlias = Callable[[str, str], str]


def status_line(answer: Answer) -> str:
    """State and lag on one line, for a log."""
    severity, title, _ = _summary(answer)
    lag = _section(answer, "lag")
    facts = [
        _clean(answer.get("time")),
        severity,
        title,
        f"lag {seconds_text(lag.get('seconds'))}, {size_text(lag.get('bytes'))}",
        f"{_whole(_section(answer, 'dead_letters').get('pending'))} dead letters",
    ]
    return "  ".join(facts)


def status_text(answer: Answer, *, width: int = 110, colour: bool = False) -> str:
    """Everything, for a terminal of ``width`` columns."""

    def paint(tone: str, text: str) -> str:
        return f"\x1b[{_COLOURS[tone]}m{text}\x1b[0m" if colour and tone in _COLOURS else text

    lines = [*_head(answer, paint), "", *_figures(answer, paint), "", *_tables(answer, paint)]
    lead = _lead(answer)
    others = _sections(answer, "attention")[0 if lead is None else 1 :]
    if others:
        title = "worth knowing" if lead is None else "needs attention too"
        lines += ["", title, *_notices(others, paint)]
    events = _sections(answer, "events")[:_EVENTS]
    if events:
        lines += ["", "recent events", *(_event(event, paint, width) for event in events)]
    return "\n".join(lines)


def _head(answer: Answer, paint: _Paint) -> list[str]:
    severity, title, text = _summary(answer)
    name = _clean(_section(answer, "pipeline").get("name"))
    up = duration_text(_float(answer.get("uptime_seconds")) or 0.0)
    mark = _MARKS.get(severity, "…")
    lines = [f"{paint(severity, f'{mark} {title}')}   {name}, up for {up}"]
    if text:
        lines.append(f"  {text}")
    lead = _lead(answer)
    if lead is not None and lead.get("remedy"):
        lines += _remedy(lead["remedy"])
    progress = _float(_section(answer, "summary").get("progress"))
    if progress is not None:
        lines.append(f"  {_bar(progress, 2 * _BAR_WIDTH)} {int(progress * 100)} %")
    versions = _section(answer, "versions")
    state = _clean(answer.get("state")).replace("_", " ")
    ways = [
        _end("Postgres", versions.get("postgres"), _section(answer, "source"), paint),
        f"cdc_sync {_clean(versions.get('cdc_sync'))} {state}",
        _end("Qdrant", versions.get("qdrant"), _section(answer, "sink"), paint),
    ]
    return [*lines, f"  {' → '.join(ways)}"]


def _lead(answer: Answer) -> Answer | None:
    """What the summary is about, where it is about something that needs attention."""
    first = next(iter(_sections(answer, "attention")), None)
    title = _section(answer, "summary").get("title")
    return first if first is not None and first.get("title") == title else None


def _end(name: str, version: object, end: Answer, paint: _Paint) -> str:
    named = f"{name} {_clean(version)}" if version else name
    if end.get("up") is None:
        return f"{named} not asked yet"
    if end["up"]:
        return f"{named} {paint('ok', '✓ answers')}"
    return f"{named} {paint('critical', '✕ does not answer')}"


def _figures(answer: Answer, paint: _Paint) -> list[str]:
    lag, history = _section(answer, "lag"), _section(answer, "lag_history")
    spark = _spark(history.get("seconds"))
    minutes = round(_SAMPLES_SHOWN * (_float(history.get("interval_seconds")) or 0) / 60)
    past = f"   {spark} {minutes} min" if spark else ""
    lines = [
        f"  lag           {seconds_text(lag.get('seconds'))}, {size_text(lag.get('bytes'))}{past}"
    ]
    slot = _section(answer, "slot")
    name = _clean(_section(answer, "pipeline").get("slot"))
    if slot:
        tone, risk = _RISKS.get(str(slot.get("risk")), _RISKS["unknown"])
        limit = slot.get("limit_bytes")
        of = f" of {size_text(limit)}" if limit is not None else ""
        used = "active" if slot.get("active") else "read by nobody"
        kept = f"{size_text(slot.get('retained_bytes'))}{of} of WAL kept"
        words = [kept, paint(tone, risk), _clean(slot.get("wal_status")), used]
        lines.append(f"  slot          {name}: {', '.join(word for word in words if word)}")
    letters = _section(answer, "dead_letters")
    pending = _whole(letters.get("pending"))
    limit = f" (stops beyond {_whole(letters['limit'])})" if letters.get("limit") else ""
    shown = paint("warning", pending) if pending != "0" else pending
    lines.append(f"  dead letters  {shown}{limit}")
    return [*lines, *_verification(_section(answer, "verification"), paint)]


def _verification(found: Answer, paint: _Paint) -> list[str]:
    if not found:
        return []
    kinds = ("missing", "extra", "different")
    tables = _sections(found, "tables")
    wrong = sum(int(_float(table.get(kind)) or 0) for table in tables for kind in kinds)
    ok = found["ok"] is True if "ok" in found else wrong == 0
    words = paint("ok", "no difference") if ok else paint("critical", f"{wrong:,} differences")
    when = _clean(found.get("finished")) or "not complete yet"
    return [f"  verified      {when}: {words}"]


def _tables(answer: Answer, paint: _Paint) -> list[str]:
    rows = [("table", "collection", "state", "copy", "changes", "dead letters")]
    tables = _sections(answer, "tables")
    for table in tables:
        name, collection = _short(table.get("name")), _short(table.get("collection"))
        state = _clean(table.get("state")).replace("_", " ")
        changes, letters = _whole(table.get("changes_applied")), _whole(table.get("dead_letters"))
        rows.append((name, collection, state, _copy(table), changes, letters))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = []
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(width) if column > 3 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        if number == 0:
            lines.append(paint("dim", "  " + "  ".join(cells).rstrip()))
            continue
        cells[2] = paint(_TONES.get(str(tables[number - 1].get("state")), "dim"), cells[2])
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _copy(table: Answer) -> str:
    done, total = _float(table.get("rows_copied")) or 0, _float(table.get("rows_estimated"))
    about = "" if table.get("rows_exact") else "~"
    state = table.get("state")
    if state == "copying":
        share = min(done / total, 1.0 if table.get("rows_exact") else 0.99) if total else None
        of = "" if total is None else f" of {about}{total:,.0f}"
        bar = "" if share is None else f"{_bar(share, _BAR_WIDTH)} {int(share * 100)} %, "
        return f"{bar}{done:,.0f}{of}{_left(table, share)}"
    if state == "pending":
        return "waits" if total is None else f"waits, {about}{total:,.0f} rows"
    return f"{done:,.0f} {'row' if done == 1 else 'rows'} copied" if done else ""


def _left(table: Answer, share: float | None) -> str:
    if table.get("waiting"):
        return f", waits: {_clean(table['waiting'])}"
    seconds = _float(table.get("copy_seconds"))
    if not share or seconds is None or seconds < 3:
        return ""
    return f", {duration_text(seconds * (1 - share) / share)} left"


def _notices(notices: Iterable[Answer], paint: _Paint) -> list[str]:
    lines = []
    for notice in notices:
        severity = _clean(notice.get("severity"))
        title = f"{_MARKS.get(severity, '!')} {_clean(notice.get('title'))}"
        lines += [f"  {paint(severity, title)}", f"    {_clean(notice.get('text'))}"]
        if notice.get("remedy"):
            lines += _remedy(notice["remedy"], "    ")
    return lines


def _remedy(remedy: object, indent: str = "  ") -> list[str]:
    """Remedies may be SQL of several lines."""
    first, *others = str(remedy).splitlines() or [""]
    return [
        f"{indent}try: {_clean(first)}",
        *(f"{indent}     {_clean(line)}" for line in others),
    ]


def _event(event: Answer, paint: _Paint, width: int) -> str:
    level = _clean(event.get("level"))
    tone = {"warning": "warning", "error": "critical", "critical": "critical"}.get(level, "dim")
    count = _float(event.get("count")) or 1
    times = f" ×{count:,.0f}" if count > 1 else ""
    fields = " ".join(
        f"{_clean(name)}={_clean(value)}" for name, value in _section(event, "fields").items()
    )
    text = f"{_clean(event.get('event'))}{times} {fields}"
    room = max(20, width - 22)
    cut = f"{text[: room - 1]}…" if len(text) > room else text
    return f"  {_clock(event.get('time'))}  {paint(tone, f'{level:<8}')}  {cut}".rstrip()


# -- values


_SAMPLES_SHOWN: Final = 120


def _summary(answer: Answer) -> tuple[str, str, str]:
    found = _section(answer, "summary")
    title = _clean(found.get("title")) or _clean(answer.get("state")).replace("_", " ")
    fallback = "ok" if answer.get("ready") else "warning"
    return _clean(found.get("severity")) or fallback, title, _clean(found.get("text"))


def _spark(values: object) -> str:
    """The newest samples on the right, each the highest of its neighbours."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        return ""
    samples = [_float(value) for value in values][-_SAMPLES_SHOWN:]
    step = _SAMPLES_SHOWN // _SPARK_WIDTH
    groups = [samples[max(0, end - step) : end] for end in range(len(samples), 0, -step)][::-1]
    highest = [max((v for v in group if v is not None), default=None) for group in groups]
    top = max((value for value in highest if value is not None), default=0.0)
    if not top:
        return _BARS[0] * len(highest)
    return "".join(
        " " if value is None else _BARS[min(7, int(value / top * 7.999))] for value in highest
    )


def _bar(share: float, width: int) -> str:
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)


def size_text(size: object) -> str:
    """Bytes in a unit that people read; Postgres's own units are powers of 1024 too."""
    value = _float(size)
    if value is None:
        return "not known"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def seconds_text(seconds: object) -> str:
    """A lag: milliseconds below a second."""
    value = _float(seconds)
    if value is None:
        return "not known"
    if value < 0.0005:
        return "0 s"
    if value < 1:
        return f"{max(1, round(value * 1000))} ms"
    return f"{value:.1f} s" if value < 60 else duration_text(value)


def duration_text(seconds: float) -> str:
    """``4 min 10 s``, ``3 h 5 min``, ``2 days 3 h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole // 60 % 60} min"
    days = whole // 86400
    return f"{days} day{'' if days == 1 else 's'} {whole // 3600 % 24} h"


def _clock(moment: object) -> str:
    try:
        found = datetime.datetime.fromisoformat(str(moment).replace("Z", "+00:00"))
    except ValueError:
        return "--:--:--"
    return found.astimezone().strftime("%H:%M:%S")


def _clean(value: object) -> str:
    """A text on one line, without terminal control sequences; names come from the database."""
    text = "" if value is None else str(value)
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )


def _short(value: object) -> str:
    text = _clean(value)
    return text if len(text) <= _NAME_WIDTH else f"{text[: _NAME_WIDTH - 1]}…"


def _whole(value: object) -> str:
    number = _float(value)
    return "-" if number is None else f"{number:,.0f}"


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _section(answer: Answer, name: str) -> Answer:
    found = answer.get(name)
    return found if isinstance(found, Mapping) else {}


def _sections(answer: Answer, name: str) -> list[Answer]:
    found = answer.get(name)
    entries = found if isinstance(found, list) else []
    return [entry for entry in entries if isinstance(entry, Mapping)]
