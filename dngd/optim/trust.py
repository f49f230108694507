"""Trust the quadratic model as far as it predicts what a step does: to the loss, or to the predictions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dngd.curvature import LossKind
from dngd.errors import UserError
from dngd.optim.schedules import HyperbolicDecay, Schedule, value_at


class LevenbergMarquardt:
    """A damping λ that follows how well the quadratic model predicts the loss; a schedule, `λ(step)`.

    After `update(actual, predicted)` with the reduction ratio `ρ = actual / predicted`: λ is multiplied by
    ω where ρ > 3/4, divided by ω where ρ < 1/4 or not finite, and kept in [low, high]. Martens & Grosse
    2015, section 6.5 (ω = (19/20)^T, checked every T steps).

    value: the first λ. omega: ω in (0, 1). low, high: λ's range. Raises UserError outside these.
    """

    def __init__(
        self, value: float = 1e-2, *, omega: float = (19 / 20) ** 5, low: float = 1e-6, high: float = 1e2
    ) -> None:
        if not 0 < low <= value <= high < math.inf:
            raise UserError(
                f"damping {value} with low={low}, high={high} is out of order; give 0 < low <= value <= high"
            )
        if not 0 < omega < 1:
            raise UserError(f"omega={omega} is out of range; it must be above 0 and below 1")
        self.value = value
        self.omega = omega
        self.low = low
        self.high = high

    def __call__(self, step: int) -> float:
        return self.value

    def update(self, actual: float, predicted: float) -> float:
        """Adapt λ to one step's actual and predicted reduction of the loss; return the reduction ratio."""
        ratio = actual / predicted if predicted > 0 else math.nan
        if ratio > 0.75:
            self.value *= self.omega
        elif not ratio >= 0.25:  # a NaN is no reduction either
            self.value /= self.omega
        self.value = min(self.high, max(self.low, self.value))
        return ratio


KL_BOUND = HyperbolicDecay(0.1, steps=5, power=2)
"""Nats a seed: long steps while everything is still to be learnt, short ones against mini-batches' noise later."""


class KLTrustRegion:
    """A KL clip that bounds the divergence that steps really bring, not only the one that they are predicted to.

    A schedule κ(step) for `kl_clip`:

        κ = 2 δ(step) / ρ,    ρ ← ρ · clamp(D / (D̂ρ), 1/4, 4)^w   at each `update(D, D̂)`

    where D = mean KL(p_before ‖ p_after) is measured on a step's own batch and D̂ = (ην)² q / 2 is what the factors
    predicted of it. Both are off by much: factors of a network that has moved on, rows of one seed that are taken for
    independent. In eight settings on six graphs D/D̂ was .3 to 16 (docs/defaults.md, 24), so that one κ is too long a
    step on some of them and too short a one on others. One δ fits better. The trust region is that of TRPO (Schulman
    et al. 2015), with its line search replaced by a running correction; Martens & Grosse 2015, section 6.5, correct the
    damping alike, by the loss.

    bound: δ > 0, nats a seed, a number or a function of the step. period: steps between two measurements (`is_due`);
    also at the powers of two, since factors are renewed there and the network moves most. ratio: ρ until the first.
    weight: w in (0, 1], of a measurement. low, high: ρ's range. Raises UserError outside these.

    >>> region = KLTrustRegion(HyperbolicDecay(0.1, steps=5, power=2), ratio=2.0, weight=1.0)
    >>> region(0)
    0.1
    >>> region.update(measured=0.2, predicted=0.05)
    4.0
    >>> region(0), region(5)
    (0.05, 0.0125)
    >>> [step for step in range(50) if region.is_due(step)]
    [0, 1, 2, 4, 8, 16, 20, 32, 40]
    """

    def __init__(
        self,
        bound: Schedule = KL_BOUND,
        *,
        period: int = 20,
        ratio: float = 3.0,
        weight: float = 0.7,
        low: float = 0.3,
        high: float = 30.0,
    ) -> None:
        if not value_at(bound, 0) > 0:
            raise UserError(f"bound={bound} is out of range; give a KL divergence above 0, or a function of the step")
        if period < 1:
            raise UserError(f"period={period} is out of range; give a whole number, at least 1")
        if not 0 < low <= ratio <= high < math.inf:
            raise UserError(f"ratio {ratio} with low={low}, high={high} is out of order; give 0 < low <= ratio <= high")
        if not 0 < weight <= 1:
            raise UserError(f"weight={weight} is out of range; it must be above 0 and at most 1")
        self.bound = bound
        self.period = period
        self.ratio = ratio
        self.weight = weight
        self.low = low
        self.high = high

    def __call__(self, step: int) -> float:
        return 2.0 * value_at(self.bound, step) / self.ratio

    def is_due(self, step: int) -> bool:
        """Whether a step's divergence is to be measured."""
        return step % self.period == 0 or step & (step - 1) == 0

    def update(self, measured: float, predicted: float) -> float:
        """Adapt ρ to one step's divergence, measured and predicted; return ρ.

        A divergence that is not finite is as one far above the prediction. A step that was predicted not to move at
        all, or that moved nothing that can be measured, tells nothing.
        """
        if not predicted > 0 or measured <= 0:
            return self.ratio
        error = measured / predicted / self.ratio if math.isfinite(measured) else math.inf
        self.ratio *= min(4.0, max(0.25, error)) ** self.weight
        self.ratio = min(self.high, max(self.low, self.ratio))
        return self.ratio


def mean_divergence(before: Tensor, after: Tensor, loss: LossKind = "cross_entropy") -> float:
    """Return the mean over rows of KL(p_before ‖ p_after) in nats (row_divergences); waits for the device. 0 without
    rows."""
    return float(row_divergences(before, after, loss).mean()) if before.shape[0] else 0.0


def row_divergences(before: Tensor, after: Tensor, loss: LossKind = "cross_entropy") -> Tensor:
    """Return KL(p_before ‖ p_after) in nats of each row of logits [n, C], as float64 [n].

    loss: cross_entropy: p is the softmax of a row; binary_cross_entropy: independent Bernoulli variables, whose
    divergences are summed; squared_error: normal ones of variance 1/2, whose negative log-likelihood is `‖z - y‖²` and
    whose divergence is `‖z_before - z_after‖²`. Summed in float64, since it is a small difference of large terms.
    """
    before, after = before.detach().double(), after.detach().double()
    if loss == "cross_entropy":
        log_p, log_q = F.log_softmax(before, dim=1), F.log_softmax(after, dim=1)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1)
    if loss == "squared_error":
        return (before - after).square().sum(dim=1)
    yes = F.logsigmoid(before) - F.logsigmoid(after)
    no = F.logsigmoid(-before) - F.logsigmoid(-after)
    p = torch.sigmoid(before)
    return (p * yes + (1 - p) * no).sum(dim=1)
