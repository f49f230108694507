"""The loss of a shard: weights, their schedule, and seeds of weight 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dngd.train.losses import shard_loss, unlabelled_share, unlabelled_weight


def test_the_share_grows_from_nothing() -> None:
    assert [unlabelled_share(epoch, 4, 1.0) for epoch in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [unlabelled_share(epoch, 4, 2.0) for epoch in range(4)] == [0.0625, 0.25, 0.5625, 1.0]
    assert unlabelled_share(0, 4, 0.5) == 0.5


def test_weights_and_divisors() -> None:
    two_means = unlabelled_weight("two_means", 0.5, 10, 40)
    assert (two_means.weight, two_means.divisor) == (0.125, 0)
    pooled = unlabelled_weight("pooled", 0.5, 10, 40)
    assert (pooled.weight, pooled.divisor) == (0.5, 0.5)


def test_smoothing_is_of_the_true_labels_alone() -> None:
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1])
    rule = unlabelled_weight("two_means", 0.5, 3, 2)
    soft = torch.full((2, 3), 1 / 3)
    plain, smooth = (shard_loss(logits, labels, rule, soft, share).loss_sum for share in (0.0, 0.3))
    targets = 0.7 * F.one_hot(labels, 3) + 0.1
    labelled = -(targets * logits[:3].log_softmax(dim=1)).sum()
    others = plain - F.cross_entropy(logits[:3], labels, reduction="sum")
    assert torch.allclose(smooth, labelled + others)


def test_plain_loss_is_the_sum_over_its_seeds() -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    loss = shard_loss(logits, labels, None)
    assert torch.equal(loss.loss_sum, F.cross_entropy(logits, labels, reduction="sum"))
    assert (loss.divisor, loss.weights) == (6, None)


@pytest.mark.parametrize("semi", ["two_means", "pooled"])
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_weight_0_is_exactly_nothing(semi: Any, value: float) -> None:
    """Also where a logit is not finite: 0 times it would be."""
    labels = torch.tensor([0, 1])
    logits = torch.randn(5, 3)
    logits[3] = value
    plain = logits[:2].clone().requires_grad_()
    shard_loss(plain, labels, None).loss_sum.backward()
    table = logits.clone().requires_grad_()
    loss = shard_loss(table, labels, unlabelled_weight(semi, 0.0, 2, 3))
    loss.loss_sum.backward()
    assert torch.equal(loss.loss_sum.detach(), F.cross_entropy(logits[:2], labels, reduction="sum"))
    assert loss.divisor == 2
    assert table.grad is not None
    assert plain.grad is not None
    assert torch.equal(table.grad, torch.cat([plain.grad, torch.zeros(3, 3)]))
    assert loss.weights is not None
    assert loss.weights.tolist() == [1, 1, 0, 0, 0]
