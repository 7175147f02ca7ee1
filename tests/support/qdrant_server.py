"""A Qdrant server for tests: the official gRPC protocol on top of the embedded engine.

    python -m tests.support.qdrant_server --path DIR --port N [--api-key K] [--tls-cert FILE
    --tls-key FILE [--tls-client-ca FILE]]

Single node, one shard a collection. Update semantics are those of the engine, which is the server's
own; codes and texts of the layers above it follow the server's source. Left out: background
optimizers, clusters, snapshots, REST, inference, prefetches and fusion in queries.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

# Without it the client takes a second to import.
import cdc_sync.qdrant  # noqa: F401


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Qdrant server for tests")
    parser.add_argument("--path", type=Path, required=True, help="directory of the collections")
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1, 0 for any")
    parser.add_argument("--api-key", help="key that requests must carry")
    parser.add_argument("--tls-cert", type=Path, help="certificate chain, PEM")
    parser.add_argument("--tls-key", type=Path, help="private key, PEM")
    parser.add_argument(
        "--tls-client-ca", type=Path, help="authority of the certificates clients must show, PEM"
    )
    parser.add_argument("--server-version", default="1.18.0", help="version that is reported")
    parser.add_argument(
        "--exit-with-stdin", action="store_true", help="stop when standard input is closed"
    )
    return parser.parse_args()


def _stop_with_stdin(stop: threading.Event) -> None:
    while os.read(0, 4096):
        pass
    stop.set()


def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM, SIGINT or the end of standard input. Prints the port once it listens."""
    import grpc

    from tests.support.qdrant_node import Gateway, Node, build

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if options.exit_with_stdin:
        threading.Thread(target=_stop_with_stdin, args=(stop,), daemon=True).start()
    node = Node(options.path, options.server_version)
    server = build(Gateway(node, options.api_key), node)
    address = f"127.0.0.1:{options.port}"
    if options.tls_cert:
        pair = (options.tls_key.read_bytes(), options.tls_cert.read_bytes())
        authority = options.tls_client_ca and options.tls_client_ca.read_bytes()
        credentials = grpc.ssl_server_credentials([pair], authority, authority is not None)
        port = server.add_secure_port(address, credentials)
    else:
        port = server.add_insecure_port(address)
    server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    stop.wait()
    server.stop(grace=None)
    node.registry.close()


def main() -> None:
    options = _arguments()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    # A waiting handler should get the interpreter soon after the worker has answered it.
    sys.setswitchinterval(0.001)
    serve(options)
    # Requests that a fault holds must not hold the process.
    os._exit(0)


if __name__ == "__main__":
    main()
