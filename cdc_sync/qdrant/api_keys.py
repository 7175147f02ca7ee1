"""The API key of a server: the one in force, and those to try when it is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from cdc_sync.config import QdrantSettings
from cdc_sync.credentials import Refusal, SecretFile
from cdc_sync.errors import ConfigError

_PRINTABLE: Final = re.compile(r"[\x20-\x7e]*")


def metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    """What a request carries: the API key, if there is one."""
    return () if key is None else (("api-key", key),)


class ApiKeys:
    """Knows which key to send. A key from a file is read again when the server refuses it; the one
    before stays known, since the nodes of a cluster are given another one after the other.

    Raises :class:`ConfigError` for a key that no header can hold.
    """

    def __init__(self, settings: QdrantSettings) -> None:
        self._secret = settings.api_key
        self._login = settings.login
        self._grace_seconds = settings.credentials_grace_seconds
        self._former: str | None = None
        if self._secret is not None and not _is_sendable(self._secret.get_secret_value()):
            raise ConfigError(
                "qdrant.api_key holds characters that a header cannot carry: control characters,"
                " what is not ASCII, or spaces around it.",
                "Give the key alone, without line breaks; a key file may end with one.",
            )

    def next(self, refused: Sequence[str | None]) -> str | None:
        """The key to send after these were refused; one of them where there is no other."""
        current = None if self._secret is None else self._secret.get_secret_value()
        if current not in refused:
            return current
        found = self._secret.look() if isinstance(self._secret, SecretFile) else None
        for key in (found, self._former):
            if key is not None and key not in refused and _is_sendable(key):
                return key
        return current

    def accepted(self, key: str | None) -> None:
        """The server has taken a key: it is in force."""
        self._login.accept()
        if key is None or not isinstance(self._secret, SecretFile):
            return
        current = self._secret.get_secret_value()
        if key != current:
            self._former = current
            self._secret.take(key)

    def refused(self, reason: str) -> Refusal:
        """What becomes of it, now that there is no other to try; ``reason`` is the server's."""
        # A server that asks for a key where none is configured is not waited for.
        secret = self._secret
        if secret is None:
            return Refusal(waits=False)
        state = None
        if isinstance(secret, SecretFile):
            found = secret.look()
            if found is not None and not _is_sendable(found):
                state = f"{secret.path} holds characters that a header cannot carry"
        message = f"Qdrant refuses the API key: {reason}"
        return self._login.refuse(message, self._grace_seconds, secret, state=state)


def _is_sendable(key: str) -> bool:
    return _PRINTABLE.fullmatch(key) is not None and key == key.strip()
