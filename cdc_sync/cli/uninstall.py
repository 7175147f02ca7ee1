"""``cdc-sync uninstall``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cdc_sync.cli.options import takes_settings

if TYPE_CHECKING:
    from cdc_sync.loading import LoadedSettings


@takes_settings
def uninstall(
    loaded: LoadedSettings,
    slot: Annotated[
        str, typer.Option(metavar="NAME", help="The slot's name once more, to confirm.")
    ],
) -> int:
    """Drop slot, records, and the publication if cdc-sync made it.

    Collections stay as they are. A slot that nobody reads holds WAL until the disk is full.
    """
    from cdc_sync.sync.uninstall import uninstall as remove

    return remove(loaded.settings, slot, typer.echo)
