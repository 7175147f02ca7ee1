"""What Qdrant, or a proxy before it, says about its limits, told by the texts of its answers.

gRPC has one code for several limits, so only the text tells them apart. Qdrant's texts, unchanged
from 1.14 to 1.19: ``lib/collection/src/operations/verification`` (strict mode),
``lib/common/common/src/rate_limiting.rs``, ``lib/shard/src/quota``. Those of messages that are too
large: gRPC's own libraries (C, Go, Java, .NET, tonic), and HTTP's status 413 of a proxy.
"""

from __future__ import annotations

import re
from typing import Final

#: Limits of a collection as a whole, or of the node, which no point is to blame for. A limit of
#: nothing a request is one too.
_FULL: Final = re.compile(
    r"Max (?:points count|vector storage size|payload storage size) limit"
    r"|Resident memory usage is at \d|Disk usage is at \d|Insufficient storage:"
    r"|No space left on device"
    r'|Limit exceeded \d+ > 0 for "(?:upsert|update) limit"'
)
_BATCH: Final = re.compile(r'Limit exceeded \d+ > (\d+) for "(?:upsert|update) limit"')
_PAGE: Final = re.compile(r'Limit exceeded \d+ > (\d+) for "limit"')
_EXACT: Final = "Exact search disabled!"
_OVERSIZED: Final = re.compile(
    r"message (?:after decompression )?larger than max|message length too large"
    r"|message exceeds (?:the )?maximum|status: 413|(?:payload|entity) too large",
    re.IGNORECASE,
)
_MESSAGE_LIMIT: Final = re.compile(r"vs\. (\d+)|limit is: (\d+)|maximum size (\d+)")


def is_full(details: str) -> bool:
    """Whether the collection, or the node, takes no more data for now."""
    return _FULL.search(details) is not None


def batch_limit(details: str) -> int | None:
    """How many points strict mode allows a request, if that was exceeded."""
    found = _BATCH.search(details)
    return None if found is None else int(found[1])


def page_limit(details: str) -> int | None:
    """How many points strict mode allows a page of a read, if that was exceeded."""
    found = _PAGE.search(details)
    return None if found is None else int(found[1])


def exact_forbidden(details: str) -> bool:
    """Whether strict mode forbids to count exactly."""
    return _EXACT in details


def is_over_capacity(details: str) -> bool:
    """Whether the request can never pass the rate limiter, however long one waits."""
    return "larger than rate limiter capacity" in details


def is_oversized(details: str) -> bool:
    """Whether the message, request or answer, has too many bytes for somebody on its way."""
    return _OVERSIZED.search(details) is not None


def message_limit(details: str) -> int | None:
    """How many bytes a message may have, if the answer to one that is oversized says it."""
    found = _MESSAGE_LIMIT.search(details)
    return None if found is None else int(next(group for group in found.groups() if group))
