"""Ctrl-C and SIGTERM for real: signals to processes that train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

import dngd
from dngd.graph import GraphStore
from dngd.train.metrics import read_metrics
from tests.helpers.ray_cluster import Cluster

SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"]
)

LONG = 4000
"""Epochs of a run that no test waits for."""


def arguments(store: GraphStore, run: Path, *more: str) -> list[str]:
    fields = ["--num-layers", "2", "--fanout", "5,5", "--hidden", "16", "--batch-size", "40", "--run-dir", str(run)]
    return ["train", "--dataset", str(store.path), *fields, *more]


def started(command: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    # A process group of its own, so that a signal can go to all of it, as a terminal's does.
    return subprocess.Popen(
        [sys.executable, "-m", "dngd.cli", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def wait_for_lines(process: subprocess.Popen[str], path: Path, count: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not (path.exists() and len(path.read_text().splitlines()) >= count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {count} evaluations after {seconds} s"
        time.sleep(0.05)


@SIGNALS
@pytest.mark.usefixtures("one_thread")  # sums round by the number of threads, which is to be that of the other process
def test_ctrl_c_ends_the_step_and_leaves_a_resumable_run(
    store: GraphStore, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    # A sampler process, which a terminal's Ctrl-C, and a scheduler's SIGTERM to all processes of a job, must not end
    # before. No checkpoint is due but theirs.
    options = ["--engine", "local", "--num-samplers", "1"]
    options += ["--set", "checkpoint.period_steps=1000000", "--set", "eval_period=1"]
    process = started(arguments(store, run, *options, "--epochs", str(LONG)), os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for_lines(process, run / "metrics.jsonl", 2, 120)
    others = psutil.Process(process.pid).children(recursive=True)
    assert len(others) >= 2, "a fork server and a sampler"
    for each in (*others, process):
        each.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code, said
    assert not psutil.wait_procs(others, timeout=60)[1], "samplers outlive the run"
    steps = [int(path.name.removeprefix("step-")) for path in (run / "checkpoints").iterdir()]
    assert len(steps) == 1, steps
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"dngd: interrupted after step {steps[0]} of ")
    assert last.endswith(f"go on with dngd train --run-dir {run} --resume")
    assert not (run / "result.json").exists()

    # Uninterrupted, the same steps give the same numbers, bit for bit.
    more = steps[0] + 5
    configuration = dngd.TrainConfig.from_yaml(run / "config.yaml")
    changed = configuration.model_dump() | {"max_steps": more, "eval_period": 1}
    dngd.Trainer(dngd.TrainConfig(**(changed | {"resume": True})), quiet=True).fit()
    whole = dngd.Trainer(dngd.TrainConfig(**(changed | {"run_dir": tmp_path / "whole"})), quiet=True).fit()
    resumed = read_metrics(run / "metrics.jsonl")
    assert whole.steps == more == resumed[-1].step
    values = [
        [(r.step, r.train_loss, r.val_loss, r.val_accuracy) for r in records] for records in (resumed, whole.history)
    ]
    assert values[0] == values[1]


@pytest.mark.slow
@SIGNALS
def test_a_second_ctrl_c_stops_at_once(store: GraphStore, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """The first waits for a step that takes an hour; the second does not."""
    run = tmp_path / "run"
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\n"
        "from dngd.cli import main\n"
        "from dngd.train.loop import TrainingLoop\n"
        "step = TrainingLoop._train_step\n"
        "def slow_step(self, *arguments):\n"
        "    if self.step == 3:\n"
        "        self.writer.settle(60)\n"  # a checkpoint still being written would be none
        "        print('in the step', flush=True)\n"
        "        time.sleep(3600)\n"
        "    return step(self, *arguments)\n"
        "TrainingLoop._train_step = slow_step\n"
        f"main({arguments(store, run, '--engine', 'local', '--set', 'checkpoint.period_steps=2')!r})\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(slow)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "in the step\n", process.communicate()
        process.send_signal(number)
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        told = next((line for line in process.stderr if name in line), "")
        assert "once more stops at once" in told
        assert process.poll() is None, "a first one waits for the step"
        process.send_signal(number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == code, said
    finally:
        process.kill()
    assert "--resume" in said
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000002"]


@pytest.mark.slow
@SIGNALS
def test_ctrl_c_reaches_the_workers_of_ray(
    store: GraphStore, tmp_path: Path, cluster: Cluster, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    command = arguments(store, run, "--num-workers", "2", "--num-shards", "2", "--address", cluster.gcs_address)
    options = ["--set", "checkpoint.period_steps=1000000", "--set", "checkpoint.period_minutes=null"]
    process = started([*command, *options, "--epochs", str(LONG)], cluster.environment)
    wait_for_lines(process, run / "metrics.jsonl", 1, 120)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=90)
    assert process.returncode == code, said
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert f"interrupted after step {step} of " in said.strip().splitlines()[-1]

    resumed = ["train", "--run-dir", str(run), "--resume", "--engine", "local", "--max-steps", str(step + 3)]
    done = started([*resumed, "--json"])
    out, said = done.communicate(timeout=60)
    assert done.returncode == 0, said
    assert f"resumed from step {step} " in said
    assert json.loads(out)["steps"] == step + 3
