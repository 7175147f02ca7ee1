"""What administrators do in a campaign, as its events: acts alone, several of them at once, while
the daemon is down or copies; commands; a second process; tables that join.

Everything here is optional, and comes by the name of the group.
"""

from __future__ import annotations

import contextlib
import functools
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Final

import psycopg

from tests.faults.campaign import table_acts  # noqa: F401 - registers its acts
from tests.faults.campaign.acts import ACTS, Act, write
from tests.faults.campaign.estate import JOINER, OWN_TABLES, PAPERS, REGIONS, ROWS, Hand
from tests.faults.campaign.events import add_event, event
from tests.faults.campaign.load import NotPossibleError
from tests.faults.campaign.site import CampaignError, Site

#: The name by which all of these are asked for.
ADMINISTRATORS: Final = "administrators"

_together = functools.partial(event, optional=True, group=ADMINISTRATORS)


# -- acts


@contextlib.contextmanager
def _at_work(site: Site, said: list[str], *, autocommit: bool = True) -> Iterator[Hand]:
    """A connection to work with; adds to ``said`` what was done over it."""
    assert site.estate is not None
    site.postgres()
    hand: Hand | None = None
    try:
        with site.estate.hand(autocommit=autocommit) as hand:
            yield hand
    except psycopg.errors.SyntaxError as error:
        raise CampaignError(f"an act is wrong: {error}") from error
    except (psycopg.Error, psycopg.Rollback) as error:
        if hand is not None:
            said += hand.statements
        if not said or not autocommit:
            raise NotPossibleError(f"{type(error).__name__}: {'; '.join(said)}") from error
        said.append(f"then {type(error).__name__}")
    else:
        said += hand.statements
    finally:
        site.load.redefined = time.monotonic()


def _leave(site: Site, choose: random.Random) -> None:
    """What cannot stay is put back some time."""
    assert site.estate is not None
    if choose.random() < 0.6:
        site.later(choose.uniform(0.1, 6), "put back", site.estate.try_restoring, at_the_end=False)


def _perform(site: Site, choose: random.Random, *acts: Act) -> str:
    """One after the other, in transactions of their own."""
    said: list[str] = []
    assert site.estate is not None
    for number, act in enumerate(acts):
        if number:
            time.sleep(choose.choice((0, choose.uniform(0, 0.3), choose.uniform(0.2, 1.5))))
        with contextlib.ExitStack() as stack:
            if len(acts) > 1:
                stack.enter_context(contextlib.suppress(NotPossibleError))
            hand = stack.enter_context(_at_work(site, said))
            act.perform(site.estate, hand, choose)
    _leave(site, choose)
    return "; ".join(said)


def _draw(choose: random.Random, *, alone: bool = True) -> Act:
    acts = [act for act in ACTS.values() for _ in range(act.times) if alone or not act.alone]
    return choose.choice(acts)


def _register_acts() -> None:
    for act in ACTS.values():
        strike = functools.partial(_one, act)
        add_event(act.name, strike, act.times, optional=True, group=ADMINISTRATORS)


def _one(act: Act, site: Site, choose: random.Random) -> str:
    return _perform(site, choose, act)


_register_acts()


@_together(times=8)
def acts_in_a_row(site: Site, choose: random.Random) -> str:
    """Several, close together."""
    return _perform(site, choose, *(_draw(choose) for _ in range(choose.randint(2, 5))))


@_together(times=8)
def acts_in_one_transaction(site: Site, choose: random.Random) -> str:
    """With changes of rows between them."""
    said: list[str] = []
    assert site.estate is not None
    with _at_work(site, said, autocommit=False) as hand:
        write(hand, choose)
        for _ in range(choose.randint(1, 3)):
            act = _draw(choose, alone=False)
            try:
                with hand.connection.transaction():
                    act.perform(site.estate, hand, choose)
                    write(hand, choose)
            except (psycopg.Error, NotPossibleError):
                if hand.connection.broken:
                    raise
        time.sleep(choose.choice((0, 0, choose.uniform(0, 1))))
        hand.connection.commit()
    _leave(site, choose)
    return "; ".join(said)


@_together(times=10)
def acts_while_it_is_down(site: Site, choose: random.Random) -> str:
    """Killed or stopped; some of it is undone before it is back."""
    site.postgres()
    assert site.estate is not None
    seconds = choose.uniform(1, 3)
    if choose.random() < 0.5:
        site.keeper.kill(60)
    else:
        site.keeper.stop(60)
    try:
        said = _perform(site, choose, *(_draw(choose) for _ in range(choose.randint(1, 4))))
        if choose.random() < 0.5:
            time.sleep(choose.uniform(0, 0.5))
            site.estate.try_restoring()
            said += "; put back"
    finally:
        site.keeper.rest(choose.uniform(0, seconds))
    return said


@_together(times=8)
def acts_in_a_copy(site: Site, choose: random.Random) -> str:
    """Which is asked for, and perhaps killed then."""
    site.postgres()
    table = choose.choice(OWN_TABLES)
    site.load.request_resync(site.pipeline, table)
    _tick(site, choose.uniform(0.1, 2.5))
    said = _perform(site, choose, *(_draw(choose) for _ in range(choose.randint(1, 3))))
    if choose.random() < 0.4:
        _tick(site, choose.uniform(0, 1))
        with contextlib.suppress(NotPossibleError):
            site.keeper.kill(choose.uniform(0, 1))
        said += "; killed"
    return f"of {table}: {said}"


@_together(times=4)
def acts_in_the_drain(site: Site, choose: random.Random) -> str:
    """While it finishes what is in flight."""
    site.postgres()
    assert site.estate is not None
    said: list[str] = []
    acts = [_draw(choose) for _ in range(choose.randint(1, 3))]
    pause = choose.uniform(0, 0.5)

    def act() -> None:
        time.sleep(pause)
        with contextlib.suppress(NotPossibleError):
            said.append(_perform(site, choose, *acts))

    with _at_work(site, []) as hand:
        write(hand, choose)
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    try:
        seconds = site.keeper.stop(choose_rest(choose))
    finally:
        thread.join()
    return f"of {seconds:.2f} s: {'; '.join(said)}"


def choose_rest(choose: random.Random) -> float:
    """Seconds that a daemon rests."""
    return choose.choice((0.0, choose.uniform(0, 2)))


def _tick(site: Site, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        site.tick()
        time.sleep(0.03)


# -- commands


@_together(times=4)
def rows_asked_for(site: Site, choose: random.Random) -> str:
    """By ``cdc-sync resync``: a table, a predicate, or keys."""
    table = choose.choice(OWN_TABLES)
    what: list[str] = choose.choice(
        ([], [], ["--where", f"id % 3 = {choose.randrange(3)}"], ["--keys"])
    )
    if what == ["--keys"]:
        more = {"days": ",5", REGIONS: ",x,5"}.get(table, "")
        what += [f"{choose.randint(1, 2 * ROWS)}{more}" for _ in range(8)]
    return site.command("resync", "--table", table, *what)


@_together(times=3)
def verified_and_repaired(site: Site, choose: random.Random) -> str:
    """Of an embedded database only the pipeline knows."""
    if site.qdrant is None:
        raise NotPossibleError("the database is in use")
    return site.command("verify", "--repair")


@_together(times=3, sink="server")
def letters_handled(site: Site, choose: random.Random) -> str:
    """Rows that could not be written are asked for again, or forgotten."""
    return site.command("dlq", choose.choice(("retry", "retry", "drop")), "--all")


@_together(times=5, sink="server")
def collection_rebuilt(site: Site, choose: random.Random) -> str:
    """Perhaps twice at once, killed, or given up."""
    table = choose.choice(OWN_TABLES)
    arguments = site.rebuild_arguments(table)
    said = site.command(*arguments)
    if choose.random() < 0.3:
        site.command(*arguments)
        said += ", twice"
    end = choose.choice(("", "", "killed", "aborted"))
    seconds = choose.uniform(1, 12)
    if end == "killed":
        site.later(seconds, "a command is killed", lambda: site.the_commands().kill_one(choose))
        if choose.random() < 0.5:
            site.later(seconds + 1, "rebuild once more", lambda: _again(site, *arguments))
    elif end == "aborted":
        abort = ("rebuild", "--table", table, "--abort")
        site.later(seconds, "rebuild is given up", lambda: _again(site, *abort))
    return f"{said} {end} after {seconds:.1f} s" if end else said


def _again(site: Site, *arguments: str) -> None:
    site.command(*arguments)


# -- processes and configuration


@_together(times=4, sink="server")
def standby_started(site: Site, choose: random.Random) -> str:
    """A second process, equal to the first."""
    site.start_other()
    return ""


@_together(times=6, sink="server")
def active_one_struck(site: Site, choose: random.Random) -> str:
    """The one that has the slot is killed, ended or stopped for a while; if there is another, it
    takes over."""
    keeper = site.active()
    if keeper is None:
        raise NotPossibleError("nobody streams")
    how = choose.choice(("killed", "ended", "paused", "paused"))
    if how == "killed":
        keeper.kill(choose.uniform(0, 3))
    elif how == "ended":
        keeper.stop(choose.uniform(0, 3))
    else:
        seconds = choose.uniform(1, 9)
        keeper.send(signal.SIGSTOP)
        site.later(seconds, "the paused one goes on", lambda: keeper.send(signal.SIGCONT))
        how = f"paused for {seconds:.1f} s"
    if choose.random() < 0.6:
        how += "; " + _perform(site, choose, *(_draw(choose) for _ in range(choose.randint(1, 2))))
    return how


@_together(times=2)
def table_joined(site: Site, choose: random.Random) -> str:
    """The configuration gets another table, and every process is started again."""
    estate = site.estate
    assert estate is not None
    if JOINER in estate.configured:
        raise NotPossibleError("it has joined")
    if not site.has_streamed:
        raise NotPossibleError("nothing has streamed yet")
    said: list[str] = []
    if estate.role is not None:
        with _at_work(site, said) as hand:
            write(hand, choose, JOINER)
            hand.run(f"ALTER PUBLICATION {estate.publication} ADD TABLE {JOINER}")
            write(hand, choose, JOINER, PAPERS)
    estate.configured.append(JOINER)
    site.configure_anew(0 if choose.random() < 0.5 else choose.uniform(0, 2))
    return "; ".join(said)
