"""Targets of what people ask for: messages of the control channel, keys on a command line."""

from __future__ import annotations

from typing import Final

from cdc_sync.errors import ConfigError
from cdc_sync.sync.control import (
    PREFIX,
    InvalidRequestError,
    Request,
    parse_message,
    rebuild_content,
    request_content,
)
from cdc_sync.sync.resync_request import read_json_key, read_key
from tests.fuzz.target import Target

# -- the control channel


def run_control(data: bytes) -> bool:
    """The content of a message of the control channel. What is read says all the message did."""
    try:
        message = parse_message(PREFIX, data)
    except InvalidRequestError:
        return False
    assert message is not None
    if isinstance(message, Request):
        content = request_content(message)
    else:
        content = rebuild_content(message)
    assert parse_message(PREFIX, content) == message
    return True


def run_key_text(data: bytes) -> bool:
    """A key of a resync as it stands on a command line; the first byte says how many columns and
    whether it must be JSON."""
    if not data:
        return False
    columns = 1 + (data[0] >> 1) % 3
    text = data[1:].decode("utf-8", "surrogateescape")
    try:
        key = read_json_key(text, columns) if data[0] & 1 else read_key(text, columns)
    except ConfigError:
        return False
    assert len(key) == columns
    request_content(Request("p", "public.t", (key,)))
    return True


_CONTROL_SEEDS: Final = (
    request_content(Request("default", "public.docs")),
    request_content(Request("default", "public.docs", (("1",), ("2",)))),
    request_content(Request("", "sch \u00e9.\U0001f600", (("a", 'b"'), ("c", "\\")))),
    b'{"resync": {"pipeline": 1, "table": null, "keys": [[]]}}',
    b"[" * 2000,
)
_KEY_SEEDS: Final = (
    b"\x00plain",
    b"\x02acme,42",
    b'\x02["acme", 42]',
    b'\x03["acme", 42]',
    b"\x011e400",
    b'\x05[true, null, "\\ud800"]',
    b"\x01" + b"[" * 2000,
)


def control_target() -> Target:
    """Contents of messages."""
    return Target("control", run_control, _CONTROL_SEEDS, share=2)


def key_texts_target() -> Target:
    """Keys as people write them."""
    return Target("key-texts", run_key_text, _KEY_SEEDS)
