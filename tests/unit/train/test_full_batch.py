"""`--batch-size full` in the loop: one constant step an epoch, with and without unlabelled seeds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dngd
from dngd import cli
from dngd.comm import LocalCommunicator
from dngd.graph import GraphStore
from dngd.train import TrainingLoop, make_plan, prepare_run_folder, sources
from dngd.train.batch import PropagationBuilder
from dngd.train.full_batch import FullBatches
from dngd.train.plan import check_fits
from dngd.train.progress import SilentReporter
from tests.laws.test_full_batch_laws import direct_loss

NUM_TRAIN = 240
"""Of the fixture `store`, of 600 nodes."""


def config(store: GraphStore, run_dir: Path | None = None, **changes: Any) -> dngd.TrainConfig:
    fields: dict[str, Any] = {
        "dataset": str(store.path),
        "engine": "local",
        "num_layers": 2,
        "hidden": 16,
        "batch_size": "full",
        "epochs": 4,
        "optimizer": "adam",
        "num_samplers": 0,
        "run_dir": run_dir,
    }
    return dngd.TrainConfig(**(fields | changes))


def prepare(configuration: dngd.TrainConfig) -> TrainingLoop:
    return TrainingLoop(prepare_run_folder(configuration), LocalCommunicator(), SilentReporter())


def curve(result: dngd.RunResult) -> list[float]:
    return [value for r in result.history for value in (r.train_loss, r.val_loss)]


def test_all_neighbours_is_the_default(store: GraphStore) -> None:
    full = config(store)
    assert full.fanouts == (-1, -1)
    assert full.constant_full_batch
    assert full.identity()["fanout"] == [-1, -1]
    sampled = config(store, fanout=(5, -1))
    assert sampled.fanouts == (5, -1)
    assert not sampled.constant_full_batch
    assert not config(store, batch_size=10, fanout=(-1, -1)).constant_full_batch
    assert config(store, batch_size=10).fanouts == (15, 10)


def test_what_defines_a_run(store: GraphStore) -> None:
    assert "semi_gamma" not in config(store).identity()
    identity = config(store, semi="pooled", semi_gamma=2).identity()
    assert (identity["semi"], identity["semi_gamma"]) == ("pooled", 2)


@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_the_curve_is_that_of_the_sampled_pipeline(store: GraphStore, tmp_path: Path, model: str) -> None:
    """One shard of all training nodes, all neighbours drawn: the same work in another order."""
    settings: dict[str, Any] = {"model": model, "dropout": 0.0, "num_layers": 3, "fanout": (-1, -1, -1)}
    sampled = prepare(config(store, tmp_path / "sampled", batch_size=NUM_TRAIN, **settings)).run()
    constant = prepare(config(store, tmp_path / "constant", **settings)).run()
    assert curve(constant) == pytest.approx(curve(sampled), rel=1e-4)
    assert (constant.steps, constant.epochs) == (4, 4)


@pytest.mark.parametrize("semi", ["none", "two_means", "pooled"])
def test_shards_do_not_change_the_curve(store: GraphStore, tmp_path: Path, semi: str) -> None:
    runs = [
        prepare(config(store, tmp_path / str(shards), num_shards=shards, dropout=0.0, semi=semi)).run()
        for shards in (1, 2, 7)
    ]
    for other in runs[1:]:
        assert curve(other) == pytest.approx(curve(runs[0]), rel=1e-4)


def test_one_tensor_is_every_steps_first_input(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The curvature knows a constant input by its identity and version; and no sampler is started."""
    monkeypatch.setattr(sources, "SamplerPipeline", None)
    made = prepare(config(store, tmp_path / "run"))
    seen: list[tuple[Tensor, int]] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if made.model.training:
            seen.append((inputs[0], inputs[0]._version))

    made.model.graph_layers()[0].linear.register_forward_pre_hook(record)
    made.run()
    assert len(seen) == 4
    assert all(tensor is seen[0][0] and version == seen[0][1] for tensor, version in seen)
    assert not seen[0][0].requires_grad


class Recorder:
    """Stands before the loop's optimizer and keeps what it is told."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.observed: list[tuple[Tensor, Tensor | None, int]] = []
        self.counts: list[float] = []
        self.factor_samples: list[float | None] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def observe(self, logits: Tensor, *, weights: Tensor | None, key: int) -> None:
        assert logits.grad_fn is not None, "the graph must still be there"
        self.observed.append((logits.detach().clone(), weights, key))
        self._inner.observe(logits, weights=weights, key=key)

    def step(self, *, num_seeds_here: float, finite: bool, factor_samples: float | None = None) -> None:
        self.counts.append(num_seeds_here)
        self.factor_samples.append(factor_samples)
        self._inner.step(num_seeds_here=num_seeds_here, finite=finite, factor_samples=factor_samples)


@pytest.mark.parametrize("semi", ["two_means", "pooled"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_reported_loss_is_the_formulas(store: GraphStore, tmp_path: Path, semi: str, shards: int) -> None:
    """From the steps' own logits, dropout included; λ_u = (t/epochs)², t = 1, 2, ...."""
    made = prepare(config(store, tmp_path / "run", semi=semi, semi_gamma=2, num_shards=shards))
    made.optimizer = recorder = Recorder(made.optimizer)
    result = made.run()
    train = made.split.train
    others = torch.tensor(sorted(set(range(store.num_nodes)) - set(train.tolist())))
    num_labelled, num_others = len(train), len(others)
    assert [key for _, _, key in recorder.observed] == list(range(shards)) * 4
    for epoch, record in enumerate(result.history):
        share = ((epoch + 1) / 4) ** 2
        of_epoch = recorder.observed[epoch * shards : (epoch + 1) * shards]
        sizes = [len(part) for part in train.tensor_split(shards)]
        labelled = torch.cat([logits[:size] for (logits, _, _), size in zip(of_epoch, sizes)])
        unlabelled = torch.cat([logits[size:] for (logits, _, _), size in zip(of_epoch, sizes)])
        assert (len(labelled), len(unlabelled)) == (num_labelled, num_others)
        expected = direct_loss(semi, share, torch.cat([labelled, unlabelled]), store.labels[train])
        assert record.train_loss == pytest.approx(float(expected), rel=1e-5)
        weight = share * num_labelled / num_others if semi == "two_means" else share
        for (_, weights, _), size in zip(of_epoch, sizes):
            assert weights is not None
            assert bool((weights[:size] == 1).all())
            assert weights[size:].tolist() == pytest.approx([weight] * (len(weights) - size))
        divisor = num_labelled + (share * num_others if semi == "pooled" else 0)
        assert recorder.counts[epoch] == pytest.approx(divisor)
        assert recorder.factor_samples[epoch] == pytest.approx(num_labelled + share * num_others)
    assert made.seeds_done == 4 * store.num_nodes


def test_plain_steps_say_their_seeds(store: GraphStore, tmp_path: Path) -> None:
    made = prepare(config(store, tmp_path / "run", num_shards=2))
    made.optimizer = recorder = Recorder(made.optimizer)
    made.run()
    assert recorder.counts == [NUM_TRAIN] * 4
    assert recorder.factor_samples == [None] * 4
    assert all(weights is None for _, weights, _ in recorder.observed)


@pytest.mark.parametrize("optimizer", ["kfac", "adam"])
@pytest.mark.parametrize("semi", ["none", "pooled"])
def test_resume_equals_never_having_stopped(store: GraphStore, tmp_path: Path, optimizer: str, semi: str) -> None:
    """Bitwise, with dropout: masks and λ_u depend on the epoch alone."""
    settings: dict[str, Any] = {"optimizer": optimizer, "semi": semi, "num_shards": 2, "epochs": 5}
    straight = prepare(config(store, tmp_path / "straight", **settings)).run()
    stopped = tmp_path / "stopped"
    prepare(config(store, stopped, max_steps=2, **settings)).run()
    resumed = prepare(config(store, stopped, resume=True, **settings)).run()
    assert curve(resumed) == curve(straight)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"semi": "three_means"}, ["semi='three_means'", "two_means"]),
        ({"semi_gamma": 0}, ["semi_gamma=0", "greater than 0", "γ"]),
        ({"semi_gamma": float("inf")}, ["semi_gamma=inf", "finite"]),
    ],
)
def test_refused_settings(store: GraphStore, changes: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(dngd.UserError) as error:
        config(store, **changes)
    for text in said:
        assert text in str(error.value)


def test_more_shards_than_training_nodes(store: GraphStore) -> None:
    with pytest.raises(dngd.UserError, match=r"num_shards=241 .* 240.* at most 240 shards"):
        make_plan(config(store, num_shards=NUM_TRAIN + 1), store, store.split("masks"))


def test_nothing_outside_the_training_set(store: GraphStore) -> None:
    split = dataclasses.replace(store.split("masks"), train=torch.arange(store.num_nodes))
    with pytest.raises(dngd.UserError, match=r"semi=pooled .* all 600 nodes .* --semi none"):
        make_plan(config(store, semi="pooled"), store, split)


@pytest.mark.parametrize("semi", ["none", "pooled"])
@pytest.mark.parametrize("model", ["gcn", "sage"])
def test_the_plan_bounds_what_is_kept(store: GraphStore, tmp_path: Path, model: str, semi: str) -> None:
    made = prepare(config(store, tmp_path / "run", num_layers=3, num_shards=3, model=model, semi=semi))
    plan = made.plan
    assert (plan.mode, plan.steps_per_epoch, plan.sampler_bytes) == ("constant full batch", 1, 0)
    builder = PropagationBuilder(store, made.model.aggregation, made.device)
    full = FullBatches(
        store,
        builder,
        made.model,
        store.features,
        made.split.train,
        with_unlabelled=semi != "none",
        shards=range(3),
        num_shards=3,
        rows=100,
    )
    kept = {}
    for shard in range(3):
        batch = full.batch(0, 0, shard)
        assert batch.seeds.numel() <= plan.batch_size
        tensors = [batch.first_aggregation, *(t for p in batch.propagations for t in vars(p).values())]
        kept |= {t.data_ptr(): t.numel() * t.element_size() for t in tensors if t is not None}
    assert 0.2 * plan.full_batch_bytes < sum(kept.values()) <= plan.full_batch_bytes
    huge = dataclasses.replace(plan, full_batch_bytes=10**15)
    with pytest.raises(dngd.UserError, match="largest part: full batch"):
        check_fits(huge, made.config, 1)


def test_sampled_runs_keep_nothing(store: GraphStore) -> None:
    plan = make_plan(config(store, fanout=(5, 5), num_samplers=1), store, store.split("masks"))
    assert (plan.mode, plan.full_batch_bytes) == ("sampled", 0)
    assert plan.sampler_bytes > 0


def test_command_line(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "--dataset", str(store.path), "--engine", "local", "--batch-size", "full", "--dry-run"]
    for flags in (["--semi", "two_means", "--semi-gamma", "2"], ["--set", "semi=two_means"], []):
        with pytest.raises(SystemExit) as exit_info:
            cli.main([*command, *flags])
        assert exit_info.value.code == 0
        out = capsys.readouterr().out
        assert "constant full batch" in out
        assert "memory: full batch" in out
        assert f"1 shards x {600 if flags else NUM_TRAIN}" in out
    with pytest.raises(SystemExit):
        cli.main([*command, "--json"])
    assert json.loads(capsys.readouterr().out)["mode"] == "constant full batch"
