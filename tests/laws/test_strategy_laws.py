"""How curvature is shared changes no bit: any strategy, any owners, changed at any step, saved and gone on with."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dngd.comm import STRATEGIES
from dngd.curvature import FactorLayout
from dngd.optim import KFACPreconditioner, directions
from dngd.optim.inverses import StoredInverse
from dngd.optim.plan import LayerSizes, Plan, make_plan
from dngd.optim.refresh import Refresh, RefreshPipeline
from tests.helpers.mutants import assert_caught
from tests.helpers.thread_world import ThreadCommunicator, run_threads

LAYERS = ("first", "side", "last")


@dataclass(frozen=True)
class Scenario:
    """counts[step][rank]: rows of that rank; side[step][rank]: whether they pass the layer "side".

    dropped: steps whose gradients are not finite. overflows: (step, rank) pairs whose rows overflow their sums.
    replans: steps before which another plan comes into force, drawn from plan_seed. resume_at: the step before which
    the state is saved and loaded into a new preconditioner. output_rank: of layers whose G is low rank.
    """

    counts: tuple[tuple[int, ...], ...]
    side: tuple[tuple[bool, ...], ...]
    dropped: frozenset[int] = frozenset()
    overflows: frozenset[tuple[int, int]] = frozenset()
    inverse_period: int = 4
    delay: int = 0
    threshold: float = 0.0
    replans: frozenset[int] = frozenset()
    plan_seed: int = 0
    resume_at: int | None = None
    output_rank: int | None = None

    @property
    def world_size(self) -> int:
        return len(self.counts[0])


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    world = draw(st.integers(2, 4))
    steps = draw(st.integers(2, 12))
    inverse_period = draw(st.integers(2, 5))
    at = st.integers(0, steps - 1)
    row = st.tuples(*[st.integers(0, 3)] * world)
    flags = st.tuples(*[st.booleans()] * world)
    return Scenario(
        counts=tuple(draw(st.lists(row, min_size=steps, max_size=steps))),
        side=tuple(draw(st.lists(flags, min_size=steps, max_size=steps))),
        dropped=frozenset(draw(st.sets(at, max_size=2))),
        overflows=frozenset(draw(st.sets(st.tuples(at, st.integers(0, world - 1)), max_size=1))),
        inverse_period=inverse_period,
        delay=draw(st.integers(0, inverse_period - 1)),
        threshold=draw(st.sampled_from([0.0, 0.5])),
        replans=frozenset(draw(st.sets(at, max_size=4))),
        plan_seed=draw(st.integers(0, 1000)),
        resume_at=draw(st.none() | st.integers(1, steps - 1)),
        output_rank=draw(st.sampled_from([None, 1])),
    )


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.side, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        generator = torch.Generator().manual_seed(0)  # torch's own stream is shared by the threads of a world
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
            parameter.grad = torch.zeros_like(parameter)

    def forward(self, x: Tensor, side: bool) -> Tensor:
        hidden = torch.tanh(self.first(x))
        out: Tensor = self.last(hidden + self.side(hidden) if side else hidden)
        return out


def make(net: nn.Module, scenario: Scenario, comm: ThreadCommunicator, strategy: Any) -> KFACPreconditioner:
    return KFACPreconditioner(
        net,
        damping=0.02,
        damping_mode="relative",
        loss_reduction="sum",
        factor_decay=0.7,
        factor_update_period=1,
        inverse_update_period=scenario.inverse_period,
        dense_steps=2,
        inverse_delay=scenario.delay,
        change_threshold=scenario.threshold,
        kl_clip=1e-2,
        lr=0.1,
        layout=FactorLayout(max_dimension=6, rank=2, output_rank=scenario.output_rank),
        inverse_precision="float16",
        max_dropped_steps=None,
        strategy=strategy,
        communicator=comm,
    )


def drawn_plan(scenario: Scenario, step: int) -> Plan:
    """A plan of any strategies and owners, the same on all ranks."""
    draw = random.Random(f"{scenario.plan_seed} {step}")
    strategies = {name: draw.choice(STRATEGIES) for name in LAYERS}
    owners = {(name, which): draw.randrange(scenario.world_size) for name in LAYERS for which in "AG"}
    for name in LAYERS:
        if strategies[name] == "share_gradient":
            owners[name, "G"] = owners[name, "A"]
    return Plan(step, scenario.world_size, strategies, owners)


def run(scenario: Scenario, strategy: Any) -> list[list[list[Tensor]]]:
    """The preconditioned gradients of every rank and step; strategy None: the plans that the scenario draws."""

    def work(comm: ThreadCommunicator) -> list[list[Tensor]]:
        net = Net()
        pre = make(net, scenario, comm, strategy or "share_inverse")
        out = []
        for step, counts in enumerate(scenario.counts):
            if strategy is None and step == scenario.resume_at:
                state = pre.state_dict()
                pre.close()
                pre = make(net, scenario, comm, "auto")
                pre.load_state_dict(state)
            if strategy is None and step in scenario.replans:
                pre.pipeline.change_plan(drawn_plan(scenario, step))
            net.zero_grad(set_to_none=False)
            count = counts[comm.rank]
            if count:
                generator = torch.Generator().manual_seed(100 * step + comm.rank)
                x = torch.randn(count, 3, generator=generator)
                net(x, scenario.side[step][comm.rank]).square().sum().backward()
            pending = pre.layers["first"].pending
            if (step, comm.rank) in scenario.overflows and pending is not None:
                pending.a[0][0] = float("inf")
            for parameter in net.parameters():
                comm.all_reduce(parameter.grad.view(-1), "gradient")
            finite = step not in scenario.dropped
            pre.step(count, finite=finite, mean_gradients=True)
            out.append([p.grad.clone() for p in net.parameters()])
        pre.close()
        return out

    try:
        return run_threads(scenario.world_size, work)
    except (RuntimeError, IndexError, KeyError) as error:
        raise AssertionError(f"a rank failed: {error!r}") from error


def same_bits(found: Any, expected: Any) -> None:
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b), f"another gradient at step {step}"


def law_no_plan_changes_a_bit(scenario: Scenario) -> None:
    expected = run(replace(scenario, resume_at=None), "share_inverse")
    for strategy in ("replicate", "share_gradient", None):
        for found in run(scenario, strategy):
            same_bits(found, expected[0])


@pytest.mark.filterwarnings("ignore:layer .* has a gradient")  # a layer that no row has reached so far
@settings(max_examples=12, deadline=None)
@given(scenarios())
def test_no_plan_changes_a_bit(scenario: Scenario) -> None:
    law_no_plan_changes_a_bit(scenario)


EXAMPLE = Scenario(
    counts=((2, 1), (0, 3), (1, 1), (3, 0), (2, 2), (1, 0), (0, 0), (1, 2), (2, 1), (1, 1), (3, 2), (1, 2)),
    side=((True, False), (True, True), (False, False), *[(True, False)] * 9),
    dropped=frozenset({5}),
    overflows=frozenset({(4, 1)}),
    threshold=0.5,
    delay=2,
    replans=frozenset({1, 2, 5, 7, 9}),
    plan_seed=3,
    resume_at=8,
)


def test_mutants_are_caught() -> None:
    def keeps_its_own(layers: Any, holders: Any, computed: Any, comm: Any) -> dict[str, Tensor]:
        out = original_share(layers, holders, computed, comm)
        return {name: computed.get(name, torch.zeros_like(value)) for name, value in out.items()}

    def sends_what_it_has(layers: Any, holders: Any, computed: Any, comm: Any) -> dict[str, Tensor]:
        shared = original_share(layers, holders, computed, comm)
        if comm.rank == 0 and holders:
            comm.broadcast(torch.zeros(1), 0, "preconditioned")
        return shared

    def leaves_them_where_they_are(self: RefreshPipeline, plan: Plan) -> None:
        self.plan = plan

    def goes_by_the_new_plan(self: RefreshPipeline, refresh: Refresh) -> Any:
        refresh.plan = self.plan
        return original_by_owner(self, refresh)

    def saves_what_it_has(self: RefreshPipeline, factor: Any, inverse: StoredInverse, *rest: Any) -> StoredInverse:
        fetched = original_fetched(self, factor, inverse, *rest)
        return inverse if inverse.tensors else replace(fetched, tensors=tuple(map(torch.zeros_like, fetched.tensors)))

    original_share = directions.share_directions
    original_by_owner, original_fetched = RefreshPipeline._by_owner, RefreshPipeline._fetched
    cases: list[tuple[Any, str, Callable[..., Any]]] = [
        (directions, "share_directions", keeps_its_own),
        (directions, "share_directions", sends_what_it_has),
        (RefreshPipeline, "change_plan", leaves_them_where_they_are),
        (RefreshPipeline, "_by_owner", goes_by_the_new_plan),
        (RefreshPipeline, "_fetched", saves_what_it_has),
    ]
    for target, attribute, replacement in cases:
        assert_caught(lambda: law_no_plan_changes_a_bit(EXAMPLE), target, attribute, replacement)


def test_memory_follows_the_strategy() -> None:
    """A rank that holds no inverse of a layer keeps none of its bytes."""

    def held(strategy: str) -> list[int]:
        def work(comm: ThreadCommunicator) -> int:
            net = Net()
            pre = make(net, EXAMPLE, comm, strategy)
            net(torch.randn(4, 3, generator=torch.Generator().manual_seed(comm.rank)), True).square().sum().backward()
            for parameter in net.parameters():
                comm.all_reduce(parameter.grad.view(-1), "gradient")
            pre.step(4, finite=True, mean_gradients=True)
            kept = sum(t.nbytes for s in pre.states.values() for i in s.inverses.values() for t in i.tensors)
            others = pre.memory_bytes() - kept
            assert all(len(state.inverses) == 2 for state in pre.states.values())
            pre.close()
            assert others > 0
            return kept

        return run_threads(2, work)

    everywhere, apart = held("share_inverse"), held("share_gradient")
    assert everywhere[0] == everywhere[1] == held("replicate")[0]
    assert sum(apart) == everywhere[0]
    assert min(apart) > 0, "one rank holds everything"


def test_a_layer_without_gradient_on_its_holder() -> None:
    """Its direction is zeros for everyone; nobody waits for a buffer of another size."""

    def work(comm: ThreadCommunicator) -> dict[str, Tensor]:
        net = Net()
        layers = make(net, EXAMPLE, comm, "share_gradient").layers
        mine = {} if comm.rank == 0 else {"last": torch.ones(2, 7)}
        return directions.share_directions(layers, {"first": 0, "last": 1}, mine, comm)

    for found in run_threads(2, work):
        assert torch.equal(found["first"], torch.zeros(6, 4))
        assert torch.equal(found["last"], torch.ones(2, 7))


def test_budget_staggers_alike_on_all_ranks() -> None:
    """Layers beyond a step's budget start in the next ones, in order; one always starts; none is lost."""
    plan = make_plan(
        0,
        {name: LayerSizes((1.0, 1.0), 8, 8) for name in LAYERS},
        dict.fromkeys(LAYERS, "replicate"),
        2,
        {(name, which): 1.0 for name in LAYERS for which in "AG"},
    )
    assert plan.refresh_seconds(["first", "last"]) == 4.0

    def launches(budget: float | None) -> list[list[tuple[int, tuple[str, ...]]]]:
        def work(comm: ThreadCommunicator) -> list[tuple[int, tuple[str, ...]]]:
            net = Net()
            pre = KFACPreconditioner(
                net,
                inverse_update_period=5,
                dense_steps=0,
                factor_update_period=1,
                refresh_budget_seconds=budget,
                strategy="replicate",
                communicator=comm,
            )
            pre._planner.plan = pre.pipeline.plan = plan
            pre._planner.is_due = lambda step, period: False  # type: ignore[method-assign]
            due = {4: [0, 1, 2], 5: [0]}
            pre.schedule = _Scripted(due)  # type: ignore[assignment]
            found: list[tuple[int, tuple[str, ...]]] = []
            launch = pre.pipeline.launch

            def noted(step: int, layers: Any, damping: Any, delay: int) -> None:
                found.append((step, tuple(layers)))
                launch(step, layers, damping, delay)

            pre.pipeline.launch = noted  # type: ignore[method-assign]
            for _ in range(9):
                net(torch.ones(2, 3), True).square().sum().backward()
                pre.step(2, finite=True, mean_gradients=True)
            pre.close()
            return found

        return run_threads(2, work)

    start = (0, LAYERS)
    for found in launches(None):
        assert found == [start, (4, LAYERS), (5, ("first",))]
    for found in launches(4.0):
        assert found == [start, (4, ("first", "side")), (5, ("last", "first"))]
    for found in launches(0.5):
        assert found == [start, (4, ("first",)), (5, ("side",)), (6, ("last",)), (7, ("first",))]


class _Scripted:
    """A schedule with refreshes at given steps."""

    factor_update_period, inverse_update_period = 1, 100

    def __init__(self, due: dict[int, list[int]]) -> None:
        self._due = due

    def is_factor_step(self, step: int) -> bool:
        return True

    def layers_due(self, step: int, num_layers: int) -> list[int]:
        return self._due.get(step, [])
