"""Runs outlive their workers, on a real Ray cluster with token authentication and default checkpoint settings."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from dngd.graph import GraphStore
from tests.helpers import survival
from tests.helpers.ray_cluster import Cluster
from tests.helpers.survival import fault

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def test_a_killed_and_a_stopped_worker(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    """kill -9 in a reduction and SIGSTOP while sampling: diagnosed, and the same weights in the end."""
    survival.undisturbed([survival.settings(store, tmp_path / "straight")])
    steps = json.loads((tmp_path / "straight" / "result.json").read_text())["steps"]
    per_epoch = steps // 3
    faults = [fault("reduce", 1, per_epoch + 3), fault("sample_wait", 0, 2 * per_epoch + 1, "stop")]
    # On a busy machine the task that kills may take a minute to start: the other rank is to wait for that.
    limits = {"ray": {"stall_timeout_seconds": 6.0}, "collective_timeout_seconds": 240.0}
    config = survival.settings(store, tmp_path / "run", **limits)
    code, said = survival.finish(survival.start(cluster, config, faults, tmp_path), 300)
    assert code == 0, said
    assert survival.hits(tmp_path) == {survival.name(f) for f in faults}
    survival.assert_same_run(tmp_path / "run", tmp_path / "straight")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    # A checkpoint that was still being written when its process was killed is none: then it is the one before.
    went_on = [int(step) for step in re.findall(r"the run goes on from step (\d+) of", said)]
    assert went_on[0] in (0, per_epoch)
    assert went_on[1] in (per_epoch, 2 * per_epoch)
    repeated = [f["step"] - step for f, step in zip(faults, went_on, strict=True)]
    assert (result["recoveries"], result["steps_repeated"]) == (2, sum(repeated))
    assert all(f", {steps} steps are done again" in said or steps == 1 for steps in repeated)
    killed, stopped = ((tmp_path / "hit" / survival.name(f)).read_text() for f in faults)
    assert f"rank 1 (pid {killed} on " in said
    assert f"was lost in phase reduce of step {per_epoch + 3}; the run goes on from step {went_on[0]} of" in said
    assert f"rank 0 (pid {stopped} on " in said
    assert f" s in phase sampling of step {2 * per_epoch + 1}: killed, to be started again" in said, said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_in_every_phase(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    """At seeded steps; each phase was hit, and the weights are those of the run that nobody disturbed."""
    epochs = 14
    survival.undisturbed([survival.settings(store, tmp_path / "straight", epochs=epochs)])
    per_epoch = json.loads((tmp_path / "straight" / "result.json").read_text())["steps"] // epochs
    draw = random.Random(5)
    anywhere = ["sample_wait", "forward", "backward", "reduce", "optimizer"]
    at_ends = [("checkpoint", None), ("write", 0), ("evaluation", None)]
    # In the dense beginning a layer is inverted at each power of two and the next at the step after, by its owner.
    faults = [fault("inversion", None, step) for step in (2, 9, 16)]
    for i in range(12):
        step = per_epoch * (i % epochs) + draw.randrange(1, per_epoch - 1)
        faults.append(fault(anywhere[i % len(anywhere)], draw.randrange(2), step))
    ends = draw.sample(range(2, epochs), 6)
    for i, end in enumerate(ends):
        phase, rank = at_ends[i % 3]
        faults.append(fault(phase, draw.randrange(2) if rank is None else rank, end * per_epoch))
    code, said = survival.finish(
        survival.start(cluster, survival.settings(store, tmp_path / "run", epochs=epochs), faults, tmp_path), 1500
    )
    assert code == 0, said
    assert survival.hits(tmp_path) == {survival.name(f) for f in faults}
    assert len(survival.hits(tmp_path)) >= 20
    survival.assert_same_run(tmp_path / "run", tmp_path / "straight")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    print(said)  # shown with pytest -s
    # A checkpoint is written beside training: a worker killed in that and another one in its step may go together.
    assert result["recoveries"] == said.count("; the run goes on from step ")
    assert len(faults) - 2 <= result["recoveries"] <= len(faults)
    assert "Traceback" not in said


@pytest.mark.slow
def test_nan_in_one_ranks_features(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    """All ranks drop the step together, count it, and go on; no worker is started again for it."""
    faults = [fault("features", 1, 4, "nan"), fault("features", 0, 11, "nan")]
    config = survival.settings(store, tmp_path / "run", num_samplers=1)
    code, said = survival.finish(survival.start(cluster, config, faults, tmp_path), 300)
    assert code == 0, said
    assert survival.hits(tmp_path) == {"features-1-4", "features-0-11"}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["dropped_steps"], result["recoveries"]) == (2, 0)
    assert said.count("a gradient is not finite; all ranks dropped the step") == 2
    assert all(None not in line for line in survival.curve(tmp_path / "run"))


@pytest.mark.slow
def test_what_a_retry_cannot_mend_is_not_tried_again(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    faults = [fault("features", 1, step, "nan") for step in range(3, 9)]
    config = survival.settings(store, tmp_path / "run", max_dropped_steps=4, num_samplers=1)
    code, said = survival.finish(survival.start(cluster, config, faults, tmp_path), 300)
    assert code == 1, said
    assert said.strip().splitlines()[-1].startswith("dngd: 4 steps in a row had non-finite gradients"), said
    assert "the run goes on" not in said


@pytest.mark.slow
def test_a_killed_driver_is_gone_on_with(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    """The same command again, with --resume; its workers died with the driver."""
    config = survival.settings(store, tmp_path / "run", epochs=6)
    survival.undisturbed([survival.settings(store, tmp_path / "straight", epochs=6)])
    per_epoch = json.loads((tmp_path / "straight" / "result.json").read_text())["steps"] // 6
    stop = [fault("backward", 0, 3 * per_epoch + 2, "stop")]
    driver = survival.start(cluster, config, stop, tmp_path)
    survival.wait_until(lambda: bool(survival.hits(tmp_path)), driver, 120)
    driver.kill()
    driver.wait()
    again = config.model_copy(update={"resume": True})
    code, said = survival.finish(survival.start(cluster, again, stop, tmp_path), 300)
    assert code == 0, said
    # The last checkpoint may have been on its way to the disk still.
    assert any(f"resumed from step {epoch * per_epoch} of {6 * per_epoch}" in said for epoch in (2, 3)), said
    survival.assert_same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
def test_a_worker_that_hangs_is_killed(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    """Its heart beats, and it keeps the other waiting: the same diagnosis, long before a collective's own limit."""
    survival.undisturbed([survival.settings(store, tmp_path / "straight")])
    faults = [fault("forward", 1, 7, "hold")]
    config = survival.settings(store, tmp_path / "run", ray={"stall_timeout_seconds": 8.0})
    code, said = survival.finish(survival.start(cluster, config, faults, tmp_path), 300)
    assert code == 0, said
    pid = (tmp_path / "hit" / survival.name(faults[0])).read_text()
    diagnosis = rf"rank 1 \(pid {pid} on \S+\) has kept the others waiting for \d+ s in phase forward of step 7: killed"
    assert re.search(diagnosis, said), said
    survival.assert_same_run(tmp_path / "run", tmp_path / "straight")
