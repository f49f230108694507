"""Runs whose evaluated weights are an average: what is evaluated, kept and resumed, and that training is as without."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dngd
from dngd.graph import GraphStore
from dngd.optim import WeightAverage
from dngd.train import optimizers
from tests.end_to_end.test_local_runs import config, curve, fit
from tests.helpers.mutants import assert_caught

SHARE = 0.4


@pytest.mark.parametrize("optimizer", ["kfac", "adam"])
def test_training_is_as_without_and_evaluation_is_not(store: GraphStore, tmp_path: Path, optimizer: str) -> None:
    with_it = fit(config(store, tmp_path / "with", optimizer=optimizer, average_share=SHARE))
    without = fit(config(store, tmp_path / "without", optimizer=optimizer))
    assert [r.train_loss for r in with_it.history] == [r.train_loss for r in without.history]
    assert all(a.val_loss != b.val_loss for a, b in zip(with_it.history[1:], without.history[1:]))


def law_resume(store: GraphStore, folder: Path) -> None:
    whole = fit(config(store, folder / "whole", average_share=SHARE))
    fit(config(store, folder / "parts", average_share=SHARE, max_steps=10))
    rest = fit(config(store, folder / "parts", average_share=SHARE, resume=True))
    assert curve(rest)[-1] == curve(whole)[-1]
    assert whole.steps > 14


def test_resume_is_bitwise(store: GraphStore, tmp_path: Path) -> None:
    law_resume(store, tmp_path / "law")

    class Forgetful(WeightAverage):
        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            super().load_state_dict(state)
            self.steps = 0

    folders = (tmp_path / f"mutant-{number}" for number in itertools.count())
    assert_caught(lambda: law_resume(store, next(folders)), optimizers, "WeightAverage", Forgetful)


def test_what_is_kept_is_what_was_evaluated(store: GraphStore, tmp_path: Path) -> None:
    run = tmp_path / "run"
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(dngd.Callback):
        def on_evaluation(self, run: Any, record: Any) -> None:
            seen.append({name: tensor.clone() for name, tensor in run.model.state_dict().items()})

    trainer = dngd.Trainer(config(store, run, average_share=SHARE), callbacks=[Watch()], quiet=True)
    result = trainer.fit()
    assert trainer.evaluate()["val"]["accuracy"] == pytest.approx(result.best_val_accuracy, abs=1e-7)
    kept = load_file(run / "model.safetensors")
    at_best = [r.val_accuracy for r in result.history].index(result.best_val_accuracy)
    assert all(torch.equal(kept[name], tensor) for name, tensor in seen[at_best].items())


def test_shards_of_several_workers_have_one_average(store: GraphStore, tmp_path: Path) -> None:
    one = fit(config(store, tmp_path / "one", average_share=SHARE, num_shards=2))
    two = fit(config(store, tmp_path / "two", average_share=SHARE, num_shards=2, num_workers=2))
    assert curve(one) == curve(two)


def test_a_resumption_with_another_share_is_refused(store: GraphStore, tmp_path: Path) -> None:
    fit(config(store, tmp_path / "run", max_steps=4))
    with pytest.raises(dngd.UserError, match="cannot resume with another average_share"):
        fit(config(store, tmp_path / "run", average_share=SHARE, resume=True))


def test_buffers_are_averaged_and_training_keeps_its_own(store: GraphStore, tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self, shape: Any) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(shape.num_features)
            self.out = torch.nn.Linear(shape.num_features, shape.num_classes)

        def forward(self, batch: dngd.GraphBatch) -> torch.Tensor:
            out: torch.Tensor = self.out(self.norm(batch.x[: batch.seeds.numel()]))
            return out

    evaluated: list[float] = []
    between: list[float] = []

    class Watch(dngd.Callback):
        def on_step(self, run: Any) -> None:
            between.append(float(run.model.norm.running_mean[0]))

        def on_evaluation(self, run: Any, record: Any) -> None:
            evaluated.append(float(run.model.norm.running_mean[0]))

    settings = config(store, tmp_path / "run", model="custom", optimizer="adam", average_share=SHARE)
    trainer = dngd.Trainer(settings, module=Net, callbacks=[Watch()], quiet=True)
    trainer.fit()
    per_epoch = len(between) // len(evaluated)
    mean = 0.0
    for step, value in enumerate(between):
        mean += (value - mean) / (1 + SHARE * max(0, step - 5))
        if (step + 1) % per_epoch == 0:
            assert evaluated[step // per_epoch] == pytest.approx(mean, rel=1e-5)
    assert mean != pytest.approx(between[-1], rel=1e-3)
    assert float(load_file(tmp_path / "run" / "model.safetensors")["norm.running_mean"][0]) in evaluated
