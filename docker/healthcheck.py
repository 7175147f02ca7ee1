"""The image's health check: whether ``/livez`` answers 200.

    python healthcheck.py [PATH]

It depends neither on Postgres nor on Qdrant, so that nobody restarts a daemon that waits for them.
"""

from __future__ import annotations

import http.client
import os
import sys


def healthy(path: str = "/livez") -> bool:
    """Ask the daemon of this container."""
    port = int(os.environ.get("CDC_SYNC_HTTP__PORT") or 9464)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"no answer on port {port}: {error}\n")
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(0 if healthy(*sys.argv[1:2]) else 1)
