"""The pipeline's own records as JSON-like objects, the same on a server and in files. Every record
has a version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final, cast, get_args

from cdc_sync.errors import StateError
from cdc_sync.qdrant.sink import (
    BlockRange,
    DeadLetter,
    LeafLedger,
    Mismatches,
    PipelineState,
    RebuildPhase,
    RebuildState,
    SourceMark,
    TableLedger,
    TableRebuild,
    TableState,
    TableVerification,
)

#: Version of the records written here. Older ones are read, newer ones refused.
VERSION: Final = 1

Record = dict[str, object]


def pipeline_record(state: PipelineState) -> Record:
    """The record of a pipeline. LSNs are strings, because they are unsigned 64-bit numbers."""
    return {
        "version": VERSION,
        "kind": "pipeline",
        "pipeline": state.pipeline,
        "slot": state.slot,
        "publication": state.publication,
        "system_identifier": state.system_identifier,
        "timeline": state.timeline,
        "slot_lsn": str(state.slot_lsn),
        "owns_publication": state.owns_publication,
        "adopting": state.adopting,
        "tables": [
            {
                "table": table.table,
                "collection": table.collection,
                "plan_fingerprint": table.plan_fingerprint,
                "copied": table.copied,
                "oid": table.oid,
                "vectors": list(table.vectors),
                "read_lsn": str(table.read_lsn),
                "swept_lsn": str(table.swept_lsn),
                **({"rebuild": dataclasses.asdict(table.rebuild)} if table.rebuild else {}),
            }
            for table in state.tables
        ],
    }


def dead_letter_record(letter: DeadLetter) -> Record:
    """The record of a dead letter."""
    return {
        "version": VERSION,
        "kind": "dead_letter",
        "pipeline": letter.pipeline,
        "table": letter.table,
        "key": letter.key,
        "lsn": letter.lsn,
        "commit_time": letter.commit_time,
        "reason": letter.reason,
        "error": letter.kind,
        "attempts": letter.attempts,
        "first_seen": letter.first_seen,
        "last_seen": letter.last_seen,
        "key_values": None if letter.key_values is None else list(letter.key_values),
    }


def mark_record(mark: SourceMark) -> Record:
    """The record of a mark. Unsigned 64-bit numbers are strings."""
    return {
        "version": VERSION,
        "kind": "mark",
        "pipeline": mark.pipeline,
        "lsn": str(mark.lsn),
        "timeline": mark.timeline,
        "xid": str(mark.xid),
        "publications": [list(pair) for pair in mark.publications],
    }


def source_mark(record: Mapping[str, object], where: str) -> SourceMark:
    """The mark of a record read from ``where``. Raises :class:`StateError`."""
    _check_version(record, where)
    publications = record.get("publications")
    if not isinstance(publications, list | tuple):
        raise _damaged(where, "publications")
    return SourceMark(
        pipeline=_text(record, "pipeline", where),
        lsn=_number(record, "lsn", where),
        timeline=_number(record, "timeline", where),
        xid=_number(record, "xid", where),
        publications=tuple(_pair(one, where) for one in publications),
    )


def _pair(record: object, where: str) -> tuple[str, str]:
    if not isinstance(record, list | tuple) or len(record) != 2:
        raise _damaged(where, "publications")
    table, identity = record
    if not isinstance(table, str) or not isinstance(identity, str):
        raise _damaged(where, "publications")
    return table, identity


def pipeline_state(record: Mapping[str, object], where: str) -> PipelineState:
    """The pipeline of a record read from ``where``. Raises :class:`StateError`."""
    _check_version(record, where)
    tables = record.get("tables")
    if not isinstance(tables, list):
        raise _damaged(where, "tables")
    return PipelineState(
        pipeline=_text(record, "pipeline", where),
        slot=_text(record, "slot", where),
        publication=_text(record, "publication", where),
        system_identifier=_text(record, "system_identifier", where),
        timeline=_number(record, "timeline", where),
        slot_lsn=_number(record, "slot_lsn", where),
        tables=tuple(_table_state(table, where) for table in tables),
        # Absent in records of 0.1.
        owns_publication=record.get("owns_publication") is True,
        adopting=record.get("adopting") is True,
    )


def ledger_record(ledger: TableLedger) -> Record:
    """The record of a copy under way."""
    return {
        "version": VERSION,
        "kind": "ledger",
        "pipeline": ledger.pipeline,
        "table": ledger.table,
        "fingerprint": ledger.fingerprint,
        "leaves": [
            {
                "oid": leaf.oid,
                "relfilenode": leaf.relfilenode,
                "pages": leaf.pages,
                "chunk_pages": leaf.chunk_pages,
                # -1 stands for the end: a list of numbers stays one kind of value.
                "done": [[start, -1 if end is None else end] for start, end in leaf.done],
            }
            for leaf in ledger.leaves
        ],
        "repair": ledger.repair,
        "sweep": ledger.sweep,
        "buckets": ledger.buckets,
        "swept": ledger.swept,
        "rows": ledger.rows,
        "bytes": ledger.bytes,
        "orphans": ledger.orphans,
        "again": ledger.again,
    }


def table_ledger(record: Mapping[str, object], where: str) -> TableLedger:
    """The ledger of a record read from ``where``. Raises :class:`StateError`."""
    _check_version(record, where)
    leaves = record.get("leaves")
    if not isinstance(leaves, list | tuple):
        raise _damaged(where, "leaves")
    numbers = {
        name: _number(record, name, where)
        for name in ("buckets", "swept", "rows", "bytes", "orphans")
    }
    return TableLedger(
        pipeline=_text(record, "pipeline", where),
        table=_text(record, "table", where),
        fingerprint=_text(record, "fingerprint", where),
        leaves=tuple(_leaf_ledger(leaf, where) for leaf in leaves),
        repair=record.get("repair") is True,
        sweep=record.get("sweep") is True,
        again=record.get("again") is True,
        **numbers,
    )


def _leaf_ledger(record: object, where: str) -> LeafLedger:
    if not isinstance(record, dict):
        raise _damaged(where, "leaves")
    done = record.get("done")
    if not isinstance(done, list | tuple):
        raise _damaged(where, "done")
    return LeafLedger(
        oid=_number(record, "oid", where),
        relfilenode=_number(record, "relfilenode", where),
        pages=_number(record, "pages", where),
        chunk_pages=_number(record, "chunk_pages", where),
        done=tuple(_block_range(one, where) for one in done),
    )


def _block_range(record: object, where: str) -> BlockRange:
    if not isinstance(record, list | tuple) or len(record) != 2:
        raise _damaged(where, "done")
    start, end = record
    if not isinstance(start, int) or not isinstance(end, int):
        raise _damaged(where, "done")
    return start, None if end < 0 else end


def verification_record(verification: TableVerification) -> Record:
    """The record of a table's continuous verification."""
    return {
        "version": VERSION,
        "kind": "verification",
        "pipeline": verification.pipeline,
        "table": verification.table,
        "leaf": verification.leaf,
        "relfilenode": verification.relfilenode,
        "block": verification.block,
        "rows": verification.rows,
        "found": dataclasses.asdict(verification.found),
        "last": dataclasses.asdict(verification.last),
        "completed": verification.completed,
    }


def table_verification(record: Mapping[str, object], where: str) -> TableVerification:
    """The verification of a record read from ``where``. Raises :class:`StateError`."""
    _check_version(record, where)
    numbers = {
        name: _number(record, name, where)
        for name in ("leaf", "relfilenode", "block", "rows", "completed")
    }
    return TableVerification(
        pipeline=_text(record, "pipeline", where),
        table=_text(record, "table", where),
        found=_mismatches(record, "found", where),
        last=_mismatches(record, "last", where),
        **numbers,
    )


def _mismatches(record: Mapping[str, object], name: str, where: str) -> Mismatches:
    counts = record.get(name)
    if not isinstance(counts, dict):
        raise _damaged(where, name)
    return Mismatches(
        missing=_number(counts, "missing", where),
        extra=_number(counts, "extra", where),
        different=_number(counts, "different", where),
    )


def dead_letter(record: Mapping[str, object], where: str) -> DeadLetter:
    """The dead letter of a record read from ``where``. Raises :class:`StateError`."""
    _check_version(record, where)
    letter = DeadLetter(
        pipeline=_text(record, "pipeline", where),
        table=_text(record, "table", where),
        key=_text(record, "key", where),
        lsn=_text(record, "lsn", where),
        commit_time=_text(record, "commit_time", where),
        reason=_text(record, "reason", where),
    )
    if "attempts" not in record:
        # Of 0.1.
        return letter
    values = record.get("key_values")
    return dataclasses.replace(
        letter,
        kind=_text(record, "error", where),
        attempts=_number(record, "attempts", where),
        first_seen=_text(record, "first_seen", where),
        last_seen=_text(record, "last_seen", where),
        key_values=None if values is None else _names(record, "key_values", where),
    )


def _table_state(record: object, where: str) -> TableState:
    if not isinstance(record, dict) or not isinstance(record.get("copied"), bool):
        raise _damaged(where, "tables")
    return TableState(
        table=_text(record, "table", where),
        collection=_text(record, "collection", where),
        plan_fingerprint=_text(record, "plan_fingerprint", where),
        copied=record["copied"] is True,
        oid=_number(record, "oid", where),
        vectors=_names(record, "vectors", where),
        rebuild=_table_rebuild(record.get("rebuild"), where),
        # Records of earlier versions have none.
        read_lsn=_number({"read_lsn": 0, **record}, "read_lsn", where),
        swept_lsn=_number({"swept_lsn": 0, **record}, "swept_lsn", where),
    )


def _table_rebuild(record: object, where: str) -> TableRebuild | None:
    if record is None:
        return None
    if not isinstance(record, dict):
        raise _damaged(where, "rebuild")
    return TableRebuild(
        answered=_text(record, "answered", where),
        taken=_text(record, "taken", where),
        settings=_text(record, "settings", where),
        replaced=_text(record, "replaced", where),
        alias=_text(record, "alias", where),
    )


def rebuild_record(state: RebuildState) -> Record:
    """The record of a rebuild. The position is a string, as an unsigned 64-bit number."""
    return {
        "version": VERSION,
        "kind": "rebuild",
        **dataclasses.asdict(state),
        "lsn": str(state.lsn),
    }


def rebuild_state(record: Mapping[str, object], where: str) -> RebuildState:
    """The rebuild of a record read from ``where``. Raises :class:`StateError`."""
    _check_version(record, where)
    phase = _text(record, "phase", where)
    if phase not in get_args(RebuildPhase):
        raise _damaged(where, "phase")
    return RebuildState(
        pipeline=_text(record, "pipeline", where),
        table=_text(record, "table", where),
        worker=_text(record, "worker", where),
        slot=_text(record, "slot", where),
        settings=_text(record, "settings", where),
        collection=_text(record, "collection", where),
        old=_text(record, "old", where),
        alias=_text(record, "alias", where),
        phase=cast("RebuildPhase", phase),
        token=_text(record, "token", where),
        lsn=_number(record, "lsn", where),
        made_collection=record.get("made_collection") is True,
        made_alias=record.get("made_alias") is True,
        widened=record.get("widened") is True,
    )


def _check_version(record: Mapping[str, object], where: str) -> None:
    version = _number(record, "version", where)
    if version > VERSION:
        raise StateError(
            f"{where} was written by a newer cdc_sync (record version {version}, "
            f"known is {VERSION}).",
            "Upgrade cdc_sync to the version that wrote it, or newer.",
        )


def _text(record: Mapping[str, object], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise _damaged(where, name)
    return value


def _names(record: Mapping[str, object], name: str, where: str) -> tuple[str, ...]:
    value = record.get(name)
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise _damaged(where, name)
    return tuple(value)


def _number(record: Mapping[str, object], name: str, where: str) -> int:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise _damaged(where, name)
    try:
        return int(value)
    except ValueError as exc:
        raise _damaged(where, name) from exc


def _damaged(where: str, name: str) -> StateError:
    return StateError(
        f"{where} is damaged: field {name} is absent or of the wrong type.",
        "Restore it from a backup, or remove it and copy anew with --migration.restart.",
    )
