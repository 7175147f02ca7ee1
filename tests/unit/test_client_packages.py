"""qdrant_client is imported in parts, and is whole for whoever asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "cdc_sync.sync.daemon",
        "cdc_sync.sync.copy_process",
        "cdc_sync.qdrant.file_state",
        "tests.bench.pipeline_process",
    ],
)
def test_our_modules_run_neither_clients_nor_engine(module: str) -> None:
    """Nor does the bench, whose figures of memory would be too large."""
    loaded = run(
        f"import sys, {module}\n"
        "print([m for m in ('httpx', 'qdrant_client.qdrant_client', 'qdrant_client.local',"
        " 'qdrant_edge') if m in sys.modules])"
    )
    assert loaded == "[]\n"


def test_the_package_is_whole_afterwards() -> None:
    shown = run(
        "import cdc_sync.qdrant.server\n"
        "from cdc_sync.qdrant.rpc import q\n"
        "import qdrant_client\n"
        "from qdrant_client import QdrantClient, models\n"
        "from qdrant_client.http import AsyncApis\n"
        "client = QdrantClient(':memory:')\n"
        "client.create_collection('a', vectors_config=models.VectorParams(size=2,"
        " distance=models.Distance.DOT))\n"
        "client.upsert('a', [models.PointStruct(id=1, vector=[1.0, 2.0], payload={'a': None})])\n"
        "print(client.count('a').count, qdrant_client.grpc is q, type(qdrant_client).__name__)"
    )
    assert shown == "1 True module\n"


def test_a_client_imported_before_is_left_alone() -> None:
    shown = run(
        "import qdrant_client\n"
        "before = vars(qdrant_client).copy()\n"
        "import cdc_sync.qdrant.server\n"
        "print(type(qdrant_client).__name__, vars(qdrant_client).keys() - before.keys())"
    )
    assert shown == "module set()\n"


def test_what_is_not_there_is_an_error_as_ever() -> None:
    shown = run(
        "import cdc_sync.qdrant.server\n"
        "try:\n"
        "    from qdrant_client import no_such_name\n"
        "except ImportError as error:\n"
        "    print(error.name, hasattr(__import__('qdrant_client'), 'nothing'))"
    )
    assert shown == "qdrant_client False\n"
