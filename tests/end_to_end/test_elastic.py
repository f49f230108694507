"""Nodes come and go: fewer workers over the same shards, and more again. Several Ray nodes on one machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dngd.graph import GraphStore
from tests.helpers import survival
from tests.helpers.ray_cluster import add_node, kill_node, ray_cluster
from tests.helpers.survival import fault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_lost_node_is_done_without_and_a_new_one_is_used(store: GraphStore, tmp_path: Path) -> None:
    """Two nodes of a worker each. One is lost and not replaced: one worker runs both shards. Later another joins."""
    survival.undisturbed([survival.settings(store, tmp_path / "straight", epochs=6)])
    per_epoch = json.loads((tmp_path / "straight" / "result.json").read_text())["steps"] // 6
    lost_at, joined_at = per_epoch + 2, 4 * per_epoch + 2
    faults = [fault("sample_wait", rank, lost_at, "hold") for rank in (0, 1)]
    faults.append(fault("sample_wait", 0, joined_at, "hold"))  # so that the run is not over before the node joins
    ray = {"min_workers": 1, "resize_period_seconds": 5.0}
    with ray_cluster(num_cpus=1) as cluster:
        second = add_node(cluster, num_cpus=1)
        third = None
        try:
            config = survival.settings(store, tmp_path / "run", epochs=6, ray=ray)
            survival.wait_for_cpus(cluster, 2)
            driver = survival.start(cluster, config, faults, tmp_path)
            both = {f"sample_wait-{rank}-{lost_at}" for rank in (0, 1)}
            survival.wait_until(lambda: both <= survival.hits(tmp_path), driver, 120)
            kill_node(second)
            alone = f"sample_wait-0-{joined_at}"
            survival.wait_until(lambda: alone in survival.hits(tmp_path), driver, 180)
            third = add_node(cluster, num_cpus=1)
            code, said = survival.finish(driver, 300)
        finally:
            for node in (second, third):
                if node is not None:
                    kill_node(node)
    assert code == 0, said
    assert f"the run goes on from step {per_epoch} of {6 * per_epoch} with 1 worker," in said
    assert "the cluster has room for 2 workers instead of 1; the run goes on from step" in said
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["world_size"], result["recoveries"]) == (2, 2)
    # Other numbers of workers sum in another order: the same curve, to float tolerance.
    for found, expected in zip(survival.curve(tmp_path / "run"), survival.curve(tmp_path / "straight"), strict=True):
        assert found == pytest.approx(expected, rel=2e-2)


def test_a_lost_node_that_cannot_be_done_without_ends_the_run(store: GraphStore, tmp_path: Path) -> None:
    """Both workers are wanted and only one has a place: the wait has a limit, and the run can be gone on with."""
    config = survival.settings(store, tmp_path / "run", epochs=6, ray={"recovery_timeout_seconds": 40.0})
    faults = [fault("sample_wait", rank, 5, "hold") for rank in (0, 1)]
    with ray_cluster(num_cpus=1) as cluster:
        second = add_node(cluster, num_cpus=1)
        try:
            survival.wait_for_cpus(cluster, 2)
            driver = survival.start(cluster, config, faults, tmp_path)
            survival.wait_until(lambda: len(survival.hits(tmp_path)) == 2, driver, 120)
            kill_node(second)
            code, said = survival.finish(driver, 180)
        finally:
            kill_node(second)
    assert code == 1, said
    assert "waiting up to 40 s for the cluster to run 2 workers" in said
    assert said.strip().splitlines()[-1].startswith("dngd: the cluster did not run 2 workers within 40 s; go on with")
