"""From a graph's finished runs to its targets, times and ratios, and from all graphs to one line. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from dngd.bench.competitors import Setting
from dngd.bench.curves import (
    LEAST_EVALUATIONS,
    Curve,
    Reach,
    band,
    best_point,
    compare_groups,
    default_targets,
    first_reach,
    mean_curve,
    seconds_at,
    smoothed,
    spread,
)
from dngd.bench.optimizers import BASELINE
from dngd.bench.runs import RunRecord

BUSY_SHARE = 0.1
"""Where a setting waited for a processor, or was stopped, for more than this share of its time, it is told."""


def judge(
    settings: Sequence[Setting], runs: Sequence[RunRecord], targets: Sequence[float] | None, first_order: Sequence[str]
) -> dict[str, Any]:
    """Return a panel's settings, targets and comparison.

    All that is compared is the smoothed mean over seeds. targets: None for the baseline's best less 0.005, and its
    best. first_order: the groups of first-order optimizers.
    """
    of_setting = {s.label: [run for run in runs if run.label == s.label] for s in settings}
    means = {label: smoothed(mean_curve([run.curve for run in own])) for label, own in of_setting.items()}
    groups: dict[str, dict[str, Curve]] = {}
    for setting in settings:
        groups.setdefault(setting.group, {})[setting.label] = means[setting.label]
    chosen = default_targets(list(groups[BASELINE].values())) if targets is None else targets
    comparison = compare_groups(groups, chosen, BASELINE, first_order)
    by_seed = {label: {run.data["seed"]: smoothed(run.curve) for run in own} for label, own in of_setting.items()}
    for compared in comparison:
        _add_seed_ratios(compared["groups"], by_seed, compared["target"])
        _add_busy_seconds(compared["groups"], {label: _busy(own) for label, own in of_setting.items()})
    return {
        "targets": list(chosen),
        "comparison": comparison,
        "settings": {s.label: _summary(s, of_setting[s.label], means[s.label], chosen) for s in settings},
    }


def _add_seed_ratios(
    groups: dict[str, dict[str, Any]], by_seed: Mapping[str, Mapping[int, Curve]], target: float
) -> None:
    """Add to each group the baseline's seconds over its own, seed by seed, between their quickest settings.

    The settings are those of the mean curves. A seed where one of the two never reaches the target has no ratio.
    """
    base: str | None = groups.get(BASELINE, {}).get("seconds_setting")
    for found in groups.values():
        label, ratios = found["seconds_setting"], []
        if base is not None and label is not None:
            for seed, curve in by_seed[label].items():
                mine, theirs = first_reach(curve, target), first_reach(by_seed[base][seed], target)
                if mine is not None and theirs is not None and mine.seconds > 0:
                    ratios.append(theirs.seconds / mine.seconds)
        found["seconds_ratios_of_seeds"] = ratios


def _busy(runs: Sequence[RunRecord]) -> Curve:
    """Return the mean curve by seconds without those that it waited for a processor."""
    return mean_curve([Curve(run.curve.steps, tuple(run.data["busy_seconds"]), run.curve.accuracy) for run in runs])


def _add_busy_seconds(groups: dict[str, dict[str, Any]], busy: Mapping[str, Curve]) -> None:
    """Add to each group its quickest setting's busy seconds to the target, and the baseline's over them."""
    for found in groups.values():
        label = found["seconds_setting"]
        found["busy_seconds"] = None if label is None else seconds_at(busy[label], found["seconds_steps"])
    base = groups.get(BASELINE, {}).get("busy_seconds")
    for found in groups.values():
        mine = found["busy_seconds"]
        found["busy_seconds_ratio"] = base / mine if mine and base is not None else None


def _summary(setting: Setting, runs: Sequence[RunRecord], mean: Curve, targets: Sequence[float]) -> dict[str, Any]:
    smooth = [smoothed(run.curve) for run in runs]
    best = best_point(mean)
    low, high = band(smooth)
    taken = sum(run.data["train_seconds"] for run in runs)
    idle = sum(run.data["idle_seconds"] for run in runs)
    return {
        "group": setting.group,
        "optimizer": setting.optimizer,
        "lr": setting.lr,
        "overrides": dict(setting.overrides),
        "final": spread([run.curve.accuracy[-1] for run in runs]),
        "best": spread([own.accuracy[best] for own in smooth]) | {"step": mean.steps[best]},
        "test_at_best": spread([run.test_scores[best] for run in runs]),
        "train_seconds": spread([run.data["train_seconds"] for run in runs]),
        "step_ms": spread([1e3 * run.data["train_seconds"] / run.curve.steps[-1] for run in runs]),
        "idle_share": idle / taken if taken else 0.0,
        "targets": [_reached(mean, smooth, target) for target in targets],
        "mean_curve": {
            "step": list(mean.steps),
            "seconds": list(mean.seconds),
            "val_score": list(mean.accuracy),
            "low": low,
            "high": high,
        },
        "runs": [run.data for run in runs],
    }


def _reached(mean: Curve, runs: Sequence[Curve], target: float) -> dict[str, Any]:
    """Return where the mean curve reaches a target, and where the runs do that reach it."""
    reach: Reach | None = first_reach(mean, target)
    each = [found for run in runs if (found := first_reach(run, target)) is not None]
    return {
        "target": target,
        "seconds": reach and reach.seconds,
        "steps": reach and reach.steps,
        "first_evaluation_at_or_above": reach and reach.evaluation_step,
        "evaluations": reach and reach.evaluations,
        "is_dense": reach and reach.is_dense,
        "seeds_that_reach_it": len(each),
        "seconds_of_seeds": spread([found.seconds for found in each]) if each else None,
        "steps_of_seeds": spread([found.steps for found in each]) if each else None,
    }


def aggregate(panels: Sequence[Mapping[str, Any]], group: str) -> list[dict[str, Any]] | None:
    """Return, per target in order, a group's ratios over all panels; None where the panels have no baseline.

    A ratio is the baseline's seconds (steps) over the group's. Where the group never reaches the target its ratio is 0:
    it counts, as the worst there is. best_difference, test_difference: the group's best validation score (test score
    there) minus that of the baseline's setting with the best validation score.
    """
    if not panels or any(BASELINE not in panel["comparison"][0]["groups"] for panel in panels):
        return None
    out = []
    for number in range(min(len(panel["comparison"]) for panel in panels)):
        found = []
        for panel in panels:
            groups = panel["comparison"][number]["groups"]
            mine, theirs = groups[group], groups[BASELINE]
            row: dict[str, Any] = {"panel": panel["name"], "is_dense": _both_dense(mine, theirs)}
            for unit in ("seconds", "steps"):
                for suffix in ("", "_to_first_order"):
                    key = f"{unit}_ratio{suffix}"
                    row[key] = 0.0 if mine[unit] is None and theirs[unit] is not None else mine[key]
            found.append(row | _differences(panel, group))
        summary: dict[str, Any] = {"panels": found, "never": sum(row["seconds_ratio"] == 0.0 for row in found)}
        for key in ("seconds_ratio", "steps_ratio", "seconds_ratio_to_first_order", "steps_ratio_to_first_order"):
            known = [row[key] for row in found if row[key] is not None]
            summary[key] = {"median": median(known), "worst": min(known), "best": max(known)} if known else None
        for key in ("best_difference", "test_difference"):
            known = [row[key] for row in found]
            summary[key] = {"median": median(known), "worst": min(known), "best": max(known)}
        out.append(summary)
    return out


def remarks(panel: Mapping[str, Any], group: str) -> list[str]:
    """Return what a reader of a panel's figures must know: losses, thin evaluations, borders, a busy machine."""
    out = []
    for word, compared in zip(("primary", "secondary"), panel["comparison"]):
        groups = compared["groups"]
        mine, theirs = groups.get(group), groups.get(BASELINE)
        if mine is None:
            continue
        if mine["seconds"] is None:
            out.append(f"{group} never reaches the {word} target {compared['target']:.4f}")
        elif theirs and mine["seconds_ratio"] is not None and mine["seconds_ratio"] < 1:
            out.append(f"{group} is slower than {BASELINE} to the {word} target: ratio {mine['seconds_ratio']:.2f}")
        for name, of in groups.items():
            if name in (group, BASELINE) and of["is_dense"] is False:
                out.append(
                    f"{name} reaches the {word} target within {of['evaluations']} evaluations, fewer than "
                    f"{LEAST_EVALUATIONS}: its time is rough"
                )
    idle = max(own["idle_share"] for own in panel["settings"].values())
    if idle > BUSY_SHARE:
        found = panel["comparison"][0]["groups"].get(group, {}).get("busy_seconds_ratio")
        told = "" if found is None else f"; without those waits the ratio to the primary target is {found:.2f}"
        out.append(f"settings waited for a processor for up to {idle:.0%} of their time: the machine was busy{told}")
    for label, own in panel["settings"].items():
        if own.get("borders"):
            where = ", ".join(own["borders"])
            out.append(f"{label}, the best or fastest of {own['group']}, lies at its grid's border in {where}")
    return out


def best_label(panel: Mapping[str, Any], group: str) -> str:
    """Return the label of a group's setting with the best smoothed validation score."""
    settings = panel["settings"]
    own = (label for label in settings if settings[label]["group"] == group)
    best: str = max(own, key=lambda label: float(settings[label]["best"]["mean"]))
    return best


def _differences(panel: Mapping[str, Any], group: str) -> dict[str, float]:
    mine, theirs = (panel["settings"][best_label(panel, name)] for name in (group, BASELINE))
    return {
        "best_difference": mine["best"]["mean"] - theirs["best"]["mean"],
        "test_difference": mine["test_at_best"]["mean"] - theirs["test_at_best"]["mean"],
    }


def _both_dense(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    return mine["is_dense"] is not False and theirs["is_dense"] is not False
