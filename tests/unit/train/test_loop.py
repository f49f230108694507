"""What each step of the loop does, seen from inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dngd
from dngd.comm import FlatGradients, LocalCommunicator
from dngd.graph import GraphStore
from dngd.optim import NaturalGradient, learning_rate
from dngd.train import TrainingLoop, loop, prepare_run_folder
from dngd.train.evaluation import ExactEvaluator, Scores
from dngd.train.metrics import EvaluationRecord, MetricsLog, read_metrics
from dngd.train.progress import SilentReporter


def config(store: GraphStore, run_dir: Path, **changes: Any) -> dngd.TrainConfig:
    fields: dict[str, Any] = {
        "dataset": str(store.path),
        "engine": "local",
        "num_layers": 2,
        "fanout": (5, 5),
        "hidden": 16,
        "batch_size": 50,
        "epochs": 2,
        "num_workers": 2,
        "num_samplers": 0,
        "run_dir": run_dir,
    }
    return dngd.TrainConfig(**(fields | changes))


def run(configuration: dngd.TrainConfig) -> TrainingLoop:
    made = TrainingLoop(prepare_run_folder(configuration), LocalCommunicator(), SilentReporter())
    made.run()
    return made


def test_each_step_has_its_rate_its_seeds_and_mean_gradients(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float, bool]] = []
    original = NaturalGradient.step

    def recording(self: NaturalGradient, closure: None = None, **arguments: Any) -> None:
        seen.append((self.param_groups[0]["lr"], arguments["num_samples"], arguments["mean_gradients"]))
        original(self, closure, **arguments)

    monkeypatch.setattr(NaturalGradient, "step", recording)
    num_train = len(store.split("masks").train)
    made = run(config(store, tmp_path / "run", batch_size=50, warmup_steps=2))
    per_epoch = made.plan.steps_per_epoch
    rates = [learning_rate(step, 2 * per_epoch, 0.1, "cosine", 2) for step in range(2 * per_epoch)]
    assert [rate for rate, _, _ in seen] == rates
    sizes = [min(100, num_train - 100 * step) for step in range(per_epoch)]
    assert [n for _, n, _ in seen] == sizes * 2
    assert all(mean for _, _, mean in seen)


def test_train_loss_is_of_its_own_epoch(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[tuple[float, float]] = []
    original = FlatGradients.reduce_

    def recording(self: FlatGradients, communicator: Any) -> Any:
        out = original(self, communicator)
        sums.append((out.loss_sum, out.num_seeds))
        return out

    monkeypatch.setattr(FlatGradients, "reduce_", recording)
    made = run(config(store, tmp_path / "run"))
    half = made.plan.steps_per_epoch
    for record, part in zip(made.history, (sums[:half], sums[half:])):
        assert record.train_loss == pytest.approx(sum(s for s, _ in part) / sum(n for _, n in part))


def test_the_best_is_chosen_by_validation(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([(0.5, 0.9), (0.7, 0.6), (0.6, 0.95)])

    def scripted(self: ExactEvaluator, model: nn.Module, split: Any) -> dict[str, Scores]:
        val, test = next(script)
        return {"val": Scores(1.0, val), "test": Scores(1.0, test)}

    monkeypatch.setattr(ExactEvaluator, "scores", scripted)
    result = loop.run_rank(
        prepare_run_folder(config(store, tmp_path / "run", epochs=3)), LocalCommunicator(), SilentReporter()
    )
    assert (result.best_val_accuracy, result.test_accuracy) == (0.7, 0.6)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "kfac"])
def test_one_non_finite_step_changes_nothing(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """A NaN gradient with a finite loss: parameters and moments stay as they are."""
    original = FlatGradients.reduce_
    calls = 0

    def poisoned(self: FlatGradients, communicator: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            self._flat[3] = float("nan")
        return original(self, communicator)

    monkeypatch.setattr(FlatGradients, "reduce_", poisoned)
    weights: list[torch.Tensor] = []
    account = TrainingLoop._account

    def recording(self: TrainingLoop, sums: Any) -> None:
        weights.append(torch.cat([p.detach().flatten().clone() for p in self.model.parameters()]))
        account(self, sums)

    monkeypatch.setattr(TrainingLoop, "_account", recording)
    made = run(config(store, tmp_path / "run", optimizer=optimizer))
    assert made.dropped_steps == 1
    assert torch.equal(weights[1], weights[0])
    assert not torch.equal(weights[2], weights[1])
    assert all(torch.isfinite(w).all() for w in weights)


def test_resume_takes_its_own_best_model(store: GraphStore, tmp_path: Path) -> None:
    """A best model written after the last checkpoint belongs to a time line that is given up."""
    run_dir = tmp_path / "run"
    run(config(store, run_dir, epochs=1))
    kept = (run_dir / "model.safetensors").read_bytes()
    (run_dir / "model.safetensors").write_bytes(b"of a later step")
    run(config(store, run_dir, epochs=1, resume=True))
    assert (run_dir / "model.safetensors").read_bytes() == kept


def test_metrics_are_json_even_without_a_loss(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(EvaluationRecord(1.0, 3, float("nan"), 0.5, 0.6, 0.7, 1.0))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    [record] = read_metrics(tmp_path / "metrics.jsonl")
    assert record.train_loss != record.train_loss
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2.0, "st')
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
