"""All targets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tests.fuzz.request_targets import control_target, key_texts_target
from tests.fuzz.stream_targets import copy_target, envelope_target, frames_target, gather_target
from tests.fuzz.target import Target
from tests.fuzz.value_targets import keys_target, node_target, points_target, values_target

#: Makers of the targets, by name.
TARGETS: Final[Mapping[str, Callable[[], Target]]] = {
    "frames": frames_target,
    "envelope": envelope_target,
    "copy": copy_target,
    "gather": gather_target,
    "values": values_target,
    "points": points_target,
    "nodes": node_target,
    "keys": keys_target,
    "control": control_target,
    "key-texts": key_texts_target,
}
