"""``cdc-sync verify search``: a copy that is right passes, and what is wrong is named."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cdc_sync.cli import main
from cdc_sync.config import Settings
from cdc_sync.errors import ConfigError, ErrorKind, SinkError
from cdc_sync.verify.baseline import CaptureOptions, capture
from cdc_sync.verify.baseline_file import Baseline, write_baseline
from cdc_sync.verify.baseline_queries import read_queries
from cdc_sync.verify.quality import Verdict
from cdc_sync.verify.search import SearchOptions, verify_search
from cdc_sync.verify.search_html import as_html
from cdc_sync.verify.search_report import ColumnReport, SearchReport, as_json, as_text
from tests.support.fix_postgres import Database
from tests.support.fix_qdrant import QdrantTarget
from tests.support.search_scene import change, fill, optimize, scene_settings

VECTORS = """
CREATE TABLE docs (
    id bigint PRIMARY KEY, cos vector(6), euclid vector(6), dot vector(6), manhattan vector(6),
    half halfvec(6), sparse sparsevec(40), bits bit(32)
);
INSERT INTO docs SELECT i, v, v, v, v, v::halfvec,
    ('{' || 1 + i % 20 || ':' || 1 + sin(i) / 2 || ',' || 21 + i % 13 || ':1.5}/40')::sparsevec,
    i::bit(32)
  FROM generate_series(1, 150) i, LATERAL (SELECT
    ARRAY[sin(i), cos(i * 3), sin(i * 7), cos(i * 11), sin(i * 13), 1 + cos(i)]::vector AS v) s;
CREATE INDEX ON docs USING hnsw (cos vector_cosine_ops);
CREATE INDEX ON docs USING hnsw (euclid vector_l2_ops);
CREATE INDEX ON docs USING ivfflat (dot vector_ip_ops) WITH (lists = 12);
CREATE INDEX ON docs USING hnsw (manhattan vector_l1_ops);
CREATE INDEX ON docs USING hnsw (half halfvec_l2_ops);
"""

ONE = """
CREATE TABLE docs (id bigint PRIMARY KEY, lang text, n int, embedding vector(6));
INSERT INTO docs SELECT i, (ARRAY['en','de',NULL])[1 + i % 3], i % 10,
    ARRAY[sin(i), cos(i * 3), sin(i * 7), cos(i * 11), sin(i * 13), 1 + cos(i)]::vector
  FROM generate_series(1, 200) i;
"""


@pytest.fixture(params=["server", "edge"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> QdrantTarget | str:
    if request.param == "edge":
        return str(tmp_path / "edge")
    server: QdrantTarget = request.getfixturevalue("qdrant")
    return server


@pytest.fixture
def docs(database18: Database, tmp_path: Path) -> Settings:
    """One table with one vector column, and an embedded database that is empty yet."""
    database18.execute(ONE)
    return scene_settings(
        database18, str(tmp_path / "edge"), {"name": "docs", "metrics": {"embedding": "euclid"}}
    )


def column(report: SearchReport) -> ColumnReport:
    (only,) = report.columns
    return only


def criterion(report: SearchReport, name: str) -> Verdict:
    tiers = column(report).tiers
    assert tiers is not None
    return next(one.verdict for one in tiers.criteria if one.name == name)


def causes(report: SearchReport) -> list[str]:
    return [cause.name for cause in column(report).causes]


def verified(settings: Settings, baseline: Baseline, **options: str) -> SearchReport:
    return verify_search(settings, baseline, SearchOptions(**options))  # type: ignore[arg-type]


def retargeted(settings: Settings, **table: object) -> Settings:
    """The same settings with other ones for the table."""
    sections = [{**settings.tables[0].model_dump(), **table}]
    return settings.model_copy(
        update={"tables": [type(settings.tables[0]).model_validate(one) for one in sections]}
    )


def test_a_right_copy_passes_for_every_metric(
    database18: Database, target: QdrantTarget | str
) -> None:
    database18.execute(VECTORS)
    settings = scene_settings(database18, target, {"name": "docs", "bit_vectors": ["bits"]})
    baseline = capture(settings, CaptureOptions(sampled=12))
    fill(settings)
    report = verified(settings, baseline)
    found = {one.column: one for one in report.columns}
    assert {name: one.metric for name, one in found.items()} == {
        "cos": "Cosine",
        "euclid": "Euclid",
        "dot": "Dot",
        "manhattan": "Manhattan",
        "half": "Euclid",
        "sparse": "Dot",
        "bits": "Manhattan",
    }
    for name, one in found.items():
        assert one.tiers is not None
        assert one.tiers.exact_recall is not None
        assert one.tiers.exact_recall.mean == 1.0, name
        # Scores are those of pgvector, translated; halves are rounded by neither side anew.
        assert one.tiers.pairs
        assert all(a == pytest.approx(b, abs=2e-3) for a, b in one.tiers.pairs), name
        assert one.verdict is Verdict.PASS, (name, one.tiers.criteria, one.causes)
        assert (one.rows, one.points) == (150, 150)
    dot = found["dot"].tiers
    assert dot is not None
    assert dot.index_recall is not None
    assert dot.index_recall.mean < 1
    assert any("IVFFlat (lists = 12, probes = 1)" in caveat for caveat in found["dot"].caveats)
    assert any("small collections" in caveat for caveat in found["cos"].caveats)
    assert report.verdict is Verdict.PASS


def test_comparing_with_the_index_of_the_source(database18: Database, tmp_path: Path) -> None:
    database18.execute(VECTORS)
    settings = scene_settings(
        database18, str(tmp_path / "edge"), {"name": "docs", "columns": ["id", "dot"]}
    )
    baseline = capture(settings, CaptureOptions(sampled=50))
    fill(settings)
    assert verified(settings, baseline).verdict is Verdict.PASS
    report = verified(settings, baseline, against="index")
    tiers, exact = column(report).tiers, verified(settings, baseline).columns[0].tiers
    assert tiers is not None
    assert exact is not None
    assert tiers.recall is not None
    assert exact.index_recall is not None
    assert tiers.recall.mean < 1
    assert any("approximate" in caveat for caveat in column(report).caveats)


def test_filters_and_labels_of_a_file(
    database18: Database, target: QdrantTarget | str, tmp_path: Path
) -> None:
    database18.execute(ONE)
    settings = scene_settings(database18, target, {"name": "docs"})
    file = tmp_path / "queries.json"
    vector = [0.1, 0.2, -0.3, 0.4, 0.5, 1.0]
    nearest = database18.execute(
        f"SELECT id FROM docs ORDER BY embedding <=> '{json.dumps(vector)}' LIMIT 2"
    )
    relevant = [row[0] for row in nearest]
    queries = [
        {"vector": vector, "relevant": relevant, "label": "both"},
        {"vector": vector, "filter": "lang = 'en' OR (lang IS NULL AND n <= 3)", "k": 5},
        {"vector": vector, "filter": "lang <> 'en' AND NOT n IN (1, 2)"},
        {"vector": vector, "filter": "n > 50"},
        {"vector": vector, "filter": "lang IN ('fr', NULL)", "relevant": [-7]},
        {"vector": vector, "filter": "n NOT IN (1, NULL)"},
    ]
    file.write_text(json.dumps(queries))
    options = CaptureOptions(given=tuple(read_queries(file)), sampled=0)
    baseline = capture(settings, options)
    fill(settings)
    report = verified(settings, baseline)
    assert report.verdict is Verdict.PASS
    tiers = column(report).tiers
    assert tiers is not None
    assert tiers.recalls == (1.0, 1.0, 1.0, None, None, None)
    relevance = {one.name: one for one in tiers.criteria if one.tier == 3}
    assert relevance["MRR"].value == relevance["MRR"].source == 0.5
    assert relevance["NDCG@10"].note == "acceptable, and no better in the source"
    assert any("6 queries are few" in caveat for caveat in column(report).caveats)


def test_a_missing_point_is_named(docs: Settings) -> None:
    baseline = capture(docs, CaptureOptions())
    fill(docs)
    lost = [int(hit.key[0]) for query in baseline.queries for hit in query.exact[:1]]
    change(docs, delete=sorted(set(lost)))
    report = verified(docs, baseline)
    assert causes(report)[0] == "data"
    assert criterion(report, "top-1 match") is Verdict.INVESTIGATE
    text = as_text(report)
    assert f"{len(set(lost))} of the" in re.sub(r"\s+", " ", text)


def test_a_single_missing_point_does_not_pass(docs: Settings) -> None:
    baseline = capture(docs, CaptureOptions())
    fill(docs)
    change(docs, delete=[int(baseline.queries[0].exact[4].key[0])])
    report = verified(docs, baseline)
    assert causes(report) == ["data"]
    assert report.verdict is Verdict.INVESTIGATE


def test_rows_deleted_since_are_no_fault(docs: Settings, database18: Database) -> None:
    baseline = capture(docs, CaptureOptions())
    gone = int(baseline.queries[0].exact[0].key[0])
    database18.execute(f"DELETE FROM docs WHERE id = {gone}")
    fill(docs)
    report = verified(docs, baseline)
    assert report.verdict is Verdict.PASS
    caveats = " ".join(column(report).caveats)
    assert "1 rows of the baseline's results were deleted since" in caveats
    assert "199 rows now and had 200" in caveats


def test_a_wrong_metric_is_named(docs: Settings) -> None:
    baseline = capture(docs, CaptureOptions())
    fill(docs, retargeted(docs, metrics={"embedding": "dot"}))
    report = verified(docs, baseline)
    assert causes(report) == ["metric"]
    assert report.verdict is not Verdict.PASS
    assert "the source compares by Euclid, the collection by Dot" in " ".join(
        cause.reason for cause in column(report).causes
    )


def test_wrong_vectors_are_named(docs: Settings, database18: Database) -> None:
    baseline = capture(docs, CaptureOptions())
    database18.execute(
        "CREATE TABLE kept AS TABLE docs; UPDATE docs SET embedding ="
        " (SELECT embedding FROM kept WHERE kept.id = 201 - docs.id)"
    )
    fill(docs)
    report = verified(docs, baseline)
    assert report.verdict is Verdict.FAIL
    assert causes(report) == ["vectors"]


def test_vectors_normalised_on_the_way_are_noticed(docs: Settings, database18: Database) -> None:
    baseline = capture(docs, CaptureOptions())
    database18.execute("UPDATE docs SET embedding = l2_normalize(embedding)")
    fill(docs)
    report = verified(docs, baseline)
    assert report.verdict is not Verdict.PASS
    assert any("another length in Qdrant" in caveat for caveat in column(report).caveats)
    assert criterion(report, "score range") is Verdict.INVESTIGATE


def test_a_payload_that_is_not_the_rows_is_named(
    docs: Settings, database18: Database, tmp_path: Path
) -> None:
    file = tmp_path / "queries.json"
    vectors = [[0.1 * i, 0.2, -0.3, 0.4, 0.5, 1.0] for i in range(20)]
    plain = [{"vector": vector} for vector in vectors]
    filtered = [{"vector": vector, "filter": "n = 3"} for vector in vectors]
    file.write_text(json.dumps([*plain, *filtered]))
    options = CaptureOptions(given=tuple(read_queries(file)), sampled=0)
    baseline = capture(docs, options)
    database18.execute("UPDATE docs SET n = NULL")
    fill(docs)
    report = verified(docs, baseline)
    assert causes(report) == ["payload"]
    assert criterion(report, "empty results") is Verdict.INVESTIGATE


HNSW = {"m": 2, "ef_construct": 4, "full_scan_threshold": 10}


def test_an_index_that_finds_too_little_is_named(database18: Database, tmp_path: Path) -> None:
    database18.execute(
        "CREATE TABLE docs (id int PRIMARY KEY, embedding vector(16)); SELECT setseed(0.5);"
        "INSERT INTO docs SELECT i, (SELECT array_agg(random() - 0.5)::vector"
        "  FROM generate_series(1, 16) WHERE i > 0) FROM generate_series(1, 800) i"
    )
    config = {
        "optimizers_config": {"indexing_threshold": 1},
        "quantization_config": {"scalar": {"type": "int8"}},
        "vectors": {"embedding": {"hnsw_config": HNSW}},
    }
    table = {"name": "docs", "collection_config": config}
    settings = scene_settings(database18, str(tmp_path / "edge"), table)
    baseline = capture(settings, CaptureOptions())
    fill(settings)
    before = verified(settings, baseline)
    assert any("HNSW is not complete (0 of up to 800" in one for one in column(before).caveats)
    optimize(settings)
    report = verified(settings, baseline)
    assert causes(report) == ["index"]
    assert report.verdict is Verdict.FAIL
    (cause,) = column(report).causes
    assert "m = 2, ef_construct = 4" in cause.reason
    caveats = " ".join(column(report).caveats)
    assert "quantized (scalar)" in caveats
    assert "HNSW is" not in caveats
    tiers = column(report).tiers
    assert tiers is not None
    assert tiers.exact_recall is not None
    assert tiers.exact_recall.mean == 1


def test_another_dimension_cannot_be_searched(docs: Settings, database18: Database) -> None:
    baseline = capture(docs, CaptureOptions(sampled=3))
    database18.execute(
        "ALTER TABLE docs ALTER COLUMN embedding TYPE vector(5)"
        " USING subvector(embedding, 1, 5)::vector(5)"
    )
    fill(docs)
    report = verified(docs, baseline)
    assert causes(report) == ["dimension"]
    assert report.verdict is Verdict.FAIL
    as_html(report)
    assert json.loads(json.dumps(as_json(report)))["columns"][0]["criteria"] == []


def test_without_a_collection_there_is_an_error(docs: Settings) -> None:
    baseline = capture(docs, CaptureOptions(sampled=1))
    with pytest.raises(SinkError) as raised:
        verified(docs, baseline)
    assert raised.value.kind is ErrorKind.COLLECTION_MISSING


def test_baselines_of_something_else_are_refused(docs: Settings, database18: Database) -> None:
    baseline = capture(docs, CaptureOptions(sampled=1))
    with pytest.raises(ConfigError, match="has no queries"):
        verified(docs, baseline.model_copy(update={"queries": []}))
    database18.execute("CREATE TABLE other (id bigint PRIMARY KEY, embedding vector(6))")
    with pytest.raises(ConfigError, match=r"queries of table public\.docs"):
        verified(retargeted(docs, name="other"), baseline)
    database18.execute("ALTER TABLE docs RENAME COLUMN embedding TO other")
    with pytest.raises(ConfigError, match="queries of column embedding"):
        verified(retargeted(docs, metrics={}), baseline)
    database18.execute("ALTER TABLE docs RENAME COLUMN other TO embedding")
    database18.execute("ALTER TABLE docs RENAME COLUMN id TO ident")
    database18.execute("ALTER TABLE docs ALTER COLUMN ident TYPE uuid USING gen_random_uuid()")
    fill(docs)
    with pytest.raises(ConfigError, match="keys in the baseline"):
        verified(docs, baseline)


@pytest.mark.parametrize("rows", [1, 3])
def test_tables_with_hardly_any_rows(docs: Settings, database18: Database, rows: int) -> None:
    database18.execute(
        f"DELETE FROM docs WHERE id > {rows}; UPDATE docs SET embedding = NULL"
        " WHERE id = 1; INSERT INTO docs VALUES (0, 'x', 1, '[1,2,3,4,5,6]')"
    )
    baseline = capture(docs, CaptureOptions())
    assert len(baseline.queries) == rows
    fill(docs)
    report = verified(docs, baseline)
    assert report.verdict is Verdict.PASS
    tiers = column(report).tiers
    assert tiers is not None
    assert (tiers.recall is None) is (rows == 1)
    as_html(report)
    as_text(report)


def test_ids_of_the_migration_tool_and_keys_of_several_columns(
    database18: Database, target: QdrantTarget | str
) -> None:
    database18.execute(
        "CREATE TABLE docs (org text, at timestamptz, embedding vector(2), PRIMARY KEY (org, at));"
        "INSERT INTO docs SELECT 'o' || i % 3, timestamptz '2024-01-01' + i * interval '1 day',"
        " ARRAY[i, i % 7]::vector FROM generate_series(1, 60) i;"
        "CREATE TABLE old (id int PRIMARY KEY, embedding vector(2));"
        "INSERT INTO old SELECT i, ARRAY[i, i % 7]::vector FROM generate_series(1, 60) i"
    )
    settings = scene_settings(
        database18,
        target,
        {"name": "docs", "namespace": "a"},
        {"name": "old", "ids": "qdrant-migration", "unnamed_vector": "embedding"},
    )
    baseline = capture(settings, CaptureOptions(sampled=50))
    fill(settings)
    report = verified(settings, baseline)
    assert [one.verdict for one in report.columns] == [Verdict.PASS, Verdict.PASS]
    assert all(len(one.queries) == 50 for one in report.columns)


# The command


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.references += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_command(docs: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = docs.source.url.get_secret_value()
    config, file, page = tmp_path / "c.toml", tmp_path / "b.json", tmp_path / "r.html"
    config.write_text(
        f'[source]\nurl = "{url}"\nslot = "none"\npublication = "none"\n'
        f'[qdrant]\nurl = "{docs.qdrant.url}"\n[[tables]]\nname = "docs"\n'
        f'collection = "{docs.tables[0].collection}"\nmetrics = {{ embedding = "euclid" }}\n'
    )
    write_baseline(capture(docs, CaptureOptions()), file, overwrite=False)
    fill(docs)
    command = ["verify", "search", "--config", str(config), "--baseline", str(file)]
    assert main([*command, "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("verdict: pass")
    assert max(map(len, shown.splitlines())) <= 80
    read = Page(page.read_text())
    assert not read.open
    assert not read.references
    assert "script" not in read.tags
    assert read.tags.count("svg") == 2
    assert "Search quality: ✓ pass" in read.text
    password = url.partition("//")[2].split("@")[0].split(":")[1]
    assert password not in page.read_text() + shown

    change(docs, delete=list(range(1, 60)))
    assert main([*command, "--json"]) == 3
    content = json.loads(capsys.readouterr().out)
    assert content["verdict"] in ("investigate", "fail")
    assert content["columns"][0]["causes"][0]["name"] == "data"
    assert len(content["columns"][0]["queries"]) == 50
    assert main([*command, "--fail-on", "never"]) == 0
    capsys.readouterr()
    assert main([*command, "--html", str(tmp_path / "absent" / "r.html")]) == 78
    assert main([*command[:-1], str(tmp_path / "absent.json")]) == 78
    assert "cannot be read" in capsys.readouterr().err


def test_names_are_escaped_in_the_page(database18: Database, tmp_path: Path) -> None:
    database18.execute(
        'CREATE TABLE "<b>&docs" (id int PRIMARY KEY, "<i>" vector(2));'
        'INSERT INTO "<b>&docs" SELECT i, ARRAY[i, 1]::vector FROM generate_series(1, 20) i'
    )
    settings = scene_settings(database18, str(tmp_path / "edge"), {"name": '"<b>&docs"'})
    baseline = capture(settings, CaptureOptions())
    fill(settings)
    page = Page(as_html(verified(settings, baseline)))
    assert not page.open
    assert "public.<b>&docs.<i>" in page.text
