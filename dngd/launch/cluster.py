"""Reaching a Ray cluster, and making sure that it has what a run asks for."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import ray

from dngd.config import RayConfig
from dngd.errors import UserError

CONNECT_TIMEOUT_SECONDS = 10.0


def connect(config: RayConfig, *, environment: dict[str, str]) -> bool:
    """Connect to the configured cluster, $RAY_ADDRESS, a cluster of this machine, or start a local one.

    environment: variables that all of the job's processes get.
    Returns whether this call connected (and the caller should disconnect in the end).
    Raises UserError if the address cannot be reached within 10 s, or refuses.
    """
    if ray.is_initialized():
        return False
    address = config.address or os.environ.get("RAY_ADDRESS")
    _check_reachable(address)
    try:
        # Dashboard and per-line driver logs only slow a local cluster's start.
        extra: dict[str, Any] = {} if address else {"include_dashboard": False}
        if environment:
            extra["runtime_env"] = {"env_vars": environment}
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **extra)
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address is None:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"Ray cluster {address} refused the connection ({reason}); check the address, its token and that its Ray "
            f"version is {ray.__version__}"
        ) from None
    return True


def _check_reachable(address: str | None) -> None:
    """Raise UserError if nothing listens at host:port; Ray itself would retry for minutes."""
    if address is None or address in ("auto", "local"):
        return
    host_port = address.removeprefix("ray://")
    host, colon, port = host_port.rpartition(":")
    if not colon or not port.isdigit():
        raise UserError(f"Ray address {address!r} is not HOST:PORT or ray://HOST:PORT; give e.g. 10.0.0.1:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}); start one with `ray start --head`, or leave the address "
            "out to use a local one"
        ) from None


def wait_for_resources(
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    timeout_seconds: float,
    tell: Callable[[str], None],
    *,
    may_grow: bool,
) -> None:
    """Return once the cluster has free what all workers need together.

    may_grow: whether nodes may still join; a local cluster whose totals fall short is refused at once.
    Raises UserError when timeout_seconds have passed, saying what is asked and what is there.
    """
    asked = {"CPU": num_workers * cpus_per_worker}
    if gpus_per_worker:
        asked["GPU"] = num_workers * gpus_per_worker
    deadline = time.monotonic() + timeout_seconds
    told = False
    while True:
        total, free = ray.cluster_resources(), ray.available_resources()
        places = _places(cpus_per_worker, gpus_per_worker)
        if places >= num_workers and all(free.get(kind, 0.0) >= amount for kind, amount in asked.items()):
            return
        hopeless = not may_grow and places < num_workers
        if hopeless or time.monotonic() >= deadline:
            raise UserError(_shortage(asked, total, free, num_workers, places, timeout_seconds, hopeless))
        if not told:
            tell(f"waiting up to {timeout_seconds:.0f} s for the cluster to have {_amounts(asked)} free")
            told = True
        time.sleep(1.0)


def _places(cpus_per_worker: float, gpus_per_worker: float) -> int:
    """Return how many workers the cluster's nodes hold when idle; a worker does not span nodes."""
    places = 0
    for node in ray.nodes():
        if node["Alive"]:
            have = node["Resources"]
            on_node = have.get("CPU", 0.0) // cpus_per_worker
            if gpus_per_worker:
                on_node = min(on_node, have.get("GPU", 0.0) // gpus_per_worker)
            places += int(on_node)
    return places


def _shortage(
    asked: dict[str, float],
    total: dict[str, float],
    free: dict[str, float],
    num_workers: int,
    places: int,
    timeout_seconds: float,
    hopeless: bool,
) -> str:
    there = {kind: total.get(kind, 0.0) for kind in asked}
    free_now = {kind: free.get(kind, 0.0) for kind in asked}
    waited = "" if hopeless else f" after {timeout_seconds:.0f} s"
    fix = f"use --num-workers {places} or less" if places else "add nodes that have what one worker asks for"
    if "GPU" in asked and not total.get("GPU"):
        fix = "leave out --use-gpu, or join nodes with GPUs"
    return (
        f"{num_workers} workers need {_amounts(asked)} but the cluster has {_amounts(there)} "
        f"({_amounts(free_now)} free){waited}; {fix}, start a larger cluster, or wait longer "
        "for nodes to join with --set ray.start_timeout_seconds=N"
    )


def _amounts(resources: dict[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}s" for kind, amount in resources.items())
