"""A real Ray cluster on this machine, with token authentication, for the tests to share."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

NUM_CPUS = 4
"""More than there may be: workers of these tests are small, and two cores serve them."""


@dataclass(frozen=True)
class Cluster:
    """Addresses of a running cluster, and the environment in which its clients run."""

    gcs_address: str
    jobs_address: str
    environment: dict[str, str]


def free_port() -> int:
    # Below Ray's range for workers, which it refuses to share.
    for port in range(6400, 9900):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
    raise AssertionError("no free port")


_given: set[int] = set()


@contextlib.contextmanager
def ray_cluster(num_cpus: int = NUM_CPUS) -> Iterator[Cluster]:
    """Start a head node, and stop it, and only it, in the end."""
    binaries = Path(sys.executable).parent
    gcs, dashboard, agent = free_port(), free_port(), free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    # A short path: Ray's sockets live below it, and a socket's path has 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="dngd-ray-", ignore_cleanup_errors=True) as folder:
        command = [str(binaries / "ray"), "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address", "127.0.0.1", "--port", str(gcs), "--num-cpus", str(num_cpus)]
        command += ["--dashboard-port", str(dashboard), "--include-dashboard", "true", "--temp-dir", folder]
        # The agent starts jobs. On Ray's fixed port the clusters of two test runs would fight over it.
        command += ["--dashboard-agent-listen-port", str(agent)]
        log = Path(folder) / "start.log"
        with open(log, "wb") as out:
            head = subprocess.Popen(command, env=environment, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        try:
            _wait_until_up(head, gcs, dashboard, log)
            yield Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", environment)
        finally:
            # A graceful stop takes Ray half a minute; nothing of this cluster is worth that.
            kill_node(head)


def _wait_until_up(head: subprocess.Popen[bytes], gcs: int, dashboard: int, log: Path) -> None:
    deadline = time.monotonic() + 90
    waiting = [gcs, dashboard]
    while waiting:
        assert head.poll() is None, f"ray start failed:\n{log.read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"Ray is not up on ports {waiting} after 90 s:\n{log.read_text()[-2000:]}"
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", waiting[0]), timeout=1).close()
            waiting.pop(0)
            continue
        time.sleep(0.3)


def add_node(cluster: Cluster, num_cpus: int) -> subprocess.Popen[bytes]:
    """Start another node of a cluster on this machine; end it with `kill_node`."""
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
    command += ["--address", cluster.gcs_address, "--node-ip-address", "127.0.0.1", "--num-cpus", str(num_cpus)]
    command += ["--dashboard-agent-listen-port", "0"]
    return subprocess.Popen(
        command,
        env=cluster.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """SIGKILL to every process of a node, workers included: what a machine that is lost looks like to the others."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    node.wait(timeout=30)
