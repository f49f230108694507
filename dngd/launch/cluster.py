"""Reaching a Ray cluster, and making sure that it has what a run asks for."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import AuthenticationError
from ray.util.placement_group import placement_group, remove_placement_group

from dngd.config import RayConfig
from dngd.errors import UserError
from dngd.launch.head import ask_head, check_versions, noted_but_gone, token_sentence

START_SECONDS = 45.0
SCALING_SECONDS = 900.0
LOOK_SECONDS = 1.0
TELL_SECONDS = 30.0
RAY_UNITS = 10_000
"""Parts of a resource that Ray counts in."""


def connect(config: RayConfig, *, environment: dict[str, str]) -> bool:
    """Connect to the configured cluster, $RAY_ADDRESS, a cluster of this machine, or start a local one.

    environment: variables that all of the job's processes get.
    Returns whether this call connected (and the caller should disconnect in the end).
    Raises UserError, within 20 s, if the address cannot be reached, refuses, or runs other versions.
    """
    if ray.is_initialized():
        return False
    address = config.address or os.environ.get("RAY_ADDRESS") or None
    if address is None and noted_but_gone() is not None:
        address = "local"
    head = None if address is None else ask_head(address)
    if address is not None and head is not None:
        check_versions(address, head)
    try:
        # Dashboard and per-line driver logs only slow a local cluster's start.
        extra: dict[str, Any] = {} if address not in (None, "local") else {"include_dashboard": False}
        if environment:
            extra["runtime_env"] = {"env_vars": environment}
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **extra)
    except AuthenticationError as error:
        raise UserError(token_sentence(address or "this machine's address", str(error))) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        is_local = address in (None, "local")
        if is_local and isinstance(error, ValueError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if is_local:
            raise UserError(
                f"no Ray cluster could be joined or started on this machine ({reason}); if `ray status` shows none, "
                "clear what one left with `ray stop`, or give a cluster's address with --address, or use --engine local"
            ) from None
        raise UserError(
            f"Ray cluster {address} refused the connection ({reason}); check the address, its token and that its Ray "
            f"version is {ray.__version__}"
        ) from None
    return True


@dataclass(frozen=True)
class Demand:
    """What a run asks of a cluster: so many workers, each with the resources of one, placed by a strategy of Ray's."""

    num_workers: int
    worker: Mapping[str, float]
    strategy: str = "PACK"

    @property
    def total(self) -> dict[str, float]:
        """What all workers take together."""
        return {kind: amount * self.num_workers for kind, amount in self.worker.items() if amount}


def wait_for_resources(
    demand: Demand, timeout_seconds: float | None, tell: Callable[[str], None], *, may_grow: bool
) -> None:
    """Return once the cluster has free what all workers need together.

    While it has not, a placement group of theirs is pending, which an autoscaler starts nodes for. (Unlike
    `ray.autoscaler.sdk.request_resources`, of which a cluster has one that outlives its job, it adds to what other jobs
    ask for, keeps nodes together as the run wants them, and goes with this process, however that ends.)

    timeout_seconds: None for START_SECONDS, or SCALING_SECONDS where the cluster has an autoscaler. may_grow: whether
    nodes may still join; a local cluster whose totals fall short is refused at once.
    Raises UserError when that time has passed, saying what is asked and what is there.
    """
    missing = _missing(demand)
    if missing is None:
        return
    scales = may_grow and scales_by_itself()
    limit = timeout_seconds or (SCALING_SECONDS if scales else START_SECONDS)
    if not may_grow and missing.places < demand.num_workers:
        raise UserError(_shortage(demand, missing, None, scales))
    asked = ", for which its autoscaler starts nodes" if scales else ""
    tell(f"waiting up to {limit:.0f} s for the cluster to have {_amounts(demand.total)} free{asked}")
    began = told = time.monotonic()
    with _pending(demand) as group:
        while not group.wait(LOOK_SECONDS):
            now = time.monotonic()
            if now - began >= limit:
                raise UserError(_shortage(demand, _missing(demand) or missing, limit, scales))
            if now - told >= TELL_SECONDS:
                told = now
                tell(f"{now - began:.0f} s: the cluster's nodes hold {_places(demand)} of {demand.num_workers} workers")


@contextmanager
def _pending(demand: Demand) -> Iterator[Any]:
    """Give a placement group of the demand, which is given up when the block ends."""
    group = placement_group([dict(demand.worker) for _ in range(demand.num_workers)], strategy=demand.strategy)
    try:
        yield group
    finally:
        remove_placement_group(group)


def scales_by_itself() -> bool:
    """Say whether the cluster has an autoscaler that may start nodes, as far as can be told; Ray has no public word.

    Every head runs the same process; without a configuration it names the types of nodes `node_` and their id.
    """
    try:
        from ray.experimental.internal_kv import _internal_kv_get

        return _has_named_types(_internal_kv_get("__autoscaling_status")) or _is_version_two()
    except Exception:  # private interfaces: without them the limit is the shorter one, and can be set
        return False


def _has_named_types(status: bytes | None) -> bool:
    report = json.loads(status or b"{}").get("autoscaler_report") or {}
    types = {*(report.get("active_nodes") or {}), *(report.get("pending_launches") or {})}
    return any(not name.startswith("node_") for name in types)


def _is_version_two() -> bool:
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    nodes = [*status.active_nodes, *status.idle_nodes]
    return int(status.stats.autoscaler_version or 0) > 0 and any(
        not node.ray_node_type_name.startswith("node_") for node in nodes
    )


@dataclass(frozen=True)
class _Missing:
    """What a cluster has that is not enough. places: how many workers its nodes hold when idle."""

    total: Mapping[str, float]
    free: Mapping[str, float]
    places: int


def _missing(demand: Demand) -> _Missing | None:
    total, free = ray.cluster_resources(), ray.available_resources()
    places = _places(demand)
    if places >= demand.num_workers and all(_times(free.get(kind, 0.0), n) for kind, n in demand.total.items()):
        return None
    return _Missing(total, free, places)


def _places(demand: Demand) -> int:
    """Return how many workers the cluster's nodes hold when idle; a worker does not span nodes.

    STRICT_SPREAD puts one at most on a node, STRICT_PACK all on one.
    """
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    amounts = {kind: amount for kind, amount in demand.worker.items() if amount}
    of_nodes = [
        min((_times(have.get(kind, 0.0), n) for kind, n in amounts.items()), default=demand.num_workers)
        for have in alive
    ]
    if demand.strategy == "STRICT_PACK":
        return max(of_nodes, default=0)
    return sum(min(1, places) for places in of_nodes) if demand.strategy == "STRICT_SPREAD" else sum(of_nodes)


def _times(have: float, amount: float) -> int:
    """Return how often an amount of a resource is there. Ray counts in units of 1/10,000; in floats a GPU holds a fifth
    of itself but four times."""
    return round(have * RAY_UNITS) // max(1, round(amount * RAY_UNITS))


def _shortage(demand: Demand, missing: _Missing, waited: float | None, scales: bool) -> str:
    there = {kind: missing.total.get(kind, 0.0) for kind in demand.total}
    free = {kind: missing.free.get(kind, 0.0) for kind in demand.total}
    after = "" if waited is None else f" after {waited:.0f} s"
    fix = "add nodes that have what one worker asks for"
    if missing.places >= demand.num_workers:
        fix = "wait for other jobs to end, or ask for less than what is free"
    elif missing.places:
        fix = f"use --num-workers {missing.places} or less"
    if missing.places < demand.num_workers and demand.strategy.startswith("STRICT_"):
        where = "on one node" if demand.strategy == "STRICT_PACK" else "each on a node of its own"
        fix = (
            f"{where}, as {demand.strategy} has it, {missing.places} fit: give --set ray.placement_strategy=PACK, {fix}"
        )
    if "GPU" in demand.total and not missing.total.get("GPU"):
        fix = "leave out --use-gpu, or join nodes with GPUs"
    if scales:
        fix += ", see ray status for why its autoscaler starts no more"
    return (
        f"{demand.num_workers} workers need {_amounts(demand.total)} but the cluster has {_amounts(there)} "
        f"({_amounts(free)} free){after}; {fix}, start a larger cluster, or wait longer "
        "for nodes to join with --set ray.start_timeout_seconds=N"
    )


def _amounts(resources: Mapping[str, float]) -> str:
    names = {"CPU": "CPUs", "GPU": "GPUs"}
    return " and ".join(f"{amount:g} {names.get(kind, kind)}" for kind, amount in resources.items())
