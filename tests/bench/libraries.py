"""Has the libraries of this Python environment read from disk again by whoever maps them next.

Of a file that has just been written the page cache holds large pieces, and a process that maps it
is given more of them than it asks for: right after an installation every process of ours had 20 MB
more of resident memory (``RssFile``) than on the next day. So what is cached of them is let go
before memory is measured; what some process has mapped stays.

    python -m tests.bench.libraries
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path


def libraries(root: Path) -> list[Path]:
    """The shared libraries below a directory."""
    return [path for path in root.rglob("*.so*") if path.is_file() and not path.is_symlink()]


def let_go(paths: Iterable[Path]) -> None:
    """Drop from the page cache what is cached of these files, written to disk first."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    let_go(libraries(Path(sys.prefix)))
