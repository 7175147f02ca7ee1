"""One target under libFuzzer: ``python -m tests.fuzz.worker TARGET [libFuzzer options]``.

atheris tells libFuzzer which branches of the instrumented modules an input takes, so that it keeps
and mutates the inputs that reach new ones. The first input that is a finding ends the process.
"""

from __future__ import annotations

import itertools
import logging
import random
import resource
import sys
from pathlib import Path
from typing import Final

import atheris

#: What is instrumented.
_MODULES: Final = [
    "cdc_sync.pgoutput",
    "cdc_sync.mapping",
    "cdc_sync.rows",
    "cdc_sync.postgres.copy_binary",
    "cdc_sync.sync.gather",
    "cdc_sync.sync.coalesce",
    "cdc_sync.sync.routing",
    "cdc_sync.sync.control",
    "cdc_sync.sync.resync_request",
]

with atheris.instrument_imports(include=_MODULES):
    from tests.fuzz.limits import check, watched
    from tests.fuzz.mutations import random_mutation
    from tests.fuzz.targets import TARGETS

#: Memory is measured for one input in so many, since that slows them down.
_MEASURED: Final = 16
#: What the process may map besides what it has: an allocation beyond it fails.
_SPARE_BYTES: Final = 1 << 30


def main() -> None:
    """Fuzz the target that the command line names, until libFuzzer ends the process."""
    target = TARGETS[sys.argv[1]]()
    logging.disable(logging.CRITICAL)
    _limit_memory()
    numbers = itertools.count()

    def one_input(data: bytes) -> None:
        check(target.name, target.run, data, measure=next(numbers) % _MEASURED == 0)

    def mutate(data: bytes, max_bytes: int, seed: int) -> bytes:
        # Half by libFuzzer, which has learnt what is compared with, half by the formats' own words.
        if seed % 2:
            mutated: bytes = atheris.Mutate(data, max_bytes)
            return mutated
        chance = random.Random(seed)
        return random_mutation(chance, [data], target.seeds)[:max_bytes]

    atheris.Setup([sys.argv[0], *sys.argv[2:]], one_input, custom_mutator=mutate)
    with watched():
        atheris.Fuzz()


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
