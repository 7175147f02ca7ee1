"""What the Qdrant test server keeps over kill -9 and restart, and who may talk to it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client import grpc as q

from tests.support.fix_qdrant import QdrantProcess
from tests.support.qdrant_cases import create_plain, dense, ids_of, payload_of, point, refused

WRITERS = 4
IDS_EACH = 20


def _write_until_killed(client: QdrantClient, name: str, writer: int, acked: list[int]) -> None:
    """Write rising numbers to the writer's own ids, one at a time, and note each acknowledged one.

    Every third write is not waited for. ``acked[i]``: the last number acknowledged for the i-th id.
    """
    number = 0
    while True:
        index = number % IDS_EACH
        number += 1
        written = [point(writer * IDS_EACH + index, {"n": number})]
        try:
            client.upsert(name, written, wait=bool(number % 3))
        except grpc.RpcError:
            return
        acked[index] = number


@pytest.mark.parametrize("lag", [0.0, 0.005])
def test_every_acknowledged_write_survives_kill_9(
    qdrant_private: QdrantProcess, lag: float
) -> None:
    name = create_plain(qdrant_private)
    qdrant_private.script.lag(lag)
    acked = [[0] * IDS_EACH for _ in range(WRITERS)]
    client = qdrant_private.new_client()
    threads = [
        threading.Thread(target=_write_until_killed, args=(client, name, writer, acked[writer]))
        for writer in range(WRITERS)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while min(min(numbers) for numbers in acked) < 2 * IDS_EACH and time.monotonic() < deadline:
        time.sleep(0.05)
    qdrant_private.kill()
    for thread in threads:
        thread.join()
    qdrant_private.restart()
    after = qdrant_private.client()
    assert min(min(numbers) for numbers in acked) > 0, "too slow to have written every id"
    for writer in range(WRITERS):
        for index, number in enumerate(acked[writer]):
            stored = payload_of(after, name, writer * IDS_EACH + index)
            assert stored is not None
            # The write after the last acknowledged one may have been applied too.
            assert stored["n"] in (number, number + IDS_EACH)


def test_acknowledged_but_unapplied_writes_are_applied_once_and_in_order_after_kill_9(
    qdrant_private: QdrantProcess,
) -> None:
    name = create_plain(qdrant_private)
    client = qdrant_private.client()
    client.upsert(name, [point(1, {"n": 0})])
    qdrant_private.script.lag(30)
    client.upsert(name, [point(1, {"n": 1}), point(2, {"n": 1})], wait=False)
    client.set_payload(name, {"bad": 1}, points=[99], wait=False)
    client.delete(name, points_selector=[2], wait=False)
    operations: list[models.UpdateOperation] = [
        models.SetPayloadOperation(set_payload=models.SetPayload(payload={"m": 2}, points=[1])),
        models.UpsertOperation(upsert=models.PointsList(points=[point(3)])),
    ]
    client.batch_update_points(name, operations, wait=False)
    assert payload_of(client, name, 1) == {"n": 0}
    qdrant_private.kill()
    qdrant_private.restart()
    after = qdrant_private.client()
    assert ids_of(after, name) == [1, 3]
    assert payload_of(after, name, 1) == {"n": 1, "m": 2}
    after.upsert(name, [point(1, {"n": 9})])
    qdrant_private.restart()
    assert payload_of(qdrant_private.client(), name, 1) == {"n": 9}


def test_power_loss_takes_unapplied_writes_only(qdrant_private: QdrantProcess) -> None:
    name = create_plain(qdrant_private)
    client = qdrant_private.client()
    client.upsert(name, [point(1)])
    qdrant_private.script.lag(30)
    client.upsert(name, [point(2)], wait=False)
    qdrant_private.lose_power()
    qdrant_private.restart()
    assert ids_of(qdrant_private.client(), name) == [1]


def test_waiting_write_is_cut_off_by_kill_9_without_an_answer(
    qdrant_private: QdrantProcess,
) -> None:
    name = create_plain(qdrant_private)
    client = qdrant_private.new_client()
    qdrant_private.script.hold("Upsert")
    codes: list[grpc.StatusCode] = []
    thread = threading.Thread(
        target=lambda: codes.append(refused(lambda: client.upsert(name, [point(1)]))[0])
    )
    thread.start()
    while not qdrant_private.script.held():
        time.sleep(0.01)
    qdrant_private.kill()
    thread.join(timeout=10)
    assert codes == [grpc.StatusCode.UNAVAILABLE]
    qdrant_private.restart()
    assert ids_of(qdrant_private.client(), name) == []


def test_collections_aliases_indexes_and_metadata_survive(qdrant_private: QdrantProcess) -> None:
    client = qdrant_private.client()
    client.create_collection("kept", vectors_config={"v": dense(2)}, metadata={"a": [1, None]})
    client.create_collection("gone", vectors_config=dense(2))
    client.create_collection("state", vectors_config={})
    client.create_payload_index("kept", "k", models.PayloadSchemaType.KEYWORD)
    client.create_payload_index("kept", "x", models.PayloadSchemaType.INTEGER)
    client.delete_payload_index("kept", "x")
    client.update_collection("kept", metadata={"b": 2})
    operation = models.CreateAlias(collection_name="kept", alias_name="alias")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=operation)])
    client.upsert("alias", [models.PointStruct(id=1, vector={"v": [1.0, 2.0]}, payload={"k": "z"})])
    client.upsert("state", [models.PointStruct(id=1, vector={}, payload={"s": 1})])
    client.delete_collection("gone")
    before = client.get_collection("kept").model_dump()
    qdrant_private.kill()
    qdrant_private.restart()
    after = qdrant_private.client()
    assert {c.name for c in after.get_collections().collections} == {"kept", "state"}
    info = after.get_collection("alias")
    assert info.config.metadata == {"a": [1, None], "b": 2}
    assert set(info.payload_schema) == {"k"}
    assert info.model_dump() == before
    [record] = after.retrieve("alias", [1], with_vectors=True)
    assert (record.payload, record.vector) == ({"k": "z"}, {"v": [1.0, 2.0]})
    assert payload_of(after, "state", 1) == {"s": 1}


def test_directory_without_metadata_is_removed_at_the_start(
    qdrant_private: QdrantProcess, tmp_path: Path
) -> None:
    create_plain(qdrant_private)
    qdrant_private.kill()
    root = tmp_path / "qdrant" / "collections"
    [directory] = [path for path in root.iterdir() if path.is_dir()]
    (directory / "collection").unlink()
    qdrant_private.restart()
    assert qdrant_private.client().get_collections().collections == []
    assert not directory.exists()


# Who may talk to it


def test_api_key_is_required_but_for_the_health_check(tmp_path: Path) -> None:
    target = QdrantProcess(tmp_path / "qdrant", api_key="right")
    try:
        name = create_plain(target)
        address = target.url.rpartition("/")[2]
        with grpc.insecure_channel(address) as channel:
            collections = q.CollectionsStub(channel)  # type: ignore[no-untyped-call]
            request = q.ListCollectionsRequest()
            for metadata, text in (
                ((), "Must provide an API key"),
                ((("api-key", "wrong"),), "Invalid API key"),
                ((("authorization", "Bearer wrong"),), "Invalid API key"),
            ):
                code, details = refused(
                    partial(collections.List, request, timeout=10, metadata=metadata)
                )
                assert code is grpc.StatusCode.UNAUTHENTICATED
                assert text in details
            right = (("authorization", "Bearer right"),)
            found = collections.List(request, timeout=10, metadata=right).collections
            assert [collection.name for collection in found] == [name]
            root = q.QdrantStub(channel)  # type: ignore[no-untyped-call]
            assert root.HealthCheck(q.HealthCheckRequest(), timeout=10).version == "1.18.0"
    finally:
        target.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-days", "2", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    target = QdrantProcess(tmp_path / "qdrant", api_key="right", tls=(certificate, key))
    try:
        address = target.url.removeprefix("https://")
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(address, credentials) as channel:
            root = q.QdrantStub(channel)  # type: ignore[no-untyped-call]
            assert root.HealthCheck(q.HealthCheckRequest(), timeout=10).version == "1.18.0"
        assert target.script.operations() == ["HealthCheck"]
    finally:
        target.close()


# Processes


def test_close_leaves_no_process(tmp_path: Path) -> None:
    target = QdrantProcess(tmp_path / "qdrant")
    pid = target.pid
    target.script.hold("Upsert")
    target.close()
    assert not psutil.pid_exists(pid)


def test_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import os, pathlib\n"
        "from tests.support.qdrant_control import QdrantProcess\n"
        f"target = QdrantProcess(pathlib.Path({str(tmp_path / 'qdrant')!r}))\n"
        "print(target.pid, flush=True)\n"
        "os._exit(1)\n"
    )
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        check=False,
    )
    pid = int(run.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.02)
