"""The Kubernetes manifests: valid against Kubernetes' own schemas, and what docs/deployment.md
says of them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cdc_sync.config import HttpSettings, PipelineSettings
from cdc_sync.loading import load_settings
from tests.operate.dashboard import ROOT

FOLDER = ROOT / "docker" / "kubernetes"
#: The oldest and the newest release that they are checked against.
RELEASES = ("1.28", "1.37")

Manifest = dict[str, Any]


def manifests() -> dict[str, Manifest]:
    """Everything that is sent to a cluster, by its path."""
    return {
        str(path.relative_to(FOLDER)): yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in sorted(FOLDER.rglob("*.yaml"))
    }


MANIFESTS = manifests()
WORKLOADS = {"standalone/deployment.yaml": "Deployment", "sidecar/statefulset.yaml": "StatefulSet"}


def pod(name: str) -> Manifest:
    spec: Manifest = MANIFESTS[name]["spec"]["template"]["spec"]
    return spec


def containers(name: str) -> dict[str, Manifest]:
    return {container["name"]: container for container in pod(name)["containers"]}


@pytest.mark.campaign
@pytest.mark.parametrize("release", RELEASES)
def test_kubernetes_takes_them(release: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="the group deployment")
    checked = 0
    for name, manifest in MANIFESTS.items():
        if "kustomize" in manifest["apiVersion"] or "monitoring" in manifest["apiVersion"]:
            continue
        validator.validate(manifest, release, strict=True)
        checked += 1
        assert name
    assert checked >= 7
    broken = {**MANIFESTS["standalone/deployment.yaml"], "spec": {"replicas": "many"}}
    with pytest.raises(validator.ValidationError):
        validator.validate(broken, release, strict=True)


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["PodMonitor", "PrometheusRule"])
def test_the_prometheus_operator_takes_its_own(kind: str) -> None:
    models = pytest.importorskip(
        "cloudcoil.models.prometheus_operator.v1", reason="the group deployment"
    )
    manifest = MANIFESTS[f"monitoring/{kind.lower()}.yaml"]
    model = getattr(models, kind).model_validate(manifest)
    # Nothing that it does not know was dropped.
    assert model.model_dump(mode="json", by_alias=True, exclude_unset=True) == manifest


def test_kustomizations_name_files_that_are_there_and_leave_none_out() -> None:
    for folder in ("standalone", "sidecar", "monitoring"):
        kustomization = MANIFESTS[f"{folder}/kustomization.yaml"]
        listed = set(kustomization["resources"])
        for generator in kustomization.get("configMapGenerator", []):
            for file in generator["files"]:
                assert (FOLDER / folder / file).exists()
        present = {path.name for path in (FOLDER / folder).glob("*.yaml")}
        assert listed == present - {"kustomization.yaml"}


@pytest.mark.parametrize("name", WORKLOADS)
def test_there_is_one_consumer(name: str) -> None:
    manifest = MANIFESTS[name]
    assert manifest["kind"] == WORKLOADS[name]
    assert manifest["spec"]["replicas"] == 1
    if manifest["kind"] == "Deployment":
        assert manifest["spec"]["strategy"] == {"type": "Recreate"}


@pytest.mark.parametrize("name", WORKLOADS)
def test_pods_are_restricted(name: str) -> None:
    """What the pod security standard `restricted` asks for, and a read-only root besides."""
    spec = pod(name)
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    # Its variables would begin with our prefix.
    assert spec["enableServiceLinks"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    for container in containers(name).values():
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
        assert (
            container["resources"]["requests"]["memory"]
            == container["resources"]["limits"]["memory"]
        )


@pytest.mark.parametrize("name", WORKLOADS)
def test_probes_ask_what_they_should(name: str) -> None:
    container = containers(name)["cdc-sync"]
    (port,) = container["ports"]
    assert port == {"name": "metrics", "containerPort": HttpSettings().port}
    for probe in ("livenessProbe", "startupProbe"):
        assert container[probe]["httpGet"] == {"path": "/livez", "port": "metrics"}
    startup = container["startupProbe"]
    patience = startup["periodSeconds"] * startup["failureThreshold"]
    assert patience >= 2 * PipelineSettings().startup_timeout_seconds
    if "readinessProbe" in container:
        assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    grace = pod(name)["terminationGracePeriodSeconds"]
    assert grace >= PipelineSettings().shutdown_timeout_seconds + 10


@pytest.mark.parametrize("name", WORKLOADS)
def test_configuration_and_secrets_are_mounted_where_they_are_looked_for(
    name: str, tmp_path: Path
) -> None:
    container = containers(name)["cdc-sync"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert container["args"] == ["run", "--config", f"{mounts['config']}/cdc-sync.toml"]
    volumes = {volume["name"]: volume for volume in pod(name)["volumes"]}
    assert mounts.keys() <= volumes.keys()
    keys = MANIFESTS["secret.example.yaml"]["stringData"]
    assert volumes["secrets"]["secret"]["secretName"] == "cdc-sync"
    environ = {}
    for variable in container["env"]:
        folder, _, key = variable["value"].rpartition("/")
        assert folder == mounts["secrets"]
        (tmp_path / key).write_text(keys[key], encoding="utf-8")
        environ[variable["name"]] = str(tmp_path / key)
    file = (FOLDER / name).parent / "cdc-sync.toml"
    assert volumes["config"]["configMap"]["name"] == "cdc-sync"
    loaded = load_settings(file, {}, environ).settings
    assert loaded.source.password is not None
    assert loaded.qdrant.api_key is not None
    assert loaded.tables
    # The default would count the cores of the node.
    assert 1 <= loaded.migration.num_workers <= 4
    assert "password" not in tomllib.loads(file.read_text(encoding="utf-8"))["source"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_what_is_scraped_is_called_as_rules_and_dashboard_expect(name: str) -> None:
    monitor = MANIFESTS["monitoring/podmonitor.yaml"]["spec"]
    template = MANIFESTS[name]["spec"]["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= template.items()
    assert MANIFESTS[name]["spec"]["selector"]["matchLabels"].items() <= template.items()
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("metrics", "/metrics")
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "cdc-sync"}]
