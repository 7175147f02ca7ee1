"""The oracle's reading of Qdrant: points as they are stored, over gRPC or from Edge shards on disk.

Values keep the types Qdrant gives them (``integer_value`` is int, ``double_value`` float), vectors
are float32 arrays. Nothing of the product is used.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeAlias, cast
from urllib.parse import quote

import numpy as np
import qdrant_edge as edge
from numpy.typing import NDArray
from qdrant_client import QdrantClient
from qdrant_client import grpc as q

from tests.support.oracle_types import Json, OracleError

PointId: TypeAlias = int | str
Array: TypeAlias = NDArray[np.float32]
#: Dense (n), multivector (rows, n), or sparse: ascending indices and their values.
Vector: TypeAlias = "Array | tuple[NDArray[np.int64], Array]"

#: Requests that carry it meet no scripted faults in the test server; a real server ignores it.
_OBSERVER: Final = {"x-test-observer": "1"}
_SCROLL_PAGE: Final = 2000


@dataclass(frozen=True)
class VectorConfig:
    """How the collection stores a vector: ``metric`` and ``datatype`` by Qdrant's names."""

    metric: str
    datatype: str
    kind: str  #: dense, multi or sparse


@dataclass(frozen=True)
class StoredPoint:
    """A point; the unnamed vector has the name ""."""

    payload: dict[str, Json]
    vectors: dict[str, Vector]


class Points(Protocol):
    """The points of one collection."""

    @property
    def configs(self) -> Mapping[str, VectorConfig]: ...

    def get(self, ids: Sequence[PointId]) -> dict[PointId, StoredPoint]:
        """Those of the points that exist."""
        ...

    def scroll(self, field: str) -> Iterator[tuple[PointId, Json]]:
        """Every id, with the value of one payload field (None if it has none)."""
        ...

    def close(self) -> None: ...


def open_points(url: str, collection: str, api_key: str | None = None) -> Points:
    """Open a collection of ``http(s)://host:port`` (gRPC) or ``edge:/path``."""
    if url.startswith("edge:"):
        return _EdgePoints(Path(url.removeprefix("edge:")), collection)
    return _ServerPoints(url, collection, api_key)


class _ServerPoints:
    def __init__(self, url: str, collection: str, api_key: str | None) -> None:
        scheme, _, address = url.rpartition("://")
        host, _, port = address.rpartition(":")
        headers = _OBSERVER | ({"api-key": api_key} if api_key else {})
        self._client = QdrantClient(
            host=host,
            grpc_port=int(port),
            https=scheme == "https",
            prefer_grpc=True,
            check_compatibility=False,
            timeout=60,
            headers=headers,
        )
        self._collection = collection
        self.configs = self._read_configs()

    def _read_configs(self) -> Mapping[str, VectorConfig]:
        request = q.GetCollectionInfoRequest(collection_name=self._collection)
        params = self._client.grpc_collections.Get(request).result.config.params
        configs = {
            name: VectorConfig("Dot", "float32", "sparse")
            for name in params.sparse_vectors_config.map
        }
        vectors = params.vectors_config
        dense = {"": vectors.params} if vectors.HasField("params") else vectors.params_map.map
        for name, one in dense.items():
            datatype = q.Datatype.Name(one.datatype).lower() if one.HasField("datatype") else ""
            configs[name] = VectorConfig(
                q.Distance.Name(one.distance),
                "float32" if datatype in ("", "default") else datatype,
                "multi" if one.HasField("multivector_config") else "dense",
            )
        return configs

    def get(self, ids: Sequence[PointId]) -> dict[PointId, StoredPoint]:
        request = q.GetPoints(
            collection_name=self._collection,
            ids=[q.PointId(num=i) if isinstance(i, int) else q.PointId(uuid=i) for i in ids],
            with_payload=q.WithPayloadSelector(enable=True),
            with_vectors=q.WithVectorsSelector(enable=True),
        )
        found: dict[PointId, StoredPoint] = {}
        for point in self._client.grpc_points.Get(request).result:
            payload = {key: _json_value(value) for key, value in point.payload.items()}
            found[_point_id(point.id)] = StoredPoint(payload, _server_vectors(point.vectors))
        return found

    def scroll(self, field: str) -> Iterator[tuple[PointId, Json]]:
        selector = q.PayloadIncludeSelector(fields=[field])
        offset: q.PointId | None = None
        while True:
            request = q.ScrollPoints(
                collection_name=self._collection,
                limit=_SCROLL_PAGE,
                offset=offset,
                with_payload=q.WithPayloadSelector(include=selector),
                with_vectors=q.WithVectorsSelector(enable=False),
            )
            response = self._client.grpc_points.Scroll(request)
            for point in response.result:
                value = _json_value(point.payload[field]) if field in point.payload else None
                yield _point_id(point.id), value
            if not response.HasField("next_page_offset"):
                return
            offset = response.next_page_offset

    def close(self) -> None:
        self._client.close()


def _point_id(message: q.PointId) -> PointId:
    if message.WhichOneof("point_id_options") == "num":
        return int(message.num)
    return str(message.uuid)


def _json_value(message: q.Value) -> Json:
    kind = message.WhichOneof("kind")
    if kind == "null_value":
        return None
    if kind == "list_value":
        return [_json_value(one) for one in message.list_value.values]
    if kind == "struct_value":
        return {key: _json_value(one) for key, one in message.struct_value.fields.items()}
    if kind is None:
        raise OracleError("a payload value without kind")
    return cast("Json", getattr(message, kind))


def _server_vectors(message: q.VectorsOutput) -> dict[str, Vector]:
    kind = message.WhichOneof("vectors_options")
    if kind is None:
        return {}
    if kind == "vector":
        return {"": _server_vector(message.vector)}
    return {name: _server_vector(one) for name, one in message.vectors.vectors.items()}


def _server_vector(message: q.VectorOutput) -> Vector:
    kind = message.WhichOneof("vector")
    if kind == "dense":
        return np.array(message.dense.data, dtype=np.float32)
    if kind == "sparse":
        return _sparse(message.sparse.indices, message.sparse.values)
    if kind == "multi_dense":
        return np.array([list(row.data) for row in message.multi_dense.vectors], np.float32)
    # Servers before 1.16 fill these fields instead.
    if message.HasField("indices"):
        return _sparse(message.indices.data, message.data)
    data = np.array(message.data, dtype=np.float32)
    return data.reshape(message.vectors_count, -1) if message.HasField("vectors_count") else data


def _sparse(indices: Sequence[int], values: Sequence[float]) -> Vector:
    positions = np.array(indices, dtype=np.int64)
    order = np.argsort(positions, kind="stable")
    return positions[order], np.array(values, dtype=np.float32)[order]


class _EdgePoints:
    """A copy of a shard, so that looking at it changes nothing (opening one replays its log)."""

    def __init__(self, path: Path, collection: str) -> None:
        # Layout: docstring of cdc_sync/qdrant/edge_database.py.
        directory = path / "collections" / quote(collection, safe="").replace(".", "%2E")
        if not directory.is_dir():
            raise OracleError(f"no collection {collection} under {path}")
        self._copy = tempfile.TemporaryDirectory(prefix="oracle-")
        copy = Path(self._copy.name) / "shard"
        shutil.copytree(directory, copy)
        config = json.loads((copy / "edge_config.json").read_bytes())
        self.configs: Mapping[str, VectorConfig] = {
            name: VectorConfig(
                one["distance"],
                one.get("datatype") or "float32",
                "multi" if one.get("multivector_config") else "dense",
            )
            for name, one in (config.get("vectors") or {}).items()
        } | {
            name: VectorConfig("Dot", "float32", "sparse")
            for name in config.get("sparse_vectors") or {}
        }
        self._shard = edge.EdgeShard.load(str(copy))

    def get(self, ids: Sequence[PointId]) -> dict[PointId, StoredPoint]:
        found: dict[PointId, StoredPoint] = {}
        for record in self._shard.retrieve(list(ids), True, True):
            vector = record.vector
            vectors = vector if isinstance(vector, dict) else {} if vector is None else {"": vector}
            found[_edge_id(record.id)] = StoredPoint(
                dict(record.payload or {}),
                {name: _edge_vector(one) for name, one in vectors.items()},
            )
        return found

    def scroll(self, field: str) -> Iterator[tuple[PointId, Json]]:
        offset: edge.PointId | None = None
        while True:
            request = edge.ScrollRequest(offset=offset, limit=_SCROLL_PAGE, with_payload=[field])
            records, offset = self._shard.scroll(request)
            for record in records:
                yield _edge_id(record.id), (record.payload or {}).get(field)
            if offset is None:
                return

    def close(self) -> None:
        self._shard.close()
        self._copy.cleanup()


def _edge_id(value: edge.PointId) -> PointId:
    return value if isinstance(value, int) else str(value)


def _edge_vector(value: edge.NamedVector | float) -> Vector:
    if isinstance(value, edge.SparseVector):
        return _sparse(value.indices, value.values)
    return np.array(value, dtype=np.float32)
