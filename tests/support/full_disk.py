"""A disk without space for the records of an embedded database: whoever writes one is told so by
the kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fill_disk(state: Path, pipeline: str) -> list[Path]:
    """Have every record of a pipeline fail to be written, those of which there is a directory;
    returns what to remove in order to make space.

    A record is written to a file beside it first. That name leads to /dev/full now.
    """
    blocks = [
        directory / f"{pipeline}.json.new" for directory in state.iterdir() if directory.is_dir()
    ]
    for path in blocks:
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/full")
    return blocks


@contextmanager
def full_disk(state: Path, pipeline: str) -> Iterator[None]:
    """There is no space meanwhile."""
    blocks = fill_disk(state, pipeline)
    try:
        yield
    finally:
        for path in blocks:
            path.unlink(missing_ok=True)
