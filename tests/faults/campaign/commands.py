"""Commands of cdc-sync that run beside the daemon."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.faults.campaign.report import CampaignLog

_PATIENCE_SECONDS: Final = 60.0
#: A bug, or one of the command line.
_BAD_EXITS: Final = frozenset({1, 2})


class CommandError(AssertionError):
    """A command ended as none may."""


@dataclass
class _Running:
    name: str
    process: subprocess.Popen[bytes]
    output: Path
    until: float


class Commands:
    """Starts them, and sees how they end."""

    def __init__(self, directory: Path, log: CampaignLog) -> None:
        self._directory = directory
        self._log = log
        self._running: deque[_Running] = deque()
        self._number = 0
        #: The tables of which rebuilds were begun.
        self.rebuilds: set[str] = set()

    def start(self, config: Path, *arguments: str) -> str:
        """Start one; returns what."""
        self._number += 1
        command, *rest = arguments
        name = f"{command} {' '.join(rest)}"
        place = 2 if command == "dlq" else 1
        arguments = (*arguments[:place], "--config", str(config), *arguments[place:])
        output = self._directory / f"command-{self._number}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "cdc_sync", *arguments],
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        until = time.monotonic() + _PATIENCE_SECONDS
        self._running.append(_Running(name, process, output, until))
        return name

    def kill_one(self, choose: random.Random) -> None:
        """SIGKILL, or SIGTERM."""
        running = [one for one in self._running if one.process.poll() is None]
        if running:
            how = choose.choice((signal.SIGKILL, signal.SIGTERM))
            choose.choice(running).process.send_signal(how)

    def over(self) -> bool:
        """Whether all have ended; raises :class:`CommandError` for how one did. One that is late
        is told to end."""
        while self._running and (code := self._running[0].process.poll()) is not None:
            one = self._running.popleft()
            text = one.output.read_text(encoding="utf-8", errors="replace")
            self._log.say(f"  {one.name} ended with {code}")
            if code in _BAD_EXITS or "Report this with the trace" in text:
                raise CommandError(f"{one.name} ended with {code}:\n{text[-4000:]}")
        for one in self._running:
            if time.monotonic() > one.until:
                self._log.say(f"  {one.name} is told to end")
                one.process.send_signal(signal.SIGTERM)
                one.until = time.monotonic() + _PATIENCE_SECONDS
        return not self._running

    def close(self) -> None:
        """End all of them."""
        for one in self._running:
            if one.process.poll() is None:
                one.process.kill()
            one.process.wait()
        self._running.clear()
