"""The pipeline's records as JSON files beside an embedded database. Every write replaces a whole
file, atomically.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import orjson

from cdc_sync.errors import StateError
from cdc_sync.qdrant.edge_database import EdgeDatabase, make_directory, sync_directory
from cdc_sync.qdrant.records import (
    dead_letter,
    dead_letter_record,
    ledger_record,
    mark_record,
    pipeline_record,
    pipeline_state,
    source_mark,
    table_ledger,
    table_verification,
    verification_record,
)
from cdc_sync.qdrant.sink import (
    DeadLetter,
    PipelineState,
    RebuildState,
    SourceMark,
    TableLedger,
    TableVerification,
)


class FileStateStore:
    """A :class:`~cdc_sync.qdrant.sink.StateStore` in files under ``state/``; see
    ``edge_database.py`` for the layout.
    """

    def __init__(self, database: EdgeDatabase) -> None:
        self._database = database
        self._pipelines = database.path / "state" / "pipelines"
        self._dead_letters = database.path / "state" / "dead_letters"
        self._ledgers = database.path / "state" / "ledgers"
        self._marks = database.path / "state" / "marks"
        self._verifications = database.path / "state" / "verifications"

    async def load(self, pipeline: str) -> PipelineState | None:
        """The pipeline's record, or None."""
        return await self._database.run(self._load, pipeline)

    async def save(self, state: PipelineState) -> None:
        """Write the pipeline's record."""
        path = self._pipelines / f"{state.pipeline}.json"
        await self._database.run(self._write, path, pipeline_record(state))

    async def forget(self, pipeline: str) -> None:
        """Remove the pipeline's record, its mark, its ledgers, its dead letters and what is known
        of its verification."""
        await self._database.run(self._forget, pipeline)

    async def mark(self, pipeline: str) -> SourceMark | None:
        """The last mark kept, or None."""
        return await self._database.run(self._mark, pipeline)

    async def save_mark(self, mark: SourceMark) -> None:
        """Keep a mark."""
        path = self._marks / f"{mark.pipeline}.json"
        await self._database.run(self._write, path, mark_record(mark))

    async def ledgers(self, pipeline: str) -> list[TableLedger]:
        """The ledgers of copies under way, by table."""
        return await self._database.run(self._read_ledgers, pipeline)

    async def save_ledger(self, ledger: TableLedger) -> None:
        """Keep a ledger."""
        await self._database.run(self._save_ledger, ledger)

    async def drop_ledger(self, pipeline: str, table: str) -> None:
        """Remove a table's ledger."""
        await self._database.run(self._drop_ledger, pipeline, table)

    async def verifications(self, pipeline: str) -> list[TableVerification]:
        """How far the continuous verification is, by table."""
        return await self._database.run(self._read_verifications, pipeline)

    async def save_verification(self, verification: TableVerification) -> None:
        """Keep how far it is."""
        await self._database.run(self._save_verification, verification)

    async def rebuilds(self, pipeline: str) -> list[RebuildState]:
        """None: without aliases there are no rebuilds."""
        return []

    async def park(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters."""
        await self._database.run(self._park, letters)

    async def dead_letters(self, pipeline: str) -> list[DeadLetter]:
        """All dead letters of the pipeline, by table and key."""
        return await self._database.run(self._read_letters, pipeline)

    async def release(self, pipeline: str, letters: Sequence[tuple[str, str]]) -> None:
        """Remove dead letters by (table, key)."""
        await self._database.run(self._release, pipeline, letters)

    def _load(self, pipeline: str) -> PipelineState | None:
        path = self._pipelines / f"{pipeline}.json"
        record = _read_object(path)
        return None if record is None else pipeline_state(record, str(path))

    def _mark(self, pipeline: str) -> SourceMark | None:
        path = self._marks / f"{pipeline}.json"
        record = _read_object(path)
        return None if record is None else source_mark(record, str(path))

    def _forget(self, pipeline: str) -> None:
        # The pipeline's own record goes last: it is what says that there may be more to remove.
        for directory in (
            self._dead_letters,
            self._ledgers,
            self._marks,
            self._verifications,
            self._pipelines,
        ):
            path = directory / f"{pipeline}.json"
            if path.exists():
                path.unlink()
                sync_directory(directory)

    def _read_ledgers(self, pipeline: str) -> list[TableLedger]:
        path = self._ledgers / f"{pipeline}.json"
        records = _read(path)
        if records is None:
            return []
        if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
            raise _damaged(path, "it is not a list of JSON objects")
        return [table_ledger(one, str(path)) for one in records]

    def _save_ledger(self, ledger: TableLedger) -> None:
        kept = {one.table: one for one in self._read_ledgers(ledger.pipeline)}
        kept[ledger.table] = ledger
        self._write_ledgers(ledger.pipeline, kept.values())

    def _drop_ledger(self, pipeline: str, table: str) -> None:
        found = self._read_ledgers(pipeline)
        kept = [one for one in found if one.table != table]
        if len(kept) < len(found):
            self._write_ledgers(pipeline, kept)

    def _write_ledgers(self, pipeline: str, ledgers: Iterable[TableLedger]) -> None:
        records = [ledger_record(one) for one in sorted(ledgers, key=lambda one: one.table)]
        self._write(self._ledgers / f"{pipeline}.json", records)

    def _read_verifications(self, pipeline: str) -> list[TableVerification]:
        path = self._verifications / f"{pipeline}.json"
        records = _read(path)
        if records is None:
            return []
        if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
            raise _damaged(path, "it is not a list of JSON objects")
        return [table_verification(one, str(path)) for one in records]

    def _save_verification(self, verification: TableVerification) -> None:
        pipeline = verification.pipeline
        kept = {one.table: one for one in self._read_verifications(pipeline)}
        kept[verification.table] = verification
        records = [verification_record(one) for _, one in sorted(kept.items())]
        self._write(self._verifications / f"{pipeline}.json", records)

    def _park(self, letters: Sequence[DeadLetter]) -> None:
        for pipeline in {letter.pipeline for letter in letters}:
            kept = {(one.table, one.key): one for one in self._read_letters(pipeline)}
            kept |= {(one.table, one.key): one for one in letters if one.pipeline == pipeline}
            self._write_letters(pipeline, kept.values())

    def _release(self, pipeline: str, letters: Sequence[tuple[str, str]]) -> None:
        gone = set(letters)
        found = self._read_letters(pipeline)
        kept = [one for one in found if (one.table, one.key) not in gone]
        if len(kept) != len(found):
            self._write_letters(pipeline, kept)

    def _read_letters(self, pipeline: str) -> list[DeadLetter]:
        return read_dead_letters(self._database.path, pipeline)

    def _write_letters(self, pipeline: str, letters: Iterable[DeadLetter]) -> None:
        records = [dead_letter_record(one) for one in letters]
        self._write(self._dead_letters / f"{pipeline}.json", records)

    def _write(self, path: Path, content: object) -> None:
        self._database.lock()
        temporary = path.with_name(path.name + ".new")
        try:
            make_directory(path.parent)
            with temporary.open("wb") as file:
                file.write(orjson.dumps(content, option=orjson.OPT_INDENT_2))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_directory(path.parent)
        except OSError as exc:
            raise StateError(
                f"{path} cannot be written: {exc.strerror}.",
                "Make room on the disk, or mend its permissions.",
            ) from exc


def read_dead_letters(database: Path, pipeline: str) -> list[DeadLetter]:
    """A pipeline's dead letters, by table and key, whoever has the database open: every write
    replaces the whole file. Raises :class:`StateError`."""
    path = database / "state" / "dead_letters" / f"{pipeline}.json"
    records = _read(path)
    if records is None:
        return []
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise _damaged(path, "it is not a list of JSON objects")
    found = [dead_letter(one, str(path)) for one in records]
    return sorted(found, key=lambda letter: (letter.table, letter.key))


def _read(path: Path) -> object:
    """The JSON content of a file; None if there is no such file (a record is never a JSON null)."""
    try:
        content: object = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, orjson.JSONDecodeError) as exc:
        raise _damaged(path, str(exc)) from exc
    if content is None:
        raise _damaged(path, "it is null")
    return content


def _read_object(path: Path) -> dict[str, object] | None:
    record = _read(path)
    if record is not None and not isinstance(record, dict):
        raise _damaged(path, "it is not a JSON object")
    return record


def _damaged(path: Path, why: str) -> StateError:
    return StateError(
        f"{path} is damaged: {why}.",
        "Restore it from a backup, or remove it and copy anew with --migration.restart.",
    )
