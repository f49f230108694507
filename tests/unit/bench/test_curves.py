"""Crossings, means and comparisons on given curves."""

from __future__ import annotations

import pytest

from dngd.bench.curves import (
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

RISING = Curve((0, 10, 20, 30), (0.0, 1.0, 2.0, 4.0), (0.1, 0.5, 0.7, 0.9))


def test_a_crossing_is_interpolated_between_evaluations() -> None:
    reach = first_reach(RISING, 0.8)
    assert reach is not None
    assert (reach.seconds, reach.steps) == pytest.approx((3.0, 25.0))
    assert reach.evaluation_step == 30


def test_an_evaluation_at_the_target_counts_and_none_is_made_up() -> None:
    assert first_reach(RISING, 0.7) == Reach(2.0, 20.0, 20, evaluations=2)
    assert first_reach(RISING, 0.9) == Reach(4.0, 30.0, 30, evaluations=3)
    assert first_reach(RISING, 0.9000001) is None
    assert first_reach(RISING, 0.05) == Reach(0.0, 0.0, 0, evaluations=0)


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


def test_a_smoothed_value_is_the_mean_of_its_neighbours_as_many_on_either_side() -> None:
    curve = Curve(tuple(range(7)), tuple(map(float, range(7))), (0.0, 3.0, 0.0, 3.0, 0.0, 3.0, 9.0))
    smooth = smoothed(curve)
    assert smooth.accuracy == pytest.approx((0.0, 1.0, 6 / 5, 9 / 5, 3.0, 4.0, 9.0))
    assert (smooth.steps, smooth.seconds) == (curve.steps, curve.seconds)
    assert smoothed(curve, 0).accuracy == pytest.approx(curve.accuracy)


def test_smoothing_leaves_a_straight_line_alone_and_takes_a_lone_peak_away() -> None:
    line = Curve(tuple(range(12)), tuple(map(float, range(12))), tuple(0.05 * i for i in range(12)))
    assert smoothed(line).accuracy == pytest.approx(line.accuracy)
    peak = Curve(line.steps, line.seconds, (0.5,) * 5 + (0.9,) + (0.5,) * 6)
    assert first_reach(peak, 0.6) is not None
    assert first_reach(smoothed(peak), 0.6) is None


def test_smoothing_and_averaging_may_change_places() -> None:
    one = Curve((0, 1, 2, 3), (0, 1, 2, 3), (0.1, 0.9, 0.3, 0.5))
    two = Curve((0, 1, 2, 3), (0, 1, 2, 3), (0.2, 0.4, 0.8, 0.7))
    first = smoothed(mean_curve([one, two])).accuracy
    assert first == pytest.approx(mean_curve([smoothed(one), smoothed(two)]).accuracy)


def test_twenty_evaluations_before_a_target_are_enough_and_nineteen_are_not() -> None:
    curve = Curve(tuple(range(31)), tuple(map(float, range(31))), tuple(i / 30 for i in range(31)))
    for step, is_dense in ((19, False), (20, True)):
        reach = first_reach(curve, step / 30)
        assert reach is not None
        assert (reach.evaluations, reach.is_dense) == (step, is_dense)


def test_the_first_of_the_best_points_counts() -> None:
    assert best_point(Curve((0, 1, 2, 3), (0, 1, 2, 3), (0.1, 0.8, 0.8, 0.7))) == 1


def test_seconds_lie_on_the_line_between_evaluations() -> None:
    assert seconds_at(RISING, 25) == pytest.approx(3.0)


def test_a_band_is_a_standard_deviation_on_each_side_of_the_mean() -> None:
    one, two = Curve((0, 5), (0.0, 1.0), (0.2, 0.6)), Curve((0, 5), (0.0, 3.0), (0.4, 0.6))
    low, high = band([one, two])
    assert low == pytest.approx([0.3 - 0.02**0.5, 0.6])
    assert high == pytest.approx([0.3 + 0.02**0.5, 0.6])
    assert band([one]) == ([0.2, 0.6], [0.2, 0.6])


def test_the_quickest_first_order_group_gives_a_ratio_of_its_own() -> None:
    adam = Curve((0, 10), (0.0, 8.0), (0.0, 0.8))
    sgd = Curve((0, 40), (0.0, 4.0), (0.0, 0.8))
    kfac = Curve((0, 10), (0.0, 2.0), (0.0, 0.8))
    groups = {"kfac": {"k": kfac}, "adam": {"a": adam}, "sgd": {"s": sgd}}
    (compared,) = compare_groups(groups, [0.8], "adam", first_order=("adam", "sgd"))
    found = compared["groups"]["kfac"]
    assert (found["seconds_ratio"], found["seconds_ratio_to_first_order"]) == pytest.approx((4.0, 2.0))
    assert (found["steps_ratio"], found["steps_ratio_to_first_order"]) == pytest.approx((1.0, 1.0))
