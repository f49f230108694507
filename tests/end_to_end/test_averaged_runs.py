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
from dngd.train.plan import make_plan
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


def test_a_custom_optimizer_is_resumed_with_its_average(store: GraphStore, tmp_path: Path) -> None:
    def sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

    def run(folder: str, **changes: Any) -> dngd.RunResult:
        settings = config(store, tmp_path / folder, optimizer="custom", average_share=SHARE, **changes)
        return dngd.Trainer(settings, optimizer=sgd, quiet=True).fit()

    whole = run("whole")
    run("parts", max_steps=10)
    assert curve(run("parts", resume=True))[-1] == curve(whole)[-1]


def test_the_plan_has_one_more_copy(store: GraphStore, tmp_path: Path) -> None:
    plans = [
        make_plan(config(store, tmp_path, average_share=share), store, store.split("masks")) for share in (0.0, SHARE)
    ]
    assert plans[1].optimizer_bytes - plans[0].optimizer_bytes == plans[0].model_bytes // 2
