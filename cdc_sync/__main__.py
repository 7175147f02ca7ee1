"""``python -m cdc_sync``: the same as ``cdc-sync``."""

from __future__ import annotations

import sys

from cdc_sync.cli import main

if __name__ == "__main__":
    sys.exit(main())
