"""Takes secrets out of the process list (``ps``, ``/proc/PID/cmdline``), which every user can read.

The kernel shows the memory in which it handed over the arguments, so that memory is overwritten.
What stays visible is the moment from the start of the interpreter until then, and the history of a
shell: environment variables and files have neither. Imports little, so as to come early.

Source: proc_pid_cmdline(5), proc_pid_stat(5): fields 48 and 49, arg_start and arg_end.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_FLAGS: Final = (b"--pg.url", b"--qdrant.api-key")
#: Anywhere else, too: what looks like a password, in a URL or by its name.
_PASSWORD: Final = re.compile(
    rb"://.*:.*@|(?:password|passwd|api[_-]?key|secret)\s*=", re.IGNORECASE | re.DOTALL
)
_MASK: Final = b"***"
_PROCESS: Final = Path("/proc/self")


def hide_secrets() -> bool:
    """Overwrite the values of secret flags among this process's own arguments.

    Returns whether there is nothing left to see; False where the system does not let us.
    """
    try:
        shown = (_PROCESS / "cmdline").read_bytes()
        hidden = masked(shown)
        if hidden != shown:
            start, end = _arguments_area()
            if end - start != len(shown):
                return False
            with (_PROCESS / "mem").open("r+b", buffering=0) as memory:
                memory.seek(start)
                memory.write(hidden)
    except (OSError, ValueError, IndexError):
        return False
    return True


def masked(arguments: bytes) -> bytes:
    """Return arguments, each ended by NUL, of the same length without secrets."""
    secret_follows = False
    result = []
    for argument in arguments.split(b"\0"):
        flag, equals, value = argument.partition(b"=")
        if secret_follows:
            argument = _blank(argument)
        elif equals and flag in _FLAGS:
            argument = flag + equals + _blank(value)
        elif _PASSWORD.search(argument):
            argument = _blank(argument)
        secret_follows = argument in _FLAGS and not secret_follows
        result.append(argument)
    return b"\0".join(result)


def _blank(value: bytes) -> bytes:
    return _MASK[: len(value)].ljust(len(value), b"\0")


def _arguments_area() -> tuple[int, int]:
    # The name of the program, in parentheses, may hold anything.
    fields = (_PROCESS / "stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[48 - 3]), int(fields[49 - 3])
