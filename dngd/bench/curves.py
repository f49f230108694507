"""Validation curves: averages over seeds, smoothing, first crossings of targets, and ratios. Pure functions.

A curve's `accuracy` is the metric that is compared, ROC-AUC where that was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TARGET_MARGIN = 0.005
"""The primary target lies half a point below the baseline's best; the best itself is the secondary one."""

LEAST_EVALUATIONS = 20
"""Evaluations that a curve should have before a target, for its time there to be told well."""

SMOOTHING = 2
"""Neighbours on each side that a smoothed value is the mean of, itself included: five evaluations."""


@dataclass(frozen=True)
class Curve:
    """Evaluations of one run, or of the mean of several: equally many steps, seconds and accuracies.

    seconds: of training up to there, evaluation excluded. All three start with the untrained model at step 0.
    """

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class Reach:
    """Where a curve first reaches a target. seconds, steps: interpolated; evaluation_step: the first at or above.

    evaluations: of the trained model, up to and with that one.
    """

    seconds: float
    steps: float
    evaluation_step: int
    evaluations: int

    @property
    def is_dense(self) -> bool:
        """Whether there were evaluations enough before it."""
        return self.evaluations >= LEAST_EVALUATIONS


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean over runs at equal steps: of their accuracies, and of their seconds."""
    assert curves, "a mean needs a curve"
    assert all(curve.steps == curves[0].steps for curve in curves), "curves are averaged at equal steps only"
    seconds = np.mean([curve.seconds for curve in curves], axis=0)
    accuracy = np.mean([curve.accuracy for curve in curves], axis=0)
    return Curve(curves[0].steps, tuple(seconds.tolist()), tuple(accuracy.tolist()))


def smoothed(curve: Curve, half: int = SMOOTHING) -> Curve:
    """Return the curve with each accuracy replaced by the mean of up to 2·half + 1 evaluations centred on it.

    Near an end as many are taken on the one side as there are on the other, so that no value is drawn towards the
    middle: the first and the last evaluation stay as they are, and so does any straight line over equal distances.
    """
    last = len(curve.accuracy) - 1
    sums = np.concatenate([[0.0], np.cumsum(curve.accuracy)])
    means = []
    for i in range(last + 1):
        reach = min(half, i, last - i)
        means.append(float(sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return Curve(curve.steps, curve.seconds, tuple(means))


def best_point(curve: Curve) -> int:
    """Return the index of the first evaluation with the highest accuracy."""
    return max(range(len(curve.accuracy)), key=lambda i: curve.accuracy[i])


def first_reach(curve: Curve, target: float) -> Reach | None:
    """Return where accuracy first reaches the target; None if no evaluation is at or above it.

    Between the last evaluation below and the first one at or above, seconds and steps are interpolated linearly in
    accuracy, so that the distance between evaluations favours nobody.
    """
    for i, accuracy in enumerate(curve.accuracy):
        if accuracy < target:
            continue
        if i == 0:
            return Reach(curve.seconds[0], float(curve.steps[0]), curve.steps[0], 0)
        before = curve.accuracy[i - 1]
        share = (target - before) / (accuracy - before)
        return Reach(
            seconds=curve.seconds[i - 1] + share * (curve.seconds[i] - curve.seconds[i - 1]),
            steps=curve.steps[i - 1] + share * (curve.steps[i] - curve.steps[i - 1]),
            evaluation_step=curve.steps[i],
            evaluations=i,
        )
    return None


def seconds_at(curve: Curve, steps: float) -> float:
    """Return the curve's seconds at a number of steps, linear between evaluations."""
    return float(np.interp(steps, curve.steps, curve.seconds))


def default_targets(baseline: Sequence[Curve]) -> tuple[float, float]:
    """Return (best − 0.005, best), best the highest accuracy of the baseline's curves, one a setting."""
    best = max(max(curve.accuracy) for curve in baseline)
    return best - TARGET_MARGIN, best


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and the sample standard deviation (n − 1); the latter None for a single value."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def band(curves: Sequence[Curve]) -> tuple[list[float], list[float]]:
    """Return mean − and mean + one sample standard deviation over runs, by evaluation; of one run, itself twice."""
    values = np.asarray([curve.accuracy for curve in curves])
    mean = values.mean(axis=0)
    deviation = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros_like(mean)
    return (mean - deviation).tolist(), (mean + deviation).tolist()


def compare_groups(
    groups: Mapping[str, Mapping[str, Curve]],
    targets: Sequence[float],
    baseline: str,
    first_order: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return per target each group's fastest setting in seconds and in steps, and the baseline's over it.

    groups: {group: {setting's label: mean curve}}. A group's setting is chosen anew for each target and unit, for
    the baseline too: the most favourable of its grid. A ratio is the baseline's value over the group's, above 1
    where the group is faster; None where one of the two never reaches the target. first_order: groups whose least
    value gives a second ratio, to_first_order.
    """
    out = []
    for target in targets:
        best = {name: _best_of(curves, target) for name, curves in groups.items()}
        base = best.get(baseline)
        for found in best.values():
            for unit in ("seconds", "steps"):
                mine, theirs = found[unit], base[unit] if base else None
                others = [best[name][unit] for name in first_order if name in best and best[name][unit] is not None]
                found[f"{unit}_ratio"] = _ratio(theirs, mine)
                found[f"{unit}_ratio_to_first_order"] = _ratio(min(others, default=None), mine)
        out.append({"target": target, "groups": best})
    return out


def _ratio(theirs: float | None, mine: float | None) -> float | None:
    return theirs / mine if mine and theirs is not None else None


def _best_of(curves: Mapping[str, Curve], target: float) -> dict[str, Any]:
    reached = {label: reach for label, curve in curves.items() if (reach := first_reach(curve, target)) is not None}
    if not reached:
        keys = ("seconds", "seconds_setting", "seconds_steps", "steps", "steps_setting", "evaluations", "is_dense")
        return dict.fromkeys(keys)
    quickest = min(reached, key=lambda label: reached[label].seconds)
    fewest = min(reached, key=lambda label: reached[label].steps)
    return {
        "seconds": reached[quickest].seconds,
        "seconds_setting": quickest,
        "seconds_steps": reached[quickest].steps,
        "steps": reached[fewest].steps,
        "steps_setting": fewest,
        "evaluations": reached[quickest].evaluations,
        "is_dense": reached[quickest].is_dense and reached[fewest].is_dense,
    }
