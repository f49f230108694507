"""Whole runs on a real Ray cluster with token authentication."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dngd
from dngd.graph import GraphStore
from tests.helpers.ray_cluster import NUM_CPUS, Cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SMALL = ["--num-layers", "2", "--fanout", "5,5", "--hidden", "24", "--batch-size", "20", "--epochs", "3"]


def dngd_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dngd.cli", *arguments]


def run(cluster: Cluster, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = cluster.environment | {"DNGD_CACHE_DIR": os.environ["DNGD_CACHE_DIR"]}
    return subprocess.run(dngd_command(*arguments), env=environment, capture_output=True, text=True, timeout=timeout)


def test_two_workers_give_the_run_of_two_shards(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    """Through `ray job submit`, as a user does it; the local engine runs the same two shards. With a measured KL bound:
    one worker alone has the shard that is measured, and both go by it. The data set is named as it is seen from the
    driver's working directory, which is not the workers'."""
    common = ["train", "--dataset", store.path.name, *SMALL, "--num-workers", "2", "--set", "kfac.kl_bound=0.05"]
    submit = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", cluster.jobs_address, "--"]
    done = subprocess.run(
        [*submit, "env", "-C", str(store.path.parent), *dngd_command(*common, "--run-dir", str(tmp_path / "ray"))],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "run folder" in done.stdout, "the job's log reaches the user"
    found = json.loads((tmp_path / "ray" / "result.json").read_text())
    assert found["world_size"] == 2
    assert all(found["bytes"][kind] > 0 for kind in ("gradient", "factor"))
    assert found["bytes"]["inverse"] == 0, "so small a model's inverses would exceed the traffic budget: both invert"
    assert (tmp_path / "ray" / "report.html").exists()

    config = dngd.TrainConfig.from_yaml(
        tmp_path / "ray" / "config.yaml", {"engine": "local", "run_dir": tmp_path / "l"}
    )
    local = dngd.Trainer(config, quiet=True).fit()
    lines = [json.loads(line) for line in (tmp_path / "ray" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line, record in zip(lines, local.history):
        assert line["train_loss"] == pytest.approx(record.train_loss, rel=1e-3)
        assert line["val_loss"] == pytest.approx(record.val_loss, rel=1e-3)


@pytest.mark.slow
def test_killed_worker_then_resume_on_one_process(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    """Where no failure may be recovered from, kill -9 of a worker ends the run with a sentence; --resume goes on, here
    with another world size. (Recovery: test_survival.py.)"""
    arguments = ["train", "--dataset", str(store.path), *SMALL[:-2], "--epochs", "2000", "--num-workers", "2"]
    arguments += [
        "--set",
        "checkpoint.period_steps=20",
        "--set",
        "eval_period=1000",
        "--set",
        "ray.max_failures=0",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    environment = cluster.environment | {"DNGD_CACHE_DIR": os.environ["DNGD_CACHE_DIR"]}
    driver = subprocess.Popen(
        [*dngd_command(*arguments), "--address", cluster.gcs_address],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < deadline, "no checkpoint after 120 s"
            time.sleep(0.2)
        os.kill(worker_pids(cluster)[0], signal.SIGKILL)
        _, err = driver.communicate(timeout=180)
    finally:
        driver.kill()
    assert driver.returncode == 1, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("dngd: rank "), err
    assert "was lost" in last
    assert last.endswith("go on with --resume")
    assert "Traceback" not in err
    config = dngd.TrainConfig.from_yaml(
        tmp_path / "run" / "config.yaml", {"engine": "local", "resume": True, "epochs": 2000}
    )
    at = int(sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1].name.removeprefix("step-"))
    result = dngd.Trainer(config.model_copy(update={"max_steps": at + 3}), quiet=True).fit()
    assert result.steps == at + 3


def worker_pids(cluster: Cluster) -> list[int]:
    """Return the processes of the cluster's Ray Train workers that are in the training function."""
    token = b"RAY_AUTH_TOKEN=" + cluster.environment["RAY_AUTH_TOKEN"].encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes()
                if token not in (folder / "environ").read_bytes().split(b"\0"):
                    continue  # another cluster of this machine
            except OSError:
                continue
            if (
                command.startswith(b"ray::RayTrainWorker")
                or b"ray::_RayTrainWorker" in command
                or b"TrainWorker" in command
            ):
                found.append(int(folder.name))
    assert found, "no Ray Train worker is running"
    return sorted(found)


def test_more_workers_than_cpus(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    started = time.monotonic()
    arguments = ["--address", cluster.gcs_address, "--run-dir", str(tmp_path / "run")]
    arguments += ["--set", "ray.start_timeout_seconds=5"]
    done = run(cluster, "train", "--dataset", str(store.path), *SMALL, "--num-workers", "9", *arguments)
    assert done.returncode == 2, done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert "9 workers need 9 CPUs" in sentence
    assert f"the cluster has {NUM_CPUS} CPUs" in sentence
    assert f"--num-workers {NUM_CPUS} or less" in sentence
    assert time.monotonic() - started < 60


def test_gpu_workers_without_gpus(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    arguments = ["--address", cluster.gcs_address, "--run-dir", str(tmp_path / "run"), "--use-gpu"]
    arguments += ["--set", "ray.start_timeout_seconds=5"]
    done = run(cluster, "train", "--dataset", str(store.path), *SMALL, "--num-workers", "1", *arguments)
    assert done.returncode == 2, done.stderr
    assert "0 GPUs" in done.stderr
    assert "leave out --use-gpu" in done.stderr


def test_unreachable_cluster(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    for address, said in (("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"), ("nonsense", "HOST:PORT")):
        done = run(
            cluster,
            "train",
            "--dataset",
            str(store.path),
            *SMALL,
            "--address",
            address,
            "--run-dir",
            str(tmp_path / "r"),
        )
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_wrong_token(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    stranger = Cluster(cluster.gcs_address, "", cluster.environment | {"RAY_AUTH_TOKEN": "0" * 64})
    arguments = ["--address", cluster.gcs_address, "--run-dir", str(tmp_path / "run")]
    done = run(stranger, "train", "--dataset", str(store.path), *SMALL, *arguments)
    assert done.returncode == 2, done.stderr
    assert "token" in done.stderr
    assert "Traceback" not in done.stderr
