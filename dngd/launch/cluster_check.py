"""What a Ray cluster has, as far as it concerns a run of dngd: `dngd doctor --address`.

By the address of a dashboard (http://HOST:8265), which `dngd submit` uses, over HTTP alone; by that of a head
(HOST:6379), which `dngd train --address` uses, with a look at every node.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dngd.config import RayConfig
from dngd.launch.cluster import connect
from dngd.launch.head import ask_head, asks_for_token
from dngd.launch.submit import ClusterJobs, job_server_address

NODE_SECONDS = 60.0
MOST_NODES = 10_000
COMPARED = ("dngd", "torch", "ray")
"""Packages whose versions a node should share with this process."""

_OPEN_FIX = "whoever reaches its port can run programs there: start it with RAY_AUTH_MODE=token (see cluster/README.md)"


@dataclass(frozen=True)
class ClusterFinding:
    """One line: what was found, and if that is not as it should be what to do. works: whether runs are possible."""

    name: str
    found: str
    fix: str = ""
    works: bool = True


def check_cluster(address: str) -> list[ClusterFinding]:
    """Return what the cluster at an address has. Raises UserError if it cannot be reached or refuses."""
    if address.startswith(("http://", "https://")):
        return _by_dashboard(job_server_address(address))
    return _by_head(address)


def _by_dashboard(address: str) -> list[ClusterFinding]:
    jobs = ClusterJobs(address)
    version = jobs.ray_version or "not told"
    findings = [ClusterFinding("cluster", address), ClusterFinding("cluster's Ray", version, jobs.version_note or "")]
    findings.append(_authentication(jobs.asks_for_token()))
    findings += _resources(node["resources_total"] for node in jobs.nodes(MOST_NODES) if node["state"] == "ALIVE")
    hint = f"dngd submit --address {address} -- doctor tells of its head node"
    return [*findings, ClusterFinding("dngd on the nodes", "not looked at", hint)]


def _by_head(address: str) -> list[ClusterFinding]:
    head = ask_head(address)
    findings = [ClusterFinding("cluster", address)]
    connected = connect(RayConfig(address=address), environment={})
    try:
        findings.append(ClusterFinding("cluster's Ray", f"{ray.__version__}, Python {platform.python_version()}"))
        asks = None if head is None else asks_for_token(address)
        if asks is not None:
            findings.append(_authentication(asks))
        alive = [node for node in ray.nodes() if node["Alive"]]
        findings += _resources(node["Resources"] for node in alive)
        return findings + [_node(node["NodeManagerHostname"], asked) for node, asked in _ask_nodes(alive)]
    finally:
        if connected:
            ray.shutdown()


def _authentication(on: bool) -> ClusterFinding:
    return ClusterFinding("token authentication", "on" if on else "off", "" if on else _OPEN_FIX)


def _resources(nodes: Iterable[Mapping[str, float]]) -> list[ClusterFinding]:
    each = list(nodes)
    total = {kind: sum(node.get(kind, 0.0) for node in each) for kind in ("CPU", "GPU", "memory")}
    found = f"{total['CPU']:g} CPUs, {total['GPU']:g} GPUs, {total['memory'] / 2**30:.1f} GiB for Ray's workers"
    fix = "" if each and total["CPU"] else "no node takes workers yet: join some with ray start --address"
    return [
        ClusterFinding("nodes", str(len(each)), fix, works=bool(each)),
        ClusterFinding("their resources", found),
    ]


def _ask_nodes(nodes: list[dict[str, Any]]) -> list[tuple[dict[str, Any], Any]]:
    task = ray.remote(_versions_here)
    asked = []
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked.append((node, task.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote()))
    return asked


def _node(host: str, asked: Any) -> ClusterFinding:
    name = f"node {host}"
    try:
        there: dict[str, str] = ray.get(asked, timeout=NODE_SECONDS)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(asked, force=True)
        return ClusterFinding(
            name, f"no answer within {NODE_SECONDS:.0f} s", "see ray status and its logs", works=False
        )
    except ray.exceptions.RayError as error:
        fix = "install the same dngd there, or start the node from the image of cluster/Dockerfile"
        if "No module named 'dngd'" in str(error):
            return ClusterFinding(name, "no dngd", fix, works=False)
        reason = str(error).strip().splitlines()[-1]
        return ClusterFinding(name, f"dngd cannot be imported ({reason})", fix, works=False)
    here = _versions_here()
    found = ", ".join(f"{package} {version}" for package, version in there.items())
    other = [package for package in here if here[package] != there[package]]
    fix = f"this process has {', '.join(f'{p} {here[p]}' for p in other)}; use one version" if other else ""
    return ClusterFinding(name, found, fix)


def _versions_here() -> dict[str, str]:
    import dngd.train  # noqa: F401  # what a worker needs

    versions = {}
    for package in COMPARED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
