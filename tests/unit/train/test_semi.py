"""`--semi` with mini-batches in the loop: what is observed, soft labels, resuming, refused settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dngd
from dngd.graph import GraphStore
from dngd.train import TrainingLoop, make_plan, objective
from tests.unit.train.test_full_batch import NUM_TRAIN, Recorder, config, curve, prepare

SETTINGS: dict[str, Any] = {"batch_size": 60, "fanout": (5, 5), "semi_share": 0.25, "num_shards": 2}
"""45 labelled and 15 unlabelled seeds a shard: 3 steps an epoch, the last one of 60 labelled seeds."""


@pytest.mark.parametrize("semi", ["two_means", "pooled"])
def test_a_steps_seeds_and_weights(store: GraphStore, tmp_path: Path, semi: str) -> None:
    made = prepare(config(store, tmp_path / "run", semi=semi, epochs=2, **SETTINGS))
    made.optimizer = recorder = Recorder(made.optimizer)
    made.run()
    assert made.plan.steps_per_epoch == 3
    assert (made.plan.batch_size, made.plan.labelled, made.plan.unlabelled) == (60, 45, 15)
    r = (store.num_nodes - NUM_TRAIN) / NUM_TRAIN
    for step, count in enumerate(recorder.counts):
        share, labelled = (1 + step // 3) / 2, (90, 90, 60)[step % 3]
        assert count == pytest.approx(labelled if semi == "two_means" else labelled * (1 + share * r))
        assert recorder.factor_samples[step] == pytest.approx(labelled + share * 30)
        weight = share * labelled / 30 * (1 if semi == "two_means" else r)
        for logits, weights, _ in recorder.observed[2 * step : 2 * step + 2]:
            assert weights is not None
            assert len(logits) == labelled // 2 + 15
            assert weights.tolist() == pytest.approx([1.0] * (labelled // 2) + [weight] * 15)
    assert made.seeds_done == 2 * (NUM_TRAIN + 3 * 30)


def test_labels_are_of_the_training_nodes_alone(store: GraphStore, tmp_path: Path) -> None:
    """Labels of the others never reach the loss."""
    made = prepare(config(store, tmp_path / "run", semi="pooled", **SETTINGS))
    train = set(made.split.train.tolist())
    seen: set[int] = set()
    with made.sources.open([0, 1], 0) as source:
        for step in range(3):
            for shard in (0, 1):
                batch = source.batch(0, step, shard)
                labelled = batch.seeds[: len(batch.labels)]
                assert set(labelled.tolist()) <= train
                assert not set(batch.seeds[len(batch.labels) :].tolist()) & train
                assert torch.equal(batch.labels, store.labels[labelled])
                seen |= set(labelled.tolist())
    assert seen == train


@pytest.mark.parametrize("batch_size", [60, "full"])
def test_soft_labels_are_the_last_prediction_without_dropout(
    store: GraphStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: Any
) -> None:
    settings = SETTINGS | {"batch_size": batch_size, "fanout": SETTINGS["fanout"] if batch_size == 60 else None}
    made = prepare(config(store, tmp_path / "run", semi="two_means", semi_labels="soft", dropout=0.8, **settings))
    checked = 0
    original = objective.shard_loss

    def checking(logits: Tensor, labels: Tensor, rule: Any, soft: Tensor | None) -> Any:
        nonlocal checked
        assert soft is not None
        assert made.model.training
        made.model.eval()
        with torch.no_grad():
            plain = made.model(made.features, current.propagations, current.first_aggregation)[len(labels) :]
        made.model.train()
        p = plain.softmax(dim=1)
        assert torch.allclose(soft, p.square() / p.square().sum(1, keepdim=True), atol=1e-6)
        assert not torch.allclose(plain, logits[len(labels) :])
        out = original(logits, labels, rule, soft)
        by_hand = F.cross_entropy(logits[: len(labels)], labels, reduction="sum")
        by_hand -= rule.weight * (soft * logits[len(labels) :].log_softmax(1)).sum()
        assert float(out.loss_sum.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5)
        checked += 1
        return out

    original_step = TrainingLoop._back_propagate

    def remember(self: TrainingLoop, batch: Any, *rest: Any) -> float:
        nonlocal current
        current = batch
        return original_step(self, batch, *rest)

    current: Any = None
    monkeypatch.setattr(objective, "shard_loss", checking)
    monkeypatch.setattr(TrainingLoop, "_back_propagate", remember)
    made.run()
    assert checked == 2 * made.step


@pytest.mark.parametrize(("optimizer", "labels"), [("kfac", "argmax"), ("adam", "soft")])
def test_resume_equals_never_having_stopped(store: GraphStore, tmp_path: Path, optimizer: str, labels: str) -> None:
    """Bitwise, in the middle of an epoch, with dropout."""
    settings = SETTINGS | {"optimizer": optimizer, "semi": "pooled", "semi_labels": labels, "epochs": 3}
    straight = prepare(config(store, tmp_path / "straight", **settings)).run()
    stopped = tmp_path / "stopped"
    prepare(config(store, stopped, max_steps=4, **settings)).run()
    resumed = prepare(config(store, stopped, resume=True, **settings)).run()
    # What was evaluated at the stop, and the loss of the epoch that was cut, are of the stop alone.
    assert curve(resumed)[-2:] == curve(straight)[-2:]


def test_what_defines_a_run(store: GraphStore) -> None:
    names = {"semi_gamma", "semi_weight", "semi_labels", "semi_temperature", "semi_share"}
    assert not names & set(config(store).identity())
    assert names - set(config(store, semi="pooled").identity()) == {"semi_temperature", "semi_share"}
    sampled = config(store, semi="pooled", semi_labels="soft", batch_size=10)
    assert names <= set(sampled.identity())


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_shard_without_both_kinds_is_refused(store: GraphStore, share: float) -> None:
    with pytest.raises(dngd.UserError, match=r"semi_share=0\.\d+ of batch_size=10 .* larger --batch-size"):
        config(store, semi="pooled", batch_size=10, semi_share=share)


def test_more_labelled_seeds_than_training_nodes(store: GraphStore) -> None:
    split = store.split("masks")
    with pytest.raises(dngd.UserError, match=rf"2 x 123 labelled seeds .* {NUM_TRAIN} nodes; use --batch-size 160 or"):
        make_plan(config(store, semi="pooled", batch_size=164, semi_share=0.25, num_shards=2), store, split)
    plan = make_plan(config(store, semi="pooled", batch_size=160, semi_share=0.25, num_shards=2), store, split)
    assert (plan.labelled, plan.unlabelled, plan.steps_per_epoch) == (120, 40, 1)
