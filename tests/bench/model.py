"""What the machine allows: the model against which the rates into real sinks are judged.

A row costs *a* microseconds of CPU in Postgres (to send it), *b* in our process (to make a point of
it, into a sink that drops it), *g* in our process to send a finished request, and *c* in the sink
to write it. On C cores that all of them share, at the rate r rows a microsecond:

- the sink by itself writes no more than it does for a loop that sends finished requests and does
  nothing else: r <= the sink limit;
- all CPU together is no more than there is: r <= C / (a + b + g + c);
- what runs in one thread takes its time for each row: r <= 1 / (b + g) with our one interpreter,
  r <= 1 / a with the one backend that sends. With an embedded database c is spent in our process
  too, which holds the interpreter meanwhile, and so is d, the time in which what was written is
  made durable, be it in waiting for the disk: r <= 1 / (b + c + d), g being part of c. A stream is
  made durable as it goes on, and a chunk of a copy after its end, so that its d is 0.

The least of them is what is allowed. *a*, *b*, *g*, *c* and *d* are measured in the same run, each
without the others' parts: nothing that our engine adds to them, and no time in which it waits
although it need not, is allowed for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RowCost:
    """CPU microseconds a row, the sink limit in rows a second, and for an embedded database the
    microseconds a row that it takes to be durable."""

    postgres: float
    ours: float
    send: float
    sink: float
    sink_limit: float
    embedded: bool = False
    durable: float = 0.0


@dataclass(frozen=True, slots=True)
class Allowed:
    """Rows a second that the model allows, and by what it is bound."""

    rate: float
    bound: str


def allowed(cost: RowCost, cores: int) -> Allowed:
    """The least of the model's bounds. Raises ``ValueError`` for costs that are not positive."""
    if min(cost.postgres, cost.ours, cost.sink_limit) <= 0:
        raise ValueError("the costs of Postgres, of ours, and the sink limit must be positive")
    serial = cost.ours + (cost.sink + cost.durable if cost.embedded else cost.send)
    total = cost.postgres + cost.ours + cost.sink + (0.0 if cost.embedded else cost.send)
    bounds = {
        "the sink limit": cost.sink_limit,
        f"{cores} shared cores": cores / total * 1e6,
        "one thread of ours": 1e6 / serial,
        "one backend of Postgres": 1e6 / cost.postgres,
    }
    bound = min(bounds, key=lambda name: bounds[name])
    return Allowed(bounds[bound], bound)


def speed_up(postgres: float, ours: float, workers: int, cores: int) -> float:
    """How many times as fast so many copy workers can be as one, by CPU microseconds a row: each
    has a backend of its own, and all share the cores."""
    one = min(1 / max(postgres, ours), cores / (postgres + ours))
    many = min(workers / max(postgres, ours), cores / (postgres + ours))
    return many / one
