"""What README and docs/*.md tell people to type exists: commands parse, TOML fits the settings, SQL
is SQL, links lead somewhere. The commands of the migration guide are run, one after the other.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
import typer
import typer.main

from cdc_sync.cli.app import Invocation, app
from cdc_sync.cli.entry import main
from cdc_sync.config import Settings
from tests.support.fix_postgres import Database
from tests.support.qdrant_control import QdrantTarget

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: The whole command line. Typer's own types of commands are private.
PROGRAM: Final[Any] = typer.main.get_command(app)
#: Programs of others that are named in shell blocks; anything else there is a mistyped name.
OTHER_PROGRAMS: Final = frozenset(
    {
        ".",
        "aws",
        "az",
        "curl",
        "docker",
        "export",
        "gcloud",
        "git",
        "install",
        "kubectl",
        "make",
        "pip",
        "promtool",
        "psql",
        "python",
        "python3",
        "ray",
        "sed",
        "systemctl",
    }
)
#: Blocks of SQL that are not parsed, by their first line: none.
SQL_EXCEPTIONS: Final[frozenset[str]] = frozenset()
#: What a fragment of a configuration leaves out.
REST: Final = {"source": {"url": "postgresql://localhost/app"}, "tables": [{"name": "t"}]}

ROWS: Final = 60
DOCUMENTS_TABLE: Final = f"""
CREATE TABLE documents (id bigint PRIMARY KEY, lang text, year int, embedding vector(3));
CREATE INDEX ON documents USING hnsw (embedding vector_cosine_ops);
INSERT INTO documents
  SELECT i, CASE WHEN i % 2 = 0 THEN 'en' ELSE 'de' END, 2000 + i % 30,
         format('[%s,%s,%s]', i, i * i % 17, 1 + i % 7)::vector
    FROM generate_series(1, {ROWS}) i;
"""


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def blocks(*languages: str) -> Iterator[tuple[Path, str]]:
    """Every fenced block in one of the languages, those inside lists without their indent."""
    fence = re.compile(
        rf"^(?P<indent> *)```(?:{'|'.join(languages)})\n(?P<content>.*?)^(?P=indent)```$",
        re.DOTALL | re.MULTILINE,
    )
    for document in DOCUMENTS:
        for found in fence.finditer(text_of(document)):
            yield document, re.sub(rf"^{found['indent']}", "", found["content"], flags=re.MULTILINE)


def command_lines() -> Iterator[tuple[Path, str]]:
    for document, block in blocks("bash", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield document, line
    for document in DOCUMENTS:
        for line in re.findall(r"^    (cdc-sync .*)$", text_of(document), re.MULTILINE):
            yield document, line


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a shell line: without comments, variables and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    lexer.whitespace_split = True
    words: list[str] = []
    target = False
    for word in [*lexer, "&&"]:
        if set(word) <= set("<>"):
            target = True
        elif set(word) <= set("&|;"):
            if words:
                yield words
            words = []
        elif target:
            target = False
        elif words or not re.match(r"[A-Z_]+=", word):
            words.append(word)


def parse(words: list[str]) -> str:
    """Parse a command line as the program does, and run nothing; returns the command that it
    means. Raises :class:`typer.TyperException` for what does not parse."""
    command = PROGRAM
    context = command.make_context("cdc-sync", list(words), obj=Invocation(words))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    return str(context.command_path)


def test_parsing_refuses_what_does_not_exist() -> None:
    assert parse(["verify", "--config", "a.toml"]) == "cdc-sync verify data"
    for wrong in (["run", "--nope"], ["nope"], ["uninstall"], ["verify", "--sample", "x"]):
        with pytest.raises(typer.TyperException):
            parse(wrong)


def test_shell_lines_are_taken_apart() -> None:
    line = "X=1 cdc-sync a --b 'c; d' > file.toml && sudo e | f   # comment"
    assert list(simple_commands(line)) == [
        ["cdc-sync", "a", "--b", "c; d"],
        ["sudo", "e"],
        ["f"],
    ]


def test_commands_parse() -> None:
    parsed, wrong = 0, []
    for document, line in command_lines():
        for words in simple_commands(line):
            where = f"{name_of(document)}: {line}"
            if words[0] != "cdc-sync":
                if words[0].rpartition("/")[2] not in OTHER_PROGRAMS:
                    wrong.append(f"{where}: {words[0]}?")
                continue
            try:
                parse(words[1:])
                parsed += 1
            except typer.TyperException as error:
                wrong.append(f"{where}: {error.format_message()}")
    assert not wrong
    assert parsed >= 30


def test_commands_within_sentences_have_their_options() -> None:
    """Placeholders keep these from being parsed, so only names are looked up."""
    seen = 0
    for document in DOCUMENTS:
        for line in re.findall(r"`cdc-sync ([^`]+)`", text_of(document)):
            command = PROGRAM
            words = line.split()
            while words and words[0] in getattr(command, "commands", {}):
                command = command.commands[words.pop(0)]
            where = f"{name_of(document)}: cdc-sync {line}"
            assert command.name != "cdc-sync" or words == ["--debug", "..."], where
            if hasattr(command, "commands") and "data" in command.commands:
                command = command.commands["data"]
            known = {name for one in command.params for name in [*one.opts, *one.secondary_opts]}
            for option in re.findall(r"--[a-z][a-z.-]*", " ".join(words)):
                assert option in {*known, "--help"}, where
            seen += 1
    assert seen >= 30


def test_configurations_fit_the_settings() -> None:
    seen = 0
    for document, block in blocks("toml"):
        content = tomllib.loads(block)
        try:
            Settings.model_validate({**REST, **content})
        except ValueError as error:
            pytest.fail(f"{name_of(document)}:\n{block}\n{error}")
        seen += 1
    assert seen >= 8


def test_sql_parses(database18: Database) -> None:
    """By having PL/pgSQL compile it behind a RETURN, which runs nothing and needs no objects."""
    with pytest.raises(psycopg.errors.SyntaxError):
        database18.execute(_parsed("CREATE PUBLICATION p FOR TABEL t;"))
    seen = 0
    for document, block in blocks("sql"):
        if block.splitlines()[0] in SQL_EXCEPTIONS:
            continue
        try:
            database18.execute(_parsed(block))
        except psycopg.Error as error:
            pytest.fail(f"{name_of(document)}:\n{block}\n{error}")
        seen += 1
    assert seen >= 8


def _parsed(sql: str) -> str:
    return f"DO $parsed$ BEGIN RETURN;\n{sql}\nEND $parsed$"


def test_the_grants_of_getting_started_run(database18: Database) -> None:
    """Those of each service, in a transaction that is rolled back."""
    database18.execute("CREATE TABLE documents (id bigint PRIMARY KEY, embedding vector(3))")
    setup = "CREATE ROLE rds_replication; CREATE SCHEMA extensions;"
    ran = 0
    for document, block in blocks("sql"):
        if document.name != "getting-started.md" or "ALTER SYSTEM" in block:
            continue
        sql = re.sub(r"ON DATABASE \w+", f'ON DATABASE "{database18.name}"', block)
        with psycopg.connect(database18.url) as connection:
            connection.execute(f"{setup} {sql}".encode())
            if "CREATE PUBLICATION" in sql:
                row = connection.execute(
                    "SELECT has_table_privilege('cdc', 'documents', 'SELECT'),"
                    " (SELECT pubviaroot FROM pg_publication WHERE pubname = 'cdc_sync')"
                ).fetchone()
                assert row == (True, True), block
            connection.rollback()
        ran += 1
    assert ran >= 5


def test_the_migration_guide_runs(
    tmp_path: Path, database18: Database, qdrant: QdrantTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration and its commands, in its order, on one database; ``run`` stays until the
    next command that cannot have it beside it."""
    guide = Guide(tmp_path, database18, qdrant, monkeypatch)
    done: list[str] = []
    try:
        for document, line in command_lines():
            if document.name == "migration.md" and line.startswith("cdc-sync "):
                done.append(guide.follow(shlex.split(line)[1:]))
    finally:
        guide.stop()
    assert done == [
        "check", "plan", "baseline", "migrate", "run", "status", "verify", "verify", "migrate",
        "uninstall",
    ]  # fmt: skip
    assert (tmp_path / "report.html").stat().st_size > 0
    assert database18.execute(
        "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()"
    ) == [(0,)]
    assert qdrant.client().count(guide.collection).count == ROWS + 1


class Guide:
    """Somebody who follows the guide: its configuration in a directory, and servers of ours by
    variables, which count more than the file."""

    def __init__(
        self,
        directory: Path,
        database: Database,
        qdrant: QdrantTarget,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.collection = qdrant.new_collection_name()
        self._directory, self._database = directory, database
        self._daemon: subprocess.Popen[bytes] | None = None
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = int(probe.getsockname()[1])
        database.execute(DOCUMENTS_TABLE)
        (toml,) = (block for document, block in blocks("toml") if document.name == "migration.md")
        toml = toml.replace('collection = "documents"', f'collection = "{self.collection}"')
        (directory / "cdc-sync.toml").write_text(toml, encoding="utf-8")
        queries = [{"vector": [1, 2, i], "filter": "lang = 'en' AND year >= 2020"} for i in (1, 5)]
        (directory / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
        variables = {
            "CDC_SYNC_SOURCE__URL": database.url,
            "CDC_SYNC_SOURCE__SLOT": database.name,
            "CDC_SYNC_SOURCE__PUBLICATION": database.name,
            "CDC_SYNC_QDRANT__URL": qdrant.url,
            "CDC_SYNC_QDRANT__API_KEY": qdrant.api_key or "",
            "CDC_SYNC_PIPELINE__NAME": self.collection,
            "CDC_SYNC_HTTP__PORT": str(self._port),
            "CDC_SYNC_MIGRATION__NUM_WORKERS": "1",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(directory)

    def follow(self, words: list[str]) -> str:
        """Do what a line says; returns the command."""
        words = [self._database.name if word == "cdc_sync" else word for word in words]
        if words[0] == "run":
            self._daemon = self._start(words)
        elif words[0] == "status":
            words.remove("--watch")
            self._until_ready([*words, "--url", f"http://127.0.0.1:{self._port}"])
            self._database.execute("INSERT INTO documents VALUES (1000, 'fr', 2024, '[3,2,1]')")
        elif words[0] == "migrate":
            self.stop()
            process = self._start(words)
            assert _ended(process, 120) == 0, self._said()
        else:
            if words[0] == "uninstall":
                self.stop()
            assert main(words) == 0, words
        return words[0]

    def _start(self, words: list[str]) -> subprocess.Popen[bytes]:
        with (self._directory / "log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "cdc_sync", *words], stdout=log, stderr=log
            )

    def _said(self) -> str:
        return (self._directory / "log").read_text(encoding="utf-8")

    def _until_ready(self, status: list[str]) -> None:
        assert self._daemon is not None
        deadline = time.monotonic() + 60
        while main(status) != 0:
            assert self._daemon.poll() is None, self._said()
            assert time.monotonic() < deadline, self._said()
            time.sleep(0.1)

    def stop(self) -> None:
        if self._daemon is not None:
            daemon, self._daemon = self._daemon, None
            daemon.terminate()
            assert _ended(daemon, 60) == 0, self._said()


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code; nothing is left of a process that does not end in time."""
    try:
        return process.wait(seconds)
    finally:
        process.kill()


def test_links_lead_somewhere() -> None:
    broken = []
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", text_of(document), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            path, _, anchor = target.partition("#")
            file = (document.parent / path).resolve() if path else document
            if not file.exists() or (anchor and anchor not in _anchors(file)):
                broken.append(f"{name_of(document)}: {target}")
    assert not broken


def _anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to headings, and those that are set by hand."""
    text = text_of(document)
    headings = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
