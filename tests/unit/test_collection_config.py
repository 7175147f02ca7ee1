"""Settings of ``collection_config``: what is passed to Qdrant, and what is refused and how."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from qdrant_client import grpc as q

from cdc_sync.config import QdrantSettings
from cdc_sync.errors import ConfigError
from cdc_sync.mapping.plan import TablePlan
from cdc_sync.qdrant.collection_config import check_config, create_request, vector_settings
from cdc_sync.qdrant.open import check_collection_config
from tests.support import sink_rows as rows
from tests.support.sink_rows import plan_of

EDGE = QdrantSettings(url="edge:/nowhere")


def configured(config: dict[str, Any], plan: TablePlan | None = None) -> TablePlan:
    """A plan with vectors of every kind, or the one given, with these settings."""
    return dataclasses.replace(plan or plan_of("c", rows.EVERY_KIND), collection_config=config)


def unnamed() -> TablePlan:
    return plan_of("c", [rows.column("id", rows.INT8), rows.dense("v", 2, vector_name="")])


def refusal(config: dict[str, Any], plan: TablePlan | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_config(configured(config, plan))
    assert caught.value.message.startswith("public.items: `collection_config")
    assert caught.value.remedy
    return caught.value


def test_nothing_configured_asks_for_nothing() -> None:
    request = create_request(plan_of("c", rows.EVERY_KIND))
    assert {field.name for field, _ in request.ListFields()} == {
        "collection_name",
        "vectors_config",
        "sparse_vectors_config",
    }
    assert not request.vectors_config.params_map.map["dot"].HasField("hnsw_config")


def test_every_setting_reaches_the_request() -> None:
    config = {
        "shard_number": 3,
        "sharding_method": "auto",
        "replication_factor": 2,
        "write_consistency_factor": 2,
        "on_disk_payload": True,
        "hnsw_config": {"m": 24, "ef_construct": 128, "on_disk": True, "payload_m": 8},
        "wal_config": {"wal_capacity_mb": 64},
        "optimizers_config": {"indexing_threshold": 50_000, "max_optimization_threads": 2},
        "quantization_config": {"scalar": {"type": "int8", "quantile": 0.99, "always_ram": True}},
        "strict_mode_config": {"enabled": True, "max_query_limit": 100},
        "metadata": {"owner": "search", "nested": {"n": -1}},
        "vectors": {
            "dot": {
                "on_disk": True,
                "hnsw_config": {"ef_construct": 300},
                "quantization_config": {"product": {"compression": "x16"}},
            },
            "cosine": {"quantization_config": {"binary": {"always_ram": False}}},
        },
        "sparse_vectors": {
            "sparse": {"index": {"on_disk": True, "full_scan_threshold": 7}, "modifier": "idf"}
        },
    }
    request = create_request(configured(config))
    assert request.shard_number == 3
    assert request.sharding_method == q.ShardingMethod.Auto
    assert (request.replication_factor, request.write_consistency_factor) == (2, 2)
    assert request.on_disk_payload is True
    assert (request.hnsw_config.m, request.hnsw_config.payload_m) == (24, 8)
    assert request.wal_config.wal_capacity_mb == 64
    assert request.optimizers_config.indexing_threshold == 50_000
    assert request.optimizers_config.max_optimization_threads.value == 2
    assert request.quantization_config.scalar.type == q.QuantizationType.Int8
    assert request.strict_mode_config.max_query_limit == 100
    assert request.metadata["nested"].struct_value.fields["n"].integer_value == -1
    dot = request.vectors_config.params_map.map["dot"]
    assert (dot.on_disk, dot.hnsw_config.ef_construct) == (True, 300)
    assert dot.quantization_config.product.compression == q.CompressionRatio.x16
    cosine = request.vectors_config.params_map.map["cosine"]
    assert cosine.quantization_config.WhichOneof("quantization") == "binary"
    assert cosine.hnsw_config.m == 32, "the index's m stays beside other settings"
    sparse = request.sparse_vectors_config.map["sparse"]
    assert (sparse.index.on_disk, sparse.modifier) == (True, q.Modifier.Idf)


def test_the_configuration_wins_over_the_index() -> None:
    plan = configured({"vectors": {"cosine": {"hnsw_config": {"m": 7}}}})
    assert create_request(plan).vectors_config.params_map.map["cosine"].hnsw_config.m == 7
    vector = next(vector for vector in plan.vectors if vector.name == "cosine")
    assert vector_settings(plan, vector)["hnsw_config"] == {"m": 7}


def test_settings_of_the_unnamed_vector() -> None:
    for config in ({"vectors": {"on_disk": True}}, {"vectors": {"": {"on_disk": True}}}):
        assert create_request(configured(config, unnamed())).vectors_config.params.on_disk is True


def test_what_is_null_is_left_out() -> None:
    assert not create_request(configured({"hnsw_config": None})).HasField("hnsw_config")


@pytest.mark.parametrize(
    ("config", "path", "hint"),
    [
        ({"shards": 2}, "shards", "shard_number"),
        ({"vectors_config": {}}, "vectors_config", "vectors"),
        ({"hnsw_config": {"mm": 2}}, "hnsw_config.mm", "Did you mean m?"),
        ({"hnsw_config": {"ef_construction": 2}}, "hnsw_config.ef_construction", "ef_construct?"),
        (
            {"vectors": {"dot": {"hnsw_config": {"ondisk": True}}}},
            "vectors.dot.hnsw_config.ondisk",
            "on_disk",
        ),
        ({"vectors": {"dot": {"on_disc": True}}}, "vectors.dot.on_disc", "on_disk"),
        ({"quantization_config": {"scalr": {}}}, "quantization_config.scalr", "scalar"),
        (
            {"quantization_config": {"scalar": {"type": "int8", "always": True}}},
            "quantization_config.scalar.always",
            "always_ram",
        ),
        (
            {"sparse_vectors": {"sparse": {"index": {"ondisk": True}}}},
            "sparse_vectors.sparse.index.ondisk",
            "on_disk",
        ),
        (
            {"strict_mode_config": {"multivector_config": {"multi": {"max_vector": 1}}}},
            "strict_mode_config.multivector_config.multi.max_vector",
            "max_vectors",
        ),
        ({"vectors": {"dott": {}}}, "vectors.dott", "dot"),
        ({"vectors": {"sparse": {}}}, "vectors.sparse", "dense vectors are"),
        ({"sparse_vectors": {"dot": {}}}, "sparse_vectors.dot", "sparse vectors are: sparse"),
    ],
)
def test_unknown_names_are_named_with_a_hint(config: dict[str, Any], path: str, hint: str) -> None:
    error = refusal(config)
    assert f"`collection_config.{path}`" in error.message
    assert hint in error.remedy


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"shard_number": "2"}, "shard_number"),
        ({"shard_number": 2.5}, "shard_number"),
        ({"shard_number": True}, "shard_number"),
        ({"shard_number": -1}, "shard_number"),
        ({"shard_number": 1 << 32}, "shard_number"),
        ({"on_disk_payload": "yes"}, "on_disk_payload"),
        ({"hnsw_config": 3}, "hnsw_config"),
        ({"hnsw_config": {"m": "16"}}, "hnsw_config.m"),
        ({"hnsw_config": {"m": -16}}, "hnsw_config.m"),
        ({"hnsw_config": {"m": 1 << 64}}, "hnsw_config.m"),
        (
            {"optimizers_config": {"deleted_threshold": float("nan")}},
            "optimizers_config.deleted_threshold",
        ),
        (
            {"optimizers_config": {"max_optimization_threads": "many"}},
            "optimizers_config.max_optimization_threads",
        ),
        ({"quantization_config": {}}, "quantization_config"),
        ({"quantization_config": {"scalar": {}}}, "quantization_config.scalar.type"),
        ({"quantization_config": {"scalar": {"type": "int4"}}}, "quantization_config.scalar.type"),
        (
            {"quantization_config": {"scalar": {"type": "int8"}, "binary": {}}},
            "quantization_config",
        ),
        ({"vectors": []}, "vectors"),
        ({"vectors": {"dot": 3}}, "vectors.dot"),
        ({"vectors": {"dot": {"on_disk": "no"}}}, "vectors.dot.on_disk"),
        ({"vectors": {"dot": {"datatype": "float64"}}}, "vectors.dot.datatype"),
        ({"vectors": {"dot": {"hnsw_config": []}}}, "vectors.dot.hnsw_config"),
        ({"metadata": {"a": float("inf")}}, "metadata"),
        ({"metadata": 3}, "metadata"),
    ],
)
def test_wrong_types_are_named(config: dict[str, Any], path: str) -> None:
    assert f"`collection_config.{path}` " in refusal(config).message


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"size": 3}, "size"),
        ({"distance": "Cosine"}, "distance"),
        ({"multivector_config": {"comparator": "max_sim"}}, "multivector_config"),
    ],
)
def test_what_contradicts_the_table_is_an_error(settings: dict[str, Any], name: str) -> None:
    error = refusal({"vectors": {"dot": settings}})
    assert f"`collection_config.vectors.dot.{name}` contradicts the table" in error.message
    assert (
        f"`collection_config.vectors.{name}`" in refusal({"vectors": settings}, unnamed()).message
    )


def test_what_says_the_same_as_the_table_is_taken() -> None:
    plan = plan_of("c", rows.EVERY_KIND)
    dot = next(vector for vector in plan.vectors if vector.name == "dot")
    same = {"size": dot.size, "distance": "Dot"}
    check_config(
        configured(
            {"vectors": {"dot": same, "multi": {"multivector_config": {"comparator": "max_sim"}}}}
        )
    )


@pytest.mark.parametrize(
    "config",
    [
        {"sharding_method": "custom"},
        {"optimizers_config": {"prevent_unoptimized": True}},
        {"metadata": {"cdc_sync": {}}},
    ],
)
def test_what_this_program_cannot_work_with_is_refused(config: dict[str, Any]) -> None:
    refusal(config)


def test_values_are_not_in_the_messages() -> None:
    for config in (
        {"shard_number": "s3cret"},
        {"quantization_config": {"scalar": {"type": "s3cret"}}},
    ):
        error = refusal(config)
        assert "s3cret" not in error.message + error.remedy


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"shard_number": 2}, "shard_number"),
        ({"replication_factor": 2}, "replication_factor"),
        ({"strict_mode_config": {"enabled": True}}, "strict_mode_config"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"optimizers_config": {"flush_interval_sec": 1}}, "optimizers_config.flush_interval_sec"),
        (
            {"optimizers_config": {"max_optimization_threads": 1}},
            "optimizers_config.max_optimization_threads",
        ),
    ],
)
def test_what_an_embedded_database_has_not_is_refused(config: dict[str, Any], path: str) -> None:
    plan = configured(config)
    check_collection_config(QdrantSettings(), plan)
    with pytest.raises(ConfigError) as caught:
        check_collection_config(EDGE, plan)
    assert f"collection_config.{path}" in caught.value.message
    assert "embedded" in caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"binary": {"encoding": "one_and_half_bits"}}},
        {"quantization_config": {"binary": {"query_encoding": "scalar8bits"}}},
        {"quantization_config": {"turbo": {"bits": "bits1_5"}}},
        {"vectors": {"dot": {"quantization_config": {"product": {"compression": "x32"}}}}},
        {"vectors": {"dot": {"memory": "cold"}}, "payload": {"memory": "cached"}},
    ],
)
def test_what_an_embedded_database_has_too(config: dict[str, Any]) -> None:
    check_collection_config(EDGE, configured(config))


def test_what_is_wrong_on_a_server_is_wrong_embedded() -> None:
    with pytest.raises(ConfigError, match="shards"):
        check_collection_config(EDGE, configured({"shards": 2}))
