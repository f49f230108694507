"""Validation-accuracy curves: averages over seeds, first crossings of targets, and ratios. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TARGET_MARGIN = 0.005
"""The second default target lies this far below the baseline's best accuracy."""


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
    """Where a curve first reaches a target. seconds, steps: interpolated; evaluation_step: the first at or above."""

    seconds: float
    steps: float
    evaluation_step: int


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean over runs at equal steps: of their accuracies, and of their seconds."""
    assert curves, "a mean needs a curve"
    assert all(curve.steps == curves[0].steps for curve in curves), "curves are averaged at equal steps only"
    seconds = np.mean([curve.seconds for curve in curves], axis=0)
    accuracy = np.mean([curve.accuracy for curve in curves], axis=0)
    return Curve(curves[0].steps, tuple(seconds.tolist()), tuple(accuracy.tolist()))


def first_reach(curve: Curve, target: float) -> Reach | None:
    """Return where accuracy first reaches the target; None if no evaluation is at or above it.

    Between the last evaluation below and the first one at or above, seconds and steps are interpolated linearly in
    accuracy, so that the distance between evaluations favours nobody.
    """
    for i, accuracy in enumerate(curve.accuracy):
        if accuracy < target:
            continue
        if i == 0:
            return Reach(curve.seconds[0], float(curve.steps[0]), curve.steps[0])
        before = curve.accuracy[i - 1]
        share = (target - before) / (accuracy - before)
        return Reach(
            seconds=curve.seconds[i - 1] + share * (curve.seconds[i] - curve.seconds[i - 1]),
            steps=curve.steps[i - 1] + share * (curve.steps[i] - curve.steps[i - 1]),
            evaluation_step=curve.steps[i],
        )
    return None


def default_targets(baseline: Sequence[Curve]) -> tuple[float, float]:
    """Return (best − 0.005, best), best the highest accuracy of the baseline's mean curves, one a setting."""
    best = max(max(curve.accuracy) for curve in baseline)
    return best - TARGET_MARGIN, best


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and the sample standard deviation (n − 1); the latter None for a single value."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def compare_groups(
    groups: Mapping[str, Mapping[str, Curve]], targets: Sequence[float], baseline: str
) -> list[dict[str, Any]]:
    """Return per target each group's fastest setting in seconds and in steps, and the baseline's over it.

    groups: {group: {setting's label: mean curve}}. A group's setting is chosen anew for each target and unit, for
    the baseline too: the most favourable of its grid. A ratio is the baseline's value over the group's, above 1
    where the group is faster; None where one of the two never reaches the target.
    """
    out = []
    for target in targets:
        best = {name: _best_of(curves, target) for name, curves in groups.items()}
        base = best.get(baseline)
        for found in best.values():
            for unit in ("seconds", "steps"):
                mine, theirs = found[unit], base[unit] if base else None
                found[f"{unit}_ratio"] = theirs / mine if mine and theirs is not None else None
        out.append({"target": target, "groups": best})
    return out


def _best_of(curves: Mapping[str, Curve], target: float) -> dict[str, Any]:
    reached = {label: reach for label, curve in curves.items() if (reach := first_reach(curve, target)) is not None}
    if not reached:
        return {"seconds": None, "seconds_setting": None, "steps": None, "steps_setting": None}
    quickest = min(reached, key=lambda label: reached[label].seconds)
    fewest = min(reached, key=lambda label: reached[label].steps)
    return {
        "seconds": reached[quickest].seconds,
        "seconds_setting": quickest,
        "steps": reached[fewest].steps,
        "steps_setting": fewest,
    }
