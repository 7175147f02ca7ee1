"""``make audit``: findings fail, and a database that is away is not taken for a clean answer."""

from __future__ import annotations

import io
import json

import pytest

from tests.audit import audit

CLEAN = {"name": "a", "version": "1", "vulns": []}
BAD = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found"}


def output(*packages: object) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


@pytest.mark.parametrize(
    ("pypi", "osv", "code", "says"),
    [
        (output(CLEAN, UNKNOWN), "", 0, "1 packages, 1 unknown to pypi, 0 vulnerabilities"),
        (output(CLEAN, BAD), "", 1, "b 2: CVE-1 (fixed in 3)"),
        ("", output(BAD), 1, "b 2: CVE-1"),
        (output(UNKNOWN), output(CLEAN), 0, "1 packages, 0 vulnerabilities"),
        ("", "", 0, "NOTHING HAS BEEN AUDITED"),
        (output(UNKNOWN), "Traceback", 0, "NOTHING HAS BEEN AUDITED"),
        (output(), "[]", 0, "NOTHING HAS BEEN AUDITED"),
    ],
)
def test_audit(pypi: str, osv: str, code: int, says: str) -> None:
    answers = {"pypi": pypi, "osv": osv}
    out = io.StringIO()
    assert audit(answers.__getitem__, out) == code
    assert says in out.getvalue()


def test_strict_fails_without_a_database() -> None:
    assert audit(lambda _: "", io.StringIO(), strict=True) == 2
