"""What a campaign may do to a site, and how each is undone.

An event is given a source of choices of its own, so it does the same whatever came before. It
returns what it did, in a few words, and has the site undo it later.
"""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, get_args

import psutil
import psycopg

from cdc_sync.demo.embedded import StopMode
from tests.faults.campaign.load import TABLES, NotPossibleError
from tests.faults.campaign.site import LET_GO_SECONDS, STATE_EXIT, CampaignError, SinkName, Site
from tests.support.full_disk import fill_disk
from tests.support.proxy import Direction
from tests.support.qdrant_faults import RANDOM_KINDS

Strike = Callable[[Site, random.Random], str]

#: A fast shutdown waits for walsenders; one that let go of the slot is not there any more.
_FAST_SECONDS: Final = LET_GO_SECONDS + 10


#: Until the kernel's keepalive would have found out, were it not for the proxy, which answers it.
HALF_OPEN_SECONDS: Final = 15.0


@dataclass(frozen=True)
class Event:
    """``times``: how often it comes, compared with others; ``optional``: only when asked for, by
    its kind or by the name of its ``group``."""

    kind: str
    strike: Strike
    sinks: tuple[SinkName, ...]
    times: int
    optional: bool
    group: str = ""


EVENTS: Final[dict[str, Event]] = {}


def event(
    *, times: int = 1, sink: SinkName | None = None, optional: bool = False, group: str = ""
) -> Callable[[Strike], Strike]:
    """Register a function as the event of its name."""

    def register(strike: Strike) -> Strike:
        add_event(strike.__name__, strike, times, sink, optional=optional, group=group)
        return strike

    return register


def add_event(
    kind: str,
    strike: Strike,
    times: int,
    sink: SinkName | None = None,
    *,
    optional: bool,
    group: str,
) -> None:
    """Register an event."""
    sinks = get_args(SinkName) if sink is None else (sink,)
    EVENTS[kind] = Event(kind, strike, sinks, times, optional, group)


# -- the daemon


@event(times=4)
def daemon_killed(site: Site, choose: random.Random) -> str:
    rest = choose.uniform(0, 1.2)
    site.keeper.kill(rest)
    return f"for {rest:.1f} s"


@event()
def daemon_killed_thrice(site: Site, choose: random.Random) -> str:
    """Also while it starts."""
    site.keeper.kill(0)
    for _ in range(2):
        site.keeper.tend()
        time.sleep(choose.uniform(0.2, 1.5))
        site.keeper.kill(0)
    return ""


@event(times=2)
def daemon_stopped(site: Site, choose: random.Random) -> str:
    return f"in {site.keeper.stop(choose.uniform(0, 1)):.2f} s"


@event()
def daemon_paused(site: Site, choose: random.Random) -> str:
    seconds = choose.uniform(0.5, 6)
    site.keeper.send(signal.SIGSTOP)
    site.later(seconds, "daemon goes on", lambda: site.keeper.send(signal.SIGCONT))
    return f"for {seconds:.1f} s"


@event(times=3, sink="server")
def workers_killed(site: Site, choose: random.Random) -> str:
    """In the middle of a copy, which is asked for if there is none."""
    site.postgres()
    all_of_them = choose.random() < 0.3
    if not site.keeper.workers():
        site.load.request_resync(site.pipeline, choose.choice(TABLES))
    deadline = time.monotonic() + 6
    while not (workers := site.keeper.workers()):
        if time.monotonic() > deadline:
            raise NotPossibleError("nothing is copied")
        site.tick()
        time.sleep(0.02)
    time.sleep(choose.uniform(0, 0.3))
    victims = workers if all_of_them else workers[:1]
    for worker in victims:
        with contextlib.suppress(psutil.Error):
            worker.kill()
    return f"{len(victims)}"


# -- Postgres


def _restart(site: Site, mode: StopMode, away: float) -> str:
    server = site.postgres()
    started = time.monotonic()
    try:
        server.stop(mode, timeout_seconds=60)
    finally:
        took = time.monotonic() - started
    if mode == "fast" and took > _FAST_SECONDS:
        raise CampaignError(f"a fast shutdown of Postgres took {took:.1f} s")
    site.postgres_up = False

    def start() -> None:
        server.start()
        site.postgres_up = True

    if away:
        site.later(away, "postgres starts", start)
    else:
        start()
    return f"in {took:.2f} s" + (f", away for {away:.1f} s" if away else "")


@event(times=2)
def postgres_restarted_immediate(site: Site, choose: random.Random) -> str:
    return _restart(site, "immediate", 0)


@event(times=2)
def postgres_restarted_fast(site: Site, choose: random.Random) -> str:
    return _restart(site, "fast", 0)


@event()
def postgres_away(site: Site, choose: random.Random) -> str:
    return _restart(site, choose.choice(("fast", "immediate")), choose.uniform(1, 5))


@event()
def postgres_killed(site: Site, choose: random.Random) -> str:
    """SIGKILL of the postmaster and all of its children."""
    server = site.postgres()
    server.kill()
    server.start()
    return ""


@event(times=2)
def backends_terminated(site: Site, choose: random.Random) -> str:
    site.postgres()
    which = choose.choice(("backend_type = 'walsender'", "application_name LIKE 'cdc_sync%'"))
    try:
        rows = site.database.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {which}"
        )
    except psycopg.OperationalError as error:
        raise NotPossibleError(type(error).__name__) from error
    return f"{len(rows)} where {which}"


@event(optional=True)
def slot_dropped(site: Site, choose: random.Random) -> str:
    site.postgres()
    slot = site.daemon.slot
    for _ in range(50):
        with contextlib.suppress(psycopg.errors.ObjectInUse):
            site.database.execute(
                "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots"
                " WHERE slot_name = %s AND active",
                (slot,),
            )
            dropped = site.database.execute(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
                " WHERE slot_name = %s",
                (slot,),
            )
            if not dropped:
                raise NotPossibleError("there is no slot")
            return ""
    raise NotPossibleError("the slot is in use")


# -- Qdrant


def _restart_later(site: Site, seconds: float) -> None:
    site.qdrant_up = False

    def restart() -> None:
        assert site.qdrant is not None
        site.qdrant.restart()
        site.qdrant_up = True

    site.later(seconds, "qdrant starts", restart)


@event(times=3, sink="server")
def qdrant_killed(site: Site, choose: random.Random) -> str:
    site.script()
    assert site.qdrant is not None
    seconds = choose.choice((0.1, choose.uniform(0.3, 3), choose.uniform(3, 8)))
    site.qdrant.kill()
    _restart_later(site, seconds)
    return f"for {seconds:.1f} s"


@event(times=2, sink="server")
def qdrant_killed_in_a_write(site: Site, choose: random.Random) -> str:
    applied = choose.random() < 0.5
    site.script().crash("write", applied=applied)
    seconds = choose.uniform(1, 3)
    _restart_later(site, seconds)
    return f"{'after' if applied else 'before'} it is applied, for {seconds:.1f} s at the most"


@event(times=3, sink="server")
def daemon_killed_while_qdrant_is_away(site: Site, choose: random.Random) -> str:
    """With a batch in flight that is tried again and again."""
    site.script()
    assert site.qdrant is not None
    seconds = choose.uniform(0.5, 3.5)
    site.qdrant.kill()
    _restart_later(site, seconds + choose.uniform(-0.3, 2))
    _wait(site, seconds)
    site.keeper.kill(choose.uniform(0, 1))
    return f"after {seconds:.1f} s"


@event(times=2, sink="server")
def postgres_cut_while_qdrant_is_away(site: Site, choose: random.Random) -> str:
    script, seconds = site.script(), choose.uniform(0.5, 3)
    script.down()
    site.later(seconds + 1, "qdrant answers", lambda: site.script().down(False))
    _wait(site, seconds)
    return f"{site.postgres_proxy.cut()} after {seconds:.1f} s"


@event(times=3, sink="server")
def daemon_killed_in_a_slow_write(site: Site, choose: random.Random) -> str:
    """Every request takes long; what is under way is over before the daemon comes back."""
    script, slow = site.script(), choose.uniform(0.2, 1)
    script.slow("write", slow, times=30)
    site.later(6, "qdrant is quick", lambda: site.script().clear())
    seconds = choose.uniform(0.5, 3)
    _wait(site, seconds)
    site.keeper.kill(slow + 0.1)
    return f"of {slow:.1f} s, after {seconds:.1f} s"


def _wait(site: Site, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        site.tick()
        time.sleep(0.03)


@event(sink="server")
def qdrant_unavailable(site: Site, choose: random.Random) -> str:
    script, seconds = site.script(), choose.uniform(0.5, 6)
    script.down()
    site.later(seconds, "qdrant answers", lambda: site.script().down(False))
    return f"for {seconds:.1f} s"


@event(times=2, sink="server")
def answers_lost(site: Site, choose: random.Random) -> str:
    """Applied, then dropped."""
    times = choose.randint(1, 8)
    code = choose.choice(("UNAVAILABLE", "INTERNAL", "DEADLINE_EXCEEDED", "CANCELLED"))
    site.script().fail_after_apply("write", code, "Socket closed", times=times)
    return f"{times} as {code}"


@event(times=2, sink="server")
def answers_that_never_come(site: Site, choose: random.Random) -> str:
    applied, times = choose.random() < 0.5, choose.randint(1, 2)
    site.script().never_answer("write", applied=applied, times=times)
    return f"{times}, {'applied' if applied else 'not applied'}"


@event(sink="server")
def wait_timeouts(site: Site, choose: random.Random) -> str:
    times = choose.randint(1, 6)
    site.script().wait_timeout("write", times=times)
    return f"{times}"


@event(sink="server")
def reads_fail(site: Site, choose: random.Random) -> str:
    operation = choose.choice(("Get", "Scroll", "Count"))
    times = choose.randint(1, 4)
    site.script().reject(operation, choose.choice(("UNAVAILABLE", "INTERNAL")), times=times)
    return f"{times} of {operation}"


@event(sink="server")
def rate_limit(site: Site, choose: random.Random) -> str:
    script, seconds = site.script(), choose.uniform(2, 6)
    a_minute = choose.choice((300, 2000, 6000))
    script.rate_limit(a_minute)
    site.later(seconds, "no rate limit", lambda: site.script().rate_limit(None))
    return f"{a_minute} points a minute for {seconds:.1f} s"


@event(sink="server")
def told_to_come_again(site: Site, choose: random.Random) -> str:
    times = choose.randint(1, 3)
    site.script().reject(
        "write", "RESOURCE_EXHAUSTED", "Rate limit exceeded", retry_after=1, times=times
    )
    return f"{times}"


@event(times=2, sink="server")
def random_answers(site: Site, choose: random.Random) -> str:
    script, seconds = site.script(), choose.uniform(2, 6)
    probability, seed = choose.uniform(0.1, 0.5), choose.randrange(1 << 30)
    script.random(probability, seed, RANDOM_KINDS)
    site.later(seconds, "no random answers", lambda: site.script().random(0, 0))
    return f"{probability:.2f} for {seconds:.1f} s"


@event(sink="server")
def qdrant_applies_late(site: Site, choose: random.Random) -> str:
    script, seconds = site.script(), choose.uniform(2, 6)
    script.lag(0.2)
    site.later(seconds, "qdrant applies at once", lambda: site.script().lag(0))
    return f"for {seconds:.1f} s"


# -- the network


@event(times=3)
def connections_cut(site: Site, choose: random.Random) -> str:
    side, proxy = site.proxy(choose)
    return f"{side}: {proxy.cut()}"


@event(times=2)
def cut_in_a_message(site: Site, choose: random.Random) -> str:
    side, proxy = site.proxy(choose)
    direction = choose.choice(tuple(Direction))
    count = choose.choice((1, choose.randrange(100), choose.randrange(100_000)))
    proxy.cut_after(count, direction)
    return f"{side}: after {count} bytes, {direction.value}"


@event(times=2)
def stalled(site: Site, choose: random.Random) -> str:
    """Long stalls end by a cut: what was sent must not arrive after what was sent later."""
    side, proxy = site.proxy(choose)
    direction = choose.choice((None, *Direction))
    seconds = choose.choice((choose.uniform(0.2, 2), choose.uniform(3, 8)))
    proxy.stall(direction)

    def resume() -> None:
        if seconds > 2.5:
            proxy.cut()
        proxy.resume(direction)

    site.later(seconds, f"{side} resumed", resume)
    which = "both ways" if direction is None else direction.value
    return f"{side}: {which} for {seconds:.1f} s"


@event()
def delayed(site: Site, choose: random.Random) -> str:
    side, proxy = site.proxy(choose)
    delay, seconds = choose.uniform(0.02, 0.4), choose.uniform(2, 5)
    proxy.delay(delay)
    site.later(seconds, f"{side} not delayed", lambda: proxy.delay(0))
    return f"{side}: by {delay:.2f} s for {seconds:.1f} s"


@event()
def refused(site: Site, choose: random.Random) -> str:
    side, proxy = site.proxy(choose)
    seconds = choose.uniform(0.5, 6)
    proxy.refuse()
    proxy.cut()
    site.later(seconds, f"{side} accepts", proxy.accept)
    return f"{side}: for {seconds:.1f} s"


@event(times=2)
def half_open(site: Site, choose: random.Random) -> str:
    """Connections of which the other half is gone, without a word; new ones work."""
    side, proxy = site.proxy(choose)
    count = proxy.abandon()
    site.later(
        HALF_OPEN_SECONDS,
        f"what was half open at {side} is cut",
        proxy.cut_abandoned,
        at_the_end=False,
    )
    return f"{side}: {count}"


# -- our own records


@event(times=3, sink="edge")
def disk_full(site: Site, choose: random.Random) -> str:
    """Whoever writes a record is told by the kernel that there is no space left."""
    site.postgres()
    state = site.edge_directory / "state"
    if not state.is_dir():
        raise NotPossibleError("there are no records yet")
    seconds = choose.uniform(2, 8)
    blocks = fill_disk(state, site.pipeline)
    site.keeper.excused[STATE_EXIT] += 1

    def free() -> None:
        for path in blocks:
            path.unlink(missing_ok=True)
        # It may be about to end.
        site.later(4.0, "records can be written", over, at_the_end=False)

    def over() -> None:
        site.keeper.excused[STATE_EXIT] -= 1

    site.later(seconds, "space on the disk", free)
    # Something to put on record.
    site.load.request_resync(site.pipeline, choose.choice(TABLES))
    return f"for {seconds:.1f} s"


@event(sink="server")
def disk_full_at_qdrant(site: Site, choose: random.Random) -> str:
    script, seconds = site.script(), choose.uniform(1, 5)
    message = (
        "Service internal error: No space left on device: WAL buffer size exceeds available disk"
        " space"
    )
    script.reject("write", "INTERNAL", message, times=1000)
    with contextlib.suppress(NotPossibleError):
        site.load.request_resync(site.pipeline, choose.choice(TABLES))
    site.later(seconds, "space at qdrant", lambda: site.script().clear())
    return f"for {seconds:.1f} s"


# -- requests and load


@event(times=2)
def resync_requested(site: Site, choose: random.Random) -> str:
    site.postgres()
    table = choose.choice(TABLES)
    site.load.request_resync(site.pipeline, table)
    return table


@event()
def rows_requested(site: Site, choose: random.Random) -> str:
    site.postgres()
    return site.load.request_rows(site.pipeline, choose)


@event(times=2)
def truncated(site: Site, choose: random.Random) -> str:
    site.postgres()
    return site.load.truncate(choose)


@event(times=3)
def filled(site: Site, choose: random.Random) -> str:
    site.postgres()
    return site.load.fill(choose)


@event(times=3)
def many_changed(site: Site, choose: random.Random) -> str:
    site.postgres()
    return site.load.change_all(choose)


@event(times=3)
def redefined(site: Site, choose: random.Random) -> str:
    site.postgres()
    return site.load.redefine(choose)


@event(times=2)
def held_open(site: Site, choose: random.Random) -> str:
    site.postgres()
    return site.load.hold_open(choose.uniform(1, 6))
