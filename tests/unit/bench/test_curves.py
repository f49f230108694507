"""Crossings, means and comparisons on given curves."""

from __future__ import annotations

import pytest

from dngd.bench.curves import Curve, Reach, compare_groups, default_targets, first_reach, mean_curve, spread

RISING = Curve((0, 10, 20, 30), (0.0, 1.0, 2.0, 4.0), (0.1, 0.5, 0.7, 0.9))


def test_a_crossing_is_interpolated_between_evaluations() -> None:
    reach = first_reach(RISING, 0.8)
    assert reach is not None
    assert (reach.seconds, reach.steps) == pytest.approx((3.0, 25.0))
    assert reach.evaluation_step == 30


def test_an_evaluation_at_the_target_counts_and_none_is_made_up() -> None:
    assert first_reach(RISING, 0.7) == Reach(2.0, 20.0, 20)
    assert first_reach(RISING, 0.9) == Reach(4.0, 30.0, 30)
    assert first_reach(RISING, 0.9000001) is None
    assert first_reach(RISING, 0.05) == Reach(0.0, 0.0, 0)


def test_the_first_crossing_counts_where_a_curve_falls_again() -> None:
    curve = Curve((0, 1, 2, 3), (0, 1, 2, 3), (0.0, 0.8, 0.2, 0.9))
    reach = first_reach(curve, 0.4)
    assert reach is not None
    assert reach.steps == pytest.approx(0.5)


def test_curves_are_averaged_at_equal_steps() -> None:
    one, two = Curve((0, 5), (0.0, 1.0), (0.2, 0.6)), Curve((0, 5), (0.0, 3.0), (0.4, 0.8))
    mean = mean_curve([one, two])
    assert mean.steps == (0, 5)
    assert mean.seconds == pytest.approx((0.0, 2.0))
    assert mean.accuracy == pytest.approx((0.3, 0.7))
    with pytest.raises(AssertionError):
        mean_curve([one, Curve((0, 6), (0.0, 1.0), (0.2, 0.6))])


def test_default_targets_are_the_best_of_the_grid_and_a_little_below() -> None:
    other = Curve((0, 10), (0.0, 1.0), (0.1, 0.93))
    assert default_targets([RISING, other]) == pytest.approx((0.925, 0.93))


def test_spread_of_one_value_has_no_deviation() -> None:
    assert spread([0.5]) == {"mean": 0.5, "std": None}
    assert spread([0.4, 0.6])["std"] == pytest.approx(0.1414213562)


def test_groups_are_compared_by_their_best_setting() -> None:
    slow = Curve((0, 10, 20), (0.0, 5.0, 10.0), (0.0, 0.4, 0.8))
    fast = Curve((0, 10, 20), (0.0, 2.0, 4.0), (0.0, 0.4, 0.8))
    never = Curve((0, 10, 20), (0.0, 0.1, 0.2), (0.0, 0.1, 0.2))
    kfac = Curve((0, 10, 20), (0.0, 1.0, 2.0), (0.0, 0.8, 0.85))
    groups = {"kfac": {"k": kfac}, "adam": {"slow": slow, "fast": fast, "never": never}}
    low, high = compare_groups(groups, [0.4, 0.82], "adam")
    assert low["groups"]["adam"]["seconds_setting"] == "fast"
    assert low["groups"]["kfac"]["seconds_ratio"] == pytest.approx(2.0 / 0.5)
    assert low["groups"]["kfac"]["steps_ratio"] == pytest.approx(10 / 5)
    assert low["groups"]["adam"]["seconds_ratio"] == 1.0
    # Adam never gets to the higher target: there is no ratio, in either direction.
    assert high["groups"]["adam"]["seconds"] is None
    assert high["groups"]["kfac"]["seconds"] is not None
    assert high["groups"]["kfac"]["seconds_ratio"] is None
    assert high["groups"]["kfac"]["steps_ratio"] is None


def test_no_ratio_without_the_baseline() -> None:
    (compared,) = compare_groups({"kfac": {"k": RISING}}, [0.5], "adam")
    assert compared["groups"]["kfac"]["seconds"] == pytest.approx(1.0)
    assert compared["groups"]["kfac"]["seconds_ratio"] is None
