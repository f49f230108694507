"""Runs whose workers meet with faults, beside the same run that meets none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dngd import TrainConfig
from dngd.comm import Communicator
from dngd.graph import GraphStore
from dngd.train import prepare_run_folder, run_rank
from dngd.train.progress import SilentReporter
from tests.helpers.ranks import run_ranks
from tests.helpers.ray_cluster import Cluster

Fault = dict[str, Any]

NOT_TIMES = ("epoch", "step", "train_loss", "val_loss", "val_accuracy", "test_accuracy")


def settings(store: GraphStore, run_dir: Path, **changes: Any) -> TrainConfig:
    """Two workers on the tests' graph; checkpoint settings and the preconditioner are the defaults."""
    fields: dict[str, Any] = {
        "dataset": str(store.path),
        "num_layers": 2,
        "fanout": (5, 5),
        "hidden": 24,
        "batch_size": 20,
        "epochs": 3,
        "num_workers": 2,
        "collective_timeout_seconds": 60.0,
        "run_dir": run_dir,
    }
    return TrainConfig(**(fields | changes))


def fault(phase: str, rank: int | None, step: int, action: str = "kill") -> Fault:
    return {"phase": phase, "rank": rank, "step": step, "action": action}


def name(fault: Fault) -> str:
    """The file that a fault leaves when it strikes."""
    return f"{fault['phase']}-{fault['rank']}-{fault['step']}"


def start(cluster: Cluster, config: TrainConfig, faults: list[Fault], folder: Path) -> subprocess.Popen[str]:
    """Start a driver whose workers meet with faults; they leave files in folder/hit."""
    (folder / "hit").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "faults.json").write_text(json.dumps(faults))
    environment = cluster.environment | {
        "DNGD_CACHE_DIR": os.environ["DNGD_CACHE_DIR"],
        "RAY_ADDRESS": cluster.gcs_address,
    }
    command = [sys.executable, "-m", "tests.helpers.fault_driver"]
    return subprocess.Popen(
        [*command, *(str(folder / name) for name in ("config.yaml", "faults.json", "hit"))],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(driver: subprocess.Popen[str], timeout: float) -> tuple[int, str]:
    """Return the driver's exit code and what it said."""
    try:
        _, said = driver.communicate(timeout=timeout)
    finally:
        driver.kill()
    return driver.returncode, said


def hits(folder: Path) -> set[str]:
    """The faults that struck, as PHASE-RANK-STEP."""
    return {path.name for path in (folder / "hit").iterdir()}


def undisturbed(configs: list[TrainConfig], world_size: int = 2) -> None:
    """Do runs on processes of their own, without Ray, that meet no fault."""
    prepared = [prepare_run_folder(config).model_dump(mode="json") for config in configs]
    run_ranks("tests.helpers.survival:train_rank", world_size, prepared)


def train_rank(communicator: Communicator, fields: dict[str, Any]) -> int:
    return run_rank(TrainConfig(**fields), communicator, SilentReporter()).steps


def assert_same_run(found: Path, expected: Path) -> None:
    """Bitwise: the best model, every tensor of the last checkpoint's model, optimizer and curvature, the curve."""
    _assert_same_tensors(found / "model.safetensors", expected / "model.safetensors")
    last, its = (sorted((run / "checkpoints").glob("step-*"))[-1] for run in (found, expected))
    assert last.name == its.name
    files = {path.name for path in its.glob("*.safetensors")}
    assert {"model.safetensors", "optimizer.safetensors"} <= files
    assert {path.name for path in last.glob("*.safetensors")} == files
    for name in sorted(files):
        _assert_same_tensors(last / name, its / name)
    assert curve(found) == curve(expected)


def _assert_same_tensors(found: Path, expected: Path) -> None:
    """The order of a file's metadata is not fixed: their content is compared."""
    with safe_open(found, "pt") as ours, safe_open(expected, "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
        assert set(ours.keys()) == set(theirs.keys())
        for key in ours.keys():  # noqa: SIM118 - not a mapping
            # Whether an input has come before is found out anew after a start, and who inverts what follows measured
            # times: no number of the training rests on either here.
            if key.startswith(("local.constant.", "local.input.")) or key == "shared.plan":
                continue
            assert torch.equal(ours.get_tensor(key), theirs.get_tensor(key)), f"{found.name}: {key}"


def curve(run: Path) -> list[list[float]]:
    """metrics.jsonl, without its times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[key] for key in NOT_TIMES] for line in lines]


def wait_until(reached: Callable[[], bool], driver: subprocess.Popen[str], timeout: float) -> None:
    """Wait for something that a driver's run does; fail if it ends before, or takes too long."""
    deadline = time.monotonic() + timeout
    while not reached():
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline, f"not reached within {timeout:.0f} s"
        time.sleep(0.2)


def wait_for_cpus(cluster: Cluster, number: int) -> None:
    """Wait until all nodes of a cluster have joined."""
    script = "import ray, sys, time; ray.init(logging_level='ERROR', log_to_driver=False)\n"
    script += f"while ray.cluster_resources().get('CPU', 0) < {number}: time.sleep(0.5)\n"
    environment = cluster.environment | {"RAY_ADDRESS": cluster.gcs_address}
    subprocess.run([sys.executable, "-c", script], env=environment, timeout=90, check=True)
