"""What ``check`` makes of facts, how it shows it, and that its document knows every finding."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
from qdrant_client import grpc as q

from cdc_sync.cli import main
from cdc_sync.cli.check import exit_code
from cdc_sync.config import Settings
from cdc_sync.errors import ErrorKind, ExitCode
from cdc_sync.mapping.plan import ColumnPlan, IdScheme, Metric, TablePlan, VectorKind, VectorPlan
from cdc_sync.mapping.table import PgType
from cdc_sync.postgres.catalog import ServerInfo
from cdc_sync.postgres.estimates import WalFacts
from cdc_sync.postgres.server_facts import (
    Between,
    OpenTransaction,
    RoleFacts,
    ServerSettings,
    Standbys,
)
from cdc_sync.postgres.slot import SlotInfo
from cdc_sync.postgres.toast_facts import ToastFacts, out_of_line
from cdc_sync.qdrant.examination import cluster_facts, collection_facts
from cdc_sync.sync import doctor_qdrant, doctor_server
from cdc_sync.sync.findings import Finding
from cdc_sync.sync.known_findings import KNOWN, finding
from tests.support.command_line import ONE_TABLE, output

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "check.md"
GB = 1 << 30


def settings(**sections: object) -> Settings:
    return Settings.model_validate(
        {"source": {"url": "postgresql://db.invalid/app"}, "tables": [{"name": "t"}], **sections}
    )


def found(findings: Iterable[Finding]) -> dict[str, str]:
    """Severity by id; each id comes once."""
    made = list(findings)
    assert len({one.id for one in made}) == len(made), made
    for one in made:
        assert one.severity == "ok" or one.message, one
    return {one.id: one.severity for one in made}


# -- document and code


def test_the_document_lists_every_finding() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| ([a-z, ]+) \| (.+) \|$", DOCUMENT.read_text(), re.M)
    listed = {name: tuple(severities.split(", ")) for name, severities, _ in rows}
    severities = {"ok", "advice", "warning", "error"}
    listed = {name: of for name, of in listed.items() if set(of) <= severities}
    assert listed == {name: known.severities for name, known in KNOWN.items()}
    assert all(len(text) > 15 for *_, text in rows)


def test_every_finding_is_made_somewhere() -> None:
    """An id that no code makes any more is no finding."""
    package = DOCUMENT.parents[1] / "cdc_sync"
    source = (
        "".join(
            path.read_text()
            for path in [*package.glob("sync/check*.py"), *package.glob("sync/doctor_*.py")]
        )
        + (package / "cli" / "check.py").read_text()
    )
    unmade = {
        name for name in KNOWN if f'"{name}"' not in source and not name.endswith("-transport")
    }
    assert not unmade


def test_a_finding_that_is_not_known_is_refused() -> None:
    with pytest.raises(KeyError):
        finding("unheard-of", "ok", "s", "m")
    with pytest.raises(AssertionError):
        finding("clock", "error", "s", "m")


# -- what people and machines see


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    made: list[Finding] = []
    module = ModuleType("cdc_sync.sync.check")
    module.run_checks = lambda _: made  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cdc_sync.sync.check", module)
    return made


def test_findings_are_grouped_by_side_table_and_collection(
    findings: list[Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    findings += [
        finding("postgres-connection", "ok", "postgres", "connected"),
        finding("table", "ok", "public.docs", "becomes collection docs, vectors: e"),
        finding("clock", "ok", "clock", "that of the server and this host's agree"),
        finding("strict-mode", "advice", "collection docs", "m"),
        finding("qdrant-connection", "ok", "qdrant", "connected"),
    ]
    assert main(["check", *ONE_TABLE]) == 0
    assert output(capsys)[0].splitlines() == [
        "Postgres",
        "ok       postgres-connection  connected",
        "ok       clock                that of the server and this host's agree",
        "",
        "Table public.docs",
        "ok       table  becomes collection docs, vectors: e",
        "",
        "Collection docs",
        "advice   strict-mode  m",
        "",
        "Qdrant",
        "ok       qdrant-connection  connected",
        "",
        "no errors, no warnings, 1 piece of advice",
    ]


def test_no_line_is_longer_than_80_columns_but_for_what_is_quoted(
    findings: list[Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    long = '"' + "a b " * 30 + '"'
    findings += [
        finding("publication", "warning", "publication", "word " * 60, f"GRANT x ON {long} TO r;"),
        finding("slot", "warning", "slot", "m", "Prose " * 30 + "\nALTER SYSTEM SET a = 'b  c';"),
    ]
    assert main(["check", *ONE_TABLE]) == 0
    shown = output(capsys)[0]
    lines = shown.splitlines()
    assert [line for line in lines if len(line) > 80] == [f"         {long}"]
    assert f"{long}\n         TO r;" in shown, "what is quoted is whole"
    assert "         ALTER SYSTEM SET a = 'b  c';" in lines


def test_an_odd_quote_loses_no_word(
    findings: list[Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "the server's clock isn't " + "right at all, " * 8 + "it's \"odd"
    findings.append(finding("slot", "warning", "slot", text))
    assert main(["check", *ONE_TABLE]) == 0
    shown = output(capsys)[0]
    assert " ".join(text.split()) in " ".join(shown.split())


def test_strict_fails_on_warnings_only(
    findings: list[Finding], capsys: pytest.CaptureFixture[str]
) -> None:
    findings.append(finding("failover", "advice", "failover", "m"))
    assert main(["check", *ONE_TABLE, "--strict"]) == ExitCode.OK
    findings.append(finding("failover", "warning", "failover", "m"))
    assert main(["check", *ONE_TABLE]) == ExitCode.OK
    assert main(["check", *ONE_TABLE, "--strict"]) == ExitCode.CONFIG
    output(capsys)
    assert main(["check", *ONE_TABLE, "--strict", "--json"]) == ExitCode.CONFIG
    shown = json.loads(output(capsys)[0])
    assert shown["ok"] is False
    assert shown["findings"][1] == {
        "id": "failover",
        "side": "postgres",
        "severity": "warning",
        "subject": "failover",
        "message": "m",
        "remedy": "",
        "kind": None,
    }
    findings.append(
        finding("table-privileges", "error", "t", "m", "r", ErrorKind.SOURCE_PERMISSION)
    )
    assert exit_code(findings, strict=True) == ExitCode.PERMISSION, "the error decides"


# -- the server


def server(version: int) -> ServerInfo:
    return ServerInfo(version, "1", 1, "app", False)


@pytest.mark.parametrize(
    ("version", "severity"),
    [
        (140018, "warning"),
        (140019, "advice"),
        (150013, "warning"),
        (150014, "ok"),
        (160009, "warning"),
        (160010, "ok"),
        (170005, "warning"),
        (170006, "ok"),
        (180000, "ok"),
        (190000, "advice"),
    ],
)
def test_versions_of_postgres(version: int, severity: str) -> None:
    assert found(doctor_server.version_findings(server(version))) == {"postgres-version": severity}


SHOWN = ServerSettings("logical", 60.0, 0.0, None, GB, "", "5432")
ROLE = RoleFacts("r", {}, None, 100, True)
WAL = WalFacts("logical", None, 10, 10, None, None)


def test_wal_that_a_slot_may_keep() -> None:
    def severity(limit: int | None, rate: float | None = None, seconds: float = 1e6) -> str:
        shown = dataclasses.replace(SHOWN, max_slot_wal_keep_bytes=limit)
        wal = dataclasses.replace(WAL, bytes_per_second=rate, measured_seconds=seconds)
        (one,) = doctor_server.wal_limit_findings(shown, wal)
        assert one.severity == "ok" or "ALTER SYSTEM SET max_slot_wal_keep_size = '" in one.remedy
        assert "'0GB'" not in one.remedy
        return one.severity

    assert severity(None) == "warning"
    assert severity(GB // 2) == "warning", "less than max_wal_size"
    assert severity(GB) == "ok"
    assert severity(10 * GB, rate=GB / 60) == "warning", "ten minutes"
    assert severity(10 * GB, rate=GB / 60, seconds=5) == "ok", "five seconds are no average"
    assert severity(100 * GB, rate=GB / 60) == "ok"


def test_timeouts() -> None:
    def timeouts(role: RoleFacts = ROLE, lost: bool = False, **changes: float) -> dict[str, str]:
        shown = dataclasses.replace(SHOWN, **changes)  # type: ignore[arg-type]
        return found(doctor_server.timeout_findings(shown, role, lost))

    assert timeouts() == {}
    assert timeouts(idle_slot_timeout_seconds=3600.0) == {"slot-idle-timeout": "warning"}
    assert timeouts(wal_sender_timeout_seconds=0.0) == {"wal-sender-timeout": "advice"}
    assert timeouts(wal_sender_timeout_seconds=3.0) == {"wal-sender-timeout": "warning"}
    assert timeouts(wal_sender_timeout_seconds=3600.0) == {"wal-sender-timeout": "advice"}
    hurried = dataclasses.replace(ROLE, timeouts={"statement_timeout": "5s"})
    assert timeouts(hurried) == {"role-timeouts": "advice"}
    assert timeouts(hurried, lost=True) == {}, "session-settings says it"


def test_room_for_connections() -> None:
    def room(free_of_role: int | None, free_of_server: int) -> str | None:
        role = dataclasses.replace(ROLE, free_of_role=free_of_role, free_of_server=free_of_server)
        made = {one.id: one for one in doctor_server.room_findings(WAL, role, 4)}
        short = made.get("connection-room")
        return None if short is None else short.remedy.splitlines()[-1]

    assert room(None, 8) is None
    assert room(8, 8) is None
    assert room(7, 100) == 'ALTER ROLE "r" CONNECTION LIMIT 12;'
    assert "max_connections" in str(room(None, 7))
    assert "max_connections" in str(room(100, -1))


CLEAR = Between("db.example", 5432, False, False, ())


def test_what_stands_in_between() -> None:
    def between(found_: Between, shown: ServerSettings = SHOWN) -> dict[str, Finding]:
        made = list(doctor_server.between_findings(found_, ROLE, shown))
        return {one.id: one for one in made}

    assert between(CLEAR) == {}
    proxied = dataclasses.replace(CLEAR, port=6432, strange_pid=True)
    assert between(proxied)["pooler"].severity == "warning"
    assert "port 5432" in between(proxied)["pooler"].remedy
    pooled = dataclasses.replace(proxied, changing_pid=True)
    assert between(pooled)["pooler"].severity == "error"
    assert between(pooled)["pooler"].kind is ErrorKind.CONFIG
    for host, word in (
        ("aws-0-eu-central-1.pooler.supabase.com", "db.<project>.supabase.co"),
        ("ep-cool-rain-123-pooler.eu-central-1.aws.neon.tech", "without -pooler"),
    ):
        assert word in between(dataclasses.replace(CLEAR, host=host))["pooler"].remedy
    lost = between(dataclasses.replace(CLEAR, lost=("TimeZone", "statement_timeout")))
    assert lost["session-settings"].severity == "warning"
    assert 'ALTER ROLE "r" SET statement_timeout = 0;' in lost["session-settings"].remedy
    assert "SET TimeZone" not in lost["session-settings"].remedy


def test_open_transactions() -> None:
    def severity(one: OpenTransaction, slot: bool = False, lasting: str = "") -> str | None:
        made = list(doctor_server.transaction_findings([one], slot, frozenset({lasting} - {""})))
        return made[0].severity if made else None

    young = OpenTransaction("1", "process 1", 2.0, False)
    assert severity(young) is None
    old = dataclasses.replace(young, seconds=60.0)
    assert severity(old) == "warning"
    assert severity(old, slot=True) is None
    assert severity(dataclasses.replace(young, seconds=7200.0), slot=True) == "warning"
    assert severity(dataclasses.replace(young, prepared=True), slot=True) == "warning"
    hidden = dataclasses.replace(young, seconds=None)
    assert severity(hidden) is None
    assert severity(hidden, lasting="1") == "advice"


SLOT = SlotInfo(
    "cdc_sync", "pgoutput", "app", False, False, None, None, None, None, "reserved", None, None,
    two_phase=False, failover=False, synced=False,
)  # fmt: skip


def test_slots() -> None:
    def severity(slot: SlotInfo | None, **source: object) -> str:
        section = {"url": "postgresql://db.invalid/app", **source}
        configured = settings(source=section)
        return doctor_server.slot_findings(configured, server(180000), slot).severity

    assert severity(None) == "ok"
    assert severity(SLOT) == "ok"
    assert severity(dataclasses.replace(SLOT, plugin="test_decoding")) == "error"
    assert severity(dataclasses.replace(SLOT, database="other")) == "error"
    assert severity(dataclasses.replace(SLOT, two_phase=True)) == "error"
    assert severity(dataclasses.replace(SLOT, wal_status="lost")) == "warning"
    assert severity(dataclasses.replace(SLOT, wal_status="lost"), on_slot_lost="stop") == "warning"
    assert severity(dataclasses.replace(SLOT, wal_status="unreserved")) == "warning"


def test_failover() -> None:
    def severity(
        version: int, found_: Standbys, slot: SlotInfo | None = None, **source: object
    ) -> list[str]:
        configured = settings(source={"url": "postgresql://db.invalid/app", **source})
        facts = server(version)
        made = [
            *doctor_server.standby_findings(configured, facts, slot, found_),
            *doctor_server.standby_settings_findings(configured, facts, SHOWN, found_),
        ]
        assert all(one.remedy for one in made)
        return [one.severity for one in made]

    alone, one = Standbys(0, (), ()), Standbys(1, ("s1",), ("s1",))
    assert severity(180000, alone) == []
    assert severity(160010, one) == ["advice"]
    assert severity(180000, one) == ["advice"], "settings"
    assert severity(180000, one, failover=False) == ["advice"]
    assert severity(180000, one, SLOT) == ["warning", "advice"]
    assert severity(180000, one, dataclasses.replace(SLOT, failover=True)) == ["advice"]


def test_the_clock() -> None:
    for offset, error, severity in (
        (0.0, 0.0, "ok"),
        (-0.9, 0.0, "ok"),
        (3.0, 2.5, "ok"),
        (-3.0, 0.5, "advice"),
        (45.0, 0.5, "warning"),
    ):
        one = doctor_server.clock_finding(offset, error)
        assert one.severity == severity, (offset, error)
    assert "3.0 s behind" in doctor_server.clock_finding(-3.0, 0.5).message


# -- where values lie


def test_the_rule_of_the_toaster() -> None:
    assert out_of_line([8, 1544, 490], "pee") == {1}
    assert out_of_line([8, 1544, 400], "pee") == set(), "2032 bytes just fit"
    assert out_of_line([8, 6148, 3000], "pee") == {1, 2}
    assert out_of_line([8, 6148, None], "ppe") == set(), "plain never goes"
    assert out_of_line([8, 1000, 1000, 1000], "peex") == {2, 3}, "longest first, then the last"
    assert out_of_line([8, 3000], "pm") == set(), "main stays while the page has room"
    assert out_of_line([8, 9000], "pm") == {1}
    assert out_of_line([8, 600], "pe", target=256) == {1}
    assert out_of_line([8] * 1000, "e" * 1000) == set(), "nothing worth moving"


def test_what_full_would_cost() -> None:
    facts = ToastFacts(10, row_bytes=80.0, all_bytes=3200.0, columns=())
    assert 15 < facts.full_identity_factor < 19
    assert ToastFacts(0, 0.0, 0.0, ()).full_identity_factor == 1.0


# -- collections

TEXT = PgType(25, "pg_catalog", "text")
PLAN = TablePlan(
    oid=1,
    schema="public",
    table="t",
    collection="c",
    columns=(
        ColumnPlan("id", TEXT, field="id"),
        ColumnPlan("e", TEXT, vector=VectorPlan("e", VectorKind.DENSE, 1024, Metric.COSINE)),
    ),
    key=(0,),
    id_scheme=IdScheme.HASHED,
)


def info(**changes: object) -> q.CollectionInfo:
    """A collection with nothing to say about."""
    vectors = q.VectorsConfig(
        params_map=q.VectorParamsMap(
            map={"e": q.VectorParams(size=1024, distance=q.Distance.Cosine)}
        )
    )
    made = q.CollectionInfo(
        status=q.CollectionStatus.Green,
        points_count=10,
        config=q.CollectionConfig(
            params=q.CollectionParams(vectors_config=vectors, replication_factor=1),
            hnsw_config=q.HnswConfigDiff(m=16),
            optimizer_config=q.OptimizersConfigDiff(indexing_threshold=10_000),
        ),
    )
    made.MergeFrom(q.CollectionInfo(**changes))  # type: ignore[arg-type]
    return made


def judged(
    described: q.CollectionInfo,
    cluster: q.CollectionClusterInfoResponse | None = None,
    rows: int | None = 1000,
    **qdrant: object,
) -> list[tuple[str, str, str]]:
    located = None if cluster is None else cluster_facts(cluster)
    facts = collection_facts(described, located)
    made = doctor_qdrant.collection_findings(settings(qdrant=qdrant), PLAN, facts, rows)
    return [(one.id, one.severity, one.message) for one in made]


def short(made: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
    return [(id_, severity) for id_, severity, _ in made]


def test_a_sound_collection() -> None:
    assert judged(info()) == []


def test_states_and_indexes_of_collections() -> None:
    assert short(judged(info(status=q.CollectionStatus.Red))) == [("collection-status", "warning")]
    assert short(judged(info(status=q.CollectionStatus.Grey))) == [("collection-status", "advice")]
    unindexed = info()
    unindexed.config.optimizer_config.indexing_threshold = 0
    assert short(judged(unindexed)) == [("collection-index", "warning")]
    flat = info()
    flat.config.hnsw_config.m = 0
    assert short(judged(flat)) == [("collection-index", "warning")]
    own = flat.config.params.vectors_config.params_map.map["e"]
    own.hnsw_config.m = 8
    assert judged(flat) == [], "the vector's own counts"
    assert short(judged(info(points_count=200_000))) == [("collection-index", "advice")]
    assert judged(info(points_count=200_000, indexed_vectors_count=190_000)) == []


def test_vectors_in_memory() -> None:
    large = info(points_count=2_000_000, indexed_vectors_count=2_000_000)
    assert short(judged(large)) == [("collection-memory", "advice")]
    assert short(judged(info(), rows=2_000_000)) == [("collection-memory", "advice")]
    vector = large.config.params.vectors_config.params_map.map["e"]
    vector.on_disk = True
    assert judged(large) == []
    vector.on_disk = False
    vector.memory = q.Memory.Value("Pinned")
    assert short(judged(large)) == [("collection-memory", "advice")]
    vector.memory = q.Memory.Value("Cold")
    assert judged(large) == []


def test_replicas() -> None:
    active, dead = q.ReplicaState.Active, q.ReplicaState.Dead
    local = [q.LocalShardInfo(shard_id=0, state=active)]
    alone = q.CollectionClusterInfoResponse(peer_id=1, shard_count=1, local_shards=local)
    assert judged(info(), alone) == []
    spread = q.CollectionClusterInfoResponse(
        peer_id=1,
        shard_count=2,
        local_shards=local,
        remote_shards=[q.RemoteShardInfo(shard_id=1, peer_id=2, state=active)],
    )
    assert short(judged(info(), spread)) == [("collection-replicas", "advice")]
    twice = info()
    twice.config.params.replication_factor = 2
    assert judged(twice, spread) == []
    spread.shard_transfers.add()
    assert short(judged(twice, spread)) == [("collection-replicas", "advice")]
    spread.remote_shards[0].state = dead
    ((id_, severity, message),) = judged(twice, spread)
    assert (id_, severity) == ("collection-replicas", "warning")
    assert "shard 1 on peer 2: Dead" in message


def test_strict_mode() -> None:
    def strict(rows: int | None = 1000, **limits: object) -> list[tuple[str, str, str]]:
        described = info()
        config = q.StrictModeConfig(**{"enabled": True, **limits})  # type: ignore[arg-type]
        described.config.strict_mode_config.CopyFrom(config)
        return judged(described, rows=rows, request_points=256)

    assert strict() == []
    assert strict(upsert_max_batchsize=256, max_points_count=1000) == []
    assert strict(enabled=False, upsert_max_batchsize=1) == []
    for limits in (
        {"upsert_max_batchsize": 255},
        {"upsert_max_batchsize": 0},
        {"write_rate_limit": 255},
        {"max_points_count": 999},
        {"max_collection_vector_size_bytes": 4_000_000},
    ):
        assert short(strict(**limits)) == [("strict-mode", "warning")], limits
    assert strict(None, max_points_count=1, max_collection_vector_size_bytes=1) == []
    slow = strict(1_000_000, write_rate_limit=1000)
    assert [message for id_, _, message in slow if id_ == "strict-mode" and "17 hours" in message]
    assert short(strict(search_allow_exact=False)) == [("strict-mode", "advice")]


def test_versions_of_qdrant() -> None:
    def version(text: str, marked: bool = False, defer: bool = False) -> list[str]:
        configured = settings(migration={"defer_hnsw": defer})
        made = list(doctor_qdrant.server_findings(configured, text, marked))
        assert {one.id for one in made} <= {"qdrant-version"}
        return [one.severity for one in made]

    assert version("1.19.0") == version("1.18.2") == version("dev") == []
    assert version("1.15.4") == version("1.16.3") == ["advice"]
    assert version("v1.20.1-rc1") == version("2.0.0") == ["advice"]
    assert version("1.18.2", marked=True) == ["advice"]
    assert version("1.19.0", marked=True) == []
    assert version("1.15.4", defer=True) == ["error", "advice"]


def test_room_on_the_disk() -> None:
    assert doctor_qdrant.disk_finding("/d", 10, None).severity == "ok"
    assert doctor_qdrant.disk_finding("/d", 10, 10).severity == "ok"
    assert doctor_qdrant.disk_finding("/d", 10, 11).severity == "warning"
