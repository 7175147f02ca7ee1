"""What is worth a warning about the ways to both sides."""

from __future__ import annotations

from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError
from cdc_sync.postgres.connect import transport_warning as postgres_warning
from cdc_sync.qdrant.open import transport_warning as qdrant_warning


def transport_warnings(settings: Settings) -> list[tuple[str, str]]:
    """Connections that leave this machine unencrypted or unverified, as the settings ask for: side
    (``postgres`` or ``qdrant``) and one sentence. Settings that cannot work are somebody else's to
    report."""
    try:
        postgres = postgres_warning(settings.source)
    except ConfigError:
        postgres = None
    sides = (("postgres", postgres), ("qdrant", qdrant_warning(settings.qdrant)))
    return [(side, sentence) for side, sentence in sides if sentence is not None]
