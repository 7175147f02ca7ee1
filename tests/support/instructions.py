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
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Final

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
_SECONDS: Final = 600
_ROOT: Final = Path(__file__).parents[2]


def unavailable() -> str | None:
    """Why nothing can be counted here; None: it can."""
    if platform.machine() != "x86_64" or sys.implementation.name != "cpython":
        return "counts CPython on x86-64 only"
    return None if shutil.which("valgrind") else "valgrind is not installed"


def count() -> dict[hot_path.Path, int]:
    """Count the instructions a row of every path, in a process of its own (10 s, or more on a busy
    machine)."""
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
        counts = [_total(out.with_name(f"out.{n}")) for n in range(1, 2 * len(hot_path.PATHS) + 1)]
    rows = _MANY_ROWS - _FEW_ROWS
    return {
        path: (many - few) // rows
        for path, few, many in zip(hot_path.PATHS, counts[::2], counts[1::2], strict=True)
    }


def _total(dump: Path) -> int:
    found = re.search(r"^(?:summary|totals): (\d+)", dump.read_text(), re.MULTILINE)
    assert found is not None, f"{dump.name} holds no count"
    return int(found[1])


def baseline() -> dict[hot_path.Path, int] | None:
    """The baseline of this Python version; None: there is none."""
    entry = json.loads(BASELINE_FILE.read_text()).get(_python())
    return None if entry is None else entry["instructions"]


def baseline_libraries() -> dict[str, str]:
    """The versions of libraries with which it was counted."""
    found: dict[str, str] = json.loads(BASELINE_FILE.read_text())[_python()]["libraries"]
    return found


def libraries() -> dict[str, str]:
    """The versions of libraries here."""
    return {name: version(name) for name in LIBRARIES}


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _renew(counts: dict[hot_path.Path, int]) -> None:
    known = json.loads(BASELINE_FILE.read_text()) if BASELINE_FILE.exists() else {}
    known[_python()] = {"instructions": counts, "libraries": libraries()}
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
    for path in hot_path.PATHS:
        # What is made at first use is made before, as is code that CPython specializes.
        hot_path.prepare(path, _FEW_ROWS, _DIMENSION)[0]()
        for rows in (_FEW_ROWS, _MANY_ROWS):
            run, _ = hot_path.prepare(path, rows, _DIMENSION)
            request(_START)
            request(_ZERO_STATS)
            run()
            request(_DUMP_STATS)
            request(_STOP)


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
    counts = count()
    known = baseline() or {} if BASELINE_FILE.exists() else {}
    for path, instructions in counts.items():
        sys.stdout.write(f"{path}: {instructions:,} a row (baseline {known.get(path, 0):,})\n")
    if arguments.renew:
        _renew(counts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
