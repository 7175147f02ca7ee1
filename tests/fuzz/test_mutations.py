"""Golden frames and values cut, changed and mutated: nothing comes out but a result or the typed
error, in bounded time and memory. The part of the fuzzing that runs always; ``make fuzz`` is the
coverage-guided campaign.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator

import pytest

from cdc_sync.errors import ProtocolError
from cdc_sync.pgoutput.decode import Decoder
from cdc_sync.pgoutput.envelope import XLOG_HEADER_BYTES
from cdc_sync.pgoutput.messages import StreamAbort
from tests.fuzz.limits import Run, check, watched
from tests.fuzz.mutations import (
    byte_changes,
    random_mutation,
    systematic,
    truncations,
    wrong_lengths,
)
from tests.fuzz.stream_targets import (
    copy_target,
    envelope_target,
    frame_sequence,
    frames_target,
    gather_seeds,
    run_gather,
)
from tests.fuzz.target import Target
from tests.fuzz.targets import TARGETS
from tests.fuzz.value_targets import key_runs, point_columns, point_run, value_runs
from tests.support import golden_frames

#: Random inputs of each target.
RANDOM_INPUTS = 4_000
#: Values that are longer are changed in some places only.
SHORT_BYTES = 16


@pytest.fixture(autouse=True)
def measured() -> Iterator[None]:
    """Time and memory are watched, and refusals of requests not logged."""
    logging.disable(logging.CRITICAL)
    try:
        with watched():
            yield
    finally:
        logging.disable(logging.NOTSET)


def run_all(name: str, run: Run, inputs: Iterable[bytes]) -> tuple[int, int]:
    """How many inputs were taken, and how many refused."""
    taken = refused = 0
    for data in inputs:
        if check(name, run, data):
            taken += 1
        else:
            refused += 1
    return taken, refused


@pytest.mark.parametrize("transcript", golden_frames.TRANSCRIPTS)
def test_golden_frames_cut_at_every_byte_are_refused(
    transcript: golden_frames.Transcript,
) -> None:
    decoder = Decoder()
    for frame, message in transcript:
        for size in range(len(frame)):
            if isinstance(message, StreamAbort) and size == XLOG_HEADER_BYTES + 9:
                continue  # the form without LSN and time
            with pytest.raises(ProtocolError):
                decoder.decode(frame[:size], XLOG_HEADER_BYTES)
        assert decoder.decode(frame, XLOG_HEADER_BYTES) == message


@pytest.mark.parametrize("make", [frames_target, envelope_target, copy_target])
def test_frames_and_copies_with_every_byte_changed(make: Callable[[], Target]) -> None:
    target = make()
    for seed in target.seeds:
        # The first bytes say how the target is to be called.
        start = {"frames": 1, "copy": 2}.get(target.name, 0)
        head, body = seed[:start], seed[start:]
        taken, refused = run_all(target.name, target.run, (head + d for d in systematic(body)))
        assert taken
        assert refused


def test_streams_cut_and_changed_in_every_frame() -> None:
    for seed in gather_seeds():
        if len(seed) > 1000:
            continue
        stream = list(frames_in(seed))
        for number, frame in enumerate(stream):
            before, after = stream[:number], stream[number + 1 :]
            other = itertools.chain(truncations(frame), byte_changes(frame[XLOG_HEADER_BYTES:]))
            run_all(
                "gather",
                run_gather,
                (frame_sequence([*before, data, *after]) for data in itertools.islice(other, 100)),
            )


def frames_in(sequence: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(sequence):
        size = int.from_bytes(sequence[at : at + 2], "big")
        yield sequence[at + 2 : at + 2 + size]
        at += 2 + size


def test_every_value_decoder_on_values_cut_changed_and_with_wrong_lengths() -> None:
    for golden, binary, text in value_runs():
        taken = refused = 0
        for data in golden.binary:
            inputs = changed(data, byte_changes(data), wrong_lengths(data))
            counts = run_all(f"{golden.sql} binary", binary, inputs)
            taken, refused = taken + counts[0], refused + counts[1]
        assert taken, golden.sql
        for data in golden.text:
            counts = run_all(f"{golden.sql} text", text, changed(data, byte_changes(data)))
            taken, refused = taken + counts[0], refused + counts[1]
        assert refused or golden.sql in ANY_BYTES, golden.sql


#: Every text is a value of these; bytes that are not UTF-8 are replaced.
ANY_BYTES = {"varchar(40)", "char(8)", "name", "jsonpath", "every_mood", "citext"}


def changed(data: bytes, *changes: Iterable[bytes]) -> Iterator[bytes]:
    """The value, cut at every byte, and with changes: fewer of them if it is long."""
    yield data
    yield from truncations(data)
    step = 1 + len(data) // SHORT_BYTES
    yield from itertools.islice(itertools.chain(*changes), 0, None, step)


def test_both_codecs_take_the_same_cut_values() -> None:
    for golden, column in point_columns():
        run = point_run(column)
        for form, values in ((b"\x01", golden.binary), (b"\x00", golden.text)):
            for data in values:
                inputs = changed(data, wrong_lengths(data[:8]))
                run_all(f"point of {golden.sql}", run, (form + value for value in inputs))


def test_keys_cut_and_changed() -> None:
    for golden, run in key_runs():
        for form, values in ((b"\x01", golden.binary), (b"\x00", golden.text)):
            for data in values:
                inputs = changed(data, byte_changes(data))
                run_all(f"key of {golden.sql}", run, (form + value for value in inputs))


@pytest.mark.parametrize("name", TARGETS)
def test_random_mutations(name: str) -> None:
    target = TARGETS[name]()
    chance = random.Random(name)
    corpus = target.seeds
    taken, refused = run_all(
        name, target.run, (random_mutation(chance, corpus) for _ in range(RANDOM_INPUTS))
    )
    # Mutations that are all refused at the first byte would prove little.
    assert taken > RANDOM_INPUTS // 100
    assert refused > RANDOM_INPUTS // 100
