"""Who inverts which factor, how each layer is shared, and the measurements behind it; changed at logged steps only.

A plan is a pure function of numbers that all ranks hold alike. At first these are assumed costs (flops); at the end of
the first inverse period, and every REPLAN_PERIODS of them after that, the ranks add up what each measured (seconds of
inversions and of preconditioning, latency and bandwidth of the network) and plan anew. No strategy changes a number
of the training, as long as the ranks round alike, so that timings do not get into the results.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

import torch

from dngd.comm import (
    STRATEGIES,
    Communicator,
    LayerCost,
    Line,
    Network,
    Strategy,
    assign_owners,
    choose_strategy,
    probe_network,
    ranks_are_alike,
)
from dngd.comm.assignment import Factor

logger = logging.getLogger(__name__)

StrategyChoice = Literal["auto", "replicate", "share_inverse", "share_gradient"]
assert set(get_args(StrategyChoice)) == {"auto", *STRATEGIES}

REPLAN_PERIODS = 20
"""Inverse periods between two plans, after the first: a thousand steps with the default period."""

TRAFFIC_BUDGET = 0.03
"""What curvature may send by itself, as a share of the gradients."""

INITIAL_STRATEGY: Strategy = "share_inverse"
"""What `auto` assumes until the ranks have met, and does where they do not round alike."""

SECONDS_PER_FLOP = 1e-10
"""Of assumed costs. Only their proportions matter, until a measured one is there to scale them by."""


@dataclass(frozen=True)
class LayerSizes:
    """What is known of a layer before anything is measured.

    flops: of inverting (A, G). inverse_bytes, gradient_bytes: as sent. full_bytes: of its statistics, or of its
    inverses, where nothing of them may be rounded.
    """

    flops: tuple[float, float]
    inverse_bytes: int
    gradient_bytes: int
    full_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Who does what, from `step` on.

    strategies: by layer. owners: the rank that inverts each factor for the others (with "replicate" every rank
    inverts, and the owner only counts). inversion_seconds, precondition_seconds, network: the agreed measurements
    that it was made from; empty and None for an assumed plan.
    """

    step: int
    world_size: int
    strategies: Mapping[str, Strategy]
    owners: Mapping[Factor, int]
    inversion_seconds: Mapping[Factor, float] = field(default_factory=dict)
    precondition_seconds: Mapping[str, float] = field(default_factory=dict)
    network: Network | None = None

    @property
    def is_measured(self) -> bool:
        """Whether any of it rests on measurements."""
        return bool(self.inversion_seconds)

    def inverts(self, factor: Factor, rank: int) -> bool:
        """Return whether a rank inverts a factor."""
        return self.strategies[factor[0]] == "replicate" or self.owners[factor] == rank

    def holder(self, layer: str) -> int | None:
        """Return the one rank that keeps a layer's inverses and applies them; None where all ranks do."""
        return self.owners[layer, "A"] if self.strategies[layer] == "share_gradient" else None

    def refresh_seconds(self, layers: Sequence[str]) -> float:
        """Return how long the busiest rank inverts for these layers, by the agreed measurements; 0 before any."""
        loads = [0.0] * self.world_size
        for factor, seconds in self.inversion_seconds.items():
            if factor[0] in layers:
                for rank in range(self.world_size):
                    loads[rank] += seconds if self.inverts(factor, rank) else 0.0
        return max(loads)

    def to_json(self) -> str:
        """Return it as JSON; floats come back bit by bit."""
        return json.dumps(
            {
                "step": self.step,
                "world_size": self.world_size,
                "strategies": dict(self.strategies),
                "owners": [[*factor, rank] for factor, rank in self.owners.items()],
                "inversion_seconds": [[*factor, seconds] for factor, seconds in self.inversion_seconds.items()],
                "precondition_seconds": dict(self.precondition_seconds),
                "network": None if self.network is None else asdict(self.network),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return what `to_json` wrote."""
        saved = json.loads(text)
        network = saved["network"]
        return cls(
            step=saved["step"],
            world_size=saved["world_size"],
            strategies=saved["strategies"],
            owners={(name, which): rank for name, which, rank in saved["owners"]},
            inversion_seconds={(name, which): seconds for name, which, seconds in saved["inversion_seconds"]},
            precondition_seconds=saved["precondition_seconds"],
            network=None if network is None else Network(**{key: Line(**line) for key, line in network.items()}),
        )

    def __str__(self) -> str:
        layers = "; ".join(
            f"{name}: {strategy}, owners {self.owners[name, 'A']} and {self.owners[name, 'G']}"
            + (f", {1e3 * self.refresh_seconds([name]):.2f} ms an inversion" if self.is_measured else "")
            for name, strategy in self.strategies.items()
        )
        words = "measured" if self.is_measured else "assumed"
        network = ""
        if self.network is not None:
            line = self.network.broadcast
            network = f"; broadcast {1e6 * line.latency_seconds:.0f} us + {1e9 * line.seconds_per_byte:.2f} ns a byte"
        return f"curvature plan from step {self.step} on ({words}, {self.world_size} ranks): {layers}{network}"


def make_plan(
    step: int,
    sizes: Mapping[str, LayerSizes],
    strategies: Mapping[str, Strategy],
    world_size: int,
    inversion_seconds: Mapping[Factor, float] | None = None,
    precondition_seconds: Mapping[str, float] | None = None,
    network: Network | None = None,
) -> Plan:
    """Return the plan for these strategies: owners by cost, longest first; both factors of a "share_gradient" layer
    have one. A factor that was not measured costs what its flops say, at the rate of those that were."""
    inversion_seconds = inversion_seconds or {}
    costs = _filled(sizes, inversion_seconds)
    whole: dict[str, list[Factor]] = {}
    for name in sizes:
        pair: list[Factor] = [(name, "A"), (name, "G")]
        whole[name] = pair[:1] if strategies[name] == "share_gradient" else pair
        if strategies[name] == "share_gradient":
            costs[name, "A"] += costs.pop((name, "G"))
    owners = assign_owners(costs, world_size, whole.values())
    for name in sizes:
        owners.setdefault((name, "G"), owners[name, "A"])
    return Plan(
        step,
        world_size,
        dict(strategies),
        {(name, which): owners[name, which] for name in sizes for which in "AG"},
        _filled(sizes, inversion_seconds) if inversion_seconds else {},
        dict(precondition_seconds or {}),
        network,
    )


def _filled(sizes: Mapping[str, LayerSizes], measured: Mapping[Factor, float]) -> dict[Factor, float]:
    """Return seconds of every factor's inversion: the measured ones, and flops at their rate for the rest."""
    flops = {(name, which): s.flops[i] for name, s in sizes.items() for i, which in enumerate("AG")}
    rate = SECONDS_PER_FLOP
    if measured:
        rate = sum(measured[f] for f in sorted(measured)) / sum(flops[f] for f in sorted(measured))
    return {factor: measured.get(factor, flops[factor] * rate) for factor in flops}


def initial_strategies(layers: Iterable[str], choice: StrategyChoice) -> dict[str, Strategy]:
    """Return each layer's strategy before anything is measured."""
    return dict.fromkeys(layers, INITIAL_STRATEGY if choice == "auto" else choice)


class Planner:
    """Keeps the plan in force and what this rank measured since the last one.

    choice: a strategy for all layers, or "auto". shares_gradients: whether "auto" may let one rank keep a
    layer's inverses (not where every rank needs the eigenbases). traffic_budget: most bytes that "auto" lets a layer
    send a step, statistics and what its strategy adds, as a share of its gradient's bytes: preconditioned gradients
    are as many again, so that share_gradient needs 1. Where ranks do not round alike share_inverse is all that works,
    whatever it sends.
    """

    def __init__(
        self,
        sizes: Mapping[str, LayerSizes],
        communicator: Communicator,
        choice: StrategyChoice,
        *,
        shares_gradients: bool = True,
        traffic_budget: float = TRAFFIC_BUDGET,
    ) -> None:
        self._sizes = dict(sizes)
        self._comm = communicator
        self._choice: StrategyChoice = choice
        self._shares_gradients = shares_gradients
        self._traffic_budget = traffic_budget
        self._inversions: dict[Factor, deque[float]] = defaultdict(lambda: deque(maxlen=5))
        self._preconditionings: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=5))
        self.plan = make_plan(0, self._sizes, initial_strategies(self._sizes, choice), communicator.world_size)
        self._has_begun = choice != "auto" or communicator.world_size == 1

    def begin(self, step: int, inverse_period: int, device: torch.device) -> Plan | None:
        """Return what `auto` does until there are measurements, once the ranks have met; None if nothing changes.

        Inverses are renewed most often in the beginning: a layer is inverted by all ranks where sending its inverses
        would exceed the budget even later. All ranks enter, before every launch.
        """
        if self._has_begun:
            return None
        self._has_begun = True
        alike = ranks_are_alike(self._comm, device)
        strategies = {
            name: INITIAL_STRATEGY if INITIAL_STRATEGY in self._allowed(alike, sizes, inverse_period) else "replicate"
            for name, sizes in self._sizes.items()
        }
        if strategies == dict(self.plan.strategies):
            return None
        known = self.plan
        self.plan = make_plan(
            step,
            self._sizes,
            strategies,
            self._comm.world_size,
            known.inversion_seconds,
            known.precondition_seconds,
            known.network,
        )
        return self.plan

    def is_due(self, step: int, inverse_period: int) -> bool:
        """Return whether all ranks plan anew at this step."""
        return step > 0 and (step == inverse_period or step % (REPLAN_PERIODS * inverse_period) == 0)

    def record_inversion(self, factor: Factor, seconds: float) -> None:
        """Note how long this rank took for an inversion."""
        self._inversions[factor].append(seconds)

    def record_preconditioning(self, layer: str, seconds: float) -> None:
        """Note how long this rank took to precondition a layer's gradient."""
        self._preconditionings[layer].append(seconds)

    def replan(self, step: int, inverse_period: int, device: torch.device) -> Plan:
        """Agree on the measurements, plan from them, log the plan. All ranks enter; all get the same plan."""
        inversions, preconditionings = self._agree(device)
        network = None
        strategies = dict(self.plan.strategies)
        if self._choice == "auto" and self._comm.world_size > 1 and preconditionings:
            network = probe_network(self._comm, device)
            alike = ranks_are_alike(self._comm, device)
            seconds = _filled(self._sizes, inversions)
            # A layer that never had a gradient was not measured, and stays as it is.
            for name, sizes in ((name, self._sizes[name]) for name in self._sizes if name in preconditionings):
                cost = LayerCost(
                    (seconds[name, "A"], seconds[name, "G"]),
                    preconditionings[name],
                    sizes.inverse_bytes,
                    sizes.gradient_bytes,
                )
                strategies[name] = choose_strategy(
                    cost,
                    network,
                    present=strategies[name],
                    allowed=self._allowed(alike, sizes, inverse_period),
                    period=inverse_period,
                    world_size=self._comm.world_size,
                    num_layers=len(self._sizes),
                )
        self.plan = make_plan(
            step, self._sizes, strategies, self._comm.world_size, inversions, preconditionings, network
        )
        self._inversions.clear()
        self._preconditionings.clear()
        if self._comm.rank == 0:
            logger.info("%s", self.plan)
        return self.plan

    def _allowed(self, alike: bool, sizes: LayerSizes, inverse_period: int) -> Collection[Strategy]:
        if not alike:
            return [
                s for s in STRATEGIES if s == "share_inverse" or (s == "share_gradient" and self._may_share_gradients)
            ]
        budget = self._traffic_budget * sizes.gradient_bytes * inverse_period
        return [
            strategy
            for strategy in STRATEGIES
            if strategy == "replicate"
            or (strategy == "share_inverse" and 2 * sizes.full_bytes <= budget)
            or (strategy == "share_gradient" and self._may_share_gradients)
        ]

    @property
    def _may_share_gradients(self) -> bool:
        return self._shares_gradients and self._traffic_budget >= 1

    def _agree(self, device: torch.device) -> tuple[dict[Factor, float], dict[str, float]]:
        """Return the mean over the ranks that measured of their medians; the last plan's where none did."""
        factors: list[Factor] = [(name, which) for name in self._sizes for which in "AG"]
        keys: list[Factor | str] = [*factors, *self._sizes]
        seconds, counts = [], []
        for key in keys:
            values = self._inversions.get(key) if isinstance(key, tuple) else self._preconditionings.get(key)
            seconds.append(statistics.median(values) if values else 0.0)
            counts.append(1.0 if values else 0.0)
        agreed = torch.tensor([seconds, counts], dtype=torch.float64, device=device)
        self._comm.all_reduce(agreed.view(-1), "state", group="factor").wait()
        sums, num_ranks = agreed.tolist()
        means = {key: total / count for key, total, count in zip(keys, sums, num_ranks) if count}
        inversions = dict(self.plan.inversion_seconds) | {f: means[f] for f in factors if f in means}
        layers = dict(self.plan.precondition_seconds) | {n: means[n] for n in self._sizes if n in means}
        return inversions, layers

    def restore(self, saved: Plan, device: torch.device) -> Plan:
        """Take a saved plan: as it is in a world of its size, its measurements planned anew in another one.

        A strategy that was asked for stays the one in use, whatever the plan says. All ranks enter: where `auto` let
        them all invert, they must still round alike, which a lost one's replacement may not.
        """
        self._inversions.clear()
        self._preconditionings.clear()
        same = saved.world_size == self._comm.world_size
        self._has_begun = same or self._choice != "auto" or self._comm.world_size == 1
        strategies = (
            dict(saved.strategies) if same and self._choice == "auto" else initial_strategies(self._sizes, self._choice)
        )
        all_invert = self._choice == "auto" and self._comm.world_size > 1 and "replicate" in strategies.values()
        if all_invert and not ranks_are_alike(self._comm, device):
            strategies = {n: "share_inverse" if s == "replicate" else s for n, s in strategies.items()}
        if same and strategies == dict(saved.strategies):
            self.plan = saved
        else:
            self.plan = make_plan(
                saved.step,
                self._sizes,
                strategies,
                self._comm.world_size,
                saved.inversion_seconds,
                saved.precondition_seconds,
                saved.network if same else None,
            )
        return self.plan
