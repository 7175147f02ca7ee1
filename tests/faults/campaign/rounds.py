"""Has a campaign happen: round after round, and a comparison after each."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg

from cdc_sync.demo.embedded import PostgresServer
from tests.faults.campaign.administrators import ADMINISTRATORS
from tests.faults.campaign.events import EVENTS
from tests.faults.campaign.load import NotPossibleError
from tests.faults.campaign.report import CampaignLog
from tests.faults.campaign.schedule import Round, schedule
from tests.faults.campaign.site import CampaignError, Site
from tests.support.fix_postgres import create_database, drop_database
from tests.support.oracle import compare
from tests.support.qdrant_control import QdrantProcess

#: A half-open replication connection is noticed within twice of wal_sender_timeout.
POSTGRES_SETTINGS: Final = {
    "wal_sender_timeout": "4s",
    "max_connections": "200",
    "max_wal_size": "1GB",
}
_MEMORY_BYTES: Final = 400e6
_TICK_SECONDS: Final = 0.03
#: For everything to quiet down. The longest that anything may wait by itself is a half-open
#: connection to Qdrant, noticed by gRPC's keepalive after 50 s.
_QUIET_SECONDS: Final = 150.0
#: With administrators most tables are read again, some of them after one another.
_QUIET_SECONDS_LONG: Final = 240.0
_SIGN_SECONDS: Final = 0.3
#: The daemon looks at the catalog every five seconds.
_LOOK_SECONDS: Final = 6.0
#: How long differences may last that it has not noticed yet.
_LATE_SECONDS: Final = 45.0


@dataclass(frozen=True)
class Campaign:
    """``seconds``: how long to begin new rounds. ``first_round``: rounds before it are left out;
    it gets a new site, but the same load and the same faults. ``more`` and ``only``: names of
    events or groups, separated by commas, to have besides, or to have alone."""

    seed: int
    seconds: float
    directory: Path
    first_round: int = 0
    more: str = ""
    only: str = ""

    @property
    def administrators(self) -> bool:
        """Whether there are any."""
        named = event_names(self.more) | event_names(self.only)
        return any(EVENTS[kind].group == ADMINISTRATORS for kind in named)

    @property
    def rounds(self) -> Iterator[Round]:
        """What happens."""
        return schedule(self.seed, event_names(self.more), event_names(self.only))

    @property
    def arguments(self) -> str:
        """By which ``make faults`` has the same again, but for the time and the round."""
        names = {"SEED": str(self.seed), "WITH": self.more, "ONLY": self.only}
        return " ".join(f"{name}={value}" for name, value in names.items() if value)


class Runner:
    """Runs a campaign on one Postgres server; :meth:`run` raises with what went wrong."""

    def __init__(self, campaign: Campaign, server: PostgresServer, log: CampaignLog) -> None:
        self._campaign = campaign
        self._server = server
        self._log = log
        self._site: Site | None = None
        self._closing = ExitStack()
        self.rounds = 0
        self.peak_bytes = 0

    def run(self) -> None:
        """Rounds until the time is up; at least one."""
        campaign = self._campaign
        try:
            for planned in campaign.rounds:
                if planned.number < campaign.first_round:
                    continue
                self._log.round = planned.number
                self._round(planned)
                self.rounds += 1
                if self._log.seconds >= campaign.seconds:
                    return
        finally:
            self._closing.close()

    # -- one round

    def _round(self, planned: Round) -> None:
        if planned.fresh or self._site is None:
            self._closing.close()
            self._site = self._open(planned)
        site = self._site
        self._log.say(
            f"{planned.sink}{', new' if planned.fresh else ''}: {len(planned.events)} events"
            + (", once it streams" if planned.calm else "")
        )
        if planned.calm:
            self._until_streaming(site)
        if site.qdrant is not None:
            site.qdrant.script.clear_log()
        site.start(planned.seed % 100_000)
        try:
            self._happen(site, planned)
        finally:
            site.mend()
            done = site.finish()
        self._log.say(f"quiet: {', '.join(f'{n} {what}' for what, n in done.items())}")
        site.keeper.note_memory()
        self._quiet(site)
        site.take_collections()
        self._compare(site)
        self.peak_bytes = max(self.peak_bytes, site.keeper.peak_bytes)
        self._log.say(f"equal; {site.keeper.starts} starts so far")

    def _open(self, planned: Round) -> Site:
        directory = self._campaign.directory / f"round-{planned.number}"
        database = create_database(self._server)
        self._closing.callback(drop_database, database)
        qdrant = (
            QdrantProcess(directory.with_name(f"{directory.name}-qdrant"))
            if (planned.sink == "server")
            else None
        )
        site = Site(
            directory,
            self._server,
            database,
            qdrant,
            self._log,
            planned.seed,
            administrators=self._campaign.administrators,
        )
        self._closing.callback(site.close)
        site.keeper.start()
        return site

    def _happen(self, site: Site, planned: Round) -> None:
        for one in planned.events:
            self._wait(site, time.monotonic() + one.gap)
            try:
                detail = one.event.strike(site, random.Random(one.seed))
            except NotPossibleError as error:
                self._log.skip(one.event.kind, str(error))
            else:
                self._log.event(one.event.kind, detail)
        self._wait(site, time.monotonic() + 1)

    @staticmethod
    def _wait(site: Site, until: float) -> None:
        site.tick()
        while time.monotonic() < until:
            time.sleep(_TICK_SECONDS)
            site.tick()

    # -- the end of a round

    def _until_streaming(self, site: Site) -> None:
        deadline = time.monotonic() + _QUIET_SECONDS
        with site.database.connect() as connection:
            alive = _SignsOfLife(connection)
            self._until(site, lambda: self._streams(site, alive), "streaming", deadline)

    def _quiet(self, site: Site) -> None:
        """Wait until everything that was committed is confirmed, and every table that has to be
        read again has been."""
        seconds = _QUIET_SECONDS if site.estate is None else _QUIET_SECONDS_LONG
        deadline = time.monotonic() + seconds
        with site.database.connect() as connection:
            alive = _SignsOfLife(connection)
            reached = _caught_up(connection, site.pipeline)
            self._until(site, lambda: self._streams(site, alive), "streaming", deadline)
            self._until(site, lambda: alive() and reached(), "the last position", deadline)
            if site.load.redefined:
                self._wait(site, max(site.load.redefined, site.streams_since) + _LOOK_SECONDS)
                site.load.redefined = 0.0
            done = lambda: alive() and not site.reader.wanted and self._follows(site)  # noqa: E731
            self._until(site, done, "tables that are read again", deadline)
        self._log.say("caught up")
        if site.reader.bugs:
            raise CampaignError("the daemon logged:\n" + "\n".join(site.reader.bugs[:3]))

    @staticmethod
    def _streams(site: Site, alive: Callable[[], bool]) -> bool:
        if not alive() or not site.daemon.running:
            return False
        try:
            return site.daemon.status().get("state") == "streaming"
        except OSError:
            return False

    @staticmethod
    def _follows(site: Site) -> bool:
        """Whether every table streams; without administrators none stops."""
        if site.estate is None:
            return True
        try:
            tables = site.daemon.status()["tables"]
        except OSError:
            return False
        return all(table["state"] == "streaming" for table in tables)

    def _until(self, site: Site, condition: Callable[[], bool], what: str, deadline: float) -> None:
        while not condition():
            site.tick()
            if time.monotonic() > deadline:
                raise CampaignError(
                    f"{what} did not come in time after the faults;"
                    f" wanted: {site.reader.wanted}\n{site.daemon.log()[-6000:]}"
                )
            time.sleep(_TICK_SECONDS)

    def _compare(self, site: Site) -> None:
        deadline = time.monotonic() + (_LATE_SECONDS if site.estate is not None else 0)
        while (found := self._differences(site)) is not None:
            if time.monotonic() > deadline:
                raise CampaignError(found)
            # The publication is looked at every ten seconds.
            self._log.say(found.partition("\n")[0])
            self._wait(site, time.monotonic() + _LATE_SECONDS / 3)
            self._quiet(site)

    def _differences(self, site: Site) -> str | None:
        """What is not equal in one of the tables."""
        if site.qdrant is None:
            # An embedded database is locked.
            site.keeper.stop(0)
        for table, collection in site.collections().items():
            differences = compare(
                site.database.url,
                table,
                qdrant_url=site.target_url,
                collection=collection,
                where=site.where(table),
            )
            if differences:
                shown = "\n".join(map(str, differences[:10]))
                return f"{len(differences)} differences in {table}:\n{shown}"
        return None


class _SignsOfLife:
    """Something in the WAL now and then, so that the server has a position to report."""

    def __init__(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        self._connection = connection
        self._last = 0.0

    def __call__(self) -> bool:
        if time.monotonic() - self._last > _SIGN_SECONDS:
            self._last = time.monotonic()
            self._connection.execute("SELECT pg_logical_emit_message(true, 'tests', '')")
        return True


def _caught_up(connection: psycopg.Connection[tuple[object, ...]], slot: str) -> Callable[[], bool]:
    ((target,),) = connection.execute("SELECT pg_current_wal_insert_lsn()::text").fetchall()

    def reached() -> bool:
        found = connection.execute(
            "SELECT confirmed_flush_lsn >= %s::pg_lsn FROM pg_replication_slots"
            " WHERE slot_name = %s",
            (target, slot),
        ).fetchone()
        return found == (True,)

    return reached


def event_names(names: str) -> frozenset[str]:
    """Names of events or of groups of them as given, separated by commas; raises ValueError for one
    there is not."""
    wanted = frozenset(name for name in names.split(",") if name)
    for group in wanted & {one.group for one in EVENTS.values()}:
        members = {kind for kind, one in EVENTS.items() if one.group == group}
        wanted = wanted - {group} | members
    unknown = wanted - EVENTS.keys()
    if unknown:
        raise ValueError(f"no events {sorted(unknown)}; there are {sorted(EVENTS)}")
    return wanted


def run_campaign(campaign: Campaign, server: PostgresServer) -> None:
    """Run a campaign and show its log; raises AssertionError with what went wrong, and how to have
    it again."""
    log = CampaignLog(campaign.seed, campaign.directory / "campaign.log")
    seconds, arguments = campaign.seconds, campaign.arguments
    log.say(f"{seconds:g} seconds; again: make faults DURATION={seconds:g} {arguments}")
    runner = Runner(campaign, server, log)
    try:
        runner.run()
    except Exception as error:
        again = f"make faults DURATION=1 ROUND={log.round} {arguments}"
        raise AssertionError(f"{error}\n{log.lines_of_round()}\nagain: {again}") from error
    finally:
        log.say(log.summary())
        log.close()
    peak = runner.peak_bytes
    assert peak < _MEMORY_BYTES, f"the daemon grew to {peak / 1e6:.0f} MB"
