"""Answers of the Qdrant test server other than OK, with the codes and texts of the real server.

The real server keeps its errors in lib/storage/src/content_manager/errors.rs and turns them into
gRPC codes in conversions.rs beside it (qdrant/qdrant, v1.19).
"""

from __future__ import annotations

import re

import grpc

Trailers = tuple[tuple[str, str], ...]


class RefusalError(Exception):
    """The request is answered with ``code`` and ``message``; ``trailers`` go out as trailing
    metadata.
    """

    def __init__(self, code: grpc.StatusCode, message: str, trailers: Trailers = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.trailers = trailers


def invalid(message: str) -> RefusalError:
    """A request the conversion layer refuses: INVALID_ARGUMENT with the bare message."""
    return RefusalError(grpc.StatusCode.INVALID_ARGUMENT, message)


def wrong_input(description: str) -> RefusalError:
    """A request the storage layer refuses: INVALID_ARGUMENT."""
    return RefusalError(grpc.StatusCode.INVALID_ARGUMENT, f"Wrong input: {description}")


def validation(field: str, problem: str) -> RefusalError:
    """A request the field validation refuses: INVALID_ARGUMENT."""
    return invalid(f"Validation error in body: [{field}: {problem}]")


def bad_request(description: str) -> RefusalError:
    """A request that makes no sense as a whole: INVALID_ARGUMENT."""
    return RefusalError(grpc.StatusCode.INVALID_ARGUMENT, f"Bad request: {description}")


def not_found(description: str) -> RefusalError:
    return RefusalError(grpc.StatusCode.NOT_FOUND, f"Not found: {description}")


def collection_missing(name: str) -> RefusalError:
    return not_found(f"Collection `{name}` doesn't exist!")


def already_exists(name: str) -> RefusalError:
    return RefusalError(
        grpc.StatusCode.ALREADY_EXISTS, f"Wrong input: Collection `{name}` already exists!"
    )


def unavailable(message: str) -> RefusalError:
    return RefusalError(grpc.StatusCode.UNAVAILABLE, message)


def internal(description: str) -> RefusalError:
    return RefusalError(grpc.StatusCode.INTERNAL, f"Service internal error: {description}")


def rate_limited(description: str, retry_after: float | None) -> RefusalError:
    """RESOURCE_EXHAUSTED; ``retry_after`` in seconds, rounded up, becomes the `retry-after`
    trailer.
    """
    trailers = () if retry_after is None else (("retry-after", str(int(-(-retry_after // 1)))),)
    return RefusalError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, f"Rate limiting exceeded: {description}", trailers
    )


_MISSING_POINT = re.compile(r"No point with id (\S+)")
_ENGINE_FAILURES = (
    "Service runtime error",
    "Inconsistent storage",
    "Out of memory",
    "Storage file not found",
    "Can't",
)


def from_engine(error: Exception) -> RefusalError:
    """The answer to an exception of the engine, which has the server's texts but no codes."""
    text = str(error)
    missing = _MISSING_POINT.search(text)
    if missing:
        return not_found(f"No point with id {missing[1]} found")
    if text.startswith(_ENGINE_FAILURES):
        return internal(text)
    return wrong_input(text)
