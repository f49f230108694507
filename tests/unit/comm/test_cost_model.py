"""The choice of a strategy: its formulas, its limits, and that it is a pure function."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dngd.comm import (
    STRATEGIES,
    LayerCost,
    Line,
    LocalCommunicator,
    Network,
    assign_owners,
    choose_strategy,
    cost_model,
    probe_network,
    seconds_per_step,
)
from tests.helpers.mutants import assert_caught
from tests.helpers.thread_world import ThreadCommunicator, run_threads

SECONDS = st.floats(1e-6, 1.0)
FREE, FAR = Line(0.0, 0.0), Line(1e-4, 1e-7)


def cost(t_a: float = 4e-3, t_g: float = 2e-3, t_v: float = 1e-3, gradient_bytes: int = 4000) -> LayerCost:
    return LayerCost((t_a, t_g), t_v, 1000, gradient_bytes)


def law_formulas() -> None:
    """The module's formulas at numbers that are easily worked out."""
    network = Network(FREE, Line(1e-3, 1e-6))
    of = {s: seconds_per_step(s, cost(), network, period=10, world_size=4, num_layers=2) for s in STRATEGIES}
    assert of["replicate"] == pytest.approx(6e-3 / 10 + 1e-3)
    assert of["share_inverse"] == pytest.approx((4e-3 + 2e-3 + 1e-3) / 10 + 1e-3)
    assert of["share_gradient"] == pytest.approx((6e-3 + 1e-3 + 2e-6) / 10 + 0.5e-3 + 1e-3 + 4e-3)


def test_formulas() -> None:
    law_formulas()
    assert_caught(law_formulas, Line, "seconds", lambda self, num_bytes: self.latency_seconds * num_bytes)


def choose(network: Network, of: LayerCost, present: str = "share_inverse", period: int = 10) -> str:
    return choose_strategy(
        of,
        network,
        present=present,  # type: ignore[arg-type]
        allowed=STRATEGIES,
        period=period,
        world_size=4,
        num_layers=3,
    )


def law_choice_follows_the_network() -> None:
    """A slow network: nothing is sent. A free one: a large inversion is shared, a dear preconditioning too."""
    assert choose(Network(FAR, Line(1.0, 1e-3)), cost()) == "replicate"
    assert choose(Network(FREE, FREE), cost(t_v=1e-6)) == "share_inverse"
    assert choose(Network(FREE, FREE), cost(t_a=1e-6, t_g=1e-6, t_v=1.0)) == "share_gradient"


def test_choice_follows_the_network() -> None:
    law_choice_follows_the_network()
    assert_caught(
        law_choice_follows_the_network,
        cost_model,
        "seconds_per_step",
        lambda strategy, of, network, **sizes: STRATEGIES.index(strategy),
    )


def test_a_small_gain_does_not_change_the_plan() -> None:
    """Otherwise noise of the timings would move inverses about at every plan."""
    free = Network(FREE, FREE)
    nearly = cost(t_a=1e-3, t_g=1e-5, t_v=1.0)
    assert choose(free, nearly, present="replicate", period=1) == "share_gradient"
    nearly = cost(t_a=1e-3, t_g=0.5e-4, t_v=1e-6)
    assert choose(free, nearly, present="replicate") == "replicate"
    assert choose(free, cost(t_a=1e-3, t_g=1e-3, t_v=1e-6), present="replicate") == "share_inverse"


@settings(max_examples=50, deadline=None)
@given(SECONDS, SECONDS, SECONDS, st.integers(1, 10**8), SECONDS, st.floats(1e-12, 1e-6), st.integers(2, 64))
def test_the_chosen_one_is_never_dearer_than_a_tenth_above_the_best(
    t_a: float, t_g: float, t_v: float, gradient_bytes: int, latency: float, per_byte: float, world_size: int
) -> None:
    network = Network(FREE, Line(latency, per_byte))
    of = cost(t_a, t_g, t_v, gradient_bytes)

    def seconds(strategy: str) -> float:
        return seconds_per_step(strategy, of, network, period=50, world_size=world_size, num_layers=3)  # type: ignore[arg-type]

    for present in STRATEGIES:
        chosen = choose_strategy(
            of, network, present=present, allowed=STRATEGIES, period=50, world_size=world_size, num_layers=3
        )
        assert seconds(chosen) <= min(map(seconds, STRATEGIES)) / 0.9 * (1 + 1e-9)
        assert seconds(chosen) <= seconds(present) * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(SECONDS, st.floats(0, 1e-6), st.integers(1, 4096), st.integers(5000, 10**7))
def test_a_line_goes_through_its_points(latency: float, per_byte: float, small: int, large: int) -> None:
    line = Line(latency, per_byte)
    fitted = Line.through((small, line.seconds(small)), (large, line.seconds(large)))
    assert fitted.seconds(1_000_000) == pytest.approx(line.seconds(1_000_000), rel=1e-6, abs=1e-9)
    noisy = Line.through((small, 1.0), (large, 0.5))
    assert noisy.seconds_per_byte == 0.0
    assert noisy.latency_seconds == 1.0


def test_probe_is_the_same_on_all_ranks() -> None:
    def probe(comm: ThreadCommunicator) -> Network:
        return probe_network(comm, torch.device("cpu"))

    found = run_threads(3, probe)
    assert found[0] == found[1] == found[2]
    assert found[0].broadcast.seconds(1000) > 0
    assert probe_network(LocalCommunicator(), torch.device("cpu")).all_reduce.latency_seconds >= 0


def law_both_factors_of_a_refresh_have_owners_of_their_own() -> None:
    """Ranks wait for the busiest one of a refresh: balance over all refreshes together would not help them."""
    costs = {("a", "A"): 8.0, ("a", "G"): 7.0, ("b", "A"): 9.0, ("b", "G"): 1.0, ("c", "A"): 3.0, ("c", "G"): 3.0}
    groups = [[(name, "A"), (name, "G")] for name in "abc"]
    owners = assign_owners(costs, 2, groups)
    for name in "abc":
        assert owners[name, "A"] != owners[name, "G"]
    assert owners == assign_owners(dict(reversed(costs.items())), 2, list(reversed(groups)))
    loads = [sum(c for f, c in costs.items() if owners[f] == rank) for rank in (0, 1)]
    assert max(loads) - min(loads) <= 7


def test_both_factors_of_a_refresh_have_owners_of_their_own() -> None:
    law_both_factors_of_a_refresh_have_owners_of_their_own()
    original: Callable[..., dict[tuple[str, str], int]] = assign_owners
    assert_caught(
        law_both_factors_of_a_refresh_have_owners_of_their_own,
        sys.modules[__name__],
        "assign_owners",
        lambda costs, world_size, groups: original(costs, world_size),
    )
