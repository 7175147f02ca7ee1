"""Scenes of a pipeline's life on a status board, for tests of the status page and the terminal.

The pictures in docs/images are of a real daemon: tests/operate/screenshots.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Final

from cdc_sync.ops.http import HttpServer
from cdc_sync.ops.logging import EventLogger
from cdc_sync.ops.metrics import Metrics
from cdc_sync.ops.recent_events import RecentEvents
from cdc_sync.ops.status import StatusBoard

MIB: Final = 1 << 20
HOSTILE: Final = (
    "public.<img src=x onerror=alert(1)>",
    'public."</script><script>window.owned=1</script>',
    "public.[bold]brackets[/bold]",
    "public.\u202egnp.evil\x1b[31m",
    "public." + "very_long_" * 12,
)


class Scene:
    """A board with a past, without a pipeline."""

    def __init__(self, limit: int = 1024 * MIB) -> None:
        self.now = 5000.0
        self.events = RecentEvents()
        logger = logging.Logger("cdc_sync.scene", logging.INFO)
        logger.addHandler(self.events)
        self.log = EventLogger(logger)
        self.metrics = Metrics()
        self.board = StatusBoard(
            "articles",
            slot="cdc_sync",
            publication="cdc_sync",
            metrics=self.metrics,
            events=self.events,
            monotonic=lambda: self.now,
        )
        self.board.set_dead_letter_limit(1000)
        self.board.set_versions(postgres="18.0", qdrant="1.18.1")
        self.board.set_source(True)
        self.board.set_sink(True)
        self.limit = limit
        self.slot(12 * MIB)
        self.table("public.articles", 1_204_311, 81_402)
        self.table("public.comments", 8_930_121, 912_330)
        self.table("shop.products", 48_211, 1_022)
        self.log.info("pipeline_planned", version="0.1.0", tables=3, slot="cdc_sync")

    def table(self, name: str, rows: int, changes: int) -> None:
        """A table that streams."""
        self.board.table(name).update(
            collection=name.partition(".")[2],
            state="streaming",
            rows_copied=rows,
            rows_estimated=rows,
            rows_exact=True,
            changes_applied=changes,
        )

    def slot(self, retained: int, status: str = "reserved", *, active: bool = True) -> None:
        """What the slot keeps."""
        self.board.set_slot(
            active=active,
            wal_status=status,  # type: ignore[arg-type]
            retained_bytes=retained,
            safe_bytes=self.limit - retained,
        )
        at = 0x16_B374_D848
        self.board.positions(server=at, received=at, applied=at - 56, acknowledged=at - 56)

    def past(self, seconds: Callable[[float], float], rate: float = 90_000.0) -> None:
        """Ten minutes of lag; ``seconds(x)`` with x from 0 to 1."""
        for step in range(120):
            self.now += 5
            lag = max(0.0, seconds(step / 119))
            self.board.set_lag(lag_bytes=int(lag * rate) + 56, seconds=lag)

    def stream(self) -> None:
        """Stream quietly."""
        self.board.set_state("streaming")
        self.log.info("state", state="streaming")
        self.log.info("streaming_started", slot="cdc_sync", applied="16/B374D848")


def told(scene: Scene) -> dict[str, object]:
    """What ``/status`` answers."""
    answer = json.loads(json.dumps(scene.board.snapshot()))
    assert isinstance(answer, dict)
    return answer


def _quiet(x: float) -> float:
    return 0.02 + 0.25 * math.exp(-(((x - 0.62) * 60) ** 2)) + 0.02 * math.sin(40 * x)


def streaming() -> Scene:
    """Everything is well."""
    scene = Scene()
    scene.stream()
    scene.past(_quiet)
    scene.board.set_lag(lag_bytes=56, seconds=0.0)
    for table in ("public.articles", "public.comments", "shop.products"):
        finished = time.time() - 3 * 3600
        scene.board.set_verification(table, missing=0, extra=0, different=0, finished=finished)
    return scene


def copying() -> Scene:
    """Two tables of three are being copied, one of an estimated size."""
    scene = Scene()
    scene.board.set_state("snapshotting")
    scene.log.info("state", state="snapshotting")
    scene.log.info("copy_started", slot="cdc_sync", lsn="16/B374D848")
    scene.board.table("public.articles").update(state="copying", rows_copied=0)
    scene.board.table("public.comments").update(state="copying", rows_copied=0)
    scene.past(lambda x: 8 * ((x * 6) % 1))
    scene.board.table("public.articles").update(rows_copied=731_200)
    scene.board.table("public.comments").update(rows_copied=1_310_400, rows_exact=False)
    scene.board.table("shop.products").update(state="pending", rows_copied=0)
    scene.log.info("window_closed", tables=2, rows=240_000)
    scene.slot(210 * MIB)
    return scene


def qdrant_away() -> Scene:
    """Qdrant does not answer, changes pile up in Postgres."""
    scene = streaming()
    scene.past(lambda x: _quiet(x) if x < 0.4 else (x - 0.4) * 600)
    scene.board.set_sink(False, "connection to qdrant.internal:6334 refused")
    scene.board._facts.sink.since = time.time() - 371
    for attempt in range(23):
        scene.log.warning(
            "retrying",
            kind="sink_unavailable",
            error="connection to qdrant.internal:6334 refused",
            seconds=min(15.0, 0.5 * 1.6**attempt),
        )
    scene.log.warning("slot_let_go", reason="Qdrant has not completed anything for 30 s")
    scene.slot(148 * MIB, active=False)
    return scene


def slot_at_risk() -> Scene:
    """The slot keeps nearly all that it may."""
    scene = qdrant_away()
    scene.past(lambda x: 360 + x * 600, rate=900_000)
    scene.slot(961 * MIB, "extended", active=False)
    return scene


def dead_letters() -> Scene:
    """Some rows could not be written."""
    scene = streaming()
    scene.board.table("public.comments").update(dead_letters=17)
    for _ in range(17):
        scene.log.warning(
            "dead_letter",
            table="public.comments",
            kind="mapping",
            lsn="16/B374A010",
            reason="column embedding has no value of its 768 dimensions",
            attempts=1,
        )
    return scene


def stopped_table() -> Scene:
    """A table cannot be followed; the others go on."""
    scene = streaming()
    error = "shop.products.embedding has 1024 dimensions, collection products has 768"
    remedy = 'Set on_dimension_change = "rebuild" for the table, or drop the collection products.'
    scene.board.table("shop.products").update(state="stopped", error=error, remedy=remedy)
    scene.log.error(
        "table_stopped", table="shop.products", kind="collection_mismatch", error=error,
        remedy=remedy,
    )  # fmt: skip
    return scene


def hostile() -> Scene:
    """Names that look like markup, and many events."""
    scene = streaming()
    for number, name in enumerate(HOSTILE):
        scene.table(name, number, number)
        scene.board.table(name).update(state="stopped", error=f"{name} is odd", remedy=name)
        scene.log.error("table_stopped", table=name, error=name)
    scene.board.set_sink(False, f"{HOSTILE[0]} refused")
    return scene


SCENES: Final = {
    scene.__name__.replace("_", "-"): scene
    for scene in (streaming, copying, qdrant_away, slot_at_risk, dead_letters, stopped_table)
}


@contextlib.contextmanager
def served(scene: Scene) -> Iterator[HttpServer]:
    """The scene's endpoint."""
    with HttpServer("127.0.0.1", 0, board=scene.board, metrics=scene.metrics) as server:
        yield server
