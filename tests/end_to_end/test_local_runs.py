"""Whole runs in this process: outputs, determinism, resume, kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dngd
from dngd.comm import LocalCommunicator
from dngd.graph import GraphStore
from dngd.optim import KLTrustRegion, NaturalGradient, value_at
from dngd.report.run_files import read_run
from dngd.train import checkpoint
from dngd.train.evaluate_run import evaluate_run
from dngd.train.metrics import read_metrics
from dngd.train.progress import SilentReporter

RESULT_KEYS = {
    "best_val_accuracy",
    "test_accuracy",
    "train_seconds",
    "seconds_to_best_val",
    "steps",
    "epochs",
    "world_size",
    "seeds_per_second",
    "step_ms",
    "phase_ms",
    "bytes",
    "peak_rss_bytes",
    "peak_gpu_bytes",
    "versions",
}
METRIC_KEYS = ["epoch", "step", "train_loss", "val_loss", "val_accuracy", "test_accuracy", "train_seconds"]


def config(store: GraphStore, run_dir: Path, **changes: Any) -> dngd.TrainConfig:
    fields: dict[str, Any] = {
        "dataset": str(store.path),
        "engine": "local",
        "num_layers": 2,
        "fanout": (5, 5),
        "hidden": 24,
        "batch_size": 40,
        "epochs": 3,
        "num_samplers": 0,
        "run_dir": run_dir,
    }
    return dngd.TrainConfig(**(fields | changes))


def curve(result: dngd.RunResult) -> list[tuple[float, ...]]:
    return [(r.train_loss, r.val_loss, r.val_accuracy, r.test_accuracy) for r in result.history]


def fit(configuration: dngd.TrainConfig) -> dngd.RunResult:
    return dngd.Trainer(configuration, quiet=True).fit()


@pytest.mark.parametrize("optimizer", ["kfac", "adam", "adamw", "sgd"])
@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_every_model_and_optimizer_learns(store: GraphStore, tmp_path: Path, model: str, optimizer: str) -> None:
    result = fit(config(store, tmp_path / "run", model=model, optimizer=optimizer, epochs=4))
    majority = float(torch.bincount(store.labels).max()) / store.num_nodes
    assert result.history[-1].train_loss < result.history[0].train_loss
    assert result.best_val_accuracy > majority + 0.1


def test_the_run_folder(store: GraphStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = fit(config(store, run))
    written = json.loads((run / "result.json").read_text())
    assert written.keys() >= RESULT_KEYS
    assert written["step_ms"].keys() >= {"p50", "p99"}
    assert written["bytes"].keys() == {"gradient", "factor", "inverse"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [METRIC_KEYS] * 3
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert written["best_val_accuracy"] == max(line["val_accuracy"] for line in lines)
    best = max(lines, key=lambda line: line["val_accuracy"])
    assert written["test_accuracy"] == best["test_accuracy"]
    assert written["seconds_to_best_val"] == best["train_seconds"]
    assert dngd.TrainConfig.from_yaml(run / "config.yaml") == config(store, run, num_shards=1)
    assert (run / "report.html").stat().st_size > 1000
    assert len(list((run / "checkpoints").iterdir())) == 3
    scores = evaluate_run(run)
    assert scores["val"]["accuracy"] == result.best_val_accuracy
    assert scores["test"]["accuracy"] == result.test_accuracy


class Kept(dngd.Callback):
    """Keeps the optimizer that a run made."""

    def on_start(self, run: dngd.RunState) -> None:
        self.optimizer = run.optimizer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kfac": {"damping": 0.02, "kl_clip": 0.5, "output_rank": 8, "fisher": "ggn"}, "lr": 0.05},
        {"kfac": {"update": "adam_eigenbasis"}, "num_workers": 2, "batch_size": 20},
        {"kfac": {"damping_mode": "tikhonov", "update": "momentum"}, "batch_size": "full", "fanout": None},
        {"optimizer": "adam", "num_samplers": 1, "checkpoint": {"period_steps": 4}},
    ],
    ids=str,
)
def test_the_result_has_the_values_that_defaults_stood_for(
    store: GraphStore, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Those with which the optimizer was made; the configuration stays as it was given."""
    given, kept = config(store, tmp_path / "run", epochs=1, **changes), Kept()
    result = dngd.Trainer(given, quiet=True, callbacks=[kept]).fit()
    found = json.loads((tmp_path / "run" / "result.json").read_text())["resolved"]
    assert found == result.resolved
    assert dngd.TrainConfig.from_yaml(tmp_path / "run" / "config.yaml") == given.model_copy(
        update={"num_shards": given.num_workers}
    )
    assert (found["total_steps"], found["steps_per_epoch"]) == (result.steps, result.steps)
    assert found["seeds_per_step"] == {40: 40, 20: 40, "full": 240}[given.batch_size]
    assert (found["num_samplers"], found["metric"]) == (given.num_samplers, "accuracy")
    assert found["feature_placement"] == "memory_map"
    assert found["checkpoint.period_steps"] == (
        50 if given.batch_size == "full" else given.checkpoint.period_steps or result.steps
    )
    if given.optimizer != "kfac":
        assert not any(name.startswith("kfac.") for name in found)
        assert found["lr"] == 0.01
        return
    used = kept.optimizer
    assert isinstance(used, NaturalGradient)
    curvature = used.preconditioner
    assert (found["kfac.momentum"], found["kfac.damping"]) == (used.momentum, curvature.damping)
    assert (found["kfac.fisher"], found["kfac.damping_mode"]) == (curvature.capture.fisher, curvature.damping_mode)
    if found["kfac.damping_mode"] == "relative":
        assert found["kfac.damping_g"] == curvature.damping * curvature.damping_g_ratio
    else:
        assert "kfac.damping_g" not in found
    if found["kfac.kl_bound"] is not None:
        assert isinstance(curvature.kl_clip, KLTrustRegion)
        assert found["kfac.kl_clip"] is None
    elif found["kfac.kl_clip"] is None:
        assert curvature.kl_clip is None
    else:
        assert value_at(curvature.kl_clip, 0) == found["kfac.kl_clip"]


def test_two_runs_of_one_seed_are_bitwise_the_same(store: GraphStore, tmp_path: Path) -> None:
    """Whatever the number of samplers; and another seed is another run."""
    runs = {
        n: fit(config(store, tmp_path / f"samplers-{n}", num_samplers=n, num_workers=2, batch_size=20))
        for n in (0, 1, 2)
    }
    assert curve(runs[0]) == curve(runs[1]) == curve(runs[2])
    models = [(tmp_path / f"samplers-{n}" / "model.safetensors").read_bytes() for n in runs]
    assert models[0] == models[1] == models[2]
    other = fit(config(store, tmp_path / "other", seed=1, num_workers=2, batch_size=20))
    assert curve(other) != curve(runs[0])


@pytest.mark.parametrize(
    ("changes", "seeds_a_shard"), [({}, 240), ({"num_workers": 7}, 35), ({"semi": "two_means"}, 240 + 360)]
)
def test_the_default_batch_size_fits_any_graph(
    store: GraphStore, tmp_path: Path, changes: dict[str, Any], seeds_a_shard: int
) -> None:
    """Of 240 training nodes a step takes all, one step an epoch, and says so; of others' numbers that is asked for.

    Seven shards of them hold 34 or 35 nodes; semi-supervised steps take the 360 nodes without a label, too.
    """
    fields = config(store, tmp_path / "default").model_dump(exclude_unset=True) | changes
    del fields["batch_size"]
    said: list[str] = []

    class Told(SilentReporter):
        def message(self, text: str) -> None:
            said.append(text)

    result = dngd.Trainer(dngd.TrainConfig(**fields), reporter=Told()).fit()
    assert result.resolved["batch_size"] == seeds_a_shard
    assert result.resolved["steps_per_epoch"] == 1
    assert any("fewer nodes to train on than the default batch_size, 1024: a step takes all" in text for text in said)
    if not changes:
        given = fit(config(store, tmp_path / "given", batch_size=240))
        assert curve(given) == curve(result)
    resumed = dngd.Trainer(dngd.TrainConfig(**(fields | {"epochs": 3, "resume": True})), quiet=True).fit()
    assert curve(resumed) == curve(result)


def test_the_callers_random_state_is_kept(store: GraphStore, tmp_path: Path) -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    fit(config(store, tmp_path / "run", epochs=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("optimizer", ["kfac", "adam"])
@pytest.mark.parametrize("stop_at", [7, 20])
def test_resume_equals_never_having_stopped(store: GraphStore, tmp_path: Path, optimizer: str, stop_at: int) -> None:
    """Stopped in the middle of an epoch, with inverses under way; bitwise."""
    settings: dict[str, Any] = {
        "optimizer": optimizer,
        "kfac": {"inverse_update_period": 6, "inverse_delay": 5, "dense_steps": 2, "factor_update_period": 3},
        "checkpoint": {"period_steps": 5},
        "epochs": 5,
    }
    straight = fit(config(store, tmp_path / "straight", **settings))
    stopped = tmp_path / "stopped"
    fit(config(store, stopped, max_steps=stop_at, **settings))
    # A run cut short evaluates where it stopped; the straight one did not.
    resumed = fit(config(store, stopped, resume=True, **settings))
    by_step = {record.step: record for record in resumed.history}
    for record in straight.history:
        found = by_step[record.step]
        assert (found.train_loss, found.val_loss, found.test_accuracy) == (
            record.train_loss,
            record.val_loss,
            record.test_accuracy,
        )
    assert resumed.steps == straight.steps
    assert [r.step for r in read_metrics(stopped / "metrics.jsonl")] == sorted(by_step)


def test_a_finished_run_can_be_resumed(store: GraphStore, tmp_path: Path) -> None:
    first = fit(config(store, tmp_path / "run"))
    written = (tmp_path / "run" / "result.json").read_bytes()
    again = fit(config(store, tmp_path / "run", resume=True))
    assert (tmp_path / "run" / "result.json").read_bytes() == written, "its times are of the run itself"
    assert curve(again) == curve(first)
    assert again.best_val_accuracy == first.best_val_accuracy


def test_a_finished_run_that_is_gone_on_with_is_unfinished_until_its_end(store: GraphStore, tmp_path: Path) -> None:
    """From the first step on, before there is an evaluation or checkpoint beyond its result.json."""
    run = tmp_path / "run"
    first = fit(config(store, run, epochs=1))
    assert read_run(run, "run").finished

    class Leave(dngd.Callback):
        def on_step(self, state: dngd.RunState) -> None:
            raise dngd.UserError("enough")

    with pytest.raises(dngd.UserError, match="enough"):
        dngd.Trainer(config(store, run, epochs=2, resume=True), quiet=True, callbacks=[Leave()]).fit()
    assert not read_run(run, "run").finished
    assert json.loads((run / "result.json").read_bytes())["step_ms"] == first.step_ms, "its numbers are not lost"
    assert fit(config(store, run, epochs=1, resume=True)).step_ms == first.step_ms
    assert read_run(run, "run").finished
    second = fit(config(store, run, epochs=2, resume=True))
    assert read_run(run, "run").finished
    assert (first.measured_from_step, second.measured_from_step) == (0, first.steps), (
        "milliseconds are of the last part"
    )


KILLED_WRITER = """
import os, signal, sys
import dngd
from dngd.train import checkpoint

survive, point = int(sys.argv[2]), sys.argv[3]
calls = 0
original = getattr(checkpoint, point) if point != "replace" else os.replace

def killing(*arguments):
    global calls
    is_checkpoint = "checkpoints" in str(arguments[0])
    calls += is_checkpoint
    if is_checkpoint and calls > survive:
        if point == "write_flushed":
            with open(arguments[0], "wb") as file:
                file.write(arguments[1][: len(arguments[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

if point == "replace":
    os.replace = killing
else:
    setattr(checkpoint, point, killing)
dngd.Trainer(dngd.TrainConfig.from_yaml(__import__("pathlib").Path(sys.argv[1])), quiet=True).fit()
"""


@pytest.mark.parametrize(
    ("point", "survive"),
    # files a checkpoint: model, optimizer, average, shared curvature, one rank's, best model, state.json
    [
        pytest.param("write_flushed", 7, marks=pytest.mark.slow),
        pytest.param("write_flushed", 9, marks=pytest.mark.slow),
        pytest.param("write_flushed", 10, marks=pytest.mark.slow),
        ("write_flushed", 13),
        ("replace", 1),
        ("flush_folder", 3),
    ],
)
def test_kill_during_a_checkpoint_write(store: GraphStore, tmp_path: Path, point: str, survive: int) -> None:
    """SIGKILL in the middle of the second checkpoint; --resume goes on from a good one, on the same curve."""
    straight = fit(config(store, tmp_path / "straight", average_share=0.3))
    run = tmp_path / "killed"
    settings = tmp_path / "config.yaml"
    settings.write_text(config(store, run, average_share=0.3).to_yaml())
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, str(settings), str(survive), point], timeout=120, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    complete = {p.name for p in (run / "checkpoints").glob("step-*")}
    # The fourth flush is of the folder that the second checkpoint was just renamed into.
    assert complete == {"step-00000006"} | ({"step-00000012"} if point == "flush_folder" else set())
    resumed = fit(config(store, run, average_share=0.3, resume=True))
    assert curve(resumed) == curve(straight)
    assert not list((run / "checkpoints").glob(".writing-*")), "left-overs stay behind"


def test_a_damaged_checkpoint_is_passed_over(store: GraphStore, tmp_path: Path) -> None:
    straight = fit(config(store, tmp_path / "straight"))
    run = tmp_path / "run"
    fit(config(store, run, max_steps=13))
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    resumed = fit(config(store, run, resume=True))
    by_step = {record.step: record.val_loss for record in resumed.history}
    assert all(by_step[record.step] == record.val_loss for record in straight.history)


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b'{"step": 1}', b"[" * 100_000, None])
def test_a_damaged_state_file_is_passed_over(store: GraphStore, tmp_path: Path, content: bytes | None) -> None:
    """None: a plausible change of one number, which only a checksum sees."""
    run = tmp_path / "run"
    fit(config(store, run))
    newest = sorted((run / "checkpoints").iterdir())[-1] / "state.json"
    newest.write_bytes(newest.read_bytes().replace(b'"step": 18', b'"step": 12') if content is None else content)
    snapshot, skipped = checkpoint.CheckpointFolder(run / "checkpoints", LocalCommunicator(), keep=3).load_newest()
    assert snapshot is not None
    assert snapshot.step == 12
    assert len(skipped) == 1


def test_all_checkpoints_damaged_is_refused(store: GraphStore, tmp_path: Path) -> None:
    """Starting again by itself would throw the run away."""
    run = tmp_path / "run"
    fit(config(store, run))
    for folder in (run / "checkpoints").iterdir():
        (folder / "state.json").write_text("{")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(dngd.UserError, match="damaged"):
        fit(config(store, run, resume=True))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_another_model_is_refused_before_the_first_checkpoint(store: GraphStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(config(store, run, epochs=1))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(dngd.UserError, match="hidden=32"):
        fit(config(store, run, epochs=1, hidden=32, resume=True))


def test_negative_edge_weights_are_refused_for_gcn(store: GraphStore, tmp_path: Path) -> None:
    signed = GraphStore.write(
        tmp_path / "signed",
        name="signed",
        indptr=store.indptr,
        indices=store.indices,
        edge_weight=torch.full((store.num_edges,), -1.0),
        features=store.features,
        labels=store.labels,
        masks=store.split_masks,
    )
    with pytest.raises(dngd.UserError, match="weights"):
        fit(config(signed, tmp_path / "run"))


def test_mutant_unverified_checkpoint_is_caught(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its sha256 check the damaged weight would go into the run."""
    monkeypatch.setattr(checkpoint, "digest", lambda data: "same")
    with pytest.raises(AssertionError):
        test_a_damaged_checkpoint_is_passed_over(store, tmp_path)


def test_nothing_to_resume_starts_from_the_beginning(store: GraphStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(config(store, run, epochs=1))
    shutil.rmtree(run / "checkpoints")
    (run / "result.json").unlink()
    (run / "checkpoints").mkdir()  # killed before its first checkpoint
    assert [r.step for r in fit(config(store, run, epochs=1, resume=True)).history] == [6]
    assert len(read_metrics(run / "metrics.jsonl")) == 1


def test_full_batch_and_all_neighbours(store: GraphStore, tmp_path: Path) -> None:
    """--batch-size full is one step an epoch; with fanout -1 training sees exact evaluation's operator."""
    settings: dict[str, Any] = {"batch_size": "full", "fanout": (-1, -1), "dropout": 0.0, "optimizer": "sgd"}
    result = fit(config(store, tmp_path / "run", epochs=5, lr=1e-9, **settings))
    assert result.steps == 5
    exact = evaluate_run(tmp_path / "run")["train"]["loss"]
    assert [record.train_loss for record in result.history] == pytest.approx([exact] * 5, rel=1e-5)


def test_a_nan_feature_at_run_time_is_dropped_not_learnt(store: GraphStore, tmp_path: Path) -> None:
    """Steps with non-finite gradients are dropped and counted; after ten in a row training stops, clearly."""
    damaged = tmp_path / "damaged"
    shutil.copytree(store.path, damaged)
    entry = store.manifest.files["features.arrow"]
    with (damaged / "features.arrow").open("r+b") as file:
        file.seek(entry.data_offset)
        file.write(b"\xff" * (4 * store.num_nodes * store.num_features))
    store = GraphStore.open(damaged)
    assert store.features.isnan().all()
    with pytest.raises(dngd.TrainingError, match="10 steps in a row"):
        fit(config(store, tmp_path / "run"))


def test_command_line_json(store: GraphStore, tmp_path: Path) -> None:
    """--json prints result.json on standard output, nothing else there."""
    command = [sys.executable, "-m", "dngd.cli", "train", "--dataset", str(store.path), "--engine", "local"]
    command += ["--num-layers", "2", "--fanout", "5,5", "--hidden", "16", "--batch-size", "60", "--epochs", "1"]
    command += ["--run-dir", str(tmp_path / "run"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).keys() >= RESULT_KEYS
    assert "val acc" in done.stderr
