"""What happens in a campaign, and when: a pure function of its seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from tests.faults.campaign.events import EVENTS, Event
from tests.faults.campaign.site import SinkName

#: Rounds with one site.
_ROUNDS_A_SITE: Final = (2, 3, 4)
_EVENTS: Final = (5, 12)
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


def schedule(seed: int, optional: frozenset[str] = frozenset()) -> Iterator[Round]:
    """The rounds of a seed, without end. ``optional``: events that come only if they are named."""
    choose = random.Random(seed)
    deck = _Deck(choose, optional)
    number = 0
    while True:
        # The first site is one of each, so that short campaigns see both.
        sinks: tuple[SinkName, SinkName] = ("server", "edge")
        sink = sinks[number] if number < 2 else sinks[choose.random() < _EDGE_PART]
        for turn in range(1 if number < 2 else choose.choice(_ROUNDS_A_SITE)):
            events = tuple(
                Planned(_gap(choose), deck.draw(sink), choose.randrange(1 << 32))
                for _ in range(choose.randint(*_EVENTS))
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

    def __init__(self, choose: random.Random, optional: frozenset[str]) -> None:
        self._choose = choose
        self._all = [
            one
            for one in EVENTS.values()
            for _ in range(one.times)
            if not one.optional or one.kind in optional
        ]
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
