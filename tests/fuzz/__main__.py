"""``make fuzz RUNS=… SEED=…``: the coverage-guided campaign over every target.

So many inputs are divided over the targets. Each target runs in a process of its own
(:mod:`tests.fuzz.worker`) from its seeds, or from a corpus that ``--corpus`` keeps between
campaigns. An input that is a finding is left in ``--findings``, and the exit code is 1 then; to
run it again: ``python -m tests.fuzz.worker TARGET FILE``.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from tests.fuzz.targets import TARGETS

_DONE: Final = "Done "
_EXECUTED: Final = re.compile(r"stat::number_of_executed_units: (\d+)")
#: Lines of progress, which say nothing about a finding.
_PROGRESS: Final = ("#", "INFO:", "stat::", "\t")
#: What libFuzzer says when it has written an input that is a finding.
_LEFT: Final = "Test unit written to"
_COVERED: Final = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)/")
#: Longer ones are slower and reach no more; but nesting must be able to pass Python's limits.
_MAX_BYTES: Final = 4096
_INPUT_SECONDS: Final = 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a target did: inputs run, libFuzzer's features and corpus at the end, seconds, and the
    ending: clean, finding, or broken if it could not run."""

    name: str
    runs: int
    features: int
    corpus: int
    seconds: float
    ending: Literal["clean", "finding", "broken"]


def shares(runs: int, names: list[str]) -> dict[str, int]:
    """Divide the runs over targets by their shares, rounded up."""
    parts = {name: TARGETS[name]().share for name in names}
    whole = sum(parts.values())
    return {name: -(-runs * part // whole) for name, part in parts.items()}


def fuzz(name: str, runs: int, seed: int, corpus: Path, findings: Path) -> Outcome:
    """Run one target; what it says goes to standard error if there is a finding."""
    own = corpus / name
    own.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(TARGETS[name]().seeds):
        (own / f"seed-{number:04d}").write_bytes(data)
    options = {
        "runs": runs,
        # libFuzzer takes 0 for a random one.
        "seed": seed % 0xFFFFFFFF + 1,
        "max_len": _MAX_BYTES,
        "len_control": 20,
        "timeout": _INPUT_SECONDS,
        "rss_limit_mb": 1024,
        "print_final_stats": 1,
        "artifact_prefix": f"{findings}/{name}-",
    }
    started = time.monotonic()
    process = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz.worker", name),
            *(f"-{option}={value}" for option, value in options.items()),
            str(own),
        ],
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
        cwd=Path(__file__).parents[2],
    )
    said = process.stdout + process.stderr
    executed = _EXECUTED.search(said)
    covered = _COVERED.findall(said)
    _, features, kept = (int(number) for number in covered[-1]) if covered else (0, 0, 0)
    ending: Literal["clean", "finding", "broken"] = "clean"
    if process.returncode != 0 or _DONE not in said:
        ending = "finding" if _LEFT in said else "broken"
        lines = [line for line in said.splitlines() if not line.startswith(_PROGRESS)]
        sys.stderr.write("\n".join(lines[-40:]) + "\n")
    seconds = time.monotonic() - started
    runs = int(executed[1]) if executed else 0
    return Outcome(name, runs, features, kept, seconds, ending)


def main() -> int:
    """Run the campaign and print a line a target."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs of all targets")
    parser.add_argument("--seed", type=int, help="the same inputs again")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only these")
    parser.add_argument("--corpus", type=Path, help="keep inputs here, and begin with them")
    parser.add_argument("--findings", type=Path, default=Path(".cache/fuzz-findings"))
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 31) if arguments.seed is None else arguments.seed
    names = arguments.target or list(TARGETS)
    sys.stdout.write(f"seed {seed}\n")
    arguments.findings.mkdir(parents=True, exist_ok=True)
    failed = False
    total = 0
    with tempfile.TemporaryDirectory() as temporary:
        corpus = arguments.corpus or Path(temporary)
        for name, runs in shares(arguments.runs, names).items():
            outcome = fuzz(name, runs, seed, corpus.resolve(), arguments.findings.resolve())
            total += outcome.runs
            failed |= outcome.ending != "clean"
            sys.stdout.write(
                f"{name}: {outcome.runs} runs, {outcome.features} features, "
                f"{outcome.corpus} inputs kept, {outcome.seconds:.0f} s: {outcome.ending}\n"
            )
            sys.stdout.flush()
    sys.stdout.write(f"{total} inputs, {'not clean' if failed else 'clean'}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
