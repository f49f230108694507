"""The cost model: hand-computed cases, what must grow with what, and that a fit finds what made the steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dngd.bench.cost_model import (
    Load,
    Network,
    Observation,
    all_reduce,
    broadcast,
    fit_network,
    predict_step,
    relative_error,
)

ranks = st.integers(2, 64)
payloads = st.floats(1.0, 1e9)
rates = st.floats(1e6, 1e11)
networks = st.builds(Network, st.floats(0.0, 1e-2), st.floats(0.05, 1.0), st.floats(0.0, 1e-7))


def test_a_ring_of_four_by_hand() -> None:
    # Four ranks, 8 MB: chunks of 2 MB, of which each link carries 3 to reduce and 3 to gather.
    assert all_reduce(4, 8e6) == Load(6, 12e6)
    # In three calls the bytes are the same, the latencies three times as many.
    assert all_reduce(4, 8e6, calls=3) == Load(18, 12e6)
    assert all_reduce(2, 8e6) == Load(2, 8e6)
    assert all_reduce(1, 8e6) == Load(0, 0)


def test_a_binomial_tree_by_hand() -> None:
    # 0 -> 1, then 0 -> 2 and 1 -> 3: the source sends the whole buffer twice.
    assert broadcast(4, 3e6) == Load(2, 6e6)
    assert [broadcast(n, 1.0).rounds for n in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]


def test_a_step_by_hand() -> None:
    network = Network(latency_seconds=1e-3, efficiency=0.5, host_seconds_per_byte=1e-9)
    # 6 rounds of 1 ms, 12 MB at half of 12 MB/s: 2 s, 12 MB x 1 ns: 12 ms, and 0.1 s of compute.
    assert predict_step(0.1, all_reduce(4, 8e6), 12e6, network) == pytest.approx(0.1 + 0.006 + 2.0 + 0.012)
    assert relative_error(1.1, 1.0) == pytest.approx(0.1)
    assert relative_error(0.9, 1.0) == pytest.approx(0.1)


def test_loads_add_up_and_are_amortised() -> None:
    a_period = all_reduce(2, 100.0, calls=3) + broadcast(2, 50.0, calls=6)
    assert a_period == Load(12, 150)
    assert a_period.times(1 / 50) == Load(12 / 50, 3)


@given(ranks, payloads, st.floats(1.01, 10), rates, networks)
def test_more_bytes_or_a_slower_link_or_more_ranks_take_no_less(
    n: int, payload: float, factor: float, rate: float, network: Network
) -> None:
    for collective in (all_reduce, broadcast):
        seconds = network.seconds(collective(n, payload), rate)
        assert network.seconds(collective(n, payload * factor), rate) > seconds
        assert network.seconds(collective(n, payload), rate / factor) > seconds
        assert network.seconds(collective(n + 1, payload), rate) >= seconds
        assert network.seconds(collective(n, payload, calls=2), rate) >= seconds
        assert network.seconds(collective(1, payload), rate) == 0


@given(ranks, payloads, rates)
def test_a_ring_never_takes_twice_the_time_of_its_bytes(n: int, payload: float, rate: float) -> None:
    free = Network(0.0, 1.0)
    seconds = free.seconds(all_reduce(n, payload), rate)
    assert payload / rate <= seconds * (1 + 1e-9)
    assert seconds < 2 * payload / rate


def made_by(network: Network, scale: float = 1.0) -> list[Observation]:
    """Steps that a network would yield, over hosts, rates and payloads."""
    out = []
    for n in (2, 4):
        for payload in (0.8e6, 2.7e6):
            for rate in (12.5e6, 125e6):
                load = (all_reduce(n, payload) + broadcast(n, 0.02 * payload, calls=0.1)).times(scale)
                out.append(Observation(0.08, load, rate, predict_step(0.08, load, rate, network)))
    return out


@settings(deadline=None)
@given(st.floats(1e-5, 1e-2), st.floats(0.3, 1.0), st.floats(1e-10, 1e-8))
def test_a_fit_recovers_what_made_the_steps(latency: float, efficiency: float, per_byte: float) -> None:
    found = fit_network(made_by(Network(latency, efficiency, per_byte)))
    assert found.latency_seconds == pytest.approx(latency, rel=1e-3)
    assert found.efficiency == pytest.approx(efficiency, rel=1e-3)
    assert found.host_seconds_per_byte == pytest.approx(per_byte, rel=1e-3)


@given(st.lists(st.floats(0.9, 1.1), min_size=8, max_size=8))
def test_a_fit_to_noisy_steps_has_no_negative_cost(noise: list[float]) -> None:
    true = Network(3e-4, 0.9, 1e-9)
    noisy = [replace(one, step_seconds=one.step_seconds * by) for one, by in zip(made_by(true), noise)]
    found = fit_network(noisy)
    assert found.latency_seconds >= 0
    assert found.efficiency > 0
    assert found.host_seconds_per_byte >= 0
    # It explains the steps at least as well as what made them.
    assert squared(found, noisy) <= squared(true, noisy) * (1 + 1e-9) + 1e-18


def squared(network: Network, steps: list[Observation]) -> float:
    return sum(
        ((predict_step(s.compute_seconds, s.load, s.bytes_per_second, network) - s.step_seconds) / s.step_seconds) ** 2
        for s in steps
    )


@given(networks)
def test_half_of_the_steps_predict_the_other_half(network: Network) -> None:
    steps = made_by(network)
    assume(all(step.step_seconds > 0 for step in steps))
    found = fit_network(steps[::2] + steps[1:2])
    for step in steps:
        predicted = predict_step(step.compute_seconds, step.load, step.bytes_per_second, found)
        assert relative_error(predicted, step.step_seconds) < 1e-3


def test_what_cannot_be_fitted_is_refused() -> None:
    steps = made_by(Network(1e-4, 0.9))
    with pytest.raises(ValueError, match="at least 3"):
        fit_network(steps[:2])
    same = [replace(step, step_seconds=step.compute_seconds) for step in steps]
    with pytest.raises(ValueError, match="no rate to be fitted"):
        fit_network(same)
