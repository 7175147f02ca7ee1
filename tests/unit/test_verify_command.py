"""``cdc-sync verify`` before anything is reached, and what its reports look like."""

from __future__ import annotations

import json

import pytest

from cdc_sync.cli import main
from cdc_sync.cli.verify_text import report_text
from cdc_sync.errors import ExitCode
from cdc_sync.verify.kinds import MEANINGS, Deviation, Kind
from cdc_sync.verify.report import LeafReport, Report, TableReport
from tests.support.command_line import ONE_TABLE, output

pytestmark = pytest.mark.usefixtures("clean_environment")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sample", "5", "--where", "n > 1"), "exclude each other"),
        (("--where", "  "), "--where is empty"),
        (("--sample", "0"), "--sample"),
        (("--rate", "0"), "--rate"),
        (("--nonsense",), "--nonsense"),
    ],
)
@pytest.mark.parametrize("name", [(), ("data",)])
def test_wrong_usage(
    name: tuple[str, ...],
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["verify", *name, *ONE_TABLE, *arguments]) == ExitCode.USAGE
    assert message in output(capsys)[1]


def every_kind() -> Report:
    table = TableReport("public.docs", "docs", 2, rows=1_000, points=990, compared=1_000)
    for number, kind in enumerate(Kind):
        table.add(Deviation(kind, "field", "in this way"), number, ("a", str(number)))
    table.different = len(Kind)
    table.leaves = [LeafReport("public.docs_1", 600), LeafReport("public.docs_2", 400, 7)]
    table.pending = 3
    table.notes.append("something else")
    return Report("full", "a pipeline streams", [table], 2.0)


def test_every_kind_is_explained() -> None:
    assert MEANINGS.keys() == set(Kind)
    report = every_kind()
    text = report_text(report)
    for kind, meaning in MEANINGS.items():
        assert f"  {meaning.title} field: 1" in text, kind
        assert f"remedy: {meaning.remedy}"[:60] in text
    assert "- point 3 key (a, 3): in this way" in text
    assert "public.docs_2           400 rows, 7 without a point" in text
    assert "3 rows were changed since the pipeline stopped" in text
    assert text.endswith(f"different: {len(Kind)} points")
    assert all(len(line) <= 120 for line in text.splitlines())


def test_as_json_it_says_the_same() -> None:
    content = json.loads(json.dumps(every_kind().to_json()))
    assert (content["equal"], content["exit_code"]) == (False, ExitCode.DIFFERENCES)
    (table,) = content["tables"]
    assert [finding["kind"] for finding in table["findings"]] == [kind.value for kind in Kind]
    assert table["findings"][0]["examples"] == [{"id": 0, "key": ["a", "0"], "text": "in this way"}]
    assert content["rows_per_second"] == 500.0


@pytest.mark.parametrize(
    ("undecided", "different", "code", "last"),
    [
        (0, 0, ExitCode.OK, "equal"),
        (2, 0, ExitCode.TEMPORARY, "not decided"),
        (0, 1, ExitCode.DIFFERENCES, "different: 1 points"),
        (2, 1, ExitCode.DIFFERENCES, "different: 1 points"),
    ],
)
def test_outcomes(undecided: int, different: int, code: ExitCode, last: str) -> None:
    table = TableReport("t", "t", 1, undecided=undecided, different=different)
    if different:
        table.add(Deviation(Kind.MISSING), 1)
    report = Report("full", "", [table])
    assert report.exit_code == code
    assert report_text(report).splitlines()[-1] == last


def test_a_sample_states_its_confidence() -> None:
    table = TableReport("t", "t", 1, compared=1_000, ids=500, different=3, extra=1, sampled=True)
    text = report_text(Report("sample", "", [table]))
    assert "2 of 1,000 random rows differ: with 95 % confidence at most 0.63% of all do" in text
    assert "1 of 500 random points have no row" in text
    assert text.splitlines()[-1] == "equal (sample)"
