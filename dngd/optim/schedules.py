"""Functions of the global step: hyperparameters, learning rates, and when curvature is renewed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Schedule = float | Callable[[int], float]
"""A number, or a function step -> number."""

LearningRateKind = Literal["constant", "cosine"]


def value_at(schedule: Schedule, step: int) -> float:
    """Return a schedule's value at a step."""
    return float(schedule(step)) if callable(schedule) else float(schedule)


def learning_rate(step: int, total_steps: int, peak: float, kind: LearningRateKind, warmup_steps: int) -> float:
    """Return the learning rate of a global step.

    Linear warm-up to the peak over warmup_steps (step 0 has peak/warmup_steps), then constant, or
    `peak/2 · (1 + cos(π·u))` with u the share of the remaining steps that are done.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if kind == "constant":
        return peak
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak / 2 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class UpdateSchedule:
    """When factors are measured and when inverses are renewed; a pure function of the step.

    factor_update_period: steps between factor steps after the first dense_steps steps, in which
    every step is one. inverse_update_period: steps between two refreshes of a layer; layers take
    turns, layer i of L at steps congruent to `i·period // L`. Curvature moves fast at first, so with
    dense_steps > 0 every layer is also refreshed at steps 1, 2, 4, 8, ... below the period. Step 0
    refreshes every layer.
    """

    factor_update_period: int
    inverse_update_period: int
    dense_steps: int = 0

    def is_factor_step(self, step: int) -> bool:
        """Return whether the step's rows are measured."""
        return step < self.dense_steps or step % self.factor_update_period == 0

    def layers_due(self, step: int, num_layers: int) -> list[int]:
        """Return the positions of the layers whose inverses are renewed at this step."""
        power_of_two = step & (step - 1) == 0
        if step == 0 or (self.dense_steps > 0 and power_of_two and step < self.inverse_update_period):
            return list(range(num_layers))
        period = self.inverse_update_period
        return [i for i in range(num_layers) if step % period == i * period // num_layers]
