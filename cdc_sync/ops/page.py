"""The status page: one file without anything from elsewhere, and the policy it is served under."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import re
from dataclasses import dataclass
from typing import Final

#: For whatever is no page.
NOTHING_ALLOWED: Final = "default-src 'none'; frame-ancestors 'none'"


@dataclass(frozen=True, slots=True)
class Page:
    """The page as it is served; ``policy`` is its Content-Security-Policy."""

    body: bytes
    policy: str


@functools.cache
def status_page() -> Page:
    """The page, which asks ``/status`` for everything it shows.

    Its policy allows its own style and script, by their hashes, and questions to where it came
    from. Nothing else runs or is loaded, so a name in the database that looks like markup stays a
    name.
    """
    body = importlib.resources.files("cdc_sync.ops").joinpath("page.html").read_bytes()
    policy = [
        "default-src 'none'",
        f"script-src {_hash(body, b'script')}",
        f"style-src {_hash(body, b'style')}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return Page(body, "; ".join(policy))


def _hash(body: bytes, tag: bytes) -> str:
    """The one inline element of its kind, as a policy names it."""
    (content,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), body, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    return f"'sha256-{digest}'"
