"""Unlabelled seeds of mini-batches: which nodes, what they weigh, and that one batch of all nodes is the full batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dngd
from dngd.comm import LocalCommunicator
from dngd.graph import GraphStore
from dngd.optim import capture
from dngd.sampling import UnlabelledSeeds, schedule
from dngd.train import TrainingLoop, losses, prepare_run_folder
from dngd.train.progress import SilentReporter
from dngd.train.semi import SemiSupervision
from tests.helpers.mutants import assert_caught

SEMI = ("two_means", "pooled")


def loop_of(store: GraphStore, run_dir: Path, **changes: Any) -> TrainingLoop:
    fields: dict[str, Any] = {
        "dataset": str(store.path),
        "engine": "local",
        "num_layers": 2,
        "hidden": 8,
        "dropout": 0.0,
        "epochs": 3,
        "fanout": (-1, -1),
        "num_samplers": 0,
        "run_dir": run_dir,
        "kfac": {"fisher": "ggn", "max_rows": None, "inverse_precision": "full", "inverse_update_period": 1},
    }
    return TrainingLoop(
        prepare_run_folder(dngd.TrainConfig(**(fields | changes))), LocalCommunicator(), SilentReporter()
    )


def law_one_batch_of_all_is_the_full_batch(store: GraphStore, folder: Path, semi: str, labels: str) -> None:
    """The first step's factors, and the curve. Later the full batch's A has all rows that any step reached."""
    settings: dict[str, Any] = {"semi": semi, "semi_labels": labels, "semi_gamma": 2.0, "semi_weight": 0.7}
    num_train = store.split("masks").train.numel()
    kinds = {
        "full": {"batch_size": "full"},
        "sampled": {"batch_size": store.num_nodes, "semi_share": 1 - num_train / store.num_nodes},
    }
    factors, curves = [], []
    for name, kind in kinds.items():
        made = loop_of(store, folder / f"{name}-step", max_steps=1, **kind, **settings)
        assert made.config.constant_full_batch == (name == "full")
        made.run()
        assert made.optimizer.preconditioner is not None
        factors.append(made.optimizer.preconditioner.factors())
        curves.append(loop_of(store, folder / name, **kind, **settings).run().history)
    for layer, expected in factors[0].items():
        for mine, theirs in zip(factors[1][layer], expected):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    for one, other in zip(*curves, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-3)
        assert other.val_loss == pytest.approx(one.val_loss, rel=2e-3)


@pytest.fixture
def orderless(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact Fisher's columns without their random signs, which are drawn by a seed's place in the batch."""
    monkeypatch.setattr(capture, "random_signs", lambda count, generator: torch.ones(count))


@pytest.mark.usefixtures("orderless")
@pytest.mark.parametrize("semi", SEMI)
@pytest.mark.parametrize("labels", ["argmax", "soft"])
def test_one_batch_of_all_is_the_full_batch(store: GraphStore, tmp_path: Path, semi: str, labels: str) -> None:
    law_one_batch_of_all_is_the_full_batch(store, tmp_path, semi, labels)


@pytest.mark.usefixtures("orderless")
def test_mutant_unlabelled_seeds_that_miss_some_are_caught(store: GraphStore, tmp_path: Path) -> None:
    original = UnlabelledSeeds.of
    folders = (tmp_path / str(i) for i in range(2))
    law = lambda: law_one_batch_of_all_is_the_full_batch(store, next(folders), "pooled", "argmax")  # noqa: E731
    assert_caught(law, UnlabelledSeeds, "of", lambda *arguments: original(*arguments)[:-1])


def semi_of(semi: Any, labelled_step: int, unlabelled_step: int) -> SemiSupervision:
    """Of a graph with 30 labelled nodes and 120 others."""
    return SemiSupervision(
        semi=semi,
        gamma=1.0,
        largest=0.8,
        epochs=2,
        temperature=None,
        num_labelled=30,
        num_unlabelled=120,
        labelled_step=labelled_step,
        unlabelled_step=unlabelled_step,
    )


def law_any_share_estimates_the_full_batchs_loss(semi: Any) -> None:
    """Where a batch's means are the graph's means, its loss is the graph's, whatever its share of unlabelled seeds."""
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.1]], dtype=torch.float64)
    share, r = 0.8 * 1 / 2, 4.0
    labelled, unlabelled = (float(F.cross_entropy(row[None], torch.tensor([1 - i]))) for i, row in enumerate(logits))
    expected = labelled + share * unlabelled
    if semi == "pooled":
        expected = (labelled + share * r * unlabelled) / (1 + share * r)
    for labelled_step, unlabelled_step, step in ((30, 120, 0), (8, 2, 0), (8, 2, 3), (2, 9, 14)):
        rule = semi_of(semi, labelled_step, unlabelled_step)
        m_l = min(labelled_step, 30 - step * labelled_step)
        assert rule.num_seeds(step) == m_l + unlabelled_step
        rows = torch.cat([logits[:1].expand(m_l, 2), logits[1:].expand(unlabelled_step, 2)])
        loss = losses.shard_loss(rows, torch.ones(m_l, dtype=torch.int64), rule.weight(0, step))
        assert float(loss.loss_sum) / loss.divisor == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("semi", SEMI)
def test_any_share_estimates_the_full_batchs_loss(semi: str) -> None:
    law_any_share_estimates_the_full_batchs_loss(semi)


def test_mutants_of_the_counts_are_caught() -> None:
    """A batch's share taken for the graph's; a last step that counts as a whole one."""
    for semi, attribute, replacement in (
        ("pooled", "_is_whole", True),
        ("two_means", "_counts", lambda self, step: (self.labelled_step, self.unlabelled_step)),
        ("pooled", "_counts", lambda self, step: (self.labelled_step, self.unlabelled_step)),
    ):
        law = lambda semi=semi: law_any_share_estimates_the_full_batchs_loss(semi)  # noqa: E731
        assert_caught(law, SemiSupervision, attribute, replacement)


def law_rounds(num_nodes: int, num_shards: int, per_shard: int) -> None:
    """A round repeats no node over its steps and shards; every step has its number; coordinates alone decide."""
    nodes = torch.arange(100, 100 + num_nodes)
    seeds = UnlabelledSeeds(nodes, 5, num_shards, per_shard)
    step_size = min(num_nodes, num_shards * per_shard)
    steps_per_round = max(1, num_nodes // (num_shards * per_shard))
    rounds: list[list[int]] = []
    for epoch in (0, 1):
        for number in (0, 1):
            of_round: list[Tensor] = []
            for step in range(number * steps_per_round, (number + 1) * steps_per_round):
                parts = [seeds.of(epoch, step, shard) for shard in range(num_shards)]
                sizes = [len(part) for part in parts]
                assert sum(sizes) == step_size
                assert max(sizes) - min(sizes) <= 1
                assert max(sizes) <= per_shard
                of_round += parts
            drawn = torch.cat(of_round)
            assert len(drawn.unique()) == len(drawn)
            assert bool(torch.isin(drawn, nodes).all())
            rounds.append(drawn.tolist())
    assert all(one != other for i, one in enumerate(rounds) for other in rounds[:i]), "an order that comes again"
    fresh = UnlabelledSeeds(nodes, 5, num_shards, per_shard)
    last = 2 * steps_per_round - 1
    assert torch.equal(fresh.of(1, last, num_shards - 1), seeds.of(1, last, num_shards - 1))
    other_seed = UnlabelledSeeds(nodes, 6, num_shards, per_shard)
    assert not torch.equal(other_seed.of(0, 0, 0), seeds.of(0, 0, 0))


@pytest.mark.parametrize(("num_nodes", "num_shards", "per_shard"), [(60, 1, 7), (60, 3, 5), (11, 4, 9), (30, 2, 15)])
def test_rounds(num_nodes: int, num_shards: int, per_shard: int) -> None:
    law_rounds(num_nodes, num_shards, per_shard)


def test_mutant_one_order_for_all_epochs_is_caught() -> None:
    original = schedule.derive_seed
    law = lambda: law_rounds(60, 3, 5)  # noqa: E731
    assert_caught(law, schedule, "derive_seed", lambda run_seed, kind, epoch, *rest: original(run_seed, kind, *rest))


def test_mutant_overlapping_shards_are_caught() -> None:
    def whole_step(num_train: int, step: int, num_shards: int, batch_size: int) -> tuple[int, ...]:
        return tuple(range(0, num_shards + 1))

    assert_caught(lambda: law_rounds(60, 3, 5), schedule, "shard_bounds", whole_step)


def test_sharpened_predictions() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    assert torch.allclose(losses.sharpened(p.log(), 1.0), p)
    assert torch.allclose(losses.sharpened(p.log(), 0.5), p.square() / p.square().sum())
    assert torch.allclose(losses.sharpened(p.log(), 1e-3), torch.tensor([[1.0, 0, 0]], dtype=torch.float64))
