"""Says in the log what becomes of passwords and keys that are changed while the daemon runs."""

from __future__ import annotations

from cdc_sync.config import Settings
from cdc_sync.credentials import SecretFile
from cdc_sync.ops.logging import get_logger
from cdc_sync.ops.redaction import add_secrets, secrets_of

log = get_logger(__name__)


class CredentialLog:
    """A :class:`~cdc_sync.credentials.Listener`. New secrets are masked before they are used on."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def read_again(self, secret: SecretFile) -> None:
        """See :class:`~cdc_sync.credentials.Listener`."""
        add_secrets(secrets_of(self._settings))
        log.info("secret_read_again", setting=secret.setting, path=str(secret.path))

    def refused(self, side: str, reason: str, seconds: float) -> None:
        """See :class:`~cdc_sync.credentials.Listener`."""
        log.warning("credentials_refused", side=side, error=reason, seconds=round(seconds))
