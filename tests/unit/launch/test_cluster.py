"""Waiting for a cluster to have what a run asks for, against a stand-in for Ray."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dngd.config import TrainConfig
from dngd.errors import UserError
from dngd.launch import cluster
from dngd.launch.cluster import Demand, wait_for_resources

DEMAND = Demand(4, {"CPU": 1.0, "GPU": 0.5, "memory": 2.0}, "SPREAD")
NODE = {"CPU": 2.0, "GPU": 1.0, "memory": 8.0}


class FakeRay:
    """Some nodes; placement groups that are ready after so many looks, when the nodes are there that they wait for."""

    def __init__(self, nodes: int, ready_after: int | None) -> None:
        self.num_nodes = nodes
        self.ready_after = ready_after
        self.groups: list[tuple[list[dict[str, float]], str]] = []
        self.given_up = 0
        self.looks = 0

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": NODE}] * self.num_nodes

    def cluster_resources(self) -> dict[str, float]:
        return {kind: amount * self.num_nodes for kind, amount in NODE.items()}

    available_resources = cluster_resources

    def placement_group(self, bundles: list[dict[str, float]], strategy: str) -> FakeRay:
        self.groups.append((bundles, strategy))
        return self

    def wait(self, seconds: float) -> bool:
        self.looks += 1
        return self.ready_after is not None and self.looks > self.ready_after

    def remove(self, group: FakeRay) -> None:
        self.given_up += 1


def fake(monkeypatch: pytest.MonkeyPatch, nodes: int, ready_after: int | None = None, scales: bool = True) -> FakeRay:
    ray = FakeRay(nodes, ready_after)
    for name in ("nodes", "cluster_resources", "available_resources"):
        monkeypatch.setattr(cluster.ray, name, getattr(ray, name))
    monkeypatch.setattr(cluster, "placement_group", ray.placement_group)
    monkeypatch.setattr(cluster, "remove_placement_group", ray.remove)
    monkeypatch.setattr(cluster, "scales_by_itself", lambda: scales)
    return ray


def test_what_is_free_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake(monkeypatch, nodes=2)
    told: list[str] = []
    wait_for_resources(DEMAND, None, told.append, may_grow=True)
    assert (ray.groups, told) == ([], [])


def test_nodes_from_zero_are_asked_for_and_the_request_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake(monkeypatch, nodes=0, ready_after=3)
    monkeypatch.setattr(cluster, "TELL_SECONDS", 0.0)
    told: list[str] = []
    wait_for_resources(DEMAND, None, told.append, may_grow=True)
    assert ray.groups == [([{"CPU": 1.0, "GPU": 0.5, "memory": 2.0}] * 4, "SPREAD")]
    assert ray.given_up == 1
    assert told[0] == (
        "waiting up to 900 s for the cluster to have 4 CPUs and 2 GPUs and 8 memory free, for which its autoscaler "
        "starts nodes"
    )
    assert told[1:] == ["0 s: the cluster's nodes hold 0 of 4 workers"] * 3


@pytest.mark.parametrize(("scales", "limit"), [(True, "900"), (False, "45")])
def test_the_limit_is_longer_where_nodes_are_started(monkeypatch: pytest.MonkeyPatch, scales: bool, limit: str) -> None:
    fake(monkeypatch, nodes=1, ready_after=1, scales=scales)
    told: list[str] = []
    wait_for_resources(DEMAND, None, told.append, may_grow=True)
    assert told[0].startswith(f"waiting up to {limit} s for the cluster to have 4 CPUs and 2 GPUs")


def test_too_long_a_wait_ends_with_what_is_there_and_the_request_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake(monkeypatch, nodes=1)
    sentence = r"4 workers need 4 CPUs .* has 2 CPUs and 1 GPUs .* after 0 s; use --num-workers 2"
    with pytest.raises(UserError, match=sentence):
        wait_for_resources(DEMAND, 1e-6, lambda text: None, may_grow=True)
    assert ray.given_up == 1


def test_ctrl_c_withdraws_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake(monkeypatch, nodes=1)

    def interrupted(seconds: float) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wait_for_resources(DEMAND, None, lambda text: None, may_grow=True)
    assert ray.given_up == 1


def test_a_local_cluster_that_is_too_small_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake(monkeypatch, nodes=1)
    with pytest.raises(UserError, match=r"use --num-workers 2 or less"):
        wait_for_resources(DEMAND, None, lambda text: None, may_grow=False)
    assert ray.groups == []


@pytest.mark.parametrize(
    ("strategy", "places", "where"),
    [("STRICT_SPREAD", 3, "each on a node of its own"), ("STRICT_PACK", 2, "on one node")],
)
def test_a_placement_that_cannot_be_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, strategy: str, places: int, where: str
) -> None:
    """Three nodes that hold two workers each: six as they come, three each on its own, two on one."""
    ray = fake(monkeypatch, nodes=3)
    with pytest.raises(UserError) as refused:
        wait_for_resources(Demand(4, DEMAND.worker, strategy), None, lambda text: None, may_grow=False)
    said = f"{where}, as {strategy} has it, {places} fit: give --set ray.placement_strategy=PACK"
    assert said in str(refused.value)
    assert f"use --num-workers {places} or less" in str(refused.value)
    assert ray.groups == []
    for fits in (Demand(places, DEMAND.worker, strategy), Demand(6, DEMAND.worker, "PACK")):
        wait_for_resources(fits, None, lambda text: None, may_grow=False)


@pytest.mark.parametrize(
    ("share", "workers"), [(0.2, 5), (0.1, 10), (0.3, 3), (1 / 3, 3), (0.07, 14), (0.0001, 10_000)]
)
def test_as_many_workers_share_a_gpu_as_it_has_shares(
    monkeypatch: pytest.MonkeyPatch, share: float, workers: int
) -> None:
    """1.0 // 0.2 is 4 in floats."""
    fake(monkeypatch, nodes=1)
    wait_for_resources(Demand(workers, {"GPU": share}), None, lambda text: None, may_grow=False)
    with pytest.raises(UserError, match=f"use --num-workers {workers} or less"):
        wait_for_resources(Demand(workers + 1, {"GPU": share}), None, lambda text: None, may_grow=False)


@pytest.mark.parametrize(
    ("active", "launches", "scales"),
    [
        ({"node_0a0b8224c115bc13f822ef2b": 1}, {}, False),  # as a head without an autoscaler's configuration says
        ({"ray.head.default": 1}, {}, True),
        ({"headgroup": 1, "workers": 2}, {}, True),
        ({}, {"gpu": 1}, True),
        (None, None, False),
    ],
)
def test_what_an_autoscaler_is_known_by(active: Any, launches: Any, scales: bool) -> None:
    report = {"autoscaler_report": {"active_nodes": active, "pending_launches": launches}}
    assert cluster._has_named_types(json.dumps(report).encode()) is scales
    assert cluster._has_named_types(None) is False


def test_a_cluster_that_is_taken_asks_for_patience_and_not_for_fewer_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake(monkeypatch, nodes=3)
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0, "GPU": 1.0, "memory": 2.0})
    with pytest.raises(UserError, match="wait for other jobs to end, or ask for less than what is free") as refused:
        wait_for_resources(DEMAND, 1e-6, lambda text: None, may_grow=True)
    assert "--num-workers" not in str(refused.value)
    assert ray.given_up == 1


def test_workers_that_take_nothing_have_room_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake(monkeypatch, nodes=1)
    wait_for_resources(Demand(4, {"CPU": 0.0}), None, lambda text: None, may_grow=False)
    assert ray.groups == []


@pytest.mark.parametrize(
    ("amounts", "said"),
    [({"CPU": -1}, "ray.resources_per_worker=-1.* greater than or equal to 0"), ({"CPU": 0}, "nothing to reserve")],
)
def test_amounts_that_ray_does_not_take_are_refused(amounts: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainConfig(dataset="cora", ray={"resources_per_worker": amounts})


@pytest.mark.parametrize("fields", [{"use_gpu": True, "amounts": {"CPU": 0}}, {"amounts": {"CPU": 0, "memory": 1e9}}])
def test_a_worker_may_do_without_cpus(fields: dict[str, Any]) -> None:
    amounts = fields.pop("amounts")
    config = TrainConfig(dataset="cora", **fields, ray={"resources_per_worker": amounts})
    assert config.ray.resources_per_worker == amounts
