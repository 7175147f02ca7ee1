"""Masks secrets in text: connection strings by their form, known secrets by their value.

Everything that is printed or logged passes through :func:`redact`, the messages of other libraries
and the traces of exceptions too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Final
from urllib.parse import quote, quote_plus, unquote

from cdc_sync.config import Settings

MASK: Final = "***"

#: Shorter values occur in ordinary text; masking them would garble it and protect nothing.
_SHORTEST_KNOWN_SECRET: Final = 6

_BETWEEN_WORDS = re.compile(r"""([\s"'<>]+)""")
_USER = re.compile(r"[^/@:]*:")

# password=..., ?sslpassword=...&, PGPASSWORD='...', {"api-key": "..."}, ("api-key", "..."). After a
# colon or comma only quoted values: "qdrant.api_key: expected a string" is no secret.
_NAMED_SECRET = re.compile(
    r"""(?ix)
    ((?:password|passwd|api[_-]?key|secret|authorization)\b["']?)
    (?:
      (\s*=\s*)      (?: '(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*" | [^\s&,;'")\]}]+ )
    | (\s*[:,]\s*b?) (?: '(?:[^'\\]|\\.)*' | "(?:[^"\\]|\\.)*" )
    )
    """
)

_known: set[str] = set()
_known_pattern: re.Pattern[str] | None = None


def add_secrets(values: Iterable[str]) -> None:
    """Mask these values wherever they occur from now on, in this process: also percent-encoded, and
    escaped as in JSON or Python."""
    global _known_pattern
    for value in values:
        if len(value) >= _SHORTEST_KNOWN_SECRET:
            _known.update(_forms(value))
    if _known:
        longest_first = sorted(_known, key=len, reverse=True)
        _known_pattern = re.compile("|".join(re.escape(value) for value in longest_first))


def _forms(value: str) -> set[str]:
    """A value as it may be written: as it is, escaped, percent-encoded."""
    forms = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    forms |= {repr(value)[1:-1], ascii(value)[1:-1]}
    # The driver of Qdrant's tool and libpq leave other characters as they are.
    for safe in ("", "/", "~", "!$&'()*+,;=:@/"):
        encoded = quote(value.encode("utf-8", "surrogateescape"), safe=safe)
        forms |= {encoded, re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), encoded)}
    return forms | {quote_plus(value.encode("utf-8", "surrogateescape"))}


def forget_secrets() -> None:
    """Forget what :func:`add_secrets` was given."""
    global _known_pattern
    _known.clear()
    _known_pattern = None


def redact(text: str) -> str:
    """``text`` with passwords, API keys and known secrets masked."""
    if _known_pattern is not None:
        text = _known_pattern.sub(MASK, text)
    if "://" in text:
        text = "".join(map(_mask_url, _BETWEEN_WORDS.split(text)))
    return _NAMED_SECRET.sub(_mask_named, text)


def _mask_url(word: str) -> str:
    """Mask the password of scheme://user:password@host.

    It goes up to the last @: passwords with an unescaped @ or / are wrong but common, and a word
    masked too far is better than a password shown in part.
    """
    end = word.rfind("@")
    start = word.find("://")
    while 0 <= start < end:
        user = _USER.match(word, start + 3)
        if user and user.end() < end:
            return f"{word[: user.end()]}{MASK}{word[end:]}"
        start = word.find("://", start + 3)
    return word


def _mask_named(match: re.Match[str]) -> str:
    return f"{match[1]}{match[2] or match[3] or ''}{MASK}"


def has_password(url: str) -> bool:
    """Whether a connection string carries a password."""
    return redact(url) != url


def secrets_of(settings: Settings) -> list[str]:
    """Passwords, those in connection strings as written and decoded, and the API key."""
    secrets = []
    if settings.source.password is not None:
        secrets.append(settings.source.password.get_secret_value())
    for url in (settings.source.url.get_secret_value(), settings.qdrant.url):
        secrets.extend(_passwords_in(url))
    if settings.qdrant.api_key is not None:
        secrets.append(settings.qdrant.api_key.get_secret_value())
    return secrets


def _passwords_in(url: str) -> list[str]:
    found = [match[1] for match in _PASSWORD_IN_AUTHORITY.finditer(url)]
    found += [match[1] for match in _PASSWORD_IN_QUERY.finditer(url)]
    found += [
        re.sub(r"\\(.)", r"\1", match[1] or match[2] or "")
        for match in _PASSWORD_IN_KEYWORDS.finditer(url)
    ]
    return [text for password in found for text in (password, unquote(password)) if text]


_PASSWORD_IN_AUTHORITY = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://[^\s/@:]*:(\S+)@")
_PASSWORD_IN_QUERY = re.compile(r"[?&](?:ssl)?password=([^&\s]+)")
_PASSWORD_IN_KEYWORDS = re.compile(r"password\s*=\s*(?:'((?:[^'\\]|\\.)*)'|([^\s'&]+))")
