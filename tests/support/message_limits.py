"""A gRPC proxy that takes no messages above some size, as those of load balancers and meshes do: it
forwards every unary call as bytes, with gRPC's own limits and texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc


class _Forward(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def service(self, details: Any) -> Any:
        call = self._channel.unary_unary(details.method)

        def forward(request: bytes, context: grpc.ServicerContext) -> bytes:
            headers = [
                (key, value)
                for key, value in context.invocation_metadata()
                if not key.startswith(("user-agent", "grpc-"))
            ]
            try:
                answer: bytes = call(request, timeout=60, metadata=headers)
            except grpc.RpcError as error:
                context.set_trailing_metadata(error.trailing_metadata() or ())
                context.abort(error.code(), error.details())
            return answer

        return grpc.unary_unary_rpc_method_handler(forward)


@contextmanager
def message_limits(url: str, *, request_bytes: int = -1, answer_bytes: int = -1) -> Iterator[str]:
    """The URL of a proxy before the server at ``url`` (http://host:port). -1: no limit."""
    host = url.removeprefix("http://")
    channel = grpc.insecure_channel(
        host,
        options=[
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", answer_bytes),
        ],
    )
    server = grpc.server(
        ThreadPoolExecutor(16),
        handlers=[_Forward(channel)],
        options=[
            ("grpc.max_receive_message_length", request_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()
        channel.close()
