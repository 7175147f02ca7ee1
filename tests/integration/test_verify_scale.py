"""A full verification is bounded in memory, and at least half as fast as the copy, however many
rows there are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import write_config
from tests.support.fix_postgres import Database
from tests.support.qdrant_control import QdrantTarget

#: Runs a command and says how much memory its process had at the most, in kB.
_MEASURED = """
import sys
from cdc_sync.cli import main
code = main(sys.argv[1:])
# Not of getrusage, which counts what the parent had when it forked.
status = open("/proc/self/status").read()
print("peak", status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
sys.exit(code)
"""


def measured(*arguments: str, timeout: float) -> tuple[dict[str, Any], int]:
    """What a command prints as JSON, and its peak of memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout), int(done.stderr.rpartition("peak ")[2]) * 1024


def copy_and_verify(
    database: Database,
    qdrant: QdrantTarget,
    directory: Path,
    rows: int,
    timeout: float,
    workers: int = 0,
) -> tuple[float, float, int]:
    """Seconds of the copy and of the verification, and the peak of memory of the latter."""
    database.execute(
        "CREATE TABLE big"
        " (id bigint PRIMARY KEY, title text, n int, price float8, emb vector(128));"
        "CREATE TEMP TABLE vectors AS SELECT i AS number, ARRAY("
        "  SELECT random()::float4 FROM generate_series(1, 128 + 0 * i))::vector AS emb"
        "  FROM generate_series(0, 499) i;"
        "INSERT INTO big SELECT i, 'title ' || i, i, i / 7.0, emb"
        f"  FROM generate_series(1, {rows}) n (i) JOIN vectors ON number = i % 500"
    )
    config = write_config(
        directory / "verify.toml",
        [{"name": "big", "collection": qdrant.new_collection_name()}],
        source={"url": database.url, "slot": "scale", "publication": "scale"},
        qdrant={"url": qdrant.url, **({"api_key": qdrant.api_key} if qdrant.api_key else {})},
        pipeline={"name": "scale"},
        migration={"num_workers": workers},
        http={"enabled": False},
        log={"format": "json"},
    )
    copied, _ = measured("migrate", "--config", str(config), "--json", timeout=timeout)
    report, peak = measured("verify", "--config", str(config), "--json", timeout=timeout)
    assert report["equal"]
    (table,) = report["tables"]
    assert table["rows_compared"] == table["points_looked_up"] == rows
    return float(copied["total"]["seconds"]), float(report["seconds"]), peak


def test_memory_of_a_full_verification(
    database18: Database, qdrant: QdrantTarget, tmp_path: Path
) -> None:
    _, _, peak = copy_and_verify(database18, qdrant, tmp_path, 2_000, 120, workers=1)
    assert peak < 300 << 20


@pytest.mark.campaign
@pytest.mark.timeout(7200)
def test_a_million_rows(
    database18: Database,
    qdrant: QdrantTarget,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    rows = 1_000_000
    copy, verification, peak = copy_and_verify(database18, qdrant, tmp_path, rows, 3_500)
    facts = (
        f"copy {rows / copy:,.0f} rows/s, verification {rows / verification:,.0f} rows/s, "
        f"peak {peak / 1e6:,.0f} MB"
    )
    record_property("measured", facts)
    assert peak < 500e6, facts
    assert verification <= 2 * copy, facts
