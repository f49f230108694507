"""Targets, ratios and what must be told, of curves with known answers."""

from __future__ import annotations

from typing import Any

import pytest

from dngd.bench.competitors import Setting
from dngd.bench.runs import RunRecord
from dngd.bench.verdict import aggregate, best_label, judge, remarks

STEPS = 41


def run(label: str, best: float, pace: float, *, reached_at: int = 30, idle: float = 0.0, seed: int = 0) -> RunRecord:
    """A straight rise to `best` at step reached_at, then level, at `pace` seconds a step."""
    scores = [best * min(1.0, step / reached_at) for step in range(STEPS)]
    seconds = [pace * step for step in range(STEPS)]
    return RunRecord(
        label,
        {
            "seed": seed,
            "step": list(range(STEPS)),
            "seconds": seconds,
            "busy_seconds": [(1 - idle) * value for value in seconds],
            "val_score": scores,
            "test_score": [score - 0.1 for score in scores],
            "train_seconds": seconds[-1],
            "idle_seconds": idle * seconds[-1],
        },
    )


KFAC, ADAM, SLOW, SGD = (
    Setting(group, group, lr) for group, lr in (("kfac", 0.1), ("adam", 0.01), ("adam", 0.001), ("sgd", 0.1))
)
SETTINGS = [KFAC, ADAM, SLOW, SGD]


def panel(**changes: RunRecord) -> dict[str, Any]:
    runs = {
        "kfac": run(KFAC.label, 0.8, 1.0, reached_at=24),
        "adam": run(ADAM.label, 0.8, 2.0),
        "slow": run(SLOW.label, 0.6, 1.0),
        "sgd": run(SGD.label, 0.7, 0.1),
    } | changes
    judged = judge(SETTINGS, list(runs.values()), None, ["adam", "sgd"])
    return {"name": "graph", **judged}


def test_targets_are_the_baselines_and_ratios_are_over_the_subject() -> None:
    found = panel()
    assert found["targets"] == pytest.approx([0.795, 0.8])
    primary = found["comparison"][0]["groups"]
    # 0.795 lies on the straight part of both: 23.85 and 29.8125 steps, unless smoothing rounds the corner.
    assert primary["kfac"]["steps"] == pytest.approx(24, abs=1.5)
    assert primary["adam"]["steps"] == pytest.approx(30, abs=1.5)
    assert primary["kfac"]["seconds_ratio"] == pytest.approx(2.5, rel=0.03)
    assert primary["kfac"]["steps_ratio"] == pytest.approx(1.25, rel=0.03)
    assert primary["adam"]["seconds_setting"] == ADAM.label
    assert primary["sgd"]["seconds"] is None
    assert best_label(found, "adam") == ADAM.label
    own = found["settings"][ADAM.label]
    assert own["test_at_best"]["mean"] == pytest.approx(own["best"]["mean"] - 0.1)


def test_ratios_are_told_seed_by_seed() -> None:
    """The second seed's K-FAC is as slow as Adam, the third's never gets there."""
    runs = []
    for seed, (pace, best) in enumerate(((1.0, 0.8), (2.0, 0.8), (1.0, 0.7))):
        runs.append(run(KFAC.label, best, pace, seed=seed))
        runs.append(run(ADAM.label, 0.8, 2.0, seed=seed))
    judged = judge([KFAC, ADAM], runs, [0.75], ["adam"])
    (compared,) = judged["comparison"]
    assert compared["groups"]["kfac"]["seconds_ratios_of_seeds"] == pytest.approx([2.0, 1.0])
    assert compared["groups"]["adam"]["seconds_ratios_of_seeds"] == pytest.approx([1.0, 1.0, 1.0])


def test_waits_for_a_processor_are_told_and_taken_off() -> None:
    found = panel(kfac=run(KFAC.label, 0.8, 1.0, reached_at=24, idle=0.5))
    own = found["comparison"][0]["groups"]["kfac"]
    assert own["busy_seconds"] == pytest.approx(own["seconds"] / 2)
    assert own["busy_seconds_ratio"] == pytest.approx(2 * own["seconds_ratio"])
    (told,) = (text for text in remarks(found, "kfac") if "busy" in text)
    assert "50%" in told
    assert f"{own['busy_seconds_ratio']:.2f}" in told
    assert not [text for text in remarks(panel(), "kfac") if "busy" in text]


def test_a_loss_is_told() -> None:
    lost = panel(kfac=run(KFAC.label, 0.8, 3.0, reached_at=24))
    assert any("slower than adam to the primary target" in text for text in remarks(lost, "kfac"))
    never = panel(kfac=run(KFAC.label, 0.79, 1.0))
    texts = remarks(never, "kfac")
    assert any("never reaches the primary target 0.7950" in text for text in texts)
    assert any("never reaches the secondary target" in text for text in texts)
    assert remarks(panel(), "kfac") == []


def test_a_target_reached_before_twenty_evaluations_is_told() -> None:
    thin = panel(kfac=run(KFAC.label, 0.9, 1.0, reached_at=20))
    assert thin["comparison"][0]["groups"]["kfac"]["is_dense"] is False
    assert any("kfac reaches the primary target within 18 evaluations" in text for text in remarks(thin, "kfac"))
    assert aggregate([thin], "kfac")[0]["panels"][0]["is_dense"] is False  # type: ignore[index]


def test_a_border_is_told() -> None:
    found = panel()
    found["settings"][ADAM.label]["borders"] = ["learning rate", "epochs"]
    (told,) = remarks(found, "kfac")
    assert "adam lr=0.01" in told
    assert told.endswith("border in learning rate, epochs")


def test_panels_are_summed_up_by_median_and_worst_and_never_counts_as_nothing() -> None:
    good = panel()
    even = panel(kfac=run(KFAC.label, 0.81, 2.0))
    never = panel(kfac=run(KFAC.label, 0.7, 1.0))
    primary, secondary = aggregate([good, even, never], "kfac") or [{}, {}]
    assert primary["seconds_ratio"]["worst"] == 0.0
    assert primary["seconds_ratio"]["median"] == pytest.approx(1.0, abs=0.06)
    assert primary["seconds_ratio"]["best"] == pytest.approx(2.5, rel=0.03)
    assert primary["never"] == secondary["never"] == 1
    assert primary["best_difference"] == pytest.approx({"median": 0.0, "worst": -0.1, "best": 0.01})
    assert [row["seconds_ratio"] for row in primary["panels"]][2] == 0.0


def test_the_quickest_first_order_optimizer_may_be_another() -> None:
    found = panel(sgd=run(SGD.label, 0.8, 0.5))
    own = found["comparison"][0]["groups"]["kfac"]
    assert own["seconds_ratio"] == pytest.approx(2.5, rel=0.03)
    assert own["seconds_ratio_to_first_order"] == pytest.approx(0.625, rel=0.03)


def test_without_a_baseline_there_is_no_summary() -> None:
    judged = judge([KFAC], [run(KFAC.label, 0.8, 1.0)], [0.5], [])
    assert aggregate([{"name": "graph", **judged}], "kfac") is None
    assert aggregate([], "kfac") is None
