"""Levenberg-Marquardt adaptation of the damping: trust the quadratic model as far as it predicts the loss."""

from __future__ import annotations

import math

from dngd.errors import UserError


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
