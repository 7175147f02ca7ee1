"""A scripted incident: which alerts fire, in which phase, how soon; and that every panel shows
something.

Minutes of the rules are pairs of seconds here (:mod:`tests.operate.incident`). Expected times are
seconds after the blow: the sum of the rule's ``for``, its range where it needs one, and what passes
until the metric shows the blow; the latest has room for a slow machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import psycopg
import pytest

from cdc_sync.demo.embedded import PostgresServer
from tests.operate.dashboard import OF_QDRANT, alert_rules, expressions, load_dashboard, seconds
from tests.operate.incident import FACTOR, SCRAPE_SECONDS, Scene
from tests.operate.screenshots import PHONE, WIDE, Camera, View
from tests.support.fix_postgres import Database, PrivatePostgres, create_database
from tests.support.qdrant_control import QdrantProcess

Window = tuple[float, float]

_SETTINGS: Final = {"max_slot_wal_keep_size": "768MB", "max_wal_size": "512MB"}
_LATE: Final = 60.0

_QDRANT_AWAY: Final[Mapping[str, Window]] = {
    "CdcSyncSinkUnavailable": (10, 12 + _LATE),
    "CdcSyncSlotInactive": (15, 25 + _LATE),
    "CdcSyncCheckpointStale": (20, 22 + _LATE),
    "CdcSyncLagHigh": (22, 24 + _LATE),
    "CdcSyncSinkErrors": (20, 42 + _LATE),
    "CdcSyncStalled": (30, 32 + _LATE),
    "CdcSyncRetainedWalGrowing": (30, 50 + _LATE),
    "CdcSyncLagVeryHigh": (50, 53 + _LATE),
    # Half of what the slot may keep, at 8 MB/s.
    "CdcSyncSlotNearInvalidation": (40, 120 + _LATE),
}


class Incident:
    """Runs phases and compares what fired in each with what should."""

    def __init__(self, scene: Scene, camera: Camera) -> None:
        self._scene = scene
        self._camera = camera
        self.fired: set[str] = set()

    def look(
        self,
        picture: str,
        *words: str,
        width: int = WIDE,
        dark: bool = False,
        short: bool = False,
    ) -> None:
        """Look at the status page, which has to say these words."""
        port = self._scene.daemon.port
        self._camera.take(picture, port, *words, width=width, dark=dark, short=short)

    def page(self) -> AbstractContextManager[View]:
        """The status page, to be kept open."""
        return self._camera.page(self._scene.daemon.port)

    @contextmanager
    def phase(
        self, expected: Mapping[str, Window], allowed: Collection[str] = ()
    ) -> Iterator[Callable[[], None]]:
        """Begin with a quiet Prometheus, end when everything expected has fired or should have.

        Alerts that are ``allowed`` may fire or not.
        """
        scene = self._scene
        scene.wait_quiet()
        start = time.time()
        deadline = max([latest for _, latest in expected.values()], default=0.0)

        def all_fired() -> None:
            while (
                time.time() < start + deadline and not expected.keys() <= scene.prometheus.firing()
            ):
                time.sleep(0.2)

        yield all_fired
        # An alert fires a moment before that can be asked for.
        time.sleep(4 * SCRAPE_SECONDS)
        fired = scene.fired(start, time.time())
        self.fired |= fired.keys()
        assert expected.keys() - fired.keys() == set(), (fired, scene.daemon.log()[-3000:])
        assert fired.keys() - expected.keys() - set(allowed) == set(), fired
        for name, (earliest, latest) in expected.items():
            assert earliest - 1.5 <= fired[name] <= latest, (name, fired)


def rows_copied(scene: Scene) -> bool:
    """Whether any row has been."""
    return any(table["rows_copied"] for table in scene.daemon.status()["tables"])


def copy(incident: Incident, scene: Scene) -> None:
    """The first copy, which takes a while."""
    scene.daemon.wait(lambda: rows_copied(scene), "the first rows", 120)
    incident.look("copying", "Copying", " %")
    incident.look("copying-phone", "Copying", " %", width=PHONE, short=True)
    scene.daemon.wait_state("streaming", 120)


def nothing_happens(incident: Incident) -> None:
    """A load that nobody has to hear of."""
    with incident.phase({}):
        time.sleep(45)
    for dark in (False, True):
        suffix = "-dark" if dark else ""
        incident.look(f"streaming{suffix}", "In step", "no difference", dark=dark)
        incident.look(f"short{suffix}", "In step", "no difference", dark=dark, short=True)


def qdrant_goes_away(incident: Incident, scene: Scene) -> None:
    """And WAL piles up, until the slot is about to be given up."""
    with incident.phase(_QDRANT_AWAY) as all_fired:
        scene.qdrant.kill()
        scene.load.wal_bytes = 690_000_000
        scene.wait(lambda: bool(scene.prometheus.firing()), "the first alert")
        incident.look("qdrant-away", "Qdrant does not answer", "retrying")
        all_fired()
    incident.look("slot-at-risk", "Qdrant does not answer", "The slot is about to be lost")
    incident.look(
        "slot-at-risk-phone", "The slot is about to be lost", width=PHONE, dark=True, short=True
    )
    scene.load.wal_bytes = 0
    scene.qdrant.restart()
    scene.daemon.wait_caught_up()
    scene.database.execute("CHECKPOINT")


def row_is_refused(incident: Incident, scene: Scene) -> None:
    with incident.phase({"CdcSyncDeadLetters": (0, 3 + _LATE)}) as all_fired:
        scene.database.execute("INSERT INTO products VALUES (99999, 'poison', '[1]')")
        all_fired()
    incident.look("dead-letters", "1 row could not be written", "cdc-sync dlq list")
    scene.database.execute("DELETE FROM products WHERE id = 99999")


def letter_is_refused(incident: Incident, scene: Scene) -> None:
    """Qdrant takes no record of a row that it cannot have."""
    scene.load.paused = True
    scene.daemon.wait_caught_up()
    # The pause makes it the only write: nothing else is refused.
    allowed = {"CdcSyncVerifyMismatch"}
    with incident.phase({"CdcSyncDeadLettersNotKept": (0, 3 + _LATE)}, allowed) as all_fired:
        scene.qdrant.script.reject("Upsert", "INTERNAL", "scripted", times=1000)
        scene.database.execute("INSERT INTO products VALUES (99999, 'poison', '[1]')")
        all_fired()
    scene.qdrant.script.clear()
    scene.database.execute("DELETE FROM products WHERE id = 99999")
    scene.load.paused = False


def loop_hangs(incident: Incident, scene: Scene) -> None:
    # What it cannot do meanwhile may be told as well.
    allowed = {"CdcSyncLagHigh", "CdcSyncLagVeryHigh", "CdcSyncCheckpointStale", "CdcSyncStalled"}
    expected = {"CdcSyncLoopStuck": (10, 14 + _LATE)}
    with incident.phase(expected, allowed) as all_fired, scene.hanging():
        all_fired()
        incident.look("stuck", "Stuck", "Restart the process")


def rebuild_is_left(incident: Incident, scene: Scene) -> None:
    """A second collection is filled, and nobody has readers go over to it."""
    # From when the command has ended, which takes a while.
    with incident.phase({"CdcSyncRebuildLeft": (60, 62 + 2 * _LATE)}) as all_fired:
        scene.rebuild("--to", str(scene.afterwards()), "--alias", "reviews_live", "--no-swap")
        all_fired()
    scene.rebuild("--abort")


def table_is_redefined(incident: Incident, scene: Scene) -> None:
    expected = {"CdcSyncTableStopped": (2.0, 10 + _LATE), "CdcSyncManualError": (0.0, 8 + _LATE)}
    with incident.phase(expected, {"CdcSyncVerifyMismatch"}) as all_fired:
        scene.database.execute("ALTER TABLE reviews ALTER emb TYPE vector(4) USING NULL")
        all_fired()
    incident.look(
        "stopped-table-phone", "public.reviews has stopped", width=PHONE, dark=True, short=True
    )
    scene.database.execute("ALTER TABLE reviews ALTER emb TYPE vector(3) USING NULL")


def point_is_deleted_by_hand(incident: Incident, scene: Scene) -> None:
    # A pass goes through the busy table too, and waits for the stream there.
    with incident.phase({"CdcSyncVerifyMismatch": (0, 240 + _LATE)}) as all_fired:
        scene.qdrant.client().delete("reviews", [50])
        all_fired()
    incident.look("verify-mismatch", "public.reviews and its collection differ", "1 point missing")
    scene.database.execute("UPDATE reviews SET emb = '[5,0,0]' WHERE id = 50")


def postgres_goes_away(incident: Incident, scene: Scene, server: PostgresServer) -> None:
    # As far as the daemon can know, it is behind by as long as it has seen nothing.
    allowed = {"CdcSyncLagHigh"}
    with incident.phase({"CdcSyncSourceUnavailable": (10, 13 + _LATE)}, allowed) as all_fired:
        server.stop()
        all_fired()
    incident.look("postgres-away", "Postgres does not answer")
    server.start(_SETTINGS)


def daemon_is_stopped(incident: Incident, scene: Scene) -> None:
    with incident.phase({"CdcSyncDown": (4, 6 + _LATE)}) as all_fired:
        with incident.page() as page:
            assert scene.daemon.terminate() == 0
            page.take("daemon-gone", "No answer since")
        all_fired()
    scene.start()
    scene.daemon.wait_state("streaming")
    incident.look("restarted", "In step")


def daemon_keeps_dying(incident: Incident, scene: Scene) -> None:
    with incident.phase({"CdcSyncRestarting": (0, 60 + _LATE)}, {"CdcSyncDown"}) as all_fired:
        for _ in range(3):
            started = _start_time(scene)
            scene.daemon.kill()
            scene.start()
            scene.wait(lambda old=started: _start_time(scene) > old, "a scrape")  # type: ignore[misc]
        all_fired()
    scene.daemon.wait_state("streaming")


def slot_is_dropped(incident: Incident, scene: Scene) -> None:
    expected = {"CdcSyncSlotLost": (0.0, 12 + _LATE), "CdcSyncManualError": (0.0, 12 + _LATE)}
    allowed = {"CdcSyncLagHigh", "CdcSyncVerifyMismatch"}
    with incident.phase(expected, allowed) as all_fired:
        scene.wait(lambda: _slot_dropped(scene.database), "the end of the slot")
        incident.look("slot-lost", "Reading again", " %")
        all_fired()


def copy_stands_still(incident: Incident, scene: Scene) -> None:
    """It is begun anew, and Qdrant takes what it writes and does not answer."""
    # The stream rests meanwhile, and no answer at last is an error.
    allowed = {"CdcSyncDown", "CdcSyncLagHigh", "CdcSyncLagVeryHigh", "CdcSyncSinkErrors"}
    allowed |= {"CdcSyncSinkUnavailable", "CdcSyncSlotInactive", "CdcSyncRestarting"}
    with incident.phase({"CdcSyncSnapshotStuck": (40, 80 + _LATE)}, allowed) as all_fired:
        assert scene.daemon.terminate() == 0
        scene.start("--migration.restart")
        scene.daemon.wait(lambda: rows_copied(scene), "the first rows")
        scene.qdrant.script.hold("Upsert", times=1000)
        all_fired()
    scene.qdrant.script.clear()
    scene.daemon.wait_state("streaming", 120)


def _slot_dropped(database: Database) -> bool:
    """Whether it could be dropped before the daemon had taken it again."""
    try:
        database.execute(
            "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots"
            " WHERE slot_name = 'shop'; SELECT pg_drop_replication_slot('shop')"
        )
    except psycopg.errors.ObjectInUse:
        return False
    return True


def _start_time(scene: Scene) -> float:
    found = scene.prometheus.query('process_start_time_seconds{job="cdc-sync"}')
    return found[0].points[0][1] if found else 0.0


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_every_alert_fires_in_its_phase_and_every_panel_shows_something(
    private_postgres: PrivatePostgres, qdrant_private: QdrantProcess, tmp_path: Path
) -> None:
    server = private_postgres(_SETTINGS)
    database = create_database(server)
    began = time.time()
    with (
        Scene.open(tmp_path, database, qdrant_private, batch_delay=400) as scene,
        Camera.of_this_run() as camera,
    ):
        incident = Incident(scene, camera)
        copy(incident, scene)
        nothing_happens(incident)
        qdrant_goes_away(incident, scene)
        row_is_refused(incident, scene)
        letter_is_refused(incident, scene)
        point_is_deleted_by_hand(incident, scene)
        rebuild_is_left(incident, scene)
        table_is_redefined(incident, scene)
        loop_hangs(incident, scene)
        postgres_goes_away(incident, scene, server)
        daemon_is_stopped(incident, scene)
        daemon_keeps_dying(incident, scene)
        slot_is_dropped(incident, scene)
        copy_stands_still(incident, scene)
        scene.wait_quiet()
        assert incident.fired == {rule["alert"] for rule in alert_rules()}
        assert scene.prometheus.rule_errors() == {}
        end = time.time()
        assert _waits(scene, began, end) == []
        assert empty_panels(scene, began, end) == []


def _waits(scene: Scene, start: float, end: float) -> list[str]:
    """Alerts that were not pending for as long as their rule says before they fired."""
    wrong = []
    prometheus = scene.prometheus
    for rule in alert_rules():
        wanted = seconds(rule.get("for", "")) / FACTOR
        name = rule["alert"]
        pending, firing = (
            prometheus.query_range(
                f'ALERTS{{alertname="{name}", alertstate="{state}"}}', start, end
            )
            for state in ("pending", "firing")
        )
        if not wanted or not firing:
            continue
        first = min(series.points[0][0] for series in firing)
        before = [
            t for series in pending for t, _ in series.points if first - wanted - 2 < t < first
        ]
        if not before or not wanted - 2 <= first - min(before) <= wanted + 2:
            wrong.append(f"{name}: {wanted} s wanted, {first - min(before, default=0)}")
    return wrong


def empty_panels(scene: Scene, start: float, end: float) -> list[str]:
    """Panels with an expression that had no value at any time."""
    empty = []
    for expression in expressions(load_dashboard()):
        text = expression.filled("5s").replace("[30m]", "[60s]").replace("[5m]", "[10s]")
        if any(metric in text for metric in OF_QDRANT):
            continue
        series = scene.prometheus.query_range(text, start, end, 1.0)
        # NaN is not equal to itself.
        if not any(value == value for one in series for _, value in one.points):
            empty.append(f"{expression.panel}: {text}")
    return empty
