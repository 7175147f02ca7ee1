"""The status page as it is served, and what ``/status`` says for it: summary, attention, history,
events."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import logging
import re
import time
from collections.abc import Iterator

import pytest

from cdc_sync.ops.attention import Severity, SlotFacts
from cdc_sync.ops.http import HttpServer
from cdc_sync.ops.lag_history import SAMPLE_SECONDS, SAMPLES, LagHistory
from cdc_sync.ops.logging import EventLogger
from cdc_sync.ops.page import status_page
from cdc_sync.ops.recent_events import KEPT_EVENTS, RecentEvents
from tests.support.status_scenes import MIB, Scene, copying, hostile, served, streaming, told


@pytest.fixture
def scene() -> Scene:
    return streaming()


@pytest.fixture
def server(scene: Scene) -> Iterator[HttpServer]:
    with served(scene) as running:
        yield running


def get(server: HttpServer, path: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=30)
    connection.request("GET", path)
    response = connection.getresponse()
    try:
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def summary(scene: Scene) -> tuple[object, object]:
    found = told(scene)["summary"]
    assert isinstance(found, dict)
    return found["severity"], found["title"]


def attention(scene: Scene) -> list[tuple[str, str]]:
    found = told(scene)["attention"]
    assert isinstance(found, list)
    return [(entry["severity"], entry["title"]) for entry in found]


# -- the page


def test_the_page_is_whole_and_asks_nobody_else(server: HttpServer) -> None:
    status, headers, body = get(server, "/")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    text = body.decode()
    # Names of namespaces are no addresses that are asked.
    assert set(re.findall(r"https?://[^\s\"'`]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(img|link|script|iframe|object|embed)[^>]+src=", text)
    assert re.findall(r"<link[^>]+>", text) == ['<link rel="icon" id="icon" href="data:,">']
    assert len(body) < 64 << 10


def test_the_policy_allows_the_page_and_nothing_else(server: HttpServer) -> None:
    _, headers, body = get(server, "/")
    allowed = dict(
        part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; ") if " " in part
    )
    for tag, directive in ((b"script", "script-src"), (b"style", "style-src")):
        (content,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        assert allowed[directive] == f"'sha256-{digest}'"
    assert allowed["default-src"] == "'none'"
    assert allowed["connect-src"] == "'self'"
    assert allowed["frame-ancestors"] == allowed["base-uri"] == allowed["form-action"] == "'none'"
    assert allowed["require-trusted-types-for"] == "'script'"
    assert "unsafe" not in headers["Content-Security-Policy"]


def test_the_page_never_parses_text_as_markup() -> None:
    page = status_page().body.decode()
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in page
    assert not re.search(r"\son[a-z]+=", page), "handlers in attributes are not allowed to run"
    assert not re.search(r"\sstyle=", page), "styles in attributes are not allowed either"


@pytest.mark.parametrize("path", ["/", "/status", "/metrics", "/livez", "/nothing"])
def test_every_answer_is_guarded(server: HttpServer, path: str) -> None:
    _, headers, _ = get(server, path)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_what_is_not_there_names_the_page_too(server: HttpServer) -> None:
    assert json.loads(get(server, "/nothing")[2])["paths"][0] == "/"


# -- the summary and what needs attention


@pytest.mark.parametrize(
    ("state", "severity", "title"),
    [
        ("starting", "busy", "Starting"),
        ("standby", "ok", "Standing by"),
        ("snapshotting", "busy", "Copying"),
        ("catching_up", "busy", "Catching up"),
        ("streaming", "ok", "In step"),
        ("draining", "busy", "Stopping"),
        ("failed", "critical", "Failed"),
    ],
)
def test_every_state_has_words(scene: Scene, state: str, severity: str, title: str) -> None:
    scene.board.set_state(state)  # type: ignore[arg-type]
    assert summary(scene) == (severity, title)


def test_a_failure_says_why(scene: Scene) -> None:
    scene.board.set_state("failed", "slot cdc_sync was dropped")
    found = told(scene)["summary"]
    assert isinstance(found, dict)
    assert found["text"] == "slot cdc_sync was dropped"


def test_a_side_that_is_away_gets_worse_with_time(scene: Scene) -> None:
    scene.board.set_sink(False, "refused by http://u:hunter2@h")
    assert attention(scene) == [("warning", "Qdrant does not answer")]
    scene.board._facts.sink.since = time.time() - 3600
    scene.board.set_source(False, "refused")
    assert attention(scene) == [
        ("critical", "Qdrant does not answer"),
        ("warning", "Postgres does not answer"),
    ]
    assert summary(scene) == ("critical", "Qdrant does not answer")
    assert "hunter2" not in json.dumps(told(scene))


@pytest.mark.parametrize(
    ("wal_status", "retained", "safe", "risk", "severity"),
    [
        ("reserved", 10, 990, "low", None),
        ("extended", 499, 501, "low", None),
        ("extended", 500, 500, "raised", "warning"),
        ("extended", 800, 200, "high", "critical"),
        ("unreserved", 10, 990, "high", "critical"),
        ("extended", 1000, -5, "high", "critical"),
        ("extended", 0, 0, "high", "critical"),
        ("reserved", 10**12, None, "unlimited", None),
        ("lost", None, None, "lost", "critical"),
        (None, None, None, "unknown", None),
    ],
)
def test_the_slots_risk(
    scene: Scene,
    wal_status: str | None,
    retained: int | None,
    safe: int | None,
    risk: str,
    severity: Severity | None,
) -> None:
    slot = SlotFacts(True, wal_status, retained, safe, 0.0)
    assert slot.risk == risk
    scene.board.set_slot(
        active=True,
        wal_status=wal_status,  # type: ignore[arg-type]
        retained_bytes=retained,
        safe_bytes=safe,
    )
    assert [found for found, _ in attention(scene)] == ([severity] if severity else [])


def test_a_slot_that_cannot_be_asked_stays_as_it_was_seen(scene: Scene) -> None:
    before = told(scene)["slot"]
    assert scene.metrics.registry.get_sample_value("cdc_sync_slot_active") == 1
    scene.board.slot_unknown()
    assert told(scene)["slot"] == before
    assert scene.metrics.registry.get_sample_value("cdc_sync_slot_active") is None
    assert scene.metrics.registry.get_sample_value("cdc_sync_slot_retained_wal_bytes") is None


def test_a_stopped_table_comes_with_error_and_remedy(scene: Scene) -> None:
    scene.board.table("public.comments").update(
        state="stopped", error="the collection is gone", remedy="Make it again."
    )
    found = told(scene)["attention"]
    assert found == [
        {
            "severity": "critical",
            "title": "public.comments has stopped",
            "text": "The collection is gone. The other tables go on.",
            "remedy": "Make it again.",
            "since": None,
        }
    ]


@pytest.mark.parametrize(
    ("letters", "severity"), [(0, None), (1, "warning"), (799, "warning"), (800, "critical")]
)
def test_dead_letters_need_attention_and_more_near_the_limit(
    scene: Scene, letters: int, severity: Severity | None
) -> None:
    scene.board.table("public.articles").update(dead_letters=letters)
    assert told(scene)["dead_letters"] == {"pending": letters, "limit": 1000}
    assert [found for found, _ in attention(scene)] == ([severity] if severity else [])


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (None, ("busy", "Streaming")),
        (0.0, ("ok", "In step")),
        (5.0, ("busy", "Catching up")),
        (60.0, ("warning", "Behind")),
    ],
)
def test_a_lag_that_is_not_explained_needs_attention(
    scene: Scene, seconds: float | None, expected: tuple[str, str]
) -> None:
    scene.board.set_lag(lag_bytes=1, seconds=seconds)
    assert summary(scene) == expected


def test_sending_less_is_worth_a_word_and_no_alarm(scene: Scene) -> None:
    scene.board.set_pace("articles", 25, "deadline")
    assert attention(scene) == [("busy", "Sending less to articles")]
    assert summary(scene) == ("ok", "In step")
    scene.board.set_sink(False, "refused")
    assert [severity for severity, _ in attention(scene)] == ["warning", "busy"]
    scene.board.set_sink(True)
    scene.board.set_pace("articles", 100, None)
    assert attention(scene) == []


def test_a_verification_is_there_once_something_was_verified() -> None:
    scene = Scene()
    scene.stream()
    scene.board.set_lag(lag_bytes=0, seconds=0.0)
    assert told(scene)["verification"] is None
    scene.board.set_verification("public.a", missing=0, extra=0, different=0, finished=None)
    found = told(scene)["verification"]
    assert isinstance(found, dict)
    assert (found["finished"], found["ok"], attention(scene)) == (None, True, [])
    scene.board.set_verification("public.a", missing=0, extra=0, different=0, finished=86_400.0)
    scene.board.set_verification("public.b", missing=2, extra=1, different=0, finished=1e9)
    found = told(scene)["verification"]
    assert isinstance(found, dict)
    assert (found["finished"], found["ok"]) == ("1970-01-02T00:00:00.000Z", False)
    assert found["tables"][1] == {
        "name": "public.b", "missing": 2, "extra": 1, "different": 0,
        "finished": "2001-09-09T01:46:40.000Z",
    }  # fmt: skip
    assert attention(scene) == [("warning", "public.b and its collection differ")]


def test_a_loop_that_is_stuck_is_told(scene: Scene) -> None:
    scene.board.heartbeat("writer")
    scene.now += 61
    assert summary(scene) == ("critical", "Stuck")
    found = told(scene)["summary"]
    assert isinstance(found, dict)
    assert found["text"] == "writer: last turn 61 s ago"


def test_tables_that_are_read_again_are_not_in_step(scene: Scene) -> None:
    scene.stream()
    scene.board.set_lag(lag_bytes=0, seconds=0.0)
    assert summary(scene) == ("ok", "In step")
    name = next(table["name"] for table in told(scene)["tables"])  # type: ignore[attr-defined]
    table = scene.board.table(name)
    table.update(waiting="a table is locked")
    found = told(scene)["summary"]
    assert isinstance(found, dict)
    assert (found["title"], found["progress"]) == ("Reading again", None)
    assert found["text"].startswith("1 table is read again;")
    assert found["text"].endswith(" Waiting: a table is locked.")
    table.update(waiting=None, state="copying", rows_copied=10, rows_estimated=100)
    assert summary(scene) == ("busy", "Reading again")
    table.update(state="streaming")
    assert summary(scene) == ("ok", "In step")


def test_a_lag_that_nobody_measures_grows(scene: Scene) -> None:
    def measured() -> object:
        scene.board.refresh_lag()
        return scene.metrics.registry.get_sample_value("cdc_sync_lag_seconds")

    scene.stream()
    scene.board.set_lag(lag_bytes=0, seconds=2.0)
    scene.board.heartbeat("clock")
    scene.now += 9
    assert (told(scene)["lag"], measured()) == ({"bytes": 0, "seconds": 2.0}, 2.0)
    scene.now += 21
    assert (told(scene)["lag"], measured()) == ({"bytes": 0, "seconds": 32.0}, 32.0)
    assert summary(scene) == ("busy", "Catching up")
    scene.board.set_lag(lag_bytes=0, seconds=0.0)
    scene.board.heartbeat("clock")
    assert (told(scene)["lag"], measured()) == ({"bytes": 0, "seconds": 0.0}, 0.0)
    scene.now += 30
    scene.board.set_lag(lag_bytes=None, seconds=None)
    assert (told(scene)["lag"], measured()) == ({"bytes": None, "seconds": None}, None)
    scene.board.set_lag(lag_bytes=0, seconds=0.0)
    scene.board.retire("clock")
    assert (told(scene)["lag"], measured()) == ({"bytes": 0, "seconds": 0.0}, 0.0)


def test_the_progress_of_a_copy_is_that_of_its_rows() -> None:
    scene = copying()
    found = told(scene)["summary"]
    assert isinstance(found, dict)
    rows, expected = 731_200 + 1_310_400, 1_204_311 + 8_930_121 + 48_211
    assert found["progress"] == pytest.approx(rows / expected)
    scene.board.table("shop.products").update(rows_estimated=None)
    assert scene.board.snapshot()["summary"]["progress"] is None  # type: ignore[index]
    scene.board.table("shop.products").update(rows_estimated=0)
    scene.board.table("public.articles").update(rows_estimated=1)
    scene.board.table("public.comments").update(rows_estimated=1)
    assert scene.board.snapshot()["summary"]["progress"] == 0.99  # type: ignore[index]


def test_no_table_at_all_is_no_error() -> None:
    scene = Scene()
    scene.board._tables.clear()
    scene.board.set_state("snapshotting")
    assert summary(scene) == ("busy", "Copying")


# -- the history of the lag


def test_a_sample_is_the_highest_lag_of_its_seconds() -> None:
    history = LagHistory()
    for now, seconds in ((0.0, 1.0), (1.0, 9.0), (4.9, 2.0), (5.0, 3.0)):
        history.add(now, lag_bytes=int(seconds * 10), seconds=seconds)
    assert history.to_json(5.0) == {
        "interval_seconds": SAMPLE_SECONDS,
        "bytes": [90, 30],
        "seconds": [9.0, 3.0],
    }


def test_nobody_knows_what_was_not_said() -> None:
    history = LagHistory()
    history.add(0.0, lag_bytes=None, seconds=None)
    history.add(1.0, lag_bytes=7, seconds=None)
    history.add(20.0, lag_bytes=None, seconds=0.5)
    found = history.to_json(27.0)
    assert found["bytes"] == [7, None, None, None, None, None]
    assert found["seconds"] == [None, None, None, None, 0.5, None]


def test_the_history_is_short() -> None:
    history = LagHistory()
    for number in range(10 * SAMPLES):
        history.add(number * SAMPLE_SECONDS, lag_bytes=number, seconds=0.0)
    found = history.to_json((10 * SAMPLES - 1) * SAMPLE_SECONDS)["bytes"]
    assert isinstance(found, list)
    assert found == list(range(9 * SAMPLES, 10 * SAMPLES))
    assert LagHistory().to_json(1e9)["seconds"] == [None]
    # Long after the last one everything has been forgotten.
    assert set(history.to_json(1e9)["bytes"]) == {None}  # type: ignore[call-overload]


def test_the_history_outlives_the_page(scene: Scene, server: HttpServer) -> None:
    first = json.loads(get(server, "/status")[2])["lag_history"]
    assert len(first["seconds"]) == SAMPLES
    assert max(first["seconds"]) > 0.2
    assert json.loads(get(server, "/status")[2])["lag_history"] == first


# -- recent events


@pytest.fixture
def recent() -> RecentEvents:
    return RecentEvents()


@pytest.fixture
def log(recent: RecentEvents) -> EventLogger:
    logger = logging.Logger("cdc_sync.tests", logging.DEBUG)
    logger.addHandler(recent)
    return EventLogger(logger)


def names(recent: RecentEvents) -> list[object]:
    return [entry["event"] for entry in recent.newest_first()]


def test_events_are_kept_newest_first_without_those_for_debugging(
    recent: RecentEvents, log: EventLogger
) -> None:
    log.info("one", rows=1)
    log.debug("none")
    log.error("two", error=ValueError("x"))
    assert names(recent) == ["two", "one"]
    newest = recent.newest_first()[0]
    assert (newest["level"], newest["fields"], newest["count"]) == ("error", {"error": "x"}, 1)


def test_a_warning_again_is_one_entry_with_a_count(recent: RecentEvents, log: EventLogger) -> None:
    log.info("state", state="streaming")
    for seconds in range(500):
        log.warning("retrying", kind="sink_unavailable", seconds=seconds)
        log.warning("retrying", kind="source_unavailable", seconds=seconds)
    log.info("state", state="failed")
    log.info("state", state="failed")
    entries = recent.newest_first()
    assert names(recent) == ["state", "state", "retrying", "retrying", "state"]
    assert [entry["count"] for entry in entries] == [1, 1, 500, 500, 1]
    assert entries[2]["fields"] == {"kind": "source_unavailable", "seconds": 499}
    assert str(entries[2]["since"]) <= str(entries[2]["time"])


def test_only_so_many_events_of_so_much_text_are_kept(
    recent: RecentEvents, log: EventLogger
) -> None:
    for number in range(3 * KEPT_EVENTS):
        log.info("event", number=number, text="x" * 5_000, list=["y" * 5_000])
    assert len(names(recent)) == KEPT_EVENTS
    assert recent.newest_first()[0]["fields"]["number"] == 3 * KEPT_EVENTS - 1  # type: ignore[index]
    assert len(json.dumps(recent.newest_first())) < KEPT_EVENTS * 2000


def test_events_hold_no_secret(recent: RecentEvents, log: EventLogger) -> None:
    log.warning("retrying", error="postgres://u:hunter2@h/d", api_key="hunter2")
    assert "hunter2" not in json.dumps(recent.newest_first())


def test_what_an_event_cannot_say_does_not_end_the_logging(
    recent: RecentEvents, log: EventLogger
) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError("no")

    log.info("odd", value=Hostile())
    assert names(recent) == ["odd"]


def test_odd_names_reach_the_answer_as_they_are() -> None:
    scene = hostile()
    with served(scene) as server:
        answer = json.loads(get(server, "/status")[2])
    assert "public.<img src=x onerror=alert(1)>" in {table["name"] for table in answer["tables"]}


def test_a_slot_without_a_limit_has_none() -> None:
    assert SlotFacts(True, "reserved", 5 * MIB, None, 0.0).limit_bytes is None
    assert SlotFacts(True, "reserved", 5 * MIB, 3 * MIB, 0.0).limit_bytes == 8 * MIB
