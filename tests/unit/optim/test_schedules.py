"""Schedules are pure functions of the step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dngd.optim import HyperbolicDecay, KFACPreconditioner, UpdateSchedule, learning_rate, value_at


def test_values() -> None:
    assert value_at(0.5, 10) == 0.5
    assert value_at(lambda step: step / 4, 10) == 2.5


def test_hyperbolic_whatever_the_length() -> None:
    for total_steps in (10, 1000):
        rates = [learning_rate(step, total_steps, 0.4, "hyperbolic", 2, 20) for step in (0, 1, 2, 22, 62, 402)]
        assert rates == pytest.approx([0.2, 0.4, 0.4, 0.2, 0.1, 0.4 / 21])


def test_cosine() -> None:
    rates = [learning_rate(step, 100, 0.4, "cosine", 0) for step in range(101)]
    assert rates[0] == 0.4
    assert rates[50] == pytest.approx(0.2)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert rates == sorted(rates, reverse=True)


def test_warm_up_then_constant() -> None:
    rates = [learning_rate(step, 100, 0.4, "constant", 4) for step in range(8)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4])
    assert learning_rate(4, 100, 0.4, "cosine", 4) == 0.4


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 30))
def test_every_layer_is_refreshed_once_a_period(period: int, num_layers: int, dense_steps: int) -> None:
    schedule = UpdateSchedule(10, period, dense_steps)
    assert schedule.layers_due(0, num_layers) == list(range(num_layers))
    for start in (period, 5 * period):
        due = [layer for step in range(start, start + period) for layer in schedule.layers_due(step, num_layers)]
        assert sorted(due) == list(range(num_layers))
        if period >= num_layers:
            assert max(len(schedule.layers_due(s, num_layers)) for s in range(start, start + period)) == 1


def test_dense_at_first() -> None:
    schedule = UpdateSchedule(10, 50, 20)
    assert [step for step in range(41) if schedule.is_factor_step(step)] == [*range(20), 20, 30, 32, 40]
    assert [step for step in range(50) if schedule.layers_due(step, 2) == [0, 1]] == [0, 1]
    assert [step for step in range(50) if schedule.layers_due(step, 2) == [0]] == [2, 4, 8, 16, 32]
    assert [step for step in range(50) if schedule.layers_due(step, 2) == [1]] == [3, 5, 9, 17, 25, 33]
    assert [step for step in range(50) if UpdateSchedule(10, 50, 0).layers_due(step, 2)] == [0, 25]


def test_a_round_that_would_be_cut_short_is_of_all_layers_at_once() -> None:
    schedule = UpdateSchedule(10, 50, 1)
    due = {layers: [schedule.layers_due(step, layers) for step in range(9)] for layers in (1, 3, 5)}
    assert due[1] == [[0], [0], [0], [], [0], [], [], [], [0]]
    assert due[3] == [[0, 1, 2]] * 3 + [[], [0], [1], [2], [], [0]]
    every = [*range(5)]
    assert due[5] == [every, every, every, [], every, [], [], [], [0]]


def test_such_rounds_are_left_out_where_a_refresh_takes_steps() -> None:
    schedule = UpdateSchedule(10, 50, 1, at_once=False)
    assert [step for step in range(9) if schedule.layers_due(step, 3)] == [0, 4, 5, 6, 8]
    late = KFACPreconditioner(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), inverse_delay=3)
    prompt = KFACPreconditioner(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert (late.schedule.at_once, prompt.schedule.at_once) == (False, True)
    late.close()
    prompt.close()


def test_early_rounds_begin_with_a_factor_step() -> None:
    schedule = UpdateSchedule(10, 50, 1)
    measured = [step for step in range(101) if schedule.is_factor_step(step)]
    assert measured == [0, 1, 2, 4, 8, 10, 16, 20, 30, 32, *range(40, 101, 10)]
    assert [step for step in range(50) if schedule.layers_due(step, 2) == [0]] == [
        2,
        4,
        8,
        16,
        32,
    ]  # on fresh statistics
    assert [step for step in range(41) if UpdateSchedule(10, 50, 0).is_factor_step(step)] == [0, 10, 20, 30, 40]


def test_hyperbolic_decay() -> None:
    schedule = HyperbolicDecay(0.4, 10)
    assert [value_at(schedule, step) for step in (0, 10, 30)] == pytest.approx([0.4, 0.2, 0.1])
    squared = HyperbolicDecay(0.4, 10, power=2)
    assert [value_at(squared, step) for step in (0, 10, 30)] == pytest.approx([0.4, 0.1, 0.025])
