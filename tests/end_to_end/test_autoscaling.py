"""What an autoscaler would be asked for, as Ray's GCS has it: nodes that a run waits for, until it no longer does."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.ray_cluster import NUM_CPUS, Cluster, add_node, kill_node

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

WAIT = """
import sys
from dngd.config import RayConfig
from dngd.launch.cluster import Demand, connect, scales_by_itself, wait_for_resources
connect(RayConfig(address=sys.argv[1]), environment={})
assert not scales_by_itself(), "a head without an autoscaler's configuration"
wait_for_resources(Demand(int(sys.argv[2]), {"CPU": 1.0}), 300.0, print, may_grow=True)
"""


def start(cluster: Cluster, workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WAIT, cluster.gcs_address, str(workers)],
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def demands(cluster: Cluster) -> str:
    """Return what `ray status` says of pending demands."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "status", "--address", cluster.gcs_address]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("Pending Demands:")[2]


def once(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_nodes_are_asked_for_until_they_are_there(cluster: Cluster) -> None:
    wanted = NUM_CPUS + 3
    waiting = start(cluster, wanted)
    node = None
    try:
        once(lambda: f"{{'CPU': 1.0}} * {wanted} (PACK): 1+ pending placement groups" in demands(cluster))
        node = add_node(cluster, num_cpus=3)
        said, _ = waiting.communicate(timeout=90)
        assert waiting.returncode == 0, said
        assert f"waiting up to 300 s for the cluster to have {wanted} CPUs free" in said
        once(lambda: "(no resource demands)" in demands(cluster))
    finally:
        waiting.kill()
        if node is not None:
            kill_node(node)


def test_a_killed_driver_asks_for_nothing_any_more(cluster: Cluster) -> None:
    waiting = start(cluster, 50)
    try:
        once(lambda: "* 50 (PACK)" in demands(cluster))
    finally:
        waiting.kill()
        waiting.wait(timeout=20)
    once(lambda: "(no resource demands)" in demands(cluster))
