"""Runs whose steps' divergences are measured: what is measured, and that all else stays, resume too.

On several workers: test_ray_runs.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import dngd
from dngd.graph import GraphStore
from dngd.models import build_model
from dngd.optim import KLTrustRegion, NaturalGradient
from dngd.sampling import SamplerPipeline
from dngd.train import divergence
from dngd.train.batch import DeviceBatch, PropagationBuilder
from dngd.train.divergence import DivergenceMeter
from dngd.train.evaluate_run import evaluate_run
from dngd.train.optimizers import SecondOrder
from tests.end_to_end.test_local_runs import config, curve, fit
from tests.helpers.mutants import assert_caught

BOUND: dict[str, Any] = {"kl_bound": 0.05, "kl_bound_period": 3}


def test_due_steps_are_measured_exactly(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kept rows give the logits that the whole forward pass gives, before and after the step."""
    measured: list[tuple[int, float]] = []
    adapt = NaturalGradient.adapt_clip

    def spy(self: NaturalGradient, before: torch.Tensor | None, after: torch.Tensor | None) -> float:
        measured.append((self.preconditioner.steps - 1, adapt(self, before, after)))
        return measured[-1][1]

    noted: list[float] = []
    note = DivergenceMeter.note

    def check(self: DivergenceMeter, shard: int, batch: Any) -> None:
        note(self, shard, batch)
        if self.is_due:
            assert self._kept is not None
            assert self._kept.batch.first_aggregation is not None  # what takes longest is not read again
            assert len(self._kept.batch.propagations) == 1
            self._model.eval()
            with torch.no_grad():
                noted.append(float((self._forward(batch) - self._kept.before).abs().max()))
            self._model.train()

    monkeypatch.setattr(NaturalGradient, "adapt_clip", spy)
    monkeypatch.setattr(DivergenceMeter, "note", check)
    result = fit(config(store, tmp_path / "run", kfac=BOUND))
    due = [step for step in range(result.steps) if step % 3 == 0 or step & (step - 1) == 0]
    assert [step for step, _ in measured] == due
    assert all(value > 0 for _, value in measured)
    assert max(noted) == 0.0
    assert "divergence" in result.phase_ms
    without = fit(config(store, tmp_path / "without", kfac={"kl_clip": 3e-2}))
    assert "divergence" not in without.phase_ms


def test_some_of_a_shards_seeds_are_measured(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches them alone goes through the network again, and its logits are those of the whole batch."""
    measured: list[int] = []
    note = DivergenceMeter.note

    def check(self: DivergenceMeter, shard: int, batch: Any) -> None:
        note(self, shard, batch)
        if self.is_due:
            assert self._kept is not None
            part, logits, _ = self._kept
            places = [place * batch.seeds.numel() // 8 for place in range(8)]
            assert torch.equal(part.seeds, batch.seeds[places])
            self._model.eval()
            with torch.no_grad():
                assert torch.allclose(logits, self._forward(batch)[places], rtol=1e-4, atol=1e-5)
            self._model.train()
            measured.append(logits.shape[0])

    monkeypatch.setattr(divergence, "MEASURED_SEEDS", 8)
    monkeypatch.setattr(DivergenceMeter, "note", check)
    fit(config(store, tmp_path / "run", kfac=BOUND))
    assert len(measured) > 3
    assert set(measured) == {8}


def test_measuring_alone_changes_nothing(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a ratio that stays as it is, the run is the one with the clip that the region stands for."""
    monkeypatch.setattr(KLTrustRegion, "update", lambda self, measured, predicted: self.ratio)
    region = fit(config(store, tmp_path / "region", kfac={"kl_bound": 0.06, "kl_bound_steps": 10.0}))
    clip = fit(config(store, tmp_path / "clip", kfac={"kl_clip": 0.04}))
    assert curve(region) == curve(clip)


def law_resume(store: GraphStore, folder: Path) -> None:
    whole = fit(config(store, folder / "whole", kfac=BOUND))
    fit(config(store, folder / "parts", kfac=BOUND, max_steps=10))
    rest = fit(config(store, folder / "parts", kfac=BOUND, resume=True))
    assert curve(rest)[-1] == curve(whole)[-1]
    assert whole.steps > 14


def test_resume_is_bitwise(store: GraphStore, tmp_path: Path) -> None:
    law_resume(store, tmp_path / "law")
    from dngd.optim import state

    class Other:
        """No state has a ratio then, and a resumed run begins with the first one again."""

    folders = (tmp_path / f"mutant-{number}" for number in itertools.count())
    assert_caught(lambda: law_resume(store, next(folders)), state, "KLTrustRegion", Other)


@pytest.mark.parametrize("changes", [{"model": "sage"}, {"batch_size": "full", "fanout": None}], ids=str)
def test_other_models_and_full_batch(store: GraphStore, tmp_path: Path, changes: dict[str, Any]) -> None:
    result = fit(config(store, tmp_path / "run", kfac=BOUND, **changes))
    assert result.history[-1].train_loss < result.history[0].train_loss
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    ratio = float(load_file(newest / "curvature-shared.safetensors")["shared.kl_ratio"])
    assert 0.3 <= ratio <= 30.0
    assert ratio != 3.0


def test_a_modules_running_statistics_stay(store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that only measure run without training: they leave nothing in a BatchNorm."""

    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(store.num_features, store.num_classes)
            self.norm = torch.nn.BatchNorm1d(store.num_classes)

        def forward(self, graph: Any) -> torch.Tensor:
            return self.norm(self.linear(graph.x[: graph.seeds.numel()]))

    seen: list[int] = []
    logits = DivergenceMeter._logits

    def spy(self: DivergenceMeter, batch: Any, positions: torch.Tensor | None) -> torch.Tensor:
        self._model.linear.eval()  # as a callback may freeze a part
        norm = self._model.norm
        before = int(norm.num_batches_tracked)  # type: ignore[arg-type,union-attr]
        out = logits(self, batch, positions)
        assert int(norm.num_batches_tracked) == before  # type: ignore[arg-type,union-attr]
        assert (self._model.training, norm.training, self._model.linear.training) == (True, True, False)
        seen.append(before)
        return out

    monkeypatch.setattr(divergence.DivergenceMeter, "_logits", spy)
    dngd.Trainer(config(store, tmp_path / "run", kfac=BOUND, model="custom"), module=Normed(), quiet=True).fit()
    assert seen


@pytest.mark.parametrize(
    ("saved", "measured"),
    [
        ({"kl_clip": 0.03, "kl_bound": None}, False),
        ({"kl_clip": None, "kl_bound": None}, False),
        ({"kl_clip": 0.03, "kl_bound": 0.05}, True),
    ],
    ids=str,
)
def test_a_run_saved_when_the_clip_was_a_number_goes_on_with_it(
    store: GraphStore, tmp_path: Path, saved: dict[str, Any], measured: bool
) -> None:
    """Its whole config.yaml says what it was; it is resumed and evaluated as that, whatever the default is now."""
    straight = fit(config(store, tmp_path / "straight", epochs=3, kfac=saved))
    fit(config(store, tmp_path / "run", epochs=2, kfac=saved))
    held = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {name: held["kfac"][name] for name in saved} == saved
    again = dngd.TrainConfig(**(held | {"epochs": 3, "resume": True}))
    result = dngd.Trainer(again, quiet=True).fit()
    assert curve(result) == curve(straight)
    assert ("divergence" in result.phase_ms) == measured
    assert evaluate_run(tmp_path / "run")["val"]["accuracy"] == pytest.approx(result.best_val_accuracy)
    with pytest.raises(dngd.UserError, match=r"cannot resume with another kfac\.kl_(bound|clip)="):
        fit(config(store, tmp_path / "run", epochs=4, resume=True))


def test_a_loss_of_ones_own_is_refused(store: GraphStore, tmp_path: Path) -> None:
    def loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")

    with pytest.raises(dngd.UserError, match="leave kl_bound out"):
        dngd.Trainer(config(store, tmp_path / "run", kfac=BOUND), loss=loss, quiet=True).fit()
    clipped = dngd.Trainer(config(store, tmp_path / "run"), loss=loss, quiet=True)
    assert clipped.config.kl_clip == 3e-2
    assert "divergence" not in clipped.fit().phase_ms
    resumed = config(store, tmp_path / "run", epochs=3, resume=True)
    assert dngd.Trainer(resumed, loss=loss, quiet=True).fit().epochs == 3


def test_rows_that_a_step_aggregates_itself_are_kept(store: GraphStore) -> None:
    """As on a GPU that holds the feature table: the sampler brings no rows, the first layer makes them."""
    model = build_model("gcn", in_features=store.num_features, hidden=8, out_features=3, num_layers=2, dropout=0.5)
    pipeline = SamplerPipeline(store, store.split("masks").train, (5, 5), 0, 1, 40, [0], num_samplers=0, prefetch=0)
    batch = PropagationBuilder(store, model.aggregation, store.labels.device).batch(next(pipeline))
    pipeline.close()
    assert batch.first_aggregation is None

    def forward(given: DeviceBatch) -> torch.Tensor:
        logits: torch.Tensor = model(store.features, given.propagations, given.first_aggregation)
        return logits

    natural_gradient = NaturalGradient(model, kl_clip=KLTrustRegion())
    meter = DivergenceMeter(SecondOrder(natural_gradient), model, forward)
    with meter.watch(0):
        forward(batch)
    meter.note(0, batch)
    assert meter._kept is not None
    kept, logits, _ = meter._kept
    assert len(kept.propagations) == 1
    model.eval()
    assert torch.equal(logits, forward(batch))
    for shard in (1, 2):
        meter._kept = None
        with meter.watch(shard):
            forward(batch)
        meter.note(shard, batch)
        assert meter._kept is None
