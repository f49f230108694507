"""Axes of a chart: domains and ticks at round numbers, linear or logarithmic."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LARGEST = 1e30
"""Values beyond this are left out of a plot like infinities, so that no difference overflows."""

SMALLEST = 1e-290
"""Spans up to this are drawn like none: steps between ticks would lose their digits, or be 0."""

LOG_RATIO = 100.0
"""Positive values that span more than this are drawn on a logarithmic axis."""


def plottable(value: float) -> bool:
    """Whether a value has a place on an axis."""
    return math.isfinite(value) and abs(value) <= LARGEST


@dataclass(frozen=True)
class Axis:
    """An interval of values and its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Return the value's place in [0, 1]: 0 at low, 1 at high; outside values are clamped."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


def nice_step(span: float, count: int) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is at least span / count."""
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= raw * (1 - 1e-9))


def linear_axis(
    values: Iterable[float],
    *,
    from_zero: bool = False,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    count: int = 7,
) -> Axis:
    """Return an axis that holds all plottable values with some air, within bounds.

    from_zero: starts at 0 (or below, for negative values) and has no air at its low end.
    """
    kept = [value for value in values if plottable(value)] or [0.0]
    low, high = min(kept), max(kept)
    if from_zero:
        low = min(0.0, low)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, SMALLEST):
        air = 0.1 * size if size > SMALLEST else 1.0
    else:
        air = 0.05 * (high - low)
    low = low if from_zero and low == 0 else max(bounds[0], low - air)
    high = min(bounds[1], high + air)
    if high <= low:  # every value lies on a bound, or beyond it
        low, high = min(kept) - air, max(kept) + air
    step = nice_step(high - low, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    decimals = max(0, 3 - math.floor(math.log10(step)))  # 0.30000000000000004 is 0.3
    return Axis(low, high, tuple(round(k * step, decimals) for k in range(first, last + 1)))


def log_axis(values: Iterable[float]) -> Axis:
    """Return a logarithmic axis that holds all plottable positive values; at most about six ticks."""
    kept = [value for value in values if plottable(value) and value > 0] or [1.0]
    low, high = min(kept) / 1.25, max(kept) * 1.25
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    inside = [10.0**k for k in range(first, last + 1, stride) if low <= 10.0**k <= high]
    return Axis(low, high, tuple(inside), log=True)


def value_axis(values: Iterable[float]) -> Axis:
    """Return a linear axis, or a logarithmic one for positive values that span more than LOG_RATIO."""
    kept = [value for value in values if plottable(value)]
    if kept and min(kept) > 0 and max(kept) / min(kept) > LOG_RATIO:
        return log_axis(kept)
    return linear_axis(kept)
