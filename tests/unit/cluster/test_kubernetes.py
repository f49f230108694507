"""cluster/kubernetes: field names of KubeRay, and the rules of cluster/README.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

KUBERNETES = Path(__file__).parents[3] / "cluster" / "kubernetes"
README = (KUBERNETES.parent / "README.md").read_text()

# The fields of ray.io/v1 in KubeRay 1.6, of its API reference; the operator drops others without a word.
FIELDS = {
    "RayJobSpec": {
        "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
        "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata",
        "rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode",
        "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
    },
    "RayClusterSpec": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
        "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy",
        "workerGroupSpecs",
    },
    "AuthOptions": {"mode", "secretName", "enableK8sTokenAuth"},
    "AutoscalerOptions": {
        "env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext",
        "upscalingMode", "version", "volumeMounts",
    },
    "HeadGroupSpec": {
        "enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template",
    },
    "WorkerGroupSpec": {
        "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
        "replicas", "resources", "scaleStrategy", "suspend", "template",
    },
    "PodSpec": {
        "affinity", "automountServiceAccountToken", "containers", "imagePullSecrets", "initContainers", "nodeSelector",
        "priorityClassName", "restartPolicy", "runtimeClassName", "securityContext", "serviceAccountName",
        "terminationGracePeriodSeconds", "tolerations", "topologySpreadConstraints", "volumes",
    },
    "Container": {
        "args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "livenessProbe", "name", "ports",
        "readinessProbe", "resources", "securityContext", "startupProbe", "volumeMounts", "workingDir",
    },
}  # fmt: skip

RAY_FILES = ["raycluster-cpu", "raycluster-gpu", "rayjob-cpu", "rayjob-gpu"]


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text())
    return loaded


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return spec if manifest["kind"] == "RayCluster" else spec["rayClusterSpec"]


def ray_pods(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (head or the group's name, pod template) of a cluster."""
    cluster = cluster_of(manifest)
    yield "head", cluster["headGroupSpec"]["template"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def all_pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from (template for _, template in ray_pods(manifest))
    if manifest["kind"] == "RayJob":
        yield manifest["spec"]["submitterPodTemplate"]


@pytest.fixture(params=RAY_FILES)
def manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    return load(str(request.param))


def test_every_file_is_covered() -> None:
    assert sorted(path.stem for path in KUBERNETES.glob("*.yaml")) == sorted([*RAY_FILES, "storage", "networkpolicy"])


@pytest.mark.parametrize("name", RAY_FILES)
def test_kinds(name: str) -> None:
    manifest = load(name)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["kind"] == {"raycluster": "RayCluster", "rayjob": "RayJob"}[name.partition("-")[0]]


def test_only_fields_that_kuberay_knows(manifest: dict[str, Any]) -> None:
    cluster = cluster_of(manifest)
    if manifest["kind"] == "RayJob":
        assert set(manifest["spec"]) <= FIELDS["RayJobSpec"]
    assert set(cluster) <= FIELDS["RayClusterSpec"]
    assert set(cluster["authOptions"]) <= FIELDS["AuthOptions"]
    assert set(cluster.get("autoscalerOptions", {})) <= FIELDS["AutoscalerOptions"]
    assert set(cluster["headGroupSpec"]) <= FIELDS["HeadGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= FIELDS["WorkerGroupSpec"]
    for pod in all_pods(manifest):
        assert set(pod) == {"metadata", "spec"}
        assert set(pod["spec"]) <= FIELDS["PodSpec"]
        for container in pod["spec"]["containers"]:
            assert set(container) <= FIELDS["Container"]


def test_authentication_is_on_and_no_token_is_here(manifest: dict[str, Any]) -> None:
    assert cluster_of(manifest)["authOptions"] == {"mode": "token", "secretName": "dngd-ray-token"}
    assert "RAY_AUTH_TOKEN" not in yaml.safe_dump(manifest)
    assert "create secret generic dngd-ray-token --from-file auth_token=" in README


def test_nothing_is_open_to_the_world(manifest: dict[str, Any]) -> None:
    head = cluster_of(manifest)["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert not head.get("enableIngress")
    assert not re.search(r"hostPort|hostNetwork|hostPath|NodePort|LoadBalancer", yaml.safe_dump(manifest))
    policy = load("networkpolicy")
    assert policy["apiVersion"] == "networking.k8s.io/v1"
    selected = policy["spec"]["podSelector"]["matchLabels"]
    for pod in all_pods(manifest):
        assert selected.items() <= pod["metadata"]["labels"].items(), "the policy holds for every pod"
    for rule in policy["spec"]["ingress"]:
        assert rule["from"], "an empty from is the whole world"
        assert all(set(peer) <= {"podSelector", "namespaceSelector"} and peer["podSelector"] for peer in rule["from"])


def test_pods_are_not_root_and_hold_no_privilege(manifest: dict[str, Any]) -> None:
    for pod in all_pods(manifest):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == 1000, "the Dockerfile's user"
        assert security["seccompProfile"]["type"] == "RuntimeDefault"
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]


def test_limits(manifest: dict[str, Any]) -> None:
    for pod in all_pods(manifest):
        for container in pod["spec"]["containers"]:
            limits = container["resources"]["limits"]
            assert {"cpu", "memory", "ephemeral-storage"} <= set(limits)
            assert container["resources"]["requests"] == limits, "guaranteed: evicted last"


@pytest.mark.parametrize("name", RAY_FILES)
def test_gpu_and_cpu_variants(name: str) -> None:
    for role, pod in ray_pods(load(name)):
        [container] = pod["spec"]["containers"]
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert gpus == ("1" if name.endswith("gpu") and role != "head" else None)


def test_probes(manifest: dict[str, Any]) -> None:
    for role, pod in ray_pods(manifest):
        [container] = pod["spec"]["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            target = container[probe]["httpGet"]
            # Paths that need no token, of Ray's agent and dashboard.
            known = {("/api/local_raylet_healthz", 52365)} | ({("/api/gcs_healthz", 8265)} if role == "head" else set())
            assert (target["path"], target["port"]) in known
            assert container[probe]["timeoutSeconds"] <= 5


def test_probe_paths_need_no_token() -> None:
    """They are among those that this Ray answers without one."""
    dashboard = Path(ray.__file__).parent / "dashboard"
    assert '"/api/local_raylet_healthz"' in (dashboard / "http_server_agent.py").read_text()
    assert '"/api/gcs_healthz"' in (dashboard / "http_server_head.py").read_text()


def test_volumes(manifest: dict[str, Any]) -> None:
    for _, pod in ray_pods(manifest):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        [container] = pod["spec"]["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert volumes[mounts["/shared"]]["persistentVolumeClaim"]["claimName"] == load("storage")["metadata"]["name"]
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert volumes[mounts["/cache"]]["emptyDir"]["sizeLimit"]
        assert set(mounts.values()) == set(volumes)
        assert {"name": "DNGD_CACHE_DIR", "value": "/cache/dngd"} in container["env"]
    assert load("storage")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_job_ends_and_resumes(manifest: dict[str, Any]) -> None:
    if manifest["kind"] != "RayJob":
        scaling = cluster_of(manifest)["workerGroupSpecs"][0]
        assert cluster_of(manifest)["enableInTreeAutoscaling"] is True
        assert scaling["minReplicas"] < scaling["maxReplicas"]
        return
    spec = manifest["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 0
    assert "--resume" in spec["entrypoint"], "a retry is on a new cluster"
    [group] = spec["rayClusterSpec"]["workerGroupSpecs"]
    workers = int(re.search(r"--num-workers (\d+)", spec["entrypoint"]).group(1))  # type: ignore[union-attr]
    assert group["replicas"] == group["minReplicas"] == workers, "dngd waits for its workers and asks for none"
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGINT"


def test_versions_agree(manifest: dict[str, Any]) -> None:
    constraints = (KUBERNETES.parents[1] / "constraints.txt").read_text()
    assert f"\nray=={cluster_of(manifest)['rayVersion']}\n" in constraints
    images = {container["image"] for pod in all_pods(manifest) for container in pod["spec"]["containers"]}
    assert images == {"REPLACE_IMAGE"}, "client, head and workers run one image"
