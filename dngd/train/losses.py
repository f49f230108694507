"""The loss of a step: cross-entropy over labelled seeds, and over unlabelled ones with their own prediction as label.

Every loss is one rule: a weight w_s a seed and one divisor D of the whole step, `L = Σ_s w_s ℓ_s / D`. Shards
back-propagate their part of the sum; sums and divisor are reduced, so any number of shards gives the same loss. With
m_l labelled and m_u unlabelled seeds in the step, `λ_u = c·(t/epochs)^γ` in epoch t = 1, 2, ... (Izadi et al. 2020,
arXiv 2008.09624, with c = 1), and `r = n_u/n_l` unlabelled nodes a labelled one in the graph:

    loss        labelled w    unlabelled w       D              L
    none        1             (no such seeds)    m_l            mean(labelled)
    two_means   1             λ_u·m_l/m_u        m_l            mean(labelled) + λ_u·mean(unlabelled)
    pooled      1             λ_u·r·m_l/m_u      (1 + λ_u·r)m_l (mean(labelled) + λ_u·r·mean(unlabelled)) / (1 + λ_u·r)

In full batch m_l = n_l and m_u = n_u: `pooled` is then (Σ labelled + λ_u·Σ unlabelled) / (n_l + λ_u·n_u). With any
share of unlabelled seeds in a mini-batch both losses estimate what they are in full batch.

An unlabelled seed's label is its own arg-max in the step's own pass (`argmax`, the paper's), or what the model without
dropout predicts before the step, sharpened: `p^(1/τ) / Σ p^(1/τ)` (`soft`); both are constants to the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SemiSupervised = Literal["two_means", "pooled"]


@dataclass(frozen=True)
class UnlabelledWeight:
    """What one unlabelled seed brings, where a labelled one brings a weight of 1 and 1 to the divisor."""

    weight: float
    divisor: float


@dataclass(frozen=True)
class ShardLoss:
    """A shard's part of a step's loss.

    loss_sum: `Σ w_s ℓ_s`, to be back-propagated. divisor: the shard's share of D. weights: w of each seed, [n], or
    None where all are 1.
    """

    loss_sum: Tensor
    divisor: float
    weights: Tensor | None


def unlabelled_share(epoch: int, epochs: int, gamma: float, largest: float = 1.0) -> float:
    """Return `λ_u = c·(t/epochs)^γ` of epoch t = 1 ... epochs; `epoch` is counted from 0, as everywhere in the loop."""
    return float(largest * ((epoch + 1) / epochs) ** gamma)


def unlabelled_weight(
    semi: SemiSupervised, share: float, num_labelled: int, num_unlabelled: int, graph_ratio: float | None = None
) -> UnlabelledWeight:
    """Return the rule of a semi-supervised loss; see the module.

    share: λ_u. Counts are the whole step's, above 0. graph_ratio: r of the graph; None: the step's.
    """
    if semi == "two_means":
        return UnlabelledWeight(weight=share * num_labelled / num_unlabelled, divisor=0.0)
    weight = share if graph_ratio is None else share * graph_ratio * num_labelled / num_unlabelled
    return UnlabelledWeight(weight=weight, divisor=weight)


def sharpened(logits: Tensor, temperature: float) -> Tensor:
    """Return `p^(1/τ) / Σ p^(1/τ)` of the predictions p, [n, classes]; τ = 1 leaves them, τ -> 0 is the arg-max."""
    return (logits / temperature).softmax(dim=1)


def shard_loss(
    logits: Tensor,
    labels: Tensor,
    unlabelled: UnlabelledWeight | None,
    soft_labels: Tensor | None = None,
    smoothing: float = 0.0,
) -> ShardLoss:
    """Return a shard's loss sum, its share of the divisor and its seeds' weights.

    logits: [n, classes]. labels: int64 [m], of the first m seeds; the other n - m are unlabelled and take their own
    prediction, as a constant. unlabelled: what each of these brings; None: there are none. soft_labels: [n - m,
    classes], probabilities in place of the arg-max. smoothing: the share of a labelled seed's target that all classes
    get alike.
    Seeds of weight 0 take no part: they add no rounding, and a value that is not finite there stays without effect.
    """
    num_labelled = labels.shape[0]
    loss_sum = F.cross_entropy(logits[:num_labelled], labels, reduction="sum", label_smoothing=smoothing)
    if unlabelled is None:
        assert logits.shape[0] == num_labelled, (logits.shape, labels.shape)
        return ShardLoss(loss_sum, num_labelled, None)
    others = logits[num_labelled:]
    if unlabelled.weight > 0:
        own_labels = others.detach().argmax(dim=1) if soft_labels is None else soft_labels
        loss_sum = loss_sum + unlabelled.weight * F.cross_entropy(others, own_labels, reduction="sum")
    weights = torch.ones(logits.shape[0], dtype=logits.dtype, device=logits.device)
    weights[num_labelled:] = unlabelled.weight
    return ShardLoss(loss_sum, num_labelled + others.shape[0] * unlabelled.divisor, weights)
