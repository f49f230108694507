"""Orders, periods and summaries on given numbers."""

from __future__ import annotations

from collections import Counter

import pytest

from dngd.bench.timing import ratios_to, summary_ms, turn_order, whole_periods


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_batch_is_taken_by_all_in_a_rotated_order(count: int) -> None:
    for batch in range(40):
        order = turn_order(batch, count, 50)
        assert sorted(order) == list(range(count))
        assert order == [(order[0] + i) % count for i in range(count)]
    if count > 1:
        assert turn_order(0, count, 50) != turn_order(1, count, 50)


@pytest.mark.parametrize(("count", "period"), [(2, 50), (2, 10), (3, 30), (2, 7)])
def test_costly_steps_have_every_place_equally_often(count: int, period: int) -> None:
    """Without the shift between periods, step 0 of each period would always be first where count divides it."""
    for offset in range(period):
        places = Counter(turn_order(k * period + offset, count, period).index(0) for k in range(4 * count))
        if period % count == 0:
            assert set(places.values()) == {4}
        else:
            assert len(places) > 1 or (period + 1) % count == 0


@pytest.mark.parametrize(("steps", "period", "expected"), [(1, 50, 50), (50, 50, 50), (51, 50, 100), (7, 1, 7)])
def test_steps_are_rounded_up_to_whole_periods(steps: int, period: int, expected: int) -> None:
    assert whole_periods(steps, period) == expected


def test_summary_and_ratios_of_given_times() -> None:
    adam = summary_ms([0.010] * 100)
    kfac = summary_ms([0.012] * 90 + [0.030] * 10)
    assert adam["mean_ms"] == pytest.approx(10)
    assert adam["p99_over_p50"] == pytest.approx(1)
    assert kfac["mean_ms"] == pytest.approx(13.8)
    assert (kfac["p50_ms"], kfac["p99_ms"], kfac["max_ms"]) == pytest.approx((12, 30, 30))
    ratios = ratios_to("adam", {"adam": adam, "kfac": kfac})
    assert ratios is not None
    assert ratios["kfac"] == pytest.approx({"mean": 1.38, "p99_over_p50": 2.5})
    assert ratios["adam"] == pytest.approx({"mean": 1.0, "p99_over_p50": 1.0})


def test_no_ratio_without_its_base() -> None:
    assert ratios_to("adam", {"kfac": summary_ms([0.1])}) is None
