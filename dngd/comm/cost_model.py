"""What a way of sharing curvature costs a step, and which one is cheapest for a layer.

Three strategies, named by what crosses the network after the statistics are reduced:

    replicate       nothing: every rank inverts both factors itself
    share_inverse   the inverses: each factor's owner inverts and broadcasts. KAISA's COMM-OPT (Pauloski et al. 2021)
    share_gradient  the preconditioned gradient, every step: one owner inverts, keeps and applies both. KAISA's MEM-OPT

A plan that mixes them between layers is what KAISA calls HYBRID. With N ranks, L layers and a refresh of each layer
every P steps, T_A and T_G the seconds of the inversions, T_v of one preconditioning, and b(n) = α + βn of a
broadcast of n bytes, a layer costs, in seconds a step (the other ranks wait for the owner):

    replicate       (T_A + T_G) / P + T_v
    share_inverse   (max(T_A, T_G) + 2α + β·inverse_bytes) / P + T_v
    share_gradient  (T_A + T_G + b(2)) / P + T_v / K + αK/L + β·gradient_bytes,    K = min(N, L) owners at work at once

The reduction of the statistics, r(factor_bytes) / P, is the same for all three and is left out. An inverse_delay
hides part of the first terms of each; the model does not count on it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

Strategy = Literal["replicate", "share_inverse", "share_gradient"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

LEAST_GAIN = 0.1
"""Share of a layer's present cost that another strategy must save before the plan changes: timings are noisy."""


@dataclass(frozen=True)
class Line:
    """Seconds of a collective of n bytes: latency_seconds + n · seconds_per_byte."""

    latency_seconds: float
    seconds_per_byte: float

    def seconds(self, num_bytes: float) -> float:
        """Return α + βn."""
        return self.latency_seconds + num_bytes * self.seconds_per_byte

    @classmethod
    def through(cls, small: tuple[int, float], large: tuple[int, float]) -> Line:
        """Return the line through two measured (bytes, seconds); neither term is ever negative."""
        slope = max(0.0, (large[1] - small[1]) / (large[0] - small[0]))
        return cls(max(0.0, small[1] - slope * small[0]), slope)


@dataclass(frozen=True)
class Network:
    """Measured collectives of this world at its own size, so that no topology is assumed."""

    all_reduce: Line
    broadcast: Line


@dataclass(frozen=True)
class LayerCost:
    """What the choice for one layer depends on. inversion_seconds: (T_A, T_G); bytes as sent."""

    inversion_seconds: tuple[float, float]
    precondition_seconds: float
    inverse_bytes: int
    gradient_bytes: int


def seconds_per_step(
    strategy: Strategy, cost: LayerCost, network: Network, *, period: int, world_size: int, num_layers: int
) -> float:
    """Return the modelled seconds that a layer adds to a step; see the module's formulas."""
    both = sum(cost.inversion_seconds)
    latency, per_byte = network.broadcast.latency_seconds, network.broadcast.seconds_per_byte
    if strategy == "replicate":
        return both / period + cost.precondition_seconds
    if strategy == "share_inverse":
        shared = max(cost.inversion_seconds) + 2 * latency + per_byte * cost.inverse_bytes
        return shared / period + cost.precondition_seconds
    at_work = min(world_size, num_layers)
    each_step = cost.precondition_seconds / at_work + latency * at_work / num_layers + per_byte * cost.gradient_bytes
    return (both + network.broadcast.seconds(2)) / period + each_step


def choose_strategy(
    cost: LayerCost,
    network: Network,
    *,
    present: Strategy,
    allowed: Collection[Strategy],
    period: int,
    world_size: int,
    num_layers: int,
) -> Strategy:
    """Return the cheapest allowed strategy; the present one unless another saves a tenth of its cost.

    A pure function: ranks that hold the same numbers choose alike. Ties go to the earlier of STRATEGIES.
    """
    costs = {
        strategy: seconds_per_step(strategy, cost, network, period=period, world_size=world_size, num_layers=num_layers)
        for strategy in STRATEGIES
        if strategy in allowed
    }
    best = min(costs, key=lambda strategy: costs[strategy])
    if present in costs and costs[best] > (1 - LEAST_GAIN) * costs[present]:
        return present
    return best
