"""Functions of the global step: hyperparameters, learning rates, and when curvature is renewed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Schedule = float | Callable[[int], float]
"""A number, or a function step -> number."""

Period = int | Callable[[int], int]
"""A number of steps, or a function step -> number of steps."""

LearningRateKind = Literal["constant", "cosine", "hyperbolic"]


def value_at(schedule: Schedule, step: int) -> float:
    """Return a schedule's value at a step."""
    return float(schedule(step)) if callable(schedule) else float(schedule)


def learning_rate(
    step: int, total_steps: int, peak: float, kind: LearningRateKind, warmup_steps: int, half_steps: float = 20.0
) -> float:
    """Return the learning rate of a global step.

    Linear warm-up to the peak over warmup_steps (step 0 has peak/warmup_steps), then constant,
    `peak/2 · (1 + cos(π·u))` with u the share of the remaining steps that are done, or hyperbolic: `peak / (1 + s/T)`
    after s further steps, T = half_steps, whatever total_steps is.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if kind == "constant":
        return peak
    if kind == "hyperbolic":
        return HyperbolicDecay(peak, half_steps)(step - warmup_steps)
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak / 2 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class HyperbolicDecay:
    """A schedule that falls as `value / (1 + step / steps)^power`: half of the first value after `steps` steps, with
    power 1.

    >>> rate = HyperbolicDecay(0.3, steps=20)
    >>> [round(rate(step), 3) for step in (0, 20, 40, 180)]
    [0.3, 0.15, 0.1, 0.03]

    The rate that makes online natural gradient efficient falls as 1/t (Amari 1998). A KL clip bounds the squared step,
    so that power 2 lets the steps that it binds fall alike.
    """

    value: float
    steps: float
    power: float = 1.0

    def __call__(self, step: int) -> float:
        return float(self.value / (1.0 + step / self.steps) ** self.power)


@dataclass(frozen=True)
class UpdateSchedule:
    """When factors are measured and when inverses are renewed; a pure function of the step.

    factor_update_period: steps between factor steps after the first dense_steps steps, in which
    every step is one. inverse_update_period: steps between two refreshes of a layer; layer i of L has its
    turn at steps congruent to `i·period // L`. Curvature moves fast at first, so with dense_steps > 0
    there are also rounds from steps 2^k on (within the first period), layer i at `2^k + i`, and the steps 2^k are
    factor steps. A round that the next one would cut short (2^k < L) refreshes all layers at once, as step 0 does
    since there is nothing else to precondition with: what was measured of an untrained network is of no use for long.
    No other step refreshes two layers, if L is at most the period. at_once=False leaves such rounds out: where a
    refresh takes steps until it is adopted, it would hold up the next ones. Both periods may be functions of the step.
    """

    factor_update_period: Period
    inverse_update_period: Period
    dense_steps: int = 0
    at_once: bool = True

    def is_factor_step(self, step: int) -> bool:
        """Return whether the step's rows are measured."""
        return (
            step < self.dense_steps
            or step % period_at(self.factor_update_period, step) == 0
            or (self._is_early(step) and step.bit_count() == 1)
        )

    def _is_early(self, step: int) -> bool:
        """Return whether the step belongs to the rounds from powers of two on."""
        return self.dense_steps > 0 and step < period_at(self.inverse_update_period, step)

    def layers_due(self, step: int, num_layers: int) -> list[int]:
        """Return the positions of the layers whose inverses are renewed at this step."""
        if step == 0:
            return list(range(num_layers))
        period = period_at(self.inverse_update_period, step)
        if self._is_early(step):
            start = 1 << (step.bit_length() - 1)
            if start < num_layers:
                if self.at_once and step == start:
                    return list(range(num_layers))
            elif step - start < num_layers:
                return [step - start]
        return [i for i in range(num_layers) if step % period == i * period // num_layers]


def period_at(period: Period, step: int) -> int:
    """Return a period's value at a step, at least 1."""
    return max(1, int(period(step))) if callable(period) else period
