"""dngd submit on a real Ray cluster with token authentication."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dngd.graph import GraphStore
from tests.helpers.ray_cluster import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

SECRET = "hunter2000-in-a-variable"


def command(cluster: Cluster, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "dngd.cli", "submit", "--address", cluster.jobs_address, *arguments]


def submit(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(cluster, *arguments), env=cluster.environment, capture_output=True, text=True, timeout=240
    )


def test_a_job_with_a_working_directory(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    """Its files go along, its log comes back, its run folder is where it was told to be, its secret is nowhere."""
    sent = tmp_path / "sent"
    sent.mkdir()
    config = {"dataset": str(store.path), "engine": "local", "num_layers": 2, "fanout": [5, 5], "batch_size": 30}
    (sent / "my.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    options = ["--working-dir", str(sent), "--env", f"SECRET={SECRET}"]
    done = submit(cluster, *options, "--", "train", "--config", "my.yaml", "--epochs", "1", "--run-dir", str(run))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"run folder  {run}" in done.stdout
    assert "succeeded" in done.stderr
    assert json.loads((run / "result.json").read_text())["epochs"] == 1
    assert SECRET not in done.stdout + done.stderr
    assert not any(SECRET.encode() in path.read_bytes() for path in run.rglob("*") if path.is_file())


def test_a_mistake_in_the_jobs_command(cluster: Cluster) -> None:
    done = submit(cluster, "--", "data", "info", "nowhere.store")
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    assert "dngd: " in done.stdout, "the sentence of the dngd that ran"
    assert "failed with exit code 2" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "variables",
    [{"RAY_AUTH_TOKEN": "0" * 64}, pytest.param({"RAY_AUTH_MODE": "disabled"}, marks=pytest.mark.slow)],
    ids=["wrong", "none"],
)
def test_without_the_clusters_token(cluster: Cluster, variables: dict[str, str]) -> None:
    started = time.monotonic()
    stranger = Cluster(cluster.gcs_address, cluster.jobs_address, cluster.environment | variables)
    done = submit(stranger, "--", "doctor")
    assert done.returncode == 2, done.stderr
    [sentence] = [line for line in done.stderr.splitlines() if line.startswith("dngd: ")]
    assert "token" in sentence
    assert "~/.ray/auth_token" in sentence
    assert "Traceback" not in done.stderr
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_and_a_stop_ends_it_well(cluster: Cluster, store: GraphStore, tmp_path: Path) -> None:
    """Not following is not stopping; stopping is a Ctrl-C for the job, not a kill."""
    run = tmp_path / "run"
    train = ["train", "--dataset", str(store.path), "--engine", "local", "--num-layers", "2", "--fanout", "5,5"]
    train += ["--batch-size", "20", "--epochs", "100000", "--run-dir", str(run), "--set", "checkpoint.period_steps=20"]
    follower = subprocess.Popen(
        command(cluster, "--submission-id", "long", "--", *train),
        env=cluster.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: bool(list((run / "checkpoints").glob("step-*"))))
        follower.send_signal(signal.SIGINT)
        _, err = follower.communicate(timeout=60)
    finally:
        follower.kill()
    assert follower.returncode == 130, err
    assert "job long goes on" in err
    steps = len((run / "metrics.jsonl").read_text())
    wait_for(lambda: len((run / "metrics.jsonl").read_text()) > steps)

    ray = str(Path(sys.executable).parent / "ray")
    at = ["--address", cluster.jobs_address]
    stopped = subprocess.run(
        [ray, "job", "stop", *at, "long"], env=cluster.environment, capture_output=True, text=True, timeout=120
    )
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    logs = subprocess.run(
        [ray, "job", "logs", *at, "long"], env=cluster.environment, capture_output=True, text=True, timeout=120
    )
    assert "dngd: interrupted" in logs.stdout, "the run had time to end well"


def wait_for(condition: object, seconds: float = 120) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)
