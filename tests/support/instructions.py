"""Counts the machine instructions of the hot path, per row: unlike times, they are the same on a
busy machine and on an idle one.

A second process runs under callgrind (package ``valgrind``), which counts from the moment on at
which it is told to, so that imports cost little. Each path is run with two numbers of rows, and
the difference is divided by that of the numbers: what does not grow with the rows cancels out.

    python -m tests.support.instructions            # print what is counted, and the baseline
    python -m tests.support.instructions --renew    # make it the baseline of this Python version
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import mmap
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from tests.support import hot_path

#: Instructions a row by Python version and path, and the versions of libraries they were counted
#: with.
BASELINE_FILE: Final = Path(__file__).with_name("instructions.json")
#: How many more instructions a row may take than the baseline says.
TOLERANCE: Final = 0.10
LIBRARIES: Final = ("numpy", "orjson")

#: Multiples of the lanes' number and of the smallest request: the same number of requests.
_FEW_ROWS, _MANY_ROWS = 256, 768
#: So that most of what is counted is ours, and not the arithmetic of one processor or another.
_DIMENSION: Final = 64
#: Few rows and many of every path and of the reference.
_RUNS: Final = 2 * (len(hot_path.PATHS) + 1)
#: References that differ by less are of the same build.
_SAME: Final = 0.01
_SECONDS: Final = 600
_ROOT: Final = Path(__file__).parents[2]


def unavailable() -> str | None:
    """Why nothing can be counted here; None: it can."""
    if platform.machine() != "x86_64" or sys.implementation.name != "cpython":
        return "counts CPython on x86-64 only"
    return None if shutil.which("valgrind") else "valgrind is not installed"


@dataclass(frozen=True, slots=True)
class Counts:
    """Instructions a row of every path, and a round of :func:`_reference`, which shows how this
    CPython was built; with the versions of libraries that take part."""

    paths: dict[hot_path.Path, int]
    reference: int
    libraries: dict[str, str]

    def alike(self, other: Counts) -> bool:
        """Whether both were counted in the same surroundings."""
        same = abs(self.reference / other.reference - 1) < _SAME
        return same and self.libraries == other.libraries

    def grown(self, before: Counts) -> dict[hot_path.Path, float]:
        """The paths that take more than the tolerance allows, and how much more, as a part of what
        they took. In other surroundings that is scaled by the reference, and the tolerance
        doubled."""
        alike = self.alike(before)
        scale = 1.0 if alike else self.reference / before.reference
        most = TOLERANCE if alike else 2 * TOLERANCE
        growth = {
            path: self.paths[path] / (then * scale) - 1 for path, then in before.paths.items()
        }
        return {path: round(part, 3) for path, part in growth.items() if part > most}


def count() -> Counts:
    """Count, in a process of its own (15 s, or more on a busy machine)."""
    with tempfile.TemporaryDirectory(prefix="cdc_sync_instructions_") as directory:
        out = Path(directory, "out")
        subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                "--instr-atstart=no",
                f"--callgrind-out-file={out}",
                sys.executable,
                "-m",
                "tests.support.instructions",
                "--worker",
            ],
            check=True,
            cwd=_ROOT,
            capture_output=True,
            timeout=_SECONDS,
            env={**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
        )
        counts = [_total(dump) for dump in (out.with_name(f"out.{n}") for n in range(1, _RUNS + 1))]
    rows = _MANY_ROWS - _FEW_ROWS
    differences = [
        (many - few) // rows for few, many in zip(counts[::2], counts[1::2], strict=True)
    ]
    paths = dict(zip(hot_path.PATHS, differences, strict=False))
    return Counts(paths, differences[-1], {name: version(name) for name in LIBRARIES})


def _total(dump: Path) -> int:
    found = re.search(r"^(?:summary|totals): (\d+)", dump.read_text(), re.MULTILINE)
    assert found is not None, f"{dump.name} holds no count"
    return int(found[1])


def baseline() -> Counts | None:
    """The baseline of this Python version; None: there is none."""
    entry = _baselines().get(_python())
    return None if entry is None else Counts(**entry)


def _baselines() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(BASELINE_FILE.read_text())
    return found


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _renew(counts: Counts) -> None:
    known = {**_baselines(), _python(): asdict(counts)}
    BASELINE_FILE.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


# -- the process that is counted

#: ``rdx = first argument; rax = second argument;`` the sequence that valgrind knows for a request;
#: ``return rdx``. Source: valgrind.h, VALGRIND_DO_CLIENT_REQUEST_EXPR for amd64; elsewhere the
#: sequence does nothing.
_REQUEST_CODE: Final = bytes.fromhex(
    "4889fa4889f0 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0c3"
)
#: Requests of callgrind.h.
_DUMP_STATS, _ZERO_STATS, _START, _STOP = (0x43540000 + n for n in (0, 1, 4, 5))


def _compile_request() -> Callable[[int], None]:
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_REQUEST_CODE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    words = ctypes.c_size_t * 6
    call = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(words))(address)
    call.code = code  # type: ignore[attr-defined]  # must live as long

    def request(number: int) -> None:
        call(0, ctypes.pointer(words(number)))

    return request


def _work() -> None:
    request = _compile_request()
    gc.disable()

    def measure(prepare: Callable[[int], Callable[[], object]]) -> None:
        # What is made at first use is made before, as is code that CPython specializes.
        prepare(_FEW_ROWS)()
        for rows in (_FEW_ROWS, _MANY_ROWS):
            run = prepare(rows)
            request(_START)
            request(_ZERO_STATS)
            run()
            request(_DUMP_STATS)
            request(_STOP)

    for path in hot_path.PATHS:
        measure(lambda rows, path=path: hot_path.prepare(path, rows, _DIMENSION)[0])  # type: ignore[misc]
    measure(lambda rows: lambda: _reference(rows))


def _reference(rounds: int) -> int:
    """What a hot path is made of, and no line of ours: calls, look-ups, structs, joined bytes."""
    unpack, known, total = struct.Struct(">IB").unpack_from, {b"a": b"x", b"b": b"y"}, 0

    def one(data: bytes, at: int) -> bytes:
        size, kind = unpack(data, at)
        return known[data[at + 5 : at + 6]] if kind else bytes(size)

    frame = struct.pack(">IB", 1, 1) + b"a"
    for _ in range(rounds):
        parts = [one(frame, 0) for _ in range(20)]
        total += len(b"".join(parts))
    return total


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.instructions")
    parser.add_argument("--renew", action="store_true", help="write the baseline")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work()
        return 0
    if (reason := unavailable()) is not None:
        sys.stderr.write(f"{reason}\n")
        return 1
    counts, known = count(), baseline()
    for path, instructions in counts.paths.items():
        before = f"{known.paths[path]:,}" if known else "none"
        sys.stdout.write(f"{path}: {instructions:,} instructions a row (baseline: {before})\n")
    if known and not counts.alike(known):
        sys.stdout.write("CPython's build or libraries differ from the baseline's.\n")
    if arguments.renew:
        _renew(counts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
