"""Credentials that change while a program runs: secrets that come from files, and how long a server
may refuse what it took before.

Passwords and keys are rotated in either order. Where the file is replaced first, the old secret
works until the server is changed; so a file is read again when the server refuses, and what it
holds is taken over once the server accepts it. Where the server is changed first, the refusal
passes as soon as the file arrives, so for a while it is one that passes by itself.

What is known of one side goes with its settings, also to other processes, and is shared by all
their copies.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from pydantic import SecretStr

_LIMIT_BYTES: Final = 64 * 1024
#: After so long without a refusal the next one is the first of another change.
_EPISODE_SECONDS: Final = 60.0
#: How often it is said that a secret is refused.
_REMIND_SECONDS: Final = 60.0


class SecretFileError(ValueError):
    """A file that holds no secret; the message completes "Cannot use …: "."""


def read_secret(path: Path) -> str:
    """Return a file's text without its last newline.

    Raises ``OSError``, ``ValueError`` for what is no path, ``UnicodeDecodeError``, and
    :class:`SecretFileError` for an empty file or one of more than 64 KiB.
    """
    with path.open("rb") as file:
        content = file.read(_LIMIT_BYTES + 1)
    text = content.decode("utf-8").removesuffix("\n").removesuffix("\r")
    if not text:
        raise SecretFileError("it is empty")
    if len(content) > _LIMIT_BYTES:
        raise SecretFileError(f"it has more than {_LIMIT_BYTES} bytes")
    return text


class SecretFile(SecretStr):
    """A secret from a file. ``setting`` is its dotted name.

    Its value is what the file held when it was read first, or what was taken over since.
    """

    def __init__(self, value: str, setting: str, path: Path) -> None:
        super().__init__(value)
        self.setting = setting
        self.path = path

    def look(self) -> str | None:
        """What the file holds now; None while that is no secret."""
        try:
            return read_secret(self.path)
        except (OSError, ValueError):
            return None

    def take(self, value: str) -> None:
        """Take over what the file holds, which the server has accepted."""
        if value != self._secret_value:
            self._secret_value = value
            if _listener is not None:
                _listener.read_again(self)


class Listener(Protocol):
    """Told of credentials as they change; may be called by any thread."""

    def read_again(self, secret: SecretFile) -> None:
        """A secret was read again, and taken over."""

    def refused(self, side: str, reason: str, seconds: float) -> None:
        """``side`` refuses what it took before; for so many seconds it is tried again."""


_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """Have ``listener`` told in this process, and nobody else; None: nobody."""
    global _listener
    _listener = listener


@dataclass(frozen=True, slots=True)
class Refusal:
    """What becomes of credentials that are refused. ``waits``: it is tried again by itself.
    ``about`` goes on with the message, and may be empty; ``remedy``: None where the usual one
    holds."""

    waits: bool
    about: str = ""
    remedy: str | None = None


@dataclass(slots=True)
class Login:
    """Whether a server, ``side``, takes the credentials of some settings.

    Equal to any other: settings are not different for it.
    """

    side: str = field(compare=False)
    #: It has taken some, in this process or in the one that the settings come from.
    accepted: bool = field(default=False, compare=False)
    _refused: _Refused | None = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> tuple[type[Login], tuple[str, bool]]:
        # Times are of this machine's clock.
        return Login, (self.side, self.accepted)

    def accept(self) -> None:
        """They were accepted."""
        self.accepted = True
        self._refused = None

    def refused_lately(
        self, tried: tuple[str, ...], seconds: float
    ) -> tuple[str, str | None] | None:
        """Message and remedy if the same were refused within so many seconds, and may be again."""
        last, now = self._refused, time.monotonic()
        if last is None or last.tried != tried or now >= min(last.at + seconds, last.ends):
            return None
        return last.message, last.remedy

    def refuse(
        self,
        reason: str,
        grace_seconds: float,
        secret: SecretStr | None,
        tried: tuple[str, ...] = (),
        state: str | None = None,
    ) -> Refusal:
        """They were refused, and what the file of ``secret`` held then, too.

        ``secret`` is the one that was used; None: something else is refused, such as what is read
        with every connection.
        ``tried`` are the values that were refused. ``state`` says why what the file holds is of no
        use, where it differs.
        """
        if not self.accepted:
            return Refusal(waits=False)
        if secret is not None and not isinstance(secret, SecretFile):
            return Refusal(waits=False, remedy=_BY_VALUE[self.side])
        last, now = self._refused, time.monotonic()
        if last is None or now - last.at > _EPISODE_SECONDS:
            last = _Refused(ends=now + grace_seconds)
        about = "" if secret is None else f"; {state or _state_of(secret)}"
        remedy = None if secret is None else _BY_FILE.format(path=secret.path)
        last.at, last.tried, last.message, last.remedy = now, tried, reason + about, remedy
        self._refused = last
        if now >= last.ends:
            waited = f"; it was tried again for {grace_seconds:g} s" if grace_seconds else ""
            return Refusal(waits=False, about=about + waited, remedy=remedy)
        if _listener is not None and now >= last.told + _REMIND_SECONDS:
            last.told = now
            _listener.refused(self.side, reason + about, last.ends - now)
        return Refusal(waits=True, about=about, remedy=remedy)


@dataclass(slots=True)
class _Refused:
    """A time of refusals, by the monotonic clock: when the last one was, until when they may go on,
    and when somebody was told."""

    ends: float
    at: float = 0.0
    told: float = -_REMIND_SECONDS
    tried: tuple[str, ...] = field(default=(), repr=False)
    message: str = ""
    remedy: str | None = None


def _state_of(secret: SecretFile) -> str:
    readable = secret.look() is not None
    return f"{secret.path} holds no other" if readable else f"{secret.path} cannot be read"


_BY_FILE: Final = "Put what the server takes into {path}: it is read again by itself."
_BY_VALUE: Final = {
    "postgres": (
        "Correct user and password, and pg_hba.conf on the server, then start again. A password is "
        "renewed without that if it comes from a file: CDC_SYNC_SOURCE__PASSWORD_FILE, "
        "CDC_SYNC_SOURCE__URL_FILE, or ?passfile=… in source.url."
    ),
    "qdrant": (
        "Correct the API key, then start again. A key is renewed without that if it comes from a "
        "file: CDC_SYNC_QDRANT__API_KEY_FILE."
    ),
}
