"""What happens in a campaign, and when: a pure function of its seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tests.faults.campaign.events import EVENTS, Event
from tests.faults.campaign.site import SinkName

#: Rounds with one site.
_ROUNDS_A_SITE: Final = (2, 3, 4)
_EVENTS: Final = (5, 12)
#: What administrators do is soon done, and is worth more where other things are not over yet.
_EVENTS_OF_GROUPS: Final = (9, 20)
_EDGE_PART: Final = 0.25


@dataclass(frozen=True)
class Planned:
    """An event, so many seconds after the one before; ``seed`` of its own choices."""

    gap: float
    event: Event
    seed: int


@dataclass(frozen=True)
class Round:
    """``fresh``: with a new site. ``calm``: nothing happens before the daemon streams; else its
    start and a first copy have their part. ``seed`` is that of the load."""

    number: int
    sink: SinkName
    fresh: bool
    calm: bool
    seed: int
    events: tuple[Planned, ...]


def schedule(
    seed: int, optional: frozenset[str] = frozenset(), only: frozenset[str] = frozenset()
) -> Iterator[Round]:
    """The rounds of a seed, without end. ``optional``: events that come only if they are named;
    ``only``: none but these, if there are any, and so only for sinks that know some of them."""
    choose = random.Random(seed)
    wanted = [
        one
        for one in EVENTS.values()
        if (one.kind in only if only else not one.optional or one.kind in optional)
    ]
    deck = _Deck(choose, wanted)
    count = _EVENTS_OF_GROUPS if any(one.group for one in wanted) else _EVENTS
    both: tuple[SinkName, ...] = ("server", "edge")
    known = [sink for sink in both if any(sink in one.sinks for one in wanted)]
    number = 0
    for site in itertools.count():
        # The first two are one of each, so that short campaigns see both.
        edge = site == 1 if site < 2 else choose.random() < _EDGE_PART
        sink = known[-1] if edge else known[0]
        for turn in range(2 if site < 2 else choose.choice(_ROUNDS_A_SITE)):
            events = tuple(
                Planned(_gap(choose), deck.draw(sink), choose.randrange(1 << 32))
                for _ in range(choose.randint(*count))
            )
            calm = turn > 0 or choose.random() < 0.5
            yield Round(number, sink, turn == 0, calm, choose.randrange(1 << 32), events)
            number += 1


def _gap(choose: random.Random) -> float:
    """At once, soon, or when the daemon has got over the last one."""
    return choose.choice((0.0, choose.uniform(0.2, 1), choose.uniform(1, 3), choose.uniform(3, 5)))


class _Deck:
    """Every event as often as it is to come, in random order, again and again: even a short
    campaign has some of everything."""

    def __init__(self, choose: random.Random, wanted: Sequence[Event]) -> None:
        self._choose = choose
        self._all = [one for one in wanted for _ in range(one.times)]
        self._left: list[Event] = []

    def draw(self, sink: SinkName) -> Event:
        """The next event that is for this kind of sink; the others keep their place."""
        for place, one in enumerate(self._left):
            if sink in one.sinks:
                return self._left.pop(place)
        more = list(self._all)
        self._choose.shuffle(more)
        self._left += more
        return self.draw(sink)
