"""Hosts on one machine: network namespaces on a bridge, their links limited by tc's token bucket filter.

Each host is a namespace with one interface and an address of its own; the bridge that joins them lies in a namespace of
its own too, so that the machine's own network is left alone and removing the namespaces removes everything. A link
is limited in both directions. Needs root and iproute2 on Linux.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from dngd.errors import UserError

INTERFACE = "eth0"
"""What a host's interface is called in its own namespace."""

NAMESPACES = Path("/run/netns")
_PREFIX = "dngd-bench"
_COMMAND_SECONDS = 20.0
_LEAST_BURST_BYTES = 4 << 10
_BURST_SECONDS = 1e-3
_QUEUE_MS = 100


def check_tools() -> None:
    """Raise UserError, in one sentence, where hosts cannot be made: not Linux, not root, or a tool is missing."""
    if not sys.platform.startswith("linux"):
        raise UserError(f"hosts are network namespaces, which {sys.platform} has none of; run this on Linux")
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not found: hosts are made with iproute2; install it (Debian: apt-get install "
            "iproute2)"
        )
    if os.geteuid() != 0:
        raise UserError("hosts are network namespaces, which only root may make; run this as root")


class HostNetwork:
    """A number of hosts, 0 to num_hosts - 1, each of which can reach the others."""

    def __init__(self, num_hosts: int) -> None:
        self._num_hosts = num_hosts
        self._names: list[str] = []
        self._switch = f"{_PREFIX}-{os.getpid()}-switch"

    def create(self) -> None:
        """Make namespaces, bridge and links, without a limit. Raises UserError where the kernel refuses."""
        self._add(self._switch)
        _run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "bridge", "up")
        for host in range(self._num_hosts):
            name = f"{_PREFIX}-{os.getpid()}-{host}"
            self._add(name)
            port = _port(host)
            _run(
                *("ip", "-n", self._switch, "link", "add", port, "type", "veth"),
                *("peer", "name", INTERFACE, "netns", name),
            )
            _run("ip", "-n", self._switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", name, "address", "add", f"10.213.0.{host + 1}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")

    def limit(self, megabits: float | None) -> None:
        """Let every link carry that many Mbit/s in either direction; None: as much as it can."""
        for host in range(self._num_hosts):
            for namespace, device in ((self._host(host), INTERFACE), (self._switch, _port(host))):
                if megabits is None:
                    # There is none to delete the first time.
                    _run("tc", "-n", namespace, "qdisc", "delete", "dev", device, "root", check=False)
                    continue
                # A burst of a millisecond: far below a gradient, above what the timer's resolution asks for.
                burst = max(_LEAST_BURST_BYTES, round(megabits * 1e6 / 8 * _BURST_SECONDS))
                _run(
                    *("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf"),
                    *("rate", f"{round(megabits * 1e6)}bit", "burst", str(burst), "latency", f"{_QUEUE_MS}ms"),
                )

    def prefix(self, host: int) -> tuple[str, ...]:
        """Return the command that runs another one on a host."""
        return ("ip", "netns", "exec", self._host(host))

    def remove(self) -> None:
        """Delete what was made; idempotent, and tries everything before it gives up on anything."""
        names, self._names = self._names, []
        for name in reversed(names):
            _run("ip", "netns", "delete", name, check=False)

    def _host(self, host: int) -> str:
        return f"{_PREFIX}-{os.getpid()}-{host}"

    def _add(self, name: str) -> None:
        # Noted first: an interrupt behind the command must not leave it behind.
        self._names.append(name)
        _run("ip", "netns", "add", name)


@contextlib.contextmanager
def host_network(num_hosts: int) -> Iterator[HostNetwork]:
    """Make hosts for a block, and remove them however it ends; those of a benchmark that was killed go first.

    Raises UserError where hosts cannot be made.
    """
    check_tools()
    remove_stale()
    network = HostNetwork(num_hosts)
    try:
        network.create()
        yield network
    finally:
        network.remove()


def remove_stale() -> None:
    """Delete the namespaces of benchmarks whose process is gone."""
    for name in left_behind():
        _run("ip", "netns", "delete", name, check=False)


def left_behind() -> list[str]:
    """Return the namespaces of benchmarks whose process is gone."""
    found = []
    for path in NAMESPACES.glob(f"{_PREFIX}-*"):
        owner = path.name.removeprefix(f"{_PREFIX}-").partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            found.append(path.name)
    return sorted(found)


def _port(host: int) -> str:
    return f"port{host}"


def _run(*command: str, check: bool = True) -> None:
    """Run a command. Raises UserError with what it said, if it fails and `check` is on."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{' '.join(command)} did not end within {_COMMAND_SECONDS:g} s; check the machine") from None
    if check and done.returncode != 0:
        said = " ".join(done.stderr.split()) or f"code {done.returncode}"
        raise UserError(
            f"{' '.join(command)} failed ({said}); hosts need a kernel with network namespaces, veth, bridge and tbf, "
            "and CAP_NET_ADMIN and CAP_SYS_ADMIN, which a container may lack"
        )
